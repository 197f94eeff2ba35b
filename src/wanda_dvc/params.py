"""The schema of `params.yaml`: every setting, its range, its default, and what it means.

Read as DVC reads it, YAML 1.2: in YAML 1.1 an unquoted `2:4` is the number 124.
"""

import difflib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError
from ruamel.yaml import YAML

from wanda_dvc import catalog
from wanda_dvc.errors import UserError
from wanda_dvc.plan import CHOICES, MEASURED_WINDOWS, RECOVERY_BATCH, UNSTRUCTURED, WINDOWS_BACK, Plan
from wanda_dvc.reading import read_text

MAX_WINDOWS = MAX_LENGTH = 2**20  # far above any real study
MAX_TOKENS = 10**9  # of a recovery; their windows are drawn before it and take 8 bytes a token
EMBEDDED_ITEMS = 10  # of each task, by default: they check the path, and are no benchmark
FILE = "params.yaml"
TEXT_SUFFIXES = (".txt", ".jsonl")  # of files
Settings = dict[str, Any]  # nested, or by dotted names, such as `calibration.text.split`


# --- values: the message for a refused one is the setting's description, or the text of `_refused` ---


def _refused(*expected: str) -> PydanticCustomError:
    return PydanticCustomError("refused", ", ".join(expected))


def _one_of(table: Mapping[str, object] | Callable[[], Mapping[str, object]]) -> AfterValidator:
    """Return a check of a name against a table of the catalog, or a function that loads it."""

    def check(name: str) -> str:
        known = table() if callable(table) else table
        if name not in known:
            raise _refused(*known)
        return name

    return AfterValidator(check)


def _check_pattern(pattern: str) -> str:
    n_of_m = catalog.parse_pattern(pattern) if re.fullmatch(r"[1-9]\d{0,8}:[1-9]\d{0,8}", pattern) else None
    if pattern not in {UNSTRUCTURED, *catalog.STRUCTURES} and not (n_of_m and n_of_m[0] < n_of_m[1]):
        raise _refused(UNSTRUCTURED, "n:m with n < m", *catalog.STRUCTURES)
    return pattern


def _check_windows(count: object) -> object:
    if count not in (None, "all") and (type(count) is not int or count < 1):
        raise ValueError(count)
    return count


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


# --- sections ---


@dataclass(frozen=True)
class ChosenText:
    """A text with defaults in place of nulls."""

    source: str  # as params.yaml writes it
    dataset: str | None  # its id on the Hub; None of an embedded text or a file
    config: str | None
    revision: str | None  # as the source names it; None: the text's own
    split: str | None  # None of a file
    column: str
    join: str  # between two rows

    @property
    def shard(self) -> str | None:
        """The one file that is read of a data set that is too large to fetch."""
        named = catalog.TEXTS.get(self.source)
        return named.shards.get(self.split or "") if named else None

    @property
    def path_in_mirror(self) -> list[str]:
        """The parts of its file's path in a mirror; none if it is not on the Hub."""
        file = [self.shard] if self.shard else [self.config, f"{self.split}.jsonl"]
        return [name for name in (self.dataset, *file) if name] if self.dataset else []


class Text(_Section):
    """A text that perplexity is measured on."""

    source: str = Field(
        description="`embedded`, `wikitext2`, `c4`, `ptb`, a Hub data set `ORG/NAME[:CONFIG][@REVISION]`, or a .txt or "
        ".jsonl file by its absolute path"
    )
    split: str | None = Field(
        None, min_length=1, description="split of the data set; null: `train` to calibrate, else `test` or `validation`"
    )
    column: str | None = Field(None, min_length=1, description="text column; null: `text`, or the named text's own")
    join: str | None = Field(
        None, description="string between two rows; null: a space to calibrate, else a blank line or the text's own"
    )
    calibrates: ClassVar[bool] = False

    @property
    def chosen(self) -> ChosenText:
        """The text with its source's own values in place of nulls."""
        hub_id = catalog.HUB_TEXT.fullmatch(self.source)
        on_hub = hub_id.groupdict() if hub_id else {}
        unnamed = catalog.NamedText(on_hub.get("dataset"), on_hub.get("config"))
        named = catalog.TEXTS.get(self.source, unnamed)
        split, join = ("train", " ") if self.calibrates else (named.splits[-1], named.join)
        return ChosenText(
            source=self.source,
            dataset=named.dataset,
            config=named.config,
            revision=on_hub.get("revision"),
            split=None if Path(self.source).is_absolute() else self.split or split,
            column=self.column or named.column,
            join=join if self.join is None else self.join,
        )

    @property
    def filled(self) -> dict[str, str | None]:
        """Its settings, with the source's own values in place of nulls."""
        return {name: getattr(self.chosen, name) for name in Text.model_fields}

    @model_validator(mode="after")
    def _consistent(self) -> "Text":
        named, path = catalog.TEXTS.get(self.source), Path(self.source)
        if named:
            if self.chosen.split not in named.splits:
                raise _refused(*(f"split {split}" for split in named.splits))
        elif path.suffix in TEXT_SUFFIXES or path.is_absolute():
            if not path.is_absolute() or path.suffix not in TEXT_SUFFIXES or self.split is not None:
                raise _refused("a file that ends in .txt or .jsonl, by its absolute path and with split null")
        elif not catalog.HUB_TEXT.fullmatch(self.source):
            raise _refused(*catalog.TEXTS, "a Hub id (ORG/NAME[:CONFIG][@REVISION])", "an absolute path")
        return self


