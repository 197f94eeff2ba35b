"""Measure a model's perplexity on a text, and its divergence from the dense model, through the engine."""

import contextlib
import itertools
import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from wanda_dvc.engine import shards
from wanda_dvc.engine.divergence import (
    DRAWN,
    TOP,
    Divergence,
    Reference,
    check_vocabulary,
    compare_windows,
    refer_windows,
    summarize,
)
from wanda_dvc.engine.losses import from_losses, unmeasured
from wanda_dvc.engine.rows import Row, as_rows
from wanda_dvc.engine.runner import Runner
from wanda_dvc.engine.windows import cut, left_over, load_tokenizer, tokenize
from wanda_dvc.errors import UserError
from wanda_dvc.params import ALL
from wanda_dvc.reading import DIVERGED
from wanda_dvc.stages import STAGES
from wanda_dvc.stages.inputs import HEAD, check_ready, runner, say_not_finite
from wanda_dvc.stages.running import progress
from wanda_dvc.study.files import Json, finite, write_csv, write_json
from wanda_dvc.study.project import Project, Work
from wanda_dvc.study.protocol import dense_of, differing
from wanda_dvc.study.provenance import describe, digest, read_provenance, tokenizer_digest
from wanda_dvc.study.tensors import read_window, seal, window_file, write_window

LOSSES = "losses.jsonl"


class Measured(NamedTuple):
    """The results of one window."""

    loss: float  # mean, in nats a token
    divergence: Divergence | None  # None of the dense model


def perplexity(*, project: Project, model: str, text: str) -> None:
    """models/{dense,pruned} + data/perplexity/TEXT, reference → metrics/{dense,pruned}/perplexity/TEXT.json."""
    measured = check_ready(project, model, project.params.perplexity.length, "perplexity.length")
    rows, described = windows_of(project, project.model(model), text)
    run_name, reference = f"perplexity {model} {text}", project.reference(text)
    protocol = describe(
        "perplexity",
        version=STAGES["perplexity"].version,
        libraries=("torch", "transformers"),
        model=digest(measured),
        dense=dense_of(model, measured),
        tokenizer_sha256=tokenizer_digest(project.model(model)),
        **described,
        dtype=project.params.dtype,
    )
    if model != "dense":
        protocol |= {"reference": digest(_reference(project, text, protocol, measured["model"]["source"]))}
    with project.work(protocol) as work, runner(project, model, work) as run:
        for step in progress(run.walk(rows), total=len(run.decoder.blocks), what=f"{run_name}, blocks"):
            step.advance()
        dense = reference if model != "dense" else None
        windows = _measure(run, rows, work, dense, run_name)
        losses, divergences = [one.loss for one in windows], [one.divergence for one in windows if one.divergence]
        where = run.not_finite or (None if all(map(math.isfinite, losses)) else HEAD)
        say_not_finite(run_name, where)
        predictions = [len(row.tokens) - 1 for row in rows]
        details: Json = {"protocol": protocol, "losses": [finite(x) for x in losses]}
        metrics: Json = {"perplexity": from_losses(losses, predictions)}
        if divergences:
            metrics |= summarize(divergences)
            details["divergences"] = [finite(math.fsum(one.kl) / len(one.kl)) for one in divergences]
            details["agreements"] = [one.agreed / len(one.kl) if one.finite else DIVERGED for one in divergences]
        write_json(project.details(model, f"perplexity/{text}"), details | ({"not_finite": where} if where else {}))
        write_json(project.metrics(model, f"perplexity/{text}"), metrics)
        if model == "dense":
            made = {"protocol": protocol, "vocabulary": run.decoder.vocabulary, "top": TOP, "drawn": DRAWN}
            seal(work.out, describe("perplexity dense", **made), parts="rows")
            work.publish(reference)
        else:
            _plot(project, f"perplexity/{text}", predictions, _losses(reference, details))
            columns = {"divergence": details["divergences"], "agreement": details["agreements"]}
            _plot(project, f"divergence/{text}", predictions, columns)
            work.forget()


def _losses(reference: Path, details: Json) -> dict[str, list[float | str]]:
    """Return the losses of both models by window; the dense model's are in its reference."""
    read = (read_window(reference, window)["true_log_p"] for window in range(len(details["losses"])))
    return {"dense": [finite(-log_p.double().mean().item()) for log_p in read], "pruned": details["losses"]}


def _plot(project: Project, name: str, predictions: list[int], columns: Mapping[str, Sequence[float | str]]) -> None:
    """Write the windows' values as CSV; a value that is not finite is empty."""
    values = ([value if isinstance(value, float) else "" for value in column] for column in columns.values())
    rows = ([window, *cells] for window, cells in enumerate(zip(predictions, *values, strict=True)))
    write_csv(project.plots(name), ["window", "predictions", *columns], rows)


# --- windows ---


