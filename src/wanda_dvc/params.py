"""The schema of `params.yaml`: every setting, its range, and what it means.

Read as DVC reads it, YAML 1.2: in YAML 1.1 an unquoted `2:4` is the number 124.
"""

import difflib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError
from ruamel.yaml import YAML

from wanda_dvc.catalog import (
    ALLOCATIONS,
    EMBEDDED_SPLITS,
    EMBEDDED_TEXT,
    GROUPS,
    HUB_ID,
    HUB_TEXT,
    NAMED_TEXTS,
    RECIPES,
    RECONSTRUCTIONS,
    STATISTICS,
    STRUCTURES,
    TEXTS,
    Dtype,
    Package,
    Reconstruction,
    methods,
    parse_pattern,
)
from wanda_dvc.errors import UserError
from wanda_dvc.plan import CHOICES, UNSTRUCTURED, Plan, fill
from wanda_dvc.reading import read_text

MOST = 2**20  # windows of a calibration, and tokens of a window: far above any real study
ROUNDED = 1e-6  # the sparsity of 1:3 may be written 0.666667
EMBEDDED_ITEMS = 10  # of each task, by default: they check the path, and are no benchmark
SAME_SOURCE, OTHER_SOURCE = "the calibration's source", "another source"  # of a text of the perplexity
ALL = "all"  # of `perplexity.windows`: every token, including a shorter last window


def _row_of(table: Mapping[str, object] | Callable[[], Mapping[str, object]]) -> AfterValidator:
    """Return a check of a name against a table of the catalog, or a function that loads it; None passes."""

    def check(name: str | None) -> str | None:
        if name is not None and name not in (known := table() if callable(table) else table):
            raise PydanticCustomError("literal_error", "no such row", {"expected": _or(tuple(known))})
        return name

    return AfterValidator(check)


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


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


class Text(_Section):
    """A text."""

    source: str = Field(
        description="`embedded`, `wikitext2`, `c4`, `ptb`, a Hub data set `ORG/NAME[:CONFIG][@REVISION]`, or a .txt or "
        ".jsonl file by its absolute path"
    )
    split: str | None = Field(
        None, min_length=1, description="split of the data set; null: `test`, of `c4` `validation`"
    )
    column: str | None = Field(None, min_length=1, description="text column; null: `text`, or the named text's own")

    @property
    def chosen(self) -> ChosenText:
        """Return the text with its source's own values in place of nulls."""
        named = TEXTS.get(self.source)
        on_hub = None if named else HUB_TEXT.fullmatch(self.source)
        evaluated = None if Path(self.source).is_absolute() else named.evaluated if named else "test"
        return ChosenText(
            source=self.source,
            dataset=named.dataset if named else on_hub["dataset"] if on_hub else None,
            config=named.config if named else on_hub["config"] if on_hub else None,
            revision=on_hub["revision"] if on_hub else None,
            split=self.split or evaluated,
            column=named.column if named else self.column or "text",
            join=named.join if named else "\n\n",
        )

    @property
    def filled(self) -> Self:
        """The text with nulls replaced by its source's own values."""
        chosen = self.chosen
        return self.model_copy(update={name: getattr(chosen, name) for name in type(self).model_fields})


class CalibrationText(Text):
    """The text of a calibration."""

    split: str | None = Field(None, min_length=1, description="split of the data set; null: `train`")
    join: str | None = Field(
        None, description="string between two rows; null: a space. Windows of `c4` lie within one document instead"
    )

    @property
    def chosen(self) -> ChosenText:
        """As `Text.chosen`, but with the calibration's own defaults of split and join."""
        chosen = super().chosen
        split = self.split or (None if chosen.split is None else "train")
        return replace(chosen, split=split, join=" " if self.join is None else self.join)


class Calibration(_Section):
    """The text that the activations are measured on, and how it is cut."""

    text: CalibrationText
    windows: int = Field(ge=1, le=MOST, description="number of windows, drawn at random")
    length: int = Field(ge=2, le=MOST, description="tokens a window")
    seed: int = Field(ge=0, description="seed of the random draw")
    statistics: Literal["norms", "gram", "gradients"] = Field("norms", description="what is measured; see below")


