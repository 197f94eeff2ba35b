"""A text: embedded, a file on this machine, or a split of a data set from the mirror or the Hub."""

import hashlib
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from wanda_dvc.catalog import EMBEDDED_TEXT, TEXTS
from wanda_dvc.errors import UserError, notice
from wanda_dvc.params import ChosenText
from wanda_dvc.reading import check_file, is_there, name_of, read_lines, read_text
from wanda_dvc.sources import EMBEDDED, Source
from wanda_dvc.sources.hub import Repository, column_of, gated_names, in_mirror, load_rows, resolve
from wanda_dvc.study.files import Documents, Json
from wanda_dvc.study.project import DOCUMENTS, TEXT
from wanda_dvc.study.provenance import describe, file_digest, write_provenance


@dataclass(frozen=True)
class _Found:
    """A found text: a file on this machine, or a repository on the Hub."""

    wanted: ChosenText
    where: str  # params.yaml: calibration.text
    title: str  # its name in the provenance
    made_by: str  # the command, such as `download calibration`
    place: Path | Repository
    shard: str | None  # the file of gzipped documents used for the split
    as_documents: bool  # whether documents stay separate instead of being joined

    @property
    def origin(self) -> Json:
        """The source in the provenance."""
        return {"source": self.title, "revision": self.place.commit if isinstance(self.place, Repository) else None}

    def write(self, out: Path, scratch: Path) -> None:
        """Write the text as one file, or the documents as they are on the Hub."""
        column, path = self.wanted.column, self.place
        if isinstance(path, Repository):
            if not self.shard:
                rows = load_rows(path, self.wanted.config, self.wanted.split or "")
                self._write_text(column_of(rows, column, f"{self.where}.column: {path.name}"), out)
                return
            path.fetch(scratch / "hub", self.shard)
            path = scratch / "hub" / self.shard
        if not self.shard:
            self._write_text(_jsonl_rows(path, column) if path.suffix == ".jsonl" else [read_text(path)], out)
            return
        with tempfile.TemporaryFile(dir=scratch) as lines:
            documents = Documents.unpack(path, column, lines)
            if not self.as_documents:
                self._write_text(list(documents), out)
                return
            count = len(documents)
            if not count or not documents[0]:  # reading the first checks that it is text
                raise UserError(f"{path}: no documents, expected lines of JSON with `{column}`; copy it again")
        shutil.copyfile(path, out / DOCUMENTS)
        sha256 = file_digest(out / DOCUMENTS)
        write_provenance(out, describe(self.made_by, **self.origin, column=column, rows=count, sha256=sha256))

    def _write_text(self, rows: list[str], out: Path) -> None:
        joined = self.wanted.join.join(rows)
        if not joined.strip():
            raise UserError(f"{self.where} ({self.title}): empty, expected text; name another")
        content = joined.encode("utf-8")
        (out / TEXT).write_bytes(content)
        made: Json = {"join": self.wanted.join, "rows": len(rows), "sha256": hashlib.sha256(content).hexdigest()}
        write_provenance(out, describe(self.made_by, **self.origin, **made))


def find_text(setting: str, wanted: ChosenText, mirror: str | None, *, as_documents: bool = False) -> Source:
    """Find the text of a setting, such as `calibration.text`."""
    where, named = f"params.yaml: {setting}", TEXTS.get(wanted.source)
    shard = named.shards.get(wanted.split or "") if named else None
    place: Path | Repository | None
    if wanted.dataset:
        inside = [shard] if shard else [name for name in (wanted.config, f"{wanted.split}.jsonl") if name]
        place = in_mirror(mirror, wanted.dataset, *inside)
        if place and wanted.revision:
            notice(f"{setting}: read from runtime.mirror ({place}); revision {wanted.revision} is ignored")
        revision = wanted.revision or (named.revision if named else None)
        place = place or resolve("dataset", wanted.dataset, revision, f"{where}.source")
        title = f"{'/'.join(name for name in (wanted.dataset, wanted.config) if name)}, {wanted.split}"
    elif wanted.source == EMBEDDED_TEXT:
        place, title = EMBEDDED / "text" / f"{wanted.split}.jsonl", f"embedded, {wanted.split}"
    else:
        place, title = Path(wanted.source), Path(wanted.source).name
        if not is_there(place):
            raise UserError(f"{where}.source: {place} not found, expected a text file; correct the path")
        check_file(place, f"correct {setting}.source")
    made_by = f"download {setting.partition('.')[0]}"
    text = _Found(wanted, where, title, made_by, place, shard, as_documents)
    return Source({"text": asdict(wanted), "commit": text.origin["revision"]}, text.write, gated_names(place))


def _jsonl_rows(path: Path, column: str) -> list[str]:
    """Read one column of a JSONL file."""
    rows = []
    for where, row in read_lines(path):
        if column not in row:
            found = ", ".join(row)[:200] or "nothing"
            raise UserError(f"{where}: found {found}, expected a column `{column}`; name one that every line has")
        if not isinstance(row[column], str):
            raise UserError(f"{where}: `{column}` is {name_of(row[column])}, expected text; correct that line")
        rows.append(row[column])
    return rows
