"""Records statistics of the inputs of a block's linears while the block runs."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float, Float64
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from wanda_dvc.engine.structure import Linear
from wanda_dvc.errors import MEND, UserError
from wanda_dvc.pruning.gram import Gram
from wanda_dvc.pruning.statistics import BlockStats, InputStats


@dataclass
class InputRecorder:
    """The statistics of a block's linears, kept once for each distinct input.

    Two linears share an input if, within one window, they are given the same memory in the same state. An input is
    named after the first linear that reads it. An expert's input is the tokens that are sent to it.
    """

    gram: bool = False  # keep the Gram matrices too
    stats: dict[str, InputStats] = field(default_factory=dict)
    grams: dict[str, Gram] = field(default_factory=dict)  # by distinct input; none where no token came
    source: dict[str, str] = field(default_factory=dict)  # each linear's input, by name
    linears: dict[str, Linear] = field(default_factory=dict)
    # Inputs are kept alive until the window ends, so that their addresses are not reused.
    _held: dict[tuple[Any, ...], tuple[str, Tensor]] = field(default_factory=dict)

    @contextlib.contextmanager
    def recording(self, linears: dict[str, Linear]) -> Iterator[None]:
        """Records the inputs of these linears in every pass that runs inside."""
        self.linears = linears
        hooks: list[Any] = []
        experts: dict[tuple[nn.Module, str], dict[int, list[str]]] = {}
        for (module, leaf, expert), names in self._weights().items():
            if expert is None:
                hooks.append(module.register_forward_pre_hook(lambda _, args, names=names: self._read(names, args[0])))
            else:
                experts.setdefault((module, leaf), {})[expert] = names
        watched = [(module.get_parameter(leaf), names) for (module, leaf), names in experts.items()]
        try:
            with _ExpertCalls(watched, self._read) if watched else contextlib.nullcontext():
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _weights(self) -> dict[tuple[nn.Module, str, int | None], list[str]]:
        """The linears by the weight that they are rows of: they share its input."""
        weights: dict[tuple[nn.Module, str, int | None], list[str]] = {}
        for name, linear in self.linears.items():
            weights.setdefault((linear.module, linear.leaf, linear.part.expert), []).append(name)
        return weights

    def _read(self, names: list[str], x: Tensor) -> None:
        """Adds an input [..., in] of the linears that are rows of one weight."""
        if x.shape[-1] != self.linears[names[0]].features:
            raise UserError(
                f"{names[0]}: given {x.shape[-1]} features, expected {self.linears[names[0]].features}; "
                "unsupported model structure"
            )
        key = (x.data_ptr(), x.shape, x.stride(), x._version)
        if key not in self._held:
            self._held[key] = (names[0], x)
            self._add(names[0], x.flatten(0, -2))
        source = self._held[key][0]
        for name in names:
            if self.source.setdefault(name, source) != source:
                raise UserError(f"{name}: reads {self.source[name]} in one window and {source} in another")

    def _add(self, name: str, x: Float[Tensor, "tokens in"]) -> None:
        """Add a distinct input to its statistics."""
        where = x.device if x.is_cuda else "cpu"  # not every accelerator knows float64
        self.stats.setdefault(name, InputStats.empty(x.shape[-1], where)).add(x)
        if self.gram:
            self.grams.setdefault(name, Gram.empty(x.shape[-1], where)).add(x)

    def result(self) -> BlockStats:
        """The statistics of all windows, and the linears that read each distinct input.

        An expert that no token was sent to has inputs of no tokens.
        """
        reached = {(linear.module, linear.leaf) for name, linear in self.linears.items() if name in self.source}
        stats, source = dict(self.stats), dict(self.source)
        for (module, leaf, expert), names in self._weights().items():
            if expert is not None and (module, leaf) not in reached:
                raise UserError(f"{names[0]}: its experts are computed in an unsupported way")
            if names[0] not in source:
                stats[names[0]] = InputStats.empty(self.linears[names[0]].features)
                source |= dict.fromkeys(names, names[0])
        # Experts last and in their own order, not in the order in which tokens reached them.
        experts = [name for name, linear in self.linears.items() if linear.part.expert is not None]
        readers: dict[str, list[str]] = {}
        for linear in dict.fromkeys([*(name for name in source if name not in set(experts)), *experts]):
            readers.setdefault(source[linear], []).append(linear)
        inputs = {name: stats[name].cpu() for name in readers}
        return BlockStats(inputs, readers, [name for name, linear in self.linears.items() if linear.transposed])

    def check_finite(self, block: int) -> None:
        """Raise UserError where an input's sums of squares are not finite, though its activations may be."""
        for name, x in self.stats.items():
            if not x.sum_squares.isfinite().all():
                raise UserError(
                    f"block {block}, input of {name}: sums of squares that are not finite, expected finite ones; {MEND}"
                )

    def end_window(self) -> None:
        """Release the window's inputs."""
        self._held.clear()


@dataclass
class CrossRecorder(InputRecorder):
    """Also keeps X_denseᵀX of each distinct input, [in, in]: what the dense model reads times what this one reads.

    Each window's dense row runs first, inside `dense`. An expert to which both rows send different tokens has none.
    """

    crosses: dict[str, Float64[Tensor, "in in"]] = field(default_factory=dict)
    _dense: dict[str, Tensor] = field(default_factory=dict)  # one window's inputs
    _is_dense: bool = False

    @contextlib.contextmanager
    def dense(self) -> Iterator[None]:
        """Takes the inputs of the row that runs inside as the dense model's."""
        self._dense, self._is_dense = {}, True
        try:
            yield
        finally:
            self._is_dense = False
            self._held.clear()

    def _add(self, name: str, x: Float[Tensor, "tokens in"]) -> None:
        if self._is_dense:
            self._dense[name] = x
            return
        super()._add(name, x)
        dense = self._dense.get(name)
        if dense is not None and len(dense) == len(x):
            product = (dense.float().T @ x.float()).double()
            self.crosses[name] = self.crosses[name].add_(product) if name in self.crosses else product


class _ExpertCalls(TorchFunctionMode):
    """Sees the tokens that each expert's weights are multiplied with; the model computes as usual.

    A hook needs a module, and a parameter that holds several experts is none. But models compute with it in torch
    functions whose first two arguments are the tokens and a view of that parameter: a `linear` or `matmul` for each
    expert, or one grouped product for all.
    """

    def __init__(
        self, experts: list[tuple[nn.Parameter, dict[int, list[str]]]], read: Callable[[list[str], Tensor], None]
    ) -> None:
        super().__init__()
        self.experts, self.read = experts, read

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if len(args) >= 2 and isinstance(args[0], Tensor) and isinstance(args[1], Tensor):
            x, weight = args[:2]
            for parameter, names in self.experts:
                offset = weight.data_ptr() - parameter.data_ptr()
                if not 0 <= offset < parameter.nbytes:
                    continue
                if weight.dim() == 2:
                    self.read(names[offset // (parameter.nbytes // len(parameter))], x)
                elif kwargs.get("offs") is not None:  # tokens are sorted by expert: where each expert's end
                    ends = kwargs["offs"].tolist()
                    for expert, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
                        if end > begin:
                            self.read(names[expert], x[begin:end])
        return function(*args, **kwargs)
