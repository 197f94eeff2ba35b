"""The table of stages, in the order of the pipeline: one row, one module and one command each.

A row has all that `dvc.yaml` says of the stage, and what the stage has to know of the settings: its files in `plan/`.
`scripts/pipeline.py` writes `dvc.yaml` and the ignore files from the rows. The command line and the views loop over
this table too.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING

from wanda_dvc.catalog import EMBEDDED, STATISTICS
from wanda_dvc.errors import UserError, notice
from wanda_dvc.plan import CHOICES, RECOVERY_LENGTH
from wanda_dvc.reading import check_place

if TYPE_CHECKING:
    from wanda_dvc.params import Params
    from wanda_dvc.study.files import Json
    from wanda_dvc.study.folder import Study


MODELS = ("dense", "pruned", "recovered")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One run of a stage in `dvc.yaml`: what it reads and writes, below a study; `{text}` is a text's name."""

    settings: tuple[str, ...] = ()  # the settings that decide its results, by dotted name
    deps: tuple[str, ...] = ()
    outs: tuple[str, ...] = ()  # cached
    uncached: tuple[str, ...] = ()  # not stored: links, and what follows from cached outputs
    metrics: tuple[str, ...] = ()  # committed
    plots: Mapping[str, Mapping[str, str]] | None = None  # cached, drawn by `dvc plots`, with their options
    by_text: bool = False  # one run for each text of the perplexity
    # Whether the settings ask for it. If not, a run writes files without content, because DVC expects each output.
    wanted: "Callable[[Params], bool]" = lambda _: True

    @property
    def written(self) -> tuple[str, ...]:
        """What it writes."""
        return (*self.outs, *self.uncached, *self.metrics, *(self.plots or ()))


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of the pipeline: one part, named "", or several."""

    name: str
    # A change of results raises the version, here and in dvc.yaml, and DVC reruns the stage and later stages. No other
    # code change causes a rerun.
    version: int
    about: str
    variants: Mapping[str, Variant]
    # Its files in `plan/`, by path without `.json`. Stages depend on these files instead of `params.yaml`: the settings
    # say what the user wants, never what a stage needs.
    plan: "Callable[[Params], dict[str, Json]]" = lambda _: {}
    argument: str = ""  # the name of the argument
    network: bool = False

    def run_name(self, variant: str = "", text: str = "") -> str:
        """Return the name of one run, here and in dvc.yaml, such as `perplexity-dense@ptb`."""
        return self.name + (f"-{variant}" if variant else "") + (f"@{text}" if text else "")

    def runs(self, texts: Collection[str], variant: str = "", text: str = "") -> Iterator[tuple[str, str, str]]:
        """Yield the name, part and text of each run; of one part or text, if named. UserError for another name."""
        if variant and variant not in self.variants:
            raise UserError(f"{self.argument}: found {variant}, expected {', '.join(self.variants)}")
        by_text = any(row.by_text for one, row in self.variants.items() if variant in ("", one))
        if text and (not by_text or text not in texts):
            expected = ", ".join(texts) if by_text else f"none: {variant} is no text"
            raise UserError(f"text: found {text}, expected {expected}")
        for one, row in self.variants.items():
            for named in texts if row.by_text else [""]:
                if variant in ("", one) and text in ("", named):
                    yield self.run_name(one, named), one, named


def _perplexity(model: str) -> Variant:
    # The dense model's run keeps its predictions; the other models are compared with them.
    reads, writes = ((), ("reference/{text}",)) if model == "dense" else (("reference/{text}",), ())
    return Variant(
        settings=("perplexity.length", "perplexity.windows", "dtype"),
        deps=("plan/perplexity.json", f"models/{model}", "data/perplexity/{text}", *reads),
        outs=(f"metrics/details/{model}/perplexity/{{text}}.json", *writes),
        metrics=(f"metrics/{model}/perplexity/{{text}}.json",),
        plots=PLOTS if model == "pruned" else None,
        by_text=True,
        wanted=_recovers if model == "recovered" else Variant.wanted,
    )


def _zero_shot(model: str) -> Variant:
    # The other models' answers are compared with the dense model's.
    reads = "models/dense/provenance.json" if model == "dense" else "metrics/details/dense/zero_shot.json"
    return Variant(
        settings=("tasks", "zero_shot.limit", "dtype"),
        deps=("plan/zero-shot.json", f"models/{model}", "data/tasks", "prompts.txt", reads),
        outs=(
            f"metrics/details/{model}/zero_shot.json",
            f"metrics/details/{model}/continuations.json",
            f"metrics/plots/{model}/zero_shot.csv",
        ),
        metrics=(f"metrics/{model}/zero_shot.json",),
        wanted=_recovers if model == "recovered" else Variant.wanted,
    )


def _calibrate(tier: str) -> Variant:
    by_recipe = () if tier == "norms" else ("recipe", "pattern", *CHOICES)
    plotted = ("metrics/plots/norms.csv",) if tier == "norms" else ()
    return Variant(
        settings=("calibration", "dtype", *by_recipe),
        deps=(f"plan/calibrate/{tier}.json", "models/dense", "data/calibration"),
        outs=(f"stats/{tier}", *plotted),
        wanted=lambda params: tier in params.statistics,
    )


def _recovers(params: "Params") -> bool:
    return params.recovery.tokens > 0


def _recovers_on_own_text(params: "Params") -> bool:
    return _recovers(params) and params.recovery.text is not None


def _plan_download(params: "Params") -> "dict[str, Json]":
    own = params.recovery.text if _recovers_on_own_text(params) else None
    return {
        "download/model": {"source": params.model},
        "download/calibration": asdict(params.calibration.text.chosen),
        "download/recovery": asdict(own.chosen) if own else {},
        "download/tasks": params.tasks.model_dump(),
        **{f"download/perplexity/{name}": asdict(text.chosen) for name, text in params.perplexity.texts.items()},
    }


def _plan_calibrate(params: "Params") -> "dict[str, Json]":
    drawn = params.calibration.model_dump(include={"windows", "length", "seed"}) | {"dtype": params.dtype}
    return {f"calibrate/{tier}": drawn if tier in params.statistics else {} for tier in STATISTICS}


def _plan_recover(params: "Params") -> "dict[str, Json]":
    wanted, calibration = params.recovery, params.calibration
    drawn = {"windows": calibration.windows, "calibrated": calibration.length, "seed": calibration.seed}
    own, length = wanted.text or calibration.text, min(RECOVERY_LENGTH, calibration.length)
    text = {"text": bool(wanted.text), "embedded": own.source == EMBEDDED, "length": length, "dtype": params.dtype}
    return {"recover": {"tokens": wanted.tokens, "rate": wanted.rate} | text | drawn if wanted.tokens else {}}


RECOVERED_FROM = ("models/dense", "models/pruned", "metrics/pruned/sparsity.json")
SOURCES = ("model", "calibration", "perplexity", "recovery", "tasks", "method")
STATS = tuple(f"stats/{tier}" for tier in STATISTICS)
PLOTS = {  # of the pruned model on a text
    "metrics/plots/perplexity/{text}.csv": {
        "title": "Perplexity on {text}, ± one standard error over windows",
        "template": "perplexity",
        "x": "window",
        "y": "pruned",
    },
    "metrics/plots/divergence/{text}.csv": {
        "title": "Divergence from the dense model on {text} by window: mean KL(dense ‖ pruned), nats",
        "x": "window",
        "y": "divergence",
    },
}
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
                    uncached=tuple(f"sources/{variant}" for variant in SOURCES),
                )
            },
        ),
        Stage(
            name="download",
            version=1,
            about="Fetch the model, a text, or the tasks. Only this stage uses the internet.",
            argument="source",
            variants={
                variant: Variant(
                    settings=(setting,),
                    deps=(f"plan/download/{name}.json", f"sources/{name}"),
                    outs=(out,),
                    by_text=variant == "perplexity",
                    wanted=wanted,
                )
                for variant, name, setting, out, wanted in (
                    ("model", "model", "model", "models/dense", Variant.wanted),
                    ("calibration", "calibration", "calibration.text", "data/calibration", Variant.wanted),
                    (
                        "perplexity",
                        "perplexity/{text}",
                        "perplexity.texts.NAME",
                        "data/perplexity/{text}",
                        Variant.wanted,
                    ),
                    ("recovery", "recovery", "recovery.text", "data/recovery", _recovers_on_own_text),
                    ("tasks", "tasks", "tasks", "data/tasks", Variant.wanted),
                )
            },
            plan=_plan_download,
            network=True,
        ),
        Stage(
            name="calibrate",
            version=11,
            about="Measure the dense model's activations once: stats/.",
            argument="statistics",
            variants={tier: _calibrate(tier) for tier in STATISTICS},
            plan=_plan_calibrate,
        ),
        Stage(
            name="mask",
            version=11,
            about="Choose the weights to keep: masks/.",
            variants={
                "": Variant(
                    settings=("recipe", "sparsity", "pattern", *CHOICES),
                    # The text is for propagation: pruned, corrected.
                    deps=("plan/mask.json", "sources/method", "models/dense", *STATS, "data/calibration"),
                    outs=("masks", "weights"),  # weights has no blocks, but with a reconstruction and propagation
                )
            },
            plan=lambda params: {"mask": params.plan.described},
        ),
        Stage(
            name="apply",
            version=9,
            about="Write the pruned model: models/pruned.",
            variants={
                "": Variant(
                    deps=("models/dense", "masks", "stats/gram", "stats/fisher", "weights"),
                    outs=(
                        "metrics/details/pruned/sparsity.json",
                        "metrics/details/pruned/layer_error.json",
                        "metrics/plots/sparsity.csv",
                        "metrics/plots/layer_error.csv",
                    ),
                    uncached=("models/pruned",),  # it follows from what is cached
                    metrics=("metrics/pruned/sparsity.json",),
                )
            },
        ),
        Stage(
            name="recover",
            version=3,
            about="Train the pruned model towards the dense model, if recovery.tokens is set: models/recovered.",
            variants={
                "": Variant(
                    settings=("recovery", "calibration", "dtype"),
                    deps=("plan/recover.json", *RECOVERED_FROM, "data/calibration", "data/recovery"),
                    outs=("metrics/plots/recovery.csv", "models/recovered"),
                    metrics=("metrics/recovered/sparsity.json",),
                    wanted=_recovers,
                )
            },
            plan=_plan_recover,
        ),
        Stage(
            name="perplexity",
            version=5,
            about="Measure a model's perplexity on a text, and its divergence from the dense model.",
            argument="model",
            variants={model: _perplexity(model) for model in MODELS},
            plan=lambda params: {
                "perplexity": params.perplexity.model_dump(include={"length", "windows"}) | {"dtype": params.dtype}
            },
        ),
        Stage(
            name="zero-shot",
            version=10,
            about="Measure a model's accuracy on the zero-shot tasks, and continue prompts.",
            argument="model",
            variants={model: _zero_shot(model) for model in MODELS},
            plan=lambda params: {
                "zero-shot": {"tasks": params.tasks.names, "limit": params.items, "dtype": params.dtype}
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
    root, place = study.root.resolve(), path.resolve()
    if place.is_relative_to(root) and place.relative_to(root).parts[:1] in {(name,) for name in TRACKED}:
        raise UserError(f"{path}: inside {place.relative_to(root).parts[0]}/, which DVC or git tracks; name another")
    return path


def stage_inputs(params: "Params") -> "dict[str, Json]":
    """Return the content of each file in `plan/`, by its path without `.json`."""
    return {name: content for stage in STAGES.values() for name, content in stage.plan(params).items()}


def run(stage: str, *, study: "Study", variant: str = "", text: str = "") -> None:
    """Run one stage on a project; without a part or a text where it has some, on all of them.

    UserError if the plan is not what params.yaml says: a stage that is run by hand must not give a wrong figure.
    """
    from wanda_dvc.study.artifact import remove
    from wanda_dvc.study.files import write_text

    row = STAGES[stage]
    if stage != "plan":
        check_stage_inputs(study)
    for _, one, name in row.runs(study.params.perplexity.texts, variant, text):
        if not row.variants[one].wanted(study.params):
            if variant == one:
                notice(f"{row.run_name(one, name)}: not needed with these settings; it writes placeholders")
            for path in row.variants[one].written:
                remove(place := study.root / path.format(text=name))
                content = "none\n" if place.suffix == ".csv" else "{}\n"  # DVC warns about an empty file
                write_text(place if place.suffix else place / "none.json", content)
            continue
        words = {row.argument: one} if one else {}
        words |= {"text": name} if name else {}
        module = stage.replace("-", "_")
        resolve_name(f"wanda_dvc.stages.{module}:{module}")(study=study, **words)


def check_stage_inputs(study: "Study") -> None:
    """Raise UserError if a study's `plan/` is not what its settings say now."""
    for name, content in stage_inputs(study.params).items():
        found = study.stage_input(name)
        for key in content | found:
            if content.get(key) != found.get(key):
                raise UserError(
                    f"plan/{name}.json: found {key} {found.get(key)}, expected {content.get(key)} as params.yaml has "
                    "it now; run `wanda-dvc plan`, then `dvc repro`"
                )


def times(study: "Study") -> "dict[str, Json]":
    """Return time and machine of the last run of each stage in this checkout, by run."""
    from wanda_dvc.study.files import load_json

    names = [name for stage in STAGES.values() for name, _, _ in stage.runs(study.params.perplexity.texts)]
    return {name: content for name in names if (content := load_json(study.time(name)))}
