"""The tiers of stats/, masks/, weights/, reference/: a file a block or window, so that one is in memory at a time."""

import itertools
from collections import UserDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wanda_dvc.plan import GRAM_DTYPE
from wanda_dvc.pruning.gram import Gram
from wanda_dvc.pruning.selection import pack_bits, unpack_bits
from wanda_dvc.pruning.statistics import BlockStats, InputStats, TokenSum
from wanda_dvc.study.artifact import block_file, load_tensors, save_tensors
from wanda_dvc.study.files import Json

GRAM = ("norm", "triangle", "count")  # the tensors of a Gram matrix
CROSS = "cross"
SUM_OF_SQUARES = "sum_squares"


def write_stats(folder: Path, block: int, stats: BlockStats) -> None:
    """Write one block's statistics.

    Tensors, for each distinct input: `NAME.sum_squares` and `NAME.sum` (float64 [in]) and `NAME.count` (int64). For the
    last linear of each expert: `LINEAR.outputs` (float64 [2]), Σ ‖gate · output‖₂ and the number of tokens. Of the
    block: `influence` (float64 [2]), Σ (1 − cosine of its input and output) and the number of tokens. Header: the
    linears that read each input, and the linears whose weights are stored transposed.
    """
    tensors: dict[str, Tensor] = {}
    for name, x in stats.inputs.items():
        tensors |= {f"{name}.sum_squares": x.sum_squares, f"{name}.sum": x.sum, f"{name}.count": torch.tensor(x.count)}
    for name, outputs in stats.outputs.items():
        tensors[f"{name}.outputs"] = torch.tensor([outputs.sum, outputs.count], dtype=torch.float64)
    if stats.influence is not None:
        tensors["influence"] = stats.influence
    save_tensors(block_file(folder, block), tensors, {"consumers": stats.consumers, "transposed": stats.transposed})


def read_stats(folder: Path, block: int, *, fisher: Path | None = None) -> BlockStats:
    """Read one block's statistics; from the folder `fisher`, if given, its sums of squared gradients too."""
    tensors, header = load_tensors(block_file(folder, block), "calibrate")
    consumers, transposed = header["consumers"], header["transposed"]
    inputs = {
        name: InputStats(tensors[f"{name}.sum_squares"], tensors[f"{name}.sum"], int(tensors[f"{name}.count"]))
        for name in consumers
    }
    outputs = {}
    for linear in itertools.chain.from_iterable(consumers.values()):
        if (pair := tensors.get(f"{linear}.outputs")) is not None:
            outputs[linear] = TokenSum(pair[0], int(pair[1]))
    of_outputs = read_fisher(fisher, block) if fisher else {}
    return BlockStats(inputs, consumers, transposed, of_outputs, outputs, tensors.get("influence"))


def write_grams(
    folder: Path, block: int, stats: BlockStats, grams: Mapping[str, Gram], crosses: Mapping[str, Tensor] | None = None
) -> None:
    """Write one block's Gram matrices of inputs, or of gradients by linear; `stats` says who reads them.

    Tensors, for each distinct input or linear: `NAME.norm` (float32 [in]), `NAME.triangle` (float16: the upper
    triangle, row by row, of XᵀX with every feature divided by its norm) and `NAME.count` (int64). Numbers in the
    triangle are at most 1, so float16 holds each to 11 bits or to 6e-8. Of the gradients tier also
    `LINEAR.sum_squares` (float64 [out]). Header: as of statistics.

    With `crosses`, of a block recorded in a walk: no norms, triangles of XᵀX itself in float32, and `NAME.cross`
    (float32 [in, in]), X_denseᵀX, where it was recorded.
    """
    tensors: dict[str, Tensor] = {f"{name}.{SUM_OF_SQUARES}": x for name, x in stats.fisher.items()}
    for name, gram in grams.items():
        if crosses is None:
            norm, triangle = gram.scaled_triangle()
            tensors[f"{name}.norm"], triangle = norm.cpu(), triangle.to(getattr(torch, GRAM_DTYPE))
        else:
            triangle = gram.triangle()
        tensors |= {f"{name}.triangle": triangle.cpu(), f"{name}.count": torch.tensor(gram.count)}
    tensors |= {f"{name}.{CROSS}": cross.float().cpu() for name, cross in (crosses or {}).items()}
    save_tensors(block_file(folder, block), tensors, {"consumers": stats.consumers, "transposed": stats.transposed})


