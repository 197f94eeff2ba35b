"""Measure a model's perplexity on a text, through the engine."""

import json
import math
from pathlib import Path

import torch

from wanda_dvc.engine.decoder import Decoder, Row, as_rows
from wanda_dvc.engine.windows import cut, left_over, load_tokenizer, tokenize
from wanda_dvc.stages import STAGES, progress
from wanda_dvc.stages.calibrate import open_decoder
from wanda_dvc.study.files import write_csv, write_json
from wanda_dvc.study.project import Project
from wanda_dvc.study.provenance import describe, digest, read_provenance, tokenizer_digest

DIVERGED = "diverged"


def perplexity(*, project: Project, model: str) -> None:
    """models/{dense,pruned} + data/perplexity → metrics/{dense,pruned}/perplexity.json"""
    params, folder = project.params, project.model(model)
    made_by = "download model" if model == "dense" else "apply"
    text = read_provenance(project.data("perplexity"), "download perplexity")
    tokens = tokenize(project.text("perplexity"), load_tokenizer(folder))
    length, count = params.perplexity.length, params.perplexity.windows
    windows = cut(tokens, length=length, windows=count)
    rest = left_over(tokens, length=length, windows=count) if params.perplexity.rest == "kept" else None
    protocol = describe(
        "perplexity",
        version=STAGES["perplexity"],
        libraries=("torch", "transformers"),
        model=digest(read_provenance(folder, made_by)),
        tokenizer_sha256=tokenizer_digest(folder),
        text={key: text[key] for key in ("source", "join", "sha256")},
        tokens=len(tokens),
        tokens_sha256=digest(tokens.tolist()),
        windows=len(windows),
        length=windows.shape[1],
        rest="dropped" if rest is None else len(rest),
        dtype=params.dtype,
        formula="exp(mean over windows of the mean loss of its length − 1 predictions)"
        if rest is None
        else "exp(total loss of all predictions / their number); a window's first token is not predicted",
    )
    with project.work(protocol) as work:
        decoder = open_decoder(project, model)
        rows = as_rows(windows) if rest is None else [*as_rows(windows), Row(rest)]
        losses = _losses(decoder, rows, work.path, what=f"perplexity {model}")
        predictions = [len(row.tokens) - 1 for row in rows]
        write_json(project.details(model, "perplexity"), {"protocol": protocol, "losses": [_finite(x) for x in losses]})
        write_json(project.metrics(model, "perplexity"), {"perplexity": from_losses(losses, predictions)})
        plotted = zip(predictions, [loss if math.isfinite(loss) else "" for loss in losses], strict=True)
        headers = ["window", "predictions", "loss"]
        write_csv(project.plots(f"{model}/perplexity"), headers, ([i, *pair] for i, pair in enumerate(plotted)))
        work.forget()


def _losses(decoder: Decoder, rows: list[Row], work: Path, *, what: str) -> list[float]:
    """Each row's mean loss; what a killed run has in `work` is gone on from."""
    for step in progress(decoder.walk(rows, work), total=len(decoder.blocks), what=f"{what}, blocks"):
        step.advance()
    losses: list[float] = _read_losses(work / "losses.json")
    left = range(len(losses), len(rows))
    hidden = decoder.outputs(rows, work)
    for row in progress(left, total=len(left), what=f"{what}, output head, windows"):
        losses.append(window_loss(decoder, hidden[row][None], rows[row].tokens))
        write_json(work / "losses.json", [_finite(loss) for loss in losses])
    return losses


def window_loss(decoder: Decoder, hidden: torch.Tensor, tokens: torch.Tensor) -> float:
    """Mean cross-entropy, in nats, of each token but the first given those before it."""
    targets = tokens[1:].to(decoder.device)
    total = 0.0
    for positions, logits in decoder.logits(hidden, tokens):
        wanted = targets[positions.start : positions.stop]  # one fewer in the last chunk: it predicts past the end
        total += torch.nn.functional.cross_entropy(logits[: len(wanted)].float(), wanted, reduction="sum").item()
    return total / len(targets)


def from_losses(losses: list[float], predictions: list[int]) -> float | str:
    """exp(total loss / predictions), to six significant digits: what comes after them differs from machine to machine.

    `losses` are windows' means. Where all windows are of one length it is exp(mean), as the papers write it.
    """
    equal = len(set(predictions)) == 1  # then the weights would only round
    weighted = losses if equal else [loss * count for loss, count in zip(losses, predictions, strict=True)]
    mean = math.fsum(weighted) / (len(losses) if equal else sum(predictions))
    if not mean < math.log(torch.finfo(torch.float64).max):
        return DIVERGED
    return float(f"{math.exp(mean):.6g}")


def _read_losses(path: Path) -> list[float]:
    """The losses of the windows that a killed run had finished."""
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    return [math.nan if loss == DIVERGED else loss for loss in stored]


def _finite(loss: float) -> float | str:
    return loss if math.isfinite(loss) else DIVERGED
