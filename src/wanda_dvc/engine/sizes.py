"""The memory formula of docs/cost.md: a model counted from its config.json, and the peak memory of a stage.

No weights are needed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wanda_dvc.catalog import Method, Reconstruction
    from wanda_dvc.plan import Plan

WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes a number
LIBRARIES = 48 * 2**20  # threads, kernels made at run time and a tokenizer, beyond the imports; about
ALLOCATOR = 64 * 2**20  # freed memory that glibc keeps, about; none with MALLOC_MMAP_THRESHOLD_ set
TEXT_IN_MEMORY = 32  # bytes for each byte of a text while it is tokenized
SOLVING = 8  # copies of a linear in float32 that a solver holds: conjugate gradients' four and their products; ADMM's
GRAMS = 5  # matrices [in, in] in float32 that a solver holds: two prepared ones, and a factor with its temporaries
BY_GRADIENTS = 5  # more copies of a linear, and as many matrices [out, out], where gradients weigh the outputs
PRODUCTS = 20  # of a linear and its Gram matrix, in a solver: conjugate gradients take 10, ADMM 20
SELECTION = 24  # bytes a weight: its score, the partition of the scores, and the count of ties


@dataclass(frozen=True, kw_only=True)
class Linears:
    """A model's linears, counted; each expert's matrix is one."""

    count: int  # weights of all
    prunable: int  # weights of the largest block's
    linear: int  # weights of the largest
    features: int  # that a block's read and write, each by itself
    widest: int  # the most features that one reads or puts out
    squares: int  # of the features that a block's read, each by itself: Gram matrices, at most
    all_squares: int  # of all blocks
    output_squares: int  # of the features that a block's put out: Gram matrices of gradients
    all_output_squares: int  # of all blocks
    products: int  # FLOPs of a product of each with its Gram matrix
    width: int  # bytes of a stored weight

    @staticmethod
    def of(shapes: Sequence[Sequence[tuple[int, int]]], width: int) -> "Linears":
        """Count linears by their shapes [out, in], block by block."""
        weights, reads, writes = (
            [sum(function(*shape) for shape in block) for block in shapes]
            for function in (lambda out, of: out * of, lambda _, of: of**2, lambda out, _: out**2)
        )
        each = [shape for block in shapes for shape in block]
        return Linears(
            count=sum(weights),
            prunable=max(weights),
            linear=max(out * of for out, of in each),
            features=max(sum(map(sum, block)) for block in shapes),
            widest=max(map(max, each)),
            squares=max(reads),
            all_squares=sum(reads),
            output_squares=max(writes),
            all_output_squares=sum(writes),
            products=sum(2 * out * of**2 for out, of in each),
            width=width,
        )

    def choosing(self, method: "Method") -> int:
        """FLOPs of masks: of a score a weight, or of a solver."""
        return PRODUCTS * self.products if method.needs == "gram" else self.count

    def solving(self, reconstruction: "Reconstruction") -> int:
        """FLOPs of other weights; gradients have Gram matrices of their own, which count twice."""
        if reconstruction.function is None:
            return 0
        return PRODUCTS * (1 + 2 * reconstruction.by_gradients) * self.products

    def pruning(self, reconstruction: "Reconstruction", *, gram: bool) -> int:
        """FLOPs of masked weights and, with `gram`, of layer errors: of the masks, and of other values on them."""
        return self.count + gram * (2 + (reconstruction.function is not None)) * self.products


@dataclass(frozen=True, kw_only=True)
class Sizes(Linears):
    """A model, counted; a tied head counts as embeddings."""

    parameters: int
    blocks: int
    block: int  # the largest
    rest: int  # embeddings, norms and head
    met: int  # weights of linears that a token is multiplied with: of experts, those that it is sent to
    pairs: int  # query features of all blocks: each pair of tokens costs them twice, for q·k and for its share of v
    head: int  # weights, also of a tied head
    hidden: int
    vocabulary: int
    dtype: str  # as stored

    @property
    def stored(self) -> int:
        """Bytes on disk."""
        return self.parameters * self.width

    def walking(self, windows: float, length: int) -> float:
        """FLOPs of windows through all blocks, with the causal half of attention."""
        tokens = windows * length
        return 2 * tokens * self.met + 2 * tokens * length * self.pairs


@dataclass(frozen=True)
class Memory:
    """The most that a stage holds beyond its imports, in bytes, by purpose."""

    weights: int = 0
    activations: int = 0
    logits: int = 0
    calls: int = 0  # recorded arguments of the blocks, one set a packed row
    grams: int = 0  # Gram matrices and cross products of a block, while they are summed
    selection: int = 0
    text: int = 0
    mapped: bool = False  # the weights are views of the checkpoint: page cache, which the system may reclaim

    @property
    def total(self) -> int:
        """With mapped weights."""
        own = self.weights + self.activations + self.logits + self.calls + self.grams + self.selection + self.text
        return own + LIBRARIES + ALLOCATOR

    @property
    def anonymous(self) -> int:
        """Without mapped weights."""
        return self.total - (self.weights if self.mapped else 0)


def sizes(config: Path) -> Sizes:
    """Count the model that a config.json, or the one in a directory, describes."""
    from wanda_dvc.engine.config import read_config
    from wanda_dvc.engine.structure import empty_model

    stored = read_config(config).dtype  # the model's own config says what it runs in
    return count(empty_model(config), dtype=str(stored or "float32").removeprefix("torch."))


def count(model: Any, *, dtype: str) -> Sizes:
    """Count a model that transformers has built. Windowed attention counts as full attention."""
    from wanda_dvc.engine.structure import find_blocks, weight_shapes

    text = model.config.get_text_config()
    parameters = sum(parameter.numel() for parameter in model.parameters())  # each once
    blocks = find_blocks(model)[1]
    counts = [sum(parameter.numel() for parameter in block.parameters()) for block in blocks]
    shapes = [weight_shapes(block) for block in blocks]
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((value for name in names if (value := getattr(text, name, None))), 1)
    asked = (getattr(text, "num_experts_per_tok", None) or 1) / experts  # the share of experts that a token is sent to
    heads = getattr(text, "num_attention_heads", None) or 0  # Mamba has none
    head = model.get_output_embeddings().weight
    matrices = [[(shape[-2], shape[-1]) for shape in block for _ in range(shape[:-2].numel())] for block in shapes]
    return Sizes(
        **vars(Linears.of(matrices, WIDTH.get(dtype, 4))),
        parameters=parameters,
        blocks=len(blocks),
        block=max(counts),
        rest=parameters - sum(counts),
        met=int(sum(shape.numel() * (asked if len(shape) == 3 else 1) for block in shapes for shape in block)),
        pairs=len(blocks) * heads * (getattr(text, "head_dim", None) or text.hidden_size // max(1, heads)),
        head=head.numel(),
        hidden=text.hidden_size,
        vocabulary=head.shape[0],
        dtype=dtype,
    )


def walking(  # noqa: PLR0913 - the terms of the formula
    model: Sizes,
    *,
    dtype: str,
    length: int,
    device: str = "cpu",
    text: int = 0,
    statistics: bool = False,
    gram: bool = False,
    crosses: bool = False,
    logits: bool = False,
    packed: bool = False,
) -> Memory:
    """Rows of `length` tokens through all blocks, two of which are held: the one at work and the next.

    `text` is the bytes of the text that is tokenized. `statistics` counts what the recorder holds, `gram` its Gram
    matrices, `crosses` its products with what the dense model reads, `logits` what the head puts out, `packed` the
    calls that rows of several questions need, one set each.
    """
    from wanda_dvc.engine.calls import calls_bytes
    from wanda_dvc.engine.decoder import LOGITS_AT_A_TIME
    from wanda_dvc.engine.shards import TOKENS_TOGETHER
    from wanda_dvc.pruning.gram import PANEL

    width = WIDTH[dtype]
    tokens = max(length, TOKENS_TOGETHER.get(device, 0))  # of several windows, where one does not fill a card
    activations = tokens * model.features * width + model.linear * width  # a matrix library packs the linear
    if statistics:
        activations += tokens * model.widest * 8  # the float32 copy of an input, and its square
    # float64 sums of a block's shards so far and of the next one, and a panel; what is written takes less. A cross
    # product has no panels, and waits for what the dense model reads.
    sums = 2 * 8 * model.squares
    grams = sums + 12 * PANEL * model.widest if gram else 0
    if crosses:
        grams += sums + 12 * model.widest**2
        activations += tokens * model.features * width
    return Memory(
        weights=(2 * model.block + model.rest) * width,
        activations=activations,
        # A chunk's logits, as the model gives them, in float32, and their log-softmax.
        logits=min(LOGITS_AT_A_TIME, length * model.vocabulary) * (width + 8) if logits else 0,
        calls=calls_bytes(device) if packed else 0,
        grams=grams,
        text=text * TEXT_IN_MEMORY,
        mapped=device == "cpu" and dtype == model.dtype,
    )


def differentiating(model: Sizes, *, dtype: str, length: int, workers: bool = False) -> Memory:
    """A row forward and back through a block, three times the activations; or through the head, whose logits double.

    With the Gram matrices of a block's gradients, what is written of them, and what packing them leaves; with `workers`
    those of a row that come from one, which is more.
    """
    from wanda_dvc.pruning.gram import PANEL

    walk = walking(model, dtype=dtype, length=length, logits=True)
    grams = (16 if workers else 13) * model.output_squares + (12 * PANEL + 8 * length) * model.widest
    return replace(walk, activations=3 * walk.activations, logits=2 * walk.logits, grams=grams)


def either(one: Memory, other: Memory) -> Memory:
    """The larger of two that are not held at once."""
    return max(one, other, key=lambda memory: memory.total)


def choosing(linears: Linears, *, threads: int, by_row: bool) -> Memory:
    """A block's masks, a byte a weight, and the scores of as many linears as there are threads, or of a slice of each.

    With `by_row` a linear's rows are scored some at a time.
    """
    from wanda_dvc.pruning.choose import WEIGHTS_AT_A_TIME

    scores = min(linears.linear, WEIGHTS_AT_A_TIME) if by_row else linears.linear
    return Memory(selection=linears.prunable + SELECTION * min(threads * scores, linears.prunable))


def writing(linears: Linears, *, gram: bool = False, by_gradients: bool = False) -> Memory:
    """The largest linear while it is multiplied, and the one before, which is being written; or what solving takes.

    With `gram` there are Gram matrices, with `by_gradients` also of gradients.
    """
    linear, widest = linears.linear, linears.widest
    solving = SOLVING * 4 * linear + GRAMS * 4 * widest**2 if gram else 0
    more = BY_GRADIENTS * 4 * (linear + widest**2) if by_gradients else 0
    return Memory(selection=9 * linear + solving + more)


def propagating(walk: Memory, chosen: Memory, plan: "Plan", *, model: Sizes, dtype: str) -> Memory:
    """Masks that are chosen while the blocks are walked: both, and the block at work, which is no view any more.

    A solver is handed a packed triangle and, for a correction, a product beside it. A reconstruction gives a block new
    weights. A training holds 24 bytes for each of the block's parameters instead of what a solver does, and three times
    the activations of a window.
    """
    handed = (2 * plan.records_grams + 4 * plan.corrects) * model.widest**2
    weights = 24 * model.block if plan.trains else 0
    new = model.block * model.width if plan.solves else 0
    selection = max(chosen.selection + handed, weights) + model.block * WIDTH[dtype] + new
    return replace(walk, selection=selection, activations=walk.activations * (3 if plan.trains else 1))
