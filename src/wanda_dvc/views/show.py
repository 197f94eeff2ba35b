"""The last results, dense and pruned side by side."""

from collections.abc import Iterator

from wanda_dvc.report.measures import mean_layer_error
from wanda_dvc.stages import MODELS, times
from wanda_dvc.study.files import Json, json_text, load_json
from wanda_dvc.study.held_out import raised
from wanda_dvc.study.local import gone_sources
from wanda_dvc.study.markup import number, table
from wanda_dvc.study.project import Project
from wanda_dvc.study.provenance import PROVENANCE, digest, measured_alike
from wanda_dvc.study.ran import Ran
from wanda_dvc.study.times import machine_of

HEADERS = ["", "dense", "pruned", "pruned / dense"]


def show(*, project: Project, as_json: bool = False) -> str:
    """Return the last results, dense and pruned, with their settings: as a table, or as JSON."""
    ran = Ran.of(project)
    made = project.with_params(ran.params)
    title, sources = _title(made), gone_sources(project)
    notes = list(_footnotes(made))
    if as_json:
        return json_text(
            {
                "made_with": ran.params.filled.model_dump(mode="json", exclude={"runtime"}),
                "not_run": ran.unmet,
                "stale": ran.stale,
                "results": {model: _figures(made, model) for model in MODELS},
                "notes": [*title, *sources, *notes],
                "times": times(made, made.times),
            }
        )
    parts = [
        "\n".join(title),
        staleness(ran),
        "\n".join(sources),
        table(HEADERS, comparison(made)),
        *notes,
        _times(made),
    ]
    return "\n\n".join(part for part in parts if part)


def measured(project: Project, model: str) -> dict[str, tuple[Json, Json]]:
    """Return the metrics and the details of a model's perplexity, and then of each task by name; empty if missing."""
    answered = load_json(project.metrics(model, "zero_shot"))
    details = load_json(project.details(model, "zero_shot")).get("tasks", {})
    own = load_json(project.metrics(model, "perplexity")), load_json(project.details(model, "perplexity"))
    tasks = {task: (answered.get(task, {}), details.get(task, {})) for task in project.params.tasks.names}
    return {"perplexity": own, **tasks}


def _figures(project: Project, model: str) -> Json:
    """Return the measures of one model; null if missing."""
    found = measured(project, model)
    figures: Json = {"perplexity": found["perplexity"][0].get("perplexity")}
    figures["zero_shot"] = {
        task: found[task][0] | {"standard_errors": found[task][1].get("standard_errors", {})}
        for task in project.params.tasks.names
    }
    if model == "pruned":
        figures |= {"sparsity": None} | load_json(project.metrics("pruned", "sparsity"))
        figures["layer_error"] = mean_layer_error(project)
    return figures


def staleness(ran: Ran) -> str:
    """Return a sentence on settings without a run and stale stages; empty if the results are current."""
    lines = []
    if ran.unmet:
        asked = ", ".join(f"{name}={value}" for name, value in ran.unmet.items())
        lines.append(f"params.yaml asks for {asked}, which has not run: `dvc repro` runs it.")
    if ran.stale:
        lines.append(f"Stale: {', '.join(ran.stale)}.")
    return "\n".join(lines)


def comparison(project: Project) -> list[list[str]]:
    """Return every measure, dense and pruned, as rows under `HEADERS`; a dash if missing."""
    dense, pruned = (measured(project, model) for model in MODELS)
    apart, tasks = measured_apart(project), project.params.tasks.names
    perplexities = [one["perplexity"][0].get("perplexity") for one in (dense, pruned)]
    rows = [["perplexity", *map(number, perplexities), "" if "perplexity" in apart else _ratio(*perplexities)]]
    accuracies: list[list[float | None]] = []
    for task in tasks:
        both = [one[task][0].get("acc") for one in (dense, pruned)]
        errors = [one[task][1].get("standard_errors", {}).get("acc") for one in (dense, pruned)]
        rows.append([f"{task}, acc %", *map(_percent, both, errors), "" if task in apart else _retained(*both)])
        accuracies.append(both)
    if tasks:
        means = [None if None in one else sum(one) / len(one) for one in zip(*accuracies, strict=True)]
        rows.append(["mean, acc %", *map(_percent, means), "" if {*apart} & {*tasks} else _retained(*means)])
    error, measures = mean_layer_error(project), load_json(project.metrics("pruned", "sparsity"))
    sparsity, removed = measures.get("sparsity"), measures.get("removed_parameters")
    if error is not None:
        rows.append(["layer error, mean", "–", f"{error:.4f}", ""])
    rows.append(["measured sparsity", "–", "–" if sparsity is None else f"{sparsity:.4f}", ""])
    if removed is not None:
        rows.append(["parameters removed", "–", f"{100 * removed:.1f} %", ""])
    return rows


