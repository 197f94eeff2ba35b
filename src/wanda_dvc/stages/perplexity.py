"""Measure a model's perplexity on a text, through the engine."""

import json
import math
from pathlib import Path

import torch

from wanda_dvc.artifacts import Project, describe, digest, read_provenance, write_json
from wanda_dvc.blocks import Decoder
from wanda_dvc.stages import STAGES, progress
from wanda_dvc.stages.calibrate import open_decoder
from wanda_dvc.windows import cut, load_tokenizer, tokenize

DIVERGED = "diverged"


def perplexity(*, project: Project, model: str) -> None:
    """models/{dense,pruned} + data/perplexity → metrics/{dense,pruned}/perplexity.json"""
    params, folder = project.params, project.model(model)
    made_by = "download model" if model == "dense" else "apply"
    text = read_provenance(project.data("perplexity"), "download perplexity")
    tokens = tokenize(project.text("perplexity"), load_tokenizer(folder))
    windows = cut(tokens, length=params.perplexity.length, windows=params.perplexity.windows)
    protocol = describe(
        "perplexity",
        version=STAGES["perplexity"],
        libraries=("torch", "transformers"),
        model=digest(read_provenance(folder, made_by)),
        text={key: text[key] for key in ("source", "join", "sha256")},
        tokens=len(tokens),
        tokens_sha256=digest(tokens.tolist()),
        windows=len(windows),
        length=windows.shape[1],
        rest="dropped",
        dtype=params.dtype,
        formula="exp(mean over windows of the mean loss of its length − 1 predictions)",
    )
    with project.work(protocol) as work:
        decoder = open_decoder(project, model)
        for step in progress(
            decoder.walk(windows, work.path), total=len(decoder.blocks), what=f"perplexity {model}, blocks"
        ):
            step.advance()
        losses: list[float] = _read_losses(work.path / "losses.json")
        rest = list(range(len(losses), len(windows)))
        hidden = decoder.outputs(windows, work.path)
        for row in progress(rest, total=len(rest), what="output head, windows"):
            losses.append(window_loss(decoder, hidden[row : row + 1], windows[row]))
            write_json(work.path / "losses.json", [_finite(loss) for loss in losses])
        write_json(project.details(model, "perplexity"), {"protocol": protocol, "losses": [_finite(x) for x in losses]})
        write_json(project.metrics(model, "perplexity"), {"perplexity": from_losses(losses)})
        work.forget()


def window_loss(decoder: Decoder, hidden: torch.Tensor, tokens: torch.Tensor) -> float:
    """Mean cross-entropy, in nats, of each token but the first given those before it."""
    targets = tokens[1:].to(decoder.device)
    total = 0.0
    for positions, logits in decoder.logits(hidden, tokens):
        wanted = targets[positions.start : positions.stop]  # one fewer in the last chunk: it predicts past the end
        total += torch.nn.functional.cross_entropy(logits[: len(wanted)].float(), wanted, reduction="sum").item()
    return total / len(targets)


def from_losses(losses: list[float]) -> float | str:
    """exp(mean), to six significant digits: what comes after them differs from machine to machine."""
    mean = math.fsum(losses) / len(losses)
    if not mean < math.log(torch.finfo(torch.float64).max):
        return DIVERGED
    return float(f"{math.exp(mean):.6g}")


def _read_losses(path: Path) -> list[float]:
    """The losses of the windows that a killed run had finished."""
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    return [math.nan if loss == DIVERGED else loss for loss in stored]


def _finite(loss: float) -> float | str:
    return loss if math.isfinite(loss) else DIVERGED
