"""The memory of a model in bytes, beyond the imports: its sizes, a forward pass, a solver.

`stages/needs.py` adds these terms up for each stage. On a CPU, weights in the checkpoint's dtype are views of mapped
files: they count here, but the system may reclaim their pages.
"""

import itertools
from pathlib import Path
from typing import Any

from wanda_dvc.engine.checkpoint import ITEMSIZE, Address, dtype_of, read_config
from wanda_dvc.plan import GRAM_DTYPE
from wanda_dvc.pruning.gram import PANEL

LIBRARIES = 48 * 2**20  # threads, kernels made at run time and a tokenizer, beyond the imports; about
ALLOCATOR = 64 * 2**20  # freed memory that glibc keeps, about; none with MALLOC_MMAP_THRESHOLD_ set
FIXED = LIBRARIES + ALLOCATOR  # of every stage
LOGITS_AT_A_TIME = 2**25  # elements; 128 MB in float32
LOGITS_OF_SLICE = 2**24  # elements; of a training with little memory, which also keeps their gradients
VALUES_OF_SCALE = 256  # in 8 bits, of an optimizer's moment
COMPACT_BYTES = 5 + 8 / VALUES_OF_SCALE  # of a parameter in such a training: weight, next bits, moments and scales
ARGUMENTS_BYTES = 2**26  # of kept arguments of blocks, at least; on a CPU, to record others again takes 2 % of a block


class ModelSizes:
    """Counts of a model's weights and features. A tied head counts as embeddings; each expert's matrix is a linear."""

    def __init__(self, model: Any, place: Path) -> None:  # the model's config.json, or its directory
        from wanda_dvc.engine.structure import ParameterSlice, find_blocks, find_linears, find_weights

        blocks = find_blocks(model)[1]
        shapes: list[list[tuple[int, int]]] = []  # [out, in] of the linears of each block
        for block in blocks:  # as if each parameter were a tensor of its own: only shapes count
            linears = find_linears(block, "", {name: [ParameterSlice(Address(name))] for name in find_weights(block)})
            shapes.append([(x.weight.numel() // x.features, x.features) for x in linears.values()])
        all_shapes = list(itertools.chain.from_iterable(shapes))
        weights = [out * features for out, features in all_shapes]
        input_squares = [sum(features**2 for _, features in block) for block in shapes]
        output_squares = [sum(out**2 for out, _ in block) for block in shapes]
        block_sizes = [sum(parameter.numel() for parameter in block.parameters()) for block in blocks]
        text_config = model.config.get_text_config()
        heads: int = getattr(text_config, "num_attention_heads", None) or 0  # Mamba has none

        self.dtype = dtype_of(place)  # in which the model runs by default
        self.itemsize = ITEMSIZE[self.dtype]  # bytes of a stored weight
        self.parameters = sum(parameter.numel() for parameter in model.parameters())  # each once
        self.stored = self.parameters * self.itemsize  # bytes of the checkpoint
        self.blocks = len(blocks)
        self.block_parameters = max(block_sizes)  # parameters of the largest block
        self.other_parameters = self.parameters - sum(block_sizes)  # of embeddings, norms and head
        self.linear_weights, self.largest_linear = sum(weights), max(weights)
        self.features = max(sum(map(sum, block)) for block in shapes)  # that a block's linears read and write
        self.widest = max(map(max, all_shapes))  # that one linear reads or writes
        # Σ features² of what the linears of a block read, at most, and of all linears; the same of what they write.
        self.input_squares, self.all_input_squares = max(input_squares), sum(input_squares)
        self.output_squares, self.all_output_squares = max(output_squares), sum(output_squares)
        # Heads whose attention holds the scores of all pairs of positions: without a fused implementation.
        self.heads_with_scores = heads if model.config._attn_implementation == "eager" else 0
        self.hidden: int = text_config.hidden_size
        self.vocabulary: int = model.get_output_embeddings().weight.shape[0]

    @classmethod
    def read(cls, config: Path) -> "ModelSizes":
        """Count the model of a config.json, or of its directory, without weights. UserError if it is not valid."""
        from wanda_dvc.engine.structure import build_empty

        return cls(build_empty(read_config(config), str(config)), config)


class ForwardMemory:
    """The memory of a model that runs block by block, by purpose, for sequences of `length` tokens."""

    def __init__(self, model: ModelSizes, *, dtype: str, length: int, device: str = "cpu") -> None:
        itemsize = ITEMSIZE[dtype]
        # The scores of all pairs of positions: as they are, in float32 for the softmax, and its result.
        scores = length**2 * model.heads_with_scores * (2 * itemsize + 4)
        # Of the current block, the next one, embeddings and head.
        self.weights = (2 * model.block_parameters + model.other_parameters) * itemsize
        self.window = length * model.features * itemsize + scores
        self.activations = self.window + model.largest_linear * itemsize  # a matrix library packs a linear
        # Of some positions, as the model gives them, in float32, and their log-softmax.
        self.logits = min(LOGITS_AT_A_TIME, length * model.vocabulary) * (itemsize + 8)
        self.norms = 8 * length * model.widest  # to sum statistics: the float32 copy of an input, and its square
        # To sum Gram matrices, in bytes as in the docstring of `Gram`: two sums in float64, of the chunks so far and of
        # the next one; and on a CPU a panel of 128 rows, in float32 and float64, on a GPU the product in float32.
        product = (12 * PANEL if device == "cpu" else 4 * model.widest) * model.widest
        self.grams = 16 * model.input_squares + product
        # Backward: autograd's copies, and Gram matrices of gradients, with two float32 copies of a window's gradients.
        gradient_grams = 16 * model.output_squares + product + 8 * length * model.widest
        self.backward = 3 * self.activations + 2 * self.logits + gradient_grams
        self.sums = max(self.grams, gradient_grams)  # of any pass


def solving_memory(model: ModelSizes, *, uses_fisher: bool = False) -> int:
    """Return the memory to solve for a linear while the linear before it is written.

    That one has 9 bytes a weight: its values, new values and mask. The solver has at most 8 float32 copies of the
    weight and 5 matrices [features, features]; Fisher information adds 5 of each.
    """
    copies, matrices = (13, 10) if uses_fisher else (8, 5)
    return (9 + 4 * copies) * model.largest_linear + 4 * matrices * model.widest**2


def triangles_size(squares: int) -> int:
    """Return the bytes of stored Gram matrices with `squares` elements in all, but for half of their diagonals."""
    return squares // 2 * ITEMSIZE[GRAM_DTYPE]
