"""The only reader and writer of Hugging Face directories: config.json, and tensors in safetensors files."""

import json
import math
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from wanda_dvc.errors import UserError, reason
from wanda_dvc.reading import COPY, Entry, is_there, name_of, read_header, read_object

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PLAIN = re.compile(r"(?!\.{1,2}$)[^/\\\x00-\x1f]{1,255}")  # a name without a folder
# The supported dtypes of prunable weights, by safetensors' names.
STORED = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes a number, by the dtypes in which a model may run


@dataclass(frozen=True)
class Address:
    """The address of a stored weight: a tensor of the checkpoint, or one expert's matrix in a tensor of several."""

    tensor: str
    expert: int | None = None

    @property
    def linear(self) -> str:
        """The linear's name. An expert's has the expert's number before the last word."""
        name = self.tensor.removesuffix(".weight")
        if self.expert is None:
            return name
        owner, _, leaf = name.rpartition(".")
        return f"{owner}.{self.expert}.{leaf}"


class Checkpoint:
    """A model directory. Its tensors are views of the mapped file: cheap, and read-only by convention."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.header = cache(read_header)  # of one shard: its tensors, of which an index may omit some
        self._opened = cache(partial(safe_open, framework="pt"))

    def __str__(self) -> str:
        return str(self.folder)

    def __reduce__(self) -> tuple[type["Checkpoint"], tuple[Path]]:
        """Another process opens the files again."""
        return Checkpoint, (self.folder.absolute(),)

    @property
    def config(self) -> Any:
        """The directory's config.json."""
        return read_config(self.folder)

    @cached_property
    def where(self) -> dict[str, Path]:
        """The file of each tensor."""
        if not is_there(self.folder / "config.json"):
            raise UserError(f"{self.folder}: no config.json, expected a Hugging Face model directory; name one")
        if not is_there(self.folder / INDEX):
            if not is_there(self.folder / SINGLE):
                found = ", ".join(sorted(path.name for path in self.folder.iterdir())) or "nothing"
                raise UserError(f"{self.folder}: found {found}, expected {SINGLE} or {INDEX}; save it as safetensors")
            return dict.fromkeys(self.header(self.folder / SINGLE), self.folder / SINGLE)
        where = {name: self.folder / file for name, file in read_index(self.folder / INDEX).items()}
        for name, path in where.items():
            if name not in self.header(path):
                raise UserError(f"{self.folder}: {INDEX} says that {path.name} holds {name}, which it does not; {COPY}")
        return where

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """Dtype, shape and place in its file of each tensor."""
        return {name: self.header(path)[name] for name, path in self.where.items()}

    @property
    def shards(self) -> list[Path]:
        """The files, sorted."""
        return sorted(set(self.where.values()))

    def read(self, address: Address) -> Tensor:
        """The tensor, or the expert's part of it, in the dtype that it is stored in."""
        tensor: Tensor = self._opened(self.where[address.tensor]).get_tensor(address.tensor)
        return tensor if address.expert is None else tensor[address.expert]

    def find(self, linear: str) -> Address:
        """Return the address of a linear's weight."""
        if (name := f"{linear}.weight") in self.where:
            return Address(name)
        owner, _, leaf = linear.rpartition(".")
        owner, _, expert = owner.rpartition(".")
        for name in (f"{owner}.{leaf}", f"{owner}.{leaf}.weight"):
            if expert.isdecimal() and name in self.where:
                return Address(name, int(expert))
        raise UserError(f"{self}: no weight of {linear}, a linear of the statistics; run `dvc repro`")

    def weight(self, linear: str) -> Tensor:
        """Return a linear's weight, as stored."""
        return self.read(self.find(linear))


class EditedCheckpoint(Checkpoint):
    """A view of a checkpoint: `read` returns its tensors, with new values of the weights in `replaced`."""

    def __init__(self, source: Checkpoint, read: Callable[[Address], Tensor], replaced: Collection[Address]) -> None:
        super().__init__(source.folder)
        self.source, self._read = source, read
        self._replaced = {address.tensor: address.expert is not None for address in replaced}
        self.old = {name: name for name in source.where}  # by name in the view: the stored tensor
        self.changes: dict[str, Any] = {}  # new values in the text part of config.json

    @cached_property
    def where(self) -> dict[str, Path]:
        """The file of each tensor."""
        return {name: self.source.where[old] for name, old in self.old.items()}

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """Dtype, shape and length of each tensor; places in files are the source's."""
        return {name: self.source.entries[old] for name, old in self.old.items()}

    @cached_property
    def new(self) -> dict[str, str | None]:
        """The stored tensors that differ in the view, with their names in it; None: those that it leaves out."""
        return dict.fromkeys(self.source.where.keys() - self.old.values()) | {
            old: name
            for name, old in self.old.items()
            if old in self._replaced or name != old or self.entries[name].shape != self.source.entries[old].shape
        }

    def read(self, address: Address) -> Tensor:
        """Return the tensor, or the expert's part of it."""
        return self._read(address)

    def pieces(self, name: str) -> Iterator[Tensor]:
        """Yield a tensor, or the parts of its experts in order, if those are replaced."""
        for expert in range(self.entries[name].shape[0]) if self._replaced.get(self.old[name]) else [None]:
            yield self.read(Address(name, expert))


