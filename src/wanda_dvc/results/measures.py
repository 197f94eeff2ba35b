"""The measures of a model, as rows of one table, and the record of results that they read.

`show`, `list`, the report, the model card, `evaluate` and `Study.results()` loop over `MEASURES`. To add a measure,
let a stage write its number below metrics/ (`dvc metrics diff` then has it too), and add a function and a row here.
Two values may be compared only if `results.compare.reason` finds no difference of their protocols.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from wanda_dvc.reading import DIVERGED
from wanda_dvc.results import intervals
from wanda_dvc.results.intervals import Estimate, mean_difference
from wanda_dvc.results.markup import DASH, number
from wanda_dvc.study.files import Json, load_json
from wanda_dvc.study.folder import Study

Value = Estimate | str | None  # `diverged` if a number is not finite; None: not measured
TEXT, TASK, TASKS, MODEL = "text", "task", "all tasks", "model"  # what a value is measured on
LINEAR, LOG = "linear", "log"
ON_TEXT = "perplexity/"
OF_WINDOWS = {"divergence": "divergences", "top1_agreement": "agreements"}  # the details of a measure of metrics


@dataclass(eq=False)
class Results:
    """The results of one model."""

    metrics: Json  # the numbers, by path below metrics/{model}, such as `perplexity/embedded`, `zero_shot`, `sparsity`
    folder: Path | None = None  # of details; None without details, as in `list`
    _details: Json = field(default_factory=dict)

    @classmethod
    def of(cls, study: Study, model: str, *, left_out: Collection[str] = ()) -> "Results":
        """Read the results of the `dense`, `pruned` or `recovered` model of a study.

        `left_out` are files of another run, by path below the study; `stages.runs.Runs.others` finds them.
        """
        folder, details = study.root / "metrics" / model, f"metrics/details/{model}/"
        metrics, texts = Json(), study.params.perplexity.texts
        for path in sorted(folder.rglob("*.json")):
            name = path.relative_to(folder).with_suffix("").as_posix()
            if name.startswith(ON_TEXT) and name.removeprefix(ON_TEXT) not in texts:
                continue  # git still has the results on a removed text
            if path.relative_to(study.root).as_posix() not in left_out and (content := load_json(path)):
                metrics[name] = content
        others: Json = {path[len(details) : -len(".json")]: {} for path in left_out if path.startswith(details)}
        return cls(metrics, study.root / details, others)

    @property
    def texts(self) -> list[str]:
        """The texts of its perplexities."""
        return [name.removeprefix(ON_TEXT) for name in self.metrics if name.startswith(ON_TEXT)]

    @property
    def tasks(self) -> list[str]:
        """The tasks that the model answered."""
        return list(self.metrics.get("zero_shot", {}))

    def details(self, name: str) -> Json:
        """Return the details of a file of metrics: its protocol, and each window's or item's result; {} if missing."""
        if name not in self._details:
            self._details[name] = load_json(self.folder / f"{name}.json") if self.folder else {}
        return self._details[name]

    def adopt(self, other: "Results") -> None:
        """Take another's results on texts that these lack, and on the tasks and prompts if these have none."""
        lacking = [name for name in ("continuations", *other.metrics) if name not in self.metrics]
        self._details |= {name: other.details(name) for name in lacking if not self.details(name)}
        self.metrics = other.metrics | self.metrics

    def keep_of(self, model: str) -> list[str]:
        """Leave out results whose details name another model than the one with this digest; return their names."""
        others = []
        for name in ("layer_error", "continuations", *self.metrics):
            details = self.details(name)
            protocols = [one.get("protocol", {}) for one in details.get("tasks", {"": details}).values()]
            if any(one.get("model", model) != model for one in protocols):
                others.append(name)
                self._details[name] = {}
        self.metrics = {name: numbers for name, numbers in self.metrics.items() if name not in others}
        return others

    def answers(self, task: str) -> Json:
        """Return the protocol and the items' answers of a task; {} if missing."""
        return self.details("zero_shot").get("tasks", {}).get(task, {})


# --- readers: the results and a text, a task or "" → a value ---


def perplexity(results: Results, text: str) -> Value:
    """exp(mean loss), with a 95 % t interval over windows if their losses are known."""
    value = results.metrics.get(ON_TEXT + text, {}).get("perplexity")
    if value is None or value == DIVERGED:
        return value
    ends = intervals.perplexity(*_windows(results, text, "losses"))
    return Estimate(value, *ends[1:3]) if ends else Estimate(value)


def written(results: Results, text: str, *, name: str, part: str = "mean") -> Value:
    """A number that `perplexity` wrote of a text, or `apply` of the weights; one over windows has a mean's interval."""
    found = results.metrics.get(ON_TEXT + text if text else "sparsity", {}).get(name)
    if not isinstance(found, dict):
        return found if found is None or found == DIVERGED else Estimate(found)
    if part != "mean":
        return Estimate(found[part])
    means, predictions = _windows(results, text, OF_WINDOWS[name])
    interval = mean_difference(means, [0.0] * len(means), predictions) if means else None
    if interval is None:
        return Estimate(found[part])
    return interval.within(0, 1 if name == "top1_agreement" else math.inf)._replace(value=found[part], p=math.nan)


