"""The measures of a model, as rows of one table, and the record of results that they read.

`show`, `list`, the report, the model card, `evaluate` and `Study.results()` loop over `MEASURES`. To add a measure,
let a stage write its number below metrics/ (`dvc metrics diff` then has it too), and add a function and a row here.
Two values may be compared only if `results.compare.why_not_comparable` finds no difference of their protocols.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from wanda_dvc.reading import DIVERGED
from wanda_dvc.results import intervals
from wanda_dvc.results.intervals import ALPHA, Estimate, mean_difference
from wanda_dvc.results.markup import DASH
from wanda_dvc.study.files import Json, load_json
from wanda_dvc.study.folder import Study

Value = Estimate | str | None  # `diverged` if a number is not finite; None: not measured
PER_TEXT, PER_TASK, OF_TASKS, PER_MODEL = "text", "task", "all tasks", "model"  # what a value is measured on
LINEAR, LOG = "linear", "log"
TEXT_PREFIX = "perplexity/"  # of the files of metrics and details on a text


@dataclass(eq=False)
class Results:
    """The results of one model."""

    metrics: Json  # the numbers, by path below metrics/{model}, such as `perplexity/embedded`, `zero_shot`, `sparsity`
    folder: Path | None = None  # of details; None without details, as in `list`
    _details: Json = field(default_factory=dict)  # by name, once read; {} of what must not be read

    @classmethod
    def of(cls, study: Study, model: str, *, left_out: Collection[str] = ()) -> "Results":
        """Read the results of the `dense`, `pruned` or `recovered` model of a study.

        `left_out` are files of another run, by path below the study; `results.current` finds them.
        """
        folder, details, metrics = study.root / "metrics" / model, f"metrics/details/{model}/", Json()
        for path in sorted(folder.rglob("*.json")):
            name = path.relative_to(folder).with_suffix("").as_posix()
            is_left_out = path.relative_to(study.root).as_posix() in left_out
            if not is_left_out and not is_of_removed_text(name, study.params.perplexity.texts):
                metrics[name] = load_json(path)
        metrics = {name: content for name, content in metrics.items() if content}  # {} of a model that is not made
        without_details = {path[len(details) : -len(".json")]: Json() for path in left_out if path.startswith(details)}
        return cls(metrics, study.root / details, without_details)

    @property
    def texts(self) -> list[str]:
        """The texts of its perplexities."""
        return [name.removeprefix(TEXT_PREFIX) for name in self.metrics if name.startswith(TEXT_PREFIX)]

    @property
    def tasks(self) -> list[str]:
        """The tasks that the model answered."""
        return list(self.metrics.get("zero_shot", {}))

    def details(self, name: str) -> Json:
        """Return the details of a file of metrics: its protocol, and each window's or item's result; {} if missing."""
        if name not in self._details:
            self._details[name] = load_json(self.folder / f"{name}.json") if self.folder else {}
        return self._details[name]

    def protocols_in(self, name: str) -> list[Json]:
        """Return the protocols in a file's details: one, or one for each task."""
        details = self.details(name)
        return [part.get("protocol", {}) for part in details.get("tasks", {"": details}).values()]

    def leave_out_others(self, model_digest: str) -> list[str]:
        """Leave out results whose details name another model than the one with this digest; return their names."""
        others = []
        for name in [*self.metrics]:
            if any(protocol.get("model", model_digest) != model_digest for protocol in self.protocols_in(name)):
                others.append(name)
                self._details[name] = {}
                self.metrics.pop(name, None)
        return others

    def answers(self, task: str) -> Json:
        """Return the protocol and the items' answers of a task; {} if missing."""
        return self.details("zero_shot").get("tasks", {}).get(task, {})


def is_of_removed_text(name: str, texts: Collection[str] | None) -> bool:
    """Whether a file of metrics is on a text that the settings no longer name: git still has it. None: not known."""
    return texts is not None and name.startswith(TEXT_PREFIX) and name.removeprefix(TEXT_PREFIX) not in texts


# --- readers: the results and a text, a task or "" → a value ---


def read_perplexity(results: Results, text: str) -> Value:
    """exp(mean loss), with a 95 % t interval over windows if their losses are known."""
    value = results.metrics.get(TEXT_PREFIX + text, {}).get("perplexity")
    return _estimate(value, intervals.perplexity_interval(*_window_means(results, text, "losses")))


def read_text_number(results: Results, text: str, *, name: str, windows: str, largest: float = math.inf) -> Value:
    """A mean that `perplexity` wrote of a text, with a 95 % t interval over windows, cut to [0, largest].

    `windows` names each window's value in the details.
    """
    value = results.metrics.get(TEXT_PREFIX + text, {}).get(name)
    means, predictions = _window_means(results, text, windows)
    interval = mean_difference(means, [0.0] * len(means), predictions)
    return _estimate(value["mean"] if isinstance(value, dict) else value, interval and interval.within(0, largest))