class Perplexity(_Section):
    """The texts that the model is measured on, and how they are cut."""

    texts: dict[Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_\-]*$")], Text] = Field(
        min_length=1, description="the texts by name: a letter, then letters, digits, - and _"
    )
    length: int = Field(ge=2, le=MOST, description="tokens a window; windows follow one another")
    windows: Annotated[int, Field(ge=1)] | Literal["all"] | None = Field(
        None,
        description="number of windows; null: every complete window; `all`: every token, so that the last window "
        "may be shorter",
    )

    @property
    def first(self) -> str:
        """The name of the first text: summaries of one number are about it."""
        return next(iter(self.texts))


class Tasks(_Section):
    """The zero-shot tasks."""

    source: Literal["embedded", "benchmark"] = Field(
        description="`embedded`: questions written for this project; `benchmark`: the benchmarks"
    )
    names: list[Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_\-]*$")]] = Field(
        description="list of lm-eval's names of multiple-choice tasks; `[]`: perplexity only"
    )


class ZeroShot(_Section):
    """The settings of the zero-shot evaluation."""

    limit: int | None = Field(
        None, ge=1, description="number of items of each task; null: all, of the embedded questions the first 10"
    )


class Runtime(_Section):
    """Settings that change the speed and no result. No stage depends on them."""

    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?|mps)$",
        description="`auto` (`cuda` if there is one, else `cpu`), `cpu`, `cuda`, `cuda:1` or `mps`",
    )
    ray: str | None = Field(
        None,
        pattern=r"^(local|auto|(ray://)?[A-Za-z0-9._-]+:\d+)$",
        description="a Ray cluster that runs the windows: `local` (started on this machine), `auto`, `HOST:PORT` or "
        "`ray://HOST:PORT`; null: this process",
    )
    mirror: str | None = Field(
        None,
        description="absolute path of a directory laid out like the Hub, from which data sets are read instead",
    )


