"""The only reader and writer of Hugging Face directories: config.json, and tensors in safetensors files."""

import json
import math
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from wanda_dvc.engine.accelerator import one_ahead
from wanda_dvc.errors import UserError, reason
from wanda_dvc.reading import COPY, Entry, is_there, read_header, read_object

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FILE_NAME = re.compile(r"(?!\.{1,2}$)[^/\\\x00-\x1f]{1,255}")  # a name without a folder
# The supported dtypes of prunable weights, by safetensors' names.
SAFETENSORS_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes a number, by the dtypes in which a model may run


@dataclass(frozen=True)
class Address:
    """The address of a stored weight: a tensor of the checkpoint, or one expert's matrix in a tensor of several."""

    tensor: str
    expert: int | None = None

    @property
    def linear(self) -> str:
        """The name of the linear, or of another tensor, in masks: an expert's number is before the last word."""
        name = self.tensor.removesuffix(".weight")
        if self.expert is None:
            return name
        owner, _, leaf = name.rpartition(".")
        return f"{owner}.{self.expert}.{leaf}"


class Checkpoint:
    """A model directory. Its tensors are views of the mapped file: cheap, and read-only by convention."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.header = cache(read_header)  # of one shard: its tensors
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
    def shards(self) -> list[Path]:
        """The files with tensors, sorted."""
        if not is_there(self.folder / "config.json"):
            raise UserError(f"{self.folder}: no config.json, expected a Hugging Face model directory; name one")
        if is_there(self.folder / INDEX):
            return [self.folder / name for name in read_index(self.folder / INDEX)]
        if is_there(self.folder / SINGLE):
            return [self.folder / SINGLE]
        raise UserError(f"{self.folder}: found no {SINGLE} and no {INDEX}, expected one; save it as safetensors")

    @cached_property
    def file_of(self) -> dict[str, Path]:
        """The file of each tensor."""
        files: dict[str, Path] = {}
        for shard in self.shards:
            files |= dict.fromkeys(self.header(shard), shard)
        return files

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """Dtype, shape and place in its file of each tensor."""
        return {name: self.header(path)[name] for name, path in self.file_of.items()}

    @property
    def parameters(self) -> int:
        """The number of stored weights."""
        return sum(math.prod(entry.shape) for entry in self.entries.values())

    def read(self, address: Address) -> Tensor:
        """Return a tensor, or one expert's matrix in it, in its stored dtype."""
        tensor: Tensor = self._opened(self.file_of[address.tensor]).get_tensor(address.tensor)
        return tensor if address.expert is None else tensor[address.expert]

    def find(self, linear: str) -> Address:
        """Return the address of a linear's weight."""
        if f"{linear}.weight" in self.file_of:
            return Address(f"{linear}.weight")
        owner, _, leaf = linear.rpartition(".")
        owner, _, expert = owner.rpartition(".")
        for name in (f"{owner}.{leaf}", f"{owner}.{leaf}.weight"):
            if expert.isdecimal() and name in self.file_of:
                return Address(name, int(expert))
        raise UserError(f"{self}: no weight of {linear}, a linear of the statistics; run `dvc repro`")

    def weight(self, linear: str) -> Tensor:
        """Return a linear's weight, as stored."""
        return self.read(self.find(linear))


