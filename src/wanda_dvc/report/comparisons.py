"""Paired comparisons of models, each computed once; the chapters read them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from wanda_dvc.report import inference
from wanda_dvc.report.inference import Disagreement, Estimate
from wanda_dvc.report.measures import Measured, paired_mean, pruned
from wanda_dvc.report.rows import Row

ALPHA = 0.05


@dataclass(frozen=True)
class Comparison:
    """A pruned model against another one, or against the dense model, on the same windows and items.

    Its p-values are adjusted for all tests of its section (Holm). None, or a missing task: not comparable.
    """

    first: Row
    second: Row | None  # None: the dense model
    ratio: Estimate | None  # the first's perplexity divided by the second's
    mean: Estimate | None  # the first's mean accuracy over tasks minus the second's
    tasks: Mapping[str, Disagreement]
    ratio_p: float | None = None
    mean_p: float | None = None

    def p_values(self) -> list[float]:
        """The p-value of every test made."""
        estimates = [estimate.p for estimate in (self.ratio, self.mean) if estimate]
        return [*estimates, *(disagreement.p for disagreement in self.tasks.values())]

    def with_p_values(self, values: Iterable[float]) -> "Comparison":
        """The same with other p-values, given in the order of `p_values`."""
        left = iter(values)
        return replace(
            self,
            ratio_p=next(left) if self.ratio else None,
            mean_p=next(left) if self.mean else None,
            tasks={task: disagreement._replace(p=next(left)) for task, disagreement in self.tasks.items()},
        )


def compare(
    pairs: Iterable[tuple[Row, Row | None]], tasks: Sequence[str], dense: Mapping[str, Row | None]
) -> list[Comparison]:
    """Compare each pair; a second row of None stands for the dense model.

    `dense`: by measure, `perplexity` or `zero_shot/TASK`, the row that has the dense model's results.
    """
    made = [_compare(first, second, tasks, dense) for first, second in pairs]
    adjusted = iter(inference.holm([p for one in made for p in one.p_values()]))
    return [one.with_p_values([next(adjusted) for _ in one.p_values()]) for one in made]


def _compare(first: Row, second: Row | None, tasks: Sequence[str], dense: Mapping[str, Row | None]) -> Comparison:
    def other(measure: str) -> Measured | None:
        if second:
            return pruned(second)
        row = dense[measure]
        return Measured(row, "dense") if row else None

    own, against = pruned(first), other("perplexity")
    answers: dict[str, tuple[list[bool], list[bool]]] = {}
    for task in tasks:
        model = other(f"zero_shot/{task}")
        answers[task] = own.same_items(model, task) if model else ([], [])
    return Comparison(
        first,
        second,
        own.ratio(against) if against else None,
        paired_mean(list(answers.values())),
        {task: inference.mcnemar(*both) for task, both in answers.items() if both[0]},
    )


def beyond_noise(p: float | None) -> bool:
    """Whether a test's adjusted p-value is below 0.05."""
    return p is not None and p < ALPHA
