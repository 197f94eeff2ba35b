"""Records gradients by the outputs of a block's linears."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torch.linalg import vector_norm

from wanda_dvc.engine.accelerator import solving_device
from wanda_dvc.engine.record import watching
from wanda_dvc.engine.structure import Linear
from wanda_dvc.engine.sums import merge_sums
from wanda_dvc.pruning.gram import Gram


@dataclass(kw_only=True)
class FisherSums:
    """Sums over some rows of the gradients by the outputs of a block's linears. Sums of several rows merge.

    A token's gradient ∂ℓ/∂y is multiplied by ‖x‖, the norm of the linear's input at the token, because the gradient by
    the weights is (∂ℓ/∂y) xᵀ.

    Linears without a gradient are missing, such as experts without tokens, or with only last tokens, which predict
    nothing.
    """

    sums: dict[str, Float64[Tensor, " out"]] = field(default_factory=dict)  # Σ ‖x‖² (∂ℓ/∂y)² over all tokens
    grams: dict[str, Gram] = field(default_factory=dict)  # Σ ‖x‖² (∂ℓ/∂y)(∂ℓ/∂y)ᵀ, with that diagonal

    def merge(self, other: "FisherSums") -> None:
        """Add the sums of other rows."""
        for name, sums in other.sums.items():
            self.sums[name] = self.sums.get(name, 0) + sums
        merge_sums(self.grams, other.grams)


@contextlib.contextmanager
def recording_gradients(linears: dict[str, Linear]) -> Iterator[FisherSums]:
    """Record the gradients by the outputs of these linears in every pass inside.

    Linears without a gradient then drop out, and the sums are in main memory.
    """
    found, tokens = FisherSums(), dict[str, Tensor]()  # tokens of the passes with a gradient, on the device

    def see(names: list[str], x: Tensor, y: Tensor, some: slice) -> None:
        if y.requires_grad:
            inputs = x.detach().flatten(0, -2)[some].float()
            norms = vector_norm(inputs, dim=1, keepdim=True)  # `Tensor.norm` warns on MPS
            y.register_hook(lambda gradient: add(names, gradient.flatten(0, -2)[some].float().mul(norms)))

    def add(names: list[str], gradient: Float[Tensor, "tokens out"]) -> None:
        where = solving_device(gradient.device)
        sums = gradient.square().sum(dim=0).to(where).double()
        for name in names:
            rows = slice(*(linears[name].part.rows or (None,)))
            own = sums[rows]
            tokens[name] = tokens.get(name, 0) + own.any() * len(gradient)
            found.sums[name] = found.sums.get(name, 0) + own
            if name not in found.grams:
                found.grams[name] = Gram.empty(len(own), where)
            found.grams[name].add(gradient[:, rows].to(where))

    with watching(linears, see):
        yield found
    counts = torch.stack(list(tokens.values())).tolist() if tokens else []
    for name, count in zip(tokens, counts, strict=True):
        sums, matrix = found.sums.pop(name), found.grams.pop(name)
        if count:
            found.sums[name], found.grams[name] = sums.cpu(), Gram(matrix.upper, count)
