"""The packed format: two tensors for each packed weight, listed in config.json's `quantization_config`.

The weight's own name has its nonzeros row by row, [count]. `NAME_keep`, uint8 [rows, ⌈columns / 8⌉], has one bit a
weight, the first column in the highest bit. −0.0 counts as a nonzero, so packing is lossless. `crc32` has a checksum of
each tensor.
"""

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from jaxtyping import Shaped, UInt8
from torch import Tensor

from wanda_dvc.engine.checkpoint import STORED
from wanda_dvc.errors import UserError
from wanda_dvc.pruning.selection import pack_bits, unpack_bits
from wanda_dvc.reading import Entry, name_of, read_header, read_object

METHOD, FORMAT = "wanda-dvc", 2
KEEP = "_keep"  # the end of the name of the bits
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in STORED}
AGAIN = "export it again"
READ_AT_A_TIME = 2**20  # bytes


def pack(weight: Shaped[Tensor, "rows columns"]) -> tuple[Shaped[Tensor, " nonzeros"], UInt8[Tensor, "rows bytes"]]:
    """Return a weight's nonzeros row by row, and one bit a weight, set at each nonzero."""
    keep = _as_integers(weight) != 0
    return weight[keep], pack_bits(keep)


def unpack(
    values: Shaped[Tensor, " nonzeros"], bits: UInt8[Tensor, "rows bytes"], columns: int
) -> Shaped[Tensor, "rows columns"]:
    """Return the unpacked weight, bit-identical. The number of values must equal the number of set bits."""
    keep = unpack_bits(bits, columns)
    return torch.zeros(keep.shape, dtype=values.dtype).masked_scatter_(keep, values)


def count_nonzeros(weight: Shaped[Tensor, "rows columns"]) -> int:
    """Return the number of values that packing keeps."""
    return int(torch.count_nonzero(_as_integers(weight)))


