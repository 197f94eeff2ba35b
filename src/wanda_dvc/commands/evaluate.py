"""`wanda-dvc evaluate`: other files of a study's model against its dense model: directories of safetensors, GGUF files.

Each model gets a study of its own, with links to this study's texts, tasks and dense results, in which it is the pruned
model: models/pruned. The stages `perplexity` and `zero-shot` measure it there, as they measure any pruned model.
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
from wanda_dvc.results.show import table_notes
from wanda_dvc.sources.models import GGUF, read_model
from wanda_dvc.stages import check_stage_inputs
from wanda_dvc.stages.inputs import model_dtype
from wanda_dvc.stages.perplexity import perplexity
from wanda_dvc.stages.zero_shot import zero_shot
from wanda_dvc.study.artifact import describe, read_provenance, write_provenance
from wanda_dvc.study.files import json_text, load_json, write_json
from wanda_dvc.study.folder import ITEMS, Study
from wanda_dvc.study.protocol import TOKENIZER

# What the stages read of this study.
LINKED = ("plan", "data", "reference", "models/dense", "metrics/dense", "metrics/details/dense", "params.yaml")


def evaluate(*, study: Study, paths: Sequence[Path], as_json: bool = False) -> str:
    """Measure models against a study's dense model, on its texts and its tasks, and return a table or JSON.

    A study of `prune` has no tasks.
    """
    check_stage_inputs(study)
    dense = workspace(study).results[DENSE]
    texts = study.params.perplexity.texts
    tasks = study.params.tasks.names if study.data("tasks").is_dir() else []
    if not texts.keys() <= set(dense.texts) or set(dense.tasks) != set(tasks):
        raise UserError("metrics/dense: no results of the dense model on all texts and tasks; run `dvc repro`")
    with study.work({"kind": "evaluate", "paths": [str(path.absolute()) for path in paths]}) as work:
        work.discard()  # of an interrupted run; its finished blocks are elsewhere
        models = {DENSE: dense}
        for number, path in enumerate(paths):
            name = str(path.absolute() if str(path) == DENSE else path)  # the dense model has that name
            measured = Study(work.path / str(number))  # its pruned model is the model to measure
            measured.link_to(study, *LINKED)
            folder = measured.model("pruned")
            try:
                _write_variant(study, path, folder, tasks)
                for text in texts:
                    perplexity(study=measured, model="pruned", text=text)
                if tasks:
                    zero_shot(study=measured, model="pruned")
            except UserError as error:  # about the user's path
                raise UserError(*(problem.replace(str(folder), str(path)) for problem in error.problems)) from None
            models[name] = Results.of(measured, "pruned")
        compared = records(models, base=DENSE)  # read before the work folder is removed
        paragraphs = [table(*side_by_side(models, base=DENSE)), *table_notes({DENSE: study.params}, models)]
        work.discard()
    if not as_json:
        return "\n\n".join(paragraphs)
    return json_text([{"model": name, "metrics": models[name].metrics, **compared[name]} for name in models])


def _write_variant(study: Study, path: Path, folder: Path, tasks: Sequence[str]) -> None:
    dense = study.model(DENSE)
    sha256 = read_model(path, folder)
    config, dense_config = (read_config(model).get_text_config() for model in (folder, dense))
    for what, key in (("architecture", "model_type"), ("vocabulary size", "vocab_size")):
        value, expected = getattr(config, key, None), getattr(dense_config, key, None)
        if value != expected:
            raise UserError(f"{path}: {what} {value}, expected {expected} as in the dense model; name a variant of it")
    changes: dict[str, object] = {}
    if path.suffix == GGUF:  # of which transformers reads few settings: the others are the dense model's, but sizes
        sizes = {"tie_word_embeddings"}
        for structure in STRUCTURES.values():
            sizes.update(structure.fields, structure.scaled)
        settings = dense_config.to_dict().items()
        changes = {name: value for name, value in settings if name not in sizes and not isinstance(value, list)}
    changes["dtype"] = model_dtype(study)  # in which the dense model ran
    write_json(folder / "config.json", load_json(folder / "config.json") | changes)
    _check_tokenizer(study, folder, path, tasks)
    for pattern in (*TOKENIZER, "generation_config.json"):  # its own may name other tokens that end a text
        for file in folder.glob(pattern):
            file.unlink()
        for file in dense.glob(pattern):
            (folder / file.name).symlink_to(file.resolve())
    provenance = read_provenance(dense, "download model")
    compared = {"source": provenance["source"], "sha256": provenance["sha256"]}
    # As `apply` would: the stages measure no model without a provenance.
    write_provenance(folder, describe("apply", model=compared, sha256=sha256))


def _check_tokenizer(study: Study, folder: Path, path: Path, tasks: Sequence[str]) -> None:
    """Raise UserError if a tokenizer gives other token ids than the dense model's for a text or one of some tasks."""
    texts = {f"the text {name}": study.text(f"perplexity/{name}") for name in study.params.perplexity.texts}
    for task in tasks:
        texts[f"the task {task}"] = read_text(study.data("tasks") / task / ITEMS, "run `wanda-dvc download tasks`")
    tokenizer, dense_tokenizer = load_tokenizer(folder), load_tokenizer(study.model(DENSE))
    for what, text in texts.items():
        if tokenizer(text, verbose=False)["input_ids"] != dense_tokenizer(text, verbose=False)["input_ids"]:
            raise UserError(f"{path}: gives other token ids for {what}, expected the dense model's; use its tokenizer")
