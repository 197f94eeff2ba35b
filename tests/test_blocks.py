"""The engine against the whole model run by transformers: blocks, chunks of sequences, sequences kept on a device."""

import pickle
import weakref
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Patch, outputs, save_tiny_model, walk
from hypothesis import given
from hypothesis import strategies as st
from inline import Inline
from operations import Operations
from strategies import matrices
from transformers import AutoModelForCausalLM

from wanda_dvc.engine import accelerator, activations, sequences, structure
from wanda_dvc.engine import decoder as decoding
from wanda_dvc.engine.checkpoint import Checkpoint, EditedCheckpoint
from wanda_dvc.engine.decoder import Decoder
from wanda_dvc.engine.forward import ModelRunner
from wanda_dvc.engine.record import InputRecorder
from wanda_dvc.engine.sequences import TokenSequence, cut_into_chunks
from wanda_dvc.engine.sums import BlockRecord, InputSums
from wanda_dvc.errors import UserError
from wanda_dvc.pruning.selection import kth_by_bits, kth_lowest

CPU = torch.device("cpu")
VARIANTS: dict[str, dict[str, Any]] = {
    "untied": {"tie_word_embeddings": False},
    "sharded": {"shard": "40KB"},
    "bfloat16": {"dtype": torch.bfloat16},
}


def windows(count: int = 3, length: int = 64) -> torch.Tensor:
    return torch.randint(0, 256, (count, length), generator=torch.Generator().manual_seed(1))


def record(decoder: Decoder, tokens: torch.Tensor, work: Path) -> list[BlockRecord]:
    return [step.record() for step in walk(decoder, tokens, work)]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_are_the_models_bit_for_bit(variant: str, tmp_path: Path, dtype: torch.dtype):
    """One chunk of logits, since in several the head's sums run in another order."""
    checkpoint = save_tiny_model(tmp_path / "model", **VARIANTS[variant])
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).eval()
    decoder, tokens = Decoder(checkpoint, dtype=dtype, device=CPU), windows()
    for hidden, row in zip(outputs(decoder, tokens, tmp_path / "work"), tokens, strict=True):
        ours = torch.cat([logits for _, logits in decoder.logits(hidden[None], row)])
        with torch.no_grad():
            theirs = model(input_ids=row[None]).logits[0]
        assert torch.equal(ours, theirs)


def test_rows_of_different_lengths_go_together(tiny: Path, tmp_path: Path):
    decoder, tokens = Decoder(tiny, dtype=torch.float32, device=CPU), windows()
    rows = [TokenSequence(tokens[0]), TokenSequence(tokens[1, :17]), TokenSequence(tokens[2, :40])]
    together = outputs(decoder, rows, tmp_path / "together")
    assert not list(walk(decoder, rows, tmp_path / "together"))  # a finished pass does not start again
    for number, (row, hidden) in enumerate(zip(rows, together, strict=True)):
        assert torch.equal(hidden, outputs(decoder, [row], tmp_path / str(number))[0])


def test_a_block_that_changes_its_input_is_refused(tiny: Path, tmp_path: Path):
    decoder = Decoder(tiny, dtype=torch.float32, device=CPU)
    decoder.blocks[1].register_forward_pre_hook(lambda _, inputs: inputs[0].add_(1))
    with pytest.raises(UserError, match="block 1 changes its input in place.*; unsupported model structure"):
        record(decoder, windows(), tmp_path / "work")


def test_chunks_of_logits_agree(tiny: Path, tmp_path: Path, monkeypatch: Patch):
    decoder, tokens = Decoder(tiny, dtype=torch.float32, device=CPU), windows()
    hidden = outputs(decoder, tokens, tmp_path)[0][None]
    (expected,) = (logits for _, logits in decoder.logits(hidden, tokens[0]))
    monkeypatch.setattr(decoding, "LOGITS_AT_A_TIME", 7 * 260)
    chunks = list(decoder.logits(hidden, tokens[0]))
    assert [(place.start, place.stop) for place, _ in chunks[:2]] == [(0, 7), (7, 14)]
    torch.testing.assert_close(torch.cat([logits for _, logits in chunks]), expected, rtol=1e-5, atol=1e-5)


ROW = 2 * 32 * 32 * 4  # bytes of a window before and after a block


