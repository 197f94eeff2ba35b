"""What the files of stats/, masks/, weights/ and reference/ hold: one file a block or window, for one at a time."""

from collections import UserDict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wanda_dvc.plan import GRAM_DTYPE
from wanda_dvc.pruning.gram import Gram
from wanda_dvc.pruning.selection import pack_bits, unpack_bits
from wanda_dvc.pruning.statistics import BlockStats, InputStats, TokenSum, UnitCosts
from wanda_dvc.study.artifact import block_file, load_tensors, save_tensors
from wanda_dvc.study.files import Json


def write_stats(folder: Path, block: int, stats: BlockStats) -> None:
    """Write one block's statistics.

    Tensors, for each distinct input: `NAME.sum_squares` and `NAME.sum` (float64 [in]) and `NAME.count` (int64). For the
    last linear of each expert: `LINEAR.outputs` (float64 [2]), Σ ‖gate · output‖₂ and the number of tokens. Header: the
    linears that read each input, and the linears whose weights are stored transposed.
    """
    tensors: dict[str, Tensor] = {}
    for name, x in stats.inputs.items():
        tensors[f"{name}.sum_squares"] = x.sum_squares
        tensors[f"{name}.sum"] = x.sum
        tensors[f"{name}.count"] = torch.tensor(x.count)
    for linear, outputs in stats.outputs.items():
        tensors[f"{linear}.outputs"] = torch.tensor([outputs.sum, outputs.count], dtype=torch.float64)
    save_tensors(block_file(folder, block), tensors, {"consumers": stats.consumers, "transposed": stats.transposed})


def read_stats(folder: Path, block: int, *, fisher: Path | None = None) -> BlockStats:
    """Read one block's statistics; from the folder `fisher`, if given, its sums of squared gradients too."""
    tensors, header = load_tensors(block_file(folder, block), "calibrate")
    consumers: dict[str, list[str]] = header["consumers"]
    inputs, outputs = {}, {}
    for name, linears in consumers.items():
        count = int(tensors[f"{name}.count"])
        inputs[name] = InputStats(tensors[f"{name}.sum_squares"], tensors[f"{name}.sum"], count)
        for linear in linears:
            if f"{linear}.outputs" in tensors:
                total, tokens = tensors[f"{linear}.outputs"]
                outputs[linear] = TokenSum(total, int(tokens))
    squared_gradients = read_fisher(fisher, block)[0] if fisher else {}
    return BlockStats(inputs, consumers, header["transposed"], squared_gradients, outputs)


class Grams(UserDict[str, Any]):
    """The Gram matrices of one block, as their file has them; each is unpacked at access, onto a device.

    Inputs without tokens are missing.
    """

    def __init__(self, tensors: Mapping[str, Tensor], header: Json, device: torch.device | None) -> None:
        super().__init__()
        self.transposed: list[str] = header.get("transposed", [])
        self.device = device
        self.input_of: dict[str, str] = {}  # by linear
        for name, linears in header.get("consumers", {}).items():
            self.input_of |= dict.fromkeys(linears, name)
            if f"{name}.triangle" in tensors:
                self.data[name] = tensors[f"{name}.triangle"], tensors.get(f"{name}.norm")

    def __getitem__(self, name: str) -> Gram:
        triangle, norm = self.data[name]
        return Gram.from_triangle(triangle.to(self.device), None if norm is None else norm.to(self.device))


def write_grams(folder: Path, block: int, stats: BlockStats, grams: Mapping[str, Gram], *, exact: bool = False) -> None:
    """Write one block's Gram matrices of inputs, or of gradients by linear.

    `stats` has the consumers of each input; a linear of gradients is its own consumer.

    Tensors, for each distinct input or linear: `NAME.norm` (float32 [in]) and `NAME.triangle` (float16: of XᵀX
    with every feature divided by its norm, packed by `Gram.triangle`). Numbers in the triangle are at most 1, so
    float16 holds each to 11 bits or to 6e-8. Of the statistics `fisher` also `LINEAR.sum_squares` (float64 [out]) and
    `LINEAR.costs_of_N` of N units (float64 [N]). Header: as of `write_stats`.

    With `exact`, of a block recorded while the pruned model runs: no norms, and triangles of XᵀX itself in float32.
    """
    tensors: dict[str, Tensor] = {}
    for linear, squared_gradients in stats.fisher.items():
        tensors[f"{linear}.sum_squares"] = squared_gradients
    for linear, costs in stats.unit_costs.items():
        tensors |= {f"{linear}.costs_of_{units}": of_units for units, of_units in costs.items()}
    for name, gram in grams.items():
        if exact:
            triangle = gram.triangle()
        else:
            norm, triangle = gram.scaled_triangle()
            tensors[f"{name}.norm"] = norm.cpu()
            triangle = triangle.to(getattr(torch, GRAM_DTYPE))
        tensors[f"{name}.triangle"] = triangle.cpu()
    save_tensors(block_file(folder, block), tensors, {"consumers": stats.consumers, "transposed": stats.transposed})


