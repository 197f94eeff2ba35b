"""The chapter on uncertainty: intervals, and paired tests adjusted for their number."""

from collections.abc import Callable

from wanda_dvc.report.comparisons import ALPHA, Comparison, beyond_noise
from wanda_dvc.report.formatting import DASH, factor, interval, percent, signed
from wanda_dvc.report.pages import Content, table
from wanda_dvc.report.section import Section
from wanda_dvc.results import inference
from wanda_dvc.results.inference import Estimate
from wanda_dvc.study.markup import inline, number


def content(section: Section) -> Content:
    """Each number's interval, the comparisons, and the meaning of the tests."""
    tests = sum(len(one.tests()) for one in section.comparisons)
    first, *others = section.texts
    on = f" on {section.about(first)}" if others else ""
    columns = ["perplexity", "95 % interval", "p, adjusted", "mean accuracy, points", "95 % interval", "p, adjusted"]
    return [
        _alone(section),
        table(
            f"Paired: perplexity{on} on the same windows as a ratio; the mean accuracy's difference on the items that "
            "both answered, in percentage points, tasks counting equally.",
            ["", *columns],
            [
                [section.names(one), *_paired(one.ratio, factor, " ×"), *_paired(one.mean, signed, "")]
                for one in section.comparisons
            ],
        ),
        *(_on_text(section.on(text), section.about(text), columns[:3]) for text in others),
        table(
            "Items that only the first got right / only the second; * where McNemar's exact test, adjusted, is below "
            "0.05.",
            ["", *map(inline, section.tasks)],
            [[section.names(one), *(_task(one, task) for task in section.tasks)] for one in section.comparisons],
        ),
        f"This section makes {tests} tests. All p-values are adjusted for that number (Holm). Unadjusted, "
        f"{ALPHA * tests:.2g} of {tests} on average would fall below 0.05 without any difference. Intervals are not "
        "adjusted. Windows of one text are treated as independent, so the intervals of single perplexities are "
        "slightly too narrow. A test covers these items, this text and one calibration; another seed is another "
        "experiment.",
    ]


def _on_text(section: Section, about: str, columns: list[str]) -> str:
    """Return the paired perplexities on a further text."""
    rows = [[section.names(one), *_paired(one.ratio, factor, " ×")] for one in section.comparisons]
    return table(f"Paired: perplexity on {about}, adjusted for the tests on that text.", ["", *columns], rows)


def _alone(section: Section) -> str:
    rows = []
    for name, model in section.models:
        answers = [list(model.answers(task).values()) for task in section.tasks]
        mean = interval(inference.mean_accuracy(answers), percent) if answers and all(answers) else DASH
        perplexity = interval(model.perplexity_interval(), number)
        rows.append([name, number(model.perplexity), perplexity, percent(model.mean(section.tasks)), mean])
    return table(
        "Each number's own 95 % interval: of perplexity over its windows (t on the mean loss), of the mean accuracy "
        "over its items, in percent (t, cut off at 0 and 100).",
        ["", "perplexity", "interval", "mean accuracy", "interval"],
        rows,
    )


def _paired(test: Estimate | None, shown: Callable[[float], str], unit: str) -> list[str]:
    """A difference, its interval, and the adjusted p-value."""
    if test is None:
        return [DASH] * 3
    p = "< 0.001" if test.p < 0.001 else f"{test.p:.3f}"
    return [f"{shown(test.value)}{unit}", interval(test, shown), p if beyond_noise(test) else f"{p}, within noise"]


def _task(comparison: Comparison, task: str) -> str:
    if task not in comparison.tasks:
        return DASH
    disagreement = comparison.tasks[task]
    return f"{disagreement.first} / {disagreement.second}{' *' if beyond_noise(disagreement) else ''}"