@pytest.mark.parametrize(
    ("finished", "room", "seconds", "left"),
    [(0, 0, 60, 4), (3, 2, 60, 1), (2, 12, 0, 2), (3, 12, 60, 4), (1, 0, 60, 3)],
)
def test_a_killed_walk_goes_on_to_the_same_bytes(
    tiny: Path, tmp_path: Path, monkeypatch: Patch, finished: int, room: int, seconds: float, left: int
):
    """A device with room for all windows, in half of it, keeps them, and loses what it has not saved."""
    tokens = windows(6, 32)
    expected = record(Decoder(tiny, dtype=torch.float32, device=CPU), tokens, tmp_path / "whole")
    monkeypatch.setattr(Decoder, "memory_budget", lambda _: room * ROW)
    monkeypatch.setattr(activations, "SAVED_EVERY", seconds)
    steps = walk(Decoder(tiny, dtype=torch.float32, device=CPU), tokens, tmp_path / "killed")
    for step in steps:
        if step.index == finished:
            (tmp_path / "killed/own").mkdir(parents=True, exist_ok=True)
            for name in ("-0000.bin", "-0001.bin-a.part"):  # in the middle of its block
                (tmp_path / f"killed/own/{finished + 1:04d}{name}").write_bytes(b"torn")
            break
        step.run()
    del steps
    decoder = Decoder(tiny, dtype=torch.float32, device=CPU)
    rest = record(decoder, tokens, tmp_path / "killed")
    assert len(rest) == left
    for one, other in zip(rest, expected[-left:], strict=True):
        for name, x in other.stats.inputs.items():
            assert torch.equal(one.stats.inputs[name].sum_squares, x.sum_squares)
    for killed, not_killed in zip(*(outputs(decoder, tokens, tmp_path / x) for x in ("killed", "whole")), strict=True):
        assert torch.equal(killed, not_killed)


def test_replaced_weights_are_used_until_the_block_is_done(tiny: Path, tmp_path: Path):
    """As the whole model computes with these weights; a second walk and the checkpoint have the old ones."""
    decoder, tokens = Decoder(tiny, dtype=torch.float32, device=CPU), windows()
    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    before = (tiny / "model.safetensors").read_bytes()
    final: list[torch.Tensor] = []
    model.model.layers[-1].register_forward_hook(lambda _, __, out: final.append(out))
    with torch.no_grad():
        dense = [model(input_ids=row[None]) and final.pop()[0] for row in tokens]
    generator = torch.Generator().manual_seed(3)
    for step in walk(decoder, tokens, tmp_path / "replaced"):
        step.run()
        down = f"model.layers.{step.index}.mlp.down_proj"
        if step.index == 1:
            new = torch.randn(32, 48, generator=generator)
            model.get_submodule(down).weight.data = new.clone()
            step.change({}, {down: torch.full((32, 48), torch.nan)})
            step.change({}, {down: new})  # the last one counts
        if step.index == 2:
            keep = torch.rand(32, 48, generator=generator) < 0.5
            model.get_submodule(down).weight.data *= keep
            step.change({down: keep}, {})
            assert torch.equal(decoder.linears(step.index)[down].weight, model.get_submodule(down).weight)
    with torch.no_grad():
        changed = [model(input_ids=row[None]) and final.pop()[0] for row in tokens]
    for ours, theirs in zip(outputs(decoder, tokens, tmp_path / "replaced"), changed, strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(outputs(decoder, tokens, tmp_path / "again"), dense, strict=True):
        assert torch.equal(ours, theirs)
    assert (tiny / "model.safetensors").read_bytes() == before


def test_the_blocks_are_restored_whatever_happens(tiny: Path):
    decoder = Decoder(tiny, dtype=torch.float32, device=CPU)
    with pytest.raises(RuntimeError), decoder._instead_of_blocks(lambda *_: None):
        raise RuntimeError
    assert not any("forward" in block.__dict__ for block in decoder.blocks)


def test_a_structure_that_is_not_understood_says_so():
    module = torch.nn.Module()
    module.config = type("Config", (), {"get_text_config": lambda self: type("Text", (), {"num_hidden_layers": 3})()})()
    module.layers = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(2))
    with pytest.raises(UserError, match="found none as lists of 3 blocks"):
        structure.find_blocks(module)


