"""The memory formula of docs/cost.md: the counts of a model from its config.json, and the peak memory of a stage.

It needs no weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanda_dvc.catalog import STRUCTURES

if TYPE_CHECKING:
    from wanda_dvc.catalog import Method, Reconstruction
    from wanda_dvc.plan import Plan

WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes a number
LIBRARIES = 48 * 2**20  # threads, kernels made at run time and a tokenizer, beyond the imports; about
ALLOCATOR = 64 * 2**20  # freed memory that glibc keeps, about; none with MALLOC_MMAP_THRESHOLD_ set
TEXT_IN_MEMORY = 32  # bytes for each byte of a text while it is tokenized
SOLVING = 8  # float32 copies of a linear in a solver: conjugate gradients' four and their products; ADMM's
GRAMS = 5  # float32 matrices [in, in] in a solver: two prepared ones, and a factor with its temporaries
BY_GRADIENTS = 5  # more copies of a linear, and as many matrices [out, out], if gradients weight the outputs
PRODUCTS = 20  # of a linear and its Gram matrix, in a solver: conjugate gradients take 10, ADMM 20
SELECTION = 24  # bytes a weight: its score, the partition of the scores, and the count of ties


@dataclass(frozen=True, kw_only=True)
class Linears:
    """A model's linears, counted; each expert's matrix is one."""

    count: int  # weights of all
    prunable: int  # weights of the largest block's
    linear: int  # weights of the largest
    features: int  # that a block's read and write, each by itself
    widest: int  # the most input or output features of one linear
    squares: int  # of the features that a block's read, each by itself: Gram matrices, at most
    all_squares: int  # of all blocks
    output_squares: int  # of the output features of a block's linears: Gram matrices of gradients
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
    met: int  # weights of linears that a token passes through: of experts, the chosen ones
    scored: int  # heads whose attention holds the scores of all pairs of positions: without a fused implementation
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
    """The peak memory of a stage beyond its imports, in bytes, by purpose."""

    weights: int = 0
    activations: int = 0
    logits: int = 0
    references: int = 0  # the dense model's predictions on a shard's windows
    calls: int = 0  # recorded arguments of the blocks, one set a packed row
    grams: int = 0  # Gram matrices and cross products of a block, while they are summed
    selection: int = 0
    text: int = 0
    mapped: bool = False  # the weights are views of the checkpoint: page cache, which the system may reclaim

    @property
    def total(self) -> int:
        """With mapped weights."""
        own = self.weights + self.activations + self.logits + self.references + self.calls + self.grams
        return own + self.selection + self.text + LIBRARIES + ALLOCATOR

    @property
    def anonymous(self) -> int:
        """Without mapped weights."""
        return self.total - (self.weights if self.mapped else 0)


def sizes(config: Path) -> Sizes:
    """Count the model of a config.json, or of a directory's config.json."""
    from wanda_dvc.engine.config import read_config
    from wanda_dvc.engine.structure import empty_model

    stored = read_config(config).dtype  # the default is the config's own dtype
    return count(empty_model(config), dtype=str(stored or "float32").removeprefix("torch."))


