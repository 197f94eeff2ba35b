"""The table of stages, in the order of the pipeline: one row, one module, one command and one DVC name each.

A row's module holds the stage's function; `needs` says what each stage needs. The command line, `doctor`, `show`, the
report and the tests of `dvc.yaml` loop over this table.
"""

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from wanda_dvc.errors import UserError, in_params

if TYPE_CHECKING:
    from wanda_dvc.study.files import Json
    from wanda_dvc.study.project import Project

MODELS = ("dense", "pruned")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of the pipeline."""

    name: str
    # A change of results raises the version, here and in dvc.yaml, and DVC reruns the stage and later stages. No other
    # code change causes a rerun.
    version: int
    about: str
    settings: tuple[str, ...] = ()  # the settings that the stage reads, by dotted name: `params:` in dvc.yaml
    parts: Mapping[str, tuple[str, ...]] = field(
        default_factory=dict
    )  # the parts of the stage, and the settings that only one part reads
    part_is: str = ""  # the name of that argument
    by_text: tuple[str, ...] = ()  # the parts that run once for each text of the perplexity
    network: bool = False
    computes: bool = True  # imports torch, which takes seconds

    @property
    def function(self) -> Callable[..., None]:
        """The stage itself."""
        name = self.name.replace("-", "_")
        function: Callable[..., None] = getattr(importlib.import_module(f"wanda_dvc.stages.{name}"), name)
        return function

    def settings_of(self, part: str | None) -> tuple[str, ...]:
        """Return the settings read by one run of the stage."""
        return self.settings + (self.parts[part] if part else ())

    def runs(self, texts: Iterable[str]) -> Iterator[tuple[str, str | None, str | None]]:
        """Yield the name, part and text of each run, such as `perplexity-dense@ptb`."""
        for part in self.parts or [None]:
            for text in texts if part in self.by_text else [None]:
                yield self.run_name(part, text), part, text

    def run_name(self, part: str | None = None, text: str | None = None) -> str:
        """Return the name of one run."""
        return self.name + (f"-{part}" if part else "") + (f"@{text}" if text else "")


STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            name="locate",
            version=2,
            about="Link local models and texts into sources/, so that DVC notices changes.",
            settings=("model", "calibration.text.source", "perplexity.texts", "tasks.source"),
            computes=False,
        ),
        Stage(
            name="download",
            version=1,
            about="Fetch the model, a text, or the tasks. Only this stage touches a network.",
            part_is="part",
            parts={
                "model": ("model",),
                "calibration": ("calibration.text",),
                "perplexity": ("perplexity.texts.NAME",),
                "tasks": ("tasks",),
            },
            by_text=("perplexity",),
            network=True,
            computes=False,
        ),
        Stage(
            name="calibrate",
            version=11,
            about="Measure the dense model's activations once: stats/.",
            settings=(
                "calibration.windows",
                "calibration.length",
                "calibration.seed",
                "calibration.statistics",
                "dtype",
            ),
        ),
        Stage(
            name="mask",
            version=11,
            about="Choose the weights to keep: masks/.",
            settings=(
                "recipe",
                "sparsity",
                "pattern",
                "method",
                "group",
                "allocation",
                "allocation_strength",
                "reconstruction",
                "propagation",
            ),
        ),
        Stage(
            name="apply",
            version=9,
            about="Write the pruned model: models/pruned.",
        ),
        Stage(
            name="perplexity",
            version=5,
            about="Measure a model's perplexity on a text, and its divergence from the dense model.",
            settings=("perplexity.length", "perplexity.windows", "dtype"),
            part_is="model",
            parts=dict.fromkeys(MODELS, ()),
            by_text=MODELS,
        ),
        Stage(
            name="zero-shot",
            version=10,
            about="Measure a model's accuracy on the zero-shot tasks, and continue prompts.",
            settings=("tasks.names", "zero_shot.limit", "dtype"),
            part_is="model",
            parts=dict.fromkeys(MODELS, ()),
        ),
    )
}
PARTS = tuple(STAGES["download"].parts)


def check_version(stage: str, asked: int | None) -> None:
    """Raise UserError if `dvc.yaml` is for another version of a stage."""
    computed = STAGES[stage].version
    if asked is not None and asked != computed:
        raise UserError(
            f"dvc.yaml: {stage}: version {asked}, expected {computed}: the study is of another wanda-dvc; install that "
            "one, or make a new study with `wanda-dvc init DIR` and copy your settings into its params.yaml"
        )


def run(stage: str, *, project: "Project", part: str | None = None, text: str | None = None) -> None:
    """Run one stage on a project; a part that runs once for each text, on one of them or on all."""
    row = STAGES[stage]
    words = {row.part_is: part} if part else {}
    with in_params():
        if part in row.by_text:
            for one in [text] if text else project.params.perplexity.texts:
                row.function(project=project, **words, text=one)
        else:
            row.function(project=project, **words)


def times(study: "Project") -> "dict[str, Json]":
    """Return time, memory and machine of the last run of each stage in this checkout, by run."""
    from wanda_dvc.study.files import load_json

    names = [name for stage in STAGES.values() for name, _, _ in stage.runs(study.params.perplexity.texts)]
    return {name: content for name in names if (content := load_json(study.time(name)))}
