"""Loads a model's weights: all outside blocks, and of one block at a time."""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn

from wanda_dvc.engine.accelerator import Copies
from wanda_dvc.engine.checkpoint import Checkpoint
from wanda_dvc.engine.structure import Linear, find_blocks, find_linears, find_slices, find_weights, unsupported


@dataclass(frozen=True)
class WeightChange:
    """Masks and new weights of one block, by linear. Two changes are equal if one is a copy of the other."""

    masks: Mapping[str, Tensor] = field(compare=False)  # True is kept
    weights: Mapping[str, Tensor] = field(compare=False)  # oriented as stored
    id: str = field(default_factory=lambda: uuid4().hex)


class BlockLoader:
    """Loads weights into an empty model. A block has weights while it is loaded, and is empty otherwise.

    While a block is loaded, a thread reads the next block; on a GPU it copies through a separate CUDA stream.
    """

    def __init__(self, model: Any, checkpoint: Checkpoint, *, device: torch.device) -> None:
        """Read all weights outside blocks."""
        self.model, self.checkpoint, self.device = model, checkpoint, device
        self.blocks_name, self.blocks = find_blocks(model)
        self.slices = find_slices(model, checkpoint)  # by parameter
        self._empty = [
            {f"{self.blocks_name}.{index}.{name}": parameter for name, parameter in block.named_parameters()}
            for index, block in enumerate(self.blocks)
        ]
        self._reader = ThreadPoolExecutor(max_workers=1)
        self._copies = Copies(device)
        self._read_ahead: dict[int, Future[dict[str, Tensor]]] = {}  # at most the next block
        self._loaded: tuple[int, int, WeightChange | None] | None = None  # the arguments of `load`
        self._load_outside_blocks()

    def _load_outside_blocks(self) -> None:
        """Load the parameters outside blocks, and all buffers, which are small.

        A tied head is the embeddings' parameter, unless both are stored and differ: then they are separate, for any
        configuration, as in transformers.
        """
        aliases_of: dict[int, list[str]] = {}  # the names of each parameter
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if not name.startswith(f"{self.blocks_name}."):
                aliases_of.setdefault(id(parameter), []).append(name)
        for aliases in aliases_of.values():
            stored = [name for name in aliases if name in self.slices]
            tensors = self._read(dict.fromkeys(stored, self.model.get_parameter(stored[0])))
            first = nn.Parameter(tensors[stored[0]], requires_grad=False)
            for alias in aliases:
                tensor = tensors.get(alias, first)
                set_parameter(self.model, alias, first if torch.equal(tensor, first) else tensor)
        for name, buffer in self.model.named_buffers(remove_duplicate=False):
            module, _, leaf = name.rpartition(".")
            if name in self.slices:  # few: the bias by which some routers balance their experts
                buffer = self.checkpoint.read(self.slices[name][0].address).to(buffer.dtype)
            self.model.get_submodule(module)._buffers[leaf] = buffer.to(self.device)

    def linears(self, index: int) -> dict[str, Linear]:
        """Return the prunable weights of a block by stored name; each expert has its own."""
        block, prefix = self.blocks[index], f"{self.blocks_name}.{index}."
        linears, weights = find_linears(block, prefix, self.slices), find_weights(block)
        largest = max((linear.weight.numel() for linear in linears.values()), default=0)
        for name, parameter in block.named_parameters():
            if name not in weights and parameter.dim() > 1 and parameter.numel() > largest:
                raise unsupported(self.checkpoint, f"{prefix}{name} belongs to no linear, and is larger than any")
        if not linears:
            raise unsupported(self.checkpoint, f"{prefix[:-1]} has no linear")
        return linears

    def load(self, index: int, then: int, change: WeightChange | None = None) -> None:
        """Load a block, with a change of its weights, until another block or change is loaded, or `unload`.

        `then` is the block that follows; −1: there is no such block. A change applies to a copy of the parameters.
        """
        if self._loaded == (index, then, change):
            return
        if self._loaded != (index, then, None):  # another block, or this one with another change
            self.unload()
            ahead = self._read_ahead.pop(index, None)
            if then not in self._read_ahead:
                self._read_ahead.clear()  # frees memory before the next read
            tensors = ahead.result() if ahead else self.read_block(index)
            self._copies.finish(tensors.values())
            if 0 <= then < len(self.blocks) and then not in self._read_ahead:
                self._read_ahead[then] = self._reader.submit(self.read_block, then)
            for name, tensor in tensors.items():
                set_parameter(self.model, name, tensor)
            self._loaded = index, then, None
        if change is not None:
            # Until it is done, a change that no caller has: if memory ends on the way, the next call loads again.
            self._loaded = index, then, WeightChange({}, {})
            self._apply(index, change)
            self._loaded = index, then, change

    def unload(self) -> None:
        """Empty the loaded block, if any."""
        if self._loaded is not None:
            for name, parameter in self._empty[self._loaded[0]].items():
                set_parameter(self.model, name, parameter)
        self._loaded = None

    @torch.no_grad()
    def _apply(self, index: int, change: WeightChange) -> None:
        """Zero the weights outside the masks; then set the new weights."""
        linears = self.linears(index)
        changed = [linears[name] for name in (*change.masks, *change.weights)]
        for module, leaf in {(linear.module, linear.leaf) for linear in changed}:
            set_parameter(module, leaf, module.get_parameter(leaf).clone())
        for name, mask in change.masks.items():
            if name not in change.weights:
                linears[name].weight.mul_(mask.to(self.device))
        for name, weight in change.weights.items():
            linears[name].weight.copy_(weight)

    def read_block(self, index: int) -> dict[str, Tensor]:
        """Return a block's tensors from the checkpoint. On a GPU the loaded block does not wait for the copy."""
        with self._copies.on_stream():
            return self._read(self._empty[index])

    def _read(self, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        """Return tensors for parameters by full name, in the parameter's dtype, on the device.

        On a CPU, a tensor stored as one slice in this dtype is a view of the file. All others are copies.
        """
        tensors = {}
        for name, parameter in parameters.items():
            slices = self.slices[name]
            tensor = self.checkpoint.read(slices[0].address)
            is_usable = slices[0].is_complete and tensor.device == self.device and tensor.dtype is parameter.dtype
            if not is_usable:
                tensor = torch.empty(parameter.shape, dtype=parameter.dtype, device=self.device)
                for part in slices:
                    self._copies.copy(self.checkpoint.read(part.address), part.of(tensor))
            tensors[name] = tensor
        return tensors


def set_parameter(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Set a parameter of a module, by its name relative to the module."""
    owner, _, leaf = name.rpartition(".")
    parameter = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
    module.get_submodule(owner)._parameters[leaf] = parameter
