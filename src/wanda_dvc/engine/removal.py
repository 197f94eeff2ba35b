"""What a pattern removes from a model, and a view of the checkpoint without it. No family-specific code.

A finder (engine/finders.py) makes the `Removal`, and a probe (engine/probe.py) confirms it.
"""

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from wanda_dvc.catalog import Structure
from wanda_dvc.engine.checkpoint import Address, Checkpoint, EditedCheckpoint, with_fields
from wanda_dvc.errors import UserError
from wanda_dvc.pruning.units import Units, count_kept, expand, unit_index
from wanda_dvc.reading import Entry

KeptUnits = Mapping[str, Bool[Tensor, " units"]]  # masks of units, by set


class UnitDimension(NamedTuple):
    """A dimension of a stored tensor, or of one expert's matrix in it, that holds the units of a set."""

    address: Address
    dim: int
    unit_set: str
    # Places of a unit in each section of the dimension. (2,): unit 0 is places 0 and 1; (1, 1): the first place of each
    # half, as where gate and up share a tensor.
    layout: tuple[int, ...]


class UnitTensor(NamedTuple):
    """A stored tensor of one unit, whose name is the prefix, the unit's number and the suffix."""

    unit_set: str
    unit: int
    prefix: str
    suffix: str


class ConfigField(NamedTuple):
    """A field of config.json: a number in proportion to a number of units, or a list with an entry for each unit."""

    value: int | list[Any]  # of the dense model
    unit_set: str | None  # None: its value stays, and is written even if it is a default


