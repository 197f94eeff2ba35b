"""A packed directory: a model in safetensors whose pruned linears are stored without their zeros. Reader and writer.

Each packed weight is two tensors. Under its own name are its nonzeros row by row, [count]. `NAME_keep`, uint8
[rows, ⌈columns / 8⌉], has one bit a weight, the first column in the highest bit. −0.0 is a nonzero, so nothing is lost.
`config.json` has a `quantization_config`: the method, the format's version, and dtype and shape of each packed weight.
With `zip` the nonzeros are compressed (`wanda_dvc.pruning.packing.compress`), uint8 [bytes].
"""

import contextlib
import inspect
import json
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wanda_dvc.engine.checkpoint import INDEX, STORED, Address, Checkpoint
from wanda_dvc.engine.structure import empty_model, find_blocks, stored_parts
from wanda_dvc.errors import UserError
from wanda_dvc.pruning.packing import compress, decompress, pack, packed_bytes, unpack
from wanda_dvc.reading import DTYPES as WIDTHS
from wanda_dvc.reading import name_of, read_object

METHOD, FORMAT = "wanda-dvc", 1
KEEP = "_keep"  # what the name of the bits ends in
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in STORED}
AGAIN = "export it again"


@dataclass(frozen=True)
class Packing:
    """What of a directory is packed: dtype and shape of each packed weight, by its tensor's name."""

    weights: dict[str, tuple[torch.dtype, tuple[int, int]]]
    zipped: bool

    def as_json(self) -> dict[str, Any]:
        """The `quantization_config`."""
        weights = {
            name: {"dtype": str(dtype).removeprefix("torch."), "shape": list(shape)}
            for name, (dtype, shape) in self.weights.items()
        }
        return {"quant_method": METHOD, "format_version": FORMAT, "zip": self.zipped, "weights": weights}

    @classmethod
    def parse(cls, stored: Any, where: str) -> "Packing":
        """Read a `quantization_config` of ours. UserError where it is damaged or of another version."""
        version = stored.get("format_version")
        if version != FORMAT:
            found = name_of(version) if not isinstance(version, int) else version
            raise UserError(
                f"{where}: packed in format {found}, expected {FORMAT}; install the wanda-dvc that wrote it, or {AGAIN}"
            )
        weights = stored.get("weights")
        if not isinstance(weights, dict) or not isinstance(stored.get("zip"), bool):
            raise UserError(f"{where}: quantization_config: no weights or zip, expected what export writes; {AGAIN}")
        found_weights = {}
        for name, entry in weights.items():
            known = isinstance(entry, dict) and entry.get("dtype") in DTYPES
            shape = entry.get("shape") if known else None
            if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)):
                raise UserError(f"{where}: quantization_config: {name}: expected dtype and shape; {AGAIN}")
            found_weights[name] = (DTYPES[entry["dtype"]], (shape[0], shape[1]))
        return cls(found_weights, stored["zip"])

    def restore(self, name: str, values: Tensor, bits: Tensor) -> Tensor:
        """Return a weight from its two tensors. UserError where they do not belong to it or to each other."""
        dtype, (_, columns) = self.weights[name]
        nonzeros = self.values(name, values, bits)
        _check(name, nonzeros, [len(nonzeros)], dtype)
        return unpack(nonzeros, bits, columns)

    def values(self, name: str, stored: Tensor, bits: Tensor) -> Tensor:
        """Return a weight's nonzeros, decompressed; those that are not compressed may have been converted since.

        UserError where the tensors are not of this weight.
        """
        dtype, (rows, columns) = self.weights[name]
        if self.zipped:
            _check(name, stored, [len(stored)], torch.uint8)
        _check(name + KEEP, bits, [rows, -(-columns // 8)], torch.uint8)
        count = _count(bits)
        if not self.zipped:
            _check(name, stored, [count], stored.dtype)
            return stored
        try:
            return decompress(stored.cpu(), dtype, count).to(stored.device)
        except ValueError as error:
            raise UserError(f"{name}: damaged: {error}; {AGAIN}") from None


def _check(name: str, tensor: Tensor, shape: list[int], dtype: torch.dtype) -> None:
    if tensor.dtype != dtype or list(tensor.shape) != shape:
        found = f"{tensor.dtype} {list(tensor.shape)}"
        raise UserError(f"{name}: found {found}, expected {dtype} {shape}; {AGAIN}")


def _count(bits: Tensor) -> int:
    """How many bits are set."""
    ones = torch.tensor([number.bit_count() for number in range(256)])
    return int(torch.bincount(bits.cpu().flatten(), minlength=256) @ ones)


def packing_of(folder: Path) -> Packing | None:
    """Return what of a directory is packed; None where it is no packed directory."""
    stored = read_object(folder / "config.json").get("quantization_config")
    if not isinstance(stored, dict) or stored.get("quant_method") != METHOD:
        return None
    return Packing.parse(stored, f"{folder}: config.json")


@dataclass(frozen=True)
class Sizes:
    """Bytes of the linears in a directory that was packed, and of the whole directory."""

    weights: int  # of the linears, zeros included
    dense: int
    packed: int  # what they take in memory; with zip, on disk
    directory: int

    def told(self, zipped: bool) -> str:
        """The sizes, beside what quantization would take, for a model card."""
        bits, share = 8 * self.packed / self.weights, self.packed / self.dense
        return (
            f"The pruned linears are stored without their zeros, bit by bit recoverable: {bits:.1f} bits a weight "
            f"{'on disk, compressed' if zipped else 'on disk and in memory'}, {share:.2f} times the dense ones' "
            f"{self.dense:,} bytes; the whole directory takes {self.directory:,}. Quantized to int8 they would take "
            "8.0 bits a weight and to int4 in groups of 128 about 4.1, with other losses: int8 is nearly lossless. "
            "Kernels that read packed weights on a CPU sum in another order, so logits may differ in their last bits; "
            "`wanda-dvc speed` measures this directory on a machine."
        )


def pack_directory(source: Path, target: Path, linears: Collection[str], *, zipped: bool = False) -> Sizes:
    """Write a model directory packed into an empty folder. The linears are named as masks name them.

    A linear stays dense where packing does not shrink it, and where it is no weight of its own of a `torch.nn.Linear`
    that is called and stored under the parameter's name: experts that are stored together, GPT-2's transposed weights,
    and what Mamba multiplies itself.
    Peak memory in bytes: three times the largest tensor.
    """
    checkpoint = Checkpoint(source)
    model = empty_model(source, tensors=len(checkpoint.where))
    names = [name for name in _own_weights(model, checkpoint) if name.removesuffix(".weight") in linears]
    count = dense = packed = 0
    weights: dict[str, tuple[torch.dtype, tuple[int, int]]] = {}
    for name in names:
        weight = checkpoint.read(Address(name))
        rows, columns = weight.shape
        if packed_bytes(weight) < weight.nbytes:
            weights[name] = weight.dtype, (rows, columns)
    packing = Packing(weights, zipped)

    def pieces(names: Iterable[str]) -> "Iterator[_Piece]":
        for name in names:
            entry, whole = checkpoint.entries[name], partial(checkpoint.read, Address(name))
            if name not in weights:
                yield _Piece(name, entry.dtype, entry.length, whole)
                continue
            values = partial(_values, whole, zipped)
            # Compressed numbers that are random take a little more than they are.
            yield _Piece(name, "U8" if zipped else entry.dtype, 2 * entry.length + 1024, values)
            yield _Piece(name + KEEP, "U8", entry.length, partial(_bits, whole))

    _rewrite(checkpoint, target, pieces)
    config = read_object(source / "config.json") | {"quantization_config": packing.as_json()}
    _write_json(target / "config.json", config)
    written = Checkpoint(target).entries
    for linear in linears:
        address = checkpoint.find(linear)
        weight = checkpoint.read(address)
        nbytes = weight.nbytes
        count += weight.numel()
        dense += nbytes
        if address.tensor in weights:
            nbytes = sum(written[address.tensor + suffix].length for suffix in ("", KEEP))
        packed += nbytes
    return Sizes(count, dense, packed, sum(path.stat().st_size for path in target.iterdir() if path.is_file()))


def unpack_directory(source: Path, target: Path) -> None:
    """Write a packed model directory as the dense one that it was made from, every weight bit by bit."""
    packing, checkpoint = packing_of(source), Checkpoint(source)
    if packing is None:
        raise UserError(f"{source}: no packed directory, expected one of `wanda-dvc export --format packed`")
    for name in packing.weights:
        for tensor in (name, name + KEEP):
            if tensor not in checkpoint.where:
                raise UserError(f"{source}: no tensor {tensor}, which config.json names; {AGAIN}")

    def pieces(names: Iterable[str]) -> "Iterator[_Piece]":
        for name in names:
            if name.removesuffix(KEEP) in packing.weights and name.endswith(KEEP):
                continue
            entry = checkpoint.entries[name]
            if name not in packing.weights:
                yield _Piece(name, entry.dtype, entry.length, partial(checkpoint.read, Address(name)))
                continue
            dtype, (rows, columns) = packing.weights[name]
            restored = partial(_restored, packing, checkpoint, name)
            yield _Piece(name, STORED[dtype], rows * columns * dtype.itemsize, restored)

    _rewrite(checkpoint, target, pieces)
    config = read_object(source / "config.json")
    del config["quantization_config"]
    _write_json(target / "config.json", config)


def unpacked_bytes(folder: Path) -> int:
    """Bytes of the weights of a packed directory once they are unpacked."""
    packing = packing_of(folder)
    weights = packing.weights if packing else {}
    inside = {name + suffix for name in weights for suffix in ("", KEEP)}
    others = sum(entry.length for name, entry in Checkpoint(folder).entries.items() if name not in inside)
    return others + sum(rows * columns * dtype.itemsize for dtype, (rows, columns) in weights.values())


def block_linears(folder: Path) -> list[str]:
    """Return the linears of a directory's blocks that can be packed, as masks name them."""
    checkpoint = Checkpoint(folder)
    model = empty_model(folder, tensors=len(checkpoint.where))
    prefix, _ = find_blocks(model)
    return [name.removesuffix(".weight") for name in _own_weights(model, checkpoint) if name.startswith(f"{prefix}.")]


def _own_weights(model: nn.Module, checkpoint: Checkpoint) -> list[str]:
    """The weights of `torch.nn.Linear` modules that are called, stored whole under their parameter's name."""
    parts = stored_parts(model, checkpoint)
    found = []
    for name, module in model.named_modules():
        weight = f"{name}.weight"
        stored = [(part.address, part.is_whole) for part in parts.get(weight, ())]
        if type(module) is nn.Linear and stored == [(Address(weight), True)] and _is_called(model, name):
            found.append(weight)
    return found


def _is_called(model: nn.Module, name: str) -> bool:
    """Whether a linear is called, by the code of the module that holds it. Mamba's takes the weights of some itself."""
    parent, _, leaf = name.rpartition(".")
    with contextlib.suppress(OSError, TypeError):  # a class without a file
        code = inspect.getsource(type(model.get_submodule(parent)))
        return re.search(rf"\bself\.{leaf}\.weight\s*[@,]", code) is None
    return True


def _values(whole: Callable[[], Tensor], zipped: bool) -> Tensor:
    values, _ = pack(whole())
    return compress(values) if zipped else values


def _bits(whole: Callable[[], Tensor]) -> Tensor:
    return pack(whole())[1]


def _restored(packing: Packing, checkpoint: Checkpoint, name: str) -> Tensor:
    return packing.restore(name, checkpoint.read(Address(name)), checkpoint.read(Address(name + KEEP)))


# --- writing ---


@dataclass(frozen=True)
class _Piece:
    """A tensor to be written: `most` is what its bytes cannot exceed."""

    name: str
    dtype: str  # as safetensors names it
    most: int
    make: Callable[[], Tensor]


def _rewrite(checkpoint: Checkpoint, target: Path, pieces: Callable[[Iterable[str]], Iterator[_Piece]]) -> None:
    """Write a checkpoint's directory with other tensors, in shards of the same names.

    `pieces` says what becomes of the tensors named. All but weights, index and config.json is copied; hidden files are
    not, such as those in which the Hub's client notes when it has fetched what.
    """
    written = {"config.json", INDEX, *(shard.name for shard in checkpoint.shards)}
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
        names = (name for name, *_ in checkpoint.bytes_at(shard) if name in checkpoint.entries)
        entries = _write_shard(target / shard.name, list(pieces(names)))
        where |= dict.fromkeys(entries, shard.name)
        total += sum(entries.values())
    if (checkpoint.folder / INDEX).is_file():
        _write_json(target / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))})


