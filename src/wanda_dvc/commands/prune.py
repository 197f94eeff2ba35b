"""`wanda-dvc prune`: a model becomes a pruned model, by the stages of a study in the user's cache folder.

A model and a calibration text have one study. Its statistics serve each further recipe, sparsity and pattern.
"""

import math
import shlex

from wanda_dvc.commands import check_target, reproduce
from wanda_dvc.commands.export import move_model
from wanda_dvc.commands.request import FALLBACK, PruneRequest
from wanda_dvc.engine.checkpoint import max_positions, read_config
from wanda_dvc.engine.memory import ModelSizes
from wanda_dvc.errors import notice
from wanda_dvc.params import Params, Settings, nested
from wanda_dvc.plan import TOKENS_A_FEATURE
from wanda_dvc.results.compare import headings
from wanda_dvc.results.experiments import Experiment, workspace
from wanda_dvc.results.markup import table
from wanda_dvc.results.show import notes, title
from wanda_dvc.stages.needs import choose_training, lacking_for_solver
from wanda_dvc.study.artifact import locked
from wanda_dvc.study.folder import Study
from wanda_dvc.study.scaffold import renew

RECOMMENDED = {"neurons": "wanda-refit", "heads": "wanda-refit", "blocks": "wanda-refit", "experts": FALLBACK}
RECOMMENDED_FOR_ZEROS = "fisher"  # for other patterns; docs/methods.md has the comparison


def prune_model(request: PruneRequest) -> str:
    """Run the stages of a request's study and move the model to its target. Return the results in a text."""
    with locked(request.root, f"waiting for another `wanda-dvc prune` of this model, in {request.root} …"):
        study = Study(request.root)
        check_target(study, request.target)  # another command may have written it meanwhile
        (study.root / ".dvc/tmp/rwlock").unlink(missing_ok=True)  # of a stopped run; DVC would warn of it
        renew(study.root, nested(request.settings))
        reproduce(study.root, "download", "model", shown=True)
        sizes = ModelSizes.read(study.model("dense"))
        settings = request.settings | _sizes_for_model(study, request.params, sizes)
        if request.params.recovery.tokens:
            choose_training(study.with_params(request.params), sizes)  # UserError if the memory is too small
        if request.recipe is None:
            settings["recipe"] = _recommended_recipe(study, settings["pattern"], sizes)
        renew(study.root, nested(settings))
        last_stage = "recover" if request.params.recovery.tokens else "apply"
        reproduce(study.root, "perplexity" if request.evaluate else last_stage, shown=True)
        experiment = workspace(Study(request.root))
        paragraphs = _paragraphs(experiment, evaluate=request.evaluate)  # of files that move now
        move_model(experiment, request.target)
    model, root = list(experiment.models)[-1], request.root
    paragraphs.append(f"{request.target}: the {model} model, with a model card.")
    paragraphs.append(f"The study: {root}. `wanda-dvc init my-study --from {shlex.quote(str(root))}` begins your own.")
    return "\n\n".join(paragraphs)


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


def _paragraphs(experiment: Experiment, *, evaluate: bool) -> list[str]:
    """Return the settings of an experiment, its results in a table, and what a reader of the table has to know."""
    models = experiment.models
    measures = headings(list(models.values())) if evaluate else {}
    rows = []
    for heading, (measure, target) in measures.items():
        rows.append([heading, *(measure.text(results, target) for results in models.values())])
    folders = [experiment.study.model(name) for name in models]
    sizes = [sum(path.stat().st_size for path in folder.iterdir()) for folder in folders]
    rows.append(["size, MB", *(f"{size / 1e6:,.1f}" for size in sizes)])
    paragraphs = [title(experiment, named=False), table(["", *models], rows)]
    if evaluate:  # else earlier results may be of another model
        sentences = notes({experiment.name: experiment.params}, models)
        paragraphs += [sentence for sentence in sentences if sentence.startswith("Perplexity on")]
        paragraphs += experiment.notes
    return paragraphs
