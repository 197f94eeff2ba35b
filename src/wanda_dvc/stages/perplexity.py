"""Measure a model's perplexity on a text, through the engine."""

import contextlib
import json
import math
import zlib
from pathlib import Path

from wanda_dvc.engine.losses import from_losses, unmeasured, window_losses
from wanda_dvc.engine.rows import Row, as_rows
from wanda_dvc.engine.runner import Runner
from wanda_dvc.engine.windows import cut, left_over, load_tokenizer, tokenize
from wanda_dvc.params import ALL
from wanda_dvc.reading import DIVERGED
from wanda_dvc.stages import STAGES
from wanda_dvc.stages.inputs import HEAD, check_ready, model_provenance, runner, say_not_finite
from wanda_dvc.stages.running import progress
from wanda_dvc.study.files import finite, write_csv, write_json
from wanda_dvc.study.project import Project
from wanda_dvc.study.provenance import describe, digest, tokenizer_digest
from wanda_dvc.study.unchanged import read_input

LOSSES = "losses.jsonl"


def perplexity(*, project: Project, model: str) -> None:
    """models/{dense,pruned} + data/perplexity → metrics/{dense,pruned}/perplexity.json."""
    params, folder = project.params, project.model(model)
    check_ready(project, model, params.perplexity.length, "perplexity.length")
    measured = model_provenance(project, model)
    text = read_input(project, project.data("perplexity"), "download perplexity")
    tokens = tokenize(project.text("perplexity"), load_tokenizer(folder))
    length, asked = params.perplexity.length, params.perplexity.windows
    windows = cut(tokens, length=length, windows=asked if isinstance(asked, int) else None)
    rest = left_over(tokens, length=length) if asked == ALL else None
    protocol = describe(
        "perplexity",
        version=STAGES["perplexity"].version,
        libraries=("torch", "transformers"),
        model=digest(measured),
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
    with project.work(protocol) as work, runner(project, model, work) as run:
        rows = as_rows(windows) if rest is None else [*as_rows(windows), Row(rest)]
        losses = _losses(run, rows, work.path, what=f"perplexity {model}")
        where = run.not_finite or (None if all(map(math.isfinite, losses)) else HEAD)
        say_not_finite(f"perplexity {model}", where)
        predictions = [len(row.tokens) - 1 for row in rows]
        details = {"protocol": protocol, "losses": [finite(x) for x in losses]}
        write_json(project.details(model, "perplexity"), details | ({"not_finite": where} if where else {}))
        write_json(project.metrics(model, "perplexity"), {"perplexity": from_losses(losses, predictions)})
        plotted = zip(predictions, [loss if math.isfinite(loss) else "" for loss in losses], strict=True)
        headers = ["window", "predictions", "loss"]
        write_csv(project.plots(f"{model}/perplexity"), headers, ([i, *pair] for i, pair in enumerate(plotted)))
        work.forget()


def _losses(run: Runner, rows: list[Row], work: Path, *, what: str) -> list[float]:
    """Return each row's mean loss; resume from the losses of an interrupted run in `work`."""
    for step in progress(run.walk(rows), total=len(run.decoder.blocks), what=f"{what}, blocks"):
        step.advance()
    work.mkdir(parents=True, exist_ok=True)  # workers leave nothing on this machine
    losses = _read_losses(work / LOSSES, len(rows))
    done, left = len(losses), len(rows) - len(losses)
    found = run.head(window_losses, unmeasured(len(rows), done))
    with (work / LOSSES).open("a", encoding="utf-8") as file:
        for loss in progress(found, total=left, what=f"{what}, output head, windows"):
            file.write(_line(len(losses), loss))
            file.flush()
            losses.append(loss)
    return losses


def _line(row: int, loss: float) -> str:
    """Return the line that stores a row's loss, with a checksum, because a kill may truncate it."""
    content = json.dumps([row, finite(loss)])
    return f"{zlib.crc32(content.encode()):08x} {content}\n"


def _read_losses(path: Path, rows: int) -> list[float]:
    """Return the finished losses of an interrupted run, and drop all after the first invalid line."""
    losses: list[float] = []
    lines = path.read_bytes().decode("utf-8", errors="replace").splitlines(keepends=True) if path.is_file() else []
    for line in lines[:rows]:
        with contextlib.suppress(ValueError, TypeError, OverflowError, RecursionError):
            row, loss = json.loads(line.partition(" ")[2])
            value = math.nan if loss == DIVERGED else float(loss)
            if line == _line(row, value) and row == len(losses):
                losses.append(value)
                continue
        break
    path.write_text("".join(_line(row, loss) for row, loss in enumerate(losses)), encoding="utf-8")
    return losses
