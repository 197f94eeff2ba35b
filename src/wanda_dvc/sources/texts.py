"""A text: embedded, a file on this machine, or a split of a data set from the mirror or the Hub."""

import hashlib
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from wanda_dvc.catalog import EMBEDDED_TEXT, NamedText
from wanda_dvc.errors import UserError, notice
from wanda_dvc.params import ChosenText
from wanda_dvc.reading import check_file, is_there, name_of, read_lines, read_text
from wanda_dvc.sources import Source
from wanda_dvc.sources.hub import Repository, column_of, gated_names, load_rows, resolve
from wanda_dvc.study.documents import Documents
from wanda_dvc.study.files import Json
from wanda_dvc.study.places import EMBEDDED, in_mirror, on_the_hub
from wanda_dvc.study.project import DOCUMENTS, TEXT
from wanda_dvc.study.provenance import describe, file_digest, write_provenance


@dataclass(frozen=True, kw_only=True)
class TextSource(Source):
    """A text that is found: a file on this machine, or a repository on the Hub."""

    wanted: ChosenText
    setting: str  # its dotted name: calibration.text
    dataset: NamedText
    title: str  # its name in the provenance
    place: Path | Repository
    shard: str | None = None  # the file of gzipped documents that stands for the split
    as_documents: bool = False  # whether documents are kept apart instead of being joined

    @property
    def key(self) -> Json:
        """The settings of the text, and its commit."""
        return {"text": asdict(self.wanted), "commit": self._commit}

    @property
    def _commit(self) -> str | None:
        return self.place.commit if isinstance(self.place, Repository) else None

    @property
    def gated(self) -> tuple[str, ...]:
        """The data set, where it is gated."""
        return gated_names(self.place)

    def write(self, out: Path, scratch: Path) -> str:
        """Write the text as one file, or the documents as they are on the Hub."""
        origin: Json = {"source": self.title, "revision": self._commit}
        if isinstance(self.place, Repository) and not self.shard:
            return self._write_text(self._hub_rows(self.place), out, origin)
        path = self.place if isinstance(self.place, Path) else self._fetch_shard(self.place, scratch / "hub")
        if self.shard and self.as_documents:
            return self._write_documents(path, out, scratch, origin)
        return self._write_text(self._file_rows(path, scratch), out, origin)

    def _write_documents(self, path: Path, out: Path, scratch: Path, origin: Json) -> str:
        column = self.dataset.column
        with tempfile.TemporaryFile(dir=scratch) as lines:
            count = _check(Documents.unpack(path, column, lines))
        shutil.copyfile(path, out / DOCUMENTS)
        sha256 = file_digest(out / DOCUMENTS)
        write_provenance(out, describe("documents", **origin, column=column, rows=count, sha256=sha256))
        return sha256

    def _write_text(self, rows: list[str], out: Path, origin: Json) -> str:
        joined = self.wanted.join.join(rows)
        if not joined.strip():
            raise UserError(f"{self.setting} ({self.title}): empty, expected text; name another")
        content = joined.encode("utf-8")
        (out / TEXT).write_bytes(content)
        sha256 = hashlib.sha256(content).hexdigest()
        write_provenance(out, describe("text", **origin, join=self.wanted.join, rows=len(rows), sha256=sha256))
        return sha256

    def _hub_rows(self, repository: Repository) -> list[str]:
        rows = load_rows(repository, self.dataset.config, self.wanted.split or "")
        return column_of(rows, self.dataset.column, f"params.yaml: {self.setting}.column: {self.dataset.dataset}")

    def _fetch_shard(self, repository: Repository, folder: Path) -> Path:
        shard = self.shard or ""
        repository.fetch(folder, shard)
        return folder / shard

    def _file_rows(self, path: Path, scratch: Path) -> list[str]:
        """The rows of a file. A .txt file is one row."""
        column = self.dataset.column
        if self.shard:
            with tempfile.TemporaryFile(dir=scratch) as lines:
                return list(Documents.unpack(path, column, lines))
        return _jsonl_rows(path, column) if path.suffix == ".jsonl" else [read_text(path)]


def find_text(setting: str, wanted: ChosenText, mirror: str | None, *, as_documents: bool = False) -> Source:
    """Find the text of a setting, such as `calibration.text`."""
    where = f"params.yaml: {setting}.source"
    if found := on_the_hub(wanted):
        dataset, shard, place = found
        path = in_mirror(mirror, dataset.dataset, *place)
        revision = wanted.revision or dataset.revision
        if path and wanted.revision:
            notice(f"{setting}: {path} is in runtime.mirror, and taken as it is, not as of revision {wanted.revision}")
        return TextSource(
            wanted=wanted,
            setting=setting,
            dataset=dataset,
            title=f"{'/'.join(name for name in (dataset.dataset, dataset.config) if name)}, {wanted.split}",
            place=path or resolve("dataset", dataset.dataset, revision, where),
            shard=shard,
            as_documents=as_documents,
        )
    if wanted.source == EMBEDDED_TEXT:
        path, title = EMBEDDED / "text" / f"{wanted.split}.jsonl", f"embedded, {wanted.split}"
    else:
        path = Path(wanted.source)
        title = path.name
        if not is_there(path):
            raise UserError(f"{where}: {path} not found, expected a text file; correct the path")
        check_file(path, f"correct {setting}.source")
    dataset = NamedText(title, None, wanted.column)
    return TextSource(wanted=wanted, setting=setting, dataset=dataset, title=title, place=path)


def _check(documents: Documents) -> int:
    """Count the documents. UserError if there are none, or the first is not text."""
    if not documents or not documents[0]:
        raise UserError(
            f"{documents.shard}: no documents, expected lines of JSON with `{documents.column}`; copy it again"
        )
    return len(documents)


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
