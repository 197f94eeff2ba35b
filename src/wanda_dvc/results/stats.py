"""The statistics as a table: the input norms and their outliers."""

from collections.abc import Mapping
from typing import Any

from wanda_dvc.errors import UserError
from wanda_dvc.pruning.statistics import InputStats, summary
from wanda_dvc.results.markup import DASH, table
from wanda_dvc.study.artifact import PROVENANCE, block_count, check_source, read_provenance
from wanda_dvc.study.files import json_text, load_json
from wanda_dvc.study.folder import Study
from wanda_dvc.study.tensors import read_stats

HEADERS = ["block", "input of", "tokens", "mean", "median", "largest", "> 6 × median", "largest features (index: norm)"]


def stats(*, study: Study, block: int | None, as_json: bool) -> str:
    """Return the input norms by distinct input, of one block or all, as a table, or as JSON."""
    measured_on = read_provenance(study.norms, "calibrate")["model"]
    model = load_json(study.model("dense") / PROVENANCE)
    if model:  # the statistics have to be its
        check_source("stats", measured_on, model, "calibrate")
    count = block_count(study.norms, "calibrate")
    if block is not None and not 0 <= block < count:
        raise UserError(f"--block: got {block}, expected 0 to {count - 1}: the model has {count} blocks")
    records = []
    for index in range(count) if block is None else [block]:
        statistics = read_stats(study.norms, index)
        for name, input_stats in statistics.inputs.items():
            records.append(_record(index, statistics.consumers[name], input_stats))
    if as_json:
        return json_text(records)
    return table(HEADERS, [_row(record) for record in records])


def _record(block: int, linears: list[str], input_stats: InputStats) -> dict[str, Any]:
    """Return the record of a distinct input; its norms are null if no calibration token reached it."""
    norm = input_stats.norm
    values, indices = norm.topk(min(5, len(norm)))
    largest = [{"index": index, "norm": value} for index, value in zip(indices.tolist(), values.tolist(), strict=True)]
    norms: dict[str, Any] = {**summary(norm), "largest": largest}
    if not input_stats.count:
        norms = dict.fromkeys(norms)
    return {"block": block, "linears": linears, "features": len(norm), "tokens": input_stats.count, **norms}


def _row(record: Mapping[str, Any]) -> list[str]:
    cells = [DASH] * 5  # without norms
    if record["tokens"]:
        cells = [f"{record[name]:.4g}" for name in ("mean", "median", "max")]
        cells.append(f"{100 * record['outliers']:.2f} %")
        cells.append("  ".join(f"{feature['index']}: {feature['norm']:.4g}" for feature in record["largest"]))
    consumers = ", ".join(".".join(linear.split(".")[-2:]) for linear in record["linears"])
    return [str(record["block"]), consumers, str(record["tokens"]), *cells]
