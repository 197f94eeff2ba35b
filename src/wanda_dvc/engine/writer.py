"""Writes a model directory with some tensors replaced, renamed or left out: the only writer of shards and indexes."""

import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from wanda_dvc.engine.checkpoint import INDEX, STORED, Changed, text_key
from wanda_dvc.errors import UserError
from wanda_dvc.reading import DTYPES, read_object

CONFIG = "config.json"
COPIED_AT_A_TIME = 2**20  # bytes


def write_model(view: Changed, target: Path, *, without: Collection[str] = ()) -> Iterator[str]:
    """Write a view of a checkpoint into an empty folder; yield the name of each new tensor once it is written.

    All other tensors are copied byte for byte, and so are headers and index while no name, shape or value of the
    configuration changes. All other files are copied, except those named in `without` and hidden files, in which the
    Hub's client stores times.

    Every file is written once, from beginning to end. A thread makes the next piece while one is written, so memory is
    bounded by the two largest pieces.

    Raises:
        UserError: a piece has another shape or dtype than expected.
    """
    source, folder = view.source, view.source.folder
    touched = [shard for shard in source.shards if view.new.keys() & source.header(shard).keys()]
    rewritten = [folder / CONFIG, folder / INDEX] if view.changes else []
    skipped = {*touched, *(folder / name for name in without), *rewritten}
    shutil.copytree(
        folder,
        target,
        ignore=lambda inside, names: [x for x in names if x.startswith(".") or Path(inside, x) in skipped],
        copy_function=shutil.copyfile,
        dirs_exist_ok=True,
    )
    for shard in touched:
        yield from _write_shard(view, shard, target / shard.relative_to(folder))
    if not view.changes:
        return
    if (folder / INDEX).is_file():
        where = {name: path.name for name, path in sorted(view.where.items())}
        total = sum(entry.length for entry in view.entries.values())
        _write_json(target / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
    content, config = read_object(folder / CONFIG), source.config
    key = text_key(config)
    text = content[key] if key else content
    text.update(_as_written(view.changes, text, config.get_text_config()))
    _write_json(target / CONFIG, content)


def _write_shard(view: Changed, shard: Path, path: Path) -> Iterator[str]:
    """Write one shard; yield each new tensor's name."""
    stored, new = view.source.header(shard), view.new
    names = sorted(stored, key=lambda name: stored[name].begin)
    if view.changes:
        # Wide types first, so that each tensor begins at a multiple of its type's size, as readers expect. An index may
        # omit some tensors.
        names = [name for name in names if name in view.source.entries and new.get(name, name) is not None]
        names.sort(key=lambda name: -DTYPES.get(stored[name].dtype, 8))
    written = [new[name] for name in names if name in new]
    pieces = _made_ahead(piece for name in written if name for piece in view.pieces(name))
    with shard.open("rb") as original, path.open("wb") as file:
        if view.changes:
            file.write(_header(view, [new.get(name) or name for name in names]))
        else:
            _copy(original, file, 0, min(entry.begin for entry in stored.values()))
        for old in names:
            name = new.get(old)
            if name is None:
                _copy(original, file, stored[old].begin, stored[old].length)
                continue
            entry = view.entries[name]
            left = entry.length
            while left > 0:
                piece = next(pieces)
                if list(piece.shape) not in (entry.shape, entry.shape[1:]) or STORED.get(piece.dtype) != entry.dtype:
                    raise UserError(
                        f"{name}: its new weight is {list(piece.shape)} in {piece.dtype}, expected {entry.shape} in "
                        f"{entry.dtype}, as {shard} stores it"
                    )
                file.write(piece.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
                left -= piece.nbytes
                del piece  # before the next one arrives
            yield name


def _header(view: Changed, names: list[str]) -> bytes:
    """Return the beginning of a safetensors file, up to the first tensor."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        entry = view.entries[name]
        begin, end = end, end + entry.length
        header[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [begin, end]}
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    return len(content).to_bytes(8, "little") + content


def _made_ahead(pieces: Iterator[Tensor]) -> Iterator[Tensor]:
    """Yield the pieces; a thread makes the next one meanwhile."""
    with ThreadPoolExecutor(max_workers=1) as maker:
        made = maker.submit(next, pieces, None)
        while True:
            piece = made.result()
            if piece is None:
                return
            made = maker.submit(next, pieces, None)
            yield piece
            del piece  # before the next one arrives


def _copy(stored: BinaryIO, file: BinaryIO, begin: int, length: int) -> None:
    """Copy bytes from a place of one file to the end of another."""
    stored.seek(begin)
    for start in range(0, length, COPIED_AT_A_TIME):
        file.write(stored.read(min(COPIED_AT_A_TIME, length - start)))


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _as_written(changes: Mapping[str, Any], written: Mapping[str, Any], text: Any) -> dict[str, Any]:
    """Return changes of a configuration by the names in its file, such as `num_experts` for `num_local_experts`."""
    other_names: Mapping[str, str] = getattr(text, "attribute_map", {})
    found: dict[str, Any] = {}
    for field, value in changes.items():
        name = other_names.get(field, field)
        known = {field, name, *(other for other, meant in other_names.items() if meant == name)}
        found |= dict.fromkeys(sorted(known & written.keys()) or [field], value)
    return found
