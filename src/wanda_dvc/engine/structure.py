"""The structure of a causal language model: its blocks, their linears, and the stored name of each weight.

No family-specific code: blocks and linears are found in the model built by transformers, and stored names follow
transformers' conversion rules.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.pytorch_utils import Conv1D

from wanda_dvc.engine.checkpoint import SAFETENSORS_NAMES, Address, Checkpoint
from wanda_dvc.engine.windows import load_tokenizer
from wanda_dvc.errors import UserError, reason


@dataclass(frozen=True)
class ParameterSlice:
    """A slice of a parameter (some rows, one expert's matrix, or all), and the stored weight that fills it."""

    address: Address
    rows: tuple[int, int] | None = None  # from, up to; None: all
    expert: int | None = None  # of the parameter; `address.expert` is that of the stored tensor

    @property
    def is_complete(self) -> bool:
        """Whether it fills the complete parameter."""
        return self.rows is None and self.expert is None

    def of(self, parameter: Tensor) -> Tensor:
        """Return this slice of the parameter, as a view."""
        matrix = parameter if self.expert is None else parameter[self.expert]
        return matrix if self.rows is None else matrix[slice(*self.rows)]


@dataclass(frozen=True)
class Linear:
    """A prunable weight, as stored: a module's weight [out, in], some rows of it, or one expert's matrix."""

    module: nn.Module
    leaf: str  # the parameter's name in the module
    slice: ParameterSlice

    @property
    def weight(self) -> Tensor:
        """A view of the module's parameter."""
        return self.slice.of(self.module.get_parameter(self.leaf))

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored as [in, out]: GPT-2's, and experts declared transposed by transformers."""
        return isinstance(self.module, Conv1D) or getattr(self.module, "is_transposed", False)

    @property
    def features(self) -> int:
        """The number of input features."""
        return self.weight.shape[0 if self.transposed else 1]


def unsupported(where: object, why: str) -> UserError:
    """Return the error that a model's structure is not supported, with the reason."""
    return UserError(f"{where}: {why}; unsupported model structure: choose a model of a tested family (docs/data.md)")


def build_empty(config: Any, where: object, dtype: torch.dtype = torch.float32) -> Any:
    """Build a configuration's model for inference, with buffers but without weights; `where` names it in errors."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    try:
        with init_empty_weights(include_buffers=False), no_init_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        model.tie_weights()  # parameters created inside the context have lost it
        model.initialize_weights()  # buffers, some of which the constructor computes in 16 bits
    except Exception as error:  # a model's class may raise any exception, such as KeyError for an unknown activation
        raise UserError(
            f"{where}: transformers builds no {config.model_type} from config.json ({reason(error)}), expected "
            "sizes, activation and rope that it knows; correct it, or copy the file again"
        ) from error
    return model.eval()


def find_blocks(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """Return the name of the list of blocks, and the list: the only module list of the config's number of layers."""
    layers = model.config.get_text_config().num_hidden_layers  # type: ignore[operator, union-attr]
    lists = {
        name: list(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == layers
    }
    if len(lists) != 1:
        names = ", ".join(lists) or "none"
        raise unsupported(type(model).__name__, f"found {names} as lists of {layers} blocks, expected one")
    return next(iter(lists.items()))


def find_weights(block: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of a block's prunable weights, by the name of the parameter: all linears but gates of experts.

    A linear is torch's `Linear`, transformers' `Conv1D` (with a transposed weight), or a matrix of [experts, ·, ·].
    """
    weights: dict[str, nn.Module] = {}
    mixtures: dict[str, int] = {}  # the number of experts, by the parent of their module
    for name, parameter in block.named_parameters():
        module = block.get_submodule(_parent(name))
        if isinstance(module, (nn.Linear, Conv1D)) and name.endswith("weight"):
            weights[name] = module
        elif holds_experts(module, parameter):
            weights[name] = module
            mixtures[_parent(_parent(name))] = len(parameter)
    weights_below = Counter(_parent(_parent(name)) for name in weights)  # by the parent of their module
    # A gate chooses experts or weights the shared expert, so it has one output, or one per expert. It is a sibling of
    # the experts, such as Mixtral's `gate`, or the only linear in a sibling, such as JetMoE's `router.layer`.
    for mixture, experts in mixtures.items():
        for name, module in list(weights.items()):
            parent = _parent(_parent(name))
            is_near = parent == mixture or (_parent(parent) == mixture and weights_below[parent] == 1)
            if is_near and isinstance(module, nn.Linear) and module.out_features in (1, experts):
                del weights[name]
    return weights


def holds_experts(module: nn.Module, parameter: Tensor) -> bool:
    """Whether a module's parameter [experts, ·, ·] has a matrix for each of several experts."""
    is_convolution = isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    return parameter.dim() == 3 and min(parameter.shape[1:]) > 1 and not is_convolution


def count_experts(module: nn.Module) -> int:
    """Return the number of experts whose matrices a module's parameters hold; 0 without experts."""
    return max((len(x) for x in module.parameters(recurse=False) if holds_experts(module, x)), default=0)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def find_linears(block: nn.Module, prefix: str, slices: Mapping[str, list[ParameterSlice]]) -> dict[str, Linear]:
    """Return a block's linears by stored name, each expert's own; `prefix` precedes the block's names in the model."""
    linears: dict[str, Linear] = {}
    for name, module in find_weights(block).items():
        leaf = name.rpartition(".")[2]
        for parameter_slice in expert_slices(slices[prefix + name], count_experts(module)):
            linears[parameter_slice.address.linear] = Linear(module, leaf, parameter_slice)
    return linears


def expert_slices(slices: list[ParameterSlice], experts: int) -> list[ParameterSlice]:
    """Return a parameter's slices: if it has experts, one for each, also where one tensor has all."""
    if not experts or slices[0].expert is not None:
        return slices
    tensor = slices[0].address.tensor
    return [ParameterSlice(Address(tensor, expert), expert=expert) for expert in range(experts)]


def check_model(folder: Path) -> None:
    """Raise UserError if a directory does not hold a complete model that the stages can run, with its tokenizer."""
    checkpoint = Checkpoint(folder)
    find_slices(build_empty(checkpoint.config, checkpoint), checkpoint)
    load_tokenizer(folder)


def find_slices(model: Any, checkpoint: Checkpoint) -> dict[str, list[ParameterSlice]]:
    """Map each parameter and buffer to its stored weights, by transformers' own rules. No weight is read.

    Stored names may differ: older checkpoints have other names (GPT-NeoX's `embed_out`), some lack the base model's
    prefix, and each expert's matrix may be a tensor. UserError if a parameter is not stored in a supported form.
    """
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    state = model.state_dict(keep_vars=True)
    slices: dict[str, list[ParameterSlice]] = {}
    joined: dict[str, dict[str, str]] = {}  # the tensors of each parameter, with the converter's pattern of each
    for tensor in sorted(checkpoint.file_of, key=dot_natural_key):  # experts in index order
        name, pattern = rename_source_key(tensor, renamings, converters, model.base_model_prefix, state)
        if name not in state and tensor in state:  # a rule for other names matches this one: so does transformers
            name, pattern = rename_source_key(tensor, [], [], model.base_model_prefix, state)
        if name not in state:
            _check_block_exists(name, model, checkpoint)
        elif pattern is None:  # of no converter
            slices[name] = [ParameterSlice(Address(tensor))]
        else:
            joined.setdefault(name, {})[tensor] = pattern
    for name, patterns in joined.items():
        tensor, pattern = next(iter(patterns.items()))
        rule = next(rule for rule in converters if pattern in rule.source_patterns)
        if len(rule.target_patterns) > 1:
            raise unsupported(checkpoint, f"{tensor} holds several parameters, such as {name}")
        slices[name] = place_slices(name, patterns, rule, model, checkpoint)
    _check_is_stored(model, checkpoint, slices)
    return slices


def _check_is_stored(model: nn.Module, checkpoint: Checkpoint, slices: Mapping[str, Sequence[ParameterSlice]]) -> None:
    """Raise UserError if a parameter is not stored, has an unsupported dtype or another shape, or blocks share one."""
    in_blocks = f"{find_blocks(model)[0]}."
    aliases: dict[int, list[str]] = {}  # the names of each parameter
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
        expected = [*parameter.shape]
        for parameter_slice in slices.get(name, ()):
            tensor = parameter_slice.address.tensor
            entry = checkpoint.entries[tensor]
            if entry.dtype not in SAFETENSORS_NAMES.values():
                raise UserError(
                    f"{checkpoint.file_of[tensor]}: {tensor} is {entry.dtype}, expected "
                    f"{', '.join(SAFETENSORS_NAMES.values())}; name the model before it was quantized, or convert it"
                )
            if parameter_slice.is_complete and entry.shape != expected:
                what = f"{tensor} is {entry.shape}, expected {expected} by config.json"
                raise UserError(f"{checkpoint}: {what}; copy both again")
    for names in aliases.values():
        if not any(name in slices for name in names):
            raise UserError(
                f"{checkpoint}: no tensor for {names[0]}, which config.json asks for; copy the checkpoint again, or "
                "choose a model of a tested family (docs/data.md)"
            )
        if any(name.startswith(in_blocks) and name not in slices for name in names):
            raise unsupported(checkpoint, f"blocks share {names[0]}")


def _check_block_exists(tensor: str, model: Any, checkpoint: Checkpoint) -> None:
    """Raise UserError if a stored tensor belongs to a block after the last one that config.json has."""
    blocks_name, blocks = find_blocks(model)
    base = f"{model.base_model_prefix}."
    prefix, name = f"{blocks_name.removeprefix(base)}.", tensor.removeprefix(base)
    number = name.removeprefix(prefix).partition(".")[0]
    # Blocks for multi-token prediction do not count; the configuration or transformers declares them.
    ahead = getattr(model.config.get_text_config(), "num_nextn_predict_layers", None) or 0
    ignored = any(re.search(pattern, tensor) for pattern in model._keys_to_ignore_on_load_unexpected or ())
    if name.startswith(prefix) and number.isdecimal() and int(number) >= len(blocks) + ahead and not ignored:
        raise UserError(
            f"{checkpoint}: config.json has {len(blocks)} blocks, expected {int(number) + 1} or more: the checkpoint "
            f"stores {tensor}; copy both again"
        )


def place_slices(
    name: str, patterns: Mapping[str, str], rule: WeightConverter, model: Any, checkpoint: Checkpoint
) -> list[ParameterSlice]:
    """Return the slices of a parameter that stored tensors, each with its pattern, fill by a conversion rule.

    Converts small tensors instead, and finds each one's numbers in the result. Of two matrices, for example, these are
    0 to 5 in [2, 3] and 6 to 11 in [2, 3]; a rule that stacks them gives [4, 3] with the second one in rows 2 and 3.
    UserError if the rule does more than stack rows, expert by expert.
    """
    expected, tensors = list(model.get_parameter(name).shape), list(patterns)
    shapes = [checkpoint.entries[tensor].shape for tensor in tensors]
    small_shape = range(2, 2 + len(shapes[0]))  # its sizes differ, so that a transposition shows
    count = math.prod(small_shape)
    numbered = [(torch.arange(count) + count * index).view(*small_shape) for index in range(len(tensors))]
    rule = deepcopy(rule)
    for tensor, numbers in zip(tensors, numbered, strict=True):
        rule.add_tensor(name, tensor, patterns[tensor], numbers)  # type: ignore[arg-type] # it accepts tensors too
    slices = []
    try:
        (parameter,) = rule.convert(name, model=model, config=model.config).values()
        has_experts = parameter.dim() > len(small_shape)
        matrices = list(parameter) if has_experts else [parameter]
        for expert, matrix in enumerate(matrices):
            begin = 0
            for rows in matrix.split(len(numbered[0])):
                index = int(rows.flatten()[0]) // count
                if not torch.equal(rows, numbered[index]):
                    raise ValueError("their elements change places")
                end = begin + shapes[index][0]
                slices.append(ParameterSlice(Address(tensors[index]), (begin, end), expert if has_experts else None))
                begin = end
        shape = [begin, *shapes[0][1:]]
        if has_experts:
            shape = [len(matrices), *shape]
        if shape != expected or any(each[1:] != shapes[0][1:] for each in shapes):
            raise ValueError(f"together they are {shape}, expected {expected}")
    except Exception as error:  # a rule may raise any exception
        raise unsupported(checkpoint, f"{name} joins {len(tensors)} tensors like {tensors[0]}: {error}") from error
    return slices
