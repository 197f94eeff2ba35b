"""Many rows through all blocks, one block at a time.

Between two blocks the hidden states of all rows wait in files. So neither the model nor the data has to fit in memory,
and a killed run continues from the last finished block.
"""

import contextlib
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from wanda_dvc.engine.decoder import Decoder
from wanda_dvc.engine.recorder import InputRecorder
from wanda_dvc.engine.rows import Row, as_rows
from wanda_dvc.engine.structure import Linear
from wanda_dvc.engine.weights import set_parameter
from wanda_dvc.errors import UserError, notice


@torch.no_grad()
def walk(
    decoder: Decoder, rows: Sequence[Row] | Int[Tensor, "samples length"], work: Path, *, kept: int | None = None
) -> Iterator["Step"]:
    """All rows through all blocks: for each block a `Step`, whose `advance` runs the rows.

    Continues after the last block that was finished in `work` with these rows. `kept` is the number of blocks whose
    results the caller has from a killed run; with fewer than are finished, it starts anew.
    """
    rows = as_rows(rows)
    states = _states(decoder, rows, work)
    if kept is not None and states.finished > kept:
        states.finished = -1
    if states.finished > 0:
        notice(f"going on after {states.finished} of {len(decoder.blocks)} blocks, which an earlier run has finished")
    try:
        for row in rows:
            decoder.calls(row)
        if states.finished < 0:
            states.write(decoder.embed(row)[0] for row in rows)
            states.turn()
        for index in range(states.finished, len(decoder.blocks)):
            with decoder.block(index):
                yield Step(decoder, index, rows, states)
            states.turn()
    finally:
        decoder.forget_calls()


def outputs(
    decoder: Decoder, rows: Sequence[Row] | Int[Tensor, "samples length"], work: Path
) -> list[Float[Tensor, "length width"]]:
    """The hidden states after the last block, as `walk` left them: views of a file in `work`."""
    states = _states(decoder, as_rows(rows), work)
    if states.finished != len(decoder.blocks):
        raise UserError(f"{work}: hidden states are not whole, expected those after all blocks; run the stage again")
    return states.before


def _states(decoder: Decoder, rows: list[Row], work: Path) -> "HiddenStates":
    width = decoder.model.config.get_text_config().hidden_size
    return HiddenStates.open(work, [len(row.tokens) for row in rows], width, decoder.dtype, len(decoder.blocks))


@dataclass
class Step:
    """One block's turn in a walk. Its weights may be changed until the turn is over; the checkpoint stays as it is."""

    decoder: Decoder
    index: int
    rows: list[Row]
    states: "HiddenStates"
    _own: set[tuple[nn.Module, str]] = field(default_factory=set, init=False, repr=False)

    @property
    def linears(self) -> dict[str, Linear]:
        """The block's prunable weights."""
        return self.decoder.linears(self.index)

    @property
    def weights(self) -> dict[str, Linear]:
        """All weights of the block, named as the checkpoint stores them: its linears, then norms, biases and gates."""
        return self.decoder.weights.of_block(self.index)

    @torch.no_grad()
    def replace(self, weights: Mapping[str, Tensor]) -> None:
        """Give this block other weights, oriented as they are stored, until its turn is over."""
        own = self.weights
        for name, weight in weights.items():
            if weight.shape != own[name].weight.shape:
                found, expected = list(weight.shape), list(own[name].weight.shape)
                raise UserError(f"{name}: its new weight is {found}, expected {expected}, as it is stored")
            self._writable(own[name]).copy_(weight)

    @torch.no_grad()
    def prune(self, keeps: Mapping[str, Tensor]) -> None:
        """Zero the weights of this block that masks don't keep, until its turn is over."""
        linears = self.linears
        for name, keep in keeps.items():
            self._writable(linears[name]).mul_(keep.to(self.decoder.device))

    def _writable(self, linear: Linear) -> Tensor:
        """A linear's weight in a copy of its parameter. It was a view of the checkpoint, or stays for later walks."""
        if (linear.module, linear.leaf) not in self._own:
            self._own.add((linear.module, linear.leaf))
            set_parameter(linear.module, linear.leaf, linear.module.get_parameter(linear.leaf).clone())
        return linear.weight

    @torch.no_grad()
    def advance(self, recorder: InputRecorder | None = None, *, rows: range | None = None) -> None:
        """Every row through this block, or some; a recorder sees the inputs of the block's linears.

        Every row has to advance once, in order, before the turn is over; then what they were last given counts.
        """
        rows = range(len(self.rows)) if rows is None else rows
        with recorder.recording(self.linears) if recorder else contextlib.nullcontext():
            self.states.write(self._outputs(recorder, rows), first=rows.start)

    def _outputs(self, recorder: InputRecorder | None, rows: range) -> Iterator[Float[Tensor, "length width"]]:
        before = self.states.before
        for number in rows:
            yield self.decoder.run(self.index, before[number][None].to(self.decoder.device), self.rows[number])[0]
            if recorder:
                recorder.end_window()


