"""Follows the outputs of experts until a block multiplies them by the router's gates."""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor
from torch.linalg import vector_norm

from wanda_dvc.pruning.statistics import OutputStats

BY_GATES = frozenset({"mul", "multiply", "mul_", "__mul__", "__rmul__", "__imul__"})
REORDERING = frozenset({"__getitem__", "index_select", "gather", "take_along_dim", "flip", "roll"})
Segment = tuple[str, int, int]  # an expert's linear, its first token, and the token after its last


@dataclass
class _Output:
    """An output of experts, or a tensor that the block computed from it, row by row."""

    tensor: weakref.ref[Tensor]  # its memory is the block's
    segments: list[Segment]
    norms: Float[Tensor, " tokens"] | None = None  # ‖gate · output‖₂ of each token, once the gates were seen


@dataclass
class RoutedOutputs:
    """The norms of what each expert adds to its tokens: REAP's gate · ‖output‖₂, of the model's own product.

    An expert's output is followed through additions, norms and conversions, row by row; the last multiplication by one
    number a token is by the gates. Outputs that a block uses in another way have no norms here, and
    `OutputStats.count` is then below the number of tokens that the expert read.
    """

    _seen: list[_Output] = field(default_factory=list)
    _of: dict[int, _Output] = field(default_factory=dict)  # by the tensor's identity

    def begin(self, made: Tensor, segments: Iterable[Segment]) -> None:
        """Follow the output of a product of experts: [tokens, out]."""
        self._keep(made, _Output(weakref.ref(made), list(segments)))

    def follow(self, function: Callable[..., Any], args: Any, made: Any) -> None:
        """Follow the outputs through a torch function."""
        if not self._of or not isinstance(made, Tensor) or not args:
            return
        name = getattr(function, "__name__", "")
        if name in ("cat", "concat", "concatenate") and isinstance(args[0], (list, tuple)):
            self._join(args[0], made)
            return
        pair = args[:2]
        for x, other in zip(pair, [*reversed(pair)] if len(pair) > 1 else [None], strict=True):
            output = self._find(x)
            if output is None or made.shape != x.shape or name in REORDERING:
                continue
            if name in BY_GATES and isinstance(other, Tensor) and other.shape == (*x.shape[:-1], 1):
                output.norms = vector_norm(made.float(), dim=-1)
            output.tensor = weakref.ref(made)
            self._of[id(made)] = output
            return

    def end_window(self) -> dict[str, OutputStats]:
        """Return the sums of the window's tokens by linear, and forget the window."""
        found: dict[str, OutputStats] = {}
        for output in self._seen:
            for name, begin, end in output.segments:
                if output.norms is not None and end > begin:
                    own = output.norms[begin:end]
                    where = own.device if own.is_cuda else "cpu"  # not every accelerator has float64
                    stats = OutputStats(own.to(where).double().sum(), end - begin)
                    if found.setdefault(name, stats) is not stats:
                        found[name].merge(stats)
        self._seen.clear()
        self._of.clear()
        return found

    def _join(self, parts: Iterable[Any], made: Tensor) -> None:
        """Follow the outputs of several experts, one below the other."""
        segments, begin = list[Segment](), 0
        for part in parts:
            if (output := self._find(part)) is None or output.norms is not None:
                return
            segments += [(name, begin + first, begin + last) for name, first, last in output.segments]
            begin += len(part)
        if len(made) == begin:
            self._keep(made, _Output(weakref.ref(made), segments))

    def _keep(self, made: Tensor, output: _Output) -> None:
        self._seen.append(output)
        self._of[id(made)] = output

    def _find(self, x: Any) -> _Output | None:
        output = self._of.get(id(x))
        return output if output is not None and output.tensor() is x else None
