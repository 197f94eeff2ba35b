"""The structure of a causal language model: its blocks, their linears, and the stored name of each weight.

No family-specific code: blocks and linears are found in the model built by transformers, and stored names follow
transformers' conversion rules.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.pytorch_utils import Conv1D

from wanda_dvc.engine.checkpoint import STORED, Address, Checkpoint
from wanda_dvc.engine.windows import load_tokenizer
from wanda_dvc.errors import UserError, reason


@dataclass(frozen=True)
class StoredSlice:
    """A stored weight and its place in a parameter: some rows, and the expert in a parameter of several."""

    address: Address
    rows: tuple[int, int] | None = None  # from, up to; None: all
    expert: int | None = None

    @property
    def is_complete(self) -> bool:
        """Whether it is the complete parameter."""
        return self.rows is None and self.expert is None

    def of(self, tensor: Tensor) -> Tensor:
        """Return a view of this part of the parameter."""
        tensor = tensor if self.expert is None else tensor[self.expert]
        return tensor if self.rows is None else tensor[slice(*self.rows)]


@dataclass(frozen=True)
class Linear:
    """A prunable weight [out, in], as stored: a module's weight, some rows of it, or one expert's matrix."""

    module: nn.Module
    leaf: str
    part: StoredSlice

    @property
    def weight(self) -> Tensor:
        """A view of the module's parameter."""
        return self.part.of(self.module.get_parameter(self.leaf))

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
    """Build the model of a configuration for inference, without weights (buffers are real).

    `where` is the model's name in messages. UserError if transformers builds no model.
    """
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
    every = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    lists = [(name, list(module)) for name, module in every if len(module) == layers]
    if len(lists) != 1:
        found = ", ".join(name for name, _ in lists) or "none"
        raise unsupported(type(model).__name__, f"found {found} as lists of {layers} blocks, expected one")
    return lists[0]


