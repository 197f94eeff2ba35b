"""A Hugging Face directory of safetensors, single-file or sharded, read one tensor at a time."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from wanda_dvc.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name. A tensor that is read is a view of the mapped file: cheap, and never to be written to."""

    folder: Path

    @cached_property
    def where(self) -> dict[str, Path]:
        """Which file holds each tensor."""
        if not (self.folder / "config.json").is_file():
            raise UserError(f"{self.folder}: no config.json, expected a Hugging Face model directory")
        if (self.folder / INDEX).is_file():
            index = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            where = {name: self.folder / file for name, file in index.items()}
            if missing := sorted({path.name for path in where.values() if not path.is_file()}):
                raise UserError(f"{self.folder}: {INDEX} names {', '.join(missing)}, which is not there; copy it again")
            return where
        if not (self.folder / SINGLE).is_file():
            found = ", ".join(sorted(path.name for path in self.folder.iterdir())) or "nothing"
            raise UserError(
                f"{self.folder}: found {found}, expected {SINGLE} or {INDEX}; "
                "weights in another format must be saved as safetensors first"
            )
        return dict.fromkeys(self._open(self.folder / SINGLE).keys(), self.folder / SINGLE)

    @property
    def shards(self) -> list[Path]:
        return sorted(set(self.where.values()))

    @cached_property
    def _files(self) -> dict[Path, safe_open]:
        return {}

    def _open(self, path: Path) -> safe_open:
        if path not in self._files:
            try:
                self._files[path] = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise UserError(f"{path}: not a whole safetensors file ({error}); copy it again") from None
        return self._files[path]

    def read(self, name: str) -> Tensor:
        """The tensor, in the dtype that it is stored in."""
        return self._open(self.where[name]).get_tensor(name)

    def size(self, dtype: torch.dtype) -> int:
        """Bytes of all tensors in a dtype."""
        shapes = (shape for path in self.shards for _, _, shape, _, _ in self.bytes_at(path))
        return sum(map(math.prod, shapes)) * dtype.itemsize

    def find(self, linear: str) -> tuple[str, int | None]:
        """The tensor that holds a linear's weight and, where it holds those of several experts, which one's it is."""
        if (name := f"{linear}.weight") in self.where:
            return name, None
        owner, _, leaf = linear.rpartition(".")
        owner, _, expert = owner.rpartition(".")
        for name in (f"{owner}.{leaf}", f"{owner}.{leaf}.weight"):
            if expert.isdecimal() and name in self.where:
                return name, int(expert)
        raise UserError(f"{self.folder}: no weight of {linear}, which the statistics name; run `dvc repro`")

    def weight(self, linear: str) -> Tensor:
        """A linear's weight, as it is stored."""
        name, expert = self.find(linear)
        return self.read(name) if expert is None else self.read(name)[expert]

    def bytes_at(self, path: Path) -> Iterator[tuple[str, str, list[int], int, int]]:
        """Name, dtype, shape, first byte and length in the file, of every tensor in one shard."""
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                yield name, entry["dtype"], entry["shape"], 8 + size + begin, end - begin


def expert_name(stored: str, expert: int) -> str:
    """The linear that is one expert's matrix in a tensor that holds several: its number stands before the last word."""
    owner, _, leaf = stored.rpartition(".")
    return f"{owner}.{expert}.{leaf}"