def windows_of(project: Project, model: Path, text: str) -> tuple[list[Row], Json]:
    """Return the windows of a text, cut with a model's tokenizer, and their description for a protocol."""
    source = read_provenance(project.data(f"perplexity/{text}"), "download perplexity")
    tokens = tokenize(project.text(f"perplexity/{text}"), load_tokenizer(model))
    length, count = project.params.perplexity.length, project.params.perplexity.windows
    windows = cut(tokens, length=length, windows=count if isinstance(count, int) else None)
    rest = left_over(tokens, length=length) if count == ALL else None
    described = {
        "text": {key: source[key] for key in ("source", "join", "sha256")},
        "tokens": len(tokens),
        "tokens_sha256": digest(tokens.tolist()),
        "windows": len(windows),
        "length": windows.shape[1],
        "rest": "dropped" if rest is None else len(rest),
        "formula": "exp(mean over windows of the mean loss of its length − 1 predictions)"
        if rest is None
        else "exp(total loss of all predictions / their number); a window's first token is not predicted",
    }
    return as_rows(windows) if rest is None else [*as_rows(windows), Row(rest)], described


def _reference(project: Project, text: str, protocol: Json, dense: str) -> Json:
    """Return the provenance of a text's reference. UserError if it may not be compared with a pruned model's results.

    `protocol` is the pruned model's, and `dense` the name of its dense model.
    """
    found = read_provenance(project.reference(text), "perplexity dense")
    key = differing(found["protocol"], protocol)
    if key == "dense":
        raise UserError(
            f"reference/{text}: measured on another model, expected {dense}, the dense model of models/pruned; "
            "run `dvc repro` or `wanda-dvc perplexity dense`"
        )
    if key:
        again = "`wanda-dvc perplexity dense`"
        raise UserError(
            f"reference/{text}: measured with {key} {found['protocol'].get(key)}, expected {protocol.get(key)}, as "
            f"for the pruned model; run `dvc repro --force --single-item perplexity-dense@{text}` or {again}"
        )
    return found


# --- results ---


def _measure(run: Runner, rows: list[Row], work: Work, dense: Path | None, name: str) -> list[Measured]:
    """Return the results of each window, after the last block; write the dense model's references.

    `dense` is the dense model's reference, for a pruned model.
    An interrupted run resumes at its last finished window.
    """
    work.path.mkdir(parents=True, exist_ok=True)  # workers leave nothing on this machine
    kept = _read(work.path / LOSSES, len(rows), compared=dense is not None)
    if dense is None:  # a reference is written before its line
        written = itertools.takewhile(lambda window: window_file(work.out, window).is_file(), range(len(kept)))
        kept = kept[: len(list(written))]
    (work.path / LOSSES).write_text("".join(_line(row, one) for row, one in enumerate(kept)), encoding="utf-8")
    skipped = unmeasured(len(rows), len(kept))
    found: Iterator[tuple[float, Reference | Divergence]]
    if dense is None:
        found = run.head(refer_windows, skipped.get)
    else:
        check_vocabulary(run.decoder, read_provenance(dense, "perplexity dense")["vocabulary"])
        found = run.head(compare_windows, partial(_references, dense, shards.cut(len(rows)), skipped))
    what = f"{name}, output head, windows"
    with (work.path / LOSSES).open("a", encoding="utf-8") as file:
        for loss, made in progress(found, total=len(rows) - len(kept), what=what):
            if isinstance(made, Reference):
                write_window(work.out, len(kept), made._asdict())
            one = Measured(loss, made if isinstance(made, Divergence) else None)
            file.write(_line(len(kept), one))
            file.flush()
            kept.append(one)
    return kept


def _references(folder: Path, windows: list[range], skipped: Mapping[int, int], shard: int) -> list[Reference] | None:
    """Read the references of a shard's windows after the `skipped` ones; None of a shard that has no number there."""
    if shard not in skipped:
        return None
    return [Reference(**read_window(folder, window)) for window in windows[shard][skipped[shard] :]]


def _line(row: int, one: Measured) -> str:
    """Return the line that stores a row's results, with a checksum, because a kill may truncate it."""
    numbers: list[object] = [row, finite(one.loss)]
    if one.divergence:
        kl, agreed, change = one.divergence
        numbers += [[finite(value) for value in kl], agreed, finite(change)]
    content = json.dumps(numbers)
    return f"{zlib.crc32(content.encode()):08x} {content}\n"


def _read(path: Path, rows: int, *, compared: bool) -> list[Measured]:
    """Return the finished results of an interrupted run, up to the first invalid line."""
    found: list[Measured] = []
    lines = path.read_bytes().decode("utf-8", errors="replace").splitlines(keepends=True) if path.is_file() else []
    for line in lines[:rows]:
        with contextlib.suppress(ValueError, TypeError, OverflowError, RecursionError):
            row, loss, *more = json.loads(line.partition(" ")[2])
            one = Measured(_number(loss), None)
            if compared:
                kl, agreed, change = more
                one = Measured(one.loss, Divergence(list(map(_number, kl)), agreed, _number(change)))
            if line == _line(row, one) and row == len(found):
                found.append(one)
                continue
        break
    return found


def _number(value: float | str) -> float:
    return math.nan if value == DIVERGED else float(value)
