"""The engine: rows of tokens pushed through a checkpoint, one block at a time.

Only the embeddings, the final norm and the head stay in memory; a block's weights come from the
mapped checkpoint when it is its turn, the next one's while it computes. The hidden states of all
windows wait between blocks in two mapped files, so that neither the model nor the data has to fit
in memory, and a run that is killed goes on from the last finished block.

What a block is called with is recorded from the model's own forward pass; what is in it is `structure`'s to know.
"""

import contextlib
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from wanda_dvc.engine import attention
from wanda_dvc.engine.attention import Layout
from wanda_dvc.engine.checkpoint import Checkpoint, expert_name
from wanda_dvc.engine.memory import empty_weight, keep_freed_memory
from wanda_dvc.engine.recorder import InputRecorder
from wanda_dvc.engine.structure import Linear, Part, empty_model, find_blocks, find_linears, stored_names
from wanda_dvc.errors import UserError

LOGITS_AT_A_TIME = 2**25  # elements; 128 MB in float32


@dataclass(frozen=True, eq=False)
class Row:
    """Tokens that go through the model together: one text, or several questions laid out."""

    tokens: Int[Tensor, " length"]
    layout: Layout | None = None


@dataclass(frozen=True)
class Call:
    """What the model passes to one block beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Stop(Exception):
    """Ends the model's own forward pass once the blocks' calls are recorded."""


class Decoder:
    """A causal language model on disk. UserError where its structure is not understood."""

    def __init__(self, folder: Path, *, dtype: torch.dtype, device: torch.device, resident: bool = False) -> None:
        """With `resident`, a block that was read stays in memory."""
        keep_freed_memory()
        self.checkpoint = Checkpoint(folder)
        self.model = empty_model(folder, dtype)
        self.dtype, self.device = dtype, device
        self._stored = stored_names(self.model, self.checkpoint)
        self.blocks_name, self.blocks = find_blocks(self.model)
        self._empty = [dict(block.named_parameters()) for block in self.blocks]
        self._reader = ThreadPoolExecutor(max_workers=1)
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: tuple[int, Future[dict[str, Tensor]]] | None = None
        self._resident: dict[int, dict[str, Tensor]] | None = {} if resident else None
        self._calls: dict[int | Layout, list[Call]] = {}
        self._stock_attention = self.model.config._attn_implementation
        self._ours_for_windows = False
        self._load_rest()
        self._ours_for_windows = fast_in_half(dtype, device) and self._attends_alike()

    # --- weights ---

    def _read(self, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        """Tensors from the checkpoint for parameters by their full names, in the dtype and on the device to run in.

        A parameter that is stored in parts is put together here: the only weights that are copied on a CPU.
        """
        found = {}
        for name, parameter in parameters.items():
            parts = self._parts(name)
            if parts == [Part(parts[0].name)]:
                tensor = self.checkpoint.read(parts[0].name)
                if tensor.shape != parameter.shape:
                    raise UserError(
                        f"{self.checkpoint.folder}: {parts[0].name} is {list(tensor.shape)}, "
                        f"expected {list(parameter.shape)}"
                    )
                if self.device.type == "cuda":  # only from pinned memory does a copy run beside the computation
                    tensor = tensor.pin_memory()
                if (tensor.device, tensor.dtype) != (self.device, parameter.dtype):
                    tensor = empty_weight(parameter.shape, parameter.dtype, self.device).copy_(
                        tensor, non_blocking=True
                    )
                found[name] = tensor
                continue
            whole = empty_weight(parameter.shape, parameter.dtype, self.device)
            for part in parts:
                part.of(whole).copy_(self.checkpoint.read(part.name))
            found[name] = whole
        return found

    def _parts(self, name: str) -> list[Part]:
        """What the checkpoint stores of a parameter."""
        if name not in self._stored:
            raise UserError(
                f"{self.checkpoint.folder}: no tensor for {name}, which the model's config asks for; the "
                "checkpoint is not whole, or stores it in a form that is not understood"
            )
        return self._stored[name]

    def _load_rest(self) -> None:
        """Everything but the blocks. A tied head is the embeddings' own parameter, and stored once or twice."""
        inside = {id(parameter) for block in self.blocks for parameter in block.parameters()}
        names: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if id(parameter) not in inside:
                names.setdefault(id(parameter), []).append(name)
        for aliases in names.values():
            stored = [name for name in aliases if name in self._stored]
            name = (stored or aliases)[0]
            loaded = self._read({name: self.model.get_parameter(name)})[name]
            for alias in aliases:
                _set(self.model, alias, nn.Parameter(loaded, requires_grad=False))
        for name, buffer in self.model.named_buffers():
            owner, _, leaf = name.rpartition(".")
            if name in self._stored:  # few: the bias by which some routers balance their experts
                buffer = self.checkpoint.read(self._stored[name][0].name).to(buffer.dtype)
            self.model.get_submodule(owner)._buffers[leaf] = buffer.to(self.device)

    def _read_block(self, index: int) -> dict[str, Tensor]:
        """On a GPU through a stream of its own: the copy and the block at work don't wait for each other."""
        prefix = f"{self.blocks_name}.{index}."
        with torch.cuda.stream(self._copies):  # of None: nothing
            tensors = self._read({prefix + name: parameter for name, parameter in self._empty[index].items()})
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}

    def _weights(self, index: int) -> dict[str, Tensor]:
        """A block's tensors, and the next one's on their way."""
        if self._resident is not None and index in self._resident:
            return self._resident[index]
        if self._ahead is not None and self._ahead[0] == index:
            tensors, self._ahead = self._ahead[1].result(), None
        else:
            tensors = self._read_block(index)
        if self._copies is not None:
            computing = torch.cuda.current_stream(self.device)
            computing.wait_stream(self._copies)
            for tensor in tensors.values():
                tensor.record_stream(computing)  # its memory is not given away while it is computed with
        if self._resident is not None:
            self._resident[index] = tensors
        if index + 1 < len(self.blocks) and (self._ahead is None or self._ahead[0] != index + 1):
            self._ahead = index + 1, self._reader.submit(self._read_block, index + 1)
        return tensors

    @contextlib.contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """One block with its weights; empty again afterwards."""
        tensors = self._weights(index)
        for name, tensor in tensors.items():
            _set(self.blocks[index], name, nn.Parameter(tensor, requires_grad=False))
        del tensors
        try:
            yield self.blocks[index]
        finally:
            for name, parameter in self._empty[index].items():
                _set(self.blocks[index], name, parameter)

    def linears(self, index: int) -> dict[str, Linear]:
        """The prunable weights of a block, named as the checkpoint stores them; each expert has its own."""
        block, prefix = self.blocks[index], f"{self.blocks_name}.{index}."
        weights = find_linears(block)
        linears: dict[str, Linear] = {}
        for name, module in weights.items():
            leaf = name.rpartition(".")[2]
            parts = self._parts(prefix + name)
            shape = module.get_parameter(leaf).shape
            if len(shape) == 3 and parts[0].expert is None:  # all experts in one tensor
                stored = parts[0].name.removesuffix(".weight")
                linears |= {
                    expert_name(stored, expert): Linear(module, leaf, Part(parts[0].name, expert=expert))
                    for expert in range(shape[0])
                }
            else:
                linears |= {part.name.removesuffix(".weight"): Linear(module, leaf, part) for part in parts}
        largest = max((linear.weight.numel() for linear in linears.values()), default=0)
        others = {name: p.numel() for name, p in block.named_parameters() if name not in weights and p.dim() > 1}
        for name, size in others.items():
            if size > largest:
                raise UserError(
                    f"{self.checkpoint.folder}: {prefix}{name} belongs to no linear, and is larger than any; "
                    "such a structure is not understood"
                )
        if not linears:
            raise UserError(
                f"{self.checkpoint.folder}: {prefix[:-1]} has no linear; such a structure is not understood"
            )
        return linears

    def inputs(self) -> dict[str, int]:
        """The number of input features of every linear."""
        return {
            name: linear.features for index in range(len(self.blocks)) for name, linear in self.linears(index).items()
        }

    # --- the model's own forward pass, with the blocks taken out ---

    @contextlib.contextmanager
    def _instead_of_blocks(self, replacement: Callable[..., Any]) -> Iterator[None]:
        """Every block's forward is `replacement(index, *args, **kwargs)`, whatever happens restored."""
        try:
            for index, block in enumerate(self.blocks):
                block.forward = partial(replacement, index)
            yield
        finally:
            for block in self.blocks:
                block.__dict__.pop("forward", None)

    @contextlib.contextmanager
    def _attending(self, row: Row) -> Iterator[None]:
        """The model attends as the row needs it: through the stock attention, or through ours."""
        ours = row.layout is not None or self._ours_for_windows
        wanted = attention.NAME if ours else self._stock_attention
        if self.model.config._attn_implementation != wanted:
            self.model.set_attn_implementation(wanted)
        with attention.laid_out(row.layout):
            yield

    def embed(self, row: Row) -> Float[Tensor, "1 length width"]:
        """What the first block is given."""
        return self._record(row, until=0)[0][0]

    @torch.no_grad()
    def _record(self, row: Row, until: int) -> list[tuple[Tensor, Call]]:
        """The hidden states and the call that each block gets, up to block `until`, if all change nothing."""
        recorded: list[tuple[Tensor, Call]] = []
        wrap = until > 0 and self._returns_tuple

        def record(index: int, *args: Any, **kwargs: Any) -> Any:
            if args:
                hidden, args = args[0], args[1:]
            else:
                hidden = kwargs.pop("hidden_states")
            recorded.append((hidden, Call(args, kwargs)))
            if index == until:
                raise _Stop
            return (hidden,) if wrap else hidden

        words: dict[str, Any] = {}
        if row.layout is not None:
            words["position_ids"] = row.layout.positions[None].to(self.device)
            # Of ones, it changes nothing but keeps transformers from taking a position that repeats for a new text.
            words["attention_mask"] = torch.ones_like(row.tokens)[None].to(self.device)
        with self._attending(row), self._instead_of_blocks(record), contextlib.suppress(_Stop):
            self.model(input_ids=row.tokens[None].to(self.device), use_cache=False, **words)
        if len(recorded) != until + 1:
            raise UserError(
                f"{self.checkpoint.folder}: the model's forward pass called {len(recorded)} of its "
                f"{len(self.blocks)} blocks once each, in order; such a structure is not understood"
            )
        return recorded

    @cached_property
    def _returns_tuple(self) -> bool:
        """Whether a block returns its hidden states alone or as the first of a tuple: asked of a real one, once."""
        hidden, call = self._record(Row(torch.zeros(2, dtype=torch.long)), until=0)[0]
        with self.block(0) as block:
            return isinstance(block(hidden, *call.args, **call.kwargs), tuple)

    def calls(self, row: Row) -> list[Call]:
        """What each block is called with for a row, recorded once for each length or layout."""
        key = row.layout or len(row.tokens)
        if key not in self._calls:
            self._calls[key] = self._record_calls(row)
        return self._calls[key]

    def _record_calls(self, row: Row) -> list[Call]:
        if row.layout is not None:  # `holds_layouts` has found that it makes no difference what the tokens are
            return [call for _, call in self._record(row, until=len(self.blocks) - 1)]
        once, again = (
            [call for _, call in self._record(Row(torch.full_like(row.tokens, token)), until=len(self.blocks) - 1)]
            for token in (0, 1)
        )
        if not _equal([(c.args, c.kwargs) for c in once], [(c.args, c.kwargs) for c in again]):
            raise UserError(
                f"{self.checkpoint.folder}: its blocks are given more than the hidden states that depends on the "
                "tokens; such a structure is not understood"
            )
        return once

    def run(self, index: int, hidden: Float[Tensor, "1 length width"], row: Row) -> Float[Tensor, "1 length width"]:
        """One row through one block (which `block` holds ready)."""
        call = self.calls(row)[index]
        with self._attending(row):
            out = self.blocks[index](hidden, *call.args, **call.kwargs)
        return out[0] if isinstance(out, tuple) else out

    @torch.no_grad()
    def logits(
        self, hidden: Float[Tensor, "1 length width"], tokens: Int[Tensor, " length"]
    ) -> Iterator[tuple[slice, Float[Tensor, "chunk vocabulary"]]]:
        """The logits after the last block, a chunk of positions at a time, through the model's own norm and head."""
        vocabulary = self.model.get_output_embeddings().weight.shape[0]
        chunk = max(1, LOGITS_AT_A_TIME // vocabulary)
        for start in range(0, hidden.shape[1], chunk):
            positions = slice(start, min(start + chunk, hidden.shape[1]))
            given = hidden[:, positions].to(self.device)

            result = (given,) if self._returns_tuple else given

            with self._instead_of_blocks(lambda *args, result=result, **kwargs: result):
                yield (
                    positions,
                    self.model(input_ids=tokens[None, positions].to(self.device), use_cache=False).logits[0],
                )

    # --- many rows ---

    @torch.no_grad()
    def walk(self, rows: Sequence[Row] | Int[Tensor, "samples length"], work: Path) -> Iterator["Step"]:
        """All rows through all blocks: for each block a `Step`, whose `advance` runs them.

        Goes on from the block after the last that was finished in `work` with these rows.
        """
        rows = as_rows(rows)
        states = self._states(rows, work)
        for row in rows:
            self.calls(row)
        if states.finished < 0:
            states.write(self.embed(row)[0] for row in rows)
            states.turn()
        for index in range(states.finished, len(self.blocks)):
            with self.block(index):
                yield Step(self, index, rows, states)
            states.turn()

    def outputs(
        self, rows: Sequence[Row] | Int[Tensor, "samples length"], work: Path
    ) -> list[Float[Tensor, "length width"]]:
        """Where `walk` left the hidden states after the last block: views of a file in `work`."""
        return self._states(as_rows(rows), work).before

    def _states(self, rows: list[Row], work: Path) -> "HiddenStates":
        width = self.model.config.get_text_config().hidden_size
        return HiddenStates.open(work, [len(row.tokens) for row in rows], width, self.dtype)

    @cached_property
    def holds_layouts(self) -> bool:
        """Whether questions come out of a row as they do one by one; tried with two short ones.

        They don't where positions are learned by distance from the row's start (ALiBi), where a block mixes neighbours
        without attention, or where the model's attention can't be replaced.
        """
        if "position_ids" not in inspect.signature(self.model.forward).parameters:
            return False
        tokens = torch.arange(24) % 7
        layout = Layout(
            positions=torch.tensor([*range(8), 8, 9, 8, 9, 10, *range(7), 7, 8, 7, 8]),
            question=torch.tensor([0] * 13 + [1] * 11),
            choice=torch.tensor([0] * 8 + [1] * 2 + [2] * 3 + [0] * 7 + [1] * 2 + [2] * 2),
        )
        parts = [[*range(8), 8, 9], [*range(8), 10, 11, 12], [*range(13, 20), 20, 21], [*range(13, 20), 22, 23]]
        alone = [self._through(Row(tokens[part])) for part in parts]
        try:
            together = self._through(Row(tokens, layout))
        except (TypeError, ValueError, RuntimeError):  # attention of its own, that can't do with ours
            return False
        tolerance = 1e-3 if self.dtype is torch.float32 else 5e-2
        packed = torch.cat([together[part] for part in parts])
        return bool((packed - torch.cat(alone)).norm() <= tolerance * torch.cat(alone).norm())

    @torch.no_grad()
    def _attends_alike(self) -> bool:
        """Whether a block computes the same with our attention as with the stock one."""
        row = Row(torch.arange(24) % 7)
        outs = []
        for ours in (False, True):
            self._ours_for_windows = ours
            self._calls.clear()
            hidden = self.embed(row)
            self.calls(row)
            with self.block(0), contextlib.suppress(TypeError, ValueError, RuntimeError):
                outs.append(self.run(0, hidden, row).float())
        self._calls.clear()
        return len(outs) == 2 and bool((outs[1] - outs[0]).norm() <= 5e-2 * outs[0].norm())

    @torch.no_grad()
    def _through(self, row: Row) -> Float[Tensor, "length width"]:
        """One row through all blocks."""
        self.calls(row)
        hidden = self.embed(row)
        for index in range(len(self.blocks)):
            with self.block(index):
                hidden = self.run(index, hidden, row)
        return hidden[0].float()


def has_units(dtype: torch.dtype) -> bool:
    """Whether this CPU has units that multiply matrices of the dtype; without, it is many times slower."""
    asked = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    return dtype not in asked or bool(getattr(torch.ops.mkldnn, asked[dtype])())


def fast_in_half(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether our attention is faster than the stock one, which in bfloat16 on a CPU is no faster than in float32."""
    return device.type == "cpu" and dtype is torch.bfloat16 and has_units(dtype)


def as_rows(rows: Sequence[Row] | Int[Tensor, "samples length"]) -> list[Row]:
    """Windows as rows."""
    return [Row(tokens) for tokens in rows] if isinstance(rows, Tensor) else list(rows)


@dataclass
class Step:
    """One block's turn in a walk."""

    decoder: Decoder
    index: int
    rows: list[Row]
    states: "HiddenStates"

    @property
    def linears(self) -> dict[str, Linear]:
        return self.decoder.linears(self.index)

    @torch.no_grad()
    def prune(self, keeps: dict[str, Tensor]) -> None:
        """Zero the weights of this block that don't stay, until its turn is over; the checkpoint is not touched."""
        copied = set()
        for name, linear in self.linears.items():
            if (linear.module, linear.leaf) not in copied:
                copied.add((linear.module, linear.leaf))
                whole = linear.module.get_parameter(linear.leaf).clone()
                _set(linear.module, linear.leaf, nn.Parameter(whole, requires_grad=False))
            linear.weight.mul_(keeps[name].to(self.decoder.device))

    def _outputs(self, recorder: InputRecorder | None) -> Iterator[Float[Tensor, "length width"]]:
        for row, before in zip(self.rows, self.states.before, strict=True):
            yield self.decoder.run(self.index, before[None].to(self.decoder.device), row)[0]
            if recorder:
                recorder.end_window()

    @torch.no_grad()
    def advance(self, recorder: InputRecorder | None = None) -> None:
        """Every row through this block; a recorder sees what the block's linears read."""
        with recorder.recording(self.linears) if recorder else contextlib.nullcontext():
            self.states.write(self._outputs(recorder))


@dataclass
class HiddenStates:
    """The hidden states of all rows before and after the block at work, in two files that take turns.

    They are read as mapped, so they cost page cache and not memory, and outlive a killed process. They are written as
    files are: a full disk is an error then, and pages need not be claimed one by one. What a machine that goes down
    leaves of them can't be trusted: they are used again only on the same boot.
    """

    folder: Path
    lengths: list[int]  # of the rows
    width: int
    dtype: torch.dtype
    finished: int  # blocks done; −1: not even the embeddings

    @classmethod
    def open(cls, folder: Path, lengths: list[int], width: int, dtype: torch.dtype) -> "HiddenStates":
        folder.mkdir(parents=True, exist_ok=True)
        finished = -1
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            progress = json.loads((folder / "progress.json").read_text())
            if progress["boot"] == _boot():
                finished = progress["finished"]
        return cls(folder, lengths, width, dtype, finished)

    def _path(self, turn: int) -> Path:
        return self.folder / f"hidden_{turn % 2}.bin"

    def _map(self, turn: int) -> list[Float[Tensor, "length width"]]:
        tokens = sum(self.lengths)
        states = torch.from_file(str(self._path(turn)), shared=True, size=tokens * self.width, dtype=self.dtype)
        return list(states.view(tokens, self.width).split(self.lengths))

    @property
    def before(self) -> list[Float[Tensor, "length width"]]:
        return self._map(self.finished)

    def write(self, rows: Iterable[Float[Tensor, "length width"]]) -> None:
        """What comes after the block at work, row by row. OSError where the disk is full."""
        path = self._path(self.finished + 1)
        path.touch()
        with path.open("r+b") as file:  # over what is there: its place on the disk stays
            for row in rows:
                file.write(row.to("cpu", self.dtype).contiguous().view(torch.uint8).numpy().data)

    def turn(self) -> None:
        """The block at work is finished: what came after it comes before the next."""
        self.finished += 1
        beside = self.folder / "progress.part"
        beside.write_text(json.dumps({"finished": self.finished, "boot": _boot()}))
        beside.replace(self.folder / "progress.json")


def _set(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    module.get_submodule(owner)._parameters[leaf] = parameter


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    return bool(one == other)


def _boot() -> str | None:
    """This boot of this machine, where the system tells."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
