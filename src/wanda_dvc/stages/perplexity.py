"""Measure a model's perplexity on a text, and its divergence from the dense model, through the engine."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from wanda_dvc.engine.divergence import (
    DRAWN,
    TOP,
    Divergence,
    Reference,
    check_vocabulary,
    from_losses,
    measure_windows,
    summarize,
)
from wanda_dvc.engine.rows import Row
from wanda_dvc.engine.walk import Runner
from wanda_dvc.engine.windows import cut, load_tokenizer, tokenize
from wanda_dvc.errors import UserError
from wanda_dvc.params import ALL
from wanda_dvc.reading import DIVERGED
from wanda_dvc.stages import STAGES
from wanda_dvc.stages.inputs import HEAD, check_ready, model_dtype, runner, say_not_finite
from wanda_dvc.stages.running import progress
from wanda_dvc.study.files import Json, finite, write_csv, write_json
from wanda_dvc.study.project import Project, Work
from wanda_dvc.study.provenance import dense_of, describe, differing, digest, read_provenance, tokenizer_digest
from wanda_dvc.study.tensors import read_window, seal, window_file, write_window

FINISHED = "windows.jsonl"  # the results of finished windows, a line each


class Measured(NamedTuple):
    """The results of one window."""

    loss: float  # mean, in nats a token
    divergence: Divergence | None  # None of the dense model


def perplexity(*, project: Project, model: str, text: str) -> None:
    """models/{dense,pruned} + data/perplexity/TEXT, reference → metrics/{dense,pruned}/perplexity/TEXT.json."""
    measured = check_ready(project, model, project.planned("perplexity")["length"], "perplexity.length")
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
        dtype=model_dtype(project, model),
    )
    dense = None if model == "dense" else _reference(project, text, protocol, measured["model"]["source"])
    if dense:
        protocol |= {"reference": digest(dense)}
    with project.work(protocol) as work, runner(project, model, work) as run:
        if dense:
            check_vocabulary(run.decoder, dense["vocabulary"])
        for step in progress(run.walk(rows), total=len(run.decoder.blocks), what=f"{run_name}, blocks"):
            step.advance()
        windows = _measure(run, len(rows), work, reference if dense else None, run_name)
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
        if dense is None:
            made: Json = {"protocol": protocol, "vocabulary": run.decoder.vocabulary, "top": TOP, "drawn": DRAWN}
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
    planned = project.planned("perplexity")
    length, count = planned["length"], planned["windows"]
    windows = cut(
        tokens,
        length=length,
        windows=count if isinstance(count, int) else None,
        all_tokens=count == ALL,
        name=f"perplexity.texts.{text}",
    )
    rest = len(windows[-1]) if len(windows[-1]) < length else None
    described = {
        "text": {key: source[key] for key in ("source", "join", "sha256")},
        "tokens": len(tokens),
        "tokens_sha256": digest(tokens.tolist()),
        "windows": len(windows) - (rest is not None),
        "length": length,
        "rest": rest or "dropped",
        "formula": "exp(mean over windows of the mean loss of its length − 1 predictions)"
        if rest is None
        else "exp(total loss of all predictions / their number); a window's first token is not predicted",
    }
    return [Row(window) for window in windows], described


def _reference(project: Project, text: str, protocol: Json, dense: str) -> Json:
    """Return the provenance of a text's reference. UserError if it may not be compared with a pruned model's results.

    `protocol` is the pruned model's, and `dense` the name of its dense model.
    """
    found = read_provenance(project.reference(text), "perplexity dense")
    key = differing(found["protocol"], protocol)
    if key is None:
        return found
    said = f"measured with {key} {found['protocol'].get(key)}, expected {protocol.get(key)}, as for the pruned model"
    if key == "dense":
        said = f"measured on another model, expected {dense}, the dense model of models/pruned"
    # DVC knows no versions of libraries, so it would not run the stage again.
    again = f"dvc repro{f' --force --single-item perplexity-dense@{text}' if key == 'libraries' else ''}"
    raise UserError(f"reference/{text}: {said}; run `{again}` or `wanda-dvc perplexity dense`")


# --- results ---


def _measure(run: Runner, windows: int, work: Work, dense: Path | None, name: str) -> list[Measured]:
    """Return the results of each window, after the last block; write the dense model's references.

    `dense` is the folder of the dense model's references, for a pruned model.
    An interrupted run resumes at its last finished window.
    """
    work.path.mkdir(parents=True, exist_ok=True)  # workers leave nothing on this machine
    kept = _finished(work, dense)
    done = len(kept)

    def references(shard: range) -> list[Reference | None] | None:
        """Return the references of a shard's unfinished windows; None if all are finished."""
        rest = range(max(shard.start, done), shard.stop)
        return [Reference(**read_window(dense, window)) if dense else None for window in rest] or None

    found = run.head(measure_windows, references)
    with (work.path / FINISHED).open("a", encoding="utf-8") as file:
        for loss, made in progress(found, total=windows - done, what=f"{name}, output head, windows"):
            if isinstance(made, Reference):
                write_window(work.out, len(kept), made._asdict())
            kept.append(Measured(loss, made if isinstance(made, Divergence) else None))
            file.write(json.dumps(kept[-1]) + "\n")
            file.flush()
    return kept


def _finished(work: Work, dense: Path | None) -> list[Measured]:
    """Return the finished results of an interrupted run, and remove a line that a kill cut off."""
    path = work.path / FINISHED
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    lines = [line for line in lines if line.endswith("\n")]
    if dense is None:  # a reference is written before its line, but may have been published already
        lines = lines[: sum(window_file(work.out, window).is_file() for window in range(len(lines)))]
    path.write_text("".join(lines), encoding="utf-8")
    found = [json.loads(line) for line in lines]
    return [Measured(loss, Divergence(*divergence) if divergence else None) for loss, divergence in found]
