"""Records statistics of a block's linears: of inputs while it runs forward, of gradients while it runs backward."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.overrides import TorchFunctionMode

from wanda_dvc.engine.accelerator import float64_device
from wanda_dvc.engine.structure import Linear
from wanda_dvc.engine.sums import FisherSums, InputSums, Matrix, add_unit_costs, group_by_matrix, merge_by_name
from wanda_dvc.pruning.gram import Gram
from wanda_dvc.pruning.statistics import InputStats, TokenSum, add_slices

ALL_ROWS = slice(None)
LAST = "down_proj"  # the parameter of the experts' last linear, by transformers' convention
# (linears, x, y) of one product: its input x and output y. A grouped product multiplies by the matrices of several
# experts: `linears` has for each matrix the names of the linears that are its rows, and the slice of its tokens.
OnProduct = Callable[[list[tuple[list[str], slice]], Tensor, Tensor], None]
# (name, norms): an expert's last linear, and ‖gate · output‖₂ of each of its tokens.
OnGatedOutput = Callable[[str, Float[Tensor, " tokens"]], None]


@dataclass(kw_only=True)
class InputRecorder:
    """Sums over the inputs of a block's linears that grow while the block runs.

    Each distinct input is counted once. Two linears share an input if, within one batch, both receive the same memory
    in the same state.
    """

    linears: dict[str, Linear]
    gram: bool = False  # record Gram matrices too
    sums: InputSums = field(default_factory=InputSums)
    # The name of each input of a batch, by memory and state. The tensor stays alive: no other gets its address.
    _seen: dict[tuple[Any, ...], tuple[str, Tensor]] = field(default_factory=dict)

    def recording(self) -> contextlib.AbstractContextManager[None]:
        """Record the inputs of the linears in every pass inside."""
        return observing(self.linears, self._see_inputs, self._add_gated_output)

    def _see_inputs(self, linears: list[tuple[list[str], slice]], x: Tensor, _: Tensor) -> None:
        slices: dict[str, slice] = {}  # of the inputs that this batch has not had yet
        for names, tokens in linears:
            part = x[tokens]
            if not part.numel():  # a call of an expert without tokens; all empty tensors have one address
                continue
            key = (part.data_ptr(), part.shape, part.stride(), part._version)
            if key not in self._seen:
                self._seen[key] = names[0], part
                slices[names[0]] = tokens
            for name in names:
                self.sums.add_consumer(name, self._seen[key][0])
        self._add_stats(slices, x)
        if self.gram:
            grams = self.sums.grams
            for name, tokens in slices.items():
                if name not in grams:
                    grams[name] = Gram.empty(x.shape[-1], float64_device(x.device))
                grams[name].add(x[tokens].flatten(0, -2))

    def _add_stats(self, slices: dict[str, slice], x: Float[Tensor, "*tokens in"]) -> None:
        all_stats, device = self.sums.stats, float64_device(x.device)
        for name in slices:
            if name not in all_stats:
                all_stats[name] = InputStats.empty(x.shape[-1], device)
        if x.is_cuda and len(slices) > 1:  # experts
            add_slices([all_stats[name] for name in slices], x, [*slices.values()])
            return
        for name, tokens in slices.items():
            all_stats[name].add(x[tokens].flatten(0, -2))

    def _add_gated_output(self, name: str, norms: Float[Tensor, " tokens"]) -> None:
        total = norms.to(float64_device(norms.device)).double().sum()
        merge_by_name(self.sums.outputs, {name: TokenSum(total, len(norms))})

    def end_batch(self) -> None:
        """Free the batch's inputs."""
        self._seen.clear()


