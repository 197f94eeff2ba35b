"""Smaller models: which stored weights belong to the units that go, and a view of a model without these units.

No family-specific code. A field of the configuration, such as `intermediate_size`, is changed for a trial: the weights
whose shapes change with it belong to the units. A probe then compares the smaller model with the full model without the
units' inputs; a structure that fails is refused.
"""

import gc
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from transformers.utils import output_capturing

from wanda_dvc.catalog import Structure
from wanda_dvc.engine.checkpoint import Address, Checkpoint, Source
from wanda_dvc.engine.config import LAYERS, reason
from wanda_dvc.engine.decoder import Decoder
from wanda_dvc.engine.rewriting import Configuration, Piece, rewrite
from wanda_dvc.engine.rows import Row
from wanda_dvc.engine.structure import Linear, build_empty, find_blocks, stored_linears, stored_parts
from wanda_dvc.engine.weights import Weights, set_parameter
from wanda_dvc.errors import UserError
from wanda_dvc.pruning.statistics import BlockStats
from wanda_dvc.pruning.units import Mixture, Units, places, spread, stay_of
from wanda_dvc.reading import DTYPES, Entry

TRIAL = 8  # the width of a trial for a field that the configuration leaves open
TOKENS = 32  # of the probe
MOST_TRIALS = 256  # units for which all shares are tried
CAPTURES = "_output_capturing_hooks_installed"  # where transformers notes its hooks
Stays = Mapping[str, Bool[Tensor, " units"]]  # the units that stay, by set
Dims = dict[tuple[Address, int], tuple[str, int]]  # by stored tensor and dimension: the set, and places of a unit


class Cut(NamedTuple):
    """A dimension of a stored tensor, or of an expert's part of it, that holds the units of a set."""

    address: Address
    dim: int
    units: str  # the set
    layout: tuple[int, ...]  # as `Units.layout`


class Output(NamedTuple):
    """What a block of the full model computes for the probe."""

    input: Tensor
    full: Tensor  # with all units; of a block that stays: its input
    masked: Tensor  # without the units that go


