"""Records statistics of the inputs of a block's linears while the block runs."""

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.overrides import TorchFunctionMode

from wanda_dvc.engine.accelerator import solving_device
from wanda_dvc.engine.structure import Linear, unsupported
from wanda_dvc.errors import FIX, UserError
from wanda_dvc.pruning.gram import Gram
from wanda_dvc.pruning.products import multiply
from wanda_dvc.pruning.statistics import BlockStats, InputStats, TokenSum, in_sums


class Recorded(NamedTuple):
    """The statistics of the inputs of a block's linears."""

    stats: BlockStats
    grams: dict[str, Gram]  # by distinct input; missing for inputs without tokens
    crosses: dict[str, Float64[Tensor, "in in"]]  # X_denseᵀX, of inputs with dense rows for all tokens


@dataclass(kw_only=True)
class Sums:
    """Sums over the inputs of a block's linears for some rows, by distinct input. Sums of several shards merge.

    An input is named after its first reader. An expert's input is the tokens that the router sends to it.
    """

    stats: dict[str, InputStats] = field(default_factory=dict)
    grams: dict[str, Gram] = field(default_factory=dict)  # missing for inputs without tokens
    crosses: dict[str, TokenSum] = field(default_factory=dict)  # X_denseᵀX, or RᵀX of other numbers R
    source: dict[str, str] = field(default_factory=dict)  # each linear's input, by name
    outputs: dict[str, TokenSum] = field(default_factory=dict)  # of routed experts, by the last linear of each
    # Σ (1 − cosine of the block's input and output), and tokens
    influence: Float64[Tensor, "2"] = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))
    is_finite: bool = True  # all hidden states after the block

    def merge(self, other: "Sums") -> None:
        """Add the sums of other rows. UserError if a linear reads another input in those rows."""
        for linear, source in other.source.items():
            self.add_reader(linear, source)
        _merge(self.stats, other.stats)
        _merge(self.grams, other.grams)
        _merge(self.crosses, other.crosses)
        _merge(self.outputs, other.outputs)
        self.is_finite &= other.is_finite
        self.influence = self.influence.to(other.influence) + other.influence

    def add_reader(self, linear: str, source: str) -> None:
        """Add a linear to the readers of an input. UserError if it reads another input."""
        if self.source.setdefault(linear, source) != source:
            raise unsupported(linear, f"it reads the input of {self.source[linear]}, and in other windows of {source}")

    def of(self, linears: dict[str, Linear]) -> Recorded:
        """Return the statistics of a block's inputs. An expert without tokens has inputs of no tokens."""
        reached = {(linear.module, linear.leaf) for name, linear in linears.items() if name in self.source}
        stats, source = dict(self.stats), dict(self.source)
        for (module, leaf, expert), names in _weights(linears).items():
            if expert is not None and (module, leaf) not in reached:
                raise unsupported(names[0], "its experts do not multiply by the stored matrices")
            if expert is None and names[0] not in source:
                raise unsupported(names[0], "the model does not call this linear")
            if names[0] not in source:
                stats[names[0]] = InputStats.empty(linears[names[0]].features)
                source |= dict.fromkeys(names, names[0])
        # Experts last and in index order, instead of the order of their first tokens.
        experts = dict.fromkeys(name for name, linear in linears.items() if linear.part.expert is not None)
        readers: dict[str, list[str]] = {}
        for linear in [*(name for name in source if name not in experts), *experts]:
            readers.setdefault(source[linear], []).append(linear)
        inputs = {name: stats[name].to("cpu") for name in readers}
        transposed = [name for name, linear in linears.items() if linear.transposed]
        crosses = {name: x.sum for name, x in self.crosses.items() if x.count == stats[name].count}
        outputs = {name: replace(x, sum=x.sum.cpu()) for name in linears if (x := self.outputs.get(name))}
        measured = BlockStats(inputs, readers, transposed, outputs=outputs, influence=self.influence.cpu())
        return Recorded(measured, self.grams, crosses)


def check_finite(sums: dict[str, Tensor], where: str, what: str) -> None:
    """Raise UserError if sums of some linears are not finite. The host waits for a GPU once."""
    finite = torch.stack([x.isfinite().all() for x in sums.values()]).tolist() if sums else []
    for name, is_finite in zip(sums, finite, strict=True):
        if not is_finite:
            raise UserError(f"{where} of {name}: {what} that are not finite; {FIX}")


