"""Finds the units of a model: the stored weights of its neurons, heads, blocks or experts.

No family-specific code. A field of the configuration, such as `intermediate_size`, is changed for a trial: the weights
whose shapes change with it belong to the units. UserError if the model does not support the pattern.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import nn

from wanda_dvc.catalog import STRUCTURES, Structure
from wanda_dvc.engine.checkpoint import Address, Checkpoint, with_fields
from wanda_dvc.engine.probe import probe
from wanda_dvc.engine.removal import ConfigField, Removal, UnitDimension, UnitTensor, refused
from wanda_dvc.engine.structure import build_empty, count_experts, expert_slices, find_blocks, find_linears, find_slices
from wanda_dvc.errors import UserError, reason
from wanda_dvc.pruning.units import Units, count_kept, step_of

TRIAL_WIDTH = 8  # for a field that the configuration leaves open


class DenseModel:
    """The model with all units: its structure, without weights."""

    def __init__(self, source: Checkpoint, structure: Structure) -> None:
        self.source, self.structure = source, structure
        self.config = source.config.get_text_config()
        self.model = build_empty(source.config, source)
        self.slices = find_slices(self.model, source)  # by parameter
        self.blocks_name, blocks = find_blocks(self.model)
        prefix = f"{self.blocks_name}."
        self.linears = [find_linears(block, f"{prefix}{index}.", self.slices) for index, block in enumerate(blocks)]

    def refused(self, why: str) -> UserError:
        """Return the error that the model does not support the pattern."""
        return refused(self.structure, self.source, why)

    def experts(self, parameter: str) -> int:
        """Return the number of experts that the module of a parameter holds; 0 without experts."""
        return count_experts(self.model.get_submodule(parameter.rpartition(".")[0]))

    def build(self, fields: Mapping[str, Any]) -> nn.Module:
        """Build the model with other values of some fields."""
        values = ", ".join(f"{name}={value}" for name, value in fields.items())
        try:
            return build_empty(with_fields(self.source.config, fields), f"{self.source} with {values}")
        except Exception as error:  # each model's configuration raises exceptions of its own choice
            raise self.refused(f"transformers builds no model with {values} ({reason(error)})") from error

    def size_changes(self, fields: Mapping[str, Any]) -> Iterator[tuple[str, int, int, int]]:
        """Yield the dimensions that other values of fields change: the parameter, the dimension, and both sizes."""
        trial = self.build(fields).state_dict()
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            trial_shape = trial[name].shape if name in trial else ()
            for dim, (size, trial_size) in enumerate(zip(tensor.shape, trial_shape, strict=False)):
                if size == trial_size:
                    continue
                if not name.startswith(f"{self.blocks_name}.") or name not in self.slices:
                    raise self.refused(f"{next(iter(fields))} also determines {name}")
                yield name, dim, size, trial_size


# --- neurons and heads: inputs of a linear ---


class FieldDimension(NamedTuple):
    """A dimension of a stored tensor, or of one expert's matrix in it, whose size follows a configuration field."""

    address: Address
    dim: int
    size: int
    unit_set: str  # the parent of the tensor's module: `mlp` for `mlp.up_proj.weight`, `experts.3` for an expert
    field: str
    value: int  # of the field, or the value that null means


def find_input_units(source: Checkpoint, structure: Structure, sparsity: Fraction, device: torch.device) -> Removal:
    """Return the neurons or heads of a model. A sparsity that rounds to no unit gives a removal without an effect.

    Neurons: `intermediate_size` of Llama determines the inputs of `mlp.down_proj`, which are the units of a set `mlp`,
    and the outputs of `mlp.gate_proj` and `mlp.up_proj`, which compute them.
    Heads: a unit is a key head with its value head and its queries. With 3 key heads for 9 queries `o_proj` reads 3
    heads of a unit; `q_proj` computes 3, and `k_proj` and `v_proj` one each.
    """
    full = DenseModel(source, structure)
    scaled = {name: getattr(full.config, name) for name in structure.scaled if getattr(full.config, name, None)}
    fixed = {}
    if scaled:  # without `head_dim`, the size of a head would follow from their number
        heads = next(iter(scaled.values()))
        fixed["head_dim"] = getattr(full.config, "head_dim", None) or full.config.hidden_size // heads
    dimensions = _field_dimensions(full, scaled, fixed)
    unit_sets, consumers = _unit_sets(full, sparsity, dimensions)
    config_fields = {dimension.field: ConfigField(dimension.value, dimension.unit_set) for dimension in dimensions}
    config_fields |= {name: ConfigField(value, dimensions[0].unit_set) for name, value in scaled.items()}
    config_fields |= {name: ConfigField(value, None) for name, value in fixed.items()}
    removal = Removal(structure=structure, unit_sets=unit_sets, config_fields=config_fields, consumers=consumers)
    full.build(removal.config_changes)  # UserError if the model's class refuses the configuration
    try:
        return _with_dimensions(source, removal, dimensions, device, in_sections=True)
    except UserError:
        return _with_dimensions(source, removal, dimensions, device, in_sections=False)