def measured_apart(project: Project) -> list[str]:
    """Return measures of both models that differ, or may differ, in windows or items.

    Metrics alone, as in a new clone without outputs, count as comparable: one `dvc.lock` has both.
    """
    apart = []
    dense, pruned = (measured(project, model) for model in MODELS)
    for name in dense:
        (metrics, details), (others, theirs) = dense[name], pruned[name]
        protocols = details.get("protocol"), theirs.get("protocol")
        if metrics and others and any(protocols) and not measured_alike(*protocols):
            apart.append(name)
    return apart


def not_compared(apart: list[str]) -> str:
    """Return the reason for missing comparisons."""
    return f"The two models are not compared in {', '.join(apart)}: not known to be of the same windows or items."


def _title(project: Project) -> list[str]:
    """Describe the settings of the current masks, and whether models/pruned has other masks."""
    masks = load_json(project.masks / PROVENANCE)
    if not masks:
        return [f"{project.params.model}: no masks yet; `dvc repro` makes them."]
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
    return lines


def _footnotes(project: Project) -> Iterator[str]:
    for problem in raised(load_json(project.metrics("pruned", "held_out"))):
        yield f"Warning: {problem}."
    yield from _notes_on_layers(load_json(project.details("pruned", "layer_error")).get("linears", {}))
    names = project.params.tasks.names
    if any(load_json(project.data("tasks") / name / PROVENANCE).get("samples") for name in names):
        yield (
            "The tasks are samples written for this project, not the benchmarks: "
            "they compare these two models and nothing else."
        )
    if apart := measured_apart(project):
        yield f"{not_compared(apart)} `dvc repro` measures both models on the same windows and items."
    details = {model: {name: one for name, (_, one) in measured(project, model).items()} for model in MODELS}
    protocols = {model: of["perplexity"].get("protocol", {}) for model, of in details.items()}
    alike = measured_alike(*(protocol or None for protocol in protocols.values()))
    for model, protocol in [one for one in protocols.items() if one[1]][: 1 if alike else None]:
        yield (
            f"Perplexity{'' if alike else f' of the {model} model'}: {protocol['windows']} windows of "
            f"{protocol['length']} tokens of {protocol['text']['source']} (sha256 {protocol['text']['sha256'][:12]}…), "
            f"{protocol['dtype']}."
        )
    if any(of[name] for of in details.values() for name in names):
        limit = project.params.zero_shot.limit
        yield (
            f"Zero-shot: no examples, {f'first {limit} items' if limit else 'all items'}; ± is one standard error: "
            "differences of less than two are within luck."
        )
    for model, of in details.items():
        for where in dict.fromkeys(one["not_finite"] for one in of.values() if "not_finite" in one):
            yield f"{model}: activations are not finite from here on: {where}."


def _notes_on_layers(linears: dict[str, Json]) -> Iterator[str]:
    """Describe the largest layer error and raised dampings; empty without Gram matrices."""
    if not linears:
        return
    worst = max(linears, key=lambda name: linears[name]["error"])
    masked = sum(told["masked"] for told in linears.values()) / len(linears)
    yield (
        f"Layer error: how far a linear's output on the calibration text is off, ‖(W−Ŵ)X‖² / ‖WX‖². The largest is "
        f"{linears[worst]['error']:.4f}, of {worst}. With the same masks and no reconstruction the mean is "
        f"{masked:.4f}."
    )
    if raised := {name: told["damping"] for name, told in linears.items() if told.get("raised")}:
        most = max(raised, key=lambda name: raised[name])
        yield (
            f"The Gram matrices of {len(raised)} linears are not positive definite with the damping asked for: it was "
            f"raised, most for {most}, to {raised[most]:g} of the mean diagonal."
        )


def _times(project: Project) -> str:
    """Return a table of the runs behind the current results."""
    known = times(project, project.times)
    if not known:
        return ""
    rows = []
    for run, time in known.items():
        peak = time.get("peak_anonymous_gb")
        rows.append([run, f"{time['seconds']:.1f}", "–" if peak is None else f"{peak:.2f}"])
    rows.append(["all", f"{sum(time['seconds'] for time in known.values()):.1f}", ""])
    machines = sorted({machine_of(time) for time in known.values()})
    return f"{table(['stage', 'seconds', 'peak anonymous memory, GB'], rows)}\n\nMeasured on {'; '.join(machines)}."


def _percent(share: float | None, error: float | None = None) -> str:
    """Format an accuracy, with its standard error if known."""
    return "–" if share is None else f"{100 * share:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def _ratio(dense: float | str | None, pruned: float | str | None) -> str:
    if isinstance(dense, float) and isinstance(pruned, float):
        return f"{pruned / dense:.2f} ×"
    return ""


def _retained(dense: float | None, pruned: float | None) -> str:
    return f"{100 * pruned / dense:.1f} % retained" if dense and pruned is not None else ""
