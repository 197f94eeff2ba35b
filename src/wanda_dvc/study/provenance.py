"""The provenance of an artifact: its inputs with their hashes, its parameters, and the library versions.

No provenance depends on time, host or path.
"""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from wanda_dvc import __version__
from wanda_dvc.errors import UserError
from wanda_dvc.reading import expect_object, is_there, name_of, parse_json, read_bytes
from wanda_dvc.study.files import Json, write_json

FORMAT = 1
PROVENANCE = "provenance.json"
MADE_BY = {"dense": "download model", "pruned": "apply"}  # the command behind each model
TOKENIZER = ("tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json")  # its files

# The keys of a provenance used by readers, by the command that makes the artifact.
_TEXT, _MEASURED = ("source", "sha256"), ("model.source", "model.sha256", "params")
KEYS = {
    "download model": ("source", "sha256"),
    "download calibration": _TEXT,
    "download perplexity": (*_TEXT, "join"),
    "download tasks": ("task", "source", "role", "sha256", "lm_eval", "definition"),
    "calibrate": (*_MEASURED, "text.source", "text.sha256", "params.dtype"),
    "mask": (*_MEASURED, "calibration.text.source", "params.method", "params.pattern"),
    "apply": (*_MEASURED, "masks"),
    "perplexity dense": ("dense", "tokens_sha256", "dtype"),
}
# The kinds of artifact that a folder may hold, by its name; `stats --compare` reads folders with other names.
KINDS: dict[str, tuple[Any, ...]] = {
    "dense": ("model",),
    "pruned": ("model", "evaluated"),
    "calibration": ("text", "documents"),
    "norms": ("stats",),
    **{name: (name,) for name in ("gram", "gradients", "masks", "weights")},
}
# By the command that makes it, for folders named by the user or by a task.
KINDS_BY_COMMAND = {"download perplexity": ("text",), "download tasks": ("task",), "perplexity dense": ("reference",)}


def digest(content: object) -> str:
    """Return the SHA-256 of a JSON value in canonical form."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_digest(path: Path, expected: str | None, made_by: str) -> None:
    """Raise UserError if a file's SHA-256 is not the one in its artifact's provenance."""
    if (found := file_digest(path)) != expected:
        raise UserError(
            f"{path}: not the file that its provenance names (sha256 {found[:12]}…, expected {str(expected)[:12]}…); "
            f"run `wanda-dvc {made_by}` again"
        )


def describe(kind: str, *, libraries: tuple[str, ...] = (), **content: object) -> Json:
    """Return a provenance: the kind of artifact, its inputs, and the versions of the libraries that computed it."""
    versions = {name: version(name) for name in libraries}
    return {"format": FORMAT, "kind": kind, "wanda_dvc": __version__, "libraries": versions, **content}


def read_provenance(artifact: Path, made_by: str) -> Json:
    """Read the provenance of an artifact. UserError if it is missing, of another format, or lacks required keys."""
    content = read_format(artifact, made_by)
    check_keys(content, made_by, str(artifact / PROVENANCE), f"run `wanda-dvc {made_by}` again")
    return content


def read_format(artifact: Path, made_by: str) -> Json:
    """Read a provenance of this format, with any keys."""
    path, todo = artifact / PROVENANCE, f"run `wanda-dvc {made_by}` again"
    if not is_there(path):
        raise UserError(f"{path}: missing; run `dvc repro` or `wanda-dvc {made_by}` first")
    where = str(path)
    content = expect_object(parse_json(read_bytes(path, todo), where, todo), where, todo)
    if content.get("format") != FORMAT:
        raise UserError(f"{where}: format {content.get('format')}, expected {FORMAT}; {todo}")
    kinds = KINDS_BY_COMMAND.get(made_by) or KINDS.get(artifact.name, (content.get("kind"),))
    if not isinstance(content.get("kind"), str) or content["kind"] not in kinds:
        found = content.get("kind") or "nothing"
        raise UserError(f"{where}: kind: found {found}, expected {' or '.join(map(str, kinds))}; {todo}")
    return content


def check_keys(content: Json, made_by: str, where: str, todo: str) -> None:
    """Raise UserError if a required key of a provenance is missing or has another type."""
    for key in KEYS.get(made_by, ()):
        found: Any = content
        for word in key.split("."):
            found = found.get(word) if isinstance(found, dict) else None
        if not isinstance(found, dict if key == "params" else str):
            got = "nothing" if found is None else name_of(found)
            raise UserError(
                f"{where}: {key}: found {got}, expected {'an object' if key == 'params' else 'text'}; {todo}"
            )


def write_provenance(artifact: Path, content: Json) -> None:
    """Write an artifact's provenance."""
    write_json(artifact / PROVENANCE, content)


def without_files(model: str, content: Json) -> Json:
    """Return a model's provenance as results name it: without the digests of the pruned one's files."""
    return content if model == "dense" else {name: value for name, value in content.items() if name != "files"}


def measured_alike(one: Json | None, other: Json | None) -> bool:
    """Whether two protocols of a perplexity have the same windows, or two of a task the same items and prompts."""
    if one is None or other is None:
        return False
    prompts = {version for x in (one, other) if (version := x.get("libraries", {}).get("lm_eval"))}
    keys = ("tokens_sha256", "windows", "length", "rest", "examples", "limit")
    same_task = one.get("task", {}).get("sha256") == other.get("task", {}).get("sha256")
    return same_task and len(prompts) < 2 and all(one.get(key) == other.get(key) for key in keys)


def files_digest(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below a folder but its provenance, by relative path."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != PROVENANCE)
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in paths}


def tokenizer_digest(model: Path) -> str:
    """Return one SHA-256 of the files of a model's tokenizer."""
    files = sorted({path for pattern in TOKENIZER for path in model.glob(pattern)})
    return digest({path.name: file_digest(path) for path in files})
