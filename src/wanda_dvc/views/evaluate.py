"""Other files of a study's model against its dense model: directories of safetensors, GGUF files.

Each model takes the place of models/pruned in a copy of the study that consists of links, and the stages `perplexity`
and `zero-shot` measure it there.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from wanda_dvc.engine.flips import Flips, total_flips
from wanda_dvc.errors import UserError
from wanda_dvc.reading import DIVERGED
from wanda_dvc.report.measures import Measured
from wanda_dvc.sources.models import GGUF
from wanda_dvc.stages.perplexity import perplexity
from wanda_dvc.stages.zero_shot import zero_shot
from wanda_dvc.study.files import Json, json_text, load_json, write_json
from wanda_dvc.study.markup import decimal, on_text, table
from wanda_dvc.study.project import ITEMS, Project
from wanda_dvc.study.protocol import comparable
from wanda_dvc.study.provenance import (
    PROVENANCE,
    TOKENIZER,
    describe,
    digest,
    read_provenance,
    write_provenance,
)
from wanda_dvc.study.scaffold import PROMPTS
from wanda_dvc.views.experiments import mean

ON_TEXT = ("perplexity", "divergence, nats", "agreement, %")
FLIPS = ("changed answers, %", "right → wrong", "wrong → right", "wrong → wrong")
LINKED = ("data", "reference", "models/dense", "metrics/dense", "metrics/details/dense")


@dataclass(frozen=True)
class Evaluated:
    """The results of one model."""

    name: str
    size: int  # bytes on disk
    texts: dict[str, Measured]  # the accuracies are the same in each
    flips: dict[str, Flips]  # by task

    @property
    def measured(self) -> Measured:
        """The results on the first text."""
        return next(iter(self.texts.values()))


def evaluate(*, project: Project, paths: Sequence[Path], as_json: bool = False) -> str:
    """Measure models against a study's dense model, on its texts and its tasks, and return a table or JSON.

    Raises:
        UserError: a path is missing or no model, or its architecture, vocabulary or tokenizer is not the dense model's.
    """
    dense = read_provenance(project.model("dense"), "download model")
    for path in paths:
        _check(project, path)
    tasks, measured = project.params.tasks.names, Measured.of(project, "dense")
    for text in project.params.perplexity.texts:
        read_provenance(project.reference(text), "perplexity dense")
    if missing := [task for task in tasks if task not in measured.tasks]:
        raise UserError(
            f"zero-shot: no answers of the dense model to {', '.join(missing)}, expected the answers that "
            "others are compared with; run `dvc repro` or `wanda-dvc zero-shot dense`"
        )
    _check_answers(project, measured, tasks, dense)
    found = [Evaluated("dense", _size(project.model("dense")), _on_texts(project, "dense"), {})]
    for path in paths:
        with project.work({"kind": "evaluate", "path": str(path.absolute())}) as work:
            work.forget()  # of an interrupted run; its finished blocks and answers are elsewhere
            study = Project(work.path / "study")
            study.link_to(project, LINKED, ("params.yaml", PROMPTS))
            _place(project, path, study.model("pruned"), dense)
            for text in project.params.perplexity.texts:
                perplexity(project=study, model="pruned", text=text)
            zero_shot(project=study, model="pruned")
            own = _on_texts(study, "pruned")
            _check_items(measured, next(iter(own.values())), tasks)
            flips = {task: one for task in tasks if (one := next(iter(own.values())).flips(measured, task))}
            found.append(Evaluated(str(path), _size(path), own, flips))
            work.forget()
    if as_json:
        return json_text([_record(one, tasks, found[0]) for one in found])
    texts = list(project.params.perplexity.texts)
    of_texts = [what + (f", {text}" if len(texts) > 1 else "") for text in texts for what in ON_TEXT]
    return table(["model", "size, MB", *of_texts, "mean acc, %", *FLIPS], list(_rows(found, tasks)))


def _on_texts(study: Project, model: str) -> dict[str, Measured]:
    """Return the results of a study's model on each text."""
    return {text: Measured.of(study, model, text) for text in study.params.perplexity.texts}


# --- models ---


def _check(project: Project, path: Path) -> None:
    """Raise UserError for a missing path or another architecture, before any model runs."""
    if not path.exists():
        raise UserError(f"{path}: missing, expected a model's directory or a GGUF file; name one")
    if (path / "config.json").is_file():
        _check_alike(project, path, path)


def _check_alike(project: Project, folder: Path, path: Path) -> None:
    """Raise UserError if a configuration has another architecture or vocabulary than the dense model's."""
    from wanda_dvc.engine.config import read_config

    own, dense = (read_config(place) for place in (folder, project.model("dense")))
    for what, key in (("architecture", "model_type"), ("vocabulary size", "vocab_size")):
        mine, theirs = (getattr(config.get_text_config(), key, None) for config in (own, dense))
        if mine != theirs:
            raise UserError(f"{path}: {what} {mine}, expected {theirs} as in the dense model; name a variant of it")


