"""The provenance of an artifact: its inputs with their hashes, its parameters, and the library versions.

No provenance depends on time, host or path.
"""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path

from wanda_dvc import __version__
from wanda_dvc.errors import UserError
from wanda_dvc.study.files import Json, read_json, write_json

FORMAT = 1
PROVENANCE = "provenance.json"


def digest(content: object) -> str:
    """Return the SHA-256 of a JSON value, in one canonical spelling."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe(kind: str, *, libraries: tuple[str, ...] = (), **content: object) -> Json:
    """Return a provenance: the kind of artifact, its inputs, and the versions of the libraries that computed it."""
    versions = {name: version(name) for name in libraries}
    return {"format": FORMAT, "kind": kind, "wanda_dvc": __version__, "libraries": versions, **content}


def read_provenance(artifact: Path, made_by: str) -> Json:
    """Read the provenance of an artifact. UserError if it is missing or of another format."""
    content = read_json(artifact / PROVENANCE, made_by)
    if content.get("format") != FORMAT:
        raise UserError(
            f"{artifact / PROVENANCE}: format {content.get('format')}, expected {FORMAT}; "
            f"run `wanda-dvc {made_by}` again"
        )
    return content


def write_provenance(artifact: Path, content: Json) -> None:
    """Write an artifact's provenance."""
    write_json(artifact / PROVENANCE, content)


def files_digest(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below a folder but its provenance, by relative path."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != PROVENANCE)
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in paths}


def tokenizer_digest(model: Path) -> str:
    """Return one SHA-256 of the files of a model's tokenizer."""
    patterns = ("tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json")
    files = sorted({path for pattern in patterns for path in model.glob(pattern)})
    return digest({path.name: file_digest(path) for path in files})
