"""What every artifact carries: what it was made from, with hashes, by which parameters and library versions.

Nothing in a provenance depends on time, host or path.
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
    """SHA-256 of something that JSON can say, in one canonical spelling."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe(kind: str, *, libraries: tuple[str, ...] = (), **content: object) -> Json:
    """A provenance: what kind of artifact, what it was made from, and which libraries computed it."""
    versions = {name: version(name) for name in libraries}
    return {"format": FORMAT, "kind": kind, "wanda_dvc": __version__, "libraries": versions, **content}


def read_provenance(artifact: Path, made_by: str) -> Json:
    """The provenance of an artifact that this version can read."""
    content = read_json(artifact / PROVENANCE, made_by)
    if content.get("format") != FORMAT:
        raise UserError(
            f"{artifact / PROVENANCE}: format {content.get('format')}, expected {FORMAT}; "
            f"run `wanda-dvc {made_by}` again"
        )
    return content


def write_provenance(artifact: Path, content: Json) -> None:
    write_json(artifact / PROVENANCE, content)


def files_digest(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, but for its provenance."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != PROVENANCE)
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in paths}


def tokenizer_digest(model: Path) -> str:
    """SHA-256 over the files that a model's tokenizer is made of."""
    patterns = ("tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json")
    files = sorted({path for pattern in patterns for path in model.glob(pattern)})
    return digest({path.name: file_digest(path) for path in files})
