"""The chapter on how sure the numbers are: intervals, and paired tests adjusted for their number."""

from wanda_dvc.report import inference
from wanda_dvc.report.comparisons import ALPHA, Comparison, beyond_noise
from wanda_dvc.report.formatting import DASH, factor, interval, number, percent, signed
from wanda_dvc.report.measures import Measured, pruned
from wanda_dvc.report.pages import Content, Table, Text, literal
from wanda_dvc.report.section import Section


def content(section: Section) -> Content:
    """Each number's interval, the comparisons, and what the tests mean."""
    tests = sum(len(one.p_values()) for one in section.comparisons)
    return [
        _alone(section),
        Table(
            "Paired: perplexity on the same windows as a ratio; the mean accuracy's difference on the items that both "
            "answered, in percentage points, tasks counting equally.",
            [
                "",
                "perplexity",
                "95 % interval",
                "p, adjusted",
                "mean accuracy, points",
                "95 % interval",
                "p, adjusted",
            ],
            [[_names(section, one), *_ratio(one), *_mean(one)] for one in section.comparisons],
        ),
        Table(
            "Items that only the first got right / only the second; * where McNemar's exact test, adjusted, is below "
            "0.05.",
            ["", *map(literal, section.tasks)],
            [[_names(section, one), *(_task(one, task) for task in section.tasks)] for one in section.comparisons],
        ),
        Text(
            f"{tests} tests were made in this section. All p-values are adjusted for that number (Holm); unadjusted, "
            f"{ALPHA * tests:.2g} of {tests} on average would fall below 0.05 if nothing differed at all. "
            "Intervals are not adjusted. Windows of one text are treated as independent, which they are not quite: the "
            "intervals of single perplexities are somewhat too narrow. A test speaks of these items and this text, "
            "with one calibration; another seed is another experiment."
        ),
    ]


def _alone(section: Section) -> Table:
    base = section.dense("perplexity")
    rows = []
    if base:
        answers = [list(measured.answers(task).values()) for task, measured in section.dense_by_task.items()]
        answers += [[]] * (len(section.tasks) - len(answers))
        rows.append(["dense", *_perplexity(base), *_accuracy(section.dense_mean, answers)])
    for row in section.ordered:
        answers = [list(pruned(row).answers(task).values()) for task in section.tasks]
        rows.append([literal(section.label(row)), *_perplexity(pruned(row)), *_accuracy(section.mean(row), answers)])
    return Table(
        "Each number's own 95 % interval: of perplexity over its windows (t on the mean loss), of the mean accuracy "
        "over its items, in percent (t, cut off at 0 and 100).",
        ["", "perplexity", "interval", "mean accuracy", "interval"],
        rows,
    )


def _perplexity(measured: Measured) -> list[str]:
    return [number(measured.perplexity), interval(measured.perplexity_interval(), number)]


def _accuracy(mean: float | None, answers: list[list[bool]]) -> list[str]:
    """The mean and its interval; no interval unless the answers to every task are at hand."""
    if mean is None or not all(answers):
        return [percent(mean), DASH]
    return [percent(mean), interval(inference.mean_accuracy(answers), percent)]


def _names(section: Section, comparison: Comparison) -> str:
    return " against ".join(section.names(comparison))


def _ratio(comparison: Comparison) -> list[str]:
    ratio = comparison.ratio
    shown = f"{factor(ratio.value)} ×" if ratio else DASH
    return [shown, interval(ratio, factor), _verdict(comparison.ratio_p)]


def _mean(comparison: Comparison) -> list[str]:
    mean = comparison.mean
    return [signed(mean.value) if mean else DASH, interval(mean, signed), _verdict(comparison.mean_p)]


def _task(comparison: Comparison, task: str) -> str:
    if task not in comparison.tasks:
        return DASH
    disagreement = comparison.tasks[task]
    return f"{disagreement.first} / {disagreement.second}{' *' if beyond_noise(disagreement.p) else ''}"


def _verdict(p: float | None) -> str:
    if p is None:
        return DASH
    shown = "< 0.001" if p < 0.001 else f"{p:.3f}"
    return shown if beyond_noise(p) else f"{shown}, within noise"