@dataclass(frozen=True, kw_only=True)
class Removal:
    """The units to remove, the same fraction of each set; a set is one MLP's neurons, for example.

    Units are some inputs of the linears that read them (neurons, heads), or complete linears (blocks, experts).
    """

    structure: Structure
    unit_sets: Mapping[str, Units]
    config_fields: Mapping[str, ConfigField]
    consumers: Mapping[str, UnitDimension] = field(default_factory=dict)  # by linear: its inputs, which are units
    # Of all tensors. A tensor of several experts has the dimension of its experts, or dimensions of each one's matrix.
    dimensions: tuple[UnitDimension, ...] = ()
    unit_tensors: Mapping[str, UnitTensor] = field(default_factory=dict)  # by stored name
    routers: Mapping[str, str] = field(default_factory=dict)  # the experts' set, by a router's parameter or buffer
    kept_masks: KeptUnits = field(default_factory=dict)  # once they are chosen
    sets_of: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # of several patterns: the sets by pattern

    def with_kept(self, kept: KeptUnits) -> "Removal":
        """Return the removal that keeps these units, of all sets or of some."""
        chosen = {name: self.unit_sets[name]._replace(kept=int(mask.sum())) for name, mask in kept.items()}
        return replace(self, unit_sets={**self.unit_sets, **chosen}, kept_masks=kept)

    def sparsities_of(self, pattern: str) -> list[Fraction]:
        """Return the fractions of the units of a pattern that may be removed, from 0 on; of a missing pattern, 0."""
        sets = [self.unit_sets[name] for name in self.sets_of.get(pattern, ())]
        widest = max(sets, key=lambda units: units.total, default=Units(1, 1))
        kept = sorted({widest.total, *range(widest.step, widest.total, widest.step)}, reverse=True)
        return [1 - Fraction(number, widest.total) for number in kept]

    def with_sparsity(self, pattern: str, sparsity: Fraction) -> "Removal":
        """Return the removal of the same fraction of the units of each set of a pattern."""
        changed = {}
        for name in self.sets_of.get(pattern, ()):
            units = self.unit_sets[name]
            changed[name] = units._replace(kept=count_kept(units.total, sparsity, units.step))
        return replace(self, unit_sets={**self.unit_sets, **changed})

    @property
    def config_changes(self) -> dict[str, Any]:
        """The new values in the configuration; those of lists once units are chosen."""
        values: dict[str, Any] = {}
        for name, (value, unit_set) in self.config_fields.items():
            if unit_set is None:
                values[name] = value
            elif isinstance(value, int):
                total = self.unit_sets[unit_set].total
                alike = next((names for names in self.sets_of.values() if unit_set in names), (unit_set,))
                # No units are kept of a set in a removed block. Sets of other blocks have the same number.
                kept = max(self.unit_sets[x].kept for x in alike if self.unit_sets[x].total == total)
                values[name] = value * (kept or total) // total
            elif self.kept_masks:
                values[name] = list(itertools.compress(value, self.kept_masks[unit_set].tolist()))
        return values

    @property
    def sparsity(self) -> float:
        """The fraction of the units that is removed."""
        kept = sum(units.kept for units in self.unit_sets.values())
        return 1 - kept / sum(units.total for units in self.unit_sets.values())

    def describe(self, sparsity: Fraction) -> str:
        """Describe the removal before units are chosen, and the rounding of the requested sparsity."""
        numbers = [
            f"{name} from {self.config_fields[name].value} to {value}"
            for name, value in self.config_changes.items()
            if self.config_fields[name].unit_set is not None
        ]
        text = f"pattern {self.structure.name}: {', '.join(numbers)}"
        if abs(self.sparsity - sparsity) > 1e-9:
            text += f"; rounded: {self.sparsity:.4g} instead of {float(sparsity):g}"
        return text

    @cached_property
    def dimensions_of(self) -> Mapping[str, list[UnitDimension]]:
        """The dimensions with units of each linear, or other tensor, by its name in masks.

        Of a tensor of several experts, the tensor's name has the dimension of the experts; a name with an expert's
        number has dimensions of this expert's matrix.
        """
        dimensions: dict[str, list[UnitDimension]] = {}
        for dimension in self.dimensions:
            dimensions.setdefault(dimension.address.linear, []).append(dimension)
        return dimensions

    @cached_property
    def _unit_of(self) -> dict[str, tuple[str, int]]:
        """The set and the number of the unit that each linear belongs to, for blocks and experts."""
        unit_of = dict[str, tuple[str, int]]()
        for name, units in self.unit_sets.items():
            for unit, linears in enumerate(units.members):
                unit_of |= dict.fromkeys(linears, (name, unit))
        return unit_of

    def kept_units(self, masks: Mapping[str, Tensor]) -> dict[str, Bool[Tensor, " units"]]:
        """Return the kept units, by set, from the masks of the linears that read them, or that they are."""
        kept = {name: torch.zeros(units.total, dtype=torch.bool) for name, units in self.unit_sets.items()}
        for linear in masks:
            if linear in self.consumers:
                dimension = self.consumers[linear]
                units = self.unit_sets[dimension.unit_set]
                inputs = masks[linear].any(dim=1 - dimension.dim)
                kept[dimension.unit_set][unit_index(units.total, units.layout)[inputs]] = True
            if linear in self._unit_of:
                name, unit = self._unit_of[linear]
                kept[name][unit] |= masks[linear].any()
        return kept

    def expand_masks(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return masks, on the host, without all weights of removed units, given the masks of the units' consumers."""
        expanded = {linear: mask.cpu() for linear, mask in masks.items()}
        kept = {**self.kept_units(expanded), **self.kept_masks}
        for linear in expanded:
            if linear in self._unit_of:
                name, unit = self._unit_of[linear]
                expanded[linear] = expanded[linear] & kept[name][unit]
            for dimension in self.dimensions_of.get(linear, ()):
                expanded[linear] = expanded[linear] & dimension_mask(dimension, kept)
        return expanded

    def renumbered(self, tensors: Iterable[str]) -> dict[str, str]:
        """Return the stored tensors of the smaller model, with consecutive units, and the source's tensor of each."""
        sources = {}
        for tensor in tensors:
            if tensor not in self.unit_tensors:
                sources[tensor] = tensor
                continue
            unit_set, unit, prefix, suffix = self.unit_tensors[tensor]
            kept = self.kept_masks[unit_set]
            if unit >= len(kept) or kept[unit]:  # blocks after the last one, for multi-token prediction, stay
                sources[f"{prefix}{unit - int((~kept[:unit]).sum())}{suffix}"] = tensor
        return sources


def dimension_mask(dimension: UnitDimension, kept: KeptUnits) -> Bool[Tensor, "..."]:
    """Return the mask of a dimension, [in] or [out, 1], which broadcasts over the tensor."""
    mask = expand(kept[dimension.unit_set], dimension.layout)
    return mask[:, None] if dimension.dim == 0 else mask


def refused(structure: Structure, source: Checkpoint, why: str) -> UserError:
    """Return the error that a model does not support a pattern, with the reason."""
    problem = f"got {structure.name}, which {source} does not support: {why}"
    return UserError(f"pattern: {problem}; choose another pattern or sparsity")


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
        # The tensors whose experts' matrices have dimensions with units; that of expert 0 is named for all.
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
