"""Views of the input norms: a plot, the recurring outliers, and a comparison of two sets of statistics."""

import json
import math
import textwrap
from collections import defaultdict
from pathlib import Path
from typing import Any

from tabulate import tabulate

from wanda_dvc.errors import UserError
from wanda_dvc.report.norms import input_norms
from wanda_dvc.study.files import Json
from wanda_dvc.study.project import Project
from wanda_dvc.study.provenance import PROVENANCE, read_provenance
from wanda_dvc.study.tensors import block_count, read_stats
from wanda_dvc.views.show import check_layer

TITLE_WIDTH = 80  # letters that a line of a picture's title holds
SHOWN = 20  # rows of a table; JSON lists all


def plot(*, folder: Path, target: Path, layer: int | None = None) -> str:
    """Draw the norms as a PNG, with the outliers marked: by block and feature, or of one block by feature."""
    import matplotlib  # noqa: F401 - a missing library is told before anything is read

    from wanda_dvc.pruning.statistics import OUTLIER
    from wanda_dvc.report.charts import block_norms, norms, png

    if target.suffix.lower() != ".png":
        raise UserError(f"--plot: got {target.name}, expected a name that ends in .png")
    target.parent.mkdir(parents=True, exist_ok=True)
    provenance = read_provenance(folder, "calibrate")
    if layer is None:
        figure, what = norms(input_norms(folder)), "by block, and below them which features are outliers"
    else:
        check_layer(folder, layer)
        measured = read_stats(folder, layer)
        inputs = [(measured.label(name), x.norm.tolist()) for name, x in measured.inputs.items()]
        figure, what = block_norms(inputs, OUTLIER), f"of block {layer} by feature"
    lines = [
        f"Input norms ‖X‖₂ {what.partition(',')[0]}: {provenance['model']['source']}",
        _described(provenance),
        f"outlier: a feature of more than {OUTLIER} times the median norm of its input",
    ]
    figure.suptitle("\n".join("\n".join(textwrap.wrap(line, TITLE_WIDTH)) for line in lines), fontsize=9)
    png(figure, target)
    return f"{target}: norms {what}"


def recurring(*, folder: Path, as_json: bool) -> str:
    """Return the features that are outliers in several blocks, by distinct input, most blocks first.

    Inputs taken from the residual stream share their feature indices: a feature that is listed for attention's input
    and for the MLP's is one direction of the stream.
    """
    records: list[Json] = []
    for one in input_norms(folder):
        by_feature: dict[int, list[tuple[int, float]]] = defaultdict(list)
        for block, feature, _, ratio in one.outliers:
            by_feature[feature].append((block, ratio))
        for feature, places in by_feature.items():
            blocks = sorted({block for block, _ in places})  # several experts of one may have it
            if len(blocks) > 1:
                largest = max(ratio for _, ratio in places)
                records.append({"input": one.label, "feature": feature, "blocks": blocks, "largest_ratio": largest})
    records.sort(key=lambda record: (-len(record["blocks"]), record["input"], record["feature"]))
    if as_json:
        return json.dumps(records, indent=2)
    if not records:
        return "No feature is an outlier in more than one block."
    total = block_count(folder, "calibrate")
    rows = [
        [r["input"], r["feature"], f"{len(r['blocks'])} of {total}", _spans(r["blocks"]), f"{r['largest_ratio']:.1f} ×"]
        for r in records[:SHOWN]
    ]
    headers = ["input of", "feature", "blocks", "which", "at most, of the median"]
    return _table(rows, headers, len(records))


def compare(*, project: Project, other: str, as_json: bool) -> str:
    """Compare this study's statistics with another's: a stats directory, a study, an experiment or a revision."""
    path = Path(other)
    for folder in (path, path / "norms", path / "stats/norms"):
        if (folder / PROVENANCE).is_file() and block_count(folder, "calibrate"):
            return _compare(project.stats, folder, other, as_json)
    if path.exists():
        raise UserError(f"--compare: {other}: no statistics, expected a directory that `wanda-dvc calibrate` wrote")
    from wanda_dvc.study.revisions import Revision

    with project.work({"kind": "stats", "revision": other}) as work:
        work.forget()
        study = Project(work.path / "study")
        study.root.mkdir(parents=True)
        revision = Revision.open(project, other, otherwise="`--compare DIRECTORY` needs none")
        if missing := revision.take("stats/norms", study):
            raise UserError(
                f"{other}: {missing[0]} is not in DVC's cache, expected all of stats/norms; `dvc pull --all-commits` "
                f"fetches it where a remote has it, `dvc exp apply {other}` and `dvc repro calibrate` compute it again"
            )
        table = _compare(project.stats, study.stats, other, as_json)
        work.forget()
    return table


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
            # Where the other is 0, or one was never read, there is no relative change.
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
        return json.dumps({"here": _made(here), "other": _made(there), "inputs": records}, indent=2)
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
    headers = [
        "block",
        "input of",
        "correlation",
        "mean change",
        "largest change",
        "outliers gained",
        "lost",
        "0 there",
    ]
    title = (
        f"stats/ ({_described(here)}) against {name} ({_described(there)}): the root mean square of each input "
        "feature, changes relative to the latter."
    )
    return f"{title}\n\n{tabulate(rows, headers, tablefmt='github', disable_numparse=True)}"


def _made(provenance: Json) -> Json:
    return {key: provenance[key] for key in ("model", "text", "params") if key in provenance}


def _described(provenance: Json) -> str:
    params = provenance["params"]
    return f"{params['samples']} windows of {params['length']} tokens of {provenance['text']['source']}"


def _numbers(values: list[int]) -> str:
    return ", ".join(map(str, values[:5])) + (f" and {len(values) - 5} more" if len(values) > 5 else "") or "–"


def _spans(blocks: list[int]) -> str:
    """Spell blocks as ranges: `0, 3–7`."""
    spans: list[list[int]] = []
    for block in blocks:
        if spans and spans[-1][1] == block - 1:
            spans[-1][1] = block
        else:
            spans.append([block, block])
    return ", ".join(f"{first}–{last}" if first != last else f"{first}" for first, last in spans)


def _table(rows: list[list[Any]], headers: list[str], total: int) -> str:
    table = tabulate(rows, headers, tablefmt="github", disable_numparse=True)
    return table + (f"\n\nand {total - len(rows)} more; --json lists all" if total > len(rows) else "")
