"""Runs a model of any family block by block, with the arguments that its own forward pass gives each block."""

import contextlib
import itertools
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
from wanda_dvc.engine.checkpoint import Checkpoint, max_positions
from wanda_dvc.engine.load import BlockLoader, set_parameter
from wanda_dvc.engine.memory import ARGUMENTS_BYTES, LOGITS_AT_A_TIME, ForwardMemory, ModelSizes
from wanda_dvc.engine.sequences import LARGEST_CHUNK, Batch, PackedQuestions, States, TokenSequence
from wanda_dvc.engine.structure import build_empty, unsupported
from wanda_dvc.errors import UserError, is_out_of_memory, reason

# Of a batch whose activations do not stay on the GPU, so that copies and computation overlap within a chunk.
STREAMED_TOKENS = 4096
TRIAL_WINDOW = 4  # tokens of sliding windows, at most, in the trial of packed questions
Logits = Float[Tensor, "positions vocabulary"]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # of one block, without the hidden states


class _Stop(Exception):
    """Ends the model's own forward pass once the blocks' arguments are recorded."""


class Decoder:
    """A causal language model, run block by block. Memory holds one or two blocks, embeddings, norm and head.

    UserError if the model's structure is not supported, or the checkpoint is incomplete.
    """

    def __init__(self, source: Path | Checkpoint, *, dtype: torch.dtype, device: torch.device) -> None:
        self.checkpoint = Checkpoint(source) if isinstance(source, Path) else source
        self.model = build_empty(self.checkpoint.config, self.checkpoint, dtype)
        self.dtype, self.device = dtype, device
        self.loader = BlockLoader(self.model, self.checkpoint, device=device)
        self.blocks = self.loader.blocks
        self.linears, self.load = self.loader.linears, self.loader.load  # the loader's methods
        self.copies = accelerator.Copies(device)  # copies activations
        self.largest_batch = 1  # sequences of the largest batch of the last chunk
        self.batch_limit = LARGEST_CHUNK  # sequences of a batch, at most
        # The arguments of all blocks, and their bytes, by the shape of a batch, or the content of its packed questions.
        self._arguments: dict[tuple[int, int] | bytes, tuple[list[Arguments], int]] = {}
        self._batch_memory = self.memory_budget()
        # Windows of one length share an entry, which is small, so their batch may fill the memory. Packed questions
        # have an entry for each sequence, and run one sequence at a time.
        self._arguments_memory = max(ARGUMENTS_BYTES, self._batch_memory // 5)
        self._stock_attention = self.model.config._attn_implementation
        if dtype is torch.float32 and device.type == "cpu":
            kernels.install(self.model)
        accelerator.keep_freed_memory()
        self._extra_outputs = self._try_first_block()

    # --- what the model is ---

    @property
    def one_of_each_kind(self) -> list[int]:
        """The first block of each kind: of one class, with parameters of the same names, and one type of mask."""
        types = getattr(self.model.config.get_text_config(), "layer_types", None) or ()
        first: dict[Hashable, int] = {}
        for index, block in enumerate(self.blocks):
            names = tuple(name for name, _ in block.named_parameters())
            first.setdefault((type(block), names, tuple(types[index : index + 1])), index)
        return list(first.values())

    @cached_property
    def sizes(self) -> ModelSizes:
        """Counts of its weights and features."""
        return ModelSizes(self.model, self.checkpoint.folder)

    def check_tokens(self, sequences: Sequence[TokenSequence]) -> None:
        """Raise UserError where a token has no embedding."""
        embeddings = self.model.get_input_embeddings().weight.shape[0]
        largest = max((int(x.tokens.max()) for x in sequences if len(x.tokens)), default=0)
        if largest >= embeddings:
            what = f"the tokenizer gives the id {largest}, expected at most {embeddings - 1}, the last embedding"
            raise UserError(f"{self.checkpoint}: {what}; use the tokenizer that belongs to it")

    def memory_budget(self) -> int:
        """Return half of the GPU memory that blocks and sums leave, in bytes; 0 on a CPU.

        One half is for activations that stay, in one store or two, with a half of it each; the other is for a batch.
        """
        if self.device.type != "cuda":
            return 0
        # A length of 0: the sums are of matrices alone.
        need = 2 * self.sizes.block_parameters * self.dtype.itemsize + self._memory(0).sums
        return max(0, accelerator.free_device_memory(self.device) - need) // 2

    def batches(self, sequences: Sequence[TokenSequence], *, streamed: bool, copies: int = 1) -> list[Batch]:
        """Return a chunk's sequences in batches, for a run that keeps `copies` of what its linears read and write.

        Packed questions run alone. `streamed`: activations before and after the block do not stay on the GPU.
        """
        batches: list[Batch] = []
        for (length, _), group in itertools.groupby(sequences, lambda x: (len(x.tokens), x.questions and id(x))):
            alike, size = list(group), self.batch_size(length, streamed=streamed, copies=copies)
            batches += [alike[start : start + size] for start in range(0, len(alike), size)]
        self.largest_batch = max(map(len, batches))
        return batches

    def batch_size(self, length: int, *, streamed: bool, copies: int) -> int:
        """Return how many texts run together: on a GPU as many as fit, else one, so that a CPU's bits do not vary."""
        if self.device.type != "cuda":
            return 1
        memory = self._memory(length)
        size = self._batch_memory // (copies * memory.window + memory.norms)
        return max(1, min(size, self.batch_limit, STREAMED_TOKENS // length if streamed else size))

    def _memory(self, length: int) -> ForwardMemory:
        return ForwardMemory(self.sizes, dtype=str(self.dtype).removeprefix("torch."), length=length, device="cuda")

    # --- one block ---

    def unload(self) -> None:
        """Free the memory of the loaded block, and of the recorded arguments."""
        self.loader.unload()
        self._arguments.clear()

    def embed(self, *batch: TokenSequence) -> States:
        """Return a batch's hidden states before the first block."""
        return self._record(torch.stack([x.tokens for x in batch]), batch[0].questions, until=0)[0]

    def run(self, index: int, hidden: States, sequence: TokenSequence) -> States:
        """Run a sequence, or a batch of texts of its length, through a block, which must be loaded."""
        args, kwargs = self.block_arguments(sequence, len(hidden))[index]
        contents, version = list(contents_of([*args, kwargs])), hidden._version
        self._set_attention(sequence.questions)
        output = self.blocks[index](hidden, *args, **kwargs)
        after = hidden_states_of(output)
        if hidden._version != version or list(contents_of([*args, kwargs])) != contents:  # a second run reads them too
            what = "changes its input in place, or passes on more than hidden states"
            raise unsupported(self.checkpoint, f"block {index} {what}")
        if after.dtype is not hidden.dtype:
            dtype = str(after.dtype).removeprefix("torch.")
            what = f"block {index} returns hidden states in {dtype}, expected the model's dtype"
            raise UserError(f"{self.checkpoint}: {what}; set dtype={dtype}")
        return after

    def block_arguments(self, sequence: TokenSequence, batch: int = 1) -> list[Arguments]:
        """Return the arguments of every block, for a batch of texts like this one, or for packed questions.

        They depend on the number and length of the texts, or on the questions. UserError if they depend on tokens.
        """
        key = (batch, len(sequence.tokens)) if sequence.questions is None else sequence.questions.key
        if key not in self._arguments:
            # Beyond the limit, the newest entry is replaced. The first ones stay, and the next block finds them again,
            # because each block runs the sequences in one order.
            if sum(size for _, size in self._arguments.values()) > self._arguments_memory:
                self._arguments.popitem()
            arguments = self._record_arguments(sequence, batch)
            storages = [x.untyped_storage() for x in tree_flatten(arguments)[0] if isinstance(x, Tensor)]
            sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}  # shared memory counts once
            self._arguments[key] = arguments, sum(sizes.values())
        return self._arguments[key][0]

    def _record_arguments(self, sequence: TokenSequence, batch: int) -> list[Arguments]:
        """Return the arguments of all blocks. UserError if those of a text depend on its tokens."""
        last, tokens = len(self.blocks) - 1, sequence.tokens.expand(batch, -1)
        if sequence.questions is not None:  # the trial of packed questions compares results instead
            return self._record(tokens, sequence.questions, until=last)[1]
        _, arguments = self._record(torch.zeros_like(tokens), until=last)
        _, arguments_of_ones = self._record(torch.ones_like(tokens), until=last)
        if not are_equal(arguments, arguments_of_ones):
            raise unsupported(self.checkpoint, "not only hidden states, but other arguments depend on the tokens")
        return arguments

    @torch.no_grad()
    def _record(
        self, tokens: Int[Tensor, "batch length"], questions: PackedQuestions | None = None, *, until: int
    ) -> tuple[States, list[Arguments]]:
        """Return the hidden states before the first block, and the arguments of the blocks up to `until`."""
        hidden: list[States] = []
        called: list[int] = []
        arguments: list[Arguments] = []

        def record(index: int, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if hidden and hidden_states is not hidden[-1] and not torch.equal(hidden_states, hidden[-1]):
                what = f"the model changes hidden states between block {index - 1} and block {index}"
                raise unsupported(self.checkpoint, what)
            expected = (*tokens.shape, self.model.config.get_text_config().hidden_size)
            if hidden_states.shape != expected:
                what = f"gives block {index} hidden states of {[*hidden_states.shape]}, expected {[*expected]}"
                raise unsupported(self.checkpoint, f"the model {what}")
            hidden.append(hidden_states)
            called.append(index)
            arguments.append((args, kwargs))
            if index == until or index != len(called) - 1:  # of a pass in another order
                raise _Stop
            return self._as_output(hidden_states)

        inputs: dict[str, Any] = {}
        if questions is not None:
            inputs["position_ids"] = questions.positions[None].to(self.device)
            # Ones mask nothing. Without ones, transformers treats a repeated position as the start of a new text.
            inputs["attention_mask"] = torch.ones_like(tokens).to(self.device)
        self._set_attention(questions)
        try:
            with self._instead_of_blocks(record), contextlib.suppress(_Stop):
                self.model(input_ids=tokens.to(self.device), use_cache=False, **inputs)
        except (LookupError, TypeError, ValueError) as error:
            what = f"its forward pass fails ({reason(error)}), or blocks pass on more than hidden states"
            raise unsupported(self.checkpoint, what) from error
        if called != [*range(until + 1)]:
            what = f"calls blocks {called} of its {len(self.blocks)} first, expected each once and in order"
            raise unsupported(self.checkpoint, f"the model's forward pass {what}")
        return hidden[0], arguments

    @torch.no_grad()
    def _try_first_block(self) -> tuple[None, ...] | None:
        """Return the Nones that follow the hidden states in a block's output; None if it is no tuple.

        UserError if a block's result for a token depends on the token after it.
        """
        hidden, [(args, kwargs)] = self._record(torch.zeros(1, 2, dtype=torch.long), until=0)
        with_another_end = torch.cat([hidden[:, :1], 1 - hidden[:, 1:]], dim=1)
        self.load(0, -1)
        output = self.blocks[0](hidden, *args, **kwargs)
        first = hidden_states_of(output)[0, 0].float()
        first_again = hidden_states_of(self.blocks[0](with_another_end, *args, **kwargs))[0, 0].float()
        self.loader.unload()
        if torch.dist(first, first_again) > 0.02 * first.norm():  # far above rounding
            raise unsupported(self.checkpoint, "a token changes what its blocks return for the token before it")
        if not isinstance(output, (tuple, list)):
            return None
        return tuple(itertools.takewhile(lambda value: value is None, output[1:]))

    def _as_output(self, hidden: Tensor) -> Any:
        return hidden if self._extra_outputs is None else (hidden, *self._extra_outputs)

    @contextlib.contextmanager
    def _instead_of_blocks(self, replacement: Callable[..., Any]) -> Iterator[None]:
        try:
            for index, block in enumerate(self.blocks):
                block.forward = partial(replacement, index)
            yield
        finally:
            for block in self.blocks:
                block.__dict__.pop("forward", None)

    def _set_attention(self, questions: PackedQuestions | None) -> None:
        name = self._stock_attention if questions is None else attention.NAME
        if self.model.config._attn_implementation != name:
            self.model.set_attn_implementation(name)
        if questions is not None:
            attention.running_questions.set(questions)

    # --- after the last block ---

    @torch.no_grad()
    def logits(self, hidden: States, tokens: Int[Tensor, " length"]) -> Iterator[tuple[slice, Logits]]:
        """Yield the logits after the last block, some positions at a time, through the model's own norm and head.

        The model's forward pass needs `tokens` of that length; the logits do not depend on them.
        """
        for positions in self._positions_at_a_time(hidden.shape[1]):
            yield positions, self._logits(hidden[:, positions].to(self.device), tokens[positions])

    def loss_gradient(self, hidden: States, tokens: Int[Tensor, "batch length"]) -> States:
        """Return the gradient of the loss, summed over all tokens but each text's first, with respect to `hidden`."""
        ignored = -100  # cross_entropy's target of no token, after each text's last one
        targets = nn.functional.pad(tokens[:, 1:], (0, 1), value=ignored).flatten().to(self.device)
        targets = targets[:-1]  # the last text's end needs no logits
        joined, tokens = hidden.flatten(0, 1)[None], tokens.flatten().to(self.device)
        gradient = torch.zeros(joined.shape, device=self.device)
        for positions in self._positions_at_a_time(len(targets)):
            states = joined[:, positions].to(self.device).detach().requires_grad_()
            with torch.enable_grad():
                logits = self._logits(states, tokens[positions])
                loss = nn.functional.cross_entropy(logits.float(), targets[positions], reduction="sum")
            gradient[:, positions] = torch.autograd.grad(loss, states)[0].float()
        return gradient.view(hidden.shape)

    def _positions_at_a_time(self, length: int) -> Iterator[slice]:
        size = max(1, LOGITS_AT_A_TIME // self.sizes.vocabulary)
        size = min(size, max_positions(self.model.config) or size)  # some models look positions up in the head too
        for start in range(0, length, size):
            yield slice(start, min(start + size, length))

    def _logits(self, hidden: Float[Tensor, "1 positions width"], tokens: Int[Tensor, " positions"]) -> Logits:
        called = list[int]()

        def return_hidden(index: int, *_args: Any, **_kwargs: Any) -> Any:
            called.append(index)
            return self._as_output(hidden)

        self._set_attention(None)
        with self._instead_of_blocks(return_hidden):
            logits = self.model(input_ids=tokens[None].to(self.device), use_cache=False).logits[0]
        if called != list(range(len(self.blocks))):
            raise unsupported(self.checkpoint, f"it calls {len(called)} blocks and has {len(self.blocks)}")
        return logits

    # --- the trial of packed questions ---

    @cached_property
    def packs_questions(self) -> bool:
        """Whether packed questions give the same results as one by one; tried with two short questions.

        Results differ if positions are distances from the sequence's start (ALiBi), if a block mixes neighbours without
        attention, or if the model's attention cannot be replaced.
        """
        if "longrope" in str(getattr(self.model.config.get_text_config(), "rope_parameters", "")):
            return False  # a sequence's last position chooses the angles of all
        tokens = torch.arange(24) % 7
        # A context of 8 tokens with choices of 2 and 3, and a context of 7 with two choices of 2.
        questions = PackedQuestions(
            positions=torch.tensor([*range(8), 8, 9, 8, 9, 10, *range(7), 7, 8, 7, 8]),
            question=torch.tensor([0] * 13 + [1] * 11),
            choice=torch.tensor([0] * 8 + [1] * 2 + [2] * 3 + [0] * 7 + [1] * 2 + [2] * 2),
        )
        # The places of each context with one of its choices.
        texts = [[*range(8), 8, 9], [*range(8), 10, 11, 12], [*range(13, 20), 20, 21], [*range(13, 20), 22, 23]]
        sequences = [*(TokenSequence(tokens[places]) for places in texts), TokenSequence(tokens, questions)]
        self._arguments.clear()
        try:
            with contextlib.ExitStack() as restored:
                config = self.model.config.get_text_config()
                for name in ("sliding_window", "attention_chunk_size"):
                    if size := getattr(config, name, None):
                        restored.callback(setattr, config, name, size)
                        setattr(config, name, min(size, TRIAL_WINDOW))  # shorter than the texts
                *results, packed = self._run_one_of_each_kind(sequences)
        except (TypeError, ValueError, RuntimeError, UserError) as error:
            if is_out_of_memory(error):
                raise
            return False  # the model's attention differs from ours
        finally:
            self.unload()
        alone = torch.cat(results)
        difference = torch.cat([packed[places] for places in texts]) - alone
        return bool(difference.norm() <= 1e-3 * alone.norm())  # up to the rounding of float32

    @torch.no_grad()
    def _run_one_of_each_kind(self, sequences: list[TokenSequence]) -> list[Float[Tensor, "_ width"]]:
        """Run sequences through a block of each kind, one after another, in float32.

        Over all blocks of a real model, the rounding of bfloat16 adds up to as much as wrong attention changes.
        """
        hidden = [self.embed(sequence).float() for sequence in sequences]
        for index in self.one_of_each_kind:
            self.load(index, -1)
            for name, parameter in list(self.blocks[index].named_parameters()):
                set_parameter(self.blocks[index], name, parameter.float())
            hidden = [self.run(index, x, sequence) for x, sequence in zip(hidden, sequences, strict=True)]
        return [x[0] for x in hidden]


def contents_of(value: Any) -> Iterator[int]:
    """Yield the contents of a container, by identity, to detect blocks that change a container."""
    if isinstance(value, Mapping):  # transformers has mappings that are not dicts
        value = list(value.values())
    if isinstance(value, MutableSequence):
        for content in value:
            yield id(content)
            yield from contents_of(content)


def hidden_states_of(output: Any) -> Tensor:
    """Return the hidden states of a block's output."""
    return output[0] if isinstance(output, (tuple, list)) else output


def are_equal(first: list[Arguments], second: list[Arguments]) -> bool:
    """Whether two lists of arguments have the same structure and values."""
    (values, structure), (other_values, other_structure) = tree_flatten(first), tree_flatten(second)
    if structure != other_structure:
        return False
    pairs = zip(values, other_values, strict=True)
    return all(torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x == y for x, y in pairs)
