"""What a causal language model looks like inside: its blocks, their linears, and where each weight is stored.

No family is known by name. Blocks and linears are found in the model as transformers builds it, and stored names by
transformers' own rules of conversion.
"""

import math
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.pytorch_utils import Conv1D

from wanda_dvc.engine.checkpoint import Checkpoint
from wanda_dvc.errors import UserError


@dataclass(frozen=True)
class Part:
    """A stored tensor and its place in a parameter: some rows, of one expert where the parameter holds several."""

    name: str
    rows: tuple[int, int] | None = None  # from, up to; None: all
    expert: int | None = None

    def of(self, whole: Tensor) -> Tensor:
        """A view of this part of the parameter."""
        whole = whole if self.expert is None else whole[self.expert]
        return whole if self.rows is None else whole[slice(*self.rows)]


@dataclass(frozen=True)
class Linear:
    """A prunable weight [out, in], as it is stored: a module's own, or some rows of one, or one expert's."""

    module: nn.Module
    leaf: str
    part: Part

    @property
    def weight(self) -> Tensor:
        """A view of the module's parameter."""
        return self.part.of(self.module.get_parameter(self.leaf))

    @property
    def transposed(self) -> bool:
        """Whether the weight is [in, out]: GPT-2's, and experts of which transformers says so."""
        if self.part.expert is None:
            return isinstance(self.module, Conv1D)
        return bool(getattr(self.module, "is_transposed", False))

    @property
    def features(self) -> int:
        """The number of input features."""
        return self.weight.shape[0 if self.transposed else 1]


def empty_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model of a directory's config.json with no weights (buffers are real), for inference."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except ValueError as error:
        raise UserError(f"{folder / 'config.json'}: {config.model_type} is not a causal language model") from error
    model.tie_weights()  # parameters made anew inside the context have lost it
    return model.eval()


def find_blocks(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """The list of decoder layers and its name: the only module list as long as the config says there are layers."""
    layers = model.config.get_text_config().num_hidden_layers  # type: ignore[operator, union-attr]
    lists = [
        (name, list(module))
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == layers
    ]
    if len(lists) != 1:
        found = ", ".join(name for name, _ in lists) or "none"
        raise UserError(
            f"{type(model).__name__}: found {found} as lists of {layers} blocks, expected one; "
            "such a structure is not understood"
        )
    return lists[0]


def find_linears(block: nn.Module) -> dict[str, nn.Module]:
    """The weights of a block to prune, by name, with the modules that they belong to.

    A linear is torch's, or transformers' `Conv1D`, which is one with its weight transposed; or one matrix of a
    parameter [experts, ·, ·]. The gates of experts are no linears, wherever they are written as such.
    """
    weights: dict[str, nn.Module] = {}
    mixtures: dict[str, int] = {}  # modules that have experts, and how many
    for name, module in block.named_modules():
        inside = f"{name}." if name else ""
        if isinstance(module, (nn.Linear, Conv1D)):
            weights[inside + "weight"] = module
        elif not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            for leaf, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 3 and min(parameter.shape) > 1:
                    weights[inside + leaf] = module
                    mixtures[name.rpartition(".")[0]] = len(parameter)
    owners = [name.rpartition(".")[0].rpartition(".")[0] for name in weights]

    def is_gate(name: str, module: nn.Module) -> bool:
        """Whether a linear chooses experts or weighs the shared one: it has as many outputs as there are experts,
        or one, and stands beside them, itself or as the only linear of a module that does."""
        owner = name.rpartition(".")[0].rpartition(".")[0]
        return isinstance(module, nn.Linear) and any(
            module.out_features in (1, experts)
            and (owner == mixture or (owner.rpartition(".")[0] == mixture and owners.count(owner) == 1))
            for mixture, experts in mixtures.items()
        )

    return {name: module for name, module in weights.items() if not is_gate(name, module)}


def weight_shapes(block: nn.Module) -> list[torch.Size]:
    """The shapes of a block's weights to prune: [out, in], or of all experts together [experts, ·, ·]."""
    return [module.get_parameter(name.rpartition(".")[2]).shape for name, module in find_linears(block).items()]


def stored_names(model: Any, checkpoint: Checkpoint) -> dict[str, list[Part]]:
    """What the checkpoint stores of each parameter and buffer, by transformers' own rules.

    Older checkpoints have other names (GPT-NeoX's `embed_out`), some the bare base model without its prefix, and
    each expert's matrices lie for themselves.
    """
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    state = model.state_dict(keep_vars=True)
    names: dict[str, list[Part]] = {}
    pieces: dict[str, list[tuple[str, str]]] = {}
    for tensor in sorted(checkpoint.where, key=dot_natural_key):  # experts in their order
        name, pattern = rename_source_key(tensor, renamings, converters, model.base_model_prefix, state)
        if name not in state:
            continue
        if pattern is None:
            names[name] = [Part(tensor)]
        else:
            pieces.setdefault(name, []).append((pattern, tensor))
    for name, stored in pieces.items():
        rule = next(rule for rule in converters if stored[0][0] in rule.source_patterns)
        if len(rule.target_patterns) == 1:
            names[name] = place_parts(name, stored, rule, model, checkpoint)
    return names


def place_parts(
    name: str, stored: list[tuple[str, str]], rule: WeightConverter, model: Any, checkpoint: Checkpoint
) -> list[Part]:
    """Where each of the tensors (with their patterns in the rule) that a parameter is made of lies in it.

    The rule is asked: it converts small tensors of marks, which are then found again. UserError if it does more
    than to put rows one below the other, expert by expert.
    """
    expected = list(model.get_parameter(name).shape)
    shapes = [list(checkpoint.read(tensor).shape) for _, tensor in stored]
    shape = range(2, 2 + len(shapes[0]))
    size = math.prod(shape)
    marks = [(torch.arange(size) + size * number).view(*shape) for number in range(len(stored))]
    rule = deepcopy(rule)
    for (pattern, tensor), mark in zip(stored, marks, strict=True):
        rule.add_tensor(name, tensor, pattern, mark)  # type: ignore[arg-type] # it takes tensors too
    parts = []
    try:
        (made,) = rule.convert(name, model=model, config=model.config).values()
        several = made.dim() > len(shape)
        for expert, rows in enumerate(made if several else [made]):
            begin = 0
            for found in rows.split(shape[0]):
                number = int(found.flatten()[0]) // size
                if not torch.equal(found, marks[number]):
                    raise ValueError("their elements change places")
                end = begin + shapes[number][0]
                parts.append(Part(stored[number][1], (begin, end), expert if several else None))
                begin = end
            result = [*([len(made)] if several else []), begin, *shapes[0][1:]]
            if result != expected or any(each[1:] != shapes[0][1:] for each in shapes):
                raise ValueError(f"together they are {result}, expected {expected}")
    except Exception as error:  # whatever a rule does not like
        raise UserError(
            f"{checkpoint.folder}: {name} is made of {len(stored)} tensors like {stored[0][1]}, "
            f"in a way that is not understood: {error}"
        ) from error
    return parts
