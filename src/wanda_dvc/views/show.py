"""Tables of what the stages measured."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from wanda_dvc.errors import UserError
from wanda_dvc.report.allocations import Result, against_uniform, is_uniform_of
from wanda_dvc.stages import MODELS, times
from wanda_dvc.study.files import Json, load_json
from wanda_dvc.study.local import changed_sources
from wanda_dvc.study.markup import number
from wanda_dvc.study.project import Project
from wanda_dvc.study.provenance import PROVENANCE, digest, measured_alike, read_provenance
from wanda_dvc.study.ran import Ran
from wanda_dvc.study.settings import flatten
from wanda_dvc.study.tensors import block_count, read_stats
from wanda_dvc.study.times import machine_of

if TYPE_CHECKING:
    from wanda_dvc.pruning.statistics import InputStats

UNIFORM = "dvc exp run -S allocation=uniform -S allocation_strength=null"
HEADERS = ["", "dense", "pruned", "pruned / dense"]


def show(*, project: Project, as_json: bool = False) -> str:
    """The last results, dense beside pruned, and what they are results of: as a table, or as JSON."""
    ran = Ran.of(project)
    made = project.with_params(ran.params)
    if as_json:
        return json.dumps(_records(project, ran, made), indent=2)
    parts = [
        _title(made),
        staleness(ran),
        "\n".join(changed_sources(project)),
        tabulate(comparison(made), HEADERS, tablefmt="github", disable_numparse=True),
    ]
    parts += [*_footnotes(made), *_beside_uniform(made, ran), _times(made)]
    return "\n\n".join(part for part in parts if part)


def _records(project: Project, ran: Ran, made: Project) -> Json:
    """The same as numbers, with all that is said beside the table."""
    shown = [line for line in _title(made).splitlines() if line]
    return {
        "made_with": ran.params.model_dump(mode="json", exclude={"runtime"}),
        "not_run": ran.unmet,
        "stale": ran.stale,
        "results": {model: _figures(made, model) for model in MODELS},
        "notes": [*shown, *changed_sources(project), *_footnotes(made), *_beside_uniform(made, ran)],
        "times": times(made, made.times),
    }


def _figures(project: Project, model: str) -> Json:
    """What was measured of one model; null where nothing was."""
    result = Result.of(project, model)
    figures: Json = {"perplexity": result.perplexity}
    figures["zero_shot"] = {
        task: load_json(project.metrics(model, f"zero_shot/{task}"))
        | {"standard_errors": load_json(project.details(model, f"zero_shot/{task}")).get("standard_errors", {})}
        for task in project.params.tasks.names
    }
    if model == "pruned":
        figures["sparsity"] = load_json(project.metrics(model, "sparsity")).get("sparsity")
        figures["layer_error"] = result.layer_error
    return figures


def staleness(ran: Ran) -> str:
    """Say which settings have not run and which stages are stale; nothing where the results are those asked for."""
    lines = []
    if ran.unmet:
        asked = ", ".join(f"{name}={value}" for name, value in ran.unmet.items())
        lines.append(f"params.yaml asks for {asked}, which has not run: `dvc repro` runs it.")
    if ran.stale:
        lines.append(f"Stale: {', '.join(ran.stale)}.")
    return "\n".join(lines)


def comparison(project: Project) -> list[list[str]]:
    """Every measure, dense beside pruned, as rows under `HEADERS`; a dash where nothing was measured."""
    params = project.params
    rows = []
    dense, pruned = (Result.of(project, model) for model in MODELS)
    perplexities, apart = (dense.perplexity, pruned.perplexity), measured_apart(project)
    rows.append(["perplexity", *map(number, perplexities), "" if "perplexity" in apart else _ratio(*perplexities)])
    accuracies: dict[str, list[float]] = {model: [] for model in MODELS}
    for task in params.tasks.names:
        both = [load_json(project.metrics(model, f"zero_shot/{task}")) for model in MODELS]
        cells = []
        for model, result in zip(MODELS, both, strict=True):
            if "acc" in result:
                accuracies[model].append(result["acc"])
                errors = load_json(project.details(model, f"zero_shot/{task}")).get("standard_errors", {})
                cells.append(f"{100 * result['acc']:.1f}" + (f" ± {100 * errors['acc']:.1f}" if errors else ""))
            else:
                cells.append("–")
        retained = "" if task in apart else _retained(*(result.get("acc") for result in both))
        rows.append([f"{task}, acc %", *cells, retained])
    means = [
        sum(values) / len(values) if values and len(values) == len(params.tasks.names) else None
        for values in accuracies.values()
    ]
    if params.tasks.names:
        cells = [f"{100 * mean:.1f}" if mean is not None else "–" for mean in means]
        rows.append(["mean, acc %", *cells, "" if {*apart} & {*params.tasks.names} else _retained(*means)])
    if pruned.layer_error is not None:
        rows.append(["layer error, mean", "–", f"{pruned.layer_error:.4f}", ""])
    sparsity = load_json(project.metrics("pruned", "sparsity")).get("sparsity")
    rows.append(["measured sparsity", "–", "–" if sparsity is None else f"{sparsity:.4f}", ""])
    return rows


def measured_apart(project: Project) -> list[str]:
    """Return what was measured of both models, but not on the same windows or items, or not known to be.

    Of metrics alone, as a clone has them before its outputs are there, nothing is known: `dvc.lock` has them together.
    """
    apart = []
    for name in ("perplexity", *project.params.tasks.names):
        measure = name if name == "perplexity" else f"zero_shot/{name}"
        told = [load_json(project.details(model, measure)).get("protocol") for model in MODELS]
        both = all(load_json(project.metrics(model, measure)) for model in MODELS)
        if both and any(told) and not measured_alike(*told):
            apart.append(name)
    return apart


def not_compared(apart: list[str]) -> str:
    """Say what is not compared, and why."""
    return f"The two models are not compared in {', '.join(apart)}: not known to be of the same windows or items."


def _solved(project: Project) -> dict[str, Json]:
    """Return the layer error of every linear, and how it was solved for; none without Gram matrices."""
    linears: dict[str, Json] = load_json(project.details("pruned", "layer_error")).get("linears", {})
    return linears


def _title(project: Project) -> str:
    """What the masks at hand were made by, and where models/pruned is not of them."""
    masks = load_json(project.masks / PROVENANCE)
    if not masks:
        return f"{project.params.model}: no masks yet; `dvc repro` makes them."
    made = masks["params"]
    group = f", group {made['group']}" if made["pattern"] == "unstructured" else ""
    if made["propagation"] != "dense":
        group += f", propagation {made['propagation']}"
    if made.get("allocation", "uniform") != "uniform":
        group += f", allocation {made['allocation']}"
    if project.params.plan.reconstruction.name != "none":
        group += f", reconstruction {project.params.plan.reconstruction.name}"
    lines = [
        f"{masks['model']['source']}: {made['method']}, sparsity {made['sparsity']:g}, pattern {made['pattern']}{group}"
    ]
    pruned = load_json(project.model("pruned") / PROVENANCE)
    if not pruned:
        lines.append("models/pruned is not there (it is not cached): `dvc repro` makes it.")
    elif pruned["masks"] != digest(masks):
        other = pruned["params"]
        lines.append(
            f"models/pruned is still that of another experiment ({other['method']}, sparsity {other['sparsity']:g}, "
            f"pattern {other['pattern']}): `dvc repro` makes this one's."
        )
    return "\n".join(lines)


def _footnotes(project: Project) -> list[str]:
    notes = list(_notes_on_layers(project))
    tasks = [load_json(project.data("tasks") / name / PROVENANCE) for name in project.params.tasks.names]
    if any(task.get("samples") for task in tasks):
        notes.append(
            "The tasks are samples written for this project, not the benchmarks: "
            "they compare these two models and nothing else."
        )
    if apart := measured_apart(project):
        notes.append(f"{not_compared(apart)} `dvc repro` measures both models on the same windows and items.")
    told = {model: load_json(project.details(model, "perplexity")).get("protocol") for model in MODELS}
    known = {model: protocol for model, protocol in told.items() if protocol}
    alike = measured_alike(*told.values())
    for model, protocol in [*known.items()][: 1 if alike else None]:
        notes.append(
            f"Perplexity{'' if alike else f' of the {model} model'}: {protocol['windows']} windows of "
            f"{protocol['length']} tokens of {protocol['text']['source']} (sha256 {protocol['text']['sha256'][:12]}…), "
            f"{protocol['dtype']}."
        )
    if known and tasks:
        limit = project.params.zero_shot.limit
        notes[-1] += (
            f" Zero-shot: no examples, {f'first {limit} items' if limit else 'all items'}; ± is one standard error: "
            "differences of less than two are within luck."
        )
    for model in MODELS:
        measured = ["perplexity", *(f"zero_shot/{name}" for name in project.params.tasks.names)]
        broken = dict.fromkeys(load_json(project.details(model, name)).get("not_finite") for name in measured)
        notes += [f"{model}: activations are not finite from here on: {where}." for where in broken if where]
    return notes


def _notes_on_layers(project: Project) -> Iterator[str]:
    """Say where outputs are off most, and what a reconstruction did beside its own steps."""
    linears = _solved(project)
    if not linears:
        return
    worst = max(linears, key=lambda name: linears[name]["error"])
    masked = sum(told["masked"] for told in linears.values()) / len(linears)
    yield (
        f"Layer error: how far a linear's output on the calibration text is off, ‖(W−Ŵ)X‖² / ‖WX‖². The largest is "
        f"{linears[worst]['error']:.4f}, of {worst}. With the same masks and no reconstruction the mean is "
        f"{masked:.4f}."
    )
    rows = sum(told.get("unchanged", 0) for told in linears.values())
    if rows:
        yield f"{rows} rows kept their weights, because the reconstruction's have no lower error."
    if short := {name: told["part"] for name, told in linears.items() if told.get("part", 1) < 1}:
        least = min(short, key=lambda name: short[name])
        yield (
            f"{len(short)} linears go a part of the way from the weights of least-squares to those of fisher, as far "
            f"as their layer error stays below their mask's; least far {least}, {100 * short[least]:.0f} %."
        )
    if raised := {name: told["damping"] for name, told in linears.items() if told.get("raised")}:
        most = max(raised, key=lambda name: raised[name])
        yield (
            f"The Gram matrices of {len(raised)} linears are not positive definite with the damping asked for: it was "
            f"raised, most for {most}, to {raised[most]:g} of the mean diagonal."
        )
    if dead := {name: told["dead"] for name, told in linears.items() if told.get("dead")}:
        yield f"{sum(dead.values())} features that {len(dead)} linears read are 0 on the calibration text."


def _beside_uniform(project: Project, ran: Ran) -> Iterator[str]:
    """Say what another allocation than `uniform` gives beside it, by the experiments of the repository."""
    from wanda_dvc.report.rows import collect
    from wanda_dvc.study.experiments import SUCCESS, WORKSPACE, list_experiments

    name, own = project.params.plan.allocation.name, Result.of(project)
    if name == "uniform" or own == (None, None) or ran.torn:  # torn: some figure is still another experiment's
        return
    settings = dict(flatten(project.params.model_dump(mode="json", exclude={"runtime"})))
    try:
        states = list_experiments(project)
    except UserError:  # no repository
        return
    for one in states:
        if one.state != SUCCESS or one.rev == WORKSPACE or not is_uniform_of(one.settings, settings):
            continue
        with tempfile.TemporaryDirectory() as work:
            for row in collect(project=project, model=None, revs=[one.rev], work=Path(work)).rows:
                if said := against_uniform(own, Result.of(row.study)):
                    yield f"Allocation {name} against uniform, all else equal ({one.name}): {said}."
                    return
    yield (
        f"Whether allocation {name} helps is not known: no experiment has uniform, all else equal. One: `{UNIFORM}`."
    )


def _times(project: Project) -> str:
    """Return a table of the runs that made the results at hand."""
    known = times(project, project.times)
    if not known:
        return ""
    rows = [[run, f"{time['seconds']:.1f}", peak_memory(time)] for run, time in known.items()]
    rows.append(["all", f"{sum(time['seconds'] for time in known.values()):.1f}", ""])
    machines = sorted({machine_of(time) for time in known.values()})
    table = tabulate(rows, ["stage", "seconds", "peak anonymous memory, GB"], tablefmt="github", disable_numparse=True)
    resident = any("peak_anonymous_gb" not in time for time in known.values())
    mapped = " * with mapped checkpoint pages, which this system does not tell apart." if resident else ""
    return f"{table}\n\nMeasured on {'; '.join(machines)}.{mapped}"


def peak_memory(time: dict[str, Any]) -> str:
    """Return a run's peak anonymous memory in GB, or with a star the resident peak."""
    anonymous = time.get("peak_anonymous_gb")
    return f"{anonymous:.2f}" if anonymous is not None else f"{time['peak_resident_gb']:.2f} *"


