"""The memory formula of docs/cost.md: a model counted from its config.json, and the most that a stage holds.

The weights need not be there.
"""

from dataclasses import dataclass, replace
from pathlib import Path

WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes a number
LIBRARIES = 48 * 2**20  # threads, kernels made at run time and a tokenizer, beyond the imports; about
ALLOCATOR = 64 * 2**20  # freed memory that glibc keeps, about; none with MALLOC_MMAP_THRESHOLD_ set
BYTES_A_TOKEN = 4  # of English text, about
TEXT_IN_MEMORY = 32  # bytes for each byte of a text while it is tokenized
SOLVING = 8  # copies of a linear in float32 that a solver holds: conjugate gradients' four and their products; ADMM's
GRAMS = 5  # matrices [in, in] in float32 that a solver holds: two prepared ones, and a factor with its temporaries
BY_GRADIENTS = 5  # more copies of a linear, and as many matrices [out, out], where gradients weigh the outputs
SELECTION = 24  # bytes a weight: its score, the partition of the scores, and the count of ties


@dataclass(frozen=True)
class Sizes:
    """A model's parameters, counted; a tied head counts as embeddings."""

    parameters: int
    block: int  # the largest
    rest: int  # embeddings, norms and head
    linear: int  # the largest linear's weights
    features: int  # that a block's linears read and write, each linear by itself
    widest: int  # the most features that a linear reads or puts out
    squares: int  # of the features that a block's linears read, each linear by itself: Gram matrices, at most
    all_squares: int  # of all blocks
    output_squares: int  # of the features that a block's linears put out: Gram matrices of gradients
    all_output_squares: int  # of all blocks
    hidden: int
    vocabulary: int
    blocks: int
    dtype: str  # as stored

    @property
    def stored(self) -> int:
        """Bytes on disk."""
        return self.parameters * WIDTH.get(self.dtype, 4)


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


@dataclass(frozen=True)
class Need:
    """Bytes, about; None where they are not known yet. With less free disk than `least` a stage cannot end well."""

    memory: Memory | None = None
    disk: int | None = None
    least: int = 0


def sizes(config: Path) -> Sizes:
    """Count the model that a config.json, or the one in a directory, describes."""
    from wanda_dvc.engine.config import read_config
    from wanda_dvc.engine.structure import empty_model, find_blocks, weight_shapes

    model = empty_model(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())  # each once
    blocks = find_blocks(model)[1]
    counts = [sum(parameter.numel() for parameter in block.parameters()) for block in blocks]
    # Each expert's matrix is a linear of its own.
    shapes = [[shape[-2:] for shape in weight_shapes(block) for _ in range(shape[:-2].numel())] for block in blocks]
    squares, output_squares = ([sum(shape[end] ** 2 for shape in block) for block in shapes] for end in (-1, -2))
    stored = read_config(config).dtype  # the model's own config says what it runs in
    return Sizes(
        parameters=parameters,
        block=max(counts),
        rest=parameters - sum(counts),
        linear=max(shape.numel() for block in shapes for shape in block),
        features=max(sum(sum(shape) for shape in block) for block in shapes),
        widest=max(max(shape) for block in shapes for shape in block),
        squares=max(squares),
        all_squares=sum(squares),
        output_squares=max(output_squares),
        all_output_squares=sum(output_squares),
        hidden=model.config.get_text_config().hidden_size,
        vocabulary=model.get_output_embeddings().weight.shape[0],
        blocks=len(blocks),
        dtype=str(stored or "float32").removeprefix("torch."),
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
    grams = 2 * 8 * model.squares + 12 * PANEL * model.widest if gram else 0
    if crosses:
        grams += 2 * 8 * model.squares + 12 * model.widest**2
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


def differentiating(model: Sizes, *, dtype: str, length: int, gram: bool = False, workers: bool = False) -> Memory:
    """A row forward and back through a block, three times the activations; or through the head, whose logits double.

    With `gram` the Gram matrices of a block's gradients, what is written of them, and what packing them leaves; with
    `workers` those of a row that come from one, which is more.
    """
    from wanda_dvc.pruning.gram import PANEL

    walk = walking(model, dtype=dtype, length=length, logits=True)
    grams = (16 if workers else 13) * model.output_squares + (12 * PANEL + 8 * length) * model.widest if gram else 0
    return replace(walk, activations=3 * walk.activations, logits=2 * walk.logits, grams=grams)


def either(one: Memory, other: Memory) -> Memory:
    """The larger of two that are not held at once."""
    return max(one, other, key=lambda memory: memory.total)


def choosing(*, block: int, linear: int, threads: int, by_row: bool) -> Memory:
    """A block's masks, a byte a weight, and the scores of as many linears as there are threads, or of a slice of each.

    `block` and `linear` are the weights of the largest ones.
    """
    from wanda_dvc.pruning.choose import WEIGHTS_AT_A_TIME

    scores = min(linear, WEIGHTS_AT_A_TIME) if by_row else linear
    return Memory(selection=block + SELECTION * min(threads * scores, block))


def writing(*, linear: int, widest: int = 0, by_gradients: bool = False) -> Memory:
    """The largest linear while it is multiplied, and the one before, which is being written; or what solving takes.

    `widest` is the most features that a linear reads or puts out where there are Gram matrices, with `by_gradients`
    also of gradients.
    """
    solving = SOLVING * 4 * linear + GRAMS * 4 * widest**2 if widest else 0
    more = BY_GRADIENTS * 4 * (linear + widest**2) if by_gradients else 0
    return Memory(selection=9 * linear + solving + more)


def propagating(  # noqa: PLR0913 - the terms of the formula
    walk: Memory,
    chosen: Memory,
    *,
    model: Sizes,
    dtype: str,
    gram: bool = False,
    crosses: bool = False,
    solves: bool = False,
    trains: bool = False,
) -> Memory:
    """Masks that are chosen while the blocks are walked: both, and the block at work, which is no view any more.

    With `gram` a solver is handed a packed triangle and, with `crosses`, a product beside it. With `solves` a block has
    new weights. A training holds 24 bytes for each of the block's parameters instead of what a solver does, and three
    times the activations of a window.
    """
    handed = (2 * gram + 4 * crosses) * model.widest**2
    weights = 24 * model.block if trains else 0
    new = model.block * WIDTH.get(model.dtype, 4) if solves else 0
    selection = max(chosen.selection + handed, weights) + model.block * WIDTH[dtype] + new
    return replace(walk, selection=selection, activations=walk.activations * (3 if trains else 1))