class CalibrationText(Text):
    """A text of a calibration or a recovery."""

    windows: int | None = Field(
        None,
        ge=1,
        le=MAX_WINDOWS,
        description="of several texts: windows of this one; null: an equal share. In `recovery.text`: its "
        "share, relative to the others'; null: 1",
    )
    calibrates: ClassVar[bool] = True


def _as_list(text: object) -> object:
    if text is None:
        return []
    return text if isinstance(text, list) else [text]


def _as_written(texts: list[CalibrationText]) -> object:
    return texts if len(texts) > 1 else next(iter(texts), None)


# In params.yaml one text, a list of them, or null. Some steps read few windows, which must have each text.
Texts = Annotated[
    list[CalibrationText], BeforeValidator(_as_list), PlainSerializer(_as_written), Field(max_length=MEASURED_WINDOWS)
]


class Calibration(_Section):
    """The text that the activations are measured on, and how it is cut."""

    text: Texts = Field(
        min_length=1, description=f"a text, with a `source`, or a list of texts, at most {MEASURED_WINDOWS}"
    )
    windows: int = Field(32, ge=1, le=MAX_WINDOWS, description="number of windows, drawn at random")
    length: int = Field(512, ge=2, le=MAX_LENGTH, description="tokens per window")
    seed: int = Field(0, ge=0, description="seed of the random draw")
    statistics: Literal["auto", "norms", "gram", "fisher"] = Field(
        "auto",
        description="`auto`: what the recipe reads; or, for later recipes, at least `norms` (‖X_j‖₂ of each feature), "
        "`gram` (also XᵀX of each input) or `fisher` (also gradients, of eight windows of each text)",
    )

    @property
    def shares(self) -> list[int]:
        """The number of windows of each text."""
        named = [text.windows for text in self.text if text.windows]
        unnamed = len(self.text) - len(named)
        equal = iter(apportion(self.windows - sum(named), [1] * unnamed))
        return [text.windows or next(equal) for text in self.text]

    @property
    def windows_back(self) -> int:
        """The number of windows of the backward pass."""
        return min(WINDOWS_BACK * len(self.text), self.windows)


class Perplexity(_Section):
    """The texts that the model is measured on, and how they are cut."""

    texts: dict[Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_\-]*$", max_length=64)], Text] = Field(
        min_length=1, description="the texts by name: a letter, then letters, digits, - and _"
    )
    length: int = Field(512, ge=2, le=MAX_LENGTH, description="tokens per window; windows follow one another")
    windows: Annotated[int | Literal["all"] | None, PlainValidator(_check_windows)] = Field(
        None, description="number of windows, 1 or more; null: every complete window; `all`: every token"
    )


class Tasks(_Section):
    """The zero-shot tasks."""

    source: Literal["embedded", "benchmark"] = Field(
        "embedded", description="`embedded`: questions written for this project; `benchmark`: the benchmarks"
    )
    names: list[Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_\-]*$", max_length=200)]] = Field(
        [], description="list of lm-eval's names of multiple-choice tasks; `[]`: perplexity only"
    )
    limit: int | None = Field(
        None, ge=1, description="number of items of each task; null: all, of the embedded questions the first 10"
    )


