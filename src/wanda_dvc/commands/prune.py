"""`wanda-dvc prune`: a model becomes a pruned model, by the stages of a study in the user's cache folder.

A model and its calibration text have one study. Its statistics serve each further recipe, sparsity and pattern.
"""

import math
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from wanda_dvc.catalog import EMBEDDED
from wanda_dvc.commands import check_target, reproduce
from wanda_dvc.commands.export import move_model
from wanda_dvc.commands.request import PruneRequest
from wanda_dvc.engine.checkpoint import Checkpoint, max_positions, read_config
from wanda_dvc.engine.memory import ModelSizes
from wanda_dvc.errors import UserError
from wanda_dvc.params import Params, Settings, download_sources, nested
from wanda_dvc.plan import SMALLER, TOKENS_A_FEATURE
from wanda_dvc.results.compare import DENSE, headings
from wanda_dvc.results.experiments import Experiment, workspace
from wanda_dvc.results.markup import table
from wanda_dvc.results.measures import MEASURES, figures
from wanda_dvc.results.show import settings_line, table_notes
from wanda_dvc.stages import inputs, needs
from wanda_dvc.stages.candidates import MEASURED
from wanda_dvc.stages.device import own_device
from wanda_dvc.stages.download import find_model_config
from wanda_dvc.study.artifact import locked, read_provenance
from wanda_dvc.study.files import Json
from wanda_dvc.study.folder import Study
from wanda_dvc.study.scaffold import new_params, renew


@dataclass(frozen=True)
class PrunedModel:
    """The result of `wanda-dvc prune`; as a text, what the command prints."""

    path: Path  # the directory of the pruned or recovered model, for `AutoModelForCausalLM.from_pretrained`
    study: Path  # the study of the model, in the user's cache folder
    results: dict[str, Json]  # by model, such as `dense`: the measures by name, and by text
    text: str

    def __str__(self) -> str:
        return self.text


def prune_model(request: PruneRequest, *, shown: bool = True) -> PrunedModel:
    """Run the stages of a request's study and move the model to its target. UserError, early, if it does not fit.

    With `shown` the stages write to this process's stderr themselves.
    """
    with locked(request.root, f"waiting for another `wanda-dvc prune` of this model, in {request.root} …"):
        study = Study(request.root).with_params(request.params)
        check_target(study, request.target)  # another command may have written it meanwhile
        (study.root / ".dvc/tmp/rwlock").unlink(missing_ok=True)  # of a stopped run; DVC would warn of it
        config = find_model_config(study)
        if config is None or request.limit:  # of a package before its download; a size is one of stored tensors
            renew(study.root, nested(request.settings))
            reproduce(study.root, "download", "model", shown=shown)
            config = study.model("dense")
        sizes = ModelSizes.read(config)
        needs.check_solver(study, sizes)
        if request.params.recovery.tokens:
            needs.training_ways(study, sizes)  # UserError if the memory is too small
        renew(study.root, nested(settings_for_model(request, config, sizes)))
        if request.params.plan.structure:  # UserError before the calibration if the model lacks such units
            reproduce(study.root, "download", "model", shown=shown)
            inputs.removal_of(Checkpoint(study.model("dense")), request.params.plan, own_device(request.params.runtime))
        last_stage = "recover" if request.params.recovery.tokens else "apply"
        reproduce(study.root, "perplexity" if request.evaluate else last_stage, shown=shown)
        experiment = workspace(Study(request.root))
        models, model = experiment.models, list(experiment.models)[-1]
        sentences = table_notes({experiment.name: experiment.params}, models)
        candidates: list[Json] = read_provenance(study.masks, "mask").get("candidates", [])
        paragraphs = [  # of files that move now
            _summary(experiment, sizes.parameters, ModelSizes.read(study.model(model)).parameters),
            settings_line(experiment.params),
            _table(experiment),
            table([*candidates[0]], [[*row.values()] for row in candidates]) if candidates else "",
            *(sentence for sentence in sentences if sentence.startswith("Perplexity on")),
            *(experiment.notes if request.evaluate else ()),  # else they would call each missing figure stale
        ]
        move_model(experiment, request.target)
    paragraphs += [
        f"{request.target}: the {model} model, with a model card.",
        f"The study: {study.root}. `wanda-dvc init my-study --from {shlex.quote(str(study.root))}` begins your own.",
    ]
    results = {name: figures(measured) for name, measured in models.items()}
    return PrunedModel(request.target, study.root, results, "\n\n".join(filter(None, paragraphs)))


