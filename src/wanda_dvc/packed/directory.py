"""Writes a model directory packed, and a packed one dense again. Tensors are read and written one at a time."""

import json
import math
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wanda_dvc.engine.checkpoint import INDEX, STORED, Address, Checkpoint
from wanda_dvc.engine.decoder import Decoder
from wanda_dvc.errors import UserError
from wanda_dvc.packed.format import AGAIN, KEEP, Packing, bits_shape, count_nonzeros, pack, packing_of
from wanda_dvc.pruning import products
from wanda_dvc.reading import DTYPES as WIDTHS
from wanda_dvc.reading import read_object
from wanda_dvc.study.files import write_json

LINEARS = (nn.Linear, products.Linear)  # the engine may replace the first by the second


@dataclass(frozen=True)
class Sizes:
    """Bytes of a packed directory, and of the pruned linears in it."""

    weights: int  # of the linears, zeros included
    dense: int
    packed: int
    directory: int

    def summary(self) -> str:
        """The sizes, with sizes of quantized weights for comparison, for a model card."""
        bits, share = 8 * self.packed / self.weights, self.packed / self.dense
        return (
            f"The pruned linears are stored without their zeros, without loss: {bits:.1f} bits a weight on disk and in "
            f"memory, {share:.2f} times the {self.dense:,} bytes of the dense linears. The directory takes "
            f"{self.directory:,} bytes. For comparison: int8 takes 8.0 bits a weight and is nearly lossless; int4 in "
            "groups of 128 takes about 4.1. On a CPU, the kernels for packed weights sum in another order, so logits "
            "may differ in their last bits. `wanda-dvc speed` measures this "
            "directory on a machine."
        )


def pack_directory(source: Path, target: Path, linears: Collection[str] | None = None) -> Sizes:
    """Write a model directory packed into an empty folder. Linears have the masks' names; None: all.

    A linear stays dense if packing does not shrink it or is not possible (`find_packable`).
    Peak memory in bytes: three times the largest tensor, and the engine's needs for one block.
    """
    checkpoint = Checkpoint(source)
    able = find_packable(checkpoint)
    linears = able if linears is None else linears
    count = dense = packed = 0
    weights: dict[str, tuple[torch.dtype, tuple[int, int]]] = {}
    pieces: dict[str, list[_Piece]] = {}
    for linear in linears:
        address = checkpoint.find(linear)
        weight = checkpoint.read(address)
        nbytes = weight.nbytes
        if linear in able:
            two = _packed_pieces(checkpoint, address.tensor, weight)
            if (smaller := sum(piece.nbytes for piece in two)) < nbytes:
                weights[address.tensor] = weight.dtype, (weight.shape[0], weight.shape[1])
                pieces[address.tensor], nbytes = two, smaller
        count, dense, packed = count + weight.numel(), dense + weight.nbytes, packed + nbytes
    _rewrite(checkpoint, target, pieces, Packing(weights))
    return Sizes(count, dense, packed, sum(path.stat().st_size for path in target.iterdir() if path.is_file()))


def unpack_directory(source: Path, target: Path) -> None:
    """Write a packed model directory as its dense original; every weight is bit-identical."""
    packing, checkpoint = packing_of(source), Checkpoint(source)
    if packing is None:
        raise UserError(f"{source}: no packed directory, expected one of `wanda-dvc export --format packed`")
    pieces: dict[str, list[_Piece]] = {}
    for name, (dtype, (rows, columns)) in packing.weights.items():
        for tensor in (name, name + KEEP):
            if tensor not in checkpoint.where:
                raise UserError(f"{source}: no tensor {tensor}, which config.json names; {AGAIN}")
        restored = partial(_restored, packing, checkpoint, name)
        pieces[name] = [_Piece(name, STORED[dtype], [rows, columns], rows * columns * dtype.itemsize, restored)]
        pieces[name + KEEP] = []
    _rewrite(checkpoint, target, pieces, None)


def find_packable(checkpoint: Checkpoint) -> dict[str, Address]:
    """Return the packable linears of all blocks, by the masks' names, and the address of each.

    Each is a `torch.nn.Linear` called by its block, with a complete tensor under the parameter's name. Experts stored
    together, GPT-2's transposed weights, and weights multiplied by Mamba itself do not qualify.
    """
    dtypes = {name: dtype for dtype, name in STORED.items()}
    stored = next(dtypes[entry.dtype] for entry in checkpoint.entries.values() if entry.dtype in dtypes)
    decoder = Decoder(checkpoint, dtype=stored, device=torch.device("cpu"))  # this dtype avoids copies of weights
    names = {module: name for name, module in decoder.model.named_modules()}
    found = {}
    for index in range(len(decoder.blocks)):
        with decoder.block(index, then=-1):
            uncalled = decoder.uncalled(index)
        for name, linear in decoder.linears(index).items():
            address = Address(f"{names[linear.module]}.weight")
            own = linear.part.is_complete and linear.part.address == address
            if own and type(linear.module) in LINEARS and name not in uncalled:
                found[name] = address
    return found


def _packed_pieces(checkpoint: Checkpoint, name: str, weight: Tensor) -> "list[_Piece]":
    """Return the two tensors of a packed weight."""
    nonzeros, bits = count_nonzeros(weight), bits_shape(*weight.shape)

    def part(which: int) -> Callable[[], Tensor]:
        return lambda: pack(checkpoint.read(Address(name)))[which]

    return [
        _Piece(name, STORED[weight.dtype], [nonzeros], nonzeros * weight.itemsize, part(0)),
        _Piece(name + KEEP, "U8", bits, math.prod(bits), part(1)),
    ]


def _restored(packing: Packing, checkpoint: Checkpoint, name: str) -> Tensor:
    return packing.restore(name, checkpoint.read(Address(name)), checkpoint.read(Address(name + KEEP)))


# --- writing ---


@dataclass(frozen=True)
class _Piece:
    """A tensor to be written."""

    name: str
    dtype: str  # as safetensors names it
    shape: list[int]
    nbytes: int
    make: Callable[[], Tensor]


def _rewrite(checkpoint: Checkpoint, target: Path, pieces: dict[str, list[_Piece]], packing: Packing | None) -> None:
    """Write a checkpoint's directory with some tensors replaced, in shards of the same names.

    Copies all files but weights, index, config.json and hidden files, in which the Hub's client stores times.
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
        here: list[_Piece] = []
        for name, dtype, shape, _, length in checkpoint.bytes_at(shard):
            if name in checkpoint.entries:  # an index may omit some
                same = _Piece(name, dtype, shape, length, partial(checkpoint.read, Address(name)))
                here += pieces.get(name, [same])
        _write_shard(target / shard.name, here)
        where |= dict.fromkeys((piece.name for piece in here), shard.name)
        total += sum(piece.nbytes for piece in here)
    if (checkpoint.folder / INDEX).is_file():
        write_json(target / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))})
    config = read_object(checkpoint.folder / "config.json")
    config.pop("quantization_config", None)
    write_json(target / "config.json", config | ({"quantization_config": packing.as_json()} if packing else {}))


def _write_shard(path: Path, pieces: list[_Piece]) -> None:
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
            file.write(piece.make().contiguous().reshape(-1).view(torch.uint8).numpy().data)
