"""Trains one block on its masks, to match the dense block's output."""

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from wanda_dvc.engine.decoder import Decoder
from wanda_dvc.engine.rows import Row

EPSILON = 1e-8  # the least norm of a token's target, and of Adam


def train(
    decoder: Decoder,
    index: int,
    keeps: Mapping[str, Tensor],
    *,
    rows: Sequence[Row],
    inputs: Sequence[Float[Tensor, "length width"]],
    targets: Sequence[Float[Tensor, "length width"]],
    epochs: int,
    rate: float,
    seed: int,
    scale: float,
) -> dict[str, Tensor]:
    """Train a loaded block to match `targets` with its outputs on some rows. Each row has an input and a target.

    Returns all of its weights in float32, named and oriented as stored; the block itself does not change.

    The loss is Σ (‖block(x) − target‖² / ‖target‖) / Σ ‖target‖ over a row's tokens. In the plain sum of squares, one
    token of massive activations may be nine tenths of a row. Relative to its own square it is one token of thousands,
    although all others attend to it. Adam takes one row a step, in an order drawn from the seed and the block's index.
    Its learning rate falls as a cosine to 0, from a share of the root mean square of a parameter's kept weights: models
    differ tenfold in scale. The share is the mean loss before the training, at most `rate`: a larger one leads away
    from weights that are nearly right. If the mean loss does not fall, the weights stay as they were. Pruned weights
    stay 0. The block runs in the dtype of the walk. As arXiv 2510.14444, and Transformer Matching in 3BASiL, except for
    the scales of tokens and parameters.

    `scale` multiplies the loss, whose gradients would be zeros in float16. A power of two changes no other result.

    Memory in bytes: 28 for each parameter of the block, and autograd's copies for one row. The 28 are the parameter
    before and now, its gradient, Adam's two moments, the masked parameter and its copy in the walk's dtype.
    """
    block, device, dtype = decoder.blocks[index], decoder.device, decoder.dtype
    names = {id(p): name for name, p in block.named_parameters()}
    masks: dict[str, Tensor] = {}  # of parameters, which may hold several linears
    for linear, keep in keeps.items():
        found = decoder.linears(index)[linear]
        parameter = found.module.get_parameter(found.leaf)
        mask = masks.setdefault(names[id(parameter)], torch.ones_like(parameter, dtype=torch.bool))
        found.part.of(mask).copy_(keep)
    trained = {name: p.detach().float().clone().requires_grad_() for name, p in block.named_parameters()}

    def masked() -> dict[str, Tensor]:
        return {name: p * masks[name] if name in masks else p for name, p in trained.items()}

    groups = [{"params": [p], "scale": root_mean_square(p.detach())} for p in trained.values()]

    def loss_of(row: int, parameters: Mapping[str, Tensor]) -> Tensor:
        target, hidden = targets[row].to(device).float(), inputs[row][None].to(device)
        out = decoder.run(index, hidden, rows[row], {name: p.to(dtype) for name, p in parameters.items()})[0]
        norm = torch.linalg.vector_norm(target, dim=-1).clamp_min(EPSILON)
        return ((out.float() - target).square().sum(-1) / norm).sum() / norm.sum()

    def mean_loss() -> float:
        with torch.no_grad():
            parameters = masked()
            return sum(loss_of(row, parameters).item() for row in range(len(rows))) / len(rows)

    before, start = mean_loss(), {name: p.detach().clone() for name, p in trained.items()}
    rate = min(rate, before)
    optimizer = torch.optim.Adam(groups, eps=EPSILON * scale)
    generator = torch.Generator().manual_seed(seed * 100_003 + index)
    order = [row for _ in range(epochs) for row in torch.randperm(len(rows), generator=generator).tolist()]
    with torch.enable_grad():
        for number, row in enumerate(order):
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"] * (1 + math.cos(math.pi * number / len(order))) / 2
            optimizer.zero_grad()
            (loss_of(row, masked()) * scale).backward()
            optimizer.step()
    if not mean_loss() < before:  # also if it is not finite
        trained = start
    made = {name: p.detach() for name, p in masked().items()}
    return {
        name: stored.part.of(made[names[id(stored.module.get_parameter(stored.leaf))]])
        for name, stored in decoder.weights.of_block(index).items()
    }


def root_mean_square(parameter: Tensor) -> float:
    """Return the root mean square of nonzero values; at least 1e-3, so that zero biases can change (as Adafactor)."""
    rms = torch.linalg.vector_norm(parameter) / max(1, parameter.count_nonzero().item()) ** 0.5
    return max(1e-3, rms.item())