class Params(_Section):
    """All of `params.yaml`."""

    model: str = Field(
        description="`package:NAME==VERSION` with a GGUF file, an absolute directory of safetensors, or a Hub id, "
        "`ORG/NAME[@REVISION]`"
    )
    dtype: Dtype = Field(description="dtype in which the model runs")
    calibration: Calibration
    recipe: Annotated[str, _row_of(RECIPES)] = Field("wanda", description="how the model is pruned; see below")
    sparsity: float = Field(
        ge=0, lt=1, description="fraction of each linear's weights that is removed, or of the pattern's units"
    )
    pattern: str = Field(
        UNSTRUCTURED,
        description="`unstructured`; `n:m`: n of every m neighbours stay; or units that are removed: see below",
    )
    method: Annotated[str | None, _row_of(methods)] = Field(
        None, description="how weights are scored; null, here and below: the recipe's own"
    )
    group: Annotated[str | None, _row_of(GROUPS)] = Field(
        None, description="the weights that compete; n:m has groups of its own"
    )
    allocation: Annotated[str | None, _row_of(ALLOCATIONS)] = Field(
        None, description="how the sparsities of blocks or linears differ"
    )
    allocation_strength: float | None = Field(
        None, gt=0, lt=1, description="how far they differ; null: the allocation's own"
    )
    reconstruction: Annotated[str | None, _row_of(RECONSTRUCTIONS)] = Field(
        None, description="new values for the weights that stay"
    )
    propagation: Literal["dense", "pruned", "corrected"] | None = Field(
        None, description="the outputs that each block is calibrated on"
    )
    perplexity: Perplexity
    tasks: Tasks
    zero_shot: ZeroShot = ZeroShot()
    runtime: Runtime = Runtime()

    @property
    def share(self) -> Fraction:
        """The sparsity as the exact decimal: 0.29 of 100 weights is 29, where floating point gives 28.

        A pattern has its own: 1 − n/m exactly, which no decimal is for 1:3.
        """
        if n_of_m := parse_pattern(self.pattern):
            return 1 - Fraction(*n_of_m)
        return Fraction(str(self.sparsity))

    @property
    def filled(self) -> "Params":
        """Return the settings with nulls replaced by their values; a method need not be installed."""
        choices = self._choices
        strength = self.allocation_strength or ALLOCATIONS[choices["allocation"]].strength
        update: dict[str, Any] = {**choices, "allocation_strength": strength, "sparsity": float(self.share)}
        texts = {name: text.filled for name, text in self.perplexity.texts.items()}
        update["calibration"] = self.calibration.model_copy(update={"text": self.calibration.text.filled})
        update["perplexity"] = self.perplexity.model_copy(update={"texts": texts})
        return self.model_copy(update=update)

    @property
    def chosen_reconstruction(self) -> Reconstruction:
        """The rule for the weights that stay; unlike `plan`, it needs no installed method."""
        return RECONSTRUCTIONS[self._choices["reconstruction"]]

    @property
    def _choices(self) -> dict[str, str]:
        return fill(self.recipe, {name: getattr(self, name) for name in CHOICES}, self.pattern)[0]

    @property
    def items(self) -> int | None:
        """The number of items of each task; None: all."""
        return self.zero_shot.limit or (EMBEDDED_ITEMS if self.tasks.source == "embedded" else None)

    def is_calibrations(self, name: str) -> bool:
        """Whether a text of the perplexity has the calibration's source."""
        one, other = self.calibration.text.chosen, self.perplexity.texts[name].chosen
        return (one.dataset or one.source) == (other.dataset or other.source)

    def about_text(self, name: str) -> str:
        """Return a sentence on a text of the perplexity: whether it has the calibration's source."""
        if self.is_calibrations(name):
            return (
                "The calibration text has the same source: on text from other sources, most of a solver's gain is lost"
            )
        return "The calibration text has another source"

    @property  # not cached: a copy with changes would keep the original's
    def plan(self) -> Plan:
        """The recipe, with separately set choices."""
        given = {name: getattr(self, name) for name in CHOICES}
        return Plan.of(self.recipe, given, strength=self.allocation_strength, pattern=self.pattern, share=self.share)

    @model_validator(mode="after")
    def _consistent(self) -> "Params":
        if problems := list(self._conflicts()):
            raise UserError(*problems)
        return self

    def _conflicts(self) -> Iterator[str]:
        """Yield problems of individually valid settings that conflict or have no effect."""
        broken = list(self._pattern_conflicts())
        yield from broken or self._plan_conflicts()
        if not (Package.parse(self.model) or Path(self.model).is_absolute() or HUB_ID.fullmatch(self.model)):
            yield _problem(
                "model", self.model, "`package:NAME==VERSION`, an absolute directory or a Hub id, `ORG/NAME`"
            )
        calibration = self.calibration.text
        yield from _text_conflicts("calibration.text", calibration)
        names = Counter(name.casefold() for name in self.perplexity.texts)
        for name, text in self.perplexity.texts.items():
            if names[name.casefold()] > 1:  # one folder, on some file systems
                yield _problem("perplexity.texts", name, "names that differ in more than upper and lower case")
            yield from _text_conflicts(f"perplexity.texts.{name}", text)
            if _place(calibration.chosen) == _place(text.chosen):
                found = ", ".join(word for word in (text.source, text.chosen.split) if word)
                yield (
                    f"params.yaml: calibration.text: got the text that perplexity is measured on ({found}), expected "
                    "another; change its source or split"
                )
        duplicates = sorted({name for name in self.tasks.names if self.tasks.names.count(name) > 1})
        if duplicates:
            yield _problem("tasks.names", ", ".join(duplicates), "each task once")
        mirror = self.runtime.mirror
        if mirror is not None and not Path(mirror).is_absolute():
            yield _problem("runtime.mirror", mirror, "an absolute directory (queued experiments run elsewhere)")
        device = self.runtime.device
        if self.runtime.ray is not None and device not in ("auto", "cpu", "cuda"):
            expected = "auto or cpu: Ray has no MPS" if device == "mps" else "cuda: Ray gives each worker a GPU"
            yield _problem("runtime.device", f"{device} with runtime.ray {self.runtime.ray}", expected)

    def _pattern_conflicts(self) -> Iterator[str]:
        if self.pattern == UNSTRUCTURED or self.pattern in STRUCTURES:
            return
        if not re.fullmatch(r"[1-9]\d{0,8}:[1-9]\d{0,8}", self.pattern):
            yield _problem("pattern", self.pattern, f"`unstructured` or n:m, such as 2:4, or {_or(STRUCTURES)}")
            return
        n, m = parse_pattern(self.pattern) or (0, 0)
        if not n < m:
            yield _problem("pattern", self.pattern, "n:m with n < m: n of every m neighbours stay")
        elif abs(self.sparsity - (1 - n / m)) > ROUNDED:
            yield (
                f"params.yaml: sparsity: got {self.sparsity} with pattern {self.pattern}, "
                f"expected {1 - n / m:g} (1 − n/m); set sparsity={1 - n / m:g} or pattern=unstructured"
            )

    def _plan_conflicts(self) -> Iterator[str]:
        """Yield choices that exclude one another, or need statistics that are not measured."""
        plan = self.plan
        if plan.method.competition == "rows" and (self.pattern, plan.group) != (UNSTRUCTURED, "row"):
            yield (
                f"params.yaml: method: got {plan.method.name} with pattern {self.pattern} and group {plan.group}, "
                "expected unstructured and row: each row's scores decide how many of its weights go; set those or "
                "another method"
            )
        if plan.allocation.name != "uniform" and self.pattern != UNSTRUCTURED:
            expected = f"uniform: {self.pattern} gives every block the same sparsity"
            yield _problem("allocation", plan.allocation.name, expected)
        yield from self._unit_conflicts()
        if plan.structure and plan.method.competition == "solver" and not plan.method.units:
            yield _problem("method", f"{plan.method.name} with pattern {self.pattern}", "a method that scores units")
        if self.allocation_strength is not None and plan.allocation.strength is None:
            yield _problem(
                "allocation_strength", self.allocation_strength, f"null: {plan.allocation.name} has no strength"
            )
        if plan.propagation == "corrected" and not plan.solves:
            yield _problem(
                "propagation",
                "corrected with reconstruction none",
                "a reconstruction; set reconstruction=least-squares",
            )
        if plan.trains and plan.propagation == "dense":
            yield _problem(
                "reconstruction",
                f"{plan.reconstruction.name} with propagation dense",
                "propagation corrected or pruned, for outputs of pruned blocks; set propagation=corrected",
            )
        needs, measured = plan.needs, self.calibration.statistics
        if STATISTICS.index(needs) > STATISTICS.index(measured):
            why = ", ".join(choice for choice, tier in plan.needing() if tier == needs)
            yield (
                f"params.yaml: calibration.statistics: got {measured}, expected {needs} for recipe {self.recipe} "
                f"({why}); run `dvc exp run -S calibration.statistics={needs} -S recipe={self.recipe}`"
            )

    def _unit_conflicts(self) -> Iterator[str]:
        """Yield choices that exclude units with a score of their own, such as experts, or need them."""
        plan, has_own = self.plan, bool(self.plan.structure and self.plan.structure.method)
        given = f"{{}} with pattern {self.pattern}"
        if plan.method.competition in STRUCTURES and plan.method.competition != self.pattern:
            expected = f"pattern {plan.method.competition}, or another method"
            yield _problem("method", given.format(plan.method.name), expected)
        if plan.structure and has_own and plan.method.competition == "solver":
            expected = f"{plan.structure.method}, or a method without Gram matrices"
            yield _problem("method", given.format(plan.method.name), expected)
        if has_own and plan.solves:
            yield _problem("reconstruction", given.format(plan.reconstruction.name), "none")
        if has_own and plan.propagation != "dense":
            yield _problem("propagation", given.format(plan.propagation), "dense")