def stats(*, project: Project, layer: int | None, as_json: bool, linear: str | None = None) -> str:
    """The input norms of every distinct input, of one block or of all, or of one linear: as a table, or as JSON.

    With the layer errors of the linears that read it, where the pruned model at hand was measured on its Gram matrix.
    """
    read_provenance(project.stats, "calibrate")
    blocks = block_count(project.stats, "calibrate")
    if layer is not None:
        check_layer(project.stats, layer)
    _belongs(project)
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
        return json.dumps(records, indent=2)
    rows = [
        [
            record["block"],
            ", ".join(map(_last_word, record["linears"])),
            str(record["tokens"]),
            *(_short(record[name]) for name in ("mean", "median", "max")),
            "–" if record["outliers"] is None else f"{100 * record['outliers']:.2f} %",
            "  ".join(f"{feature['index']}: {feature['norm']:.4g}" for feature in record["largest"]),
            *([", ".join(f"{100 * x:.2f} %" for x in record["layer_error"].values())] if errors else []),
        ]
        for record in records
    ]
    headers = [
        "block",
        "input of",
        "tokens",
        "mean",
        "median",
        "largest",
        "> 6 × median",
        "largest features (index: norm)",
        *(["layer error"] if errors else []),
    ]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def _layer_errors(project: Project) -> dict[str, float]:
    """Return the layer error of every linear; none unless the masks and Gram matrices at hand are behind them."""
    from wanda_dvc.stages.apply import describe_pruned

    measured = load_json(project.details("pruned", "layer_error"))
    if not measured.get("linears"):
        return {}
    try:
        made_from = describe_pruned(project, project.params.plan.reconstruction.name)
    except UserError:
        return {}
    if measured["protocol"]["model"] != digest(made_from):
        return {}
    return {linear: told["error"] for linear, told in measured["linears"].items()}


