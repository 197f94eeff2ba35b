"""Windows that run together on a GPU: the same results as one by one, within rounding, whatever the batch."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from cases.grids import short
from conftest import Capture, Patch, walk
from families import RECORDED, save
from simulated_gpu import simulated_gpu

from wanda_dvc.engine import accelerator, repair, sequences
from wanda_dvc.engine import decoder as decoding
from wanda_dvc.engine.accelerator import Copies
from wanda_dvc.engine.backward import backward
from wanda_dvc.engine.decoder import Decoder
from wanda_dvc.engine.forward import BlockStep, ModelRunner
from wanda_dvc.engine.load import BlockLoader, WeightChange
from wanda_dvc.engine.memory import ForwardMemory
from wanda_dvc.engine.sequences import PackedQuestions, TokenSequence
from wanda_dvc.engine.structure import build_empty

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}  # float32's 1.2e-7, for sums in another order, through four blocks


@pytest.fixture(autouse=True)
def two_chunks(monkeypatch: Patch) -> None:
    monkeypatch.setattr(sequences, "PREFERRED_CHUNKS", 2)


def rows(count: int = 9, length: int = 20) -> list[TokenSequence]:
    """Windows, of which the last is shorter."""
    tokens = torch.randint(3, 256, (count, length), generator=torch.Generator().manual_seed(1))
    return [*map(TokenSequence, tokens[:-1]), TokenSequence(tokens[-1, : length // 2])]


def force(monkeypatch: Patch, size: int) -> list[int]:
    """Let so many windows run together on a CPU; the numbers of those that did."""
    sizes, run = list[int](), Decoder.run

    def counted(self: Decoder, index: int, hidden: torch.Tensor, sequence: TokenSequence) -> torch.Tensor:
        sizes.append(len(hidden))
        return run(self, index, hidden, sequence)

    monkeypatch.setattr(Decoder, "batch_size", lambda *_, **__: size)
    monkeypatch.setattr(Decoder, "run", counted)
    return sizes


def numbers(value: Any) -> list[torch.Tensor]:
    """All numbers of sums, in order."""
    if isinstance(value, torch.Tensor):
        value = value.cpu()
        return [value.triu().double() if value.dim() == 2 and value.dtype is torch.float64 else value.double()]
    if isinstance(value, (int, float)):
        return [torch.tensor(float(value), dtype=torch.float64)]
    if isinstance(value, dict):
        value = [value[name] for name in sorted(value)]
    elif hasattr(value, "__dataclass_fields__"):
        value = vars(value).values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [x for each in value for x in numbers(each)]


def check_alike(first: Any, second: Any) -> None:
    alike = list(zip(numbers(first), numbers(second), strict=True))
    assert alike
    for one, other in alike:
        torch.testing.assert_close(one, other, rtol=ROUNDING["rtol"], atol=1e-5 * float(one.abs().max()))


def hidden(step: BlockStep) -> list[torch.Tensor]:
    """The hidden states after a block."""
    store = step.runner.store
    return [x.clone() for chunk in step.runner.chunks for x in store.read(step.index + 1, chunk.number)]


def change(decoder: Decoder, step: BlockStep) -> None:
    """Go on with another weight."""
    linears = decoder.linears(step.index)
    name = next(name for name, linear in linears.items() if linear.slice.expert is None)
    step.change({}, {name: linears[name].weight * 1.1})


def gradients(decoder: Decoder, work: Path) -> list[Any]:
    """Sums of gradients."""
    return [sums for _, sums in backward(ModelRunner(decoder, work), rows())]


def measure(decoder: Decoder, work: Path) -> list[Any]:
    """Sums, hidden states, and sums of gradients."""
    results: list[Any] = []
    for step in walk(decoder, rows(), work / "forward"):
        results += [step.record(gram=True), hidden(step)]
        change(decoder, step)
    return [*results, gradients(decoder, work / "back")]


@pytest.mark.parametrize("family", short(RECORDED, "falcon"))
def test_sums_of_windows_that_run_together_are_those_of_each_alone(family: str, tmp_path: Path, monkeypatch: Patch):
    """Norms, Gram matrices, gated outputs, gradients; hidden states too.

    Each block gets the same hidden states: rounding may send a token to another expert a few blocks later.
    """
    decoder = Decoder(save(family, tmp_path / "model"), dtype=torch.float32, device=CPU)
    for step in walk(decoder, rows(), tmp_path / "forward"):
        alone, together = both_ways(monkeypatch, lambda step=step: (step.record(gram=True), hidden(step)))
        check_alike(alone, together)
        change(decoder, step)
    alone, together = both_ways(monkeypatch, lambda: gradients(decoder, tmp_path / "back"))
    check_alike(alone, together)


def both_ways(monkeypatch: Patch, function: Callable[..., Any]) -> tuple[Any, Any]:
    """What a function returns if windows run one by one, and if three run together."""
    alone = function()
    with monkeypatch.context() as forced:
        sizes = force(forced, 3)
        together = function()
    assert set(sizes) == {3, 1}  # chunks of 4, 4, and a shorter window
    return alone, together


def test_on_a_cpu_each_window_runs_alone(tiny: Path):
    decoder = Decoder(tiny, dtype=torch.float32, device=CPU)
    assert [len(batch) for batch in decoder.batches(rows(), streamed=False)] == [1] * 9


def test_packed_questions_and_other_lengths_run_alone(tiny: Path, monkeypatch: Patch):
    force(monkeypatch, 3)
    decoder = Decoder(tiny, dtype=torch.float32, device=CPU)
    packed = TokenSequence(torch.zeros(20, dtype=torch.long), PackedQuestions(*torch.zeros(3, 20, dtype=torch.long)))
    mixed = [*rows(5), packed, TokenSequence(packed.tokens, packed.questions), *rows(2)]
    assert [len(batch) for batch in decoder.batches(mixed, streamed=False)] == [3, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("stays", [True, False])
def test_a_gpu_runs_windows_together_with_the_cpus_results(tiny: Path, tmp_path: Path, monkeypatch: Patch, stays: bool):
    """Whether activations stay there or come from files, a batch ahead, and go back to files."""
    monkeypatch.setattr(decoding, "STREAMED_TOKENS", 40)
    expected = measure(Decoder(tiny, dtype=torch.float32, device=CPU), tmp_path / "cpu")
    with simulated_gpu():
        decoder = Decoder(tiny, dtype=torch.float32, device=CUDA)
        if not stays:
            monkeypatch.setattr(decoder, "memory_budget", lambda: 0)
        assert [len(x) for x in decoder.batches(rows(), streamed=not stays)] == ([8, 1] if stays else [2, 2, 2, 2, 1])
        measured = measure(decoder, tmp_path / "gpu")
        check_alike(expected, measured)


def test_a_batch_that_a_gpu_cannot_hold_is_halved_once(tiny: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture):
    """Its chunk runs again from the start, and counts once."""
    expected = [step.record() for step in walk(Decoder(tiny, dtype=torch.float32, device=CPU), rows(), tmp_path / "a")]
    run = Decoder.run

    def small(self: Decoder, index: int, hidden: torch.Tensor, sequence: TokenSequence) -> torch.Tensor:
        after = run(self, index, hidden, sequence)
        if len(hidden) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return after

    most = 2
    monkeypatch.setattr(Decoder, "run", small)
    with simulated_gpu():
        decoder = Decoder(tiny, dtype=torch.float32, device=CUDA)
        check_alike(expected, [step.record() for step in walk(decoder, rows(), tmp_path / "b")])
        lines = capsys.readouterr().err.splitlines()
        assert lines == [f"out of GPU memory: continuing with batches of {n} windows, half of the last" for n in (4, 2)]
        most = 0
        with pytest.raises(torch.OutOfMemoryError):
            [step.record() for step in walk(decoder, rows(), tmp_path / "c")]


def test_work_that_runs_out_of_memory_is_repeated_and_counts_once(tiny: Path, tmp_path: Path, capsys: Capture):
    """In the loss, and in the repair: after one batch of two."""
    refit = repair.Refit(0, 2, "model.layers.0.mlp.down_proj")

    def fails_once(method: str) -> Any:
        calls, original = itertools.count(1), getattr(Decoder, method)

        def failing(*args: Any) -> Any:
            if next(calls) == 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return original(*args)

        return mock.patch.object(Decoder, method, failing)

    with simulated_gpu():
        decoder = Decoder(tiny, dtype=torch.float32, device=CUDA)
        runner = ModelRunner(decoder, tmp_path / "repair")
        changes = [WeightChange({}, {refit.linear: decoder.checkpoint.weight(refit.linear) * 1.1})]

        def run_twice(run: repair.RefitRun) -> None:
            for work, job in ((repair.sum_lacking, run), (repair.try_changes, (run, changes))):
                decoder.batch_limit = 2
                expected = work(decoder, job, runner.chunks[0])  # type: ignore[arg-type]
                with fails_once("run"):
                    check_alike(expected, work(decoder, job, runner.chunks[0]))  # type: ignore[arg-type]

        list(repair.run_refits(runner, rows(), [refit], run_twice))
        decoder.batch_limit = 2
        expected = gradients(decoder, tmp_path / "a")
        with fails_once("loss_gradient"):
            check_alike(expected, gradients(decoder, tmp_path / "b"))
    assert capsys.readouterr().err.count("out of GPU memory: continuing with batches of 1 windows") == 3


def test_a_buffer_with_two_names_is_on_the_gpu_under_both(tiny: Path, monkeypatch: Patch):
    def build(*args: Any) -> Any:
        model = build_empty(*args)
        rotary = model.model.rotary_emb
        rotary.register_buffer("second_name", rotary.inv_freq, persistent=False)
        return model

    monkeypatch.setattr(decoding, "build_empty", build)
    with simulated_gpu():
        decoder = Decoder(tiny, dtype=torch.float32, device=CUDA)
        buffers = dict(decoder.model.named_buffers(remove_duplicate=False))
        assert "model.rotary_emb.second_name" in buffers
        assert {name for name, buffer in buffers.items() if buffer.device.type != "cuda"} == set()


def test_the_memory_of_a_gpu_goes_to_blocks_and_sums_first(tiny: Path, monkeypatch: Patch):
    """Then half to activations that stay, and half to batches and arguments: 7 of 80 GB for the arguments."""
    with simulated_gpu():
        for free in (10**6, 80 * 10**9):
            monkeypatch.setattr("torch.cuda.mem_get_info", lambda _, free=free: (free, free))
            decoder = Decoder(tiny, dtype=torch.float32, device=CUDA)
            sizes = decoder.sizes
            least = ForwardMemory(sizes, dtype="float32", length=20, device="cuda").grams
            assert 0 <= 2 * decoder.memory_budget() <= max(0, free - 2 * 4 * sizes.block_parameters - least)
            assert decoder.batch_size(10**9, streamed=False, copies=1) == 1
        assert decoder._arguments_memory > 7e9


def test_tensors_come_to_the_host_in_order_while_the_next_are_computed():
    """At most two wait; an error of the thread, such as of a full disk, ends the loop."""
    with simulated_gpu():
        computed, used = list[int](), list[int]()

        def results() -> Iterator[torch.Tensor]:
            for number in range(5):
                assert number - len(used) <= 2
                computed.append(number)
                yield torch.full((2,), number, device="cuda")

        accelerator.use_on_host(results(), lambda x: used.append(int(x[0])))
        assert used == computed == [*range(5)]
        assert [int(x[0]) for x in Copies(CUDA).to_device(torch.tensor([[3], [4], [5]]))] == [3, 4, 5]
        with pytest.raises(OSError, match="No space"):
            accelerator.use_on_host(results(), mock.Mock(side_effect=OSError(28, "No space left on device")))


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_masks_count_though_memory_ends_while_they_are_applied(tiny: Path, tmp_path: Path, monkeypatch: Patch):
    """The block does not pass for masked when its chunk runs again in smaller batches."""
    apply, tries = BlockLoader._apply, list[int]()

    def third_mask_fails(self: BlockLoader, index: int, change: WeightChange) -> None:
        tries.append(index)
        if len(tries) > 1:
            return apply(self, index, change)
        apply(self, index, WeightChange(dict(list(change.masks.items())[:2]), {}))
        raise OUT_OF_MEMORY

    def masked_block(device: torch.device) -> list[torch.Tensor]:
        decoder = Decoder(tiny, dtype=torch.float32, device=device)
        step = next(iter(walk(decoder, rows()[:8], tmp_path / device.type)))
        step.run()
        generator = torch.Generator().manual_seed(0)
        linears = decoder.linears(0).items()
        masks = {name: torch.rand(x.weight.shape, generator=generator) < 0.5 for name, x in linears}
        step.change(masks, {})
        return [x.cpu() for chunk in step.runner.chunks for x in step.runner.store.read(1, chunk.number)]

    expected = masked_block(CPU)
    with simulated_gpu():
        monkeypatch.setattr(BlockLoader, "_apply", third_mask_fails)
        check_alike(expected, masked_block(CUDA))
    assert len(tries) == 2


def test_a_block_that_a_gpu_cannot_hold_ends_the_run(tiny: Path, tmp_path: Path, monkeypatch: Patch):
    """Smaller batches do not help; the batch of the chunk before allows a few tries."""
    tries = list[int]()

    def read_block(self: BlockLoader, index: int) -> None:
        tries.append(index)
        assert len(tries) < 20
        raise OUT_OF_MEMORY

    with simulated_gpu():
        decoder = Decoder(tiny, dtype=torch.float32, device=CUDA)
        steps = iter(walk(decoder, rows()[:8], tmp_path))
        next(steps).run()
        step = next(steps)
        decoder.loader._read_ahead.clear()
        monkeypatch.setattr(BlockLoader, "read_block", read_block)
        with pytest.raises(torch.OutOfMemoryError):
            step.run()
