"""Our attention against torch's own: causal, with a window, with keys shared, soft-capped, and by questions."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Patch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_families import save
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from wanda_dvc.engine import attention
from wanda_dvc.engine.attention import attend, laid_out, visible
from wanda_dvc.engine.decoder import Decoder
from wanda_dvc.engine.rows import Layout

MODULE = torch.nn.Module()


def heads(length: int, *, keys: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(1, 6, length, 8, generator=generator),
        torch.randn(1, keys, length, 8, generator=generator),
        torch.randn(1, keys, length, 8, generator=generator),
    )


def oracle(q, k, v, sees, scale=8**-0.5, softcap=None):
    """Token by token, head by head."""
    out = torch.zeros(1, q.shape[2], q.shape[1], v.shape[-1])
    for head in range(q.shape[1]):
        group = head * k.shape[1] // q.shape[1]
        for i in range(q.shape[2]):
            scores = scale * (k[0, group] @ q[0, head, i])
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            weights = torch.where(sees[i], scores, -torch.inf).softmax(0)
            out[0, i, head] = weights @ v[0, group]
    return out


@pytest.mark.parametrize("queries", [5, 16, 256])
@pytest.mark.parametrize("keys", [1, 2, 6])
def test_a_window_is_causal(monkeypatch: Patch, queries: int, keys: int):
    monkeypatch.setattr(attention, "QUERIES_AT_A_TIME", queries)
    q, k, v = heads(37, keys=keys)
    ours, _ = attend(MODULE, q, k, v, None, scaling=8**-0.5)
    k, v = (x.repeat_interleave(6 // keys, dim=1) for x in (k, v))
    theirs = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("queries", [5, 256])
def test_a_layer_that_sees_a_few_tokens_back(monkeypatch: Patch, queries: int):
    monkeypatch.setattr(attention, "QUERIES_AT_A_TIME", queries)
    mask = visible(1, 37, 37, sliding_window_causal_mask_function(4), "cpu", local_size=4)
    q, k, v = heads(37)
    behind = torch.arange(37)[:, None] - torch.arange(37)
    ours, _ = attend(MODULE, q, k, v, mask, softcap=2.0)
    torch.testing.assert_close(ours, oracle(q, k, v, (behind >= 0) & (behind < 4), softcap=2.0), rtol=1e-5, atol=1e-5)


@settings(max_examples=25)
@given(
    st.lists(st.tuples(st.integers(1, 5), st.lists(st.integers(0, 4), min_size=1, max_size=3)), min_size=1, max_size=3),
    st.sampled_from([None, 2, 5]),
)
def test_a_token_sees_its_context_and_its_own_choice(questions: list[tuple[int, list[int]]], window: int | None):
    places = [
        (question, choice, position)
        for question, (context, choices) in enumerate(questions)
        for choice, size in enumerate([context, *choices])
        for position in range(0 if choice == 0 else context, size if choice == 0 else context + size)
    ]
    question, choice, positions = (torch.tensor(column) for column in zip(*places, strict=True))
    sees = torch.tensor(
        [
            [
                q == r and d in (0, c) and e <= p and (window is None or p - e < window)
                for r, d, e in places
            ]
            for q, c, p in places
        ]
    )  # fmt: skip
    q, k, v = heads(len(places))
    kind = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    with laid_out(Layout(positions, question, choice)):
        mask = visible(1, len(places), len(places), kind, "cpu", attention_mask=None, allow_is_causal_skip=True)
        ours, _ = attend(MODULE, q, k, v, mask)
    torch.testing.assert_close(ours, oracle(q, k, v, sees), rtol=1e-5, atol=1e-5)


def test_where_it_differs_in_one_kind_of_block_the_stock_one_stays(tmp_path: Path, monkeypatch: Patch):
    """Blocks of full attention and of a sliding window alternate; the second kind is wrong."""
    monkeypatch.setattr(attention, "is_faster", lambda *_: True)
    folder = save("gemma2", tmp_path / "model")
    assert Decoder(folder, dtype=torch.float32, device=torch.device("cpu"))._ours_for_windows

    def wrong(module: torch.nn.Module, *given: Any, **words: Any) -> tuple[Tensor, None]:
        out, _ = attention.attend(module, *given, **words)
        return out * (module.layer_idx != 1), None

    monkeypatch.setitem(AttentionInterface._global_mapping, attention.NAME, wrong)
    assert not Decoder(folder, dtype=torch.float32, device=torch.device("cpu"))._ours_for_windows


def late(module: torch.nn.Module, *given: Any, **words: Any) -> tuple[Tensor, None]:
    """Wrong above the first tile of queries."""
    out, _ = attend(module, *given, **words)
    return torch.cat([out[:, :128], out[:, 128:].flip(2)], dim=1), None


def blind(module: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor, _: Tensor, **words: Any) -> tuple[Tensor, None]:
    """Ignores the sliding window."""
    return attend(module, q, k, v, None, **words)


def larger(module: torch.nn.Module, *given: Any, **words: Any) -> tuple[Tensor, None]:
    """Wrong by a few percent, in some heads."""
    out, _ = attend(module, *given, **words)
    return out * torch.linspace(0.97, 1.03, out.shape[2])[:, None].to(out.dtype), None


@pytest.mark.parametrize("wrong", [late, blind, larger])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_that_is_wrong_on_long_rows_or_a_little_is_found(
    tmp_path: Path, monkeypatch: Patch, wrong: Any, dtype: torch.dtype
):
    monkeypatch.setattr(attention, "is_faster", lambda *_: True)
    folder = save("gemma2", tmp_path / "model", sliding_window=200, max_position_embeddings=512)
    decoder = Decoder(folder, dtype=dtype, device=torch.device("cpu"))
    assert decoder._ours_for_windows
    assert decoder.model.config.sliding_window == 200
    monkeypatch.setitem(AttentionInterface._global_mapping, attention.NAME, wrong)
    assert not Decoder(folder, dtype=dtype, device=torch.device("cpu"))._ours_for_windows


def test_attention_with_more_than_a_mask_stays_the_models_own(tmp_path: Path, monkeypatch: Patch):
    """With sinks near nothing, no result on a short row would show that ours has none."""
    monkeypatch.setattr(attention, "is_faster", lambda *_: True)
    folder = save("gpt_oss", tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    sinks = {name: weight.fill_(-30) for name, weight in weights.items() if name.endswith("sinks")}
    assert len(sinks) == 3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert not Decoder(folder, dtype=torch.float32, device=torch.device("cpu"))._ours_for_windows
    q = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ValueError, match="attention with s_aux"):
        attention.attend(torch.nn.Module(), q, q, q, None, s_aux=torch.zeros(2), position_ids=torch.zeros(1, 4))


def test_questions_are_tried_against_the_models_own_attention(tmp_path: Path, monkeypatch: Patch):
    folder = save("llama", tmp_path / "model")
    decoder = Decoder(folder, dtype=torch.float32, device=torch.device("cpu"))
    monkeypatch.setitem(AttentionInterface._global_mapping, attention.NAME, lambda m, q, *_, **__: (q.mT * 0, None))
    decoder._ours_for_windows = True
    assert not decoder.holds_layouts
