"""A model against the dense model: the laws of the divergence, and its two stages."""

import json
import math
import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Make, Patch, fetch, mask_and_apply, outputs, save_tiny_model
from scipy import stats
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from wanda_dvc.engine import divergence
from wanda_dvc.engine.decoder import Decoder
from wanda_dvc.engine.divergence import Divergence, Predictions, compute_perplexity, kl_divergence, measure, summarize
from wanda_dvc.errors import UserError
from wanda_dvc.results.intervals import perplexity_interval
from wanda_dvc.results.show import show
from wanda_dvc.stages.perplexity import perplexity
from wanda_dvc.study.files import load_json

CPU = torch.device("cpu")
TOKENS = torch.arange(40) * 7 % 250


def through(folder: Path) -> tuple[Decoder, torch.Tensor]:
    """A model, and its last hidden states of a window."""
    decoder, row = Decoder(folder, dtype=torch.float32, device=CPU), TOKENS[None]
    return decoder, outputs(decoder, row, folder / "work")[0][None]


def compared(
    decoder: Decoder, hidden: torch.Tensor, dense: Predictions, tokens: torch.Tensor = TOKENS
) -> tuple[float, Divergence]:
    """A model's loss on a window, and its divergence from the dense model's predictions."""
    loss, predictions = measure(decoder, hidden, tokens, dense)
    return loss, divergence.diverge(dense, predictions)


def oracle(*folders: Path) -> list[torch.Tensor]:
    """Models' log-probabilities in float64, by transformers alone."""
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64) for folder in folders]
    with torch.no_grad():
        return [model(TOKENS[None]).logits[0, :-1].log_softmax(-1) for model in models]


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    """A model, and one with other weights, final norm and head."""
    return save_tiny_model(tmp_path / "one"), save_tiny_model(tmp_path / "other", seed=1, tie_word_embeddings=False)


def test_a_small_vocabulary_gives_the_divergence_of_float64(models: tuple[Path, Path], monkeypatch: Patch):
    monkeypatch.setattr(divergence, "TOP", 260)
    loss, dense = measure(*through(models[0]), TOKENS)
    other_loss, found = compared(*through(models[1]), dense)
    p, q = oracle(*models)
    targets = TOKENS[1:, None]
    assert dense.drawn.shape == (39, 0)
    assert loss == pytest.approx(-float(p.gather(1, targets).mean()), rel=1e-5)
    assert other_loss == pytest.approx(-float(q.gather(1, targets).mean()), rel=1e-5)
    assert found.kl == pytest.approx((p.exp() * (p - q)).sum(1).tolist(), rel=1e-4)
    assert found.agreed == int((p.argmax(1) == q.argmax(1)).sum())


@pytest.mark.parametrize("top", [5, divergence.TOP])
def test_drawn_tokens_estimate_the_tail_without_bias(models: tuple[Path, Path], monkeypatch: Patch, top: int):
    """The mean over all tokens of the tail, by their probability, is the divergence exactly."""
    monkeypatch.setattr(divergence, "TOP", top)
    p, q = oracle(*models)
    _, dense = measure(*through(models[0]), TOKENS)
    highest = dense.top.long()
    rest = p.scatter(1, highest, -math.inf)
    weights = (rest - rest.logsumexp(1, keepdim=True)).exp()
    total = torch.zeros(39, dtype=torch.float64)
    own = dense._replace(top_log_p=p.gather(1, highest), tail_log_p=rest.logsumexp(1))
    tail = q.scatter(1, highest, -math.inf).logsumexp(1)
    others = dense._replace(top_log_p=q.gather(1, highest), tail_log_p=tail)
    for token in range(260):
        kl = kl_divergence(own._replace(drawn_log_p=p[:, token, None]), others._replace(drawn_log_p=q[:, token, None]))
        total += torch.where(weights[:, token] > 0, weights[:, token] * kl, 0.0)
    assert total.tolist() == pytest.approx((p.exp() * (p - q)).sum(1).tolist(), rel=1e-9)


