"""Compiled blocks compute what blocks compute, and what cannot be compiled runs as it is."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jaxtyping
import pytest
import torch
from test_families import save
from transformers.models.llama.modeling_llama import LlamaMLP

from wanda_dvc.engine import compiled
from wanda_dvc.engine.compiled import CompiledBlocks
from wanda_dvc.engine.decoder import Decoder
from wanda_dvc.engine.questions import Request, loglikelihoods
from wanda_dvc.engine.recorder import InputRecorder
from wanda_dvc.engine.walk import Here, outputs, walk
from wanda_dvc.pruning.statistics import BlockStats

CPU = torch.device("cpu")
# Of each structure one: shared inputs, transposed weights, two branches of one input, attention that alternates, and
# experts, whose tokens are seen in a way that no compiler follows.
NAMED = {"llama": False, "gpt2": False, "falcon": False, "gemma2": False, "qwen3_moe": True}


@pytest.fixture(autouse=True)
def traced_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are traced as for the compiler, and their graphs run by torch: seconds less a test."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


pytestmark = pytest.mark.slow  # compilers take seconds


def windows(length: int = 32) -> torch.Tensor:
    return torch.randint(3, 256, (3, length), generator=torch.Generator().manual_seed(1))


def run(folder: Path, work: Path, **words: Any) -> tuple[list[BlockStats], list[torch.Tensor]]:
    decoder = Decoder(folder, dtype=torch.float32, device=CPU, **words)
    measured = [turn.record().stats for turn in Here(decoder, work).walk(windows())]
    return measured, list(outputs(decoder, windows(), work))


def told(capfd: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capfd.readouterr().err.splitlines() if "runtime.compile" in line]


def assert_alike(one: list[BlockStats], other: list[BlockStats]) -> None:
    for compiled_block, block in zip(one, other, strict=True):
        assert (compiled_block.readers, compiled_block.transposed) == (block.readers, block.transposed)
        for name, x in block.inputs.items():
            found = compiled_block.inputs[name]
            assert found.count == x.count
            torch.testing.assert_close(found.sum_squares, x.sum_squares, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", NAMED)
def test_a_family_is_measured_alike_and_told_where_it_is_not_compiled(
    family: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    folder = save(family, tmp_path / "model")
    plain, after = run(folder, tmp_path / "plain")
    with mock.patch.object(CompiledBlocks, "_through", autospec=True, side_effect=CompiledBlocks._through) as calls:
        fused, also = run(folder, tmp_path / "fused", compiling="on")
    torch.testing.assert_close(also, after, rtol=1e-4, atol=1e-4)
    assert_alike(fused, plain)
    assert calls.call_count == (0 if NAMED[family] else 3 * len(plain))
    assert len(told(capfd)) == NAMED[family]


def test_all_blocks_of_a_shape_share_one_function(tiny: Path, tmp_path: Path):
    run(tiny, tmp_path, compiling="on")
    counted = torch._dynamo.utils.counters["stats"]
    assert counted["unique_graphs"] == 1


def test_where_a_graph_breaks_the_block_runs_as_it_is(
    tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    plain, after = run(tiny, tmp_path / "plain")
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: self.down_proj(breaking(self, x)))
    fused, also = run(tiny, tmp_path / "fused", compiling="on")
    for one, other in zip(also, after, strict=True):
        assert torch.equal(one, other)
    assert_alike(fused, plain)
    assert len(told(capfd)) == 1


def breaking(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    torch._dynamo.graph_break()
    gated: torch.Tensor = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
    return gated


def other_output(*words: Any) -> torch.Tensor:
    return 1.01 * compiled._through(*words)


def other_sharing(*words: Any) -> torch.Tensor:
    out: torch.Tensor = compiled._through(*words)
    compiled._given[:] = [(place, x.clone()) for place, x in compiled._given]
    return out


@pytest.mark.parametrize("made", [other_output, other_sharing])
def test_a_block_that_compiles_to_something_else_runs_as_it_is(
    made: Callable[..., Any],
    tiny: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    plain, after = run(tiny, tmp_path / "plain")
    monkeypatch.setattr(torch, "compile", lambda *_, **__: made)
    fused, also = run(tiny, tmp_path / "fused", compiling="on")
    assert all(torch.equal(one, other) for one, other in zip(also, after, strict=True))
    assert_alike(fused, plain)
    assert len(told(capfd)) == 1


def test_hooks_see_every_window_and_stay_the_models_own(tiny: Path, tmp_path: Path):
    decoder, tokens = Decoder(tiny, dtype=torch.float32, device=CPU, compiling="on"), windows()
    for step in walk(decoder, tokens, tmp_path):
        recorder = InputRecorder()
        step.advance(recorder)
        assert {x.count for x in recorder.stats.values()} == {tokens.numel()}
        assert not any(module._forward_pre_hooks for module in decoder.blocks[step.index].modules())


def test_questions_in_rows_of_many_lengths_share_one_function(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # it does not know symbols for lengths
    monkeypatch.setattr("wanda_dvc.engine.questions.ROW", 128)
    generator = torch.Generator().manual_seed(0)
    asked = []
    for size in range(4, 60, 2):
        tokens = torch.randint(3, 256, (size + 3,), generator=generator).tolist()
        asked += [Request(tuple(tokens[:size]), tuple(tokens[size:])), Request(tuple(tokens[:size]), (5, 6))]
    answers = []
    for compiling in ("off", "on"):
        decoder = Decoder(tiny, dtype=torch.float32, device=CPU, compiling=compiling)
        made = loglikelihoods(Here(decoder, tmp_path / compiling), asked, length=64, progress=lambda turns: turns)
        answers.append(torch.tensor([value for value, _ in made]))
    torch.testing.assert_close(answers[1], answers[0], rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_auto_compiles_only_long_runs_where_a_compiler_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    assert compiled.is_worth_it(compiled.WORTH["cpu"], CPU)
    assert not compiled.is_worth_it(compiled.WORTH["cpu"] * 0.99, CPU)
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert not compiled.is_worth_it(compiled.WORTH["cpu"], CPU)


def test_kernels_are_kept_in_the_users_cache_unless_the_environment_names_a_place(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
):
    for given, expected in ((None, "/home/one/.cache/wanda-dvc/kernels"), ("/kernels", "/kernels")):
        monkeypatch.setenv("XDG_CACHE_HOME", "/home/one/.cache")
        monkeypatch.setenv(compiled.CACHE, given) if given else monkeypatch.delenv(compiled.CACHE, raising=False)
        CompiledBlocks(Decoder(tiny, dtype=torch.float32, device=CPU).blocks, dynamic=False)
        assert os.environ[compiled.CACHE] == expected
