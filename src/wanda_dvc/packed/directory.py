"""Writes a model directory packed, and a packed one dense again. Tensors are read and written one at a time."""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from wanda_dvc.engine.checkpoint import STORED, Address, Checkpoint
from wanda_dvc.engine.decoder import Decoder
from wanda_dvc.engine.rewriting import Configuration, Piece, rewrite
from wanda_dvc.errors import UserError
from wanda_dvc.packed.format import KEEP, Packing, bits_shape, checksum, count_nonzeros, pack, packing_of
from wanda_dvc.pruning import products

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
    pieces: dict[str, list[Piece]] = {}
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
    sums: dict[str, int] = {}
    rewrite(
        checkpoint,
        target,
        pieces,
        partial(_configured, Packing(weights, sums)),
        progress=lambda piece, tensor: sums.update({piece.name: checksum(tensor)}),
    )
    return Sizes(count, dense, packed, sum(path.stat().st_size for path in target.iterdir() if path.is_file()))


def unpack_directory(source: Path, target: Path, *, without: Collection[str] = ()) -> None:
    """Write a packed model directory as its dense original; every weight is bit-identical.

    Other files are copied, except those named in `without`.
    """
    packing, checkpoint = packing_of(source), Checkpoint(source)
    if packing is None:
        raise UserError(f"{source}: no packed directory, expected one of `wanda-dvc export --format packed`")
    packing.check_files(checkpoint.shards)
    pieces: dict[str, list[Piece]] = {}
    for name, (dtype, (rows, columns)) in packing.weights.items():
        restored = partial(_restored, packing, checkpoint, name)
        pieces[name] = [Piece(name, STORED[dtype], [rows, columns], rows * columns * dtype.itemsize, restored)]
        pieces[name + KEEP] = []
    rewrite(checkpoint, target, pieces, partial(_configured, None), without=without)


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


def _packed_pieces(checkpoint: Checkpoint, name: str, weight: Tensor) -> "list[Piece]":
    """Return the two tensors of a packed weight."""
    nonzeros, bits = count_nonzeros(weight), bits_shape(*weight.shape)

    def part(which: int) -> Callable[[], Tensor]:
        return lambda: pack(checkpoint.read(Address(name)))[which]

    return [
        Piece(name, STORED[weight.dtype], [nonzeros], nonzeros * weight.itemsize, part(0)),
        Piece(name + KEEP, "U8", bits, math.prod(bits), part(1)),
    ]


def _restored(packing: Packing, checkpoint: Checkpoint, name: str) -> Tensor:
    return packing.restore(name, checkpoint.read(Address(name)), checkpoint.read(Address(name + KEEP)))


def _configured(packing: Packing | None, config: Configuration) -> Configuration:
    """Return a config.json with this packing, or without one."""
    config.pop("quantization_config", None)
    return config | ({"quantization_config": packing.as_json()} if packing else {})
