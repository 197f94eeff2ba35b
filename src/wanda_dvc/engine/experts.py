"""Observes experts, whose weights share one parameter: the products with each expert's matrix, and the gated outputs.

transformers calls a module of experts with `(hidden_states, top_k_index, top_k_weights)`. Inside, the experts have no
modules of their own: the model multiplies tokens by `gate_up_proj`, and the result by `down_proj`, [experts, ·, ·].
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.overrides import TorchFunctionMode

from wanda_dvc.engine.sums import Matrix

ALL_ROWS = slice(None)
LAST = "down_proj"  # the parameter of the experts' last linear, by transformers' convention
# (linears, x, y): the linears of each matrix with the slice of its tokens in x and y, the inputs and outputs of all.
OnProduct = Callable[[list[tuple[list[str], slice]], Tensor, Tensor], None]
# (name, norms): an expert's last linear, and ‖gate · output‖₂ of each of its tokens.
OnGatedOutput = Callable[[str, Float[Tensor, " tokens"]], None]


class RoutedCall(NamedTuple):
    """A call of a module of experts by transformers' signature."""

    module: nn.Module
    hidden: Float[Tensor, "tokens width"]
    experts: Int[Tensor, "tokens k"]  # of each token
    gates: Float[Tensor, "tokens k"]


class ExpertProducts(TorchFunctionMode):
    """Calls functions for each product of experts, and for their gated outputs, while it is active.

    Models pass tokens and a view of the parameter to torch functions: a `linear` or `matmul` for each expert, or one
    grouped product for all. REAP needs the norms of gate · output, which an expert adds to its tokens. A product's rows
    are the pairs of token and expert in the order of transformers' `eager` or `grouped_mm`; the rows of the first
    product, which are the tokens, prove it. No norm is reported for another order, or signature of the module.
    """

    def __init__(self, linears: dict[Matrix, list[str]], on_product: OnProduct, on_gated_output: OnGatedOutput) -> None:
        super().__init__()
        self.linears, self.on_product, self.on_gated_output = linears, on_product, on_gated_output
        self._call: RoutedCall | None = None  # if gated outputs are observed
        self._parameters: dict[int, dict[int, Matrix]] = {}  # by a parameter's address: each expert's matrix
        self._matrices: dict[int, Matrix] = {}  # by a matrix's address
        for matrix in linears:
            if matrix.expert is not None:
                parameter = matrix.module.get_parameter(matrix.leaf)
                self._parameters.setdefault(parameter.data_ptr(), {})[matrix.expert] = matrix
                self._matrices[parameter[matrix.expert].data_ptr()] = matrix

    def begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Keep the tokens and gates of a module's call: a forward pre-hook."""
        self._call = None
        if len(args) == 3 and all(isinstance(x, Tensor) and x.dim() == 2 for x in args):
            hidden, experts, gates = args
            if experts.shape == gates.shape and len(experts) == len(hidden) and not experts.is_floating_point():
                self._call = RoutedCall(module, hidden, experts, gates)

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if len(args) >= 2 and isinstance(args[0], Tensor) and isinstance(args[1], Tensor):
            rows = self._rows(args[1], kwargs.get("offs"))
            if rows:
                self.on_product([(self.linears[matrix], tokens) for matrix, tokens in rows.items()], args[0], result)
                self._see_rows(rows, args[0], result)
        return result

    def _rows(self, weight: Tensor, ends: Tensor | None) -> dict[Matrix, slice]:
        """Return the rows of a product's input and output by matrix; {} for a weight that is no expert's.

        `ends` are `grouped_mm`'s offsets: the rows of each expert end there, and follow those of the expert before it.
        """
        if weight.dim() == 2 and weight.data_ptr() in self._matrices:
            return {self._matrices[weight.data_ptr()]: ALL_ROWS}
        if ends is None:
            return {}
        bounds = [0, *ends.tolist()]
        rows = {}
        for expert, matrix in self._parameters.get(weight.data_ptr(), {}).items():
            begin, end = bounds[expert], bounds[expert + 1]
            if end > begin:
                rows[matrix] = slice(begin, end)
        return rows

    def _see_rows(self, rows: dict[Matrix, slice], x: Float[Tensor, "rows in"], y: Float[Tensor, "rows out"]) -> None:
        """Check the rows of a first product; report the norms of a last product."""
        call, matrix = self._call, next(iter(rows))
        if call is None or matrix.module is not call.module:
            return
        pairs = _pairs(call, rows)
        if len(pairs) != len(x):
            self._call = None
        elif matrix.leaf != LAST:  # a first product: its rows must be the pairs' tokens
            tokens = call.hidden[pairs // call.gates.shape[1]]
            if x.shape != tokens.shape or not torch.equal(x, tokens.to(x.dtype)):
                self._call = None
        else:
            bias = getattr(call.module, f"{LAST}_bias", None)  # some families add a bias, or a norm
            norm = getattr(call.module, "post_expert_norm", None)
            if bias is not None:
                y = y + bias[call.experts.flatten()[pairs]]
            if norm is not None:
                y = norm(y)
            gated_norms = vector_norm((y * call.gates.flatten()[pairs, None]).float(), dim=-1)
            for matrix, matrix_rows in rows.items():
                self.on_gated_output(self.linears[matrix][0], gated_norms[matrix_rows])


def _pairs(call: RoutedCall, rows: dict[Matrix, slice]) -> Int[Tensor, " rows"]:
    """Return the place in [tokens, k], flattened, of each row of a product."""
    if ALL_ROWS not in rows.values():  # `grouped_mm`: by expert
        return call.experts.flatten().sort().indices
    (matrix,) = rows
    assert matrix.expert is not None
    # `eager`: by the expert's place among the token's experts
    slot, token = torch.where((call.experts == matrix.expert).T)
    return token * call.experts.shape[1] + slot
