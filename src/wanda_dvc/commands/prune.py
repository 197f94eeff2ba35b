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
        renew(study.root, nested(request.settings))
        config = find_model_config(study)
        if config:
            _check_that_it_fits(study, ModelSizes.read(config))
        reproduce(study.root, "download", "model", shown=shown)
        sizes = ModelSizes.read(study.model("dense"))
        if not config:
            _check_that_it_fits(study, sizes)
        renew(study.root, nested(settings_for_model(request, study.model("dense"), sizes)))
        last_stage = "recover" if request.params.recovery.tokens else "apply"
        reproduce(study.root, "perplexity" if request.evaluate else last_stage, shown=shown)
        experiment = workspace(Study(request.root))
        models = experiment.models if request.evaluate else {}  # else earlier results may be of another model
        results = {name: figures(measured) for name, measured in models.items()}
        model = list(experiment.models)[-1]
        pruned_sizes = ModelSizes.read(study.model(model))
        paragraphs = [
            _summary(experiment, sizes.parameters, pruned_sizes.parameters, evaluate=request.evaluate),
            *_paragraphs(experiment, evaluate=request.evaluate),
        ]  # of files that move now
        move_model(experiment, request.target)
    root = request.root
    paragraphs.append(f"{request.target}: the {model} model, with a model card.")
    paragraphs.append(f"The study: {root}. `wanda-dvc init my-study --from {shlex.quote(str(root))}` begins your own.")
    return PrunedModel(request.target, root, results, "\n\n".join(paragraphs))


def _check_that_it_fits(study: Study, sizes: ModelSizes) -> None:
    check_solver(study, sizes)
    if study.params.recovery.tokens:
        choose_training(study, sizes)  # UserError if the memory is too small


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


def _summary(experiment: Experiment, dense: int, final: int, *, evaluate: bool) -> str:
    """Return a sentence on the model's size, from both numbers of parameters, and on what the pruning costs."""
    parts = [f"Parameters: {_readable(dense)} → {_readable(final)} ({_in_percent(final / dense - 1)})"]
    if dense == final:
        zeros = experiment.final.metrics["sparsity"]["sparsity"]
        parts = [f"Size unchanged: {_in_percent(zeros)} of the linears' weights are zeros"]
    measures = {measure.name: measure for measure in MEASURES}
    perplexity, divergence = measures["perplexity"], measures["divergence"]
    for text in experiment.final.texts if evaluate else ():
        values = [
            perplexity.formatted(results, text, interval=False)
            for results in (experiment.results[DENSE], experiment.final)
        ]
        parts.append(f"perplexity on {text}: {' → '.join(values)}")
        parts.append(f"divergence {divergence.formatted(experiment.final, text, interval=False)} nats")
    return f"{'; '.join(parts)}."


def _readable(count: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:,}"


def _in_percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %".replace("-", "−")


def _paragraphs(experiment: Experiment, *, evaluate: bool) -> list[str]:
    """Return the settings of an experiment, its results in a table, and what a reader of the table has to know."""
    models = experiment.models
    measures = headings(list(models.values())) if evaluate else {}
    rows = []
    for heading, (measure, target) in measures.items():
        rows.append([heading, *(measure.formatted(results, target) for results in models.values())])
    folders = [experiment.study.model(name) for name in models]
    sizes = [sum(path.stat().st_size for path in folder.iterdir()) for folder in folders]
    rows.append(["size, MB", *(f"{size / 1e6:,.1f}" for size in sizes)])
    paragraphs = [settings_line(experiment, named=False), table(["", *models], rows)]
    if evaluate:  # else earlier results may be of another model
        sentences = table_notes({experiment.name: experiment.params}, models)
        paragraphs += [sentence for sentence in sentences if sentence.startswith("Perplexity on")]
        paragraphs += experiment.notes
    return paragraphs
