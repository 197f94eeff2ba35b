"""Paired comparisons of models on the same windows and items, each computed once; the chapters read them."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from wanda_dvc.engine.flips import Disagreement, mcnemar
from wanda_dvc.report.measures import Measured
from wanda_dvc.report.rows import Row
from wanda_dvc.results import inference
from wanda_dvc.results.inference import Estimate

ALPHA = 0.05


class Comparison(NamedTuple):
    """A pruned model against another one, or against the dense model.

    Its p-values are adjusted for all tests of its section (Holm). None, or a missing task: not comparable.
    """

    first: Row
    second: Row | None  # None: the dense model
    ratio: Estimate | None  # the first model's perplexity divided by the second's
    mean: Estimate | None  # the first's mean accuracy over tasks minus the second's
    tasks: dict[str, Disagreement]

    @property
    def rows(self) -> tuple[tuple[str, str | None], ...]:
        """The names and commits of the experiments: a name may be that of another one on another commit."""
        return tuple((row.name, row.commit) for row in (self.first, self.second) if row)

    def tests(self) -> list[Estimate | Disagreement]:
        """Return every test."""
        return [test for test in (self.ratio, self.mean, *self.tasks.values()) if test]

    def adjusted(self, p: Iterator[float]) -> "Comparison":
        """Return the comparison with other p-values, in the order of `tests`."""
        ratio, mean = (test and test._replace(p=next(p)) for test in (self.ratio, self.mean))
        tasks = {task: disagreement._replace(p=next(p)) for task, disagreement in self.tasks.items()}
        return self._replace(ratio=ratio, mean=mean, tasks=tasks)


def compare(pairs: Iterable[tuple[Row, Row | None]], tasks: Sequence[str], dense: Measured) -> list[Comparison]:
    """Compare each pair; None as the second row means the dense model."""
    made = []
    for first, second in pairs:
        own, other = first.pruned, second.pruned if second else dense
        answers = {task: own.same_items(other, task) for task in tasks}
        tests = {task: mcnemar(*both) for task, both in answers.items() if both[0]}
        made.append(Comparison(first, second, own.ratio(other), paired_mean(list(answers.values())), tests))
    p = iter(inference.holm([test.p for one in made for test in one.tests()]))
    return [one.adjusted(p) for one in made]


def paired_mean(tasks: Sequence[tuple[list[bool], list[bool]]]) -> Estimate | None:
    """Return the first model's mean accuracy over tasks minus the second's; None without common items in every task."""
    if not tasks or not all(mine for mine, _ in tasks):
        return None
    differences = [[float(a) - float(b) for a, b in zip(*answers, strict=True)] for answers in tasks]
    found = inference.mean_of_tasks(differences)
    return found and found.within(-1, 1)


def beyond_noise(test: Estimate | Disagreement | None) -> bool:
    """Whether a test's adjusted p-value is below 0.05."""
    return test is not None and test.p < ALPHA