def test_the_draw_follows_the_tail(models: tuple[Path, Path], monkeypatch: Patch):
    """Systematic: of n draws, a token with probability π within the tail gets nπ, rounded down or up."""
    monkeypatch.setattr(divergence, "TOP", 5)
    monkeypatch.setattr(divergence, "DRAWN", 1000)
    _, dense = measure(*through(models[0]), TOKENS)
    (p,) = oracle(models[0])
    rest = p.scatter(1, dense.top.long(), -math.inf)
    expected = 1000 * (rest - rest.logsumexp(1, keepdim=True)).exp()
    for row in range(39):
        counts = dense.drawn[row].long().bincount(minlength=260)
        assert bool(((counts - expected[row]).abs() < 1.01).all())
        assert dense.drawn_log_p[row].tolist() == pytest.approx(p[row, dense.drawn[row].long()].tolist(), abs=1e-4)


def test_each_position_draws_from_an_offset_of_its_own(models: tuple[Path, Path], monkeypatch: Patch):
    monkeypatch.setattr(divergence, "TOP", 5)
    monkeypatch.setattr(divergence, "DRAWN", 2)
    decoder, hidden = through(models[0])
    _, dense = measure(decoder, hidden[:, :1].expand_as(hidden).contiguous(), TOKENS)
    assert len({tuple(drawn) for drawn in dense.drawn.tolist()}) > 20


def test_sums_by_doubling_are_the_cumulative_sums():
    """They take the place of CUDA's cumsum, which is not deterministic."""
    for length in (1, 2, 63, 64, 1000):
        p = torch.rand(3, length, generator=torch.Generator().manual_seed(length))
        torch.testing.assert_close(divergence.sums_by_doubling(p), p.double().cumsum(-1), rtol=1e-14, atol=0)


@pytest.mark.parametrize(("top", "drawn"), [(64, 64), (3, 2), (260, 64)])
def test_a_model_against_itself_is_zero_to_the_bit(models: tuple[Path, Path], monkeypatch: Patch, top: int, drawn: int):
    monkeypatch.setattr(divergence, "TOP", top)
    monkeypatch.setattr(divergence, "DRAWN", drawn)
    loss, dense = measure(*through(models[0]), TOKENS)
    assert compared(*through(models[0]), dense) == (loss, Divergence([0.0] * 39, 39))


def test_no_divergence_is_negative_or_lost():
    """From equal to far apart, also where probabilities underflow in float32."""
    generator = torch.Generator().manual_seed(0)

    class Logits(Decoder):
        def __init__(self, logits: torch.Tensor):
            self.device, self.rows = CPU, logits

        def logits(self, hidden: torch.Tensor, tokens: torch.Tensor) -> Any:
            yield slice(0, len(tokens)), self.rows.clone()

    tokens, hidden = torch.arange(30), torch.zeros(1, 30, 1)
    for scale in (0.1, 1.0, 30.0, 1000.0):
        logits = scale * torch.randn(30, 400, generator=generator)
        _, dense = measure(Logits(logits), hidden, tokens)
        for change in (0.0, 1e-7, 1e-3, 1.0, 100.0):
            other = logits + change * torch.randn(30, 400, generator=generator)
            _, found = compared(Logits(other), hidden, dense, tokens)
            assert found.finite
            assert min(found.kl) >= 0
            p, q = logits[:-1].double().log_softmax(1), other[:-1].double().log_softmax(1)
            exact = float((p.exp() * (p - q)).sum(1).mean())
            assert math.fsum(found.kl) / 29 == pytest.approx(exact, rel=0.05, abs=1e-5)  # 64 draws a position
        logits[3, 5] = math.nan
        summary = summarize([compared(Logits(logits), hidden, dense, tokens)[1]])
        assert summary == dict.fromkeys(("divergence", "top1_agreement"), "diverged")


def test_positions_that_go_together_do_not_matter(models: tuple[Path, Path], monkeypatch: Patch):
    found = []
    for size in (2**20, 260 * 7):
        monkeypatch.setitem(divergence.AT_A_TIME, "cpu", size)
        _, dense = measure(*through(models[0]), TOKENS)
        found.append((dense, compared(*through(models[1]), dense)))
    assert found[0][1] == found[1][1]
    assert all(torch.equal(one, other) for one, other in zip(found[0][0], found[1][0], strict=True))