@dataclass(frozen=True)
class Removal:
    """The units of a model, in sets from which the same share goes; a set is one MLP's neurons, for example."""

    structure: Structure
    sets: dict[str, Units]
    readers: dict[str, str]  # by linear: the set that it reads
    cuts: tuple[Cut, ...]
    numbers: dict[str, int]  # the configuration's fields with the numbers of units, before the removal
    field_of: dict[str, str]  # by set
    others: Mapping[str, int]  # the fields that `_companions` changes, before the removal
    close = 1e-2  # allowed difference in the probe, relative to the effect of the removed units

    @property
    def fields(self) -> dict[str, tuple[int, int]]:
        """The numbers of units in the configuration, before and after."""
        parts = {self.field_of[name]: units for name, units in self.sets.items()}
        return {x: (self.numbers[x], self.numbers[x] * units.stay // units.total) for x, units in parts.items()}

    def fitted(self, stays: Stays) -> "Removal":
        """Return the removal that leaves these units. UserError if sets of one field keep different numbers."""
        sets = {name: units._replace(stay=int(stays[name].sum())) for name, units in self.sets.items()}
        for field in self.numbers:
            shares = {Fraction(x.stay, x.total): name for name, x in sets.items() if self.field_of[name] == field}
            if len(shares) > 1 or min(shares) * self.numbers[field] % 1:
                found = " and ".join(f"{sets[name].stay} in {name}" for name in shares.values())
                raise UserError(
                    f"keep: masks keep {found}, expected the same number everywhere, as {field} is one number for all"
                )
        return replace(self, sets=sets)

    @cached_property
    def units(self) -> dict[str, Units]:
        """The units that go, by the linear that reads them."""
        return {linear: self.sets[name] for linear, name in self.readers.items()}

    @property
    def mixtures(self) -> Mapping[str, Mixture]:
        """The experts that go, by set, if the units are experts."""
        return {}

    @property
    def by_block(self) -> bool:
        """Whether the units are blocks, which are chosen together."""
        return False

    def order(self, count: int) -> list[int]:
        """Return the blocks that stay, of `count` blocks."""
        return list(range(count))

    def all_or_none(self, weights: Callable[[str], Tensor], block: BlockStats) -> dict[str, Tensor]:
        """Return a block's masks if the units are blocks: all of its weights stay, or none."""
        names = [name for names in block.readers.values() for name in names]
        return {name: torch.full(weights(name).shape, bool(self.sets[self.readers[name]].stay)) for name in names}

    @property
    def share(self) -> float:
        """The share of the units that go."""
        return 1 - sum(units.stay for units in self.sets.values()) / sum(units.total for units in self.sets.values())

    @property
    def changes(self) -> dict[str, Any]:
        """The new values in the configuration."""
        found: dict[str, Any] = {}
        for name, (before, after) in self.fields.items():
            found |= {name: after} | _companions(self.structure, self.others, before, after)
        return found

    def about(self, share: Fraction) -> str:
        """Describe the removal, and the rounding of the requested share."""
        text = f"pattern {self.structure.name}: {self.about_fields}"
        if abs(self.share - share) > 1e-9:
            text += f"; rounded to {self.structure.rounded}: {self.share:.4g} instead of {float(share):g}"
        return text

    @property
    def about_fields(self) -> str:
        """The changes of the numbers of units, in words."""
        return ", ".join(f"{name} from {before} to {after}" for name, (before, after) in self.fields.items())

    @cached_property
    def by_linear(self) -> dict[str, list[Cut]]:
        """The cuts of each linear, or other tensor, by its name in masks."""
        found: defaultdict[str, list[Cut]] = defaultdict(list)
        for cut in self.cuts:
            found[cut.address.linear].append(cut)
        return dict(found)

    def cut_of(self, reader: str) -> Cut:
        """Return the cut of the inputs of a linear that reads units."""
        return next(cut for cut in self.by_linear[reader] if cut.units == self.readers[reader])

    def stays(self, keeps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the units that stay, by set, from the masks of the linears that read them."""
        found = {}
        for linear, name in self.readers.items():
            if linear in keeps:
                cut = self.cut_of(linear)
                inputs = keeps[linear].any(dim=1 - cut.dim)
                units = self.sets[name]
                found[name] = torch.zeros(units.total, dtype=torch.bool)
                found[name][places(units._replace(layout=cut.layout))[inputs]] = True
        return found

    def spread(self, keeps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return masks, on the host, without all weights of removed units, given the masks of the units' readers."""
        keeps = {linear: keep.cpu() for linear, keep in keeps.items()}
        stays = self.stays(keeps)
        return {linear: self._without(linear, keep, stays) for linear, keep in keeps.items()}

    def mask(self, linear: str, keep: Tensor, stays: Stays) -> Tensor:
        """Return the mask of a linear, shaped as `keep`, that removes these units and nothing else."""
        return self._without(linear, torch.ones_like(keep), stays)

    def _without(self, linear: str, keep: Tensor, stays: Stays) -> Tensor:
        for cut in self.by_linear.get(linear, ()):
            if cut.units in stays:
                along = self.along(cut, stays)
                keep = keep & (along[:, None] if cut.dim == 0 else along)
        return keep

    def names(self, where: Collection[str], stays: Stays) -> dict[str, str]:
        """Return the stored tensors of the smaller model, and the source's tensor of each."""
        return {name: name for name in where}

    def outputs(self, model: Decoder, hidden: Tensor, row: Row, stays: Stays) -> Iterator[tuple[int, "Output"]]:
        """Yield what a block of each kind computes from hidden states, by its index in the smaller model."""
        for index in model.one_of_each_kind:
            with model.block(index, then=-1):
                full = model.run(index, hidden, row)
                with self.masked(model, index, stays):
                    yield index, Output(hidden, full, model.run(index, hidden, row))

    def masked(self, model: Decoder, block: int, stays: Stays) -> AbstractContextManager[object]:
        """Zero the inputs of units that go in a loaded block, until it is unloaded."""
        own = set()  # experts share a parameter, which is copied once
        for name, linear in model.linears(block).items():
            if name in self.readers:
                along = self.along(cut := self.cut_of(name), stays)
                if (linear.module, linear.leaf) not in own:
                    own.add((linear.module, linear.leaf))
                    set_parameter(linear.module, linear.leaf, linear.module.get_parameter(linear.leaf).clone())
                linear.weight.mul_(along[:, None] if cut.dim == 0 else along)
        return nullcontext()

    def along(self, cut: Cut, stays: Stays) -> Bool[Tensor, " size"]:
        """Return which places of a cut's dimension stay."""
        return spread(stays[cut.units], self.sets[cut.units]._replace(layout=cut.layout))


# --- the view ---


class Smaller(Source):
    """A model source without the units that go: smaller tensors of the same names, and a configuration to match.

    `read` replaces the source's own reader, for example by one that returns new values.
    """

    def __init__(
        self, source: Source, removal: Removal, stays: Stays, read: Callable[[Address], Tensor] | None = None
    ) -> None:
        self.source, self.removal, self.stays = source, removal, stays
        self._read = read or source.read
        self.old = removal.names(source.where, stays)  # by stored name: the source's tensor
        self._cuts: defaultdict[Address, list[Cut]] = defaultdict(list)
        for cut in removal.cuts:
            self._cuts[cut.address].append(cut)
        self._experts = Counter(address.tensor for address in self._cuts if address.expert is not None)

    def __str__(self) -> str:
        return f"{self.source} without some {self.removal.structure.units}"

    @property
    def where(self) -> Mapping[str, object]:
        """The file (or model) of each tensor."""
        return {name: self.source.where[old] for name, old in self.old.items()}

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """Dtype and shape of each tensor; places in files are the source's."""
        return {name: self._entry(old, self.source.entries[old]) for name, old in self.old.items()}

    def _entry(self, name: str, entry: Entry) -> Entry:
        experts = self._experts[name]
        shape = list(entry.shape)
        for cut in self._cuts.get(Address(name, 0 if experts else None), ()):
            units = self.removal.sets[cut.units]
            shape[cut.dim + bool(experts)] = sum(cut.layout) * units.stay
        return entry._replace(shape=shape)

    @property
    def config(self) -> Any:
        """The configuration with the new numbers of units."""
        return changed(self.source.config, self.removal.changes)

    @property
    def config_name(self) -> str:
        """The configuration's name in messages."""
        changes = ", ".join(f"{field}={value}" for field, value in self.removal.changes.items())
        return f"{self.source.config_name} with {changes}"

    def read(self, address: Address) -> Tensor:
        """Return the tensor, or the expert's part of it, without the units that go."""
        return self._cut(replace(address, tensor=self.old[address.tensor]))

    def _cut(self, address: Address) -> Tensor:
        """Return one of the source's tensors without the units that go."""
        if address.expert is None and (experts := self._experts[address.tensor]):
            return torch.stack([self._cut(Address(address.tensor, expert)) for expert in range(experts)])
        if address.expert is not None and Address(address.tensor) in self._cuts:  # some experts of the tensor go
            return self._cut(Address(address.tensor))[address.expert]
        tensor = self._read(address)
        for cut in self._cuts.get(address, ()):
            stays = self.removal.along(cut, self.stays).to(tensor.device)
            tensor = tensor.index_select(cut.dim, stays.nonzero()[:, 0])
        return tensor

    def rewritten(self, replaced: Collection[str]) -> set[str]:
        """Return the tensors of other shape or name than the source's, or with new values: the `replaced` ones."""
        changed = {cut.address.tensor for cut in self.removal.cuts}.union(replaced)
        return {name for name, old in self.old.items() if name != old or old in changed}

    @property
    def parameters(self) -> int:
        """The number of stored weights."""
        return sum(map(_size, self.entries.values()))

    @property
    def removed(self) -> float:
        """The share of the stored weights that goes."""
        return 1 - self.parameters / sum(map(_size, self.source.entries.values()))


def _size(entry: Entry) -> int:
    return torch.Size(entry.shape).numel()


def write_smaller(
    smaller: Smaller,
    target: Path,
    *,
    replaced: Collection[str] = (),
    without: Collection[str] = (),
    progress: Callable[[Piece], object] = lambda _: None,
) -> None:
    """Write the directory of a smaller model. `replaced` names tensors with new values, of the same or another shape.

    Other files are copied, except those named in `without`.
    """
    checkpoint, changes = smaller.source, smaller.removal.changes
    assert isinstance(checkpoint, Checkpoint)
    inside = _text_key(checkpoint.config)

    def configured(config: Configuration) -> Configuration:
        text = config[inside] if inside else config
        text.update(_as_written(changes, text, checkpoint.config.get_text_config()))
        return config

    def piece(name: str) -> Piece:
        entry = smaller.entries[name]
        nbytes = _size(entry) * DTYPES[entry.dtype]
        return Piece(name, entry.dtype, list(entry.shape), nbytes, lambda: smaller.read(Address(name)))

    new = {smaller.old[name]: [piece(name)] for name in smaller.rewritten(replaced)}
    gone = checkpoint.where.keys() - smaller.old.values()
    rewrite(
        checkpoint,
        target,
        new | {name: [] for name in gone},
        configured,
        without=without,
        progress=lambda piece, _: progress(piece),
    )


def _as_written(changes: Mapping[str, Any], written: Configuration, text: Any) -> Configuration:
    """Return changes of a configuration by the names in its file, such as `num_experts` for `num_local_experts`."""
    other_names: Mapping[str, str] = getattr(text, "attribute_map", {})
    found: Configuration = {}
    for field, value in changes.items():
        name = other_names.get(field, field)
        known = {field, name, *(other for other, meant in other_names.items() if meant == name)}
        found |= dict.fromkeys(sorted(known & written.keys()) or [field], value)
    return found


def shrink(model: Any, smaller: Smaller) -> None:
    """Give a model in memory the blocks of its smaller version, in place, and a configuration to match.

    The smaller version's source is the model itself. Weights that stay complete are not copied. Hooks on the old blocks
    are lost. Memory: the smaller copies of all cut tensors, until all blocks are ready.
    """
    new = build_empty(smaller.config, smaller.config_name, model.dtype)
    weights = Weights(new, smaller, device=model.get_input_embeddings().weight.device)
    where, blocks = find_blocks(model)
    old = [blocks[index] for index in smaller.removal.order(len(blocks))]
    for index, block in enumerate(weights.blocks):
        for name, tensor in weights.read_block(index).items():
            before = old[index].get_parameter(name)
            parameter = nn.Parameter(tensor.to(before.device, before.dtype), requires_grad=before.requires_grad)
            set_parameter(block, name, parameter)
        block.train(model.training)
    parent, _, leaf = where.rpartition(".")
    model.get_submodule(parent)._modules[leaf] = nn.ModuleList(weights.blocks)
    text = model.config.get_text_config()
    for field, value in smaller.removal.changes.items():
        setattr(text, field, value)
    configs = {id(new.config): model.config, id(new.config.get_text_config()): text}
    for module in model.modules():
        if (config := configs.get(id(getattr(module, "config", None)))) is not None:  # to follow later changes of it
            module.config = config
        if getattr(module, CAPTURES, False):  # the new blocks need the hooks too
            _forget_captures(module)
    for name, module in new.named_modules():  # such as the number of experts, for the loss of routers
        if not f"{name}.".startswith(f"{where}."):
            numbers = {key: value for key, value in vars(module).items() if type(value) is int}
            vars(model.get_submodule(name)).update(numbers)


def _forget_captures(model: nn.Module) -> None:
    """Remove the hooks by which transformers returns hidden states and attentions; its next call installs them."""
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__module__", None) == output_capturing.__name__:
                del module._forward_hooks[key]
    delattr(model, CAPTURES)


# --- configurations ---


def changed(config: Any, fields: Mapping[str, Any]) -> Any:
    """Return a configuration with other values in some fields of its text part."""
    content, inside = config.to_dict(), _text_key(config)
    (content[inside] if inside else content).update(fields)
    return type(config).from_dict(content)


def _text_key(config: Any) -> str | None:
    """Return the key of a configuration's text part; None if all of it describes the text model."""
    text = config.get_text_config()
    return None if text is config else next(key for key in config.to_dict() if getattr(config, key, None) is text)


def smaller_parameters(config: Any, structure: Structure, share: Fraction, parameters: int) -> int | None:
    """Count the parameters of a smaller model by its configuration alone; None if the configuration cannot express it.

    `parameters` counts those of the complete model.
    Only `mask` checks whether the model supports the pattern, and rounds experts to complete router groups.
    """
    text = config.get_text_config()
    others, changes = _others(structure, text), dict[str, Any]()
    for field in structure.fields:
        number = getattr(text, field, None)
        if isinstance(number, int) and number > 1:
            stay = stay_of(number, share, structure.multiple)
            changes |= {field: stay} | _companions(structure, others, number, stay)
            if field in LAYERS:
                changes |= {name: row[:stay] for name, row in block_lists(text, number).items()}
    if not changes:
        return None
    try:
        model = build_empty(changed(config, changes), f"the configuration with {changes}")
    except Exception:  # each model's configuration raises exceptions of its own choice
        return None
    left = sum(parameter.numel() for parameter in model.parameters())
    removes = any(getattr(text, field) != changes[field] for field in structure.fields if field in changes)
    return None if removes and left == parameters else left  # wider heads instead of fewer, for example


def block_lists(text: Any, blocks: int) -> dict[str, list[Any]]:
    """Return a configuration's lists with an entry for each block."""
    return {
        name: list(row)
        for name, row in text.to_dict().items()
        if "layer" in name and isinstance(row, (list, tuple)) and len(row) == blocks and row != [*range(blocks)]
    }


# --- finding the units ---


def find_units(source: Source, structure: Structure, share: Fraction) -> Removal:
    """Return the units of a model, and how many stay. UserError if the model has no such structure, or its probe fails.

    A share that rounds to all units gives a removal without an effect.
    """
    found, dims = _found(source, structure, share)
    check_builds(source, found)
    several = any(size > sum(found.sets[name].layout) for name, size in dims.values())
    # The places of a unit in a tensor with several of its parts: in several sections, or next to one another.
    for sections in (True, False) if several else (True,):
        cuts = (
            Cut(address, dim, name, _sections(size, *found.sets[name].layout) if sections else (size,))
            for (address, dim), (name, size) in dims.items()
        )
        removal = replace(found, cuts=tuple(cuts))
        stays = _half(removal)
        if not (problem := probe(source, removal.fitted(stays), stays)):
            return removal
    raise refused(structure, source, problem)


def _sections(size: int, read: int) -> tuple[int, ...]:
    """Return a unit's places in each section, if a tensor computes `size` places of a unit with `read` inputs.

    Neurons: as many sections as the reader's, such as gate and up. Heads: queries as many as the reader's, then keys
    and values.
    """
    more = size - read
    if more <= 0:
        return (size,)
    return (1,) * size if read == 1 else (read, more // 2, more - more // 2)


def _companions(structure: Structure, others: Mapping[str, int], before: int, after: int) -> dict[str, int]:
    """Return the other fields of a configuration that change with a number of units."""
    found = {name: others[name] * after // before for name in structure.scaled if name in others}
    return found | {name: value for name, value in others.items() if name not in found}


def _others(structure: Structure, text: Any) -> dict[str, int]:
    """Return the fields that stay in proportion to the number of units, and the size of a head, which stays."""
    found = {name: value for name in structure.scaled if (value := getattr(text, name, None))}
    if found:
        heads = next(iter(found.values()))
        found["head_dim"] = getattr(text, "head_dim", None) or text.hidden_size // heads
    return found


def _found(source: Source, structure: Structure, share: Fraction) -> tuple[Removal, Dims]:
    """Return the removal without its cuts, and the dimensions to cut; their layout is not known yet."""
    config = source.config
    full = build_empty(config, source.config_name)
    parts = stored_parts(full, source)
    where, blocks = find_blocks(full)
    linears: dict[str, Linear] = {}
    for index, block in enumerate(blocks):
        linears |= stored_linears(block, f"{where}.{index}.", parts.__getitem__)
    dims: dict[tuple[Address, int], _Dim] = {}
    others = _others(structure, config.get_text_config())
    for field in structure.fields:
        value = getattr(config.get_text_config(), field, 0)
        if value == 0:
            continue
        trial = TRIAL if value is None else value // 2 if isinstance(value, int) else 0
        if not trial:
            raise refused(structure, source, f"{field} is {value}, expected one number for all blocks, 2 or more")
        other = _trial(source, structure, {field: trial} | _companions(structure, others, value or 1, trial))
        for name, place, size, less in differences(full, other):
            if not name.startswith(f"{where}.") or name not in parts:
                raise refused(structure, source, f"{field} also determines {name}")
            number = trial * size // less if value is None else value
            module = full.get_submodule(name.rpartition(".")[0])
            experts = next((len(x) for x in module.parameters(recurse=False) if x.dim() == 3), 0)
            for address, dim, own in _stored(parts[name], place, experts, source):
                if (own * trial) % number:
                    raise refused(structure, source, f"{address.tensor} has {own} places for {number} of {field}")
                dims[address, dim] = _Dim(own, number, field)
    if not dims:
        looked = ", ".join(structure.fields)
        raise refused(structure, source, f"its configuration has no number of them (looked for {looked})")
    return _sorted(source, structure, share, dims, linears, others)


def _trial(source: Source, structure: Structure, fields: Mapping[str, int]) -> nn.Module:
    """Build the empty model of the configuration with other values in some fields."""
    text = ", ".join(f"{name}={value}" for name, value in fields.items())
    try:
        model: nn.Module = build_empty(changed(source.config, fields), f"{source.config_name} with {text}")
    except Exception as error:  # each model's configuration raises exceptions of its own choice
        raise refused(structure, source, f"transformers builds no model with {text} ({reason(error)})") from error
    return model


def check_builds(source: Source, removal: Removal) -> None:
    """Raise UserError if transformers builds no model with the removal's configuration, and name the shares that fit.

    Some configurations require a width that is a multiple of the number of heads.
    """
    try:
        _trial(source, removal.structure, removal.changes)
    except UserError:
        total = next(iter(removal.sets.values())).total
        fit = [stay for stay in range(1, total) if total <= MOST_TRIALS and _is_valid(source, removal, stay)]
        if not fit:
            raise
        expected = ", ".join(f"{1 - stay / total:.4g}" for stay in reversed(fit))
        changes = ", ".join(f"{name} {value}" for name, value in removal.changes.items())
        raise UserError(
            f"sparsity: got {removal.share:.4g}, with which {source.config_name} would have {changes}, and "
            f"transformers builds no such model; expected {expected}"
        ) from None


def _is_valid(source: Source, removal: Removal, stay: int) -> bool:
    """Whether a configuration accepts another number of units that stay."""
    sets = {name: units._replace(stay=stay) for name, units in removal.sets.items()}
    try:
        changed(source.config, replace(removal, sets=sets).changes)
    except Exception:  # each model's configuration raises exceptions of its own choice
        return False
    return True


class _Dim(NamedTuple):
    """A dimension of a stored tensor whose size follows a field of the configuration."""

    size: int
    number: int  # the field's value, or the value that null means
    field: str


def differences(full: nn.Module, other: nn.Module) -> Iterator[tuple[str, int, int, int]]:
    """Yield each dimension of another size in a second model: the tensor, its place, its size and the other size."""
    others = other.state_dict()
    for name, tensor in full.state_dict(keep_vars=True).items():
        shape = others[name].shape if name in others else ()
        for place, (size, less) in enumerate(zip(tensor.shape, shape, strict=False)):
            if size != less:
                yield name, place, size, less


def _stored(parts: list[Any], place: int, experts: int, source: Source) -> Iterator[tuple[Address, int, int]]:
    """Yield the stored tensors of a parameter's dimension: the address, the dimension there, and its size."""
    for part in parts:
        inside = part.expert is None and experts and source.entries[part.address.tensor].shape[0] == experts
        for expert in range(experts) if inside else (part.address.expert,):
            dim = place - (bool(experts) and (bool(inside) or part.expert is not None))
            shape = source.entries[part.address.tensor].shape
            yield Address(part.address.tensor, expert), dim, shape[dim + bool(inside)]


def _sorted(  # noqa: PLR0913, PLR0917 - the dimensions, and the model that they belong to
    source: Source,
    structure: Structure,
    share: Fraction,
    dims: Mapping[tuple[Address, int], _Dim],
    linears: Mapping[str, Linear],
    others: dict[str, int],
) -> tuple[Removal, Dims]:
    """Sort dimensions into sets of units, by the modules that they belong to; one linear reads each set."""
    numbers = {found.field: found.number for found in dims.values()}
    stay = {field: stay_of(number, share, structure.multiple) for field, number in numbers.items()}
    sets: dict[str, Units] = {}
    field_of: dict[str, str] = {}
    readers: dict[str, str] = {}
    for (address, dim), (size, number, field) in dims.items():
        linear = linears.get(address.linear)
        if linear is not None and dim == (0 if linear.transposed else 1):
            name = _owner(address)
            if name in sets:
                raise refused(structure, source, f"several linears of {name} read them")
            total = number if structure.grouped else size
            sets[name] = Units(total, total * stay[field] // number, (size // total,))
            field_of[name] = field
            readers[address.linear] = name
    found = {}
    for (address, dim), (size, *_) in dims.items():
        name = _owner(address)
        if name not in sets or size % sets[name].total or dim > 1:
            raise refused(structure, source, f"no linear reads those of {address.tensor}")
        found[address, dim] = name, size // sets[name].total
    return Removal(structure, sets, readers, (), numbers, field_of, others), found


def _owner(address: Address) -> str:
    """Return the name of the module around the module of a tensor; an expert's has the expert's number."""
    return address.linear.removesuffix(".bias").rpartition(".")[0]


def refused(structure: Structure, source: Source, why: str) -> UserError:
    """Return the error that a model does not support a pattern, with the reason."""
    return UserError(f"pattern: got {structure.name}, which {source} does not support: {why}; choose another pattern")


# --- the probe ---


def _half(removal: Removal) -> Stays:
    """Return random units that stay, half of each set."""
    generator = torch.Generator().manual_seed(0)
    stays = {}
    for name, units in removal.sets.items():
        number = removal.numbers[removal.field_of[name]]
        half = max(1, number // 2) * units.total // number  # for every share, because a wrong layout shows
        stays[name] = torch.zeros(units.total, dtype=torch.bool)
        stays[name][torch.randperm(units.total, generator=generator)[:half]] = True
    return stays


@torch.no_grad()
def probe(source: Source, removal: Removal, stays: Stays) -> str:
    """Return how a smaller model differs from the full model without the units that go; "" if the two agree.

    Some random tokens run through blocks of both in float32. One of the models is in memory at a time.
    """
    try:
        full = _in_float32(source)
        vocabulary = full.model.get_input_embeddings().weight.shape[0]
        row = Row(torch.randint(vocabulary, (TOKENS,), generator=torch.Generator().manual_seed(0)))
        hidden = full.embed(row)
        full.calls(row)  # it runs the first block now; later it may be in use
        wanted = list(removal.outputs(full, hidden, row, stays))
        del full
        gc.collect()
        small = _in_float32(Smaller(source, removal, stays))
        small.calls(row)
        for block, one in wanted:
            with small.block(block, then=-1):
                found = small.run(block, one.input, row)
            sizes = (float(torch.linalg.vector_norm(x)) for x in (found - one.masked, one.masked - one.full, one.full))
            off, effect, size = sizes
            if not off <= removal.close * max(effect, 1e-4 * size):
                return f"its block {block} computes something else without them ({off:.2g})"
    except (UserError, RuntimeError, ValueError, IndexError) as error:
        return f"a smaller model does not run ({' '.join(str(error).split())[:200]})"
    return ""


def _in_float32(source: Source) -> Decoder:
    return Decoder(source, dtype=torch.float32, device=torch.device("cpu"))