@contextlib.contextmanager
def observing(
    linears: dict[str, Linear], on_product: OnProduct, on_gated_output: OnGatedOutput | None = None
) -> Iterator[None]:
    """Call a function for each product of these linears in passes inside, and another for experts' gated outputs."""
    matrices = group_by_matrix(linears)
    modules = {matrix.module: names for matrix, names in matrices.items() if matrix.expert is None}
    mixtures = {matrix.module for matrix in matrices if matrix.expert is not None}
    products = ExpertProducts(matrices, on_product, on_gated_output or (lambda *_: None))

    def on_call(names: list[str], _: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
        on_product([(names, ALL_ROWS)], args[0], y)

    hooks = [module.register_forward_hook(partial(on_call, names)) for module, names in modules.items()]
    if on_gated_output:
        hooks += [module.register_forward_pre_hook(products.begin) for module in mixtures]
    try:
        with products if mixtures else contextlib.nullcontext():
            yield
    finally:
        for hook in hooks:
            hook.remove()


class GradientRecorder:
    """Sums of gradients at the inputs and outputs of a block's linears, which grow while passes run backward.

    `heads` is the number of key-value heads: each computes neighbouring inputs of attention's last linear. 0: none.
    """

    def __init__(self, linears: dict[str, Linear], heads: int = 0) -> None:
        self.linears, self.heads = linears, heads
        self._totals = FisherSums()

    def recording(self) -> contextlib.AbstractContextManager[None]:
        """Record the gradients in every pass inside."""
        return observing(self.linears, self._see_product)

    def _see_product(self, linears: list[tuple[list[str], slice]], x: Tensor, y: Tensor) -> None:
        """Wait for the gradients of x [..., in] and y [..., out], inputs and outputs of the linears of each matrix."""
        if not y.requires_grad:
            return
        inputs = x.detach().flatten(0, -2)  # a hook that held `x` would keep the complete graph
        norms = vector_norm(inputs.float(), dim=1, keepdim=True)  # `Tensor.norm` warns on MPS

        def on_input_gradient(gradient: Tensor) -> None:
            products = gradient.flatten(0, -2).float() * inputs
            for names, tokens in linears:
                self._add_unit_costs(names, products[tokens])

        def on_output_gradient(gradient: Tensor) -> None:
            scaled = gradient.flatten(0, -2).float().mul(norms)
            for names, tokens in linears:
                self._add(names, scaled[tokens])

        x.register_hook(on_input_gradient)
        y.register_hook(on_output_gradient)

    def _add_unit_costs(self, names: list[str], products: Float[Tensor, "tokens in"]) -> None:
        """Add Σ over tokens of (Σ over a unit's inputs of x · ∂ℓ/∂x)². Units are single inputs, and heads.

        Which linear is attention's last is not known here: heads are summed wherever their number divides the inputs'.
        """
        features, device = products.shape[1], float64_device(products.device)
        for units in {features, self.heads}:
            if units and features % units == 0:
                costs = products.unflatten(1, (units, -1)).sum(dim=2).square().sum(dim=0).to(device).double()
                add_unit_costs(self._totals.unit_costs, {name: {units: costs} for name in names})

    def _add(self, names: list[str], gradient: Float[Tensor, "tokens out"]) -> None:
        squares_of, grams, device = self._totals.squares, self._totals.grams, float64_device(gradient.device)
        squares = gradient.square().sum(dim=0).to(device).double()
        for name in names:
            begin, end = self.linears[name].slice.rows or (0, len(squares))
            if name not in grams:
                squares_of[name] = torch.zeros_like(squares[begin:end])
                grams[name] = Gram.empty(end - begin, device)
            squares_of[name] += squares[begin:end]
            grams[name].add(gradient[:, begin:end].to(device))

    def result(self) -> FisherSums:
        """Return the sums of the linears with a gradient. Gram matrices stay on the device, to be merged."""
        # An expert of the last block has none if its only tokens are windows' last tokens, which predict nothing.
        squares_of = self._totals.squares
        any_gradient = [squares.any() for squares in squares_of.values()]
        flags = torch.stack(any_gradient).tolist() if any_gradient else []  # the host waits for a GPU once
        result = FisherSums()
        for name, has_gradient in zip(squares_of, flags, strict=True):
            if has_gradient:
                result.squares[name] = squares_of[name].cpu()
                result.grams[name] = self._totals.grams[name]
                costs = self._totals.unit_costs[name]
                result.unit_costs[name] = {units: of_units.cpu() for units, of_units in costs.items()}
        return result


# --- experts ---


class RoutedCall(NamedTuple):
    """A call of a module of experts by transformers' signature."""

    module: nn.Module
    hidden: Float[Tensor, "tokens width"]
    experts: Int[Tensor, "tokens k"]  # of each token
    gates: Float[Tensor, "tokens k"]


class ExpertProducts(TorchFunctionMode):
    """Calls functions for each product of experts, and for their gated outputs, while it is active.

    transformers calls a module of experts with `(hidden_states, top_k_index, top_k_weights)`. Inside, models pass
    tokens and a view of the parameter, [experts, ·, ·], to torch functions: a `linear` or `matmul` for each expert, or
    one grouped product for all. REAP needs the norms of gate · output, which an expert adds to its tokens. A product's
    rows are the pairs of token and expert in the order of transformers' `eager` or `grouped_mm`; the rows of the first
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