def _text_conflicts(setting: str, text: Text) -> Iterator[str]:
    if text.source == EMBEDDED_TEXT:
        if text.chosen.split not in EMBEDDED_SPLITS:
            yield _problem(f"{setting}.split", text.split, "train or test, the splits of the embedded text")
    elif named := TEXTS.get(text.source):
        if text.chosen.split not in named.splits:
            yield _problem(f"{setting}.split", text.split, f"{_or(named.splits)} of {text.source}")
        if text.column not in (None, named.column):
            yield _problem(f"{setting}.column", text.column, f"null: the text of {text.source} is {named.column}")
    elif HUB_TEXT.fullmatch(text.source):
        return
    elif not Path(text.source).is_absolute():
        expected = f"{', '.join(NAMED_TEXTS)}, a Hub id (ORG/NAME[:CONFIG][@REVISION]) or an absolute path"
        yield _problem(f"{setting}.source", text.source, expected)
    elif Path(text.source).suffix not in (".txt", ".jsonl"):
        yield _problem(f"{setting}.source", text.source, "a file that ends in .txt or .jsonl")
    elif text.split is not None:
        yield _problem(f"{setting}.split", text.split, f"null: {text.source} is a file and has none")


def read_params(path: Path) -> Params:
    """Read and check `params.yaml`. UserError with all its problems."""
    text = read_text(path, "restore it from git")
    return check_params(parse_yaml(text, path.name, "correct it, or restore it from git"))


def parse_yaml(text: str, where: str, todo: str) -> Any:
    """Parse YAML 1.2. UserError if it is not valid."""
    try:
        return YAML(typ="safe", pure=True).load(text)
    except Exception as error:  # for some texts the library raises any exception, RecursionError too
        at, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
        problem = f"line {mark.line + 1}: {at}" if at and mark else type(error).__name__
        raise UserError(f"{where}: not valid YAML: {problem}; {todo}") from None


