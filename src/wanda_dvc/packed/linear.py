"""Lets transformers load a packed directory: a quantizer, and a linear that computes with packed weights.

`import wanda_dvc` registers the quantizer as soon as transformers is imported.
"""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers.quantizers import auto
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from wanda_dvc.engine import accelerator
from wanda_dvc.errors import UserError
from wanda_dvc.packed.format import KEEP, METHOD, Packing, bits_shape, checksum, is_two_of_four
from wanda_dvc.packed.kernel import MULTIPLIED, WIDTHS, expand, kernel, multiply, row_starts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SPARSE, CARD = "2:4", "cuda"
FEW = 8  # maximum tokens for which the kernel is faster than an expanded weight in torch

_scratch = threading.local()


class PackedLinear(nn.Module):
    """A linear with a packed weight. For few tokens on a CPU, `packed.kernel` multiplies by the packed weight.

    For more tokens it is expanded into one reused buffer, and torch multiplies. `weight` [nonzeros] has the weight's
    nonzeros row by row, `weight_keep` uint8 [rows, ⌈columns / 8⌉] their positions; call `settle` after changes by hand.
    Inference only: the weight gets no gradient.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    weight_keep: Tensor

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, dtype: torch.dtype | None = None, nonzeros: int = 0
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(nonzeros, dtype=dtype), requires_grad=False)
        self.register_buffer("weight_keep", torch.empty(bits_shape(out_features, in_features), dtype=torch.uint8))
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype)) if bias else None
        self.starts: Tensor | None = None  # of the rows in `weight`, if there is a kernel
        self.register_load_state_dict_post_hook(_settle)

    def settle(self) -> None:
        """Compute the starts of the rows."""
        self.starts = row_starts(self.weight_keep)

    def forward(self, x: Tensor) -> Tensor:
        """Return xWᵀ + b."""
        if self.starts is not None and self._few(x):
            return multiply(x, self.weight, self.weight_keep, self.starts, self.bias)
        return nn.functional.linear(x, self.dense(reuse=not (torch.is_grad_enabled() and x.requires_grad)), self.bias)

    def _few(self, x: Tensor) -> bool:
        """Whether to use the kernel, which has no gradients."""
        learns = torch.is_grad_enabled() and (x.requires_grad or (self.bias is not None and self.bias.requires_grad))
        alike = x.device.type == self.weight.device.type == "cpu" and x.dtype == self.weight.dtype
        alike &= x.shape[-1] == self.in_features
        return alike and x.dtype in MULTIPLIED and x.numel() <= FEW * self.in_features and not learns

    def dense(self, *, reuse: bool = False) -> Tensor:
        """Return the weight [out, in], bit-identical; with `reuse` in a buffer that the next call overwrites."""
        shape, values, device = (self.out_features, self.in_features), self.weight.detach(), self.weight.device
        buffers = vars(_scratch).setdefault("buffers", {}) if reuse else {}
        size, key = shape[0] * shape[1], (device, values.dtype)
        if key not in buffers or buffers[key].numel() < size:
            with torch.inference_mode(False):  # else only a later inference mode could write into it
                buffers[key] = torch.empty(size, dtype=values.dtype, device=device)
        out = buffers[key][:size].view(shape)
        if self.starts is not None and device.type == "cpu" and values.itemsize in WIDTHS:
            expand(values, self.weight_keep, self.starts, out)
            return out
        shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=device)
        keep = (self.weight_keep[:, :, None] >> shifts).bitwise_and_(1).flatten(1)[:, : self.in_features].bool()
        return out.zero_().masked_scatter_(keep, values)

    def unpacked(self, store: Callable[[Tensor], Tensor] = lambda weight: weight) -> nn.Linear:
        """Return the ordinary linear, with its weight [out, in] converted by `store`."""
        made = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        made.weight = nn.Parameter(store(self.dense()), requires_grad=False)
        made.bias = cast("nn.Parameter", self.bias)  # or None, as in nn.Linear
        return made

    def extra_repr(self) -> str:
        """Return a linear's description, with the number of nonzeros."""
        return f"in_features={self.in_features}, out_features={self.out_features}, nonzeros={self.weight.numel()}"


def _settle(linear: PackedLinear, _: Any) -> None:  # of the module, so that a model can be pickled
    linear.settle()


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):
    """The `quantization_config` of a packed directory, and the form of the weights after loading.

    `dequantize` makes the model dense. `sparse="2:4"` gives the weights to NVIDIA's sparse tensor cores.
    """

    def __init__(self, dequantize: bool = False, sparse: str | None = None, **stored: Any) -> None:
        if sparse not in (None, SPARSE):
            raise UserError(f"PackedConfig: sparse: got {sparse}, expected {SPARSE}")
        if sparse and dequantize:
            raise UserError("PackedConfig: got sparse and dequantize, expected one of them")
        self.quant_method = METHOD  # type: ignore[assignment] # its own methods are an enumeration
        self.dequantize, self.sparse = dequantize, sparse
        self.stored = stored

    @property
    def packing(self) -> Packing:
        """The packed weights of the directory. UserError if their description is not valid."""
        return Packing.parse(self.stored, "config.json")

    def get_loading_attributes(self) -> dict[str, Any]:
        """Return the options set by `from_pretrained(quantization_config=PackedConfig(...))`."""
        return {"dequantize": self.dequantize, "sparse": self.sparse}

    def to_dict(self) -> dict[str, Any]:
        """Return the form of config.json."""
        return {**self.stored, "quant_method": METHOD}


