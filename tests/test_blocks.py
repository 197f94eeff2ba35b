"""The engine, against the whole model run by transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import outputs, save_tiny_model, walk
from transformers import AutoModelForCausalLM

from wanda_dvc.engine import attention, structure
from wanda_dvc.engine import decoder as decoding
from wanda_dvc.engine.decoder import Decoder
from wanda_dvc.engine.recorder import Recorded
from wanda_dvc.engine.rows import Row
from wanda_dvc.engine.weights import Weights
from wanda_dvc.errors import UserError
from wanda_dvc.pruning.statistics import InputStats

CPU = torch.device("cpu")
VARIANTS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "sharded": {"shard": "40KB"},
    "bfloat16": {"dtype": torch.bfloat16},
    "rope scaling": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
}


def windows(length: int = 64) -> torch.Tensor:
    return torch.randint(0, 256, (3, length), generator=torch.Generator().manual_seed(1))


def record(decoder: Decoder, tokens: torch.Tensor, work: Path) -> list[Recorded]:
    return [step.record() for step in walk(decoder, tokens, work)]


@pytest.fixture(params=VARIANTS)
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "model", **VARIANTS[request.param])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_are_the_models_bit_for_bit(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
):
    """One chunk of logits, since in several the head's sums run in another order.

    The model's own attention is used: ours, which a CPU with bfloat16 units takes, rounds differently.
    """
    monkeypatch.setattr(attention, "is_faster", lambda *_: False)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).eval()
    decoder, tokens = Decoder(checkpoint, dtype=dtype, device=CPU), windows()
    record(decoder, tokens, tmp_path / "work")
    for hidden, row in zip(outputs(decoder, tokens, tmp_path / "work"), tokens, strict=True):
        ours = torch.cat([logits for _, logits in decoder.logits(hidden[None], row)])
        with torch.no_grad():
            theirs = model(input_ids=row[None]).logits[0]
        assert torch.equal(ours, theirs)


def test_rows_of_different_lengths_go_together(tiny: Path, tmp_path: Path):
    decoder, tokens = Decoder(tiny, dtype=torch.float32, device=CPU), windows()
    rows = [Row(tokens[0]), Row(tokens[1, :17]), Row(tokens[2, :40])]
    for step in walk(decoder, rows, tmp_path / "together"):
        step.advance()
    for number, (row, hidden) in enumerate(zip(rows, outputs(decoder, rows, tmp_path / "together"), strict=True)):
        for step in walk(decoder, [row], tmp_path / str(number)):
            step.advance()
        assert torch.equal(hidden, outputs(decoder, [row], tmp_path / str(number))[0])


def test_each_block_is_read_once(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    read: list[int] = []
    decoder = Decoder(tiny, dtype=torch.float32, device=CPU)

    def read_block(index: int) -> dict[str, torch.Tensor]:
        read.append(index)
        return Weights.read_block(decoder.weights, index)

    monkeypatch.setattr(decoder.weights, "read_block", read_block)
    record(decoder, windows(), tmp_path)
    assert read == [0, 0, 1, 2, 3]  # block 0 first shows what it returns


def test_chunks_of_logits_agree(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    decoder, tokens = Decoder(tiny, dtype=torch.float32, device=CPU), windows()
    record(decoder, tokens, tmp_path)
    hidden = outputs(decoder, tokens, tmp_path)[0][None]
    (expected,) = (logits for _, logits in decoder.logits(hidden, tokens[0]))
    monkeypatch.setattr(decoding, "LOGITS_AT_A_TIME", 7 * 260)
    chunks = list(decoder.logits(hidden, tokens[0]))
    assert [(place.start, place.stop) for place, _ in chunks[:2]] == [(0, 7), (7, 14)]
    torch.testing.assert_close(torch.cat([logits for _, logits in chunks]), expected, rtol=1e-5, atol=1e-5)


def test_statistics_are_those_of_plain_hooks(checkpoint: Path, tmp_path: Path):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    seen: dict[str, list[torch.Tensor]] = {}
    linears = {name: module for name, module in model.model.named_modules() if isinstance(module, torch.nn.Linear)}
    for name, module in linears.items():
        module.register_forward_hook(
            lambda _, args, __, name=name: seen.setdefault(f"model.{name}", []).append(args[0][0])
        )
    tokens = windows()
    with torch.no_grad():
        for row in tokens:
            model(input_ids=row[None])
    recorders = record(Decoder(checkpoint, dtype=torch.float32, device=CPU), tokens, tmp_path / "work")
    found: dict[str, InputStats] = {}
    for recorder in recorders:
        inputs, readers, *_ = recorder.stats
        for source, names in readers.items():
            found |= dict.fromkeys(names, inputs[source])
    assert found.keys() == seen.keys()
    for name, stats in found.items():
        tokens_read = torch.cat(seen[name]).double()
        torch.testing.assert_close(stats.sum_squares, (tokens_read**2).sum(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(stats.sum, tokens_read.sum(0), rtol=1e-4, atol=1e-3)
        assert stats.count == tokens.numel()


def test_a_distinct_input_is_kept_once(tiny: Path, tmp_path: Path):
    recorders = record(Decoder(tiny, dtype=torch.float32, device=CPU), windows(), tmp_path)
    for block, recorder in enumerate(recorders):
        short = [
            [name.removeprefix(f"model.layers.{block}.") for name in names] for names in recorder.stats.readers.values()
        ]
        assert short == [
            ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            ["self_attn.o_proj"],
            ["mlp.gate_proj", "mlp.up_proj"],
            ["mlp.down_proj"],
        ]


@pytest.mark.parametrize("finished", [0, 1, 3])
def test_a_killed_walk_goes_on_to_the_same_bytes(tiny: Path, tmp_path: Path, finished: int):
    tokens = windows()
    expected = record(Decoder(tiny, dtype=torch.float32, device=CPU), tokens, tmp_path / "whole")
    steps = walk(Decoder(tiny, dtype=torch.float32, device=CPU), tokens, tmp_path / "killed")
    for step in steps:
        if step.index == finished:
            for name in ("-0000", "-0001-a.part"):  # in the middle of its block
                (tmp_path / f"killed/own/{finished + 1:04d}{name}").write_bytes(b"torn")
            break
        step.advance()
    del steps
    decoder = Decoder(tiny, dtype=torch.float32, device=CPU)
    rest = record(decoder, tokens, tmp_path / "killed")
    assert len(rest) == len(expected) - finished
    for one, other in zip(rest, expected[finished:], strict=True):
        assert all(
            torch.equal(one.stats.inputs[name].sum_squares, x.sum_squares) for name, x in other.stats.inputs.items()
        )
    for killed, not_killed in zip(*(outputs(decoder, tokens, tmp_path / x) for x in ("killed", "whole")), strict=True):
        assert torch.equal(killed, not_killed)


def test_only_the_block_at_work_has_weights(tiny: Path, tmp_path: Path):
    decoder = Decoder(tiny, dtype=torch.float32, device=CPU)
    for step in walk(decoder, windows(), tmp_path):
        step.advance()
        held = [any(not p.is_meta for p in block.parameters()) for block in decoder.blocks]
        assert held == [index == step.index for index in range(4)]
    assert all(p.is_meta for block in decoder.blocks for p in block.parameters())


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
        step.advance()
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
            assert torch.equal(step.linears[down].weight, model.get_submodule(down).weight)
    with torch.no_grad():
        changed = [model(input_ids=row[None]) and final.pop()[0] for row in tokens]
    for ours, theirs in zip(outputs(decoder, tokens, tmp_path / "replaced"), changed, strict=True):
        assert torch.equal(ours, theirs)
    record(decoder, tokens, tmp_path / "again")
    for ours, theirs in zip(outputs(decoder, tokens, tmp_path / "again"), dense, strict=True):
        assert torch.equal(ours, theirs)
    assert (tiny / "model.safetensors").read_bytes() == before


def test_a_new_weight_of_another_shape_is_refused(tiny: Path, tmp_path: Path):
    decoder = Decoder(tiny, dtype=torch.float32, device=CPU)
    step = next(walk(decoder, windows(), tmp_path))
    with pytest.raises(
        UserError, match=r"0.mlp.up_proj: its new weight is \[32\], expected \[48, 32\], as it is stored"
    ):
        step.change({}, {"model.layers.0.mlp.up_proj": torch.ones(32)})


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


def test_a_missing_tensor_is_named(tiny: Path, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes((tiny / "config.json").read_bytes())
    tensors = load_file(tiny / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match="no tensor for model.norm.weight"):
        Decoder(folder, dtype=torch.float32, device=CPU)
