"""Finds the units of a model: which stored weights belong to its neurons, heads, blocks or experts.

No family-specific code. A field of the configuration, such as `intermediate_size`, is changed for a trial: the weights
whose shapes change with it belong to the units. Each finder has the row of the pattern and the share that goes, and
returns a `Removal`. UserError if the model does not support the pattern.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from torch import nn

from wanda_dvc.catalog import Structure
from wanda_dvc.engine.checkpoint import Address, Checkpoint
from wanda_dvc.engine.removal import ConfigField, CutDimension, KeptUnits, Removal, changed, probe, refused
from wanda_dvc.engine.structure import Linear, StoredSlice, build_empty, find_blocks, stored_linears, stored_slices
from wanda_dvc.errors import UserError, reason
from wanda_dvc.pruning.units import Units, stay_of

TRIAL = 8  # the width of a trial for a field that the configuration leaves open
# Of config.json, in every family with experts so far: how many a token uses, and the groups that routers choose from.
CHOSEN, GROUPS = "num_experts_per_tok", "n_group"


def _linears(model: nn.Module, parts: Mapping[str, list[StoredSlice]]) -> list[dict[str, Linear]]:
    """Return the linears of each block by stored name."""
    where, blocks = find_blocks(model)
    return [stored_linears(block, f"{where}.{index}.", parts.__getitem__) for index, block in enumerate(blocks)]


def _differences(full: nn.Module, other: nn.Module) -> Iterator[tuple[str, int, int, int]]:
    """Yield each dimension of another size in a second model: the tensor, its place, its size and the other size."""
    others = other.state_dict()
    for name, tensor in full.state_dict(keep_vars=True).items():
        shape = others[name].shape if name in others else ()
        for place, (size, less) in enumerate(zip(tensor.shape, shape, strict=False)):
            if size != less:
                yield name, place, size, less


def _build(source: Checkpoint, structure: Structure, fields: Mapping[str, Any]) -> nn.Module:
    """Build the empty model of the configuration with other values in some fields."""
    text = ", ".join(f"{name}={value}" for name, value in fields.items())
    try:
        return build_empty(changed(source.config, fields), f"{source} with {text}")
    except Exception as error:  # each model's configuration raises exceptions of its own choice
        raise refused(structure, source, f"transformers builds no model with {text} ({reason(error)})") from error


# --- neurons and heads: inputs of a linear ---


# Dimensions of stored tensors whose sizes follow a field of the configuration: by tensor and dimension its size, the
# field's value, or the value that null means, and the field.
_Dims = dict[tuple[Address, int], tuple[int, int, str]]


def find_inputs(source: Checkpoint, structure: Structure, sparsity: Fraction) -> Removal:
    """Return the neurons or heads of a model. A share that rounds to all units gives a removal without an effect."""
    full = build_empty(source.config, source)
    parts, text = stored_slices(full, source), source.config.get_text_config()
    # Fields that stay in proportion to the number of units, and the size of a head, which stays.
    others = {name: value for name in structure.scaled if (value := getattr(text, name, None))}
    if others:
        others["head_dim"] = getattr(text, "head_dim", None) or text.hidden_size // next(iter(others.values()))
    dims = _dims(source, structure, full, parts, others)
    linears = {name: linear for block in _linears(full, parts) for name, linear in block.items()}
    sets: dict[str, Units] = {}  # by the module around the modules of the tensors; one linear reads each
    fields: dict[str, ConfigField] = {}
    consumers: dict[str, CutDimension] = {}
    for (address, dim), (size, number, field) in dims.items():
        fields.setdefault(field, ConfigField(number, ()))
        linear = linears.get(address.linear)
        if linear is not None and dim == (0 if linear.transposed else 1):
            name = _owner(address)
            if name in sets:
                raise refused(structure, source, f"several linears of {name} read them")
            total = number if structure.scaled else size
            stay = stay_of(number, sparsity, structure.multiple)
            sets[name] = Units(total, total * stay // number, (size // total,))
            fields[field] = ConfigField(number, (*fields[field].sets, name))
            consumers[address.linear] = CutDimension(address, dim, name, sets[name].layout)
    for (address, dim), (size, *_) in dims.items():
        if (name := _owner(address)) not in sets or size % sets[name].total or dim > 1:
            raise refused(structure, source, f"no linear reads those of {address.tensor}")
    for name, value in others.items():
        fields[name] = ConfigField(value, next(iter(fields.values())).sets if name in structure.scaled else ())
    removal = Removal(structure=structure, sets=sets, fields=fields, consumers=consumers)
    _build(source, structure, removal.changes)  # some require a width that is a multiple of the number of heads
    return _with_cuts(source, removal, {place: size for place, (size, *_) in dims.items()})


def _dims(
    source: Checkpoint,
    structure: Structure,
    full: nn.Module,
    parts: Mapping[str, list[StoredSlice]],
    others: dict[str, int],
) -> _Dims:
    """Return the dimensions of stored tensors that follow the fields of a structure; `others` change with them."""
    (where, _), text = find_blocks(full), source.config.get_text_config()
    dims: _Dims = {}
    for field in structure.fields:
        value = getattr(text, field, 0)
        if value == 0:
            continue
        trial = TRIAL if value is None else value // 2 if isinstance(value, int) else 0
        if not trial:
            raise refused(structure, source, f"{field} is {value}, expected one number for all blocks, 2 or more")
        scaled = {name: others[name] * trial // (value or 1) for name in structure.scaled if name in others}
        for name, place, size, less in _differences(full, _build(source, structure, {field: trial} | others | scaled)):
            if not name.startswith(f"{where}.") or name not in parts:
                raise refused(structure, source, f"{field} also determines {name}")
            number = trial * size // less if value is None else value
            module = full.get_submodule(name.rpartition(".")[0])
            experts = next((len(x) for x in module.parameters(recurse=False) if x.dim() == 3), 0)
            for address, dim, own in _stored(parts[name], place, experts, source):
                dims[address, dim] = own, number, field
    if not dims:
        looked = ", ".join(structure.fields)
        raise refused(structure, source, f"its configuration has no number of them (looked for {looked})")
    return dims


def _stored(
    parts: list[StoredSlice], place: int, experts: int, source: Checkpoint
) -> Iterator[tuple[Address, int, int]]:
    """Yield the stored tensors of a parameter's dimension: the address, the dimension there, and its size."""
    for part in parts:
        shape = source.entries[part.address.tensor].shape
        inside = part.expert is None and experts > 0 and shape[0] == experts
        for expert in range(experts) if inside else (part.address.expert,):
            dim = place - (inside or (experts > 0 and part.expert is not None))
            yield Address(part.address.tensor, expert), dim, shape[dim + inside]


