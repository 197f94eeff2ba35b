"""`wanda-dvc evaluate`: other files of a study's model against its dense model: directories of safetensors, GGUF files.

Each model takes the place of models/pruned in a study that links this study's texts, tasks and dense results, and the
stages `perplexity` and `zero-shot` measure it there.
"""

from collections.abc import Sequence
from pathlib import Path

from wanda_dvc.catalog import STRUCTURES
from wanda_dvc.engine.checkpoint import read_config
from wanda_dvc.engine.windows import load_tokenizer
from wanda_dvc.errors import UserError
from wanda_dvc.reading import read_text
from wanda_dvc.results.compare import DENSE, records, side_by_side
from wanda_dvc.results.experiments import workspace
from wanda_dvc.results.markup import table
from wanda_dvc.results.measures import Results
from wanda_dvc.results.show import notes
from wanda_dvc.sources.models import GGUF, read_model
from wanda_dvc.stages import check_stage_inputs
from wanda_dvc.stages.inputs import model_dtype
from wanda_dvc.stages.perplexity import perplexity
from wanda_dvc.stages.zero_shot import zero_shot
from wanda_dvc.study.artifact import describe, read_provenance, write_provenance
from wanda_dvc.study.files import json_text, load_json, write_json
from wanda_dvc.study.folder import ITEMS, Study
from wanda_dvc.study.protocol import TOKENIZER
from wanda_dvc.study.scaffold import PROMPTS

LINKED = ("plan", "data", "reference", "models/dense", "metrics/dense", "metrics/details/dense")


def evaluate(*, study: Study, paths: Sequence[Path], as_json: bool = False) -> str:
    """Measure models against a study's dense model, on its texts and its tasks, and return a table or JSON.

    UserError if a path is missing or no model, or its architecture, vocabulary or tokenizer is not the dense model's.
    """
    check_stage_inputs(study)
    dense = workspace(study).results[DENSE]
    params = study.params
    if not params.perplexity.texts.keys() <= set(dense.texts) or set(dense.tasks) != set(params.tasks.names):
        raise UserError(
            "metrics/dense: no results of the dense model on all texts and tasks of params.yaml, expected those that "
            "others are compared with; run `dvc repro`"
        )
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: not found; name a model's directory or a GGUF file")
        if (path / "config.json").is_file():
            _check_alike(study, path, path)  # before any model runs
    with study.work({"kind": "evaluate", "paths": [str(path.absolute()) for path in paths]}) as work:
        work.discard()  # of an interrupted run; its finished blocks and answers are elsewhere
        models = {DENSE: dense}
        for place, path in enumerate(paths):
            name = str(path.absolute() if str(path) == DENSE else path)
            models[name] = _measured(study, path, Study(work.path / str(place)))
        found = records(models, base=DENSE)  # read before the work folder goes
        parts = [table(*side_by_side(models, base=DENSE)), *notes({DENSE: params}, models)]
        work.discard()
    if as_json:
        return json_text([{"model": name, "metrics": one.metrics, **found[name]} for name, one in models.items()])
    return "\n\n".join(parts)


def _measured(study: Study, path: Path, own_study: Study) -> Results:
    """Run the stages on a model in a new study. Messages name the user's path."""
    own_study.link_to(study, *LINKED, "params.yaml", PROMPTS)
    try:
        _place(study, path, own_study.model("pruned"))
        for text in study.params.perplexity.texts:
            perplexity(study=own_study, model="pruned", text=text)
        zero_shot(study=own_study, model="pruned")
    except UserError as error:
        place = str(own_study.model("pruned"))
        raise UserError(*(problem.replace(place, str(path)) for problem in error.problems)) from None
    return Results.of(own_study, "pruned")


def _check_alike(study: Study, folder: Path, path: Path) -> None:
    """Raise UserError if a configuration has another architecture or vocabulary than the dense model's."""
    own, dense = (read_config(place) for place in (folder, study.model(DENSE)))
    for what, key in (("architecture", "model_type"), ("vocabulary size", "vocab_size")):
        mine, theirs = (getattr(config.get_text_config(), key, None) for config in (own, dense))
        if mine != theirs:
            raise UserError(f"{path}: {what} {mine}, expected {theirs} as in the dense model; name a variant of it")


def _place(study: Study, path: Path, folder: Path) -> None:
    """Put a model into a study as its pruned one.

    Its tokenizer has to be the dense model's, by the token ids of the study's texts. The dense model's own files then
    replace it, and the names of tokens that end a text.
    """
    dense = study.model(DENSE)
    sha256 = read_model(path, folder)
    _check_alike(study, folder, path)
    changes = dict[str, object]()
    if path.suffix == GGUF:  # transformers reads few settings of such a file: the others are the dense model's
        sizes = {name for row in STRUCTURES.values() for name in (*row.fields, *row.scaled)} | {"tie_word_embeddings"}
        settings = read_config(dense).get_text_config().to_dict().items()
        changes = {name: value for name, value in settings if name not in sizes and not isinstance(value, list)}
    changes["dtype"] = model_dtype(study)  # in which the dense model ran
    write_json(folder / "config.json", load_json(folder / "config.json") | changes)
    own, its = load_tokenizer(folder), load_tokenizer(dense)
    texts = {f"the text {text}": study.text(f"perplexity/{text}") for text in study.params.perplexity.texts}
    for task in study.params.tasks.names:
        texts[f"the task {task}"] = read_text(study.data("tasks") / task / ITEMS, "run `wanda-dvc download tasks`")
    for what, text in texts.items():
        if own(text, verbose=False)["input_ids"] != its(text, verbose=False)["input_ids"]:
            raise UserError(
                f"{path}: its tokenizer gives other token ids for {what}, expected the dense model's, or the two "
                "models' predictions cannot be compared; name a model with the dense model's tokenizer"
            )
    for pattern in (*TOKENIZER, "generation_config.json"):
        for file in folder.glob(pattern):
            file.unlink()
        for file in dense.glob(pattern):
            (folder / file.name).symlink_to(file.resolve())
    found = read_provenance(dense, "download model")
    compared = {"source": found["source"], "sha256": found["sha256"]}
    write_provenance(folder, describe("evaluate", model=compared, sha256=sha256))
