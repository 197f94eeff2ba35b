"""stats/ and masks/ on disk: one safetensors file per block, so that one block at a time is in memory."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from wanda_dvc.errors import UserError
from wanda_dvc.study.files import Json

if TYPE_CHECKING:
    from torch import Tensor

    from wanda_dvc.pruning.statistics import BlockStats


def block_file(folder: Path, block: int) -> Path:
    """Return the path of one block's file."""
    return folder / f"block_{block:03d}.safetensors"


def write_stats(folder: Path, block: int, stats: "BlockStats") -> None:
    """Write one block's statistics.

    Tensors, for each distinct input: `NAME.sum_squares` and `NAME.sum` (float64 [in]) and `NAME.count` (int64). Header:
    the linears that read each input, and the linears whose weights are stored transposed.
    """
    import torch

    tensors: dict[str, Tensor] = {}
    for name, x in stats.inputs.items():
        tensors |= {f"{name}.sum_squares": x.sum_squares, f"{name}.sum": x.sum, f"{name}.count": torch.tensor(x.count)}
    header = {"readers": stats.readers, "transposed": stats.transposed}
    _save(block_file(folder, block), tensors, header)


def read_stats(folder: Path, block: int) -> "BlockStats":
    """Read one block's statistics."""
    from wanda_dvc.pruning.statistics import BlockStats, InputStats

    tensors, header = _load(block_file(folder, block), "calibrate")
    readers = header["readers"]
    inputs = {
        name: InputStats(tensors[f"{name}.sum_squares"], tensors[f"{name}.sum"], int(tensors[f"{name}.count"]))
        for name in readers
    }
    return BlockStats(inputs, readers, header["transposed"])


def write_masks(folder: Path, block: int, keeps: "dict[str, Tensor]") -> None:
    """Write one block's `keep` masks (bool, in the orientation of the stored weights), one bit a weight.

    Tensors: uint8 [rows, ⌈columns / 8⌉] for each linear, the first column in the highest bit. Header: the columns.
    """
    import numpy as np
    import torch

    packed = {name: torch.from_numpy(np.packbits(keep.cpu().numpy(), axis=1)) for name, keep in keeps.items()}
    columns = {name: keep.shape[1] for name, keep in keeps.items()}
    _save(block_file(folder, block), packed, {"columns": columns})


def read_masks(folder: Path, block: int) -> "Masks":
    """Read one block's `keep` masks: bool, in the orientation of the stored weights."""
    tensors, header = _load(block_file(folder, block), "mask")
    return Masks(tensors, header["columns"])


class Masks(Mapping[str, "Tensor"]):
    """The `keep` masks of one block. A mask is unpacked when it is asked for; until then it is one bit on disk."""

    def __init__(self, packed: "dict[str, Tensor]", columns: dict[str, int]) -> None:
        self._packed, self._columns = packed, columns

    def __getitem__(self, name: str) -> "Tensor":
        import numpy as np
        import torch

        packed = self._packed[name].numpy()
        return torch.from_numpy(np.unpackbits(packed, axis=1, count=self._columns[name]).view(np.bool_))

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)


def block_count(folder: Path) -> int:
    """Return the number of blocks in a folder."""
    return len(list(folder.glob("block_*.safetensors")))


def _save(path: Path, tensors: "dict[str, Tensor]", header: Json) -> None:
    from safetensors.torch import save_file

    """Write tensors and a header to a safetensors file, beside its place, then rename it."""
    beside = path.with_name(path.name + ".part")
    # A single key: safetensors writes several keys in an order that changes from run to run.
    save_file(tensors, beside, {"wanda_dvc": json.dumps(header)})
    beside.replace(path)


def _load(path: Path, made_by: str) -> "tuple[dict[str, Tensor], Json]":
    """Read the tensors and the header of a safetensors file. UserError if it is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["wanda_dvc"])
    except FileNotFoundError:
        raise UserError(f"{path}: not there; run `dvc repro` or `wanda-dvc {made_by}` first") from None
    except (SafetensorError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error}); run `wanda-dvc {made_by}` again") from None
