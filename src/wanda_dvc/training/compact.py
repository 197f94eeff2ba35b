"""AdamW in 5 bytes a parameter, the weight included, which steps inside the backward pass.

A weight is in bfloat16, as the model reads it, apart from the next 8 bits of its float32 value. Both moments have 8
bits a value, with a scale for each block of values (Dettmers et al. 2022, https://arxiv.org/abs/2110.02861).

torchao 0.18 compiles such an optimizer, on CPUs with a C++ compiler; bitsandbytes 0.50 copies each parameter to
float32, and rounds weights to the nearest in bfloat16. In both, rounding loses most steps of a second moment.
"""

from functools import partial
from typing import Any

import torch
from jaxtyping import BFloat16, Float32, Int8
from torch import Tensor
from torch.nn.functional import pad

from wanda_dvc.engine.memory import VALUES_OF_SCALE
from wanda_dvc.training.sharding import local

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8  # torch's defaults
# Values that are updated at a time, by kind of device: few enough for a CPU's caches, and few kernels for a GPU.
UPDATED_AT_A_TIME = {"cpu": 2**18, "cuda": 2**24, "mps": 2**24}


class CompactAdamW(torch.optim.Optimizer):
    """AdamW without weight decay for weights in bfloat16. A gradient exists until its parameter is updated.

    The gradient of each zero in a matrix is ignored, so zeros stay zero. Groups have one parameter each. Of a split
    parameter, each process updates its part.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {"step": 0})
        for index, group in enumerate(self.param_groups):
            group["params"][0].register_post_accumulate_grad_hook(partial(self._update, index))

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Do nothing: the backward pass has updated the parameters."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the result of `state_dict`. torch's own method would convert each state to the parameter's dtype."""
        for index, (group, loaded) in enumerate(zip(self.param_groups, state_dict["param_groups"], strict=True)):
            parameter = group["params"][0]
            group.update(loaded | {"params": [parameter]})
            state = state_dict["state"].get(index, {})
            self.state[parameter] = {name: values.to(parameter.device) for name, values in state.items()}

    @torch.no_grad()
    def _update(self, index: int, parameter: Tensor) -> None:
        """Step one parameter with its gradient, and free the gradient."""
        state: dict[str, Tensor] = self.state[parameter]
        group = self.param_groups[index]
        if not state:
            zeros = _by_block(torch.zeros(local(parameter).numel(), dtype=torch.int8, device=parameter.device))
            state |= {"next_bits": zeros, "mean": zeros.clone(), "square": zeros.to(torch.uint8)}
            state |= {name: torch.zeros(len(zeros), 1, device=zeros.device) for name in ("mean_scale", "square_scale")}
        group["step"] += 1
        generator = torch.Generator(parameter.device)
        generator.manual_seed(group["step"] * len(self.param_groups) + index)  # after a resume, the same numbers
        # As AdamW divides the moments, which begin at 0.
        mean_correction, square_correction = (1 - beta ** group["step"] for beta in (BETA_1, BETA_2))
        weights, gradients = local(parameter).view(-1), local(parameter.grad).reshape(-1)  # type: ignore[arg-type]
        size = UPDATED_AT_A_TIME[parameter.device.type]
        for start in range(0, len(weights), size):
            blocks = slice(start // VALUES_OF_SCALE, (start + size) // VALUES_OF_SCALE)
            part = {name: values[blocks] for name, values in state.items()}
            weight = weights[start : start + size]
            value = join(_by_block(weight), part["next_bits"])
            gradient = _by_block(gradients[start : start + size]).float()
            if parameter.dim() > 1:
                gradient.mul_(value != 0)
            mean = decode(part["mean"], part["mean_scale"]).lerp_(gradient, 1 - BETA_1)
            square = decode(part["square"], part["square_scale"]).mul_(BETA_2)
            square.addcmul_(gradient, gradient, value=1 - BETA_2)
            root = square.div(square_correction).sqrt_().add_(EPSILON)
            value.addcdiv_(mean, root, value=-group["lr"] / mean_correction)
            rounded, next_bits = split(value)
            weight.copy_(rounded.view(-1)[: len(weight)])
            part["next_bits"].copy_(next_bits)
            encode(mean, part["mean"], part["mean_scale"], generator)
            encode(square, part["square"], part["square_scale"], generator)
        parameter.grad = None


def _by_block(values: Tensor) -> Tensor:
    """Return a vector as a matrix with a row for each block; zeros fill the last one."""
    return pad(values, (0, -len(values) % VALUES_OF_SCALE)).view(-1, VALUES_OF_SCALE)


def split(values: Float32[Tensor, "*shape"]) -> tuple[BFloat16[Tensor, "*shape"], Int8[Tensor, "*shape"]]:
    """Return the nearest values in bfloat16, and what is missing to the nearest values of 24 bits."""
    bits = (values.view(torch.int32) + 0x80) >> 8
    upper = (bits + 0x80) >> 8
    return upper.to(torch.int16).view(torch.bfloat16), (bits - (upper << 8)).to(torch.int8)


def join(rounded: BFloat16[Tensor, "*shape"], next_bits: Int8[Tensor, "*shape"]) -> Float32[Tensor, "*shape"]:
    """Return the values of 24 bits that `split` made."""
    return ((rounded.view(torch.int16).int() << 16) + (next_bits.int() << 8)).view(torch.float32)


def encode(values: Tensor, codes: Tensor, scales: Tensor, generator: torch.Generator) -> None:
    """Write values [blocks, values] as codes of 8 bits, and each block's largest magnitude as its scale [blocks, 1].

    A code is (|value| / scale)^¼: 8 bits resolve a second moment to 5 % where its root is 0.1 of the largest.

    Rounding is stochastic, and right on average: the steps of a second moment are a fiftieth of the distance between
    codes, and rounding to the nearest would lose each of them. A value other than zero has a code other than zero.
    """
    levels = torch.iinfo(codes.dtype).max
    scales.copy_(values.abs().amax(1, keepdim=True))
    ratio = values.abs().div_(scales.clamp_min(torch.finfo(torch.float32).tiny))
    code = ratio.sqrt().sqrt_().mul_(levels).floor_()
    start, end = _fourth_power(code.div(levels)), _fourth_power(code.add(1).div_(levels))
    is_up = torch.rand(values.shape, generator=generator, device=values.device) < (ratio - start) / (end - start)
    magnitude = torch.maximum(code + is_up, ratio > 0).clamp_(max=levels)
    codes.copy_(magnitude.copysign_(values))


def decode(codes: Tensor, scales: Tensor) -> Float32[Tensor, "blocks values"]:
    """Return the values of codes."""
    ratio = codes.float().div_(torch.iinfo(codes.dtype).max)
    return _fourth_power(ratio.abs()).copysign_(ratio).mul_(scales)


def _fourth_power(values: Tensor) -> Tensor:
    return values.square_().square_()  # on a CPU, 10 times as fast as `pow_`
