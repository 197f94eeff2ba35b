"""What a pattern removes from a model, and a view of the model without it.

A finder (engine/finders.py) makes the record. A probe then compares the smaller model with the full model that computes
without the units; a structure that fails is refused. No family-specific code.
"""

import gc
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from wanda_dvc.catalog import Structure
from wanda_dvc.engine.checkpoint import Address, Checkpoint, EditedCheckpoint, text_key
from wanda_dvc.engine.decoder import Decoder
from wanda_dvc.engine.load import WeightChange
from wanda_dvc.engine.sequences import TokenSequence
from wanda_dvc.errors import UserError
from wanda_dvc.pruning.units import Units, expand, unit_index
from wanda_dvc.reading import Entry

TOKENS = 32  # of the probe
PRODUCTS = ("linear", "matmul", "__matmul__", "mm", "bmm")  # by a router's weight
KeptUnits = Mapping[str, Bool[Tensor, " units"]]  # the units that stay, by set


class CutDimension(NamedTuple):
    """A dimension of a stored tensor, or of an expert's part of it, that holds the units of a set."""

    address: Address
    dim: int
    units: str  # the set
    layout: tuple[int, ...]  # as `Units.layout`


class ConfigField(NamedTuple):
    """A field of config.json: a number of units, or a number in proportion to it."""

    before: int
    sets: tuple[str, ...]  # that it counts the units of; (): it is written with its value, which may be a default


