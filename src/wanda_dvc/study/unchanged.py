"""Reads the provenance of a stage's inputs, and refuses files that changed after it was written.

A file is hashed if its size or time differs from its last look, so a large model is read once, not in each stage.
The looks are kept in DVC's temporary folder, because no output may depend on time.
"""

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from wanda_dvc.errors import UserError
from wanda_dvc.reading import check_file
from wanda_dvc.study.files import Json, load_json, write_json
from wanda_dvc.study.provenance import check_digest, read_provenance

if TYPE_CHECKING:
    from wanda_dvc.study.project import Project

LOOKS = "wanda-dvc-looks.json"
TEXT = "text.txt"
DOCUMENTS = "documents.json.gz"
ITEMS = "items.jsonl"
FILE_OF = {"text": TEXT, "documents": DOCUMENTS, "task": ITEMS}  # by kind of artifact; a model names its files


def read_input(project: "Project", artifact: Path, made_by: str) -> Json:
    """Return the provenance of an input. UserError if a file that it names has other bytes than its digest says."""
    content, path = read_provenance(artifact, made_by), project.work_root.with_name(LOOKS)
    looks, news = Json(), Json()
    with contextlib.suppress(UserError):  # damaged: all files are hashed again
        looks = load_json(path)
    for name, sha256 in _digests(content).items():
        file = artifact.absolute() / name
        status = check_file(file, f"run `wanda-dvc {made_by}` again")
        look = [status.st_size, status.st_mtime_ns, sha256]
        if looks.get(str(file)) != look:
            check_digest(file, sha256, made_by)
            news[str(file)] = look
    if news:
        with contextlib.suppress(OSError):  # a read-only study, or another stage that writes it: only a cache
            write_json(path, {name: look for name, look in (looks | news).items() if os.path.lexists(name)})
    return content


def _digests(content: Json) -> dict[str, str]:
    """Return the SHA-256 of each file that a provenance names; none for artifacts checked block by block."""
    if content["kind"] in FILE_OF:
        return {FILE_OF[content["kind"]]: content["sha256"]}
    files = content.get("files")
    return files if content["kind"] == "model" and isinstance(files, dict) else {}