def settings_for_model(request: PruneRequest, config: Path, sizes: ModelSizes) -> Settings:
    """Return a request's settings, with windows that fit a model, and enough of them for its widest linear.

    Settings that the request names stay.
    """
    params: Params = request.params
    length = params.calibration.length
    longest = max_positions(read_config(config)) or sys.maxsize
    if "calibration.length" not in request.settings:
        length = min(longest, length)
    fitting = {"calibration.length": length, "perplexity.length": min(longest, params.perplexity.length)}
    if not all(text.windows for text in params.calibration.text):
        enough = math.ceil(TOKENS_A_FEATURE * sizes.widest / length)
        fitting["calibration.windows"] = max(params.calibration.windows, enough)
    settings: Settings = fitting | request.settings
    if request.limit:
        measure, limit = request.limit
        stored, weights, source = sizes.stored, sizes.parameters, Path(request.params.model)
        folder = source if source.is_absolute() else config
        if folder.is_dir():  # all its tensors count, a tied head too, in the dtypes of their files
            tensors = Checkpoint(folder).entries.values()
            stored, weights = sum(tensor.length for tensor in tensors), Checkpoint(folder).parameters
        settings["sparsity"] = 1 - limit / stored if measure == "stored" else (sizes.parameters - limit) / weights
    size, staying = 1 - settings["sparsity"], sizes.other_parameters / sizes.parameters
    if settings["pattern"] == SMALLER and not staying < size < 1:
        expected = f"expected more than {staying:.1%}, its embeddings and head, and less than all"
        raise UserError(f"--size, --parameters: found {size:.1%} of the model, {expected}")
    return settings


def _summary(experiment: Experiment, dense: int, final: int) -> str:
    """Return a sentence on the model's size, from both numbers of parameters, and on what the pruning costs."""
    unit, letter, digits = (1e9, "B", 2) if dense >= 1e9 else (1e6, "M", 1)
    sizes = [f"{parameters / unit:.{digits}f} {letter}" for parameters in (dense, final)]
    parts = [f"Parameters: {sizes[0]} → {sizes[1]} (−{100 * (1 - final / dense):.1f} %)"]
    if dense == final:
        zeros = experiment.final.metrics["sparsity"]["sparsity"]
        parts = [f"Size unchanged: {100 * zeros:.1f} % of the linears' weights are zeros"]
    measures = {measure.name: measure for measure in MEASURES}
    perplexity, divergence = measures["perplexity"], measures["divergence"]
    for text in experiment.final.texts:
        before = perplexity.formatted(experiment.results[DENSE], text, interval=False)
        after = perplexity.formatted(experiment.final, text, interval=False)
        distance = divergence.formatted(experiment.final, text, interval=False)
        parts.append(f"perplexity on {text}: {before} → {after}; divergence {distance} nats")
    return f"{'; '.join(parts)}."


def _table(experiment: Experiment) -> str:
    """Return the brief measures of an experiment's models, and the sizes of their files."""
    models, rows = experiment.models, []
    for heading, (measure, target) in headings(list(models.values())).items():
        rows.append([heading, *(measure.formatted(results, target) for results in models.values())])
    folders = [experiment.study.model(name) for name in models]
    sizes = [sum(path.stat().st_size for path in folder.iterdir()) for folder in folders]
    rows.append(["size, MB", *(f"{size / 1e6:,.1f}" for size in sizes)])
    return table(["", *models], rows)


# --- a dry run ---


def describe_run(request: PruneRequest) -> str:
    """Return what a request would fetch, its calibration, memory, disk and time. Only a config.json is fetched."""
    study = Study(request.root).with_params(request.params)
    config = find_model_config(study)
    if config is None:
        details = ["Tokens, memory and disk are known after the download: a package has no config.json."]
    else:
        sizes = ModelSizes.read(config)
        study = study.with_params(new_params(nested(settings_for_model(request, config, sizes)))[0])
        details = _needs_of_run(study, sizes, evaluate=request.evaluate)
    params = study.params
    lines = [
        f"{settings_line(params)}, into {request.target}",
        f"Fetched unless present: {_fetched(params, evaluate=request.evaluate)}.",
        *details,
        "This was a dry run: nothing was pruned.",
    ]
    return "\n".join(lines)


def _fetched(params: Params, *, evaluate: bool) -> str:
    """Return the sources on the network that a run reads."""
    sources = []
    for name, (_, source) in download_sources(params).items():
        is_local = Path(source).is_absolute() or source in (EMBEDDED, "none")
        is_read = evaluate if name.startswith("perplexity/") else name != "tasks"  # which `prune` does not run
        if is_read and not is_local:
            sources.append(f"{source} ({name})")
    return ", ".join(sources) or "nothing"


def _needs_of_run(study: Study, sizes: ModelSizes, *, evaluate: bool) -> list[str]:
    params, available, calibration = study.params, needs.free(study), study.params.calibration
    stages = ["calibrate", *(["recover"] if params.recovery.tokens else []), *(["perplexity"] if evaluate else [])]
    by_stage = {stage: needs.requirements(study, stage, sizes, available["memory"]) for stage in stages}
    masks = sizes.linear_weights // 8  # a mask has one bit a weight
    if params.plan.measures_blocks:  # those of each candidate, of blocks at most two
        masks *= MEASURED if params.pattern == SMALLER else 2
    disk = sum(need.disk for need in by_stage.values()) + 2 * sizes.stored + masks
    solver = needs.solver_requirements(study, sizes)
    if solver:
        by_stage["solver"] = solver
    memory, largest = max((need.memory, stage) for stage, need in by_stage.items())
    free_memory, free_disk = (needs.gigabytes(size) for size in available.values())
    return [
        f"Model: {sizes.parameters:,} parameters, {needs.gigabytes(sizes.stored)}.",
        f"Calibration: {calibration.windows} windows of {calibration.length} tokens.",
        f"Memory: about {needs.gigabytes(memory)} ({largest}); free: {free_memory}.",
        f"Disk: at most {needs.gigabytes(disk)}, with the dense and the pruned model; free: {free_disk}.",
    ]