class Recovery(_Section):
    """The training of the pruned model towards the dense model."""

    tokens: int = Field(
        0, ge=0, le=MAX_TOKENS, description="tokens to train the pruned model on, towards the dense model; 0: none"
    )
    text: Texts = Field([], description="training text, with a `source`, or a list of texts; null: the calibration's")
    rate: float = Field(0.001, gt=0, le=1, description="highest learning rate, as a share of a parameter's RMS")
    batch: int = Field(
        RECOVERY_BATCH, ge=1, le=1024, description="windows of a step; the rate is multiplied by √(batch / 2)"
    )


class Runtime(_Section):
    """Settings that change the speed, and results by rounding alone."""

    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?|mps)$",
        description="`auto` (`cuda` or `mps` if there is one, else `cpu`), `cpu`, `cuda`, `cuda:1` or `mps`",
    )
    ray: str | None = Field(
        None,
        pattern=r"^(local|auto|(ray://)?[A-Za-z0-9._-]+:\d+)$",
        description="a Ray cluster: `local` (started here), `auto`, `HOST:PORT` or `ray://HOST:PORT`; null: none",
    )
    mirror: str | None = Field(
        None, pattern="^/", description="absolute path of a directory of data sets, laid out like the Hub"
    )


class Params(_Section):
    """All of `params.yaml`."""

    model: str = Field(
        pattern=f"^({catalog.PACKAGE.pattern}|/.*|{catalog.HUB_ID.pattern})$",
        description="`package:NAME==VERSION` with a GGUF file, an absolute path, or a Hub id, `ORG/NAME[@REVISION]`",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="dtype in which the model runs: `float32`, `bfloat16`, `float16`; `auto`: the checkpoint's"
    )
    calibration: Calibration
    recipe: Annotated[str, _one_of(catalog.RECIPES)] = Field("fisher", description="how the model is pruned; see below")
    sparsity: float = Field(0.5, ge=0, lt=1, description="fraction of weights, units or parameters to remove; not n:m")
    pattern: Annotated[str, AfterValidator(_check_pattern)] = Field(
        UNSTRUCTURED,
        description="`unstructured`: zeros anywhere in a group; `n:m`, such as `2:4`: n of every m neighbours stay; "
        "or units to remove: `neurons`, `heads`, `experts`, `blocks`, `smaller` (all but experts)",
    )
    method: Annotated[str, _one_of(catalog.methods)] | None = Field(
        None, description="how weights are scored; null, here and below: the recipe's own"
    )
    group: Annotated[str, _one_of(catalog.GROUPS)] | None = Field(
        None, description="the weights whose scores are compared"
    )
    allocation: Annotated[str, _one_of(catalog.ALLOCATIONS)] | None = Field(
        None, description="sparsity of each block or linear"
    )
    reconstruction: Annotated[str, _one_of(catalog.RECONSTRUCTIONS)] | None = Field(
        None, description="new values of the weights that stay"
    )
    propagation: Annotated[str, _one_of(catalog.PROPAGATIONS)] | None = Field(
        None, description="the outputs that a block is calibrated on"
    )
    perplexity: Perplexity
    tasks: Tasks = Tasks()
    recovery: Recovery = Recovery()
    runtime: Runtime = Runtime()

    @property
    def plan(self) -> Plan:
        """The recipe, with separately set choices."""
        given = {name: getattr(self, name) for name in CHOICES}
        return Plan.from_recipe(self.recipe, given, pattern=self.pattern, sparsity=self.sparsity)

    @property
    def statistics(self) -> tuple[str, ...]:
        """The statistics to measure: those that the plan reads, and at least `calibration.statistics`."""
        order = catalog.STATISTICS  # each includes those before it
        names = {self.plan.tier, self.calibration.statistics} - {"auto"}
        return order[: max(map(order.index, names)) + 1]

    @property
    def items(self) -> int | None:
        """The number of items of each task; None: all."""
        return self.tasks.limit or (EMBEDDED_ITEMS if self.tasks.source == catalog.EMBEDDED else None)

    @property
    def training_texts(self) -> list[CalibrationText]:
        """The texts of a recovery."""
        return self.recovery.text or self.calibration.text

    def about_text(self, name: str) -> str:
        """Return a sentence on a text of the perplexity: whether it has the calibration's source."""
        texts, measured = self.calibration.text, self.perplexity.texts[name].chosen
        names = f" ({', '.join(Path(text.source).name for text in texts)})" if len(texts) > 1 else ""
        if (measured.dataset or measured.source) not in [text.chosen.dataset or text.source for text in texts]:
            return f"The calibration text{names} has another source"
        return f"The calibration text{names} has the same source: on text from other sources, a solver gains less"

    @model_validator(mode="after")
    def _consistent(self) -> "Params":
        problems = [*self.plan.conflicts(), *self._conflicts()]
        if problems:
            raise UserError(*(f"{FILE}: {problem}" for problem in problems))
        return self

    def _conflicts(self) -> Iterator[str]:
        measured = [_location(text.chosen) for text in self.perplexity.texts.values()]
        for section, texts in (("calibration", self.calibration.text), ("recovery", self.recovery.text)):
            used = dict.fromkeys(measured, "the text that perplexity is measured on")
            for setting, text in zip(numbered(f"{section}.text", ".", len(texts)), texts, strict=True):
                place, split = _location(text.chosen), text.chosen.split
                if place in used:
                    problem = f"found {used[place]} ({text.source}{f', {split}' if split else ''})"
                    yield f"{setting}: {problem}, expected another; change its source or split"
                used[place] = f"the text of {setting}"
        shares, windows = self.calibration.shares, self.calibration.windows
        if min(shares) < 1 or sum(shares) != windows:
            yield (
                f"calibration.text: found {shares} windows by text, expected 1 or more of each, and {windows}, "
                "calibration.windows, in all; change them"
            )