# transformers takes loading attributes from the types named there, and knows no other way to add one.
_TYPES = "LOADING_ATTRIBUTES_CONFIG_TYPES"
setattr(auto, _TYPES, (*getattr(auto, _TYPES), PackedConfig))


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):
    """Loads packed weights, and keeps them packed in memory."""

    quantization_config: PackedConfig
    requires_calibration = True  # in transformers' terms: loads packed weights, and packs none itself

    def validate_environment(self, *_: Any, **__: Any) -> None:
        """Raise for options that this machine does not support, before loading."""
        if self.quantization_config.sparse and not accelerator.has_sparse_cores():
            raise UserError(f"sparse={SPARSE}: no CUDA device for it, expected Ampere (8.0) or later; load without it")

    def _process_model_before_weight_loading(
        self, model: "PreTrainedModel", checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        """Check the files, and make the linears of packed weights packed ones."""
        self.packing = self.quantization_config.packing
        # A device map counts the parameters before they are loaded.
        sizes = self.packing.check_files(map(Path, checkpoint_files)) if checkpoint_files else {}
        for name, (_dtype, shape) in self.packing.weights.items():
            linear = model.get_submodule(name.removesuffix(".weight"))
            if not isinstance(linear, nn.Linear) or (linear.out_features, linear.in_features) != shape:
                raise UserError(f"config.json: quantization_config: {name}: {list(shape)} is no linear of this model")
            with torch.device("meta"):
                packed = PackedLinear(
                    linear.in_features,
                    linear.out_features,
                    bias=linear.bias is not None,
                    dtype=linear.weight.dtype,
                    nonzeros=sizes.get(name, 0),
                )
            model.set_submodule(name.removesuffix(".weight"), packed)
        self.dtypes = {name: model.get_parameter(name).dtype for name in self.packing.weights}

    def param_needs_quantization(self, model: "PreTrainedModel", param_name: str, **_: Any) -> bool:
        """Whether a parameter may differ from the model's shape: the number of nonzeros is not known yet."""
        return param_name in self.packing.weights

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **_: Any) -> None:
        """Check the loaded weights, and make them dense or sparse if requested."""
        linears = []
        for name in self.packing.weights:
            linear = cast("PackedLinear", model.get_submodule(name.removesuffix(".weight")))
            values = linear.weight.detach()
            if values.is_meta:
                raise UserError(f"{name}: not in memory, expected packed weights there; load without offloading")
            self.packing.check(name, values, linear.weight_keep, values.dtype)  # transformers may have converted them
            linear.weight = nn.Parameter(values.to(self.dtypes[name]), requires_grad=False)
            linear.settle()
            linears.append(linear)
        if self.quantization_config.sparse:
            _give_to_sparse_cores(model)
            return
        # Without a kernel a CPU would expand every weight for every token.
        slow = all(linear.weight.device.type == "cpu" for linear in linears) and kernel() is None
        if self.quantization_config.dequantize or slow:
            self.dequantize(model)

    def get_state_dict_and_metadata(self, model: "PreTrainedModel") -> tuple[None, dict[str, str]]:
        """Describe the weights as they are now in the configuration, which `save_pretrained` then writes."""
        weights: dict[str, tuple[torch.dtype, tuple[int, int]]] = {}
        sums: dict[str, int] = {}
        for name, (_dtype, shape) in self.packing.weights.items():
            linear = cast("PackedLinear", model.get_submodule(name.removesuffix(".weight")))
            weights[name] = linear.weight.dtype, shape
            sums |= {name: checksum(linear.weight), name + KEEP: checksum(linear.weight_keep)}
        self.quantization_config.stored = Packing(weights, sums).as_json()
        return None, {}  # the model's own weights

    def _dequantize(self, model: "PreTrainedModel", dtype: torch.dtype | str | None = None) -> "PreTrainedModel":
        if self.quantization_config.sparse:
            raise UserError(f"dequantize: got a model with sparse={SPARSE}; load it with dequantize=True instead")
        for path, linear in [*model.named_modules()]:
            if isinstance(linear, PackedLinear):
                model.set_submodule(path, linear.unpacked())
        return model

    def is_serializable(self) -> bool:
        """Whether `save_pretrained` writes a loadable directory. The sparse cores' layout is not a file format."""
        return self.quantization_config.sparse is None

    @property
    def is_trainable(self) -> bool:
        """Whether the weights get gradients."""
        return False


def _give_to_sparse_cores(model: "PreTrainedModel") -> None:
    """Replace packed linears by ordinary ones whose weights have torch's semi-structured layout.

    UserError, before any change, if a linear is not on a CUDA device or has another pattern than 2:4.
    """
    linears = {path: module for path, module in model.named_modules() if isinstance(module, PackedLinear)}
    for path, linear in linears.items():
        if linear.weight.device.type != CARD:
            found = linear.weight.device
            raise UserError(f'{path}: on {found}, expected a CUDA device for sparse={SPARSE}; add device_map="cuda"')
        if not is_two_of_four(linear.weight_keep.cpu(), linear.in_features):
            raise UserError(f"{path}: no 2:4 pattern, expected one for sparse={SPARSE}; prune with pattern=2:4")
    for path, linear in linears.items():
        try:
            model.set_submodule(path, linear.unpacked(accelerator.semi_structured))
        except RuntimeError as error:  # a shape or dtype that the cores do not support
            raise UserError(f"{path}: sparse={SPARSE}: {error}; load without it") from None