@given(st.integers(0, 20_000), st.sampled_from([("cpu", 1), ("cuda", 8), ("mps", 1)]))
def test_shards_hold_every_row_once_and_in_order(number: int, kind_and_least: tuple[str, int]):
    """A GPU has at least eight to run together."""
    kind, least = kind_and_least
    cut = [chunk.places for chunk in cut_into_chunks([TokenSequence(torch.arange(1))] * number, kind)]
    assert [row for shard in cut for row in shard] == list(range(number))
    assert len(cut) >= min(number // least, sequences.PREFERRED_CHUNKS)
    assert all(len(shard) >= least for shard in cut[:-1])
    assert all(1 <= len(shard) <= sequences.LARGEST_CHUNK for shard in cut)
    assert len({len(shard) for shard in cut[:-1]}) <= 1
    assert all(len(after) <= len(before) for before, after in pairwise(cut))


def test_the_sums_of_all_shards_are_those_of_all_rows(tiny: Path, tmp_path: Path, monkeypatch: Patch):
    tokens, found = torch.randint(0, 256, (37, 12), generator=torch.Generator().manual_seed(0)), []
    for fewest in (16, 1):  # shards of two rows, and one of all
        monkeypatch.setattr(sequences, "PREFERRED_CHUNKS", fewest)
        decoder = Decoder(tiny, dtype=torch.float32, device=CPU)
        step = next(iter(walk(decoder, tokens, tmp_path / str(fewest))))
        found.append(step.record(gram=True))
    one, other = found
    assert one.stats.consumers == other.stats.consumers
    for name, x in other.stats.inputs.items():
        assert one.stats.inputs[name].count == x.count == 37 * 12
        for part in ("sum_squares", "sum"):
            torch.testing.assert_close(getattr(one.stats.inputs[name], part), getattr(x, part))
        torch.testing.assert_close(one.grams[name].upper.triu(), other.grams[name].upper.triu())


def test_the_host_waits_for_a_gpu_once_a_shard(tiny: Path, tmp_path: Path):
    asked = list[int]()
    for number in (2, 6):
        decoder = Decoder(tiny, dtype=torch.float32, device=CPU)
        step = next(walk(decoder, torch.randint(0, 256, (number, 32)), tmp_path / str(number)))
        with Operations() as operations:
            step.record()
        asked.append(operations.counts["_local_scalar_dense"])
    assert asked[0] == asked[1]


def test_a_linear_reads_one_input_in_all_shards():
    total = InputSums(input_of={"up": "gate"})
    with pytest.raises(UserError, match="^up: it reads the input of gate, and in other windows of up; unsupported"):
        total.merge(InputSums(input_of={"up": "up"}))


def test_a_windows_inputs_are_freed_before_the_next(tiny: Path, tmp_path: Path):
    decoder, seen, alive = Decoder(tiny, dtype=torch.float32, device=CPU), list[Any](), list[int]()

    def see(_: object, args: tuple[torch.Tensor]) -> None:
        seen.append(weakref.ref(args[0]))
        alive.append(sum(reference() is not None for reference in seen))

    step = next(walk(decoder, [TokenSequence(torch.arange(start, start + 8)) for start in range(48)], tmp_path))
    with decoder.blocks[0].get_submodule("mlp.down_proj").register_forward_pre_hook(see):
        step.record()
    assert len(alive) == 48  # in chunks of three
    assert max(alive) == 1


def test_an_input_is_one_memory_in_one_state(tiny: Path):
    decoder, x = Decoder(tiny, dtype=torch.float32, device=CPU), torch.randn(1, 8, 32)
    decoder.load(0, -1)
    linears = dict(list(decoder.linears(0).items())[:3])
    recorder, (q, k, v) = InputRecorder(linears=linears), linears
    with recorder.recording(), torch.no_grad():
        linears[q].module(x)
        linears[k].module(x[:, :4])
        linears[v].module(x.mul_(2))
    stats = recorder.sums.of(linears).stats.inputs
    assert [stats[name].count for name in (q, k, v)] == [8, 4, 8]
    torch.testing.assert_close(stats[v].sum_squares, 4 * stats[q].sum_squares)


@pytest.mark.parametrize(("largest", "accepted"), [(2**30, [2**30, -1]), (2**25, [2**25, -1]), (2**24, [])])
def test_glibc_gets_the_largest_threshold_that_it_accepts(largest: int, accepted: list[int], monkeypatch: Patch):
    """Older versions refuse 1 GB; a trim threshold alone would then map each tensor above 128 KiB anew."""
    values = list[int]()

    def mallopt(_: int, value: int) -> int:
        if value > largest:
            return 0
        values.append(value)
        return 1

    library = SimpleNamespace(mallopt=mallopt, malloc_trim=lambda _: 1)
    monkeypatch.setattr("ctypes.CDLL", lambda _: library)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    accelerator.keep_freed_memory()
    assert values == accepted


@given(matrices(), st.data())
def test_a_card_and_the_host_select_alike_ties_included(score: torch.Tensor, data: st.DataObject):
    for given_score in (score.abs(), score, -score):
        k = data.draw(st.integers(1, score.shape[1]))
        expected = torch.kthvalue(given_score, k, dim=1, keepdim=True).values
        assert torch.equal(kth_lowest(given_score, k), expected)
        assert torch.equal(kth_by_bits(given_score, k), expected)


def test_workers_of_a_cluster_pass_activations_on_in_files(tiny: Path, tmp_path: Path, monkeypatch: Patch):
    monkeypatch.setattr(Decoder, "memory_budget", lambda _: 2**40)
    decoder = Decoder(tiny, dtype=torch.float32, device=CPU)
    clusters: list[Any] = [None, Inline()]
    for cluster in clusters:
        runner = ModelRunner(decoder, tmp_path, cluster)
        runner.chunks = cut_into_chunks([TokenSequence(torch.arange(8))])
        assert runner.new_store("own", kept=1).on_device == (cluster is None)


def test_a_view_of_a_checkpoint_is_never_sent_as_its_source(tiny: Path):
    source = Checkpoint(tiny)
    with pytest.raises(TypeError, match="stays in its process"):
        pickle.dumps(EditedCheckpoint(source, source.read, ()))
