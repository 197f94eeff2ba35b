"""A view of a checkpoint without the units that a pattern removes."""

import math
from collections.abc import Callable, Collection
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from wanda_dvc.engine.checkpoint import Address, Checkpoint, EditedCheckpoint, with_fields
from wanda_dvc.engine.removal import Removal, UnitDimension
from wanda_dvc.pruning.units import expand
from wanda_dvc.reading import Entry


class SmallerCheckpoint(EditedCheckpoint):
    """A view of a checkpoint without removed units: smaller tensors, and a configuration to match."""

    def __init__(
        self,
        source: Checkpoint,
        removal: Removal,
        read: Callable[[Address], Tensor] | None = None,
        replaced: Collection[Address] = (),
    ) -> None:
        super().__init__(source, read or source.read, replaced)
        self.removal = removal
        self.config_changes = removal.config_changes
        self.source_names = removal.renumbered(source.file_of)
        # The tensors that hold the matrices of several experts, with dimensions that have units.
        self._stacked = {dimension.address.tensor for dimension in removal.dimensions if dimension.address.expert == 0}

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """Dtype, shape and length of each tensor; places in files are the source's."""
        entries = {}
        for name, source_name in self.source_names.items():
            entry, shape = self.source.entries[source_name], list(self.source.entries[source_name].shape)
            address, expert_axes = Address(source_name), 0
            if source_name in self._stacked:  # [experts, out, in]
                address, expert_axes = Address(source_name, 0), 1
            for dimension in self.removal.dimensions_of.get(address.linear, ()):
                kept = self.removal.unit_sets[dimension.unit_set].kept
                shape[expert_axes + dimension.dim] = sum(dimension.layout) * kept
            length = entry.length * math.prod(shape) // max(1, math.prod(entry.shape))
            entries[name] = entry._replace(shape=shape, length=length)
        return entries

    @property
    def config(self) -> Any:
        """The configuration with the new numbers of units."""
        return with_fields(self.source.config, self.config_changes)

    def read(self, address: Address) -> Tensor:
        """Return the tensor, or one expert's matrix in it, without removed units."""
        name, expert = self.source_names[address.tensor], address.expert
        if expert is None and name in self._stacked:  # some units of each expert's matrix are removed
            experts = range(self.source.entries[name].shape[0])
            return torch.stack([self.read(Address(address.tensor, expert)) for expert in experts])
        dimensions_of = self.removal.dimensions_of
        of_tensor = dimensions_of.get(Address(name).linear, [])
        if expert is not None and of_tensor:  # some experts of the tensor are removed
            expert = int(self._kept_indices(of_tensor[0])[expert])
        source = Address(name, expert)
        tensor = self._read(source)
        for dimension in dimensions_of.get(source.linear, []):
            tensor = tensor.index_select(dimension.dim, self._kept_indices(dimension).to(tensor.device))
        return tensor

    def _kept_indices(self, dimension: UnitDimension) -> Int[Tensor, " kept"]:
        return expand(self.removal.kept_masks[dimension.unit_set], dimension.layout).nonzero()[:, 0]
