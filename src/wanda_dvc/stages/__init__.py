"""The table of stages, in the order of the pipeline: one row, one module and one command each.

A row has everything that `dvc.yaml` says of the stage; `stage_inputs` has what each stage is given of the settings.
`scripts/pipeline.py` writes `dvc.yaml` and the ignore files from the rows.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING

from wanda_dvc.catalog import EMBEDDED, STATISTICS
from wanda_dvc.errors import UserError, notice
from wanda_dvc.plan import CHOICES, MEASURED_BLOCKS, RECOVERY_LENGTH
from wanda_dvc.reading import check_place
from wanda_dvc.study.artifact import remove
from wanda_dvc.study.files import Json, write_text

if TYPE_CHECKING:
    from wanda_dvc.params import Params
    from wanda_dvc.study.folder import Study


MODELS = ("dense", "pruned", "recovered")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One run of a stage in `dvc.yaml`: what it reads and writes, below a study; `{text}` is a text's name."""

    settings: tuple[str, ...] = ()  # that decide its results, by dotted name: docs/settings.md says what reruns
    deps: tuple[str, ...] = ()
    outs: tuple[str, ...] = ()  # cached by DVC
    uncached: tuple[str, ...] = ()  # not stored: links, and what follows from cached outputs
    metrics: tuple[str, ...] = ()  # committed
    by_text: bool = False  # one run for each text of the perplexity
    # A file in plan/, which is empty if the settings do not ask for a run; "": they always do.
    asked_by: str = ""

    @property
    def written(self) -> tuple[str, ...]:
        """All files and folders that it writes."""
        return (*self.outs, *self.uncached, *self.metrics)

    def wanted(self, params: "Params") -> bool:
        """Whether the settings ask for it. If not, a run writes placeholders, because DVC expects each output."""
        return not self.asked_by or bool(stage_inputs(params)[self.asked_by])


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of the pipeline: one variant, named "", or several."""

    name: str
    # A change of results raises the version, here and in dvc.yaml, and DVC reruns the stage and later stages. No other
    # code change causes a rerun.
    version: int
    about: str
    variants: Mapping[str, Variant]
    argument: str = ""  # the name of the argument that names a variant
    network: bool = False

    def run_name(self, variant: str = "", text: str = "") -> str:
        """Return the name of one run, here and in dvc.yaml, such as `perplexity-dense@ptb`."""
        return self.name + (f"-{variant}" if variant else "") + (f"@{text}" if text else "")

    def runs(self, texts: Collection[str], variant: str = "", text: str = "") -> Iterator[tuple[str, str, str]]:
        """Yield the name, variant and text of each run, or of one variant or text. UserError for an unknown name."""
        if variant and variant not in self.variants:
            raise UserError(f"{self.argument}: found {variant}, expected {', '.join(self.variants)}")
        chosen = {name: row for name, row in self.variants.items() if variant in ("", name)}
        by_text = any(row.by_text for row in chosen.values())
        if text and not (by_text and text in texts):
            raise UserError(f"text: found {text}, expected {', '.join(texts) if by_text else 'none'}")
        for name, row in chosen.items():
            for text_name in texts if row.by_text else [""]:
                if text in ("", text_name):
                    yield self.run_name(name, text_name), name, text_name


RECOVERED_FROM = ("models/dense", "models/pruned", "metrics/pruned/sparsity.json")
SOURCES = {  # of `download`: the setting that names each, its place below plan/download/ and sources/, and its output
    "model": ("model", "model", "models/dense"),
    "calibration": ("calibration.text", "calibration", "data/calibration"),
    "perplexity": ("perplexity.texts.NAME", "perplexity/{text}", "data/perplexity/{text}"),
    "recovery": ("recovery.text", "recovery", "data/recovery"),
    "tasks": ("tasks", "tasks", "data/tasks"),
}
CALIBRATED = {  # by kind of statistics: the settings that decide whether they are measured
    "norms": (),
    "gram": ("recipe", "pattern", *CHOICES),
    "fisher": ("recipe", "pattern", *CHOICES),
    "blocks": ("recipe", "pattern", *CHOICES, "sparsity"),
}
STATS = tuple(f"stats/{statistics}" for statistics in CALIBRATED)
# The dense model's predictions, with which the other models are compared.
REFERENCE = ("reference/{text}",)
STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            name="plan",
            version=1,
            about="Check params.yaml, and write the settings of each stage: plan/, sources/.",
            variants={
                "": Variant(
                    outs=("plan",),
                    # Links to local sources, or notes: DVC hashes what they lead to.
                    uncached=tuple(f"sources/{source}" for source in (*SOURCES, "method")),
                )
            },
        ),
        Stage(
            name="download",
            version=2,
            about="Fetch the model, a text, or the tasks. Only this stage uses the internet.",
            argument="source",
            variants={
                source: Variant(
                    settings=(setting,),
                    deps=(f"plan/download/{place}.json", f"sources/{place}"),
                    outs=(out,),
                    by_text=source == "perplexity",
                    asked_by="download/recovery" if source == "recovery" else "",
                )
                for source, (setting, place, out) in SOURCES.items()
            },
            network=True,
        ),
        Stage(
            name="calibrate",
            version=15,
            about="Measure the dense model's activations once: stats/.",
            argument="statistics",
            variants={
                statistics: Variant(
                    settings=("calibration", "dtype", *settings),
                    deps=(f"plan/calibrate/{statistics}.json", "models/dense", "data/calibration"),
                    outs=(f"stats/{statistics}",),
                    asked_by=f"calibrate/{statistics}",
                )
                for statistics, settings in CALIBRATED.items()
            },
        ),
        Stage(
            name="mask",
            version=15,
            about="Choose the weights to keep: masks/.",
            variants={
                "": Variant(
                    settings=("recipe", "sparsity", "pattern", *CHOICES),
                    # The text is for `propagation: pruned`, and for candidates of smaller models.
                    deps=("plan/mask.json", "sources/method", "models/dense", *STATS, "data/calibration"),
                    # weights has blocks only with a reconstruction, and with `propagation: pruned` or that repair.
                    outs=("masks", "weights"),
                )
            },
        ),
        Stage(
            name="apply",
            version=11,
            about="Write the pruned model: models/pruned.",
            variants={
                "": Variant(
                    deps=("models/dense", "masks", "stats/gram", "stats/fisher", "weights"),
                    outs=("metrics/details/pruned/sparsity.json", "metrics/plots/sparsity.csv"),
                    uncached=("models/pruned",),  # it follows from what is cached
                    metrics=("metrics/pruned/sparsity.json",),
                )
            },
        ),
        Stage(
            name="recover",
            version=6,
            about="Train the pruned model towards the dense model, if recovery.tokens is set: models/recovered.",
            variants={
                "": Variant(
                    settings=("recovery", "calibration", "dtype"),
                    deps=("plan/recover.json", *RECOVERED_FROM, "data/calibration", "data/recovery"),
                    outs=("metrics/plots/recovery.csv", "models/recovered"),
                    metrics=("metrics/recovered/sparsity.json",),
                    asked_by="recover",
                )
            },
        ),
        Stage(
            name="perplexity",
            version=7,
            about="Measure a model's perplexity on a text, and its divergence from the dense model.",
            argument="model",
            variants={
                model: Variant(
                    settings=("perplexity.length", "perplexity.windows", "dtype"),
                    deps=("plan/perplexity.json", f"models/{model}", "data/perplexity/{text}", *reads),
                    outs=(f"metrics/details/{model}/perplexity/{{text}}.json", *writes),
                    metrics=(f"metrics/{model}/perplexity/{{text}}.json",),
                    by_text=True,
                    asked_by="recover" if model == "recovered" else "",
                )
                for model, reads, writes in (
                    ("dense", (), REFERENCE),
                    ("pruned", REFERENCE, ()),
                    ("recovered", REFERENCE, ()),
                )
            },
        ),
        Stage(
            name="zero-shot",
            version=12,
            about="Measure a model's accuracy on the zero-shot tasks.",
            argument="model",
            variants={
                model: Variant(
                    settings=("tasks", "dtype"),
                    deps=(
                        *("plan/zero-shot.json", f"models/{model}", "data/tasks"),
                        # The other models' answers are compared with the dense model's.
                        "models/dense/provenance.json" if model == "dense" else "metrics/details/dense/zero_shot.json",
                    ),
                    outs=(f"metrics/details/{model}/zero_shot.json", f"metrics/plots/{model}/zero_shot.csv"),
                    metrics=(f"metrics/{model}/zero_shot.json",),
                    asked_by="recover" if model == "recovered" else "",
                )
                for model in MODELS
            },
        ),
    )
}
WRITTEN = {path for stage in STAGES.values() for variant in stage.variants.values() for path in variant.written}
# The folders in a study that DVC or git tracks.
TRACKED = sorted({path.partition("/")[0] for path in WRITTEN} | {".dvc", ".git"})


def check_outside(study: "Study", path: Path) -> Path:
    """Return the absolute path of a directory to write. UserError if it is inside a folder that DVC or git tracks."""
    path = check_place(path)
    for name in TRACKED:
        if path.resolve().is_relative_to(study.root.resolve() / name):
            raise UserError(f"{path}: inside {name}/, which DVC or git tracks; name another")
    return path


def stage_inputs(params: "Params") -> dict[str, Json]:
    """Return what each stage is given of the settings: the content of each file in `plan/`, by path without `.json`.

    Stages depend on these files instead of `params.yaml`: the settings say what the user wants, never what a stage
    needs. A file is empty if the settings do not ask for the run.
    """
    calibration, recovery, perplexity = params.calibration, params.recovery, params.perplexity
    trains_on_own_text = recovery.tokens and recovery.text
    inputs: dict[str, Json] = {
        "download/model": {"source": params.model},
        "download/calibration": {"texts": [asdict(text.chosen) for text in calibration.text]},
        "download/recovery": {"texts": [asdict(text.chosen) for text in recovery.text]} if trains_on_own_text else {},
        "download/tasks": {"source": params.tasks.source, "names": params.tasks.names},
        "mask": params.plan.to_dict(),
        "recover": {},
        "perplexity": {"length": perplexity.length, "windows": perplexity.windows, "dtype": params.dtype},
        "zero-shot": {"tasks": params.tasks.names, "limit": params.items, "dtype": params.dtype},
    }
    for name, text in perplexity.texts.items():
        inputs[f"download/perplexity/{name}"] = {"texts": [asdict(text.chosen)]}
    windows: Json = {name: getattr(calibration, name) for name in ("windows", "shares", "length", "seed")}
    windows["dtype"] = params.dtype
    for statistics in STATISTICS:
        inputs[f"calibrate/{statistics}"] = windows if statistics in params.statistics else {}
    if "fisher" in params.statistics:
        inputs["calibrate/fisher"] = windows | {"windows_back": calibration.windows_back}
    # For a quarter of the blocks: another sparsity up to that changes nothing.
    sparsity = max(MEASURED_BLOCKS, float(params.plan.sparsity))
    inputs["calibrate/blocks"] = windows | {"sparsity": sparsity} if params.plan.measures_blocks else {}
    if recovery.tokens:
        inputs["recover"] = {
            "tokens": recovery.tokens,
            "rate": recovery.rate,
            "batch": recovery.batch,
            "text": bool(recovery.text),  # the text is recovery.text; else the calibration's, without its windows
            "embedded": any(text.source == EMBEDDED for text in params.training_texts),  # a text is the embedded one
            "length": min(RECOVERY_LENGTH, calibration.length),
            "dtype": params.dtype,
            "shares": [text.windows or 1 for text in recovery.text] or calibration.shares,
            "calibration_length": calibration.length,
            "seed": calibration.seed,
        }
    return inputs


def run(
    stage: str,
    *,
    study: "Study",
    variant: str = "",
    text: str = "",
    context: "Callable[[str], contextlib.AbstractContextManager[object]]" = contextlib.nullcontext,
) -> None:
    """Run one stage on a study, or all of its variants and texts; each inside its `context`, a function of its name.

    A run that the settings do not ask for writes placeholders. UserError if plan/ is not what params.yaml says: a stage
    that is run by hand must not give a wrong figure.
    """
    row = STAGES[stage]
    runs = list(row.runs(study.params.perplexity.texts, variant, text))  # an unknown name fails before anything runs
    if stage != "plan":
        check_stage_inputs(study)
    module = stage.replace("-", "_")
    for run_name, variant_name, text_name in runs:
        chosen = row.variants[variant_name]
        if not chosen.wanted(study.params):
            if variant == variant_name:  # it was named, or is the only one
                notice(f"{run_name}: not needed with these settings; it writes placeholders")
            _write_placeholders(study, chosen, text_name)
            continue
        arguments = {row.argument: variant_name, "text": text_name}
        with context(run_name):
            given = {name: value for name, value in arguments.items() if value}
            resolve_name(f"wanda_dvc.stages.{module}:{module}")(study=study, **given)


def _write_placeholders(study: "Study", variant: Variant, text: str) -> None:
    for output in variant.written:
        place = study.root / output.format(text=text)
        remove(place)
        content = "none\n" if place.suffix == ".csv" else "{}\n"  # DVC warns about an empty file
        write_text(place if place.suffix else place / "none.json", content)


def check_stage_inputs(study: "Study") -> None:
    """Raise UserError if a study's `plan/` is not what its settings say now."""
    for name, expected in stage_inputs(study.params).items():
        content = study.stage_input(name)
        for key in expected | content:
            if expected.get(key) != content.get(key):
                problem = f"found {key} {content.get(key)}, expected {expected.get(key)} as params.yaml has it now"
                raise UserError(f"plan/{name}.json: {problem}; run `wanda-dvc plan`, then `dvc repro`")
