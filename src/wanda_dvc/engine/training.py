"""Trains one block on its masks, so that its output meets the dense block's."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from wanda_dvc.engine.walk import Step

BETAS, EPSILON = (0.9, 0.999), 1e-8  # Adam's


def train(  # noqa: PLR0913 - the settings of a training
    step: "Step",
    keeps: Mapping[str, Tensor],
    *,
    rows: range,
    targets: Sequence[Float[Tensor, "length width"]],
    epochs: int,
    rate: float,
    seed: int,
) -> dict[str, Tensor]:
    """Train the block of a step so that its output on some rows meets `targets`, one for each row.

    Returns all of its weights in float32, named and oriented as they are stored; the block itself stays as it is.

    The loss is Σ (‖block(x) − target‖² / ‖target‖) / Σ ‖target‖ over a row's tokens. In the plain sum of squares one
    token of massive activations may be nine tenths of a row; relative to its own square it is one of thousands, and
    what all others attend to is lost. Adam takes one row a step, in an order drawn from the seed and the block's
    number. Its learning rate falls as a cosine to 0, from `rate` times the root mean square of a parameter's weights
    that stay: models differ tenfold in scale. Weights that a mask does not keep stay 0. The block runs in the dtype of
    the walk. As arXiv 2510.14444, and Transformer Matching in 3BASiL, but for the tokens' and the parameters' scales.

    Memory in bytes: 24 for each parameter of the block (itself, its gradient, Adam's two, the masked one and that in
    the walk's dtype), and what autograd keeps of one row.
    """
    block, device, dtype = step.decoder.blocks[step.index], step.decoder.device, step.decoder.dtype
    masks = _by_parameter(step, keeps)
    trained = {name: p.detach().float().clone().requires_grad_() for name, p in block.named_parameters()}

    def masked() -> dict[str, Tensor]:
        return {name: p * masks[name] if name in masks else p for name, p in trained.items()}

    optimizer = torch.optim.Adam(
        [{"params": [p], "scale": _scale(p.detach())} for p in trained.values()],
        betas=BETAS,
        eps=EPSILON,
    )
    order, before = list(_order(len(rows), epochs, seed, step.index)), step.states.before
    with torch.enable_grad():
        for number, row in enumerate(order):
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"] * (1 + math.cos(math.pi * number / len(order))) / 2
            target, hidden = targets[row].to(device).float(), before[rows[row]][None].to(device)
            parameters = {name: p.to(dtype) for name, p in masked().items()}
            out = step.decoder.run(step.index, hidden, step.rows[rows[row]], parameters)[0]
            error, norm = (out.float() - target).square().sum(-1), target.norm(dim=-1).clamp_min(EPSILON)
            loss = (error / norm).sum() / norm.sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    names = {id(p): name for name, p in block.named_parameters()}
    made = {name: p.detach() for name, p in masked().items()}
    return {
        name: stored.part.of(made[names[id(stored.module.get_parameter(stored.leaf))]])
        for name, stored in step.weights.items()
    }


def _scale(parameter: Tensor) -> float:
    """Return the root mean square of what is not 0; at least 1e-3, so that a bias of zeros can move (as Adafactor)."""
    rms = parameter.norm() / max(1, parameter.count_nonzero().item()) ** 0.5
    return max(1e-3, rms.item())


def _order(rows: int, epochs: int, seed: int, block: int) -> Iterator[int]:
    """Yield the rows of every epoch, each in an order of its own."""
    generator = torch.Generator().manual_seed(seed * 100_003 + block)
    for _ in range(epochs):
        yield from torch.randperm(rows, generator=generator).tolist()


def _by_parameter(step: "Step", keeps: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the masks as those of the block's parameters, which may hold several linears."""
    masks: dict[str, Tensor] = {}
    names = {id(p): name for name, p in step.decoder.blocks[step.index].named_parameters()}
    for linear, keep in keeps.items():
        found = step.linears[linear]
        parameter = found.module.get_parameter(found.leaf)
        mask = masks.setdefault(names[id(parameter)], torch.ones_like(parameter, dtype=torch.bool))
        found.part.of(mask).copy_(keep)
    return masks