class EditedCheckpoint(Checkpoint):
    """A view of a checkpoint: `read` returns its tensors, with new values of the weights in `replaced`.

    Addresses in `replaced` have the source's names, all others the view's. Here these are equal; a `SmallerCheckpoint`
    sets `source_names` and `config_changes`.
    """

    def __init__(self, source: Checkpoint, read: Callable[[Address], Tensor], replaced: Collection[Address]) -> None:
        super().__init__(source.folder)
        self.source, self._read = source, read
        # By tensor: whether its experts are replaced one by one.
        self._replaced = {address.tensor: address.expert is not None for address in replaced}
        self.source_names = {name: name for name in source.file_of}  # the source's tensor, by name in the view
        self.config_changes: dict[str, Any] = {}  # new values in the text part of config.json

    def __reduce__(self) -> tuple[type["Checkpoint"], tuple[Path]]:
        raise TypeError(f"{self}: a view of a checkpoint stays in its process: another one would open the source")

    @cached_property
    def file_of(self) -> dict[str, Path]:
        """The source's file of each tensor."""
        return {name: self.source.file_of[source_name] for name, source_name in self.source_names.items()}

    @cached_property
    def changed(self) -> dict[str, str]:
        """The source's tensors whose values, shape or name differ in the view, with their names in it."""
        names = {}
        for name, source_name in self.source_names.items():
            same_shape = self.entries[name].shape == self.source.entries[source_name].shape
            if source_name in self._replaced or name != source_name or not same_shape:
                names[source_name] = name
        return names

    def read(self, address: Address) -> Tensor:
        """Return a tensor, or one expert's matrix in it."""
        return self._read(address)

    def addresses(self, name: str) -> list[Address]:
        """Return the addresses to read a tensor by: its own, or those of its experts in order, if they are replaced."""
        if not self._replaced.get(self.source_names[name]):
            return [Address(name)]
        return [Address(name, expert) for expert in range(self.entries[name].shape[0])]


def read_index(path: Path) -> list[str]:
    """Read an index; return the names of the shards, sorted. Every shard is a file in the folder of the index."""
    shards = read_object(path).get("weight_map")
    names = list(shards.values()) if isinstance(shards, dict) else []
    unusable = [name for name in names if not isinstance(name, str) or not FILE_NAME.fullmatch(name)]
    if not names or unusable:
        what = f"found {unusable[0] if unusable else shards!r:.200}, expected names of files in this folder"
        raise UserError(f"{path}: weight_map: {what}; {COPY}")
    return sorted(set(names))


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


def with_fields(config: Any, fields: Mapping[str, Any]) -> Any:
    """Return a configuration with other values in some fields of its text part."""
    return type(config).from_dict(set_fields(config.to_dict(), config, fields))