def _with_cuts(source: Checkpoint, found: Removal, sizes: Mapping[tuple[Address, int], int]) -> Removal:
    """Return a removal with the cuts of dimensions of these sizes, laid out so that the smaller model passes the probe.

    The places of a unit in a tensor with several of its parts: in several sections, or next to one another.
    """
    places = {place: size // found.sets[_owner(place[0])].total for place, size in sizes.items()}
    read = {address: sum(found.sets[_owner(address)].layout) for address, _ in places}
    for sections in (True, False):
        cuts = tuple(
            CutDimension(address, dim, _owner(address), _sections(size, read[address]) if sections else (size,))
            for (address, dim), size in places.items()
        )
        removal = replace(found, cuts=cuts)
        if not (problem := probe(source, removal.with_kept(_half(removal)))):
            return removal
    raise refused(found.structure, source, problem)


def _sections(size: int, read: int) -> tuple[int, ...]:
    """Return a unit's places in each section, if a tensor computes `size` places of a unit with `read` inputs.

    Neurons: as many sections as the reader's, such as gate and up. Heads: queries as many as the reader's, then keys
    and values.
    """
    more = size - read
    if more <= 0:
        return (size,)
    return (1,) * size if read == 1 else (read, more // 2, more - more // 2)


def _half(removal: Removal) -> KeptUnits:
    """Return random units that stay, half of each set: for every share, because a wrong layout shows."""
    generator = torch.Generator().manual_seed(0)
    kept = {}
    for before, names in removal.fields.values():
        for name in names:
            if name not in kept:
                total = removal.sets[name].total
                half = max(1, before // 2) * total // before
                kept[name] = torch.zeros(total, dtype=torch.bool)
                kept[name][torch.randperm(total, generator=generator)[:half]] = True
    return kept


def _owner(address: Address) -> str:
    """Return the name of the module around the module of a tensor; an expert's has the expert's number."""
    return address.linear.removesuffix(".bias").rpartition(".")[0]


# --- blocks ---


def find_block_units(source: Checkpoint, structure: Structure, sparsity: Fraction) -> Removal:
    """Return the blocks of a model, in one set. The probe needs to know which go: see `confirmed`."""
    full = build_empty(source.config, source)
    where, blocks = find_blocks(full)
    linears, text = _linears(full, stored_slices(full, source)), source.config.get_text_config()
    content, total = text.to_dict(), len(blocks)
    fields = {name: ConfigField(total, (where,)) for name in structure.fields if content.get(name) == total}
    if not fields:
        raise refused(structure, source, f"its configuration has no number of them ({', '.join(structure.fields)})")
    block = re.compile(r"(.*?\.)(\d+)(\..*)")
    # Another part of the model, such as a vision tower, has blocks too, under another head.
    heads = {found[1] for names in linears for name in names if (found := block.fullmatch(name))}
    numbered = {}
    for name in source.where:
        if (found := block.fullmatch(name)) and found[1] in heads:
            numbered[name] = where, int(found[2]), found[1], found[3]
    return Removal(
        structure=structure,
        sets={
            where: Units(total, stay_of(total, sparsity, structure.multiple), members=[[*names] for names in linears])
        },
        fields=fields,
        lists=block_lists(text, total),
        numbered=numbered,
        close=1e-3,  # the same weights run: a block that depends on the number of blocks differs a little
    )


def block_lists(text: Any, blocks: int) -> dict[str, list[Any]]:
    """Return a configuration's lists with an entry for each block."""
    return {
        name: list(row)
        for name, row in text.to_dict().items()
        if "layer" in name and isinstance(row, (list, tuple)) and len(row) == blocks and row != [*range(blocks)]
    }


def confirmed(source: Checkpoint, removal: Removal) -> Removal:
    """Return a removal of chosen units. UserError if the smaller model computes something else."""
    if problem := probe(source, removal):
        raise refused(removal.structure, source, problem)
    return removal


# --- experts ---


def find_experts(source: Checkpoint, structure: Structure, sparsity: Fraction) -> Removal:
    """Return the routed experts of a model: the tensors whose size follows their number are theirs and the routers'.

    If routers choose from groups of experts, the same number stays in each group. A share that rounds to all experts
    gives a removal without an effect. The probe needs to know which go: see `confirmed`.
    """
    full = build_empty(source.config, source)
    parts, content = stored_slices(full, source), source.config.get_text_config().to_dict()
    numbers = {name: x for name in structure.fields if type(x := content.get(name)) is int and x > 1}
    if len(numbers) != 1:
        found, looked = ", ".join(numbers) or "none", ", ".join(structure.fields)
        raise refused(structure, source, f"its configuration has {found}, expected one of {looked}")
    ((field, number),) = numbers.items()
    groups, chosen = content.get(GROUPS), content.get(CHOSEN)
    groups = groups if type(groups) is int and 1 < groups < number and number % groups == 0 else 1
    stay = min(number, groups * max(1, round(number * (1 - sparsity) / groups)))
    if type(chosen) is int and stay < chosen:
        found = f"{CHOSEN} is {chosen}, expected at most the {stay} experts that stay"
        raise UserError(f"sparsity: {found}; set a lower sparsity")
    set_of, follows, routers = _tensors_of_experts(source, structure, full, parts, field, number)
    cuts, numbered = [], {}
    for name, dim in follows.items():
        for part in parts[name]:
            tensor = part.address.tensor
            if part.expert is None:
                cuts.append(CutDimension(part.address, dim, set_of[name], (1,)))
            else:  # the last such number in its name is the expert's
                head, _, tail = tensor.rpartition(f".{part.expert}.")
                numbered[tensor] = set_of[name], part.expert, f"{head}.", f".{tail}"
    mixtures = sorted(set(set_of.values()))
    members = {mixture: [list[str]() for _ in range(number)] for mixture in mixtures}
    names = {id(module): name for name, module in full.named_modules()}
    for block in _linears(full, parts):
        for name, linear in block.items():
            parameter = f"{names[id(linear.module)]}.{linear.leaf}"
            if linear.stored.expert is not None and parameter in follows:
                members[set_of[parameter]][linear.stored.expert].append(name)
    return Removal(
        structure=structure,
        sets={mixture: Units(number, stay, members=members[mixture], groups=groups) for mixture in mixtures},
        fields={field: ConfigField(number, tuple(mixtures))},
        cuts=tuple(cuts),
        numbered=numbered,
        routers=routers,
    )


def _tensors_of_experts(
    source: Checkpoint, structure: Structure, full: nn.Module, parts: Mapping[str, Any], field: str, number: int
) -> tuple[dict[str, str], dict[str, int], dict[str, str]]:
    """Return the mixture of each tensor whose size follows their number, its dimension, and the routers' mixtures."""
    where, _ = find_blocks(full)
    trial, tensors = number // 2, full.state_dict(keep_vars=True)
    follows: dict[str, int] = {}
    for name, place, size, less in _differences(full, _build(source, structure, {field: trial})):
        fits = (size, less) == (number, trial) and (place == 0 or tensors[name].dim() < 3)
        if not name.startswith(f"{where}.") or name not in parts or not fits or name in follows:
            raise refused(structure, source, f"{field} also determines {name}")
        follows[name] = place
    # Experts are parameters of three dimensions; a mixture is all below the module around theirs.
    owners = {name.rpartition(".")[0] for name in follows if tensors[name].dim() == 3}
    mixtures = {owner.rpartition(".")[0] for owner in owners}
    if not mixtures:
        raise refused(structure, source, f"{field} determines no tensor of experts")
    set_of = {}
    for name in follows:
        inside = [mixture for mixture in mixtures if name.startswith(f"{mixture}.")]
        if not inside:
            raise refused(structure, source, f"{field} also determines {name}")
        set_of[name] = max(inside, key=len)
    return set_of, follows, {name: set_of[name] for name in follows if name.rpartition(".")[0] not in owners}