def accuracy(results: Results, task: str) -> Value:
    """The fraction of items answered correctly, with Wilson's 95 % interval if the items are known."""
    value = results.metrics.get("zero_shot", {}).get(task, {}).get("acc")
    if value is None or value == DIVERGED:
        return value
    right = _right(results, task)
    ends = intervals.accuracy(right) if right else None
    return Estimate(value, *ends[1:3]) if ends else Estimate(value)


def mean_accuracy(results: Results, _: str) -> Value:
    """The mean over tasks of the accuracy, with Welch's 95 % interval if all items are known."""
    values = [accuracy(results, task) for task in results.tasks]
    if not values or any(value is None or isinstance(value, str) for value in values):
        return DIVERGED if DIVERGED in values else None
    value = sum(one.value for one in values if isinstance(one, Estimate)) / len(values)
    items = [_right(results, task) for task in results.tasks]
    ends = intervals.mean_of_tasks(items, 0) if all(items) else None
    return Estimate(value, *ends[1:3]) if ends else Estimate(value)


def changed(results: Results, _: str, *, way: str) -> Value:
    """The number of answers that pruning changed in one way, over all tasks; None if one task's are unknown."""
    scores = list(results.metrics.get("zero_shot", {}).values())
    if any(one.get("acc") == DIVERGED for one in scores):
        return DIVERGED
    counts = [one["flips"]["acc"] for one in scores if "flips" in one]
    return Estimate(sum(one[way] for one in counts)) if counts and len(counts) == len(scores) else None


def layer_error(results: Results, _: str) -> Value:
    """The mean over linears of ‖(W−Ŵ)X‖² / ‖WX‖²; needs Gram matrices."""
    linears = results.details("layer_error").get("linears", {})
    return Estimate(sum(one["error"] for one in linears.values()) / len(linears)) if linears else None


def _windows(results: Results, text: str, what: str) -> tuple[list[float], list[int]]:
    """Return the windows' means and numbers of predictions; nothing if one is not finite or they are missing."""
    details = results.details(ON_TEXT + text)
    means = details.get(what, [])
    if not means or DIVERGED in (*means, results.metrics[ON_TEXT + text].get("perplexity")):
        return [], []
    protocol = details["protocol"]
    predictions = [protocol["length"] - 1] * protocol["windows"]
    return means, predictions if protocol["rest"] == "dropped" else [*predictions, protocol["rest"] - 1]


def _right(results: Results, task: str) -> list[bool]:
    """Return by item whether the answer is correct; nothing if the items are missing."""
    return [item["acc"] > 0.5 for item in results.answers(task).get("items", [])]


# --- paired tests of a model against another one, on the same windows or items ---


def by_window(
    first: Results, second: Results, text: str, what: str, how: Callable[..., Estimate | None] = mean_difference
) -> Estimate | None:
    """The first mean minus the second, or another comparison, paired by window; None without finite values."""
    (means, predictions), (others, _) = (_windows(one, text, what) for one in (first, second))
    return how(means, others, predictions) if means and others else None


def difference(first: Results, second: Results, task: str) -> Estimate | None:
    """The first accuracy minus the second, paired by item; for "" the mean over tasks.

    The p-value of one task is that of McNemar's exact test. None without items, or without variance over tasks.
    """
    read = accuracy if task else mean_accuracy
    pairs = [(_right(first, one), _right(second, one)) for one in ([task] if task else first.tasks)]
    if DIVERGED in (read(first, task), read(second, task)) or not all(right for right, _ in pairs):
        return None
    found = intervals.mean_of_tasks([[float(a) - float(b) for a, b in zip(*both, strict=True)] for both in pairs], -1)
    if not task:
        return found
    [(right, others)] = pairs
    value = sum(right) / len(right) - sum(others) / len(others)
    return (found or Estimate(value))._replace(p=intervals.mcnemar(right, others))


# --- the table ---


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _factor(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.3f}" if value >= 0.1 else f"{value:.3g}"


def _points(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "−")


def _nats(value: float) -> str:
    return f"{value:+.4f}".replace("-", "−")


class Test(NamedTuple):
    """A paired test of two models with equal protocols; `form` and `unit` are of its value and interval."""

    run: Callable[[Results, Results, str], Estimate | None]
    form: Callable[[float], str]
    unit: str