def find_linears(block: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of a block's prunable weights, by the name of the parameter.

    A linear is torch's `Linear`, transformers' `Conv1D` (with a transposed weight), or one matrix of a parameter
    [experts, ·, ·]. The gates of experts do not count as linears, even if they are `Linear` modules.
    """
    weights: dict[str, nn.Module] = {}
    mixtures: dict[str, int] = {}  # the number of experts of each module with experts
    for name, module in block.named_modules():
        inside = f"{name}." if name else ""
        if isinstance(module, (nn.Linear, Conv1D)):
            weights[inside + "weight"] = module
        elif not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            for leaf, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 3 and min(parameter.shape[1:]) > 1:
                    weights[inside + leaf] = module
                    mixtures[name.rpartition(".")[0]] = len(parameter)
    owners = [name.rpartition(".")[0].rpartition(".")[0] for name in weights]  # the parent of each weight's module

    def is_gate(module: nn.Module, owner: str) -> bool:
        """Whether a linear chooses experts, or weights the shared expert.

        It has one output, or one per expert, and is a sibling of the experts, or the only linear in a sibling.
        """
        return isinstance(module, nn.Linear) and any(
            module.out_features in (1, experts)
            and (owner == mixture or (owner.rpartition(".")[0] == mixture and owners.count(owner) == 1))
            for mixture, experts in mixtures.items()
        )

    pairs = zip(weights.items(), owners, strict=True)
    return {name: module for (name, module), owner in pairs if not is_gate(module, owner)}


def stored_linears(block: nn.Module, prefix: str, parts_of: Callable[[str], list[StoredSlice]]) -> dict[str, Linear]:
    """Return a block's linears by stored name; each expert has its own.

    `prefix` precedes the block's names in the model, and `parts_of` returns the parts of a parameter.
    """
    linears: dict[str, Linear] = {}
    for name, module in find_linears(block).items():
        leaf = name.rpartition(".")[2]
        parts = parts_of(prefix + name)
        shape = module.get_parameter(leaf).shape
        if len(shape) == 3 and parts[0].expert is None:  # all experts in one tensor
            addresses = [Address(parts[0].address.tensor, expert) for expert in range(shape[0])]
            parts = [StoredSlice(address, expert=address.expert) for address in addresses]
        linears |= {part.address.linear: Linear(module, leaf, part) for part in parts}
    return linears


def check_model(folder: Path) -> None:
    """Check that a directory holds a complete model that the stages can run, with its tokenizer.

    UserError if index, shards, configuration, weights or tokenizer are damaged, or weights and configuration differ.
    """
    checkpoint = Checkpoint(folder)
    model = build_empty(checkpoint.config, checkpoint)
    find_blocks(model)
    stored_parts(model, checkpoint)
    load_tokenizer(folder)


def stored_parts(model: Any, checkpoint: Checkpoint) -> dict[str, list[StoredSlice]]:
    """Map each parameter and buffer to its stored weights, by transformers' own rules.

    Stored names may differ from the model's: older checkpoints have other names (GPT-NeoX's `embed_out`), some lack
    the base model's prefix, and each expert's matrix may be a separate tensor. UserError if a parameter is not stored
    completely, or in an unsupported dtype; of tied ones, one is enough. No weight is read.
    """
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    state = model.state_dict(keep_vars=True)
    parts: dict[str, list[StoredSlice]] = {}
    pieces: dict[str, list[tuple[str, str]]] = {}
    for tensor in sorted(checkpoint.where, key=dot_natural_key):  # experts in index order
        name, pattern = rename_source_key(tensor, renamings, converters, model.base_model_prefix, state)
        if name not in state and tensor in state:  # a rule for other names matches this one: so does transformers
            name, pattern = rename_source_key(tensor, [], [], model.base_model_prefix, state)
        if name not in state:
            _check_is_no_block(name, model, checkpoint)
            continue
        if pattern is None:
            parts[name] = [StoredSlice(Address(tensor))]
        else:
            pieces.setdefault(name, []).append((pattern, tensor))
    for name, stored in pieces.items():
        rule = next(rule for rule in converters if stored[0][0] in rule.source_patterns)
        if len(rule.target_patterns) > 1:
            raise unsupported(checkpoint, f"{stored[0][1]} holds several parameters, such as {name}")
        parts[name] = place_parts(name, stored, rule, model, checkpoint)
    _check_parts(model, checkpoint, parts)
    return parts


def _check_parts(model: nn.Module, checkpoint: Checkpoint, parts: Mapping[str, Sequence[StoredSlice]]) -> None:
    entries, inside = checkpoint.entries, f"{find_blocks(model)[0]}."
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    for names in aliases.values():
        stored = [name for name in names if name in parts]
        if not stored:
            raise UserError(
                f"{checkpoint}: no tensor for {names[0]}, which config.json asks for; copy the checkpoint again, or "
                "choose a model of a tested family (docs/data.md)"
            )
        if any(name.startswith(inside) and name not in parts for name in names):
            raise unsupported(checkpoint, f"blocks share {names[0]}")
        for name in stored:
            for tensor in dict.fromkeys(part.address.tensor for part in parts[name]):
                if (dtype := entries[tensor].dtype) not in STORED.values():
                    usual = ", ".join([*STORED.values()][:3])
                    raise UserError(
                        f"{checkpoint.where[tensor]}: {tensor} is {dtype}, expected {usual}; "
                        "name the model before it was quantized, or convert it"
                    )
            if parts[name][0].is_complete:
                tensor, expected = parts[name][0].address.tensor, list(model.get_parameter(name).shape)
                if entries[tensor].shape != expected:
                    raise UserError(
                        f"{checkpoint}: {tensor} is {entries[tensor].shape}, expected {expected} by "
                        "config.json; copy both again"
                    )


def _check_is_no_block(tensor: str, model: Any, checkpoint: Checkpoint) -> None:
    """Raise UserError if a stored tensor belongs to a block after the model's last block.

    Blocks for multi-token prediction do not count; transformers or the configuration declares them.
    """
    name, blocks = find_blocks(model)
    base = model.base_model_prefix
    found = re.match(rf"(?:{re.escape(base)}\.)?{re.escape(name.removeprefix(f'{base}.'))}\.(\d+)\.", tensor)
    ahead = getattr(model.config.get_text_config(), "num_nextn_predict_layers", None) or 0
    ignored = any(re.search(pattern, tensor) for pattern in model._keys_to_ignore_on_load_unexpected or ())
    if found and int(found[1]) >= len(blocks) + ahead and not ignored:
        raise UserError(
            f"{checkpoint}: config.json has {len(blocks)} blocks, expected {int(found[1]) + 1} or more: the "
            f"checkpoint stores {tensor}; copy both again"
        )


def place_parts(
    name: str, stored: list[tuple[str, str]], rule: WeightConverter, model: Any, checkpoint: Checkpoint
) -> list[StoredSlice]:
    """Return each stored tensor's place in a parameter. Tensors are given with their patterns in the rule.

    The function converts small tensors of marks by the rule, and finds the marks in the result. UserError if the rule
    does more than stack rows, expert by expert.
    """
    expected = list(model.get_parameter(name).shape)
    shapes = [checkpoint.entries[tensor].shape for _, tensor in stored]
    shape = range(2, 2 + len(shapes[0]))
    size = math.prod(shape)
    marks = [(torch.arange(size) + size * number).view(*shape) for number in range(len(stored))]
    rule = deepcopy(rule)
    for (pattern, tensor), mark in zip(stored, marks, strict=True):
        rule.add_tensor(name, tensor, pattern, mark)  # type: ignore[arg-type] # it accepts tensors too
    parts = []
    try:
        (made,) = rule.convert(name, model=model, config=model.config).values()
        several = made.dim() > len(shape)
        for expert, rows in enumerate(made if several else [made]):
            begin = 0
            for found in rows.split(len(marks[0])):
                number = int(found.flatten()[0]) // size
                if not torch.equal(found, marks[number]):
                    raise ValueError("their elements change places")
                end = begin + shapes[number][0]
                parts.append(StoredSlice(Address(stored[number][1]), (begin, end), expert if several else None))
                begin = end
            result = [*([len(made)] if several else []), begin, *shapes[0][1:]]
            if result != expected or any(each[1:] != shapes[0][1:] for each in shapes):
                raise ValueError(f"together they are {result}, expected {expected}")
    except Exception as error:  # a rule may raise any exception
        raise unsupported(checkpoint, f"{name} joins {len(stored)} tensors like {stored[0][1]}: {error}") from error
    return parts