def count(model: Any, *, dtype: str) -> Sizes:
    """Count a model that transformers has built. Windowed attention counts as full attention."""
    from wanda_dvc.engine.structure import find_blocks, weight_shapes

    text = model.config.get_text_config()
    parameters = sum(parameter.numel() for parameter in model.parameters())  # each once
    blocks = find_blocks(model)[1]
    counts = [sum(parameter.numel() for parameter in block.parameters()) for block in blocks]
    shapes = [weight_shapes(block) for block in blocks]
    experts = next((value for name in STRUCTURES["experts"].fields if (value := getattr(text, name, None))), 1)
    # The share of experts that a token is sent to; all of them if the configuration names no number.
    met_share = (getattr(text, "num_experts_per_tok", None) or experts) / experts
    heads = getattr(text, "num_attention_heads", None) or 0  # Mamba has none
    head = model.get_output_embeddings().weight
    matrices = [[(shape[-2], shape[-1]) for shape in block for _ in range(shape[:-2].numel())] for block in shapes]
    return Sizes(
        **vars(Linears.of(matrices, WIDTH.get(dtype, 4))),
        parameters=parameters,
        blocks=len(blocks),
        block=max(counts),
        rest=parameters - sum(counts),
        met=int(sum(shape.numel() * (met_share if len(shape) == 3 else 1) for block in shapes for shape in block)),
        scored=heads if model.config._attn_implementation == "eager" else 0,
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
    """Return the memory of rows of `length` tokens through all blocks; two blocks are loaded, the current and the next.

    `text` is the bytes of the tokenized text. `statistics` counts the recorder's sums, `gram` its Gram matrices, and
    `crosses` its products with the dense model's inputs. `logits` counts the head's outputs, `packed` the recorded
    calls of rows of several questions, one set each.
    """
    from wanda_dvc.engine.calls import calls_bytes
    from wanda_dvc.engine.decoder import LOGITS_AT_A_TIME
    from wanda_dvc.engine.shards import TOKENS_TOGETHER
    from wanda_dvc.pruning.gram import PANEL

    width = WIDTH[dtype]
    tokens = max(length, TOKENS_TOGETHER.get(device, 0))  # of several windows, if one does not fill a GPU
    activations = tokens * model.features * width + model.linear * width  # a matrix library packs the linear
    # The scores of all pairs of positions: as they are, in float32 for the softmax, and its result.
    activations += tokens * length * model.scored * (2 * width + 4)
    if statistics:
        activations += tokens * model.widest * 8  # the float32 copy of an input, and its square
    # float64 sums of a block's shards so far and of the next one, and a panel; written files take less. A cross
    # product has no panels, and waits for the dense model's input.
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


def comparing(walk: Memory, model: Sizes, *, length: int, windows: int, device: str) -> Memory:
    """Return the memory of a walk with a comparison of the predictions: a shard's references, and temporaries."""
    from wanda_dvc.engine import divergence, shards

    held = reference_bytes(len(next(iter(shards.cut(windows)), ())) * length)
    slices = divergence.TEMPORARIES * min(divergence.AT_A_TIME.get(device, 0), length * model.vocabulary)
    return replace(walk, references=held + slices)


def reference_bytes(tokens: int) -> int:
    """Return the bytes of the dense model's predictions on some tokens."""
    from wanda_dvc.engine.divergence import BYTES_A_TOKEN

    return tokens * BYTES_A_TOKEN


def generating(model: Sizes, *, dtype: str, tokens: int) -> Memory:
    """Return the memory of a complete model that continues a prompt, up to a number of tokens, with its cache."""
    walk, width = walking(model, dtype=dtype, length=tokens, logits=True), WIDTH[dtype]
    cache = 2 * model.blocks * tokens * model.hidden * width  # keys and values; fewer with shared ones
    return replace(walk, weights=model.parameters * width, activations=walk.activations + cache)


def differentiating(model: Sizes, *, dtype: str, length: int, workers: bool = False) -> Memory:
    """Return the memory of a row forward and back through a block (three times the activations) or through the head.

    The head holds logits twice. Adds the Gram matrices of a block's gradients, their written form and the remains of
    packing; with `workers`, the larger matrices of a row from one worker.
    """
    from wanda_dvc.pruning.gram import PANEL

    walk = walking(model, dtype=dtype, length=length, logits=True)
    grams = (16 if workers else 13) * model.output_squares + (12 * PANEL + 8 * length) * model.widest
    return replace(walk, activations=3 * walk.activations, logits=2 * walk.logits, grams=grams)


def either(one: Memory, other: Memory) -> Memory:
    """Return the larger of two needs at different times."""
    return max(one, other, key=lambda memory: memory.total)


def choosing(linears: Linears, *, threads: int, by_row: bool) -> Memory:
    """Return the memory of a block's masks, a byte a weight, and of the scores of one linear per thread.

    With `by_row` only the scores of a slice of rows per thread count.
    """
    from wanda_dvc.pruning.choose import WEIGHTS_AT_A_TIME

    scores = min(linears.linear, WEIGHTS_AT_A_TIME) if by_row else linears.linear
    return Memory(selection=linears.prunable + SELECTION * min(threads * scores, linears.prunable))


def writing(linears: Linears, *, gram: bool = False, by_gradients: bool = False) -> Memory:
    """Return the memory of masking the largest linear while the linear before is written, or the memory of solving.

    `gram` adds Gram matrices, `by_gradients` also Gram matrices of gradients.
    """
    linear, widest = linears.linear, linears.widest
    solving = SOLVING * 4 * linear + GRAMS * 4 * widest**2 if gram else 0
    more = BY_GRADIENTS * 4 * (linear + widest**2) if by_gradients else 0
    return Memory(selection=9 * linear + solving + more)


def probing(model: Sizes, *, copies: bool) -> Memory:
    """Return the memory of the probe of a smaller model: a model in float32 with one block.

    `copies`: and a copy of the weights that read the units, at most a third of the block.
    """
    return Memory(selection=4 * (model.rest + model.block + copies * model.block // 3))


def propagating(walk: Memory, chosen: Memory, plan: "Plan", *, model: Sizes, dtype: str) -> Memory:
    """Return the memory of choosing masks during a walk: both, and a copy of the current block's weights.

    A solver receives a packed triangle and, for a correction, a cross product. A reconstruction gives a block new
    weights. A training needs 28 bytes for each of the block's parameters instead of a solver's memory, and three times
    the activations of a window.
    """
    inputs = (2 * plan.records_grams + 4 * plan.corrects) * model.widest**2
    weights = 28 * model.block if plan.trains else 0
    new = model.block * model.width if plan.solves else 0
    selection = max(chosen.selection + inputs, weights) + model.block * WIDTH[dtype] + new
    return replace(walk, selection=selection, activations=walk.activations * (3 if plan.trains else 1))
