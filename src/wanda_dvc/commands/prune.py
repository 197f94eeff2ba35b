"""`wanda-dvc prune`: a model becomes a pruned model, by the stages of a study in the user's cache folder.

A model and a calibration text have one study. Its statistics serve each further recipe, sparsity and pattern.
"""

import math
import os
import shlex
from pathlib import Path

from wanda_dvc.commands import check_target, reproduce
from wanda_dvc.commands.export import move_model
from wanda_dvc.commands.request import FALLBACK, PruneRequest
from wanda_dvc.engine.checkpoint import max_positions, read_config
from wanda_dvc.engine.memory import ModelSizes
from wanda_dvc.errors import notice
from wanda_dvc.params import Params, Settings, nested
from wanda_dvc.plan import TOKENS_A_FEATURE
from wanda_dvc.results.compare import cells, headings
from wanda_dvc.results.experiments import Experiment, workspace
from wanda_dvc.results.markup import table
from wanda_dvc.results.show import notes, title
from wanda_dvc.stages.needs import gigabytes, lacking_for_solver, needs_checkpointing
from wanda_dvc.study.artifact import locked
from wanda_dvc.study.files import json_text
from wanda_dvc.study.folder import Study
from wanda_dvc.study.scaffold import renew

RECOMMENDED = {"neurons": "wanda-refit", "heads": "wanda-refit", "blocks": "wanda-refit", "experts": FALLBACK}
RECOMMENDED_FOR_ZEROS = "fisher"  # for other patterns; docs/methods.md has the comparison
GENERATE = 'from transformers import pipeline; print(pipeline("text-generation", {})("Once upon a time"))'


def prune_model(request: PruneRequest) -> str:
    """Run the stages of a request's study and move the model to its target. Return the results and the next commands.

    UserError, before the calibration, if the memory is too small for a recovery.
    """
    with locked(request.root, f"waiting for another `wanda-dvc prune` of this model, in {request.root} …"):
        study = Study(request.root)
        check_target(study, request.target)  # another command may have written it meanwhile
        (study.root / ".dvc/tmp/rwlock").unlink(missing_ok=True)  # of a stopped run; DVC would warn of it
        renew(study.root, nested(request.settings))
        reproduce(study.root, "download", "model", shown=True)
        sizes = ModelSizes.read(study.model("dense"))
        settings = request.settings | _sizes_for_model(study, request.params, sizes)
        if request.params.recovery.tokens:
            needs_checkpointing(study.with_params(request.params), sizes)  # UserError if the memory is too small
        if request.recipe is None:
            settings["recipe"] = _recommended_recipe(study, settings["pattern"], sizes)
        renew(study.root, nested(settings))
        last_stage = "recover" if request.params.recovery.tokens else "apply"
        reproduce(study.root, "perplexity" if request.evaluate else last_stage, shown=True)
        experiment = workspace(Study(request.root))
        summary = _paragraphs(experiment, request)  # of files that move now
        move_model(experiment, request.target)
        recovered = ", the recovered model" if "recovered" in experiment.models else ""
        size = gigabytes(_bytes_on_disk(study.root))
        kept = f"{size}: the dense model, its statistics, the masks{recovered}; `dvc repro` writes models/pruned again"
        return "\n\n".join([*summary, f"The study: {study.root} ({kept})"])


def _sizes_for_model(study: Study, params: Params, sizes: ModelSizes) -> Settings:
    length = params.calibration.length
    longest = max_positions(read_config(study.model("dense"))) or length
    length = min(longest, length)
    tokens = TOKENS_A_FEATURE * sizes.widest
    return {
        "calibration.length": length,
        "perplexity.length": min(longest, params.perplexity.length),
        "calibration.windows": max(params.calibration.windows, math.ceil(tokens / length)),
    }


def _recommended_recipe(study: Study, pattern: str, sizes: ModelSizes) -> str:
    """Return the recommended recipe of a pattern, or the fallback if memory or disk is too small for a solver."""
    recipe = RECOMMENDED.get(pattern, RECOMMENDED_FOR_ZEROS)
    lacking = lacking_for_solver(study, sizes) if recipe != FALLBACK else []
    if lacking:
        notice(f"recipe: {FALLBACK}; the recommended {recipe} needs {' and '.join(lacking)}")
        return FALLBACK
    notice(f"recipe: {recipe}, recommended for pattern {pattern}; `--recipe` sets another")
    return recipe


# --- what it prints ---


def _paragraphs(experiment: Experiment, request: PruneRequest) -> list[str]:
    models = experiment.models
    measures = headings(list(models.values())) if request.evaluate else {}
    values = {name: cells(results, measures) for name, results in models.items()}
    rows = [[heading, *(values[name][index] for name in models)] for index, heading in enumerate(measures)]
    folders = [experiment.study.model(name) for name in models]
    sizes = [sum(path.stat().st_size for path in folder.iterdir()) for folder in folders]
    rows.append(["size, MB", *(f"{size / 1e6:,.1f}" for size in sizes)])
    paragraphs = [title(experiment, named=False), table(["", *models], rows)]
    if request.evaluate:  # else earlier results may be of another model
        sentences = notes({experiment.name: experiment.params}, models)
        paragraphs += [sentence for sentence in sentences if sentence.startswith("Perplexity on")]
        paragraphs += experiment.notes
    generate = GENERATE.format(json_text(os.path.relpath(request.target)))
    paragraphs.append(
        f"{request.target}: the {list(models)[-1]} model, with a model card. Next:\n\n"
        f"  python -c {shlex.quote(generate)}   # generate text\n"
        f"  wanda-dvc init my-study --from {shlex.quote(str(request.root))}   # a study of your own, to compare several"
    )
    paragraphs.append("The same command with another DIR and `--sparsity` or `--pattern` reuses the statistics.")
    return paragraphs


def _bytes_on_disk(folder: Path) -> int:
    sizes = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        sizes[status.st_dev, status.st_ino] = 512 * status.st_blocks
    return sum(sizes.values())