@dataclass
class HiddenStates:
    """The hidden states of all rows before and after the block at work, in two files that take turns.

    They are read through a memory map, so they cost page cache instead of memory, and they survive a killed process.
    They are written with `write`: a full disk is an error then, and no page is faulted in. After a crash of the
    machine their content is undefined, so they are used again only within the same boot.
    """

    folder: Path
    lengths: list[int]  # of the rows
    width: int
    dtype: torch.dtype
    blocks: int
    finished: int = -1  # blocks done; −1: not even the embeddings
    _checksums: list[int] = field(default_factory=lambda: [0], init=False, repr=False)  # up to each row being written

    @classmethod
    def open(cls, folder: Path, lengths: list[int], width: int, dtype: torch.dtype, blocks: int) -> "HiddenStates":
        """The states in a folder, with as many finished blocks as a killed run of this boot left.

        Progress counts only with the states that it speaks of, whole and unchanged.
        """
        folder.mkdir(parents=True, exist_ok=True)
        states = cls(folder, lengths, width, dtype, blocks)
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            progress = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
            finished = int(progress["finished"])
            if progress["boot"] == _boot() and 0 <= finished <= blocks:
                checksum, size = _checksum_of(states._path(finished))
                if (checksum, size) == (progress["checksum"], sum(lengths) * width * dtype.itemsize):
                    states.finished = finished
        return states

    @property
    def before(self) -> list[Float[Tensor, "length width"]]:
        """The hidden states of each row before the block at work."""
        return self._map(self.finished)

    def after(self, rows: range) -> list[Float[Tensor, "length width"]]:
        """The hidden states of some rows after the block at work, once they are written."""
        return self._map(self.finished + 1, rows.stop)[rows.start :]

    def write(self, rows: Iterable[Float[Tensor, "length width"]], *, first: int = 0) -> None:
        """Write the hidden states after the block at work, from one row on. OSError where the disk is full."""
        path = self._path(self.finished + 1)
        path.touch()
        if first == 0:
            self._checksums = [0]
        del self._checksums[first + 1 :]  # of rows that are written again
        with path.open("r+b") as file:  # overwrites in place: the space on the disk stays allocated
            file.seek(sum(self.lengths[:first]) * self.width * self.dtype.itemsize)
            for row in rows:
                content = row.to("cpu", self.dtype).contiguous().view(torch.uint8).numpy().data
                self._checksums.append(zlib.crc32(content, self._checksums[-1]))
                file.write(content)
            file.truncate()

    def turn(self) -> None:
        """Finish the block at work: the states after it are those before the next."""
        self.finished += 1
        beside = self.folder / "progress.part"
        progress = {"finished": self.finished, "boot": _boot(), "checksum": self._checksums[-1]}
        beside.write_text(json.dumps(progress), encoding="utf-8")
        beside.replace(self.folder / "progress.json")

    def _path(self, turn: int) -> Path:
        return self.folder / f"hidden_{turn % 2}.bin"

    def _map(self, turn: int, rows: int | None = None) -> list[Float[Tensor, "length width"]]:
        lengths = self.lengths[:rows]
        tokens = sum(lengths)
        states = torch.from_file(str(self._path(turn)), shared=True, size=tokens * self.width, dtype=self.dtype)
        return list(states.view(tokens, self.width).split(lengths))


def _checksum_of(path: Path) -> tuple[int, int]:
    """The checksum and the size of a file."""
    checksum = size = 0
    with path.open("rb") as file:
        while content := file.read(2**24):
            checksum, size = zlib.crc32(content, checksum), size + len(content)
    return checksum, size


def _boot() -> str | None:
    """This boot of this machine, where the system tells."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
