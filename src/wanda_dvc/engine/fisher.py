"""Records gradients with respect to the outputs of a block's linears."""

import contextlib
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torch.linalg import vector_norm

from wanda_dvc.engine.accelerator import float64_device
from wanda_dvc.engine.record import observing
from wanda_dvc.engine.structure import Linear
from wanda_dvc.engine.sums import merge_by_name
from wanda_dvc.pruning.gram import Gram


@dataclass(kw_only=True)
class FisherSums:
    """Sums over some sequences of the gradients ∂ℓ/∂y of a block's linears. Sums of several chunks merge.

    A token's gradient is multiplied by ‖x‖, the norm of the linear's input at the token, because the gradient of the
    weights is (∂ℓ/∂y) xᵀ. Linears without a gradient are missing, such as experts without tokens.
    """

    sums: dict[str, Float64[Tensor, " out"]] = field(default_factory=dict)  # Σ ‖x‖² (∂ℓ/∂y)² over all tokens
    grams: dict[str, Gram] = field(default_factory=dict)  # Σ ‖x‖² (∂ℓ/∂y)(∂ℓ/∂y)ᵀ, with that diagonal

    def merge(self, sums: "FisherSums") -> None:
        """Add the sums of other sequences."""
        for name, squares in sums.sums.items():
            self.sums[name] = self.sums.get(name, 0) + squares
        merge_by_name(self.grams, sums.grams)


class GradientRecorder:
    """Sums of the gradients of the outputs of a block's linears, which grow while passes run backward."""

    def __init__(self, linears: dict[str, Linear]) -> None:
        self.linears = linears
        self._totals = FisherSums()
        self._tokens: dict[str, Tensor] = {}  # tokens of the passes with a gradient, on the device

    def recording(self) -> contextlib.AbstractContextManager[None]:
        """Record the gradients of the linears' outputs in every pass inside."""
        return observing(self.linears, self._see_output)

    def _see_output(self, names: list[str], x: Tensor, y: Tensor, tokens: slice) -> None:
        """Wait for the gradient of an output [..., out] of the linears that are rows of one matrix."""
        if not y.requires_grad:
            return
        inputs = x.detach().flatten(0, -2)[tokens].float()
        norms = vector_norm(inputs, dim=1, keepdim=True)  # `Tensor.norm` warns on MPS

        def on_gradient(gradient: Tensor) -> None:
            self._add(names, gradient.flatten(0, -2)[tokens].float().mul(norms))

        y.register_hook(on_gradient)

    def _add(self, names: list[str], gradient: Float[Tensor, "tokens out"]) -> None:
        sums, grams, device = self._totals.sums, self._totals.grams, float64_device(gradient.device)
        squares = gradient.square().sum(dim=0).to(device).double()
        for name in names:
            begin, end = self.linears[name].slice.rows or (0, len(squares))
            if name not in self._tokens:
                sums[name] = torch.zeros_like(squares[begin:end])
                grams[name] = Gram.empty(end - begin, device)
                self._tokens[name] = torch.zeros((), dtype=torch.int64, device=device)
            has_gradient = squares[begin:end].any()
            sums[name] += squares[begin:end]
            grams[name].add(gradient[:, begin:end].to(device))
            self._tokens[name] += torch.where(has_gradient, len(gradient), 0)

    def result(self) -> FisherSums:
        """Return the sums of the linears with a gradient, and Gram matrices, which stay on the device, to be merged."""
        # The host waits for a GPU once.
        counts = torch.stack([*self._tokens.values()]).tolist() if self._tokens else []
        result = FisherSums()
        for name, count in zip(self._tokens, counts, strict=True):
            if count:
                result.sums[name] = self._totals.sums[name].cpu()
                result.grams[name] = Gram(self._totals.grams[name].upper, count)
        return result
