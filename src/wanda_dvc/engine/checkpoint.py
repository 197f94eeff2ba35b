"""The only reader of Hugging Face directories of safetensors."""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from wanda_dvc.errors import UserError
from wanda_dvc.reading import Entry, check_file, is_there, name_of, read_header, read_object

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
AGAIN = "copy it again"
PLAIN = re.compile(r"[^/\\\x00-\x1f]{1,255}")  # a name without a folder
# The supported dtypes of prunable weights, by safetensors' names.
STORED = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}


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
        self._headers: dict[Path, dict[str, Entry]] = {}
        self._files: dict[Path, safe_open] = {}

    def __str__(self) -> str:
        return str(self.folder)

    def __reduce__(self) -> tuple[type["Checkpoint"], tuple[Path]]:
        """Another process opens the files again."""
        return Checkpoint, (self.folder.absolute(),)

    @property
    def config(self) -> Any:
        """The directory's config.json."""
        from wanda_dvc.engine.config import read_config  # mask and apply start without it

        return read_config(self.folder)

    @property
    def config_name(self) -> str:
        """The path of config.json."""
        return str(self.folder / "config.json")

    @cached_property
    def where(self) -> dict[str, Path]:
        """The file of each tensor."""
        if not is_there(self.folder / "config.json"):
            raise UserError(f"{self.folder}: no config.json, expected a Hugging Face model directory; name one")
        if is_there(self.folder / INDEX):
            where = {name: self.folder / file for name, file in read_index(self.folder / INDEX).items()}
            shards = sorted(set(where.values()))
            if missing := [path.name for path in shards if not is_there(path)]:
                raise UserError(f"{self.folder}: {INDEX} names {', '.join(missing)}, which is missing; copy it again")
            for name, path in where.items():
                if name not in self.header(path):
                    raise UserError(
                        f"{self.folder}: {INDEX} says that {path.name} holds {name}, which it does not; {AGAIN}"
                    )
            return where
        if not is_there(self.folder / SINGLE):
            found = ", ".join(sorted(path.name for path in self.folder.iterdir())) or "nothing"
            raise UserError(
                f"{self.folder}: found {found}, expected {SINGLE} or {INDEX}; save the weights as safetensors first"
            )
        return dict.fromkeys(self.header(self.folder / SINGLE), self.folder / SINGLE)

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """Dtype, shape and place in its file of each tensor."""
        return {name: self.header(path)[name] for name, path in self.where.items()}

    @property
    def shards(self) -> list[Path]:
        """The files, sorted."""
        return sorted(set(self.where.values()))

    def header(self, path: Path) -> dict[str, Entry]:
        """Return dtype, shape and place of every tensor in one shard; an index may omit some."""
        if path not in self._headers:
            self._headers[path] = read_header(path)
        return self._headers[path]

    def _open(self, path: Path) -> safe_open:
        if path not in self._files:
            check_file(path)
            try:
                self._files[path] = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise UserError(f"{path}: incomplete safetensors file ({error}); copy it again") from None
        return self._files[path]

    def read(self, address: Address) -> Tensor:
        """The tensor, or the expert's part of it, in the dtype that it is stored in."""
        tensor = self._open(self.where[address.tensor]).get_tensor(address.tensor)
        return tensor if address.expert is None else tensor[address.expert]

    def find(self, linear: str) -> Address:
        """Return the address of a linear's weight, or of another tensor by its name."""
        for name in (f"{linear}.weight", linear):
            if name in self.where:
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


def read_index(path: Path) -> dict[str, str]:
    """Read an index: the name of each tensor's shard. Every shard is a file in the folder of the index."""
    shards = read_object(path).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        found = "no tensors" if shards == {} else name_of(shards) if shards is not None else "none"
        raise UserError(f"{path}: weight_map: found {found}, expected the file of each tensor; {AGAIN}")
    for name, shard in shards.items():
        if not isinstance(shard, str):
            raise UserError(f"{path}: weight_map: {name}: found {name_of(shard)}, expected the name of a file; {AGAIN}")
        if not PLAIN.fullmatch(shard) or shard in (".", ".."):
            raise UserError(
                f"{path}: weight_map: {name}: found {shard!r}, expected the name of a file in this folder; {AGAIN}"
            )
    return shards
