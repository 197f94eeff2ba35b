"""Runs a model block by block: inputs of the first block, arguments of each block, logits after the last.

The model's own forward pass supplies the arguments of each block. There is no family-specific code.
"""

import contextlib
import itertools
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, MutableSequence, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from wanda_dvc import kernels
from wanda_dvc.engine import accelerator, attention
from wanda_dvc.engine.checkpoint import Checkpoint, positions_of
from wanda_dvc.engine.load import BlockLoader, WeightChange, set_parameter
from wanda_dvc.engine.sequences import ARGUMENTS_BYTES, PackedQuestions, TokenSequence
from wanda_dvc.engine.structure import build_empty, unsupported
from wanda_dvc.errors import UserError, reason

LOGITS_AT_A_TIME = 2**25  # elements; 128 MB in float32
States = Float[Tensor, "1 length width"]  # hidden states of a row
Logits = Float[Tensor, "chunk vocabulary"]
Call = tuple[tuple[Any, ...], dict[str, Any]]  # the arguments of one block, without the hidden states


class _Stop(Exception):
    """Ends the model's own forward pass once the blocks' calls are recorded."""


def _held(value: Any) -> Iterator[int]:
    """Yield the contents of a container, by identity, to detect blocks that change a container."""
    if isinstance(value, (Mapping, MutableSequence)):  # transformers has mappings that are not dicts
        for part in value.values() if isinstance(value, Mapping) else value:
            yield id(part)
            yield from _held(part)


