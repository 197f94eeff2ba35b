"""Measure a model's perplexity on a text, and its divergence from the dense model, through the engine."""

import math
from pathlib import Path

from wanda_dvc.engine.activations import OUTPUT_HEAD
from wanda_dvc.engine.divergence import (
    DRAWN,
    TOP,
    Divergence,
    Predictions,
    compute_perplexity,
    diverge,
    measure_windows,
    summarize,
)
from wanda_dvc.engine.sequences import TokenSequence
from wanda_dvc.engine.windows import cut, load_tokenizer, tokenize
from wanda_dvc.errors import UserError
from wanda_dvc.reading import DIVERGED
from wanda_dvc.stages import STAGES
from wanda_dvc.stages.inputs import check_ready, runner
from wanda_dvc.stages.needs import announce
from wanda_dvc.stages.process import progress
from wanda_dvc.study.artifact import describe, digest, finish, read_provenance
from wanda_dvc.study.files import Json, json_number, write_json
from wanda_dvc.study.folder import Study
from wanda_dvc.study.protocol import first_difference, identity
from wanda_dvc.study.tensors import read_window, write_window


def perplexity(*, study: Study, model: str, text: str) -> None:
    """models/{dense,pruned,recovered} + data/perplexity/TEXT, reference → metrics/…/perplexity/TEXT.json."""
    provenance, dtype = check_ready(study, model, study.stage_input("perplexity")["length"], "perplexity.length")
    windows, described = windows_of(study, study.model(model), text)
    identified = identity(STAGES["perplexity"].version, provenance, study.model(model))
    protocol = describe("perplexity", libraries=("torch", "transformers"), **identified, **described, dtype=dtype)
    if model != "dense":
        protocol |= {"reference": digest(_reference_provenance(study, text, protocol))}
    with study.work(protocol) as work:
        run = runner(study, model, work)
        announce(study, "perplexity", run.decoder.sizes)
        run_name = f"perplexity {model} {text}"
        blocks = len(run.decoder.blocks)
        steps = run.forward(windows)
        for step in progress(steps, total=blocks, what=f"{run_name}, blocks", at=lambda step: step.index):
            step.run()
        losses, divergences = list[float](), list[Divergence]()

        def reference(window: int) -> Predictions:
            return Predictions(**read_window(study.reference(text), window))

        results = run.map_outputs(measure_windows, lambda places: [] if model == "dense" else [*map(reference, places)])
        shown = progress(results, total=len(windows), what=f"{run_name}, output head, windows")
        for window, (loss, predicted) in enumerate(shown):
            losses.append(loss)
            if model == "dense":
                write_window(work.out, window, predicted._asdict())
            else:
                divergences.append(diverge(reference(window), predicted))
        not_finite = run.progress.first_not_finite or (None if all(map(math.isfinite, losses)) else OUTPUT_HEAD)
        predictions = [len(window.tokens) - 1 for window in windows]
        details = _details(protocol, losses, divergences, not_finite)
        metrics: Json = {"perplexity": compute_perplexity(losses, predictions)}
        if divergences:
            metrics |= summarize(divergences)
        write_json(study.details(model, f"perplexity/{text}"), details)
        write_json(study.metrics(model, f"perplexity/{text}"), metrics)
        if model == "dense":
            vocabulary = run.decoder.sizes.vocabulary
            made_from = describe("perplexity dense", protocol=protocol, vocabulary=vocabulary, top=TOP, drawn=DRAWN)
            finish(work.out, made_from, unit="rows")
            work.commit(study.reference(text))
        else:
            work.discard()


def _details(protocol: Json, losses: list[float], divergences: list[Divergence], not_finite: str | None) -> Json:
    details: Json = {"protocol": protocol, "losses": [json_number(loss) for loss in losses]}
    if divergences:
        details["divergences"] = [json_number(window.mean) for window in divergences]
        details["agreements"] = [window.agreement if window.finite else DIVERGED for window in divergences]
    if not_finite:
        details["not_finite"] = not_finite
    return details


def windows_of(study: Study, model: Path, text: str) -> tuple[list[TokenSequence], Json]:
    """Return the windows of a text, cut with a model's tokenizer, and their description for a protocol."""
    source = read_provenance(study.data(f"perplexity/{text}"), "download perplexity")
    tokenizer = load_tokenizer(model)
    tokens = tokenize(study.text(f"perplexity/{text}"), tokenizer)
    settings = study.stage_input("perplexity")
    length = settings["length"]
    windows = cut(tokens, length=length, windows=settings["windows"], name=f"perplexity.texts.{text}")
    rest = len(windows[-1]) if len(windows[-1]) < length else 0  # tokens of a shorter last window
    described = {
        "text": {key: source[key] for key in ("source", "join", "sha256")},
        "tokens": len(tokens),
        "tokens_sha256": digest(tokens.tolist()),
        "windows": len(windows) - 1 if rest else len(windows),
        "length": length,
        "rest": rest or "dropped",
        "bos": "first window" if int(tokens[0]) == tokenizer.bos_token_id else "none",
    }
    return [TokenSequence(window) for window in windows], described


def _reference_provenance(study: Study, text: str, protocol: Json) -> Json:
    """Return the provenance of a text's reference. UserError if another model's `protocol` is not comparable."""
    provenance = read_provenance(study.reference(text), "perplexity dense")
    key = first_difference(provenance["protocol"], protocol)
    if key:
        raise UserError(
            f"reference/{text}: measured with {key} {provenance['protocol'].get(key)}, expected {protocol.get(key)}, "
            f"as for the model that is compared; run `dvc repro --force --single-item perplexity-dense@{text}`"
        )
    return provenance