def set_fields(content: dict[str, Any], config: Any, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Set fields of the text part in a configuration's content, under the names that it has for them; return it."""
    part = config.get_text_config()
    aliases = getattr(part, "attribute_map", {})
    text = content
    if part is not config:
        text = next(content[key] for key in config.to_dict() if getattr(config, key, None) is part)
    for field, value in fields.items():
        name = aliases.get(field, field)  # such as GPT-2's n_layer for num_hidden_layers
        names = {name, *(alias for alias in aliases if aliases[alias] == name)}
        for stored_name in (names & text.keys()) or {field}:
            text[stored_name] = value
    return content


def dtype_of(model: Path) -> str:
    """Return the dtype in which a model runs by default, by name: the one in its config.json.

    transformers is not asked: its import would take most of the time of `mask` by scores.
    """
    stored = read_object(model if model.is_file() else model / "config.json")
    for part in (stored, stored.get("text_config")):
        for name in ("dtype", "torch_dtype"):
            dtype = str(part.get(name)).removeprefix("torch.") if isinstance(part, dict) else ""
            if dtype in ITEMSIZE:
                return dtype
    return "float32"


def max_positions(config: Any) -> int | None:
    """Return the maximum tokens of a text, if the configuration has a limit."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions if isinstance(positions, int) else None


# --- writing ---


def write_model(view: EditedCheckpoint, target: Path, *, without: Collection[str] = ()) -> Iterator[str]:
    """Write a view of a checkpoint into an empty folder; yield the name of each new tensor once it is written.

    All other tensors are copied byte for byte, and so are headers and index while the configuration stays. All other
    files are copied, except those named in `without` and hidden files, in which the Hub's client stores times. A thread
    reads the next new weight while one is written, so memory is bounded by the two largest ones.
    """
    source, folder = view.source, view.source.folder
    differing = view.changed.keys() | (source.file_of.keys() - view.source_names.values())  # new ones, and left out
    shards = [shard for shard in source.shards if differing & source.header(shard).keys()]
    not_copied = {*shards, *(folder / name for name in without)}
    if view.config_changes:
        not_copied |= {folder / "config.json", folder / INDEX}

    def ignored(inside: str, names: list[str]) -> list[str]:
        return [name for name in names if name.startswith(".") or Path(inside, name) in not_copied]

    shutil.copytree(folder, target, ignore=ignored, copy_function=shutil.copyfile, dirs_exist_ok=True)
    for shard in shards:
        yield from _write_shard(view, shard, target / shard.relative_to(folder))
    if view.config_changes:
        if (folder / INDEX).is_file():
            total = sum(entry.length for entry in view.entries.values())
            shard_names = {name: shard.name for name, shard in sorted(view.file_of.items())}
            _write_json(target / INDEX, {"metadata": {"total_size": total}, "weight_map": shard_names})
        config = set_fields(read_object(folder / "config.json"), source.config, view.config_changes)
        _write_json(target / "config.json", config)


def _write_shard(view: EditedCheckpoint, shard: Path, path: Path) -> Iterator[str]:
    """Write one shard; yield each new tensor's name.

    safetensors' own writer does not serve: it needs all tensors of a shard in memory, and sorts them by dtype and name.
    """
    tensors, header = _layout(view, shard)
    original, stored = np.memmap(shard, np.uint8, "r"), view.source.header(shard)
    addresses = {tensor: view.addresses(view.changed[tensor]) for tensor in tensors if tensor in view.changed}
    weights = one_ahead(partial(_read_checked, view), chain.from_iterable(addresses.values()))
    with path.open("wb") as file:
        file.write(header)
        for tensor in tensors:
            if tensor not in addresses:
                begin = stored[tensor].begin
                file.write(original[begin : begin + stored[tensor].length].data)
                continue
            for _ in addresses[tensor]:
                file.write(next(weights))
            yield view.changed[tensor]


def _layout(view: EditedCheckpoint, shard: Path) -> tuple[list[str], bytes]:
    """Return the source's names of a shard's tensors in the new order, and the new header."""
    stored = view.source.header(shard)
    kept = stored.keys() & view.source_names.values()
    tensors = sorted(kept, key=lambda tensor: stored[tensor].begin)
    if not view.config_changes:
        with shard.open("rb") as file:
            return tensors, file.read(stored[tensors[0]].begin)
    # Wide types first, so that each tensor begins at a multiple of its type's size, as readers expect.
    tensors.sort(key=lambda tensor: -stored[tensor].length / max(1, math.prod(stored[tensor].shape)))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        name = view.changed.get(tensor, tensor)
        entry = view.entries[name]
        begin, end = end, end + entry.length
        header[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [begin, end]}
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    return tensors, len(content).to_bytes(8, "little") + content


def _read_checked(view: EditedCheckpoint, address: Address) -> memoryview:
    """Return the bytes of a new weight. UserError if it has another shape or dtype than stored."""
    weight, entry = view.read(address), view.entries[address.tensor]
    shape = entry.shape if address.expert is None else entry.shape[1:]
    dtype = SAFETENSORS_NAMES.get(weight.dtype, entry.dtype)  # a buffer of a renumbered block may be of any dtype
    if list(weight.shape) != shape or dtype != entry.dtype:
        what = f"its new weight is {list(weight.shape)} in {weight.dtype}, expected {shape} in {entry.dtype}, as stored"
        raise UserError(f"{address.tensor}: {what}")
    return weight.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def save_tokenizer(tokenizer: Any, target: Path) -> None:
    """Write a tokenizer. transformers 4, which llama.cpp converts with, knows its class by the older name alone."""
    tokenizer.save_pretrained(target)
    path = target / "tokenizer_config.json"
    content = path.read_text(encoding="utf-8").replace("TokenizersBackend", "PreTrainedTokenizerFast")
    path.write_text(content, encoding="utf-8")


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