class Decoder:
    """A causal language model, run block by block. Memory holds one or two blocks, embeddings, norm and head.

    UserError if the model's structure is not supported, or the checkpoint is incomplete.
    """

    def __init__(self, source: Path | Checkpoint, *, dtype: torch.dtype, device: torch.device) -> None:
        self.checkpoint = Checkpoint(source) if isinstance(source, Path) else source
        self.model = build_empty(self.checkpoint.config, self.checkpoint, dtype)
        self.dtype, self.device = dtype, device
        self.weights = BlockLoader(self.model, self.checkpoint, device=device)
        self.linears, self.blocks = self.weights.linears, self.weights.blocks
        self._arguments: dict[
            int | PackedQuestions, tuple[list[Call], int]
        ] = {}  # of all blocks, with their bytes, by row
        self._stock_attention = self.model.config._attn_implementation
        self._ours_for_windows = False
        faster = dtype is torch.float32 and device.type == "cpu" and kernels.install(self.model)
        self._ours_for_windows = (faster or attention.is_faster(dtype, device)) and self._attends_alike()
        accelerator.keep_freed_memory()  # now, so that the trial's does not stay

    @property
    def one_of_each_kind(self) -> list[int]:
        """The first block of each kind, in order: a later block may read outputs of an earlier block.

        Blocks of a kind compute alike: they have one class, parameters of the same names, and one type of mask.
        """
        types = getattr(self.model.config.get_text_config(), "layer_types", None) or ()
        first: dict[Hashable, int] = {}
        for index, block in enumerate(self.blocks):
            names = tuple(name for name, _ in block.named_parameters())
            first.setdefault((type(block), names, tuple(types[index : index + 1])), index)
        return list(first.values())

    @property
    def vocabulary(self) -> int:
        """The number of tokens with a logit."""
        return self.model.get_output_embeddings().weight.shape[0]

    def check_tokens(self, rows: Sequence[TokenSequence]) -> None:
        """Raise UserError where a token has no embedding."""
        embeddings = self.model.get_input_embeddings().weight.shape[0]
        largest = max((int(row.tokens.max()) for row in rows if len(row.tokens)), default=0)
        if largest >= embeddings:
            raise UserError(
                f"{self.checkpoint}: the tokenizer gives the id {largest}, expected at most {embeddings - 1}: "
                f"the model has {embeddings:,} embeddings; use the tokenizer that belongs to it"
            )

    def embed(self, row: TokenSequence) -> States:
        """Return the hidden states before the first block."""
        return self._record(row, until=0)[0][0]

    def block_arguments(self, row: TokenSequence) -> list[Call]:
        """Return the arguments of every block for a row. They depend on its length or layout, not on its tokens."""
        key = row.questions or len(row.tokens)
        if key not in self._arguments:
            # A walk has the same rows in the same order for each block: the first ones stay, with the current row.
            if sum(size for _, size in self._arguments.values()) > ARGUMENTS_BYTES[self.device.type]:
                self._arguments.popitem()
            block_arguments = self._record_arguments(row)
            storages = [
                value.untyped_storage() for value in tree_flatten(block_arguments)[0] if isinstance(value, Tensor)
            ]
            sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}  # shared memory counts once
            self._arguments[key] = block_arguments, sum(sizes.values())
        return self._arguments[key][0]

    def load(self, index: int, then: int, change: WeightChange | None = None) -> None:
        """Load a block, as `Weights.hold`. The first block runs once before any block is loaded."""
        self._extra_outputs  # noqa: B018 - computed here
        self.weights.load(index, then, change)

    def unload(self) -> None:
        """Free the memory of the block that is held, and of the recorded calls."""
        self.weights.unload()
        self._arguments.clear()

    def memory_budget(self) -> int:
        """Return the GPU memory for hidden states in bytes: half of the memory left free by the blocks; 0 on a CPU."""
        if self.device.type != "cuda":
            return 0
        blocks = [sum(x.numel() for x in block.parameters()) * self.dtype.itemsize for block in self.blocks]
        return max(0, accelerator.free_memory(self.device) - 2 * max(blocks)) // 2

    def run(self, index: int, hidden: States, row: TokenSequence) -> States:
        """Run a row through a block, which must be held."""
        args, words = self.block_arguments(row)[index]
        held, version = [*_held([*args, words])], hidden._version
        with self._attending(row):
            out = self.blocks[index](hidden, *args, **words)
        after: Tensor = out[0] if isinstance(out, (tuple, list)) else out
        if [*_held([*args, words])] != held:
            raise unsupported(self.checkpoint, f"block {index} passes more than hidden states on, in a container")
        if hidden._version != version:  # on a CPU it is a view of the file that a second run reads
            raise unsupported(self.checkpoint, f"block {index} changes its input in place")
        if after.dtype is not hidden.dtype:
            found, expected = (str(x.dtype).removeprefix("torch.") for x in (after, hidden))
            raise UserError(
                f"{self.checkpoint}: block {index} returns hidden states in {found}, expected {expected}, the model's; "
                f"set dtype={found}"
            )
        return after

    @torch.no_grad()
    def logits(self, hidden: States, tokens: Int[Tensor, " length"]) -> Iterator[tuple[slice, Logits]]:
        """Yield the logits after the last block, by chunks of positions, through the model's own norm and head."""
        for positions in self._chunks(hidden.shape[1]):
            yield positions, self._logits(hidden[:, positions].to(self.device), tokens[positions])

    def loss_gradient(self, hidden: States, tokens: Int[Tensor, " length"]) -> States:
        """Return the gradient of the loss, summed over all tokens but the first, by the last hidden states."""
        tokens = tokens.to(self.device)
        targets, gradient = tokens[1:], torch.zeros(hidden.shape, device=self.device)
        for positions in self._chunks(len(targets)):
            given = hidden[:, positions].to(self.device).detach().requires_grad_()
            with torch.enable_grad():
                logits = self._logits(given, tokens[positions])
                loss = nn.functional.cross_entropy(logits.float(), targets[positions], reduction="sum")
            gradient[:, positions] = torch.autograd.grad(loss, given)[0].float()
        return gradient

    def _chunks(self, length: int) -> Iterator[slice]:
        chunk = max(1, LOGITS_AT_A_TIME // self.vocabulary)
        return (slice(start, min(start + chunk, length)) for start in range(0, length, chunk))

    def _logits(self, hidden: Float[Tensor, "1 chunk width"], tokens: Int[Tensor, " chunk"]) -> Logits:
        result = hidden if self._extra_outputs is None else (hidden, *self._extra_outputs)
        called = list[int]()

        def pass_on(index: int, *_args: Any, **_words: Any) -> Any:
            called.append(index)
            return result

        with self._instead_of_blocks(pass_on):
            logits = self.model(input_ids=tokens[None].to(self.device), use_cache=False).logits[0]
        if called != [*range(len(self.blocks))]:
            raise unsupported(self.checkpoint, f"it calls {len(called)} blocks and has {len(self.blocks)}")
        return logits

    @cached_property
    def packs_questions(self) -> bool:
        """Whether questions in one row give the same results as one by one; tried with two short questions.

        Results differ if positions are distances from the row's start (ALiBi), if a block mixes neighbours without
        attention, or if the model's attention cannot be replaced.
        """
        if "longrope" in str(getattr(self.model.config.get_text_config(), "rope_parameters", "")):
            return False  # a row's last position chooses the angles of all
        tokens = torch.arange(24) % 7
        layout = PackedQuestions(
            positions=torch.tensor([*range(8), 8, 9, 8, 9, 10, *range(7), 7, 8, 7, 8]),
            question=torch.tensor([0] * 13 + [1] * 11),
            choice=torch.tensor([0] * 8 + [1] * 2 + [2] * 3 + [0] * 7 + [1] * 2 + [2] * 2),
        )
        parts = [[*range(8), 8, 9], [*range(8), 10, 11, 12], [*range(13, 20), 20, 21], [*range(13, 20), 22, 23]]
        found = self._tried(
            [*(TokenSequence(tokens[part]) for part in parts), TokenSequence(tokens, layout)], ours=False, few=4
        )
        if found is None:
            return False
        *locked, together = found
        return self._close(torch.cat(locked), torch.cat([together[part] for part in parts]))

    @contextlib.contextmanager
    def _instead_of_blocks(self, replacement: Callable[..., Any]) -> Iterator[None]:
        """Replace every block's forward by `replacement(index, *args, **kwargs)`; always restore it."""
        try:
            for index, block in enumerate(self.blocks):
                block.forward = partial(replacement, index)
            yield
        finally:
            for block in self.blocks:
                block.__dict__.pop("forward", None)

    @contextlib.contextmanager
    def _attending(self, row: TokenSequence) -> Iterator[None]:
        """Select the attention for the row: the model's own, or ours."""
        ours = row.questions is not None or self._ours_for_windows
        wanted = attention.NAME if ours else self._stock_attention
        if self.model.config._attn_implementation != wanted:
            self.model.set_attn_implementation(wanted)
        with attention.laid_out(row.questions):
            yield

    @torch.no_grad()
    def _record(self, row: TokenSequence, until: int) -> list[tuple[Tensor, Call]]:
        """Return the hidden states and the call of each block up to `until`, with blocks that return their input."""
        recorded: list[tuple[Tensor, Call]] = []
        extra = self._extra_outputs if until > 0 else None  # computed before blocks are replaced

        def record(index: int, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            before = recorded[-1][0] if recorded else hidden_states
            if hidden_states is not before and not torch.equal(hidden_states, before):
                where = f"between block {index - 1} and block {index}"
                raise unsupported(self.checkpoint, f"the model changes hidden states {where}")
            expected = (1, len(row.tokens), self.model.config.get_text_config().hidden_size)
            if hidden_states.shape != expected:
                found = f"gives block {index} hidden states of {[*hidden_states.shape]}, expected {[*expected]}"
                raise unsupported(self.checkpoint, f"the model {found}")
            recorded.append((hidden_states, (args, kwargs)))
            if index == until:
                raise _Stop
            return hidden_states if extra is None else (hidden_states, *extra)

        words: dict[str, Any] = {}
        if row.questions is not None:
            words["position_ids"] = row.questions.positions[None].to(self.device)
            # Ones mask nothing. Without ones, transformers treats a repeated position as the start of a new text.
            words["attention_mask"] = torch.ones_like(row.tokens)[None].to(self.device)
        try:
            with self._attending(row), self._instead_of_blocks(record), contextlib.suppress(_Stop):
                self.model(input_ids=row.tokens[None].to(self.device), use_cache=False, **words)
        except ValueError as error:
            what = "blocks pass on more than hidden states" if "unpack" in str(error) else "forward pass fails"
            raise unsupported(self.checkpoint, f"its {what} ({reason(error)})") from error
        if len(recorded) != until + 1:
            found = f"{len(recorded)} of its {len(self.blocks)} blocks, expected each once and in order"
            raise unsupported(self.checkpoint, f"the model's forward pass called {found}")
        return recorded

    def _record_arguments(self, row: TokenSequence) -> list[Call]:
        """Return all blocks' calls, checked not to depend on tokens; of layouts `holds_layouts` compares results."""

        def record(row: TokenSequence) -> list[Call]:
            return [call for _, call in self._record(row, until=len(self.blocks) - 1)]

        if row.questions is not None:
            return record(row)
        block_arguments, again = (record(TokenSequence(torch.full_like(row.tokens, token))) for token in (0, 1))
        (values, shape), (others, other_shape) = map(tree_flatten, (block_arguments, again))
        equal = (torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(values, others, strict=True))
        if shape != other_shape or list(map(type, values)) != list(map(type, others)) or not all(equal):
            raise unsupported(self.checkpoint, "not only hidden states, but other arguments depend on the tokens")
        return block_arguments

    @cached_property
    def _extra_outputs(self) -> tuple[None, ...] | None:
        """Return the Nones after the hidden states in a block's output; None if the output is hidden states alone.

        UserError if a block's result for a token depends on the token after it.
        """
        hidden, (args, words) = self._record(TokenSequence(torch.zeros(2, dtype=torch.long)), until=0)[0]
        changed = torch.cat([hidden[:, :1], 1 - hidden[:, 1:]], dim=1)
        self.weights.load(0, -1)
        out, other = (self.blocks[0](x, *args, **words) for x in (hidden, changed))
        self.weights.unload()
        first, again = ((x[0] if isinstance(x, (tuple, list)) else x)[0, 0].float() for x in (out, other))
        if torch.dist(first, again) > 0.02 * first.norm():  # far above rounding
            raise unsupported(self.checkpoint, "a token changes what its blocks return for the token before it")
        if not isinstance(out, (tuple, list)):
            return None
        return tuple(itertools.takewhile(lambda other: other is None, out[1:]))

    def _attends_alike(self) -> bool:
        """Whether our attention and the model's own give the same results in each kind of block.

        The row is longer than a tile of our attention, and than the windows of the model's masks.
        """
        length = min(attention.QUERIES_AT_A_TIME * 5 // 4, positions_of(self.model.config) or sys.maxsize)
        row = TokenSequence(torch.arange(length) % 7)
        stock, ours = (self._tried([row], ours=ours, few=length // 3) for ours in (False, True))
        return stock is not None and ours is not None and self._close(stock[0], ours[0])

    @torch.no_grad()
    def _tried(self, rows: list[TokenSequence], *, ours: bool, few: int) -> list[Float[Tensor, "_ width"]] | None:
        """Run some rows through a block of each kind, one after another, in float32; return None if that fails.

        Windows go through our attention, or through the model's own. Masks with a sliding window, or with chunks, show
        `few` tokens at most. Over all blocks of a real model, the rounding of bfloat16 adds up to as much as wrong
        attention changes.
        """
        config, before = self.model.config.get_text_config(), self._ours_for_windows
        found = {name: getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")}
        sizes = {name: size for name, size in found.items() if size is not None}
        self._ours_for_windows = ours
        self._arguments.clear()
        try:
            for name, size in sizes.items():
                setattr(config, name, min(size, few))
            for row in rows:
                self.block_arguments(row)
            hidden = [self.embed(row).float() for row in rows]
            for index in self.one_of_each_kind:
                self.load(index, -1)
                for name, parameter in [*self.blocks[index].named_parameters()]:
                    set_parameter(self.blocks[index], name, parameter.float())
                hidden = [self.run(index, x, row) for x, row in zip(hidden, rows, strict=True)]
            return [x[0] for x in hidden]
        except (TypeError, ValueError, RuntimeError, UserError):  # attention of its own, incompatible with ours
            return None
        finally:
            for name, size in sizes.items():
                setattr(config, name, size)
            self._ours_for_windows = before
            self.unload()

    def _close(self, one: Tensor, other: Tensor) -> bool:
        """Whether two results for hidden states agree up to rounding; both are in float32."""
        norm = torch.linalg.vector_norm
        return bool(norm(other - one) <= 1e-3 * norm(one))