def bits_shape(rows: int, columns: int) -> list[int]:
    """Return the shape of a packed weight's bits."""
    return [rows, -(-columns // 8)]


def is_two_of_four(bits: UInt8[Tensor, "rows bytes"], columns: int) -> bool:
    """Whether at most two of every four neighbours are nonzero, and the columns are a multiple of four."""
    return columns % 4 == 0 and bool((unpack_bits(bits, columns).view(len(bits), -1, 4).sum(-1) <= 2).all())


def checksum(tensor: Tensor) -> int:
    """Return the CRC-32 of a tensor's bytes."""
    return zlib.crc32(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _checksum(file: BinaryIO, entry: Entry) -> int:
    """Return the checksum of a tensor in an open safetensors file."""
    file.seek(entry.begin)
    found = 0
    for begin in range(0, entry.length, READ_AT_A_TIME):
        found = zlib.crc32(file.read(min(READ_AT_A_TIME, entry.length - begin)), found)
    return found


def _as_integers(weight: Tensor) -> Tensor:
    return weight.contiguous().view(getattr(torch, f"int{8 * weight.itemsize}"))


@dataclass(frozen=True)
class Packing:
    """The packed weights of a directory: dtype and shape of each, by its tensor's name; and checksums of tensors."""

    weights: dict[str, tuple[torch.dtype, tuple[int, int]]]
    sums: dict[str, int]  # of all tensors by `pack_directory`, of the packed weights' by transformers

    def as_json(self) -> dict[str, Any]:
        """The `quantization_config`."""
        weights = {
            name: {"dtype": str(dtype).removeprefix("torch."), "shape": list(shape)}
            for name, (dtype, shape) in self.weights.items()
        }
        return {"quant_method": METHOD, "format_version": FORMAT, "weights": weights, "crc32": self.sums}

    @classmethod
    def parse(cls, stored: Any, where: str) -> "Packing":
        """Read a `quantization_config` of this format. UserError if it is damaged or of another version."""
        version = stored.get("format_version")
        if version != FORMAT:
            found = name_of(version) if not isinstance(version, int) else version
            raise UserError(
                f"{where}: packed in format {found}, expected {FORMAT}; install the wanda-dvc that wrote it, or {AGAIN}"
            )
        weights = stored.get("weights")
        if not isinstance(weights, dict):
            raise UserError(f"{where}: quantization_config: no weights, expected those that are packed; {AGAIN}")
        sums, packed = stored.get("crc32"), {tensor for name in weights for tensor in (name, name + KEEP)}
        numbers = isinstance(sums, dict) and all(type(number) is int for number in sums.values())
        if not numbers or not packed <= sums.keys():
            raise UserError(f"{where}: quantization_config: crc32: expected a checksum of each tensor; {AGAIN}")
        found_weights = {}
        for name, entry in weights.items():
            known = isinstance(entry, dict) and str(entry.get("dtype")) in DTYPES
            shape = entry.get("shape") if known else None
            if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)):
                raise UserError(f"{where}: quantization_config: {name}: expected dtype and shape; {AGAIN}")
            found_weights[name] = (DTYPES[entry["dtype"]], (shape[0], shape[1]))
        return cls(found_weights, sums)

    def check_files(self, shards: Iterable[Path]) -> dict[str, int]:
        """Return the number of values of each weight; read every safetensors file of a directory.

        UserError if a tensor is missing or has changed.
        """
        dtypes = {name: STORED[dtype] for name, (dtype, _) in self.weights.items()}
        dtypes |= {name + KEEP: "U8" for name in self.weights}
        missing, sizes = dict(self.sums), dict[str, int]()
        for path in shards:
            with path.open("rb") as file:
                for name, entry in read_header(path).items():
                    expected, dtype = missing.pop(name, None), dtypes.get(name, entry.dtype)
                    sizes |= {name: entry.shape[0]} if name in self.weights else {}
                    if entry.dtype != dtype:
                        raise UserError(f"{path}: {name}: found {entry.dtype}, expected {dtype}; {AGAIN}")
                    if expected is not None and (found := _checksum(file, entry)) != expected:
                        raise UserError(
                            f"{path}: {name}: checksum {found:08x}, expected {expected:08x}: changed after it was "
                            f"packed; {AGAIN}"
                        )
        for name in missing:
            raise UserError(f"{path.parent}: no tensor {name}, which config.json names; {AGAIN}")
        return sizes

    def check(self, name: str, values: Tensor, bits: Tensor, dtype: torch.dtype) -> None:
        """Raise UserError if two tensors do not belong to this weight in a dtype."""
        _check(name + KEEP, bits, bits_shape(*self.weights[name][1]), torch.uint8)
        _check(name, values, [_count(bits)], dtype)
        if values.is_floating_point() and bool(values.isnan().any()):
            raise UserError(f"{name}: found NaN, expected numbers: no stage packs such a weight; {AGAIN}")

    def restore(self, name: str, values: Tensor, bits: Tensor) -> Tensor:
        """Return a weight from its two tensors. UserError if they do not belong to this weight."""
        dtype, (_, columns) = self.weights[name]
        self.check(name, values, bits, dtype)
        return unpack(values, bits, columns)


def _check(name: str, tensor: Tensor, shape: list[int], dtype: torch.dtype) -> None:
    if tensor.dtype != dtype or list(tensor.shape) != shape:
        found = f"{tensor.dtype} {list(tensor.shape)}"
        raise UserError(f"{name}: found {found}, expected {dtype} {shape}; {AGAIN}")


def _count(bits: Tensor) -> int:
    """Return the number of set bits."""
    ones = torch.tensor([number.bit_count() for number in range(256)])
    return int(torch.bincount(bits.cpu().flatten(), minlength=256) @ ones)


def packing_of(folder: Path) -> Packing | None:
    """Return the packed weights of a directory; None if it is not packed."""
    stored = read_object(folder / "config.json").get("quantization_config")
    if not isinstance(stored, dict) or stored.get("quant_method") != METHOD:
        return None
    return Packing.parse(stored, f"{folder}: config.json")