def read_index(path: Path) -> dict[str, str]:
    """Read an index: the name of each tensor's shard. Every shard is a file in the folder of the index."""
    shards = read_object(path).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise UserError(f"{path}: weight_map: found {name_of(shards)}, expected a file for each tensor; {COPY}")
    for name, shard in shards.items():
        if not isinstance(shard, str) or not PLAIN.fullmatch(shard):
            raise UserError(
                f"{path}: weight_map: {name}: found {shard!r:.200}, expected the name of a file in this folder; {COPY}"
            )
    return shards


# --- config.json ---


def read_config(place: Path) -> Any:
    """Read a config.json, or the one in a directory; no remote code runs. UserError if transformers refuses it."""
    from transformers import AutoConfig

    path = place if place.is_file() else place / "config.json"
    read_object(path)  # its message names what is wrong with the file
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # each model's class raises exceptions of its own choice
        raise UserError(
            f"{path}: {reason(error)}, expected a configuration that transformers accepts; correct it, or copy it again"
        ) from error


def text_key(config: Any) -> str | None:
    """Return the key of a configuration's text part; None if all of it describes the text model."""
    text = config.get_text_config()
    return None if text is config else next(key for key in config.to_dict() if getattr(config, key, None) is text)


def dtype_of(model: Path, wanted: str) -> str:
    """Return the dtype in which a model runs, by name: `wanted`, or for `auto` the checkpoint's own."""
    if wanted != "auto":
        return wanted
    stored = read_object(model / "config.json")
    parts = [part for part in (stored, stored.get("text_config")) if isinstance(part, dict)]
    found = (str(part.get(name)).removeprefix("torch.") for part in parts for name in ("dtype", "torch_dtype"))
    return next((dtype for dtype in found if dtype in WIDTH), "float32")


def positions_of(config: Any) -> int | None:
    """Return the maximum tokens of a text, if the configuration has a limit."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions if isinstance(positions, int) else None


# --- writing ---


def write_model(view: EditedCheckpoint, target: Path, *, without: Collection[str] = ()) -> Iterator[str]:
    """Write a view of a checkpoint into an empty folder; yield the name of each new tensor once it is written.

    All other tensors are copied byte for byte, and so are headers and index while no name, shape or value of the
    configuration changes. All other files are copied, except those named in `without` and hidden files, in which the
    Hub's client stores times.

    Every file is written once, from beginning to end. A thread makes the next piece while one is written, so memory is
    bounded by the two largest pieces. UserError if a piece has another shape or dtype than expected.
    """
    source, folder = view.source, view.source.folder
    touched = [shard for shard in source.shards if view.new.keys() & source.header(shard).keys()]
    rewritten = [folder / "config.json", folder / INDEX] if view.changes else []
    skipped = {*touched, *(folder / name for name in without), *rewritten}

    def ignored(inside: str, names: list[str]) -> list[str]:
        return [name for name in names if name.startswith(".") or Path(inside, name) in skipped]

    shutil.copytree(folder, target, ignore=ignored, copy_function=shutil.copyfile, dirs_exist_ok=True)
    for shard in touched:
        yield from _write_shard(view, shard, target / shard.relative_to(folder))
    if not view.changes:
        return
    if (folder / INDEX).is_file():
        where = {name: path.name for name, path in sorted(view.where.items())}
        total = sum(entry.length for entry in view.entries.values())
        _write_json(target / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
    content, config = read_object(folder / "config.json"), source.config
    key, names = text_key(config), getattr(config.get_text_config(), "attribute_map", {})
    text = content[key] if key else content
    for field, value in view.changes.items():  # under the file's name, such as `num_experts` for `num_local_experts`
        name = names.get(field, field)
        known = {field, name, *(other for other, meant in names.items() if meant == name)}
        text.update(dict.fromkeys(known & text.keys() or {field}, value))
    _write_json(target / "config.json", content)


def _write_shard(view: EditedCheckpoint, shard: Path, path: Path) -> Iterator[str]:
    """Write one shard; yield each new tensor's name."""
    stored, new = view.source.header(shard), view.new
    names = sorted(stored, key=lambda name: stored[name].begin)
    if view.changes:
        # Wide types first, so that each tensor begins at a multiple of its type's size, as readers expect. An index may
        # omit some tensors.
        names = [name for name in names if name in view.source.entries and new.get(name, name) is not None]
        names.sort(key=lambda name: -stored[name].length / max(1, math.prod(stored[name].shape)))
    pieces = _made_ahead(piece for name in map(new.get, names) if name for piece in view.pieces(name))
    original = np.memmap(shard, np.uint8, "r")
    with path.open("wb") as file:
        if view.changes:
            file.write(_header(view, [new.get(name) or name for name in names]))
        else:
            file.write(original[: min(entry.begin for entry in stored.values())].data)
        for old in names:
            name = new.get(old)
            if name is None:
                begin = stored[old].begin
                file.write(original[begin : begin + stored[old].length].data)
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


def _header(view: EditedCheckpoint, names: list[str]) -> bytes:
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
        while (piece := made.result()) is not None:
            made = maker.submit(next, pieces, None)
            yield piece
            del piece  # before the next one arrives


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