def apportion(count: int, shares: Sequence[int]) -> list[int]:
    """Return a count of windows for each text, in proportion to its share; the first texts get what is left over."""
    counts = [count * share // sum(shares) for share in shares]
    for index in range(min(len(counts), count - sum(counts))):
        counts[index] += 1
    return counts


def numbered(name: str, separator: str, count: int) -> list[str]:
    """Return a name for each of several texts, such as `calibration.text.0`; of one text, the name alone."""
    return [name] if count == 1 else [f"{name}{separator}{index}" for index in range(count)]


def _location(text: ChosenText) -> tuple[str | None, ...]:
    return text.dataset or os.path.realpath(text.source), text.config, text.split


# --- the file ---


def read_params(path: Path) -> Params:
    """Read and check `params.yaml`. UserError with all its problems."""
    return check_params(parse_yaml(read_text(path, "restore it from git"), path.name, "correct it, or restore it"))


def parse_yaml(text: str, where: str, todo: str, parser: YAML | None = None) -> Any:
    """Parse YAML 1.2, by default into plain values. UserError if it is not valid."""
    try:
        return (parser or YAML(typ="safe", pure=True)).load(text)
    except Exception as error:  # for some texts the library raises any exception, RecursionError too
        what, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
        problem = f"line {mark.line + 1}: {what}" if what and mark else type(error).__name__
        raise UserError(f"{where}: not valid YAML: {problem}; {todo}") from None


def check_params(content: object) -> Params:
    """Check the settings of a parsed document. UserError as `read_params`."""
    try:
        return Params.model_validate(content)
    except ValidationError as error:
        problems = [_problem(problem) for problem in error.errors()]
    for section in ("calibration", "recovery"):
        written = content.get(section) if isinstance(content, dict) else None
        if not (isinstance(written, dict) and isinstance(written.get("text"), list)):  # one text has no number
            problems = [problem.replace(f"{section}.text.0", f"{section}.text") for problem in problems]
    raise UserError(*problems)


def _problem(problem: Any) -> str:
    setting = ".".join(str(part) for part in problem["loc"] if part != "[key]")
    where, kind = f"{FILE}: {setting}" if setting else FILE, problem["type"]
    if kind in ("extra_forbidden", "invalid_key"):
        names = [*dict(settings()), *Params.model_fields, "perplexity.texts"]
        if setting in names:  # `calibration.windows` as one key
            section, _, name = setting.rpartition(".")
            return f"{where}: found a dotted name, expected {name} in the section {section}; write it there"
        similar = difflib.get_close_matches(setting, names, n=1)
        return f"{where}: no such setting; {f'did you mean {similar[0]}?' if similar else 'remove it'}"
    if kind == "missing":
        return f"{where}: missing"
    expected = problem["msg"].removeprefix("Input should be ").replace("'", "")
    if kind in ("model_type", "dict_type"):
        expected = "settings, a name and a value each"
    elif kind in ("value_error", "string_pattern_mismatch") or kind.endswith(("too_short", "too_long")):
        expected = _meaning(problem["loc"])
    value = problem["input"]
    if isinstance(value, str | bool | None):  # as YAML writes it, with the code of a character that is not visible
        value = json.dumps(value, ensure_ascii=not str(value).isprintable())
    return f"{where}: found {value!s:.200}, expected {expected}"


def _meaning(path: tuple[int | str, ...]) -> str:
    section: Any = Params
    meaning = ""
    for key in path:
        field = getattr(section, "model_fields", {}).get(key)
        if field is None:  # the name or number of a text
            section = CalibrationText
        else:
            section, meaning = field.annotation, field.description
    return meaning.replace("`", "")


def settings(model: type[BaseModel] = Params, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every setting's dotted name and its field, in order; of the texts as `perplexity.texts.NAME.source`."""
    for name, field in model.model_fields.items():
        if model is Calibration and name == "text":
            yield from settings(CalibrationText, f"{prefix}{name}.")
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from settings(field.annotation, f"{prefix}{name}.")
        elif name == "texts":
            yield from settings(Text, f"{prefix}{name}.NAME.")
        else:
            yield prefix + name, field


# --- settings by dotted names ---


def flatten(content: Settings, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every nested setting with its dotted name."""
    for key, value in content.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value  # a key of YAML may be any value


def nested(settings: Mapping[str, Any]) -> Settings:
    """Nest settings with dotted names: the inverse of `flatten`."""
    content: Settings = {}
    for name, value in settings.items():
        *sections, leaf = name.split(".")
        section = content
        for key in sections:
            section = section.setdefault(key, {})
        section[leaf] = value
    return content


def resolved(params: Params) -> dict[str, Any]:
    """Return every parameter but `runtime` and `recipe`, by dotted name, with nulls replaced by their values.

    Equal settings give equal results. So a null `recovery.text` stays: a recovery then trains on the calibration's text
    without its windows, which no other value does.
    """
    content, chosen = params.model_dump(mode="json", exclude={"runtime", "recipe"}), params.plan.to_dict()
    content |= {name: chosen[name] for name in (*CHOICES, "sparsity")}
    content["tasks"]["limit"] = params.items
    content["calibration"]["text"] = _filled(params.calibration.text, params.calibration.shares)
    recovery = params.recovery.text
    content["recovery"]["text"] = _filled(recovery, [text.windows or 1 for text in recovery])
    content["perplexity"]["texts"] = {name: text.filled for name, text in params.perplexity.texts.items()}
    return dict(flatten(content))


def _filled(texts: Sequence[CalibrationText], shares: Sequence[int]) -> Settings:
    """Return the settings of a text, with nulls replaced; of several texts by number, with their shares."""
    if not texts:
        return dict.fromkeys(Text.model_fields)
    if len(texts) == 1:
        return texts[0].filled
    return {
        str(index): text.filled | {"windows": share}
        for index, (text, share) in enumerate(zip(texts, shares, strict=True))
    }


def download_sources(params: Params) -> dict[str, tuple[str, str]]:
    """Return by source, such as `perplexity/NAME` or `calibration/0`, the setting that names it, and its value.

    The value for a text in `runtime.mirror` is the path of its file there, and for the tasks it names the mirror.
    """
    mirror = params.runtime.mirror

    def value(text: Text) -> str:
        path = text.chosen.path_in_mirror if mirror else []
        file = Path(mirror or "", *path)
        return str(file) if path and file.is_file() else text.source

    sources = {"model": ("model", params.model)}
    for name, text in params.perplexity.texts.items():
        sources[f"perplexity/{name}"] = f"perplexity.texts.{name}.source", value(text)
    for section, texts in (("calibration", params.calibration.text), ("recovery", params.recovery.text)):
        settings_of = numbered(f"{section}.text", ".", len(texts))
        for name, setting, text in zip(numbered(section, "/", len(texts)), settings_of, texts, strict=True):
            sources[name] = f"{setting}.source", value(text)
    if not params.recovery.text:
        sources["recovery"] = "recovery.text.source", "none"
    is_mirrored = mirror and params.tasks.source != catalog.EMBEDDED
    sources["tasks"] = "tasks.source", f"{params.tasks.source} in {mirror}" if is_mirrored else params.tasks.source
    return sources
