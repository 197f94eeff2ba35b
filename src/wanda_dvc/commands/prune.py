"""`wanda-dvc prune`: a model becomes a pruned model, by the stages of a study in the user's cache folder.

A model and its calibration text have one study. Its statistics serve each further recipe, sparsity and pattern.
"""

import math
import shlex
from dataclasses import dataclass
from pathlib import Path

from wanda_dvc.commands import check_target, reproduce
from wanda_dvc.commands.export import move_model
from wanda_dvc.commands.request import PruneRequest
from wanda_dvc.engine.checkpoint import max_positions, read_config
from wanda_dvc.engine.memory import ModelSizes
from wanda_dvc.params import Params, Settings, nested
from wanda_dvc.plan import TOKENS_A_FEATURE
from wanda_dvc.results.compare import DENSE, headings
from wanda_dvc.results.experiments import Experiment, workspace
from wanda_dvc.results.markup import table
from wanda_dvc.results.measures import MEASURES, figures
from wanda_dvc.results.show import settings_line, table_notes
from wanda_dvc.stages.download import find_model_config
from wanda_dvc.stages.needs import check_solver, choose_training
from wanda_dvc.study.artifact import locked
from wanda_dvc.study.files import Json
from wanda_dvc.study.folder import Study
from wanda_dvc.study.scaffold import renew


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
        if config is None:  # of a package before its download
            renew(study.root, nested(request.settings))
            reproduce(study.root, "download", "model", shown=shown)
            config = study.model("dense")
        sizes = ModelSizes.read(config)
        check_solver(study, sizes)
        if request.params.recovery.tokens:
            choose_training(study, sizes)  # UserError if the memory is too small
        renew(study.root, nested(settings_for_model(request, config, sizes)))
        last_stage = "recover" if request.params.recovery.tokens else "apply"
        reproduce(study.root, "perplexity" if request.evaluate else last_stage, shown=shown)
        experiment = workspace(Study(request.root))
        models, model = experiment.models, list(experiment.models)[-1]
        sentences = table_notes({experiment.name: experiment.params}, models)
        paragraphs = [  # of files that move now
            _summary(experiment, sizes.parameters, ModelSizes.read(study.model(model)).parameters),
            settings_line(experiment, named=False),
            _table(experiment),
            *(sentence for sentence in sentences if sentence.startswith("Perplexity on")),
            *(experiment.notes if request.evaluate else ()),
        ]
        move_model(experiment, request.target)
    root = request.root
    paragraphs.append(f"{request.target}: the {model} model, with a model card.")
    paragraphs.append(f"The study: {root}. `wanda-dvc init my-study --from {shlex.quote(str(root))}` begins your own.")
    results = {name: figures(measured) for name, measured in models.items()}
    return PrunedModel(request.target, root, results, "\n\n".join(paragraphs))


def settings_for_model(request: PruneRequest, config: Path, sizes: ModelSizes) -> Settings:
    """Return a request's settings, with windows that fit a model, and enough of them for its widest linear.

    Settings that the request names stay.
    """
    params: Params = request.params
    length = params.calibration.length
    longest = max_positions(read_config(config)) or length
    if "calibration.length" not in request.settings:
        length = min(longest, length)
    tokens = TOKENS_A_FEATURE * sizes.widest
    fitting = {
        "calibration.length": length,
        "perplexity.length": min(longest, params.perplexity.length),
        "calibration.windows": max(params.calibration.windows, math.ceil(tokens / length)),
    }
    return fitting | request.settings


def _summary(experiment: Experiment, dense: int, final: int) -> str:
    """Return a sentence on the model's size, from both numbers of parameters, and on what the pruning costs."""
    parts = [f"Parameters: {dense / 1e6:,.1f} M → {final / 1e6:,.1f} M (−{100 * (1 - final / dense):.1f} %)"]
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
