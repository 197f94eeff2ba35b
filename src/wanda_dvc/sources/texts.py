"""A text: embedded, a file on this machine, or a split of a data set from the mirror or the Hub."""

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from wanda_dvc.catalog import TEXTS
from wanda_dvc.errors import notice
from wanda_dvc.params import ChosenText
from wanda_dvc.reading import check_file, read_lines, read_text
from wanda_dvc.sources import EMBEDDED_FOLDER, Source
from wanda_dvc.sources.hub import Repository, in_mirror, load_rows, resolve
from wanda_dvc.study.artifact import describe, digest, file_digest, read_provenance, write_provenance
from wanda_dvc.study.files import Json, open_documents, text_in
from wanda_dvc.study.folder import DOCUMENTS, TEXT


def find_texts(setting: str, texts: Sequence[ChosenText], mirror: str | None) -> Source:
    """Find the text of a setting, such as `calibration.text`; or several, which are written to a folder each."""
    if len(texts) == 1:
        return find_text(setting, texts[0], mirror)
    sources = [find_text(f"{setting}.{index}", text, mirror) for index, text in enumerate(texts)]

    def write(out: Path, scratch: Path) -> None:
        """Write each text to a folder of its number, and a provenance that names all."""
        made_by = f"download {setting.partition('.')[0]}"
        written = []
        for index, source in enumerate(sources):
            folder = out / str(index)
            folder.mkdir()
            source.write(folder, scratch)
            written.append(read_provenance(folder, made_by))
        names = "; ".join(text["source"] for text in written)
        write_provenance(out, describe(made_by, source=names, sha256=digest([text["sha256"] for text in written])))

    return Source({"texts": [source.key for source in sources]}, write)


def find_text(setting: str, text: ChosenText, mirror: str | None) -> Source:
    """Find one text of a setting, such as `calibration.text.0`."""
    where, shard = f"params.yaml: {setting}", text.shard
    origin, title = _locate(setting, text, mirror)
    commit = origin.commit if isinstance(origin, Repository) else None
    section = setting.partition(".")[0]
    provenance = describe(f"download {section}", source=title, revision=commit)

    def write(out: Path, _: Path) -> None:
        """Write the text as one file, or the documents as they are on the Hub."""
        if shard is None:
            content = _write_joined(_read_rows(where, text, origin), text.join, out)
        else:
            file = origin if isinstance(origin, Path) else origin.fetch(shard) / shard
            sha256 = file_digest(file)
            documents = open_documents(file, text.column, sha256)
            if section == "perplexity":
                content = _write_joined(list(documents), text.join, out)
            else:  # windows are drawn within documents, as the Wanda authors do
                shutil.copyfile(file, out / DOCUMENTS)
                content = {"column": text.column, "rows": len(documents), "sha256": sha256}
        write_provenance(out, provenance | content)

    return Source({"text": asdict(text), "commit": commit}, write)


def _locate(setting: str, text: ChosenText, mirror: str | None) -> tuple[Path | Repository, str]:
    """Return the file or the repository of a text, and its title in the provenance."""
    named = TEXTS.get(text.source)
    if text.dataset:
        mirrored = in_mirror(mirror, *text.path_in_mirror)
        if mirrored and text.revision:
            notice(f"{setting}: read from runtime.mirror ({mirrored}); revision {text.revision} is ignored")
        revision = text.revision or (named.revision if named else None)
        title = f"{'/'.join(name for name in (text.dataset, text.config) if name)}, {text.split}"
        return mirrored or resolve("dataset", text.dataset, revision, f"params.yaml: {setting}.source"), title
    if named:
        return EMBEDDED_FOLDER / "text" / f"{text.split}.jsonl", f"embedded, {text.split}"
    file = Path(text.source)
    check_file(file, f"correct {setting}.source")
    return file, file.name


def _read_rows(where: str, text: ChosenText, origin: Path | Repository) -> list[str]:
    """Return the texts of all rows; a file without rows is one text."""
    if isinstance(origin, Repository):
        rows = load_rows(origin, text.config, text.split or "")
        return [text_in(row, text.column, f"{where}.column: {text.dataset}") for row in rows]
    if origin.suffix == ".jsonl":
        return [text_in(row, text.column, place) for place, row in read_lines(origin)]
    return [read_text(origin)]


def _write_joined(rows: list[str], join: str, out: Path) -> Json:
    """Write rows as one text; return what its provenance says of them."""
    (out / TEXT).write_text(join.join(rows), encoding="utf-8", newline="")
    return {"join": join, "rows": len(rows), "sha256": file_digest(out / TEXT)}
