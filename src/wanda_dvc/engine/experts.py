"""Sees the inputs and outputs of experts, which have no module that a hook could see."""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor
from torch.linalg import vector_norm
from torch.overrides import TorchFunctionMode

from wanda_dvc.engine.accelerator import solving_device
from wanda_dvc.engine.sums import SharedBy, merge_sums
from wanda_dvc.pruning.statistics import TokenSum

ALL = slice(None)
# (names, x, y, tokens): the linears that are rows of one weight, their input and output, and the slice of their tokens
# in both.
See = Callable[[list[str], Tensor, Tensor, slice], None]

# --- the outputs of experts, until a block multiplies them by the router's gates ---

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
    `TokenSum.count` is then below the number of tokens that the expert read.
    """

    _seen: list[_Output] = field(default_factory=list)
    _of: dict[int, _Output] = field(default_factory=dict)  # by the tensor's identity

    def begin(self, made: Tensor, segments: list[Segment]) -> None:
        """Follow the output of a product of experts, [tokens, out], or several one below the other."""
        output = _Output(weakref.ref(made), segments)
        self._seen.append(output)
        self._of[id(made)] = output

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

    def end_window(self) -> dict[str, TokenSum]:
        """Return the sums of the window's tokens by linear, and forget the window."""
        found: dict[str, TokenSum] = {}
        for output in self._seen:
            for name, begin, end in output.segments:
                if output.norms is not None and end > begin:
                    own = output.norms[begin:end]
                    merge_sums(found, {name: TokenSum(own.to(solving_device(own.device)).double().sum(), end - begin)})
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
            self.begin(made, segments)

    def _find(self, x: Any) -> _Output | None:
        output = self._of.get(id(x))
        return output if output is not None and output.tensor() is x else None


class Products(TorchFunctionMode):
    """Sees the inputs of experts that share a parameter, which has no module whose calls a hook could see.

    Models pass the tokens and a view of the parameter to torch functions: a `linear` or `matmul` for each expert, or
    one grouped product for all. Results do not change.
    """

    def __init__(self, weights: SharedBy, see: See, routed: RoutedOutputs | None) -> None:
        super().__init__()
        self.see, self.routed = see, routed
        self._of: dict[int, list[str]] = {}  # the linears of one expert, by the address of its matrix
        self._every: dict[int, list[list[str]]] = {}  # those of all experts, by the address of their parameter
        for (module, leaf, expert), names in weights.items():
            if expert is not None:
                parameter = module.get_parameter(leaf)
                self._of[parameter[expert].data_ptr()] = names
                self._every.setdefault(parameter.data_ptr(), []).append(names)

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        made = function(*args, **kwargs)
        parts: list[tuple[list[str], slice]] = []  # of a product of experts: the linears and the tokens of each
        if len(args) >= 2 and isinstance(args[0], Tensor) and isinstance(args[1], Tensor):
            weight = args[1]
            if weight.dim() == 2 and (own := self._of.get(weight.data_ptr())):
                parts = [(own, ALL)]
            elif kwargs.get("offs") is not None and (every := self._every.get(weight.data_ptr())):
                ends = kwargs["offs"].tolist()  # tokens are sorted by expert: the end of each expert's tokens
                pairs = zip(every, [0, *ends], ends, strict=False)
                parts = [(names, slice(start, end)) for names, start, end in pairs if end > start]
        for names, tokens in parts:
            self.see(names, args[0], made, tokens)
        if self.routed and parts:
            self.routed.begin(made, [(names[0], *tokens.indices(len(made))[:2]) for names, tokens in parts])
        elif self.routed:
            self.routed.follow(function, args, made)
        return made