def read_weights_number(results: Results, _: str, *, name: str) -> Value:
    """A number that `apply` wrote of the weights."""
    return _estimate(results.metrics.get("sparsity", {}).get(name))


def read_accuracy(results: Results, task: str) -> Value:
    """The fraction of items answered correctly, with Wilson's 95 % interval if the items are known."""
    right = _right_answers(results, task)
    value = results.metrics.get("zero_shot", {}).get(task, {}).get("acc")
    return _estimate(value, intervals.accuracy_interval(right) if right else None)


def read_mean_accuracy(results: Results, _: str) -> Value:
    """The mean over tasks of the accuracy, with Welch's 95 % interval if all items are known."""
    accuracies = [read_accuracy(results, task) for task in results.tasks]
    known = [accuracy.value for accuracy in accuracies if isinstance(accuracy, Estimate)]
    if not known or len(known) < len(accuracies):
        return DIVERGED if DIVERGED in accuracies else None
    answers = [_right_answers(results, task) for task in results.tasks]
    return _estimate(sum(known) / len(known), intervals.mean_of_tasks(answers, least=0) if all(answers) else None)


def read_changed_answers(results: Results, _: str, *, way: str) -> Value:
    """The number of answers that pruning changed in one way, over all tasks; None if one task's are unknown."""
    tasks = list(results.metrics.get("zero_shot", {}).values())
    if any(task.get("acc") == DIVERGED for task in tasks):
        return DIVERGED
    counts = [task["flips"]["acc"][way] for task in tasks if "flips" in task]
    return Estimate(sum(counts)) if counts and len(counts) == len(tasks) else None


def _estimate(value: float | str | None, interval: Estimate | None = None) -> Value:
    """Return a value as the metrics have it, rounded, with the ends of an interval if it is known."""
    if value is None or isinstance(value, str):
        return value
    return Estimate(value, interval.low, interval.high) if interval else Estimate(value)


def _window_means(results: Results, text: str, name: str) -> tuple[list[float], list[int]]:
    """Return each window's mean, and its number of predictions; two empty lists if one is missing or not finite."""
    details = results.details(TEXT_PREFIX + text)
    means = details.get(name, [])
    if not means or DIVERGED in (*means, results.metrics.get(TEXT_PREFIX + text, {}).get("perplexity")):
        return [], []
    protocol = details["protocol"]
    predictions = [protocol["length"] - 1] * protocol["windows"]
    if protocol["rest"] != "dropped":
        predictions.append(protocol["rest"] - 1)
    return means, predictions


def _right_answers(results: Results, task: str) -> list[bool]:
    """Return by item whether the answer is correct; nothing if the items are missing, or a score is not finite."""
    is_finite = results.metrics.get("zero_shot", {}).get(task, {}).get("acc") != DIVERGED
    return [item["acc"] > 0.5 for item in results.answers(task).get("items", [])] if is_finite else []


# --- paired tests of a model against a base, on the same windows or items ---


def compare_by_window(
    results: Results, base: Results, text: str, name: str, test: Callable[..., Estimate | None] = mean_difference
) -> Estimate | None:
    """The mean minus the base's, or another comparison, paired by window; None without finite values."""
    means, predictions = _window_means(results, text, name)
    base_means, _ = _window_means(base, text, name)
    return test(means, base_means, predictions) if means and base_means else None


def compare_answers(results: Results, base: Results, task: str) -> Estimate | None:
    """The accuracy minus the base's, paired by item: of a task, or, for "", the mean over tasks; None without items.

    The test is McNemar's exact one; of several tasks Student's, and None if no variance is known.
    """
    changes = []  # by task and item: −1, 0 or 1
    for name in [task] if task else results.tasks:
        right, base_right = _right_answers(results, name), _right_answers(base, name)
        if not right or not base_right:
            return None
        changes.append([float(correct) - float(other) for correct, other in zip(right, base_right, strict=True)])
    difference = intervals.mean_of_tasks(changes, least=-1)
    if not task:
        return difference
    # Of one item, or if all changed alike, no variance is known.
    difference = difference or Estimate(sum(changes[0]) / len(changes[0]))
    return difference._replace(p=intervals.mcnemar(right, base_right))


# --- the table ---


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _points(value: float) -> str:
    return f"{100 * value:+.1f}"


