"""Counts of a model from its config.json, without weights, and the memory of rows that go through it block by block."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wanda_dvc.engine.rows import calls_bytes
from wanda_dvc.pruning.gram import PANEL

WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes a number
LIBRARIES = 48 * 2**20  # threads, kernels made at run time and a tokenizer, beyond the imports; about
ALLOCATOR = 64 * 2**20  # freed memory that glibc keeps, about; none with MALLOC_MMAP_THRESHOLD_ set
FIXED = LIBRARIES + ALLOCATOR  # of every stage


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """A model, counted; a tied head counts as embeddings. Each expert's matrix is a linear with features of its own."""

    count: int  # weights of all linears
    prunable: int  # M: of the largest block's
    linear: int  # l: of the largest
    features: int  # F: that a block's linears read and write
    widest: int  # f: the most that one reads or writes
    squares: int  # Σ f² of what a block's linears read
    all_squares: int  # of all blocks
    output_squares: int  # Σ g² of what a block's linears write
    all_output_squares: int  # of all blocks
    width: int  # bytes of a stored weight
    parameters: int
    blocks: int
    block: int  # W: parameters of the largest
    rest: int  # R: embeddings, norms and head
    scored: int  # heads whose attention holds the scores of all pairs of positions: without a fused implementation
    hidden: int
    vocabulary: int
    dtype: str  # as stored


@dataclass(frozen=True, kw_only=True)
class Walk:
    """The memory of rows that go through a model block by block, in bytes, by purpose."""

    weights: int  # of the current block, the next one, embeddings and head
    mapped: bool  # the weights are views of the checkpoint: page cache, which the system may reclaim
    activations: int
    logits: int  # a chunk's, as the model gives them, in float32, and their log-softmax
    norms: int  # to sum statistics: the float32 copy of an input, and its square
    grams: int  # to sum Gram matrices: float64 sums of the shards so far and of the next one, and a panel
    crosses: int  # to sum cross products: the same without a panel, and a product
    dense: int  # the dense model's inputs, which wait for cross products
    calls: int  # recorded arguments of the blocks, of rows of several questions


def walk(model: Sizes, *, dtype: str, length: int, device: str = "cpu") -> Walk:
    """Return the memory of rows of `length` tokens through all blocks, on a kind of device."""
    from wanda_dvc.engine.decoder import LOGITS_AT_A_TIME  # imports transformers, which most of `mask` does not need

    width = WIDTH[dtype]
    # The scores of all pairs of positions: as they are, in float32 for the softmax, and its result.
    scores = length**2 * model.scored * (2 * width + 4)
    return Walk(
        weights=(2 * model.block + model.rest) * width,
        mapped=device == "cpu" and dtype == model.dtype,
        activations=(length * model.features + model.linear) * width + scores,  # a matrix library packs the linear
        logits=min(LOGITS_AT_A_TIME, length * model.vocabulary) * (width + 8),
        norms=8 * length * model.widest,
        grams=16 * model.squares + 12 * PANEL * model.widest,
        crosses=16 * model.squares + 12 * model.widest**2,
        dense=length * model.features * width,
        calls=calls_bytes(device),
    )


def sizes(config: Path) -> Sizes:
    """Count the model of a config.json, or of its directory. Windowed attention counts as full attention."""
    from wanda_dvc.engine.checkpoint import read_config
    from wanda_dvc.engine.structure import build_empty, find_blocks, weight_shapes

    stored = read_config(config)
    dtype = str(stored.dtype or "float32").removeprefix("torch.")  # a model's default is float32
    model: Any = build_empty(stored, str(config))
    text = model.config.get_text_config()
    parameters = sum(parameter.numel() for parameter in model.parameters())  # each once
    blocks = find_blocks(model)[1]
    counts = [sum(parameter.numel() for parameter in block.parameters()) for block in blocks]
    shapes = [weight_shapes(block) for block in blocks]
    each = [shape for block in shapes for shape in block]
    weights = [sum(out * features for out, features in block) for block in shapes]
    reads = [sum(features**2 for _, features in block) for block in shapes]
    writes = [sum(out**2 for out, _ in block) for block in shapes]
    heads = getattr(text, "num_attention_heads", None) or 0  # Mamba has none
    return Sizes(
        count=sum(weights),
        prunable=max(weights),
        linear=max(out * features for out, features in each),
        features=max(sum(out + features for out, features in block) for block in shapes),
        widest=max(max(shape) for shape in each),
        squares=max(reads),
        all_squares=sum(reads),
        output_squares=max(writes),
        all_output_squares=sum(writes),
        width=WIDTH.get(dtype, 4),
        parameters=parameters,
        blocks=len(blocks),
        block=max(counts),
        rest=parameters - sum(counts),
        scored=heads if model.config._attn_implementation == "eager" else 0,
        hidden=text.hidden_size,
        vocabulary=model.get_output_embeddings().weight.shape[0],
        dtype=dtype,
    )