def check_params(content: object) -> Params:
    """Check the settings of a parsed document. UserError as `read_params`."""
    if not isinstance(content, dict):
        raise UserError(f"params.yaml: got {type(content).__name__}, expected a mapping of settings")
    try:
        return Params.model_validate(content)
    except ValidationError as error:
        found: dict[tuple[int | str, ...], list[Any]] = {}
        for problem in error.errors():
            found.setdefault(_setting_of(problem["loc"]), []).append(problem)
        raise UserError(*(_explain(where, problems) for where, problems in found.items())) from None


def settings(model: type[BaseModel] = Params, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every setting's dotted name and its field, in order; of the texts as `perplexity.texts.NAME.source`."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from settings(field.annotation, f"{prefix}{name}.")
        elif name == "texts":
            yield from settings(Text, f"{prefix}{name}.NAME.")
        else:
            yield prefix + name, field


def _place(text: ChosenText) -> tuple[str | None, ...]:
    """Return the data set and split of a text, whatever its revision; of a file its path without links."""
    if text.dataset:
        return text.dataset, text.config, text.split
    source = os.path.realpath(text.source) if Path(text.source).is_absolute() else text.source
    return source, text.split


def _problem(where: str, found: object, expected: str) -> str:
    plain = isinstance(found, str) and found and found == found.strip() and found.isprintable()
    shown = found if plain else repr(found).replace("\n", " ")
    return f"params.yaml: {where}: got {shown}, expected {expected}"


def _or(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


MAPPINGS = {
    "model_type": "a mapping of settings",
    **dict.fromkeys(("dict_type", "too_short"), "one or more texts, each by a name"),
}
NUMBER = re.compile(r"\s*[+-]?[\d._]+(e[+-]?\d+)?\s*", flags=re.I)  # also in quotes


def _setting_of(place: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """Return the place of a pydantic error without the names of a union's types."""
    return place[:-1] if ".".join(map(str, place[:-1])) in dict(settings()) and isinstance(place[-1], str) else place


def _explain(place: tuple[int | str, ...], errors: list[Any]) -> str:
    """Convert the pydantic errors of a setting to this project's form."""
    error, *_ = errors
    where, kind, found = ".".join(map(str, place)), error["type"], error["input"]
    if error["loc"][-1:] == ("[key]",):
        return _problem("perplexity.texts", found, "a letter, then letters, digits, - and _")
    if kind == "extra_forbidden":
        return f"params.yaml: {where}: no such setting; {_hint(where)}"
    if kind == "missing":
        return f"params.yaml: {where}: missing"
    if kind in ("int_type", "float_type") and isinstance(found, str) and NUMBER.fullmatch(found):
        return _problem(where, f"'{found}', text", "a number; remove the quotes")
    return _problem(where, found, _or(dict.fromkeys(_expected(one, where) for one in errors)))


def _hint(where: str) -> str:
    """Return what to do about a name that is no setting."""
    names = dict(settings())
    if where in names:  # at the top of the file, with its dots
        first, _, rest = where.partition(".")
        return f"write it as {rest} below {first}"
    close = difflib.get_close_matches(where, [*names, *Params.model_fields, "perplexity.texts"], n=1)
    return f"did you mean {close[0]}?" if close else "remove it"


def _expected(error: Any, where: str) -> str:
    """Return the expected value of a pydantic error."""
    kind, context = error["type"], error.get("ctx", {})
    comparisons = {"greater_than_equal": ("≥", "ge"), "less_than": ("<", "lt"), "less_than_equal": ("≤", "le")}
    if kind in comparisons:
        sign, key = comparisons[kind]
        return f"{sign} {context[key]:{',' if context[key] > 1e5 else 'g'}}"
    if kind == "literal_error":
        return str(context["expected"]).replace("'", "")
    if kind == "string_pattern_mismatch":
        field = dict(settings()).get(re.sub(r"\.\d+$", "", where))
        return str(field.description if field else error["msg"])
    if kind == "list_type":
        return f"a list, such as [{error['input']}]" if isinstance(error["input"], str) else "a list"
    if kind in MAPPINGS:
        return MAPPINGS[kind]
    return str(error["msg"]).removeprefix("Input should be ").removeprefix("a valid ")