def _check_answers(project: Project, measured: Measured, tasks: list[str], dense: Json) -> None:
    """Raise UserError if the dense model's answers are another model's, or in another dtype."""
    expected = {"model": digest(dense), "dtype": project.params.dtype}
    for task in tasks:
        for key, value in expected.items():
            if measured.tasks[task]["protocol"].get(key, value) != value:
                raise UserError(
                    f"zero-shot: {task}: answers of another {key}, expected the current dense model's in "
                    f"{expected['dtype']}; run `dvc repro` or `wanda-dvc zero-shot dense`"
                )


def _check_items(dense: Measured, own: Measured, tasks: list[str]) -> None:
    """Raise UserError if the dense model answered other items: their accuracies cannot be compared."""
    for task in tasks:
        protocols = [one.tasks[task]["protocol"] for one in (dense, own)]
        if not comparable(*protocols):
            raise UserError(
                f"zero-shot: {task}: the dense model answered other items, expected those of params.yaml; "
                "run `dvc repro`"
            )


def _place(project: Project, path: Path, folder: Path, dense: Json) -> None:
    """Put a model into a study as its pruned one.

    Its tokenizer has to be the dense model's, by the token ids of the study's texts. The dense model's own files then
    replace it, and the names of tokens that end a text.
    """
    from wanda_dvc.engine.windows import load_tokenizer
    from wanda_dvc.sources.models import read_model

    sha256 = read_model(path, folder)
    if path.suffix == GGUF:
        _take_rope(project, folder)
    _check_alike(project, folder, path)
    own, its = load_tokenizer(folder), load_tokenizer(project.model("dense"))
    for what, text in _texts(project):
        if own(text, verbose=False)["input_ids"] != its(text, verbose=False)["input_ids"]:
            raise UserError(
                f"{path}: its tokenizer gives other token ids for {what}, expected the dense model's, or the two "
                "models' predictions cannot be compared; name a model with the dense model's tokenizer"
            )
    for pattern in (*TOKENIZER, "generation_config.json"):
        for file in folder.glob(pattern):
            file.unlink()
        for file in project.model("dense").glob(pattern):
            (folder / file.name).symlink_to(file.resolve())
    made_from = {"source": dense["source"], "sha256": dense["sha256"]}
    write_provenance(folder, describe("apply", model=made_from, params={}, masks="", evaluated=sha256))


def _take_rope(project: Project, folder: Path) -> None:
    """Take the dense model's scaling of rotary positions, which transformers does not read from a GGUF file."""
    own, dense = (load_json(place / "config.json") for place in (folder, project.model("dense")))
    if (rope := dense.get("rope_parameters")) and own.get("rope_parameters") != rope:
        write_json(folder / "config.json", own | {"rope_parameters": rope})


def _texts(project: Project) -> Iterator[tuple[str, str]]:
    """Yield the texts of a study's evaluation with their names."""
    for text in project.params.perplexity.texts:
        yield f"the text {text}", project.text(f"perplexity/{text}")
    for task in project.params.tasks.names:
        yield f"the task {task}", (project.data("tasks") / task / ITEMS).read_text(encoding="utf-8")


def _size(path: Path) -> int:
    """Return the bytes of a file, or of the files in a directory without their provenance."""
    files = [path] if path.is_file() else [file for file in path.iterdir() if file.name != PROVENANCE]
    return sum(file.stat().st_size for file in files if file.is_file())


# --- results ---


def _rows(found: list[Evaluated], tasks: list[str]) -> Iterator[list[str]]:
    """Yield a row of the table for each model."""
    for one in found:
        accuracy = _accuracy(one, tasks)
        changed = total_flips(list(one.flips.values()))
        yield [
            one.name,
            f"{one.size / 1e6:.1f}",
            *(cell for measured in one.texts.values() for cell in _on_text(measured)),
            decimal(accuracy, "{:.1f}", 100),
            *([f"{100 * changed.share:.1f}", *map(str, changed[1:4])] if changed else ["–"] * 4),
        ]


def _accuracy(one: Evaluated, tasks: list[str]) -> float | str | None:
    """Return the mean accuracy over tasks; `diverged` if the model is not finite, None without tasks."""
    diverged = any("not_finite" in one.measured.tasks.get(task, {}) for task in tasks)
    return DIVERGED if diverged else one.measured.mean(tasks)


def _on_text(measured: Measured) -> list[str]:
    """Return the cells of a text, under `ON_TEXT`."""
    divergence, agreement = (measured.divergence.get(name) for name in ("divergence", "top1_agreement"))
    return on_text(measured.perplexity, mean(divergence), mean(agreement))


def _record(one: Evaluated, tasks: list[str], dense: Evaluated) -> Json:
    """Return a model's results as JSON."""
    return {
        "model": one.name,
        "bytes": one.size,
        "texts": {text: {"perplexity": of.perplexity, **of.divergence} for text, of in one.texts.items()},
        "accuracy": _accuracy(one, tasks),
        "accuracies": one.measured.accuracies,
        "flips": {task: flips._asdict() for task, flips in one.flips.items()},
        "continuations": [pair._asdict() for pair in one.measured.continued(dense.measured)]
        if one is not dense
        else [],
    }