def _field_dimensions(full: DenseModel, scaled: Mapping[str, int], fixed: Mapping[str, int]) -> list[FieldDimension]:
    """Return the dimensions that change if a field is halved, `scaled` ones in proportion, and `fixed` ones stay."""
    dimensions: dict[tuple[Address, int], FieldDimension] = {}  # a field may have two names: the last one counts
    for field in full.structure.fields:
        value = getattr(full.config, field, 0)
        if value == 0:
            continue
        trial = value // 2 if isinstance(value, int) else 0
        if value is None and not scaled:  # nothing is in proportion to null
            trial = TRIAL_WIDTH
        if not trial:
            raise full.refused(f"{field} is {value}, expected one number for all blocks, 2 or more")
        in_proportion = {name: scaled_value * trial // value for name, scaled_value in scaled.items()}
        for parameter, dim, size, trial_size in full.size_changes({field: trial, **fixed, **in_proportion}):
            # If a trial of 8 for null makes the size 16, and null makes it 96, null means 48.
            meaning = trial * size // trial_size if value is None else value
            experts = full.experts(parameter)
            stored_dim = dim - 1 if experts else dim  # of one expert's matrix
            for parameter_slice in expert_slices(full.slices[parameter], experts):
                address = parameter_slice.address
                stored_size = full.source.read(address).shape[stored_dim]
                parent = address.linear.removesuffix(".bias").rpartition(".")[0]
                dimension = FieldDimension(address, stored_dim, stored_size, parent, field, meaning)
                dimensions[address, stored_dim] = dimension
    if not dimensions:
        sought = ", ".join(full.structure.fields)
        raise full.refused(f"its configuration has no number of them (looked for {sought})")
    return [*dimensions.values()]


def _unit_sets(
    full: DenseModel, sparsity: Fraction, dimensions: Sequence[FieldDimension]
) -> tuple[dict[str, Units], dict[str, UnitDimension]]:
    """Return the sets of units, and their consumers: the linears whose inputs are such a dimension."""
    linears = {name: linear for block in full.linears for name, linear in block.items()}
    structure = full.structure
    unit_sets: dict[str, Units] = {}  # one linear reads each
    consumers: dict[str, UnitDimension] = {}
    for dimension in dimensions:
        address, dim, name, value = dimension.address, dimension.dim, dimension.unit_set, dimension.value
        linear = linears.get(address.linear)
        if linear is None or dim != (0 if linear.transposed else 1):
            continue  # not an input of a linear: a bias or an output, which computes the units
        if name in unit_sets:
            raise full.refused(f"several linears of {name} read them")
        # 9 key heads (value) and 576 inputs (size): 9 units of 64. Neurons are single inputs, whose number may be a
        # multiple of the value: two shared experts of 1,408 neurons as one MLP have 2,816 units.
        total = value if structure.scaled else dimension.size
        step = step_of(min(value, total), structure.multiple) * max(1, total // value)
        unit_sets[name] = Units(total, count_kept(total, sparsity, step), (dimension.size // total,), step=step)
        consumers[address.linear] = UnitDimension(address, dim, name, unit_sets[name].layout)
    for dimension in dimensions:
        units = unit_sets.get(dimension.unit_set)
        tensor, size = dimension.address.tensor, dimension.size
        if units is None:
            raise full.refused(f"no linear reads those of {tensor}")
        if size % units.total:
            raise full.refused(f"{tensor} has {size} features for {units.total} of them, expected a multiple")
        if dimension.dim > 1:
            raise full.refused(f"{tensor} has them in dimension {dimension.dim}, expected a row or column of a matrix")
    return unit_sets, consumers


def _with_dimensions(
    source: Checkpoint, removal: Removal, dimensions: Sequence[FieldDimension], device: torch.device, in_sections: bool
) -> Removal:
    """Return a removal with the dimensions of all tensors. UserError if the smaller model does not pass the probe.

    A tensor may hold several places of a unit: in several sections, or next to one another. The probe keeps a random
    half of the units, for any sparsity: so a wrong layout shows.
    """
    unit_dimensions = []
    for dimension in dimensions:
        units = removal.unit_sets[dimension.unit_set]
        places = dimension.size // units.total
        layout = _sections(places, sum(units.layout)) if in_sections else (places,)
        unit_dimensions.append(UnitDimension(dimension.address, dimension.dim, dimension.unit_set, layout))
    complete = replace(removal, dimensions=tuple(unit_dimensions))
    generator = torch.Generator().manual_seed(0)
    kept = {}
    for name, units in removal.unit_sets.items():
        kept[name] = torch.randperm(units.total, generator=generator) < units.total // 2
    probe(source, complete.with_kept(kept), device)
    return complete


def _sections(places: int, inputs: int) -> tuple[int, ...]:
    """Return how many of a unit's features each section of a tensor has.

    The tensor computes `places` features of a unit, whose consumer reads `inputs`. Neurons: `gate_up_proj` computes 2,
    and `down_proj` reads 1: (1, 1). Heads, with 4 query heads of 64 features for a key head: `qkv_proj` computes 384,
    and `o_proj` reads 256: (256, 64, 64), the queries, the keys and the values.
    """
    more = places - inputs
    if more <= 0:
        return (places,)
    return (1,) * places if inputs == 1 else (inputs, more // 2, more - more // 2)


# --- blocks, heads and neurons together ---


def find_smaller(source: Checkpoint, structure: Structure, sparsity: Fraction, device: torch.device) -> Removal:
    """Return the blocks of a model, and the heads and neurons that its family lets go; all are kept so far."""
    blocks = find_block_units(source, STRUCTURES["blocks"], Fraction(0), device)
    removal = replace(blocks, structure=structure, sets_of={"blocks": tuple(blocks.unit_sets)})
    for name in ("heads", "neurons"):
        with contextlib.suppress(UserError):  # then all of them are kept
            units = find_input_units(source, STRUCTURES[name], Fraction(0), device)
            removal = replace(
                removal,
                unit_sets={**removal.unit_sets, **units.unit_sets},
                config_fields={**removal.config_fields, **units.config_fields},
                consumers={**removal.consumers, **units.consumers},
                dimensions=removal.dimensions + units.dimensions,
                sets_of={**removal.sets_of, name: tuple(units.unit_sets)},
            )
    return removal


# --- blocks ---


def find_block_units(source: Checkpoint, structure: Structure, sparsity: Fraction, _device: torch.device) -> Removal:
    """Return the blocks of a model, in one set. The probe needs the chosen blocks."""
    full = DenseModel(source, structure)
    content, blocks_name, total = full.config.to_dict(), full.blocks_name, len(full.linears)
    fields = {name: ConfigField(total, blocks_name) for name in structure.fields if content.get(name) == total}
    if not fields:
        raise full.refused(f"its configuration has no number of them (looked for {', '.join(structure.fields)})")
    for name, entries in block_lists(content, total).items():
        fields[name] = ConfigField(entries, blocks_name)
    # Another part of the model may have blocks too, such as a vision tower.
    prefix = next(iter(full.linears[0])).partition(".0.")[0] + "."
    unit_tensors = {}
    for name in source.file_of:
        number, _, suffix = name.removeprefix(prefix).partition(".")
        if name.startswith(prefix) and number.isdecimal():
            unit_tensors[name] = UnitTensor(blocks_name, int(number), prefix, f".{suffix}")
    units = Units(total, count_kept(total, sparsity), members=[[*names] for names in full.linears])
    return Removal(structure=structure, unit_sets={blocks_name: units}, config_fields=fields, unit_tensors=unit_tensors)


def block_lists(content: Mapping[str, Any], blocks: int) -> dict[str, list[Any]]:
    """Return a configuration's lists with an entry for each block, such as `layer_types`.

    A list of the numbers of all blocks, such as `attn_layer_indices` can be, has no entries that belong to blocks.
    """
    lists = {name: list(entries) for name, entries in content.items() if isinstance(entries, (list, tuple))}
    return {
        name: entries
        for name, entries in lists.items()
        if "layer" in name and len(entries) == blocks and entries != [*range(blocks)]
    }


# --- experts ---


def find_experts(source: Checkpoint, structure: Structure, sparsity: Fraction, _device: torch.device) -> Removal:
    """Return the routed experts of a model: the tensors whose size follows their number are theirs and the routers'.

    If routers choose from groups of experts, each group keeps the same number. The probe needs the chosen experts.
    """
    full = DenseModel(source, structure)
    content = full.config.to_dict()
    values = {name: content.get(name) for name in structure.fields}
    numbers = {name: value for name, value in values.items() if isinstance(value, int) and value > 1}
    if len(numbers) != 1:
        names, expected = ", ".join(numbers) or "none", ", ".join(structure.fields)
        raise full.refused(f"its configuration has {names}, expected one of {expected}")
    ((field, total),) = numbers.items()
    kept, groups = _count_kept_experts(content, total, sparsity)
    dims, mixtures = _mixture_tensors(full, field, total)
    dimensions, unit_tensors = [], {}
    mixture_of: dict[str, str] = {}  # by stored tensor
    for parameter, mixture in mixtures.items():
        for parameter_slice in full.slices[parameter]:
            tensor, expert = parameter_slice.address.tensor, parameter_slice.expert
            mixture_of[tensor] = mixture
            if expert is None:
                dimensions.append(UnitDimension(parameter_slice.address, dims[parameter], mixture, (1,)))
            else:  # the last such number in its name is the expert's
                prefix, _, suffix = tensor.rpartition(f".{expert}.")
                unit_tensors[tensor] = UnitTensor(mixture, expert, f"{prefix}.", f".{suffix}")
    members: dict[str, list[list[str]]] = {}  # by mixture: the linears of each expert
    for block in full.linears:
        for name, linear in block.items():
            mixture, expert = mixture_of.get(linear.slice.address.tensor, ""), linear.slice.expert
            if mixture and expert is not None:
                members.setdefault(mixture, [[] for _ in range(total)])[expert].append(name)
    return Removal(
        structure=structure,
        unit_sets={name: Units(total, kept, members=linears, groups=groups) for name, linears in members.items()},
        config_fields={field: ConfigField(total, next(iter(members)))},
        dimensions=tuple(dimensions),
        unit_tensors=unit_tensors,
        routers={name: mixtures[name] for name in dims if not full.experts(name)},
    )


def _count_kept_experts(content: Mapping[str, Any], total: int, sparsity: Fraction) -> tuple[int, int]:
    """Return the number of kept experts, and of groups, which keep equal numbers. UserError if routers choose more."""
    # Fields of every family with experts so far: a router may choose `topk_group` of the groups, then experts in them.
    groups = content.get("n_group") or 1
    kept = min(total, groups * max(1, round(total * (1 - sparsity) / groups)))
    available = kept // groups * (content.get("topk_group") or groups)
    per_token = content.get("num_experts_per_tok") or 0
    if available < per_token:
        raise UserError(
            f"sparsity: num_experts_per_tok is {per_token}, expected at most the {available} kept experts that a "
            "router offers; set a lower sparsity"
        )
    return kept, groups


def _mixture_tensors(full: DenseModel, field: str, total: int) -> tuple[dict[str, int], dict[str, str]]:
    """Return the dimension that counts experts, and the mixture, of each parameter of experts or routers."""
    dims = {name: dim for name, dim, _, _ in full.size_changes({field: total // 2})}
    # A mixture is all below the parent of a module of experts.
    parents = {name.rpartition(".")[0].rpartition(".")[0] for name in dims if full.experts(name)}
    if not parents:
        raise full.refused(f"{field} determines no tensor of experts")
    mixtures = {}
    for name in dims:
        around = [parent for parent in parents if name.startswith(f"{parent}.")]
        if not around:
            raise full.refused(f"{field} also determines {name}")
        mixtures[name] = max(around, key=len)
    return dims, mixtures
