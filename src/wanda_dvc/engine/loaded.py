"""Reads a model in memory as a checkpoint, with the names and weights that transformers would save."""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import output_capturing

from wanda_dvc.engine.check import check_parts
from wanda_dvc.engine.checkpoint import STORED, Address, Source
from wanda_dvc.engine.removal import Smaller
from wanda_dvc.engine.structure import Linear, build_empty, find_blocks, stored_linears, stored_parts
from wanda_dvc.engine.weights import Weights, set_parameter
from wanda_dvc.errors import UserError
from wanda_dvc.reading import Entry

CAPTURES = "_output_capturing_hooks_installed"  # where transformers notes its hooks


class Loaded(Source):
    """A causal language model of transformers, in memory. Its tensors are views of the model's parameters.

    Nothing is copied, and the model never runs: the engine builds an empty model from the configuration, and uses these
    weights in it. So the model's flags and configuration do not change and have no effect.

    Raises:
        UserError: `AutoModelForCausalLM` does not build such a model, some weights are not in memory, or the model
            computes more than its class: hooks, a replaced `forward`, adapters or parametrized weights.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._name = type(model).__name__
        if getattr(model, "hf_quantizer", None) is not None:
            raise UserError("model: got quantized weights, expected plain ones; call model.dequantize() first")
        _check_plain(model)
        self._state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        if away := [name for name, tensor in self._state.items() if tensor.is_meta]:
            raise UserError(
                f"model: {len(away)} of {len(self._state)} tensors are on the meta device ({away[0]}), expected all in "
                "memory; load it without offloading, or run the pipeline, which needs two blocks in memory"
            )
        built: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), None)
        if built is not type(model):
            expected = f"{built.__name__}, as it builds from this configuration" if built else "a class that it builds"
            raise UserError(f"model: got {self._name}, expected {expected}; load it with AutoModelForCausalLM")
        # Names and shapes alone: on real tensors the conversion would copy every expert.
        empty = {name: tensor.to("meta") for name, tensor in self._state.items()}
        self._stored: dict[str, Tensor] = revert_weight_conversion(model, empty)
        self._parts = stored_parts(model, self)
        check_parts(model, self, self._parts)
        self.linears  # noqa: B018 - refuses weights that linears share
        self._places = {part.address.tensor: (name, part) for name, parts in self._parts.items() for part in parts}

    def __str__(self) -> str:
        return self._name

    @cached_property
    def where(self) -> dict[str, str]:
        """The model's name, for each tensor."""
        return dict.fromkeys(self._stored, self._name)

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """Dtype and shape of each tensor."""
        return {
            name: Entry(STORED.get(x.dtype, str(x.dtype)), list(x.shape), 0, x.nbytes)
            for name, x in self._stored.items()
        }

    @cached_property
    def config(self) -> Any:
        """Return the configuration in its saved form: without this model's choice of attention."""
        config = self.model.config
        return type(config).from_dict(config.to_dict())

    @property
    def config_name(self) -> str:
        """The model's attribute."""
        return f"{self._name}.config"

    @cached_property
    def linears(self) -> dict[str, Linear]:
        """The prunable weights of all blocks, by stored name; each expert has its own."""
        where, blocks = find_blocks(self.model)
        found = {
            name: linear
            for index, block in enumerate(blocks)
            for name, linear in stored_linears(block, f"{where}.{index}.", self._parts.__getitem__).items()
        }
        places: dict[tuple[int, int], str] = {}
        for name, linear in found.items():
            first = places.setdefault((linear.weight.data_ptr(), linear.weight.numel()), name)
            if first != name:
                raise UserError(
                    f"model: {first} and {name} share one weight, expected a weight for each linear: masks of one "
                    "would prune the other; give one of them a copy"
                )
        return found

    @property
    def vocabulary(self) -> int:
        """The number of embeddings."""
        embeddings: Any = self.model.get_input_embeddings()
        return len(embeddings.weight)

    @property
    def device(self) -> torch.device:
        """The device of the model's embeddings, on which windows run."""
        embeddings: Any = self.model.get_input_embeddings()
        return embeddings.weight.device

    def read(self, address: Address) -> Tensor:
        """Return a stored tensor as a view of its parameter."""
        name, part = self._places[address.tensor]
        found = part.of(self._state[name])
        return found if address.expert is None else found[address.expert]

    def parameter(self, name: str, stored: Address | None) -> Tensor | None:
        """Return the parameter itself; experts are together if the model has them together."""
        return self._state[name]

    def fingerprint(self) -> dict[str, int]:
        """Return a checksum of each parameter and buffer; different values almost always change it.

        It sums the bits of every weight, with each row multiplied by its index, in one pass over the weights.
        """
        return {name: _sum_of_bits(tensor) for name, tensor in self._state.items()}


def _check_plain(model: PreTrainedModel) -> None:
    """Raise UserError if a module computes more than its class: the engine would leave that out."""
    for name, module in model.named_modules():
        where = f"model: {name or type(model).__name__}"
        if type(module).__module__.partition(".")[0] == "peft":
            raise UserError(f"{where}: an adapter of PEFT, expected plain linears; merge the adapter first")
        if is_parametrized(module) or {"weight_orig", "weight_g"} & module._parameters.keys():
            raise UserError(
                f"{where}: a parametrized weight, such as weight norm or torch's pruning, expected a plain weight; "
                "make it permanent first (`parametrize.remove_parametrizations`, `remove_weight_norm`, `prune.remove`)"
            )
        if "forward" in vars(module) and not hasattr(module, "_hf_hook"):  # accelerate's only moves weights
            raise UserError(f"{where}: its forward was replaced, and the engine would not call it; restore it")
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if {getattr(hook, "__module__", "").partition(".")[0] for hook in hooks} - {"transformers", "accelerate"}:
            raise UserError(f"{where}: has forward hooks, and the engine would not call them; remove them first")


def _sum_of_bits(tensor: Tensor) -> int:
    """Return the sum of the rows' sums, each times its index, modulo 2⁶⁴; 8 bytes at a time is 8 times as fast."""
    aligned = tensor.is_contiguous() and not (tensor.storage_offset() * tensor.itemsize) % 8
    wide = aligned and tensor.dim() > 1 and not (tensor.shape[-1] * tensor.itemsize) % 8
    bits = tensor.view(torch.int64 if wide else getattr(torch, f"int{8 * tensor.itemsize}"))
    rows = bits.sum(dim=-1, dtype=torch.int64).flatten() if bits.dim() > 1 else bits.long().flatten()
    return int((rows * torch.arange(1, len(rows) + 1, device=rows.device)).sum())


def shrink(model: Any, smaller: Smaller) -> None:
    """Give a model in memory the blocks of its smaller version, in place, and a configuration to match.

    The smaller version's source is the model itself. Weights that stay complete are not copied. Hooks on the old blocks
    are lost. Memory: the smaller copies of all cut tensors, until all blocks are ready.
    """
    new = build_empty(smaller.config, smaller.config_name, model.dtype)
    weights = Weights(new, smaller, device=model.get_input_embeddings().weight.device)
    where, blocks = find_blocks(model)
    old = [blocks[index] for index in smaller.removal.order(where, len(blocks))]
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
