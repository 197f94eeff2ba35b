"""Writes a model directory with some tensors replaced, renamed or left out; one tensor is in memory at a time."""

import json
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wanda_dvc.engine.checkpoint import INDEX, Address, Checkpoint
from wanda_dvc.reading import DTYPES as WIDTHS
from wanda_dvc.reading import read_object

Configuration = dict[str, Any]  # config.json


@dataclass(frozen=True)
class Piece:
    """A tensor to be written."""

    name: str
    dtype: str  # as safetensors names it
    shape: list[int]
    nbytes: int
    make: Callable[[], Tensor]


def rewrite(  # noqa: PLR0913 - the directory, and what differs in its copy
    checkpoint: Checkpoint,
    target: Path,
    pieces: Mapping[str, list[Piece]],
    configure: Callable[[Configuration], Configuration],
    *,
    without: Collection[str] = (),
    progress: Callable[[Piece, Tensor], object] = lambda *_: None,
) -> None:
    """Write a checkpoint's directory with some tensors replaced by pieces, in shards of the same names.

    `configure` returns the new config.json. Copies all other files but weights, index, the files named in `without` and
    hidden files, in which the Hub's client stores times. `progress` is called after each piece, with its tensor.
    """
    written = {"config.json", INDEX, *(shard.name for shard in checkpoint.shards), *without}
    shutil.copytree(
        checkpoint.folder,
        target,
        ignore=lambda _, names: [name for name in names if name in written or name.startswith(".")],
        copy_function=shutil.copyfile,
        dirs_exist_ok=True,
    )
    where: dict[str, str] = {}
    total = 0
    for shard in checkpoint.shards:
        here: list[Piece] = []
        for name, entry in checkpoint.header(shard).items():
            if name in checkpoint.entries:  # an index may omit some
                same = Piece(name, entry.dtype, entry.shape, entry.length, partial(checkpoint.read, Address(name)))
                here += pieces.get(name, [same])
        _write_shard(target / shard.name, here, progress)
        where |= dict.fromkeys((piece.name for piece in here), shard.name)
        total += sum(piece.nbytes for piece in here)
    if (checkpoint.folder / INDEX).is_file():
        _write_json(target / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))})
    _write_json(target / "config.json", configure(read_object(checkpoint.folder / "config.json")))


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_shard(path: Path, pieces: list[Piece], progress: Callable[[Piece, Tensor], object]) -> None:
    """Write tensors as a safetensors file, one at a time."""
    # Wide types first, so that each tensor begins at a multiple of its type's size, as readers expect.
    pieces = sorted(pieces, key=lambda piece: -WIDTHS.get(piece.dtype, 8))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for piece in pieces:
        begin, end = end, end + piece.nbytes
        header[piece.name] = {"dtype": piece.dtype, "shape": piece.shape, "data_offsets": [begin, end]}
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    with path.open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        for piece in pieces:
            tensor = piece.make()
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            progress(piece, tensor)