def test_the_interval_is_students():
    losses, counts = np.array([2.0, 2.5, 1.9, 2.2]), np.array([63, 63, 63, 12])
    sparsity = counts / counts.sum()
    mean = sparsity @ losses
    error = np.sqrt(sparsity**2 @ (losses - mean) ** 2 * 4 / 3)
    expected = [mean, *stats.t.interval(0.95, 3, mean, error)]
    shown = perplexity_interval(losses.tolist(), counts.tolist())
    assert shown
    assert shown[:3] == pytest.approx(np.exp(expected), rel=1e-12)


def test_a_shorter_window_counts_by_its_predictions():
    assert compute_perplexity([1.0, 3.0], [3, 1]) == float(f"{math.exp(1.5):.6g}")
    assert compute_perplexity([1.0, 3.0], [2, 2]) == float(f"{math.exp(2):.6g}")


def test_windows_are_summarized_over_their_tokens():
    windows = [Divergence([0.0, 0.5, 1.0], 2), Divergence([4.0], 0)]
    found = summarize(windows)
    assert found == {"divergence": {"mean": 1.375}, "top1_agreement": {"mean": 0.5}}


# --- the stages ---


def test_the_pruned_model_is_measured_without_the_dense_one(calibrated_study: Make):
    made = mask_and_apply(calibrated_study())
    perplexity(study=made, model="dense", text="embedded")
    shutil.rmtree(made.model("dense"))
    perplexity(study=made, model="pruned", text="embedded")
    metrics = load_json(made.metrics("pruned", "perplexity/embedded"))
    details = load_json(made.details("pruned", "perplexity/embedded"))
    assert metrics["divergence"]["mean"] > 0
    assert 0 < metrics["top1_agreement"]["mean"] < 1
    assert len(details["divergences"]) == len(details["agreements"]) == 4
    assert load_json(made.metrics("dense", "perplexity/embedded")).keys() == {"perplexity"}
    assert fmean(details["agreements"]) == pytest.approx(metrics["top1_agreement"]["mean"], rel=1e-5)


def test_a_reference_of_other_settings_or_libraries_is_refused(calibrated_study: Make):
    """One of another model: tests/test_trust.py."""
    made = mask_and_apply(calibrated_study())
    with pytest.raises(UserError, match=r"reference/embedded/provenance.json: missing; .*wanda-dvc perplexity dense"):
        perplexity(study=made, model="pruned", text="embedded")
    perplexity(study=made, model="dense", text="embedded")
    with pytest.raises(UserError, match="reference/embedded: measured with windows 4, expected 3.*repro --force"):
        perplexity(study=calibrated_study(perplexity__windows=3), model="pruned", text="embedded")
    provenance = made.reference("embedded") / "provenance.json"
    content = json.loads(provenance.read_text())

    def measured_with(**changes: Any) -> None:
        provenance.write_text(json.dumps(content | {"protocol": content["protocol"] | changes}))

    measured_with(libraries=content["protocol"]["libraries"] | {"torch": "1.0"})
    with pytest.raises(UserError, match="measured with libraries .*1.0.*dvc repro --force --single-item perplexity-de"):
        perplexity(study=calibrated_study(), model="pruned", text="embedded")
    measured_with(libraries={name: f"{x}+cu999" for name, x in content["protocol"]["libraries"].items()})
    perplexity(study=calibrated_study(), model="pruned", text="embedded")


@pytest.mark.parametrize("bos", ["first window", "none"])
def test_the_protocol_says_whether_the_first_window_begins_with_bos(bos: str, study: Make, tmp_path: Path):
    folder = save_tiny_model(tmp_path / "source")
    tokenizer = AutoTokenizer.from_pretrained(folder, bos_token="<s>")
    if bos == "first window":
        begin = ("<s>", tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[begin])
    tokenizer.save_pretrained(folder)
    measured = fetch(study(folder), "model", "perplexity")
    perplexity(study=measured, model="dense", text="embedded")
    assert load_json(measured.details("dense", "perplexity/embedded"))["protocol"]["bos"] == bos
    words = {"first window": "BOS token in the first window only", "none": "no BOS token"}
    assert f", float32, {words[bos]}." in show(study=measured)
