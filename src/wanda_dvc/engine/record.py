"""Records statistics of the inputs of a block's linears while the block runs."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.linalg import vector_norm

from wanda_dvc.engine.accelerator import solving_device
from wanda_dvc.engine.experts import ALL, Products, RoutedOutputs, See
from wanda_dvc.engine.structure import Linear, unsupported
from wanda_dvc.engine.sums import InputSums, by_weight, merge_sums
from wanda_dvc.kernels import multiply
from wanda_dvc.pruning.gram import Gram
from wanda_dvc.pruning.statistics import InputStats, TokenSum, in_sums

# --- what records ---


@dataclass(kw_only=True)
class InputRecorder:
    """Sums that grow while a block runs, kept once for each distinct input.

    Two linears share an input if, within one window, both receive the same memory in the same state.

    For X_denseᵀX of each distinct input, [in, in], each window's dense row runs first, inside `dense`. Routed experts
    have no X_denseᵀX: the dense row and this row may send different tokens to an expert, or in another order.
    """

    linears: dict[str, Linear]
    gram: bool = False  # keep the Gram matrices too
    sums: InputSums = field(default_factory=InputSums)
    _dense: dict[str, Tensor] = field(default_factory=dict)  # the dense model's inputs in this window
    _tokens: int = 0  # of the dense row
    _is_dense: bool = False
    # Inputs are kept alive until the window ends, so that their addresses are not reused.
    _held: dict[tuple[Any, ...], tuple[str, Tensor]] = field(default_factory=dict)
    _routed: RoutedOutputs = field(default_factory=RoutedOutputs)

    def recording(self) -> contextlib.AbstractContextManager[None]:
        """Record the inputs of the linears in every pass inside."""
        return watching(self.linears, self._read, self._routed)

    def _read(self, names: list[str], x: Tensor, _: Tensor, tokens: slice) -> None:
        """Add an input [..., in] of the linears that are rows of one weight."""
        x, features = x[tokens], self.linears[names[0]].features
        if not x.numel():  # a call of an expert without tokens; all empty tensors have one address
            return
        if x.shape[-1] != features:
            raise unsupported(names[0], f"given {x.shape[-1]} features, expected {features}")
        key = (x.data_ptr(), x.shape, x.stride(), x._version)
        if key not in self._held:
            self._held[key] = (names[0], x)
            self._add(names[0], x.flatten(0, -2))
        for name in names if not self._is_dense else ():  # only tokens of the dense row may reach an input
            self.sums.add_consumer(name, self._held[key][0])

    def _add(self, name: str, x: Float[Tensor, "tokens in"]) -> None:
        """Add a distinct input to its statistics."""
        if self._is_dense:
            self._dense[name] = x
            return
        sums, where = self.sums, solving_device(x.device)
        sums.stats.setdefault(name, InputStats.empty(x.shape[-1], where)).add(x)
        if self.gram:
            if name not in sums.grams:
                sums.grams[name] = Gram.empty(x.shape[-1], where)
            sums.grams[name].add(x)
        dense = self._dense.get(name)
        if dense is not None and self.linears[name].part.expert is None and len(dense) == len(x) == self._tokens:
            product = in_sums(multiply(dense.float().T, x.float()), sums.stats[name].sum)  # in float64
            merge_sums(sums.crosses, {name: TokenSum(product, len(x))})

    @contextlib.contextmanager
    def dense(self, tokens: int) -> Iterator[None]:
        """Record the inputs of the row inside, of `tokens` tokens, as the dense model's."""
        self._tokens, self._is_dense = tokens, True
        yield
        self._is_dense = False
        self._held.clear()
        self._routed.end_window()

    def cross(self, name: str, numbers: Float[Tensor, "tokens width"]) -> None:
        """Sum the products of the next row's numbers, of each token, with a linear's input: `Sums.crosses`."""
        self._dense[name], self._tokens = numbers, len(numbers)

    def see_block(self, before: Float[Tensor, "1 length width"], after: Float[Tensor, "1 length width"]) -> None:
        """Add the influence of the block on a row."""
        one, other = before.float(), after.float()
        cosine = torch.linalg.vecdot(one, other) / (vector_norm(one, dim=-1) * vector_norm(other, dim=-1))
        turned = 1 - cosine.nan_to_num()  # zeros turn into anything: a cosine of 0
        found = torch.stack([turned.sum(), turned.new_full((), turned.numel())])  # the host does not wait for them
        total = self.sums.influence.to(solving_device(found.device))
        self.sums.influence = total + in_sums(found, total)

    def end_window(self) -> None:
        """Add the outputs of the window's experts, and release the window's inputs."""
        self._held.clear()
        self._dense.clear()
        merge_sums(self.sums.outputs, self._routed.end_window())


@contextlib.contextmanager
def watching(linears: dict[str, Linear], see: See, routed: RoutedOutputs | None = None) -> Iterator[None]:
    """See the calls of these linears in passes inside: of modules by hooks, of experts by their products."""
    weights = by_weight(linears)

    def watch(module: nn.Module, names: list[str]) -> Any:
        return module.register_forward_hook(lambda _, args, out: see(names, args[0], out, ALL))

    hooks = [watch(module, names) for (module, _, expert), names in weights.items() if expert is None]
    try:
        with Products(weights, see, routed) if len(hooks) < len(weights) else contextlib.nullcontext():
            yield
    finally:
        for hook in hooks:
            hook.remove()
