"""The statistics as a table: the input norms, their outliers, and the layer errors of a pruned model."""

import contextlib
from collections.abc import Mapping
from typing import Any

from wanda_dvc.errors import UserError
from wanda_dvc.pruning.statistics import InputStats, summary
from wanda_dvc.results.markup import table
from wanda_dvc.stages.apply import describe_pruned
from wanda_dvc.study.artifact import PROVENANCE, block_count, check_source, digest, read_provenance
from wanda_dvc.study.files import json_text, load_json
from wanda_dvc.study.folder import Study
from wanda_dvc.study.tensors import read_stats

INPUTS = ["block", "input of", "tokens", "mean", "median", "largest", "> 6 × median", "largest features (index: norm)"]


def stats(*, study: Study, layer: int | None, as_json: bool) -> str:
    """Return the input norms by distinct input, of one block or all, as a table, or as JSON.

    Each input also lists the layer errors of its readers, if they were measured with these statistics.
    """
    measured_on = read_provenance(study.stats, "calibrate")["model"]
    model = load_json(study.model("dense") / PROVENANCE)  # if it exists, the statistics have to be its
    check_source("stats", measured_on, model or measured_on, "calibrate")
    blocks = block_count(study.stats, "calibrate")
    if layer is not None and not 0 <= layer < blocks:
        raise UserError(f"--layer: got {layer}, expected 0 to {blocks - 1}: the model has {blocks} blocks")
    records, errors = [], dict[str, float]()
    pruned = load_json(study.details("pruned", "layer_error"))
    with contextlib.suppress(UserError):  # nothing is pruned
        if pruned.get("linears") and pruned["protocol"]["model"] == digest(describe_pruned(study)):
            errors = {linear: one["error"] for linear, one in pruned["linears"].items()}
    for block in range(blocks) if layer is None else [layer]:
        measured = read_stats(study.stats, block)
        records += [_summary(block, measured.consumers[name], x, errors) for name, x in measured.inputs.items()]
    if as_json:
        return json_text(records)
    rows = []
    for record in records:
        linears = ", ".join(map(_last_word, record["linears"]))
        numbers = ["–"] * 5
        if record["tokens"]:
            numbers = [f"{record[name]:.4g}" for name in ("mean", "median", "max")]
            numbers.append(f"{100 * record['outliers']:.2f} %")
            numbers.append("  ".join(f"{one['index']}: {one['norm']:.4g}" for one in record["largest"]))
        found = [", ".join(f"{100 * x:.2f} %" for x in record["layer_error"].values())] if errors else []
        rows.append([record["block"], linears, str(record["tokens"]), *numbers, *found])
    return table([*INPUTS, "layer error"] if errors else INPUTS, rows)


def _summary(block: int, linears: list[str], x: InputStats, errors: Mapping[str, float]) -> dict[str, Any]:
    top = x.norm.topk(min(5, len(x.norm)))
    largest = [{"index": int(index), "norm": float(value)} for value, index in zip(*top, strict=True)]
    known = {**summary(x.norm), "largest": largest}
    record = {"block": block, "linears": linears, "features": len(x.norm), "tokens": x.count}
    own = {"layer_error": {name: errors[name] for name in linears if name in errors}} if errors else {}
    return record | (known if x.count else dict.fromkeys(known)) | own


def _last_word(linear: str) -> str:
    """Of a linear's name, and an expert's number with it."""
    words = linear.split(".")
    is_expert = words[-2].isdecimal() and sum(word.isdecimal() for word in words) > 1  # the first counts blocks
    return ".".join(words[-2:] if is_expert else words[-1:])
