"""Counts of a model from its config.json, without weights, and the memory of rows that go through it block by block."""

from pathlib import Path
from typing import Any

from wanda_dvc.engine.checkpoint import WIDTH, Address, read_config
from wanda_dvc.engine.sequences import ARGUMENTS_BYTES
from wanda_dvc.pruning.gram import PANEL

LIBRARIES = 48 * 2**20  # threads, kernels made at run time and a tokenizer, beyond the imports; about
ALLOCATOR = 64 * 2**20  # freed memory that glibc keeps, about; none with MALLOC_MMAP_THRESHOLD_ set
FIXED = LIBRARIES + ALLOCATOR  # of every stage


class Sizes:
    """A model, counted; a tied head counts as embeddings. Each expert's matrix is a linear with features of its own."""

    def __init__(self, config: Path) -> None:
        """Count the model of a config.json, or of its directory. Windowed attention counts as full attention."""
        from wanda_dvc.engine.structure import StoredSlice, build_empty, find_blocks, stored_linears

        stored = read_config(config)
        self.dtype = str(stored.dtype or "float32").removeprefix("torch.")  # as stored; a model's default is float32
        self.width = WIDTH.get(self.dtype, 8)  # bytes of a stored weight, at most
        model: Any = build_empty(stored, str(config))  # it changes the dtype
        text, blocks = model.config.get_text_config(), find_blocks(model)[1]
        counts = [sum(parameter.numel() for parameter in block.parameters()) for block in blocks]
        linears = [stored_linears(block, "", lambda name: [StoredSlice(Address(name))]).values() for block in blocks]
        shapes = [[(x.weight.numel() // x.features, x.features) for x in block] for block in linears]
        each = [shape for block in shapes for shape in block]
        weights = [sum(out * features for out, features in block) for block in shapes]
        reads = [sum(features**2 for _, features in block) for block in shapes]
        writes = [sum(out**2 for out, _ in block) for block in shapes]
        heads: int = getattr(text, "num_attention_heads", None) or 0  # Mamba has none

        self.count = sum(weights)  # weights of all linears
        self.prunable = max(weights)  # M: of the largest block's
        self.linear = max(out * features for out, features in each)  # l: of the largest
        # F: features that a block's linears read and write
        self.features = max(sum(out + features for out, features in block) for block in shapes)
        self.widest = max(max(shape) for shape in each)  # f: the most that one reads or writes
        self.squares, self.all_squares = max(reads), sum(reads)  # Σ f² of what a block's linears read, and all blocks'
        self.output_squares, self.all_output_squares = max(writes), sum(writes)  # Σ g² of what they write
        self.parameters = sum(parameter.numel() for parameter in model.parameters())  # each once
        self.blocks = len(blocks)
        self.block = max(counts)  # W: parameters of the largest
        self.rest = self.parameters - sum(counts)  # R: embeddings, norms and head
        # Heads whose attention holds the scores of all pairs of positions: without a fused implementation.
        self.scored = heads if model.config._attn_implementation == "eager" else 0
        self.hidden: int = text.hidden_size
        self.vocabulary: int = model.get_output_embeddings().weight.shape[0]


class Walk:
    """The memory of rows that go through a model block by block, in bytes, by purpose."""

    def __init__(self, model: Sizes, *, dtype: str, length: int, device: str = "cpu") -> None:
        """Count rows of `length` tokens, on a kind of device."""
        from wanda_dvc.engine.decoder import LOGITS_AT_A_TIME  # imports transformers, which most of `mask` needs not

        width = WIDTH[dtype]
        # The scores of all pairs of positions: as they are, in float32 for the softmax, and its result.
        scores = length**2 * model.scored * (2 * width + 4)
        self.weights = (2 * model.block + model.rest) * width  # of the current block, the next one, embeddings and head
        # Whether the weights are views of the checkpoint: page cache, which the system may reclaim.
        self.mapped = device == "cpu" and dtype == model.dtype
        self.activations = (length * model.features + model.linear) * width + scores  # a matrix library packs a linear
        # A chunk's, as the model gives them, in float32, and their log-softmax.
        self.logits = min(LOGITS_AT_A_TIME, length * model.vocabulary) * (width + 8)
        self.norms = 8 * length * model.widest  # to sum statistics: the float32 copy of an input, and its square
        # To sum Gram matrices: float64 sums of the shards so far and of the next one, and a panel.
        self.grams = 16 * model.squares + 12 * PANEL * model.widest
        self.crosses = 16 * model.squares + 12 * model.widest**2  # cross products: without a panel, but a product
        self.dense = length * model.features * width  # the dense model's inputs, which wait for cross products
        # Before packed questions, a block of each kind is tried, with a copy in float32.
        self.tried = 4 * model.block if width < 4 else 0
        self.block_arguments = ARGUMENTS_BYTES[device]  # recorded arguments of the blocks, of rows of several questions