def _write_shard(path: Path, pieces: list[_Piece]) -> dict[str, int]:
    """Write tensors one at a time; return the bytes of each.

    The header comes first and says where each tensor ends, which is known in the end. So its place is reserved, with
    numbers as long as they can be, and filled up with spaces, as the format allows.
    """
    # Wide types first: then each tensor begins at a multiple of its type's size, as readers expect.
    pieces.sort(key=lambda piece: -WIDTHS.get(piece.dtype, 8))
    longest = sum(piece.most for piece in pieces)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for piece in pieces:
        header[piece.name] = {"dtype": piece.dtype, "shape": [longest] * 8, "data_offsets": [longest] * 2}
    room = -(-len(json.dumps(header)) // 8) * 8
    sizes: dict[str, int] = {}
    with path.open("wb") as file:
        file.write(room.to_bytes(8, "little") + b" " * room)
        end = 0
        for piece in pieces:
            tensor = piece.make().contiguous()
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
            shape = list(tensor.shape)
            header[piece.name] = {"dtype": piece.dtype, "shape": shape, "data_offsets": [end, end + tensor.nbytes]}
            end += tensor.nbytes
            sizes[piece.name] = tensor.nbytes
        file.seek(8)
        file.write(json.dumps(header).encode().ljust(room))
    return sizes


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