def read_grams(
    folder: Path, block: int, device: torch.device | None = None, *, of: Collection[str] | None = None
) -> Grams:
    """Read one block's Gram matrices `of` some distinct inputs or linears, or of all, onto a device, or the host."""
    is_read = None if of is None else lambda name: name.rpartition(".")[0] in of
    tensors, header = load_tensors(block_file(folder, block), "calibrate", is_read)
    return Grams(tensors, header, device)


def read_fisher(folder: Path, block: int) -> tuple[dict[str, Tensor], dict[str, UnitCosts]]:
    """Read one block's sums of squared gradients, and its costs of the units that a linear reads, each by linear."""
    squares, costs = dict[str, Tensor](), dict[str, UnitCosts]()
    of_matrices = (".norm", ".triangle")
    tensors, _ = load_tensors(block_file(folder, block), "calibrate", lambda name: not name.endswith(of_matrices))
    for name, values in tensors.items():
        linear, _, kind = name.rpartition(".")
        if kind == "sum_squares":
            squares[linear] = values
        else:
            costs.setdefault(linear, {})[int(kind.removeprefix("costs_of_"))] = values
    return squares, costs


class Masks(UserDict[str, Any]):
    """The masks of a block or a model, one bit a weight, with their columns; each is unpacked at access.

    A mask is bool, in the orientation of the stored weight; True is kept.
    """

    def __getitem__(self, name: str) -> Tensor:
        return self.on("cpu", name)

    def on(self, device: torch.device | str, name: str) -> Tensor:
        """Return a mask on a device, to which one bit a weight is sent."""
        bits, columns = self.data[name]
        return unpack_bits(bits.to(device), columns)


def pack_masks(masks: Mapping[str, Tensor]) -> Masks:
    """Return masks (bool, in the orientation of the stored weights) as one bit a weight, on the host."""
    return Masks({name: (pack_bits(mask).cpu(), mask.shape[1]) for name, mask in masks.items()})


def write_masks(folder: Path, block: int, masks: Masks) -> None:
    """Write one block's masks.

    Tensors: uint8 [rows, ⌈columns / 8⌉] for each linear, the first column in the highest bit. Header: the columns.
    """
    tensors = {name: bits for name, (bits, _) in masks.data.items()}
    columns = {name: count for name, (_, count) in masks.data.items()}
    save_tensors(block_file(folder, block), tensors, {"columns": columns})


def read_masks(folder: Path, block: int) -> Masks:
    """Read one block's masks: bool, in the orientation of the stored weights."""
    tensors, header = load_tensors(block_file(folder, block), "mask")
    return Masks({name: (tensors[name], columns) for name, columns in header["columns"].items()})


def write_weights(folder: Path, block: int, weights: dict[str, Tensor]) -> None:
    """Write one block's new weights, named, oriented and typed as stored."""
    save_tensors(block_file(folder, block), weights, {})


def read_weights(folder: Path, block: int) -> dict[str, Tensor]:
    """Read one block's new weights."""
    return load_tensors(block_file(folder, block), "mask")[0]


def write_window(folder: Path, window: int, tensors: Mapping[str, Tensor]) -> None:
    """Write the reference of one evaluation window: the tensors of `engine.divergence.Predictions`."""
    save_tensors(_window_file(folder, window), {name: x.contiguous() for name, x in tensors.items()}, {})


def read_window(folder: Path, window: int) -> dict[str, Tensor]:
    """Read the reference of one evaluation window, in which numbers may be −∞, or not finite after a divergence."""
    tensors, _ = load_tensors(_window_file(folder, window), "perplexity dense", finite=False)
    return tensors


def _window_file(folder: Path, window: int) -> Path:
    return folder / f"window_{window:05d}.safetensors"