class PairedTest(NamedTuple):
    """A paired test of two models with equal protocols; `form` and `unit` are of its value and interval."""

    run: Callable[[Results, Results, str], Estimate | None]  # of a model, a base, and a text, a task or ""
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
    per: str = PER_MODEL  # or PER_TEXT, PER_TASK, OF_TASKS
    lower_is_better: bool = False
    brief: bool = False  # whether `list` shows it; the other views show every measure
    paired_test: PairedTest | None = None  # None: the values are only shown
    scale: str = ""  # of the report's picture of it, LINEAR or LOG; "": no picture

    def protocols_of(self, results: Results, target: str) -> dict[str, Json | None]:
        """Return what a value depends on apart from the model, by text or task: its protocol, or None if unknown."""
        if self.per == PER_TEXT:
            return {target: results.details(TEXT_PREFIX + target).get("protocol")}
        tasks = {PER_TASK: [target], OF_TASKS: results.tasks}.get(self.per, [])
        return {task: results.answers(task).get("protocol") for task in tasks}

    def where(self, *several: Results) -> list[str]:
        """Return the texts or tasks of models with a value, or "" for a measure of the model itself."""
        targets: dict[str, None] = {}
        for results in several:
            names = {PER_TEXT: results.texts, PER_TASK: results.tasks}.get(self.per, [""])
            targets |= dict.fromkeys(name for name in names if self.read(results, name) is not None)
        return list(targets)

    def heading(self, target: str, *, one_text: bool) -> str:
        """Return the title with its unit; with the name of the task, or of the text unless it is the only one."""
        title = self.title
        if self.per == PER_TASK:
            title = f"{target}, {title}"
        elif target and not one_text:
            title = f"{title}, {target}"
        return f"{title}, {self.unit}" if self.unit else title

    def formatted(self, results: Results, target: str, *, interval: bool = True) -> str:
        """Format a model's value, with its interval if known; `diverged` stays, and a dash means not measured."""
        return _formatted(self.read(results, target), self.form, interval=interval)

    def formatted_test(self, test: Estimate) -> str:
        """Format an estimate of its paired test; * marks an adjusted p-value below 0.05."""
        assert self.paired_test is not None
        return _formatted(test, self.paired_test.form, self.paired_test.unit) + (" *" if test.p < ALPHA else "")


def _formatted(value: Value, form: Callable[[float], str], unit: str = "", *, interval: bool = True) -> str:
    if value is None or isinstance(value, str):
        return value or DASH
    text = form(value.value) + unit
    if interval and not math.isnan(value.low):
        text += f" ({form(value.low)} to {form(value.high)})"
    return text


_text_row = partial(Measure, per=PER_TEXT)
_loss_row = partial(_text_row, lower_is_better=True)
_tasks = partial(Measure, per=OF_TASKS)
_divergence = partial(read_text_number, name="divergence", windows="divergences")
_agreement = partial(read_text_number, name="top1_agreement", windows="agreements", largest=1)
_removed = partial(read_weights_number, name="removed_parameters")
_ratios = PairedTest(partial(compare_by_window, name="losses", test=intervals.ratio), "{:#.4g}".format, " ×")
_divergence_test = PairedTest(partial(compare_by_window, name="divergences"), "{:+.4f}".format, " nats")
_agreement_test = PairedTest(partial(compare_by_window, name="agreements"), _points, " points")
_answers = PairedTest(compare_answers, _points, " points")
MEASURES: tuple[Measure, ...] = (
    _loss_row("divergence", "divergence", "nats", _divergence, brief=True, paired_test=_divergence_test),
    _text_row("top1_agreement", "top-1 agreement", "%", _agreement, _percent, brief=True, paired_test=_agreement_test),
    _loss_row(
        "perplexity", "perplexity", "", read_perplexity, "{:,.2f}".format, brief=True, paired_test=_ratios, scale=LOG
    ),
    Measure("acc", "acc", "%", read_accuracy, _percent, PER_TASK, paired_test=_answers),
    _tasks("mean_acc", "mean acc", "%", read_mean_accuracy, _percent, brief=True, paired_test=_answers, scale=LINEAR),
    _tasks("lost", "right → wrong", "", partial(read_changed_answers, way="lost"), "{:.0f}".format, brief=True),
    _tasks("gained", "wrong → right", "", partial(read_changed_answers, way="gained"), "{:.0f}".format, brief=True),
    _tasks("swapped", "wrong → wrong", "", partial(read_changed_answers, way="swapped"), "{:.0f}".format),
    Measure("sparsity", "measured sparsity", "", partial(read_weights_number, name="sparsity")),
    Measure("removed_parameters", "parameters removed", "%", _removed, _percent, brief=True),
)


def figures(results: Results) -> Json:
    """Return every measure as JSON: its value, and `low` and `high` if known, by name, and by text or task."""
    content: Json = {}
    for measure in MEASURES:
        values = {}
        for target in measure.where(results):
            value = measure.read(results, target)
            values[target] = value.record if isinstance(value, Estimate) else value
        if values:
            content[measure.name] = values if measure.per in (PER_TEXT, PER_TASK) else values[""]
    return content
