"""Views of the statistics: a table of the input norms, recurring outliers, and a comparison with other statistics."""

import math
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanda_dvc.errors import UserError
from wanda_dvc.stages.inputs import stats_provenance
from wanda_dvc.study.files import Json, json_text, load_json
from wanda_dvc.study.markup import table
from wanda_dvc.study.project import Project
from wanda_dvc.study.provenance import PROVENANCE, digest, read_provenance
from wanda_dvc.study.tensors import block_count, read_stats

if TYPE_CHECKING:
    from wanda_dvc.pruning.statistics import InputStats

SHOWN = 20  # rows of a table; JSON lists all
INPUTS = ["block", "input of", "tokens", "mean", "median", "largest", "> 6 × median", "largest features (index: norm)"]
RECURRING = ["input of", "feature", "blocks", "which", "at most, of the median"]
COMPARED = [
    "block", "input of", "correlation", "mean change", "largest change", "outliers gained", "lost", "0 there",
]  # fmt: skip


def stats(*, project: Project, layer: int | None, as_json: bool, linear: str | None = None) -> str:
    """Return the input norms by distinct input, of one block or all, or of one linear: as a table, or as JSON.

    Each input also lists the layer errors of its readers, if they were measured with these statistics.
    """
    check(project)
    blocks = block_count(project.stats, "calibrate")
    if layer is not None and not 0 <= layer < blocks:
        raise UserError(f"--layer: got {layer}, expected 0 to {blocks - 1}: the model has {blocks} blocks")
    records = []
    for block in range(blocks) if layer is None else [layer]:
        measured = read_stats(project.stats, block)
        records += [_summary(block, measured.readers[name], x) for name, x in measured.inputs.items()]
    if linear is not None:
        every = [name for record in records for name in record["linears"]]
        records = [r for r in records if any(f".{name}".endswith(f".{linear}") for name in r["linears"])]
        if not records:
            last = sorted({name.rpartition(".")[2] for name in every})
            raise UserError(f"--linear: got {linear}, expected a linear's name or its end: {', '.join(last)}")
    if errors := _layer_errors(project):
        for record in records:
            record["layer_error"] = {name: errors[name] for name in record["linears"] if name in errors}
    if as_json:
        return json_text(records)
    rows = [
        [
            record["block"],
            ", ".join(map(_last_word, record["linears"])),
            str(record["tokens"]),
            *("–" if record[name] is None else f"{record[name]:.4g}" for name in ("mean", "median", "max")),
            "–" if record["outliers"] is None else f"{100 * record['outliers']:.2f} %",
            "  ".join(f"{feature['index']}: {feature['norm']:.4g}" for feature in record["largest"]),
            *([", ".join(f"{100 * x:.2f} %" for x in record["layer_error"].values())] if errors else []),
        ]
        for record in records
    ]
    return table([*INPUTS, "layer error"] if errors else INPUTS, rows)


def recurring(*, project: Project, as_json: bool) -> str:
    """Return the features that are outliers in several blocks, by distinct input, most blocks first.

    Inputs from the residual stream share feature indices: a feature listed for the inputs of attention and of the MLP
    is one direction of the stream.
    """
    from wanda_dvc.pruning.statistics import outliers

    check(project)
    total = block_count(project.stats, "calibrate")
    found: dict[tuple[str, int], list[tuple[int, float]]] = defaultdict(list)  # by input and feature: block and ratio
    for block in range(total):
        measured = read_stats(project.stats, block)
        for name, x in measured.inputs.items():
            norm, label = x.norm, measured.label(name)
            ratios = norm / norm.quantile(0.5)
            for feature in outliers(norm).nonzero().flatten().tolist():
                found[label, feature].append((block, ratios[feature].item()))
    records: list[Json] = []
    for (label, feature), places in found.items():
        blocks = sorted({block for block, _ in places})  # several experts of one may have it
        if len(blocks) > 1:
            largest = max(ratio for _, ratio in places)
            record = {"input": label, "feature": feature, "blocks": blocks}
            records.append(record | {"largest_ratio": largest if math.isfinite(largest) else None})  # median 0
    records.sort(key=lambda record: (-len(record["blocks"]), record["input"], record["feature"]))
    if as_json:
        return json_text(records)
    if not records:
        return "No feature is an outlier in more than one block."
    rows = [
        [
            r["input"],
            r["feature"],
            f"{len(r['blocks'])} of {total}",
            _spans(r["blocks"]),
            "–" if r["largest_ratio"] is None else f"{r['largest_ratio']:.1f} ×",
        ]
        for r in records[:SHOWN]
    ]
    more = f"\n\nand {len(records) - SHOWN} more; --json lists all" if len(records) > SHOWN else ""
    return table(RECURRING, rows) + more


def compare(*, project: Project, other: str, as_json: bool) -> str:
    """Compare this study's statistics with another's: a stats directory, a study, an experiment or a revision."""
    check(project)
    path = Path(other)
    for folder in (path, path / project.stats.name, Project(path).stats):
        if (folder / PROVENANCE).is_file() and block_count(folder, "calibrate"):
            return _compare(project.stats, folder, other, as_json)
    if path.exists():
        raise UserError(f"--compare: {other}: no statistics, expected a directory that `wanda-dvc calibrate` wrote")
    from wanda_dvc.study.dvc import Revision

    with project.work({"kind": "stats", "revision": other}) as work:
        work.forget()
        study = Project(work.path / "study")
        study.root.mkdir(parents=True)
        revision = Revision.open(project.root, other, otherwise="`--compare DIRECTORY` needs none")
        if missing := revision.take(project.stats.relative_to(project.root).as_posix(), study.root):
            raise UserError(
                f"{other}: {missing[0]} is not in DVC's cache, expected all of stats/norms; `dvc pull --all-commits` "
                f"fetches it where a remote has it, `dvc exp apply {other}` and `dvc repro calibrate` compute it again"
            )
        compared = _compare(project.stats, study.stats, other, as_json)
        work.forget()
    return compared