def _merge(own: dict[str, Any], other: dict[str, Any]) -> None:
    """Add sums to the sums of equal names."""
    for name, sums in other.items():
        if own.setdefault(name, sums) is not sums:
            own[name].merge(sums)


# Linears by their parameter: a module, its leaf and the expert. Linears that are rows of one parameter share its input.
SharedBy = dict[tuple[nn.Module, str, int | None], list[str]]


def _weights(linears: dict[str, Linear]) -> SharedBy:
    weights: SharedBy = {}
    for name, linear in linears.items():
        weights.setdefault((linear.module, linear.leaf, linear.part.expert), []).append(name)
    return weights


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
                    _merge(found, {name: TokenSum(own.to(solving_device(own.device)).double().sum(), end - begin)})
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
    sums: Sums = field(default_factory=Sums)
    _dense: dict[str, Tensor] = field(default_factory=dict)  # the dense model's inputs in this window
    _tokens: int = 0  # of the dense row
    _is_dense: bool = False
    # Inputs are kept alive until the window ends, so that their addresses are not reused.
    _held: dict[tuple[Any, ...], tuple[str, Tensor]] = field(default_factory=dict)
    _routed: RoutedOutputs = field(default_factory=RoutedOutputs)

    def recording(self) -> contextlib.AbstractContextManager[None]:
        """Record the inputs of the linears in every pass inside."""
        return _watching(self.linears, self._read, self._routed)

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
            self.sums.add_reader(name, self._held[key][0])

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
            _merge(sums.crosses, {name: TokenSum(product, len(x))})

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
        _merge(self.sums.outputs, self._routed.end_window())


@dataclass(kw_only=True)
class Gradients:
    """Sums over some rows of the gradients by the outputs of a block's linears. Sums of several rows merge.

    A token's gradient ∂ℓ/∂y is multiplied by ‖x‖, the norm of the linear's input at the token, because the gradient by
    the weights is (∂ℓ/∂y) xᵀ.

    Linears without a gradient are missing, such as experts without tokens, or with only last tokens, which predict
    nothing.
    """

    sums: dict[str, Float64[Tensor, " out"]] = field(default_factory=dict)  # Σ ‖x‖² (∂ℓ/∂y)² over all tokens
    grams: dict[str, Gram] = field(default_factory=dict)  # Σ ‖x‖² (∂ℓ/∂y)(∂ℓ/∂y)ᵀ, with that diagonal

    def merge(self, other: "Gradients") -> None:
        """Add the sums of other rows."""
        for name, sums in other.sums.items():
            self.sums[name] = self.sums.get(name, 0) + sums
        _merge(self.grams, other.grams)


@contextlib.contextmanager
def recording_gradients(linears: dict[str, Linear]) -> Iterator[Gradients]:
    """Record the gradients by the outputs of these linears in every pass inside.

    Linears without a gradient then drop out, and the sums are in main memory.
    """
    found, tokens = Gradients(), dict[str, Tensor]()  # tokens of the passes with a gradient, on the device

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

    with _watching(linears, see):
        yield found
    counts = torch.stack(list(tokens.values())).tolist() if tokens else []
    for name, count in zip(tokens, counts, strict=True):
        sums, matrix = found.sums.pop(name), found.grams.pop(name)
        if count:
            found.sums[name], found.grams[name] = sums.cpu(), Gram(matrix.upper, count)


ALL = slice(None)
# (names, x, y, tokens): the linears that are rows of one weight, their input and output, and the slice of their tokens
# in both.
See = Callable[[list[str], Tensor, Tensor, slice], None]


@contextlib.contextmanager
def _watching(linears: dict[str, Linear], see: See, routed: RoutedOutputs | None = None) -> Iterator[None]:
    """See the calls of these linears in passes inside: of modules by hooks, of experts by their products."""
    weights = _weights(linears)

    def watch(module: nn.Module, names: list[str]) -> Any:
        return module.register_forward_hook(lambda _, args, out: see(names, args[0], out, ALL))

    hooks = [watch(module, names) for (module, _, expert), names in weights.items() if expert is None]
    try:
        with _Products(weights, see, routed) if len(hooks) < len(weights) else contextlib.nullcontext():
            yield
    finally:
        for hook in hooks:
            hook.remove()


class _Products(TorchFunctionMode):
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
