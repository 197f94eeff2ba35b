"""Measure a model's perplexity on a text, and its divergence from the dense model, through the engine."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from wanda_dvc.engine import divergence
from wanda_dvc.engine.sequences import TokenSequence
from wanda_dvc.engine.windows import cut, load_tokenizer, tokenize
from wanda_dvc.errors import UserError
from wanda_dvc.reading import DIVERGED
from wanda_dvc.stages import STAGES
from wanda_dvc.stages.inputs import HEAD, check_ready, runner, say_not_finite
from wanda_dvc.stages.needs import announce
from wanda_dvc.stages.process import progress
from wanda_dvc.study.artifact import describe, digest, finish, read_provenance
from wanda_dvc.study.files import Json, json_number, write_csv, write_json
from wanda_dvc.study.folder import Study
from wanda_dvc.study.protocol import differing, identity
from wanda_dvc.study.tensors import read_window, write_window


def perplexity(*, study: Study, model: str, text: str) -> None:
    """models/{dense,pruned,recovered} + data/perplexity/TEXT, reference → metrics/…/perplexity/TEXT.json."""
    measured, dtype = check_ready(study, model, study.stage_input("perplexity")["length"], "perplexity.length")
    announce(study, "perplexity", model, text)
    rows, described = windows_of(study, study.model(model), text)
    run_name, reference = f"perplexity {model} {text}", study.reference(text)
    own = identity(STAGES["perplexity"].version, measured, study.model(model))
    protocol = describe("perplexity", libraries=("torch", "transformers"), **own, **described, dtype=dtype)
    dense = None if model == "dense" else _reference(study, text, protocol)
    if dense:
        protocol |= {"reference": digest(dense)}

    def references(shard: range) -> list[divergence.Reference | None]:
        return [divergence.Reference(**read_window(reference, window)) if dense else None for window in shard]

    with study.work(protocol) as work:
        run = runner(study, model, work)
        what, blocks = f"{run_name}, blocks", len(run.decoder.blocks)
        for step in progress(run.forward(rows), total=blocks, what=what, at=lambda step: step.index):
            step.run()
        losses, divergences = list[float](), list[divergence.Divergence]()  # losses: means of windows, in nats a token
        heads = run.head(divergence.measure_windows, references)
        for place, (loss, one) in enumerate(progress(heads, total=len(rows), what=f"{run_name}, output head, windows")):
            losses.append(loss)
            if isinstance(one, divergence.Reference):  # the dense model's own
                write_window(work.out, place, one._asdict())
            else:
                divergences.append(one)
        where = run.progress.not_finite or (None if all(map(math.isfinite, losses)) else HEAD)
        say_not_finite(run_name, where)
        predictions = [len(row.tokens) - 1 for row in rows]
        details: Json = {"protocol": protocol, "losses": [json_number(x) for x in losses]}
        metrics: Json = {"perplexity": divergence.from_losses(losses, predictions)}
        if divergences:
            metrics |= divergence.summarize(divergences)
            details["divergences"] = [json_number(math.fsum(one.kl) / len(one.kl)) for one in divergences]
            details["agreements"] = [one.agreed / len(one.kl) if one.finite else DIVERGED for one in divergences]
        write_json(study.details(model, f"perplexity/{text}"), details | ({"not_finite": where} if where else {}))
        write_json(study.metrics(model, f"perplexity/{text}"), metrics)
        if dense is None:
            kept: Json = {"top": divergence.TOP, "drawn": divergence.DRAWN}
            made = describe("perplexity dense", protocol=protocol, vocabulary=run.decoder.vocabulary, **kept)
            finish(work.out, made, unit="rows")
            work.commit(reference)
        else:
            work.discard()
        if model == "pruned":
            known = (read_window(reference, window)["true_log_p"] for window in range(len(rows)))
            both = {
                "dense": [json_number(-log_p.double().mean().item()) for log_p in known],
                "pruned": details["losses"],
            }
            _plot(study, f"perplexity/{text}", predictions, both)
            columns = {"divergence": details["divergences"], "agreement": details["agreements"]}
            _plot(study, f"divergence/{text}", predictions, columns)


def _plot(study: Study, name: str, predictions: list[int], columns: Mapping[str, Sequence[float | str]]) -> None:
    """Write the windows' values as CSV; a value that is not finite is empty."""
    values = ([value if isinstance(value, float) else "" for value in column] for column in columns.values())
    rows = ([window, *cells] for window, cells in enumerate(zip(predictions, *values, strict=True)))
    write_csv(study.plots(name), ["window", "predictions", *columns], rows)


def windows_of(study: Study, model: Path, text: str) -> tuple[list[TokenSequence], Json]:
    """Return the windows of a text, cut with a model's tokenizer, and their description for a protocol."""
    source = read_provenance(study.data(f"perplexity/{text}"), "download perplexity")
    tokenizer = load_tokenizer(model)
    tokens = tokenize(study.text(f"perplexity/{text}"), tokenizer)
    settings, name = study.stage_input("perplexity"), f"perplexity.texts.{text}"
    length = settings["length"]
    windows = cut(tokens, length=length, windows=settings["windows"], name=name)
    rest = len(windows[-1]) if len(windows[-1]) < length else None
    described = {
        "text": {key: source[key] for key in ("source", "join", "sha256")},
        "tokens": len(tokens),
        "tokens_sha256": digest(tokens.tolist()),
        "windows": len(windows) - (rest is not None),
        "length": length,
        "rest": rest or "dropped",
        "bos": "first window" if int(tokens[0]) == tokenizer.bos_token_id else "none",
        "formula": "exp(mean over windows of the mean loss of its length − 1 predictions)"
        if rest is None
        else "exp(total loss of all predictions / their number); a window's first token is not predicted",
    }
    return [TokenSequence(window) for window in windows], described


def _reference(study: Study, text: str, protocol: Json) -> Json:
    """Return the provenance of a text's reference. UserError if another model's `protocol` is not comparable."""
    found = read_provenance(study.reference(text), "perplexity dense")
    key = differing(found["protocol"], protocol)
    if key is None:
        return found
    # DVC knows no versions of libraries, so it would not run the stage again.
    again = f"dvc repro{f' --force --single-item perplexity-dense@{text}' if key == 'libraries' else ''}"
    raise UserError(
        f"reference/{text}: measured with {key} {found['protocol'].get(key)}, expected {protocol.get(key)}, as for the "
        f"model that is compared; run `{again}` or `wanda-dvc perplexity dense`"
    )