def check_layer(folder: Path, layer: int) -> None:
    """UserError if there are no statistics of that block."""
    blocks = block_count(folder, "calibrate")
    if not 0 <= layer < blocks:
        raise UserError(f"--layer: got {layer}, expected 0 to {blocks - 1}: the model has {blocks} blocks")


def check_stats(project: Project) -> None:
    """UserError if there are no statistics, or not the model's that is there."""
    read_provenance(project.stats, "calibrate")
    _belongs(project)


def _belongs(project: Project) -> None:
    """UserError if the statistics are not the model's that is there."""
    measured = read_provenance(project.stats, "calibrate")["model"]
    model = load_json(project.model("dense") / PROVENANCE)
    if model and model["sha256"] != measured["sha256"]:
        raise UserError(
            f"stats/: measured on {measured['source']}, expected {model['source']}, the model in models/dense; "
            "run `dvc repro` or `wanda-dvc calibrate`"
        )


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


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _ratio(dense: float | str | None, pruned: float | str | None) -> str:
    if isinstance(dense, float) and isinstance(pruned, float):
        return f"{pruned / dense:.2f} ×"
    return ""


def _retained(dense: float | None, pruned: float | None) -> str:
    return f"{100 * pruned / dense:.1f} % retained" if dense and pruned is not None else ""
