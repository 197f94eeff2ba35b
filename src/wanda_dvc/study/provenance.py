"""The provenance of an artifact: the command that made it, its inputs by digest, parameters and library versions.

No provenance depends on time, host or path. Each names the digests of its inputs' provenance, so a stage can refuse
inputs that do not belong together. Two results may be compared if their protocols say so.
"""

import hashlib
import json
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

from wanda_dvc import __version__
from wanda_dvc.errors import UserError
from wanda_dvc.reading import is_there, read_object
from wanda_dvc.study.files import Json, write_json

PROVENANCE = "provenance.json"
INSTEAD = {"apply": "evaluate"}  # `evaluate` measures another model in the place of a pruned one
MADE_BY = {"dense": "download model", "pruned": "apply", "recovered": "recover"}  # the command behind each model
# Keys that may differ: the measured model, the reference that it is compared with, and the text: its tokens count.
FREE = ("model", "reference", "wanda_dvc", "text")
TOKENIZER = ("tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json")  # its files


def digest(content: object) -> str:
    """Return the SHA-256 of a JSON value in canonical form."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe(made_by: str, *, libraries: tuple[str, ...] = (), **content: object) -> Json:
    """Return a provenance: the command, its inputs, and the versions of the libraries that computed the artifact."""
    versions = {name: version(name) for name in libraries}
    return {"made_by": made_by, "wanda_dvc": __version__, "libraries": versions, **content}


def read_provenance(artifact: Path, made_by: str) -> Json:
    """Read the provenance of an artifact. UserError if it is missing, or of an artifact of another command."""
    path, todo = artifact / PROVENANCE, f"run `wanda-dvc {made_by}` again"
    if not is_there(path):
        raise UserError(f"{path}: missing; run `dvc repro` or `wanda-dvc {made_by}` first")
    content = read_object(path, todo)
    if content.get("made_by") not in (made_by, INSTEAD.get(made_by)):
        raise UserError(f"{path}: made by {content.get('made_by')}, expected {made_by}; {todo}")
    return content


def check_source(where: str, found: Json, expected: Json, made_by: str) -> None:
    """Raise UserError if an artifact was made from another model or text than the expected one, by their digests."""
    if found["sha256"] != expected["sha256"]:
        raise UserError(
            f"{where}/: made from {found['source']} (sha256 {found['sha256'][:12]}…), expected {expected['source']} "
            f"(sha256 {expected['sha256'][:12]}…), which is here now; run `dvc repro` or `wanda-dvc {made_by}`"
        )


def write_provenance(artifact: Path, content: Json) -> None:
    """Write an artifact's provenance."""
    write_json(artifact / PROVENANCE, content)


def files_digest(folder: Path, patterns: Iterable[str] = ("**/*",)) -> str:
    """Return one SHA-256 of the files below a folder that match patterns, by default of all but its provenance."""
    paths = {path for one in patterns for path in folder.glob(one) if path.is_file() and path.name != PROVENANCE}
    return digest({path.relative_to(folder).as_posix(): file_digest(path) for path in paths})


def identity(version: int, made: Json, model: Path) -> Json:
    """Return the part of a protocol on the stage's version and the measured model, with its provenance and folder."""
    dense = made.get("model", made)["sha256"]  # a model made from the dense one names it
    tokenizer = files_digest(model, TOKENIZER)
    return {"version": version, "model": digest(made), "dense": dense, "tokenizer_sha256": tokenizer}


def differing(one: Json, other: Json) -> str | None:
    """Return the first key that makes two results incomparable; None if they may be compared.

    Builds of one version of a library, such as `+cpu` and `+cu128` of torch, count as equal.
    """
    first, second = _comparable_part(one), _comparable_part(other)
    return next((key for key in first | second if first.get(key) != second.get(key)), None)


def _comparable_part(protocol: Json) -> Json:
    libraries = {name: version.partition("+")[0] for name, version in protocol.get("libraries", {}).items()}
    return {key: value for key, value in protocol.items() if key not in FREE} | {"libraries": libraries}
