"""A text: embedded, a file on this machine, or a split of a data set from the mirror or the Hub."""

import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from wanda_dvc.catalog import TEXTS
from wanda_dvc.errors import UserError, notice
from wanda_dvc.params import ChosenText
from wanda_dvc.reading import check_file, name_of, read_lines, read_text
from wanda_dvc.sources import EMBEDDED_FOLDER, Source
from wanda_dvc.sources.hub import Repository, in_mirror, load_rows, resolve
from wanda_dvc.study.artifact import describe, file_digest, write_provenance
from wanda_dvc.study.files import Documents, Json
from wanda_dvc.study.folder import DOCUMENTS, TEXT


def find_text(setting: str, wanted: ChosenText, mirror: str | None) -> Source:
    """Find the text of a setting, such as `calibration.text`."""
    where, named = f"params.yaml: {setting}", TEXTS.get(wanted.source)
    shard = named.shards.get(wanted.split or "") if named else None
    place, title = _place(setting, wanted, mirror, shard)
    origin: Json = {"source": title, "revision": place.commit if isinstance(place, Repository) else None}
    part = setting.partition(".")[0]
    made_by = f"download {part}"

    def write(out: Path, scratch: Path) -> None:
        """Write the text as one file, or the documents as they are on the Hub."""
        column, file = wanted.column, place
        if shard:
            if isinstance(file, Repository):
                file.fetch(scratch / "hub", shard)
                file = scratch / "hub" / shard
            with tempfile.TemporaryFile(dir=scratch) as lines:
                documents = Documents(file, column, lines)
                if part != "perplexity":  # windows are drawn within documents, as the Wanda authors do
                    if not len(documents) or not documents[0]:  # reading the first checks that it is text
                        raise UserError(f"{file}: no documents, expected JSON lines with `{column}`; copy it again")
                    shutil.copyfile(file, out / DOCUMENTS)
                    made: Json = {"column": column, "rows": len(documents), "sha256": file_digest(out / DOCUMENTS)}
                    write_provenance(out, describe(made_by, **origin, **made))
                    return
                rows = list(documents)
        elif isinstance(file, Repository):
            loaded = load_rows(file, wanted.config, wanted.split or "")
            rows = _column(((f"{where}.column: {wanted.dataset}", row) for row in loaded), column)
        else:
            rows = _column(read_lines(file), column) if file.suffix == ".jsonl" else [read_text(file)]
        if not (joined := wanted.join.join(rows)).strip():
            raise UserError(f"{where} ({title}): empty, expected text; name another")
        (out / TEXT).write_text(joined, encoding="utf-8", newline="")
        made = {"join": wanted.join, "rows": len(rows), "sha256": file_digest(out / TEXT)}
        write_provenance(out, describe(made_by, **origin, **made))

    return Source({"text": asdict(wanted), "commit": origin["revision"]}, write)


def _place(setting: str, wanted: ChosenText, mirror: str | None, shard: str | None) -> tuple[Path | Repository, str]:
    """Return the file or the repository of a text, and its title in the provenance."""
    where, named = f"params.yaml: {setting}.source", TEXTS.get(wanted.source)
    if wanted.dataset:
        inside = [shard] if shard else [name for name in (wanted.config, f"{wanted.split}.jsonl") if name]
        mirrored = in_mirror(mirror, wanted.dataset, *inside)
        if mirrored and wanted.revision:
            notice(f"{setting}: read from runtime.mirror ({mirrored}); revision {wanted.revision} is ignored")
        revision = wanted.revision or (named.revision if named else None)
        title = f"{'/'.join(name for name in (wanted.dataset, wanted.config) if name)}, {wanted.split}"
        return mirrored or resolve("dataset", wanted.dataset, revision, where), title
    if named:
        return EMBEDDED_FOLDER / "text" / f"{wanted.split}.jsonl", f"embedded, {wanted.split}"
    path = Path(wanted.source)
    check_file(path, f"correct {setting}.source")
    return path, path.name


def _column(rows: Iterable[tuple[str, Json]], column: str) -> list[str]:
    """Return one column of some rows, each with its place for messages."""
    texts = []
    for where, row in rows:
        text = row.get(column)
        if not isinstance(text, str):
            columns = ", ".join(row)[:200] or "nothing"
            wrong = f"{name_of(text)} in column `{column}`" if column in row else columns
            raise UserError(f"{where}: found {wrong}, expected text in column `{column}`; name another")
        texts.append(text)
    return texts