def _compare(ours: Path, theirs: Path, name: str, as_json: bool) -> str:
    import torch

    from wanda_dvc.pruning.statistics import outliers

    here, there = read_provenance(ours, "calibrate"), read_provenance(theirs, "calibrate")
    records: list[Json] = []
    blocks, others = block_count(ours, "calibrate"), block_count(theirs, "calibrate")
    if blocks != others:
        raise UserError(f"--compare: {name}: {others} blocks, expected {blocks} as in stats/")
    for block in range(blocks):
        mine, other = read_stats(ours, block), read_stats(theirs, block)
        for key, x in mine.inputs.items():
            if key not in other.inputs or len(other.inputs[key].sum) != len(x.sum):
                raise UserError(
                    f"--compare: {name}: no input of {key} with {len(x.sum)} features, expected the same model"
                )
            # Root mean squares, because the number of tokens may differ.
            a, b = (one.sum_squares.div(one.count).sqrt().float() for one in (x, other.inputs[key]))
            # No relative change if the other is 0, or one input was never read.
            excited = a.isfinite() & b.isfinite() & (b > 0)
            change = torch.where(excited, (a - b).abs() / b.where(excited, 1), 0)
            correlation = torch.corrcoef(torch.stack([a, b]))[0, 1].item() if len(a) > 1 else math.nan
            gained, lost = outliers(a) & ~outliers(b), outliers(b) & ~outliers(a)
            records.append(
                {
                    "block": block,
                    "input": mine.label(key),
                    "correlation": correlation if math.isfinite(correlation) else None,  # None: constant, or never read
                    "largest_change": change.max().item(),
                    "at_feature": int(change.argmax()),
                    "mean_change": (change.sum() / excited.sum().clamp(min=1)).item(),
                    "excited_here_alone": (~excited & (a > 0)).nonzero().flatten().tolist(),
                    "outliers_gained": gained.nonzero().flatten().tolist(),
                    "outliers_lost": lost.nonzero().flatten().tolist(),
                }
            )
    if as_json:
        return json_text({"here": _made(here), "other": _made(there), "inputs": records})
    rows = [
        [
            r["block"],
            r["input"],
            "–" if r["correlation"] is None else f"{r['correlation']:.4f}",
            f"{100 * r['mean_change']:.1f} %",
            f"{100 * r['largest_change']:.1f} % (feature {r['at_feature']})",
            _numbers(r["outliers_gained"]),
            _numbers(r["outliers_lost"]),
            _numbers(r["excited_here_alone"]),
        ]
        for r in records
    ]
    title = (
        f"stats/ ({_described(here)}) against {name} ({_described(there)}): the root mean square of each input "
        "feature, changes relative to the latter."
    )
    return f"{title}\n\n{table(COMPARED, rows)}"


def _layer_errors(project: Project) -> dict[str, float]:
    """Return the layer error of every linear; empty if it belongs to other masks or Gram matrices."""
    from wanda_dvc.stages.apply import describe_pruned

    measured = load_json(project.details("pruned", "layer_error"))
    if not measured.get("linears"):
        return {}
    try:
        made_from = describe_pruned(project)
    except UserError:
        return {}
    if measured["protocol"]["model"] != digest(made_from):
        return {}
    return {linear: measures["error"] for linear, measures in measured["linears"].items()}


def check(project: Project) -> None:
    """Raise UserError without statistics, or if they are of another model than models/dense (if it exists)."""
    model = load_json(project.model("dense") / PROVENANCE)
    stats_provenance(project, model or read_provenance(project.stats, "calibrate")["model"])


def _summary(block: int, linears: list[str], x: "InputStats") -> dict[str, Any]:
    from wanda_dvc.pruning.statistics import summary

    norm = x.norm
    top = norm.topk(min(5, len(norm)))
    known: dict[str, Any] = {
        **summary(norm),
        "largest": [
            {"index": index, "norm": value}
            for value, index in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        ],
    }
    nothing: dict[str, Any] = {name: [] if name == "largest" else None for name in known}
    record = {"block": block, "linears": linears, "features": len(norm), "tokens": x.count}
    return record | (known if x.count else nothing)


def _last_word(linear: str) -> str:
    """Of a linear's name, and an expert's number with it."""
    words = linear.split(".")
    is_expert = words[-2].isdecimal() and sum(word.isdecimal() for word in words) > 1  # the first counts blocks
    return ".".join(words[-2:] if is_expert else words[-1:])


def _made(provenance: Json) -> Json:
    return {key: provenance[key] for key in ("model", "text", "params") if key in provenance}


def _described(provenance: Json) -> str:
    params = provenance["params"]
    return f"{params['windows']} windows of {params['length']} tokens of {provenance['text']['source']}"


def _numbers(values: list[int]) -> str:
    return ", ".join(map(str, values[:5])) + (f" and {len(values) - 5} more" if len(values) > 5 else "") or "–"


def _spans(blocks: list[int]) -> str:
    """Format blocks as ranges: `0, 3–7`."""
    spans: list[list[int]] = []
    for block in blocks:
        if spans and spans[-1][1] == block - 1:
            spans[-1][1] = block
        else:
            spans.append([block, block])
    return ", ".join(f"{first}–{last}" if first != last else f"{first}" for first, last in spans)