@dataclass(frozen=True, kw_only=True)
class Removal:
    """The units that go, in sets from which the same share goes; a set is one MLP's neurons, for example.

    Units are some inputs of the linears that read them (neurons, heads), or complete linears (blocks, experts).
    """

    structure: Structure
    sets: Mapping[str, Units]
    fields: Mapping[str, ConfigField]
    lists: Mapping[str, list[Any]] = field(default_factory=dict)  # fields with an entry for each unit of the only set
    consumers: Mapping[str, CutDimension] = field(default_factory=dict)  # by linear: its inputs, which are units
    cuts: tuple[CutDimension, ...] = ()  # of all tensors
    # The stored tensors of one unit, by name, HEAD UNIT TAIL: the set, the unit, the head and the tail.
    numbered: Mapping[str, tuple[str, int, str, str]] = field(default_factory=dict)
    routers: Mapping[str, str] = field(default_factory=dict)  # the experts' set, by a router's parameter or buffer
    close: float = 1e-2  # the allowed difference in the probe, relative to the effect of the units that go
    kept: KeptUnits = field(default_factory=dict)  # once they are chosen

    def with_kept(self, kept: KeptUnits) -> "Removal":
        """Return the removal that leaves these units."""
        sets = {name: units._replace(stay=int(kept[name].sum())) for name, units in self.sets.items()}
        return replace(self, sets=sets, kept=kept)

    # --- config.json ---

    @property
    def changes(self) -> dict[str, Any]:
        """The new values in the configuration; those of lists once units are chosen."""
        found: dict[str, Any] = {}
        for name, (before, sets) in self.fields.items():
            units = self.sets[sets[0]] if sets else Units(1, 1)
            found[name] = before * units.stay // units.total
        for kept in self.kept.values():
            for name, row in self.lists.items():
                found[name] = [x for x, stay in zip(row, kept.tolist(), strict=True) if stay]
        return found

    @property
    def sparsity(self) -> float:
        """The share of the units that go."""
        return 1 - sum(units.stay for units in self.sets.values()) / sum(units.total for units in self.sets.values())

    def about(self, sparsity: Fraction) -> str:
        """Describe the removal, and the rounding of the requested share."""
        after = self.changes
        numbers = [f"{name} from {one.before} to {after[name]}" for name, one in self.fields.items() if one.sets]
        text = f"pattern {self.structure.name}: {', '.join(numbers)}"
        if (groups := max(units.groups for units in self.sets.values())) > 1:
            text += f", the same number from each of {groups} groups"
        if abs(self.sparsity - sparsity) > 1e-9:
            text += f"; rounded: {self.sparsity:.4g} instead of {float(sparsity):g}"
        return text

    # --- masks ---

    @cached_property
    def cuts_of(self) -> Mapping[str, list[CutDimension]]:
        """The cuts of each linear, or other tensor, by its name in masks."""
        found: defaultdict[str, list[CutDimension]] = defaultdict(list)
        for cut in self.cuts:
            found[cut.address.linear].append(cut)
        return dict(found)

    @cached_property
    def _unit_of(self) -> dict[str, tuple[str, int]]:
        """The set and the unit of each linear that belongs to a unit."""
        found = dict[str, tuple[str, int]]()
        for name, units in self.sets.items():
            for unit, linears in enumerate(units.members):
                found |= dict.fromkeys(linears, (name, unit))
        return found

    def kept_in(self, keeps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the units that stay, by set, from the masks of the linears that read them, or that they are."""
        found: dict[str, Tensor] = {}
        for linear in keeps:
            if linear in self.consumers:
                cut = self.consumers[linear]
                units = self.sets[cut.units]
                found[cut.units] = torch.zeros(units.total, dtype=torch.bool)
                found[cut.units][unit_index(units.total, units.layout)[keeps[linear].any(dim=1 - cut.dim)]] = True
            elif linear in self._unit_of:
                name, unit = self._unit_of[linear]
                stay = found.setdefault(name, torch.zeros(self.sets[name].total, dtype=torch.bool))
                stay[unit] |= keeps[linear].any()
        return found

    def expand(self, keeps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return masks, on the host, without all weights of units that go, given the masks of the units' readers."""
        keeps = {linear: keep.cpu() for linear, keep in keeps.items()}
        kept = self.kept or self.kept_in(keeps)
        for linear, keep in keeps.items():
            if linear in self._unit_of:
                name, unit = self._unit_of[linear]
                keeps[linear] = keep & kept[name][unit]
            for cut in self.cuts_of.get(linear, ()):
                keeps[linear] = keeps[linear] & self.along(cut, kept)
        return keeps

    def along(self, cut: CutDimension, kept: KeptUnits) -> Tensor:
        """Return which places of a cut's dimension stay, in a form that broadcasts over the tensor."""
        stay = expand(kept[cut.units], cut.layout)
        return stay[:, None] if cut.dim == 0 else stay

    # --- stored tensors ---

    def names(self, where: Iterable[str]) -> dict[str, str]:
        """Return the stored tensors of the smaller model, with consecutive units, and the source's tensor of each."""
        names = {}
        for name in where:
            if name not in self.numbered:
                names[name] = name
                continue
            units, unit, head, tail = self.numbered[name]
            before = self.kept[units][:unit]
            if self.kept[units][unit : unit + 1].all():  # also of a block after the last one, which predicts more
                names[f"{head}{unit - int((~before).sum())}{tail}"] = name
        return names


def refused(structure: Structure, source: Checkpoint, why: str) -> UserError:
    """Return the error that a model does not support a pattern, with the reason."""
    return UserError(
        f"pattern: got {structure.name}, which {source} does not support: {why}; choose another pattern or sparsity"
    )


# --- the view ---


class SmallerCheckpoint(EditedCheckpoint):
    """A view of a checkpoint without the units that go: smaller tensors, and a configuration to match."""

    def __init__(
        self,
        source: Checkpoint,
        removal: Removal,
        read: Callable[[Address], Tensor] | None = None,
        replaced: Collection[Address] = (),
    ) -> None:
        super().__init__(source, read or source.read, replaced)
        self.removal, self.changes, self.old = removal, removal.changes, removal.names(source.where)
        experts = {cut.address for cut in removal.cuts if cut.address.expert is not None}
        self._experts = Counter(address.tensor for address in experts)  # by the tensor that holds them

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """Dtype, shape and length of each tensor; places in files are the source's."""
        found = {}
        for name, old in self.old.items():
            entry, experts = self.source.entries[old], self._experts[old]
            shape = list(entry.shape)
            for cut in self.removal.cuts_of.get(Address(old, 0 if experts else None).linear, ()):
                shape[cut.dim + bool(experts)] = sum(cut.layout) * self.removal.sets[cut.units].stay
            length = entry.length * math.prod(shape) // max(1, math.prod(entry.shape))
            found[name] = entry._replace(shape=shape, length=length)
        return found

    @property
    def config(self) -> Any:
        """The configuration with the new numbers of units."""
        return changed(self.source.config, self.changes)

    def read(self, address: Address) -> Tensor:
        """Return the tensor, or the expert's part of it, without the units that go."""
        old, cuts_of = self.old[address.tensor], self.removal.cuts_of
        whole = cuts_of.get(Address(old).linear, [])  # of an expert's part: some experts of the tensor go
        if address.expert is not None:
            expert = int(self._kept(whole[0])[address.expert]) if whole else address.expert
            return self._cut(self._read(Address(old, expert)), cuts_of.get(Address(old, expert).linear, []))
        if experts := self._experts[old]:
            return torch.stack([self.read(Address(address.tensor, expert)) for expert in range(experts)])
        return self._cut(self._read(Address(old)), whole)

    def _cut(self, tensor: Tensor, cuts: Iterable[CutDimension]) -> Tensor:
        """Return one of the source's tensors without the units that go."""
        for cut in cuts:
            tensor = tensor.index_select(cut.dim, self._kept(cut).to(tensor.device))
        return tensor

    def _kept(self, cut: CutDimension) -> Int[Tensor, " stay"]:
        """Return the places of a cut's dimension that stay."""
        return expand(self.removal.kept[cut.units], cut.layout).nonzero()[:, 0]


def changed(config: Any, fields: Mapping[str, Any]) -> Any:
    """Return a configuration with other values in some fields of its text part."""
    content, inside = config.to_dict(), text_key(config)
    (content[inside] if inside else content).update(fields)
    return type(config).from_dict(content)


# --- the probe ---


@torch.no_grad()
def probe(source: Checkpoint, removal: Removal) -> str:
    """Return how a smaller model differs from the full model without the units that go; "" if the two agree.

    Some random tokens run through blocks of both in float32: one of each kind, or all if blocks go. One of the models
    is in memory at a time.
    """
    in_float32 = partial(Decoder, dtype=torch.float32, device=torch.device("cpu"))
    try:
        full = in_float32(source)
        vocabulary = full.model.get_input_embeddings().weight.shape[0]
        row = TokenSequence(torch.randint(vocabulary, (TOKENS,), generator=torch.Generator().manual_seed(0)))
        hidden = full.embed(row)
        where = full.weights.blocks_name
        by_block = where in removal.sets
        kept = removal.kept[where].nonzero()[:, 0].tolist() if by_block else range(len(full.blocks))
        wanted = []
        for new in range(len(kept)) if by_block else full.one_of_each_kind:
            full.load(kept[new], -1)
            dense = hidden if by_block else full.run(kept[new], hidden, row)  # with the units
            # Readers read zeros, and routers never choose experts that go.
            consumers = full.linears(kept[new]).keys() & removal.consumers.keys()
            zeros = {linear: removal.along(removal.consumers[linear], removal.kept) for linear in consumers}
            full.load(kept[new], -1, WeightChange(zeros, {}))
            with _Unchoosable(full.model, removal):
                wanted.append((new, hidden, dense, full.run(kept[new], hidden, row)))
            hidden = wanted[-1][-1] if by_block else hidden
        full.unload()
        del full
        gc.collect()
        small = in_float32(SmallerCheckpoint(source, removal))
        for block, hidden, dense, masked in wanted:
            small.load(block, -1)
            found = small.run(block, hidden, row)
            off, effect, size = (float(torch.linalg.vector_norm(x)) for x in (found - masked, masked - dense, dense))
            if not off <= removal.close * max(effect, 1e-4 * size):
                return f"its block {block} computes something else without them ({off:.2g})"
    except (UserError, RuntimeError, ValueError, IndexError) as error:
        return f"a smaller model does not run ({' '.join(str(error).split())[:200]})"
    return ""


class _Unchoosable(TorchFunctionMode):
    """Sets the logits of experts that go to −∞ in a loaded model, and the numbers that routers add to their scores."""

    def __init__(self, model: nn.Module, removal: Removal) -> None:
        super().__init__()
        self.gone: dict[int, Tensor] = {}  # the experts that go, by the address of a router's tensor
        state = model.state_dict(keep_vars=True)
        for name, mixture in removal.routers.items():
            if not state[name].is_meta:  # of a block that is not loaded
                self.gone[state[name].data_ptr()] = ~removal.kept[mixture]

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in args[:2] if isinstance(made, Tensor) else ():
            gone = self.gone.get(tensor.data_ptr()) if isinstance(tensor, Tensor) else None
            if gone is None or made.shape[-1:] != gone.shape:
                continue
            if tensor.dim() == 1 or min(tensor.shape) == 1 or function.__name__ in PRODUCTS:
                return made.masked_fill(gone, -torch.inf)
        return made