@dataclass(frozen=True)
class Measure:
    """A row of the table."""

    name: str  # in JSON
    title: str  # in tables
    unit: str  # of its formatted values
    read: Callable[[Results, str], Value]  # a model's value on a text, on a task, or on ""
    form: Callable[[float], str] = "{:.4f}".format  # formats a number
    per: str = MODEL  # or TEXT, TASK, TASKS
    brief: bool = False  # whether `list` shows it; the other views show every measure
    test: Test | None = None  # None: the values are only shown
    drawn: str = ""  # the scale of the report's picture of it, LINEAR or LOG; "": no picture

    def protocols(self, results: Results, on: str) -> dict[str, Json | None]:
        """Return what a value depends on apart from the model, by text or task: its protocol, or None if unknown."""
        if self.per == TEXT:
            return {on: results.details(ON_TEXT + on).get("protocol")}
        tasks = {TASK: [on], TASKS: results.tasks}.get(self.per, [])
        return {task: results.answers(task).get("protocol") for task in tasks}

    def where(self, *several: Results) -> list[str]:
        """Return the texts or tasks of models with a value, or "" for a measure of the model itself."""
        names = [on for one in several for on in {TEXT: one.texts, TASK: one.tasks}.get(self.per, [""])]
        return [on for on in dict.fromkeys(names) if any(self.read(one, on) is not None for one in several)]

    def heading(self, on: str, *, locked: bool) -> str:
        """Return the title with its unit; with the name of the task, or of the text unless it is the only one."""
        named = f"{on}, {self.title}" if self.per == TASK else self.title if locked or not on else f"{self.title}, {on}"
        return f"{named}, {self.unit}" if self.unit else named

    def text(self, value: Value, *, interval: bool = True) -> str:
        """Format a value, with its interval if known; `diverged` stays, and a dash means not measured."""
        return _formatted(value, self.form, interval=interval)

    def test_text(self, test: Estimate | None) -> str:
        """Format a paired test; * marks an adjusted p-value below 0.05. Empty for a measure without one."""
        mark = " *" if test is not None and test.p < intervals.ALPHA else ""
        return _formatted(test, self.test.form, self.test.unit) + mark if self.test else ""


def _formatted(value: Value, form: Callable[[float], str], unit: str = "", *, interval: bool = True) -> str:
    if value is None or isinstance(value, str):
        return value or DASH
    shown = interval and not math.isnan(value.low)
    return form(value.value) + unit + (f" ({form(value.low)} to {form(value.high)})" if shown else "")


_text = partial(Measure, per=TEXT)
_tasks = partial(Measure, per=TASKS)
_divergence = partial(written, name="divergence")
_agreement = partial(written, name="top1_agreement")
_rms_change = partial(written, name="rms_probability_change")
_removed = partial(written, name="removed_parameters")
_ratio = partial(by_window, what="losses", how=intervals.ratio)
_moved, _agreed = partial(by_window, what="divergences"), partial(by_window, what="agreements")
MEASURES: tuple[Measure, ...] = (
    _text("divergence", "divergence", "nats", _divergence, brief=True, test=Test(_moved, _nats, " nats")),
    _text("top1_agreement", "top-1 agreement", "%", _agreement, _percent, brief=True,
          test=Test(_agreed, _points, " points")),
    _text("perplexity", "perplexity", "", perplexity, number, brief=True, test=Test(_ratio, _factor, " ×"), drawn=LOG),
    _text("divergence_median", "divergence, median", "nats", partial(_divergence, part="median")),
    _text("divergence_p99", "divergence, 99th percentile", "nats", partial(_divergence, part="p99")),
    _text("divergence_largest", "divergence, largest", "nats", partial(_divergence, part="largest")),
    _text("rms_probability_change", "true token's probability, RMS change", "points", _rms_change, _percent),
    Measure("acc", "acc", "%", accuracy, _percent, TASK, test=Test(difference, _points, " points")),
    _tasks(
        "mean_acc", "mean acc", "%", mean_accuracy, _percent,
        brief=True, test=Test(difference, _points, " points"), drawn=LINEAR,
    ),
    _tasks("lost", "right → wrong", "", partial(changed, way="lost"), "{:.0f}".format, brief=True),
    _tasks("gained", "wrong → right", "", partial(changed, way="gained"), "{:.0f}".format, brief=True),
    _tasks("swapped", "wrong → wrong", "", partial(changed, way="swapped"), "{:.0f}".format),
    Measure("layer_error", "layer error, mean", "", layer_error),
    Measure("sparsity", "measured sparsity", "", partial(written, name="sparsity")),
    Measure("removed_parameters", "parameters removed", "%", _removed, _percent, brief=True),
)  # fmt: skip


def figures(results: Results) -> Json:
    """Return every measure as JSON: its value, and `low` and `high` if known, by name, and by text or task."""
    found: Json = {}
    for measure in MEASURES:
        read = {on: measure.read(results, on) for on in measure.where(results)}
        values = {on: value.record if isinstance(value, Estimate) else value for on, value in read.items()}
        if values:
            found[measure.name] = values if measure.per in (TEXT, TASK) else values[""]
    return found
