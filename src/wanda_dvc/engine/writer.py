"""Writes a model directory with some tensors replaced, renamed or left out: the only writer of shards and indexes."""

import json
import math
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from wanda_dvc.engine.checkpoint import INDEX, STORED, Address, Checkpoint
from wanda_dvc.engine.config import text_key
from wanda_dvc.errors import UserError
from wanda_dvc.reading import DTYPES, Entry, read_object

CONFIG = "config.json"
COPIED_AT_A_TIME = 2**20  # bytes


@dataclass(frozen=True)
class New:
    """A tensor of the new directory in place of a stored one, in the same dtype."""

    name: str
    shape: list[int]
    pieces: Callable[[], Iterator[Tensor]]  # the tensor, or its experts' parts, in order


def new_tensors(
    checkpoint: Checkpoint,
    names: Mapping[str, str],
    entries: Mapping[str, Entry],
    read: Callable[[Address], Tensor],
    replaced: Collection[Address],
) -> dict[str, New | None]:
    """Return the tensors that `write_model` writes in place of stored ones.

    Args:
        checkpoint: The stored tensors.
        names: The new names, and the stored tensor of each; all other stored tensors are left out.
        entries: The new shapes, by new name.
        read: Returns a new tensor, or the expert's part of it.
        replaced: The stored weights with new values.
    """
    changed = {address.tensor for address in replaced}
    by_expert = {address.tensor for address in replaced if address.expert is not None}
    new: dict[str, New | None] = dict.fromkeys(checkpoint.where.keys() - names.values())
    for name, old in names.items():
        shape = entries[name].shape
        if old in changed or (name, shape) != (old, checkpoint.entries[old].shape):
            places = [Address(name, expert) for expert in (range(shape[0]) if old in by_expert else [None])]
            new[old] = New(name, shape, partial(map, read, places))
    return new


def write_model(
    checkpoint: Checkpoint,
    target: Path,
    new: Mapping[str, New | None],
    config: Mapping[str, Any],
    *,
    without: Collection[str] = (),
) -> Iterator[str]:
    """Write a checkpoint's directory into an empty folder; yield the name of each new tensor once it is written.

    `new` has the tensors to write in place of stored ones, by stored name; None leaves one out. All other tensors are
    copied byte for byte, and so are headers and index while no name, shape or value of `config` changes. `config` has
    new values for the text part of config.json. All other files are copied, except those named in `without` and hidden
    files, in which the Hub's client stores times.

    Every file is written once, from beginning to end. A thread makes the next piece while one is written, so memory is
    bounded by the two largest pieces.

    Raises:
        UserError: a piece has another shape or dtype than expected.
    """
    folder, entries = checkpoint.folder, checkpoint.entries
    same = not config and all(x and (x.name, x.shape) == (name, entries[name].shape) for name, x in new.items())
    touched = [shard for shard in checkpoint.shards if new.keys() & checkpoint.header(shard).keys()]
    skipped = {*touched, *(folder / name for name in without), *([] if same else [folder / CONFIG, folder / INDEX])}
    shutil.copytree(
        folder,
        target,
        ignore=lambda inside, names: [x for x in names if x.startswith(".") or Path(inside, x) in skipped],
        copy_function=shutil.copyfile,
        dirs_exist_ok=True,
    )
    for shard in touched:
        yield from _write_shard(checkpoint, shard, target / shard.relative_to(folder), new, same=same)
    if same:
        return
    if (folder / INDEX).is_file():
        left = {name: New(name, entry.shape, lambda: iter(())) for name, entry in entries.items()} | dict(new)
        where = {x.name: checkpoint.where[name].name for name, x in left.items() if x}
        total = sum(_size(entries[name], x.shape) for name, x in left.items() if x)
        _write_json(target / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))})
    content = read_object(folder / CONFIG)
    key = text_key(checkpoint.config)
    text = content[key] if key else content
    text.update(_as_written(config, text, checkpoint.config.get_text_config()))
    _write_json(target / CONFIG, content)


def _write_shard(
    checkpoint: Checkpoint, shard: Path, path: Path, new: Mapping[str, New | None], *, same: bool
) -> Iterator[str]:
    """Write one shard; yield each new tensor's name."""
    entries = checkpoint.header(shard)
    names = sorted(entries, key=lambda name: entries[name].begin)
    if not same:
        # Wide types first, so that each tensor begins at a multiple of its type's size, as readers expect. An index may
        # omit some tensors.
        names = [name for name in names if name in checkpoint.entries and new.get(name, 0) is not None]
        names.sort(key=lambda name: -DTYPES.get(entries[name].dtype, 8))
    written = [new[name] for name in names if name in new]
    pieces = _made_ahead(piece for tensor in written if tensor for piece in tensor.pieces())
    with shard.open("rb") as stored, path.open("wb") as file:
        if same:
            _copy(stored, file, 0, min(entry.begin for entry in entries.values()))
        else:
            file.write(_header(names, entries, new))
        for name in names:
            entry, one = entries[name], new.get(name)
            if one is None:
                _copy(stored, file, entry.begin, entry.length)
                continue
            left = _size(entry, one.shape)
            while left > 0:
                piece = next(pieces)
                if list(piece.shape) not in (one.shape, one.shape[1:]) or STORED.get(piece.dtype) != entry.dtype:
                    raise UserError(
                        f"{name}: its new weight is {list(piece.shape)} in {piece.dtype}, expected {one.shape} in "
                        f"{entry.dtype}, as {shard} stores it"
                    )
                file.write(piece.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
                left -= piece.nbytes
                del piece  # before the next one arrives
            yield one.name


def _header(names: list[str], entries: Mapping[str, Entry], new: Mapping[str, New | None]) -> bytes:
    """Return the beginning of a safetensors file, up to the first tensor."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        entry, one = entries[name], new.get(name)
        shape = one.shape if one else entry.shape
        begin, end = end, end + _size(entry, shape)
        header[one.name if one else name] = {"dtype": entry.dtype, "shape": shape, "data_offsets": [begin, end]}
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    return len(content).to_bytes(8, "little") + content


def _size(entry: Entry, shape: list[int]) -> int:
    """Return the bytes of a tensor of this shape, in the dtype of a stored one."""
    return entry.length if shape == entry.shape else math.prod(shape) * DTYPES[entry.dtype]


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