def read_grams(
    folder: Path, block: int, device: torch.device | None = None, *, of: Iterable[str] | None = None
) -> "Grams":
    """Read one block's Gram matrices `of` some distinct inputs or linears, or of all, onto a device, or the host."""
    tensors, header = load_tensors(block_file(folder, block), "calibrate", (*GRAM, CROSS), of)
    return Grams(tensors, header, device)


def read_fisher(folder: Path, block: int) -> dict[str, Tensor]:
    """Read the sums of squared gradients of one block, by linear."""
    tensors, _ = load_tensors(block_file(folder, block), "calibrate", (SUM_OF_SQUARES,))
    return {name.removesuffix(f".{SUM_OF_SQUARES}"): x for name, x in tensors.items()}


class Grams(UserDict[str, Any]):
    """The Gram matrices of one block, as their file has them; each is unpacked at access, onto a device.

    Inputs without tokens are missing. `crosses` has X_denseᵀX by distinct input, if they were recorded.
    """

    def __init__(self, tensors: Mapping[str, Tensor], header: Json, device: torch.device | None) -> None:
        self.consumers, self.transposed, self.device = header["consumers"], header["transposed"], device
        known = [name for name in self.consumers if f"{name}.count" in tensors]
        super().__init__({name: [tensors.get(f"{name}.{kind}") for kind in GRAM] for name in known})
        crosses = {name: tensors.get(f"{name}.{CROSS}") for name in self.consumers}
        self.crosses = {name: cross.to(device) for name, cross in crosses.items() if cross is not None}

    def __getitem__(self, name: str) -> Gram:
        norm, triangle, count = self.data[name]
        norm = None if norm is None else norm.to(self.device)
        return Gram.from_triangle(triangle.to(self.device), int(count), norm)


def write_weights(folder: Path, block: int, weights: dict[str, Tensor], solved: Json) -> None:
    """Write one block's new weights, named, oriented and typed as stored; header: each linear's solver diagnostics."""
    save_tensors(block_file(folder, block), weights, {"solved": solved})


def read_weights(folder: Path, block: int) -> tuple[dict[str, Tensor], Json]:
    """Read one block's reconstructed weights, and solver diagnostics of each linear."""
    weights, header = load_tensors(block_file(folder, block), "mask")
    return weights, header["solved"]


def write_masks(folder: Path, block: int, masks: "Masks") -> None:
    """Write one block's `keep` masks.

    Tensors: uint8 [rows, ⌈columns / 8⌉] for each linear, the first column in the highest bit. Header: the columns.
    """
    columns = {name: columns for name, (_, columns) in masks.data.items()}
    save_tensors(
        block_file(folder, block), {name: bits for name, (bits, _) in masks.data.items()}, {"columns": columns}
    )


def pack_masks(keeps: Mapping[str, Tensor]) -> "Masks":
    """Return `keep` masks (bool, in the orientation of the stored weights) as one bit a weight."""
    return Masks({name: (pack_bits(keep), keep.shape[1]) for name, keep in keeps.items()})


def read_masks(folder: Path, block: int) -> "Masks":
    """Read one block's `keep` masks: bool, in the orientation of the stored weights."""
    tensors, header = load_tensors(block_file(folder, block), "mask")
    return Masks({name: (tensors[name], columns) for name, columns in header["columns"].items()})


def write_window(folder: Path, window: int, tensors: Mapping[str, Tensor]) -> None:
    """Write the reference of one evaluation window: the tensors of `engine.divergence.Predictions`."""
    save_tensors(folder / f"window_{window:05d}.safetensors", {name: x.contiguous() for name, x in tensors.items()}, {})


def read_window(folder: Path, window: int) -> dict[str, Tensor]:
    """Read the reference of one evaluation window."""
    return load_tensors(folder / f"window_{window:05d}.safetensors", "perplexity dense", finite=False)[
        0
    ]  # −∞ or diverged


class Masks(UserDict[str, Any]):
    """The `keep` masks of a block or a model, one bit a weight, with their columns; each is unpacked at access.

    A mask is bool, in the orientation of the stored weight; True stays.
    """

    def __getitem__(self, name: str) -> Tensor:
        return unpack_bits(*self.data[name])
