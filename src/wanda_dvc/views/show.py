"""The last results, dense and pruned side by side."""

import contextlib
from collections.abc import Iterator

from wanda_dvc.engine.flips import ANSWERS, Flips, total_flips
from wanda_dvc.errors import UserError
from wanda_dvc.params import OTHER_SOURCE, SAME_SOURCE
from wanda_dvc.reading import DIVERGED, is_there
from wanda_dvc.report.formatting import interval
from wanda_dvc.report.measures import Measured, mean_layer_error, mean_repeated
from wanda_dvc.stages import MODELS, times
from wanda_dvc.study.details import is_of, load_measured, mean_accuracy
from wanda_dvc.study.files import Json, json_text, load_json
from wanda_dvc.study.local import missing_sources
from wanda_dvc.study.markup import number, table
from wanda_dvc.study.project import Project
from wanda_dvc.study.protocol import comparable
from wanda_dvc.study.provenance import MADE_BY, PROVENANCE, digest, read_provenance
from wanda_dvc.study.ran import Ran

HEADERS = ["", "dense", "pruned", "pruned / dense"]
FLIPS = ["changed answers", "items", "right → wrong", "wrong → right", "wrong → wrong", "changed, %", "p"]


def show(*, project: Project, as_json: bool = False) -> str:
    """Return the last results, dense and pruned, with their settings: as a table, or as JSON."""
    ran = Ran.of(project)
    made = project.with_params(ran.params)
    title, sources = _title(made), [*missing_sources(project), *_of_other_models(made)]
    notes = list(_footnotes(made))
    if as_json:
        return json_text(
            {
                "made_with": ran.params.filled.model_dump(mode="json", exclude={"runtime"}),
                "not_run": ran.unmet,
                "stale": ran.stale,
                "results": {model: _figures(made, model) for model in MODELS},
                "notes": [*title, *sources, *notes],
                "times": times(made),
            }
        )
    parts = [
        "\n".join(title),
        staleness(ran),
        "\n".join(sources),
        table(HEADERS, comparison(made)),
        table(FLIPS, changed) if (changed := flips(made)) else "",
        *notes,
        _times(made),
    ]
    return "\n\n".join(part for part in parts if part)


def _of_other_models(project: Project) -> Iterator[str]:
    """Yield a sentence for each model whose results are of another one, as after a stage run by hand."""
    for model in MODELS:
        with contextlib.suppress(UserError):  # a missing or damaged model is for the stages to refuse
            own = digest(read_provenance(project.model(model), MADE_BY[model]))
            every = measured(project, model)
            if others := [name for name, (_, details) in every.items() if not is_of(details, own)]:
                yield f"{', '.join(others)}: measured on another models/{model} than the one here; run `dvc repro`."
        for name in ("zero_shot", *(f"perplexity/{text}" for text in project.params.perplexity.texts)):
            metrics = project.metrics(model, name)
            if load_json(metrics) != load_measured(metrics, project.details(model, name))[0]:
                yield f"metrics/{model}/{name}.json: of another run than metrics/details; run `dvc checkout`."


def measured(project: Project, model: str) -> dict[str, tuple[Json, Json]]:
    """Return the metrics and the details of a model's perplexity on each text, then of each task; empty if missing."""

    def read(name: str) -> tuple[Json, Json]:
        return load_measured(project.metrics(model, name), project.details(model, name))

    answered, details = read("zero_shot")
    given = details.get("tasks", {})
    texts = {on_text(project, text): read(f"perplexity/{text}") for text in project.params.perplexity.texts}
    return texts | {task: (answered.get(task, {}), given.get(task, {})) for task in project.params.tasks.names}


def on_text(project: Project, text: str) -> str:
    """Return `perplexity`; with several texts also the text's name, and whether it has the calibration's source."""
    if len(project.params.perplexity.texts) == 1:
        return "perplexity"
    kind = SAME_SOURCE if project.params.is_calibrations(text) else OTHER_SOURCE
    return f"perplexity, {text} ({kind})"


def _figures(project: Project, model: str) -> Json:
    """Return the measures of one model; null if missing."""
    found = measured(project, model)
    texts = project.params.perplexity.texts
    figures: Json = {
        "texts": {
            text: {"perplexity": None} | found[on_text(project, text)][0] | {"same_source": same}
            for text in texts
            for same in [project.params.is_calibrations(text)]
        }
    }
    figures["zero_shot"] = {
        task: found[task][0] | {"standard_errors": found[task][1].get("standard_errors", {})}
        for task in project.params.tasks.names
    }
    if model == "pruned":
        figures |= {"sparsity": None} | load_json(project.metrics("pruned", "sparsity"))
        figures["layer_error"] = mean_layer_error(project)
        for (task, metric), one in _flips(project).items():
            figures["zero_shot"][task].setdefault("flips", {})[metric] = one._asdict()
        dense, pruned = (Measured.of(project, which) for which in MODELS)
        figures["continuations"] = [one._asdict() for one in pruned.continued(dense)]
    return figures


def staleness(ran: Ran) -> str:
    """Return a sentence on settings without a run and stale stages; empty if the results are current."""
    lines = []
    if ran.unmet:
        asked = ", ".join(f"{name}={value}" for name, value in ran.unmet.items())
        lines.append(f"params.yaml has {asked}, which has not run: `dvc repro` runs it.")
    if ran.stale:
        lines.append(f"Stale: {', '.join(ran.stale)}.")
    return "\n".join(lines)


def comparison(project: Project) -> list[list[str]]:
    """Return every measure, dense and pruned, as rows under `HEADERS`; a dash if missing."""
    dense, pruned = (measured(project, model) for model in MODELS)
    apart = measured_apart(project)
    rows = []
    for text in project.params.perplexity.texts:
        name = on_text(project, text)
        perplexities = [one[name][0].get("perplexity") for one in (dense, pruned)]
        shown = [_perplexity(Measured.of(project, model, text)) for model in MODELS]
        rows.append([name, *shown, "" if name in apart else _ratio(*perplexities)])
        rows += divergence_rows(pruned[name][0])
    rows += _accuracy_rows(project, dense, pruned, apart)
    error, measures = mean_layer_error(project), load_json(project.metrics("pruned", "sparsity"))
    sparsity, removed = measures.get("sparsity"), measures.get("removed_parameters")
    if error is not None:
        rows.append(["layer error, mean", "–", f"{error:.4f}", ""])
    rows.append(["measured sparsity", "–", "–" if sparsity is None else f"{sparsity:.4f}", ""])
    if removed is not None:
        rows.append(["parameters removed", "–", f"{100 * removed:.1f} %", ""])
    return rows


def _accuracy_rows(
    project: Project, dense: dict[str, tuple[Json, Json]], pruned: dict[str, tuple[Json, Json]], apart: list[str]
) -> list[list[str]]:
    """Return the accuracy of each task, and the mean; of the embedded questions, which are no benchmark, the mean."""
    tasks, embedded = project.params.tasks.names, project.params.tasks.source == "embedded"
    rows, accuracies = [], list[list[float | str | None]]()
    for task in tasks:
        both = [one[task][0].get("acc") for one in (dense, pruned)]
        errors = [one[task][1].get("standard_errors", {}).get("acc") for one in (dense, pruned)]
        rows.append([f"{task}, acc %", *map(_percent, both, errors), "" if task in apart else _retained(*both)])
        accuracies.append(both)
    if not tasks:
        return []
    means = [mean_accuracy(list(one)) for one in zip(*accuracies, strict=True)]
    if embedded:
        return [["embedded questions, mean acc %", *map(_percent, means), ""]]
    return [*rows, ["mean, acc %", *map(_percent, means), "" if {*apart} & {*tasks} else _retained(*means)]]


def divergence_rows(metrics: Json) -> list[list[str]]:
    """Return the pruned model's divergence from the dense model as rows under `HEADERS`; [] if not measured."""
    if "divergence" not in metrics:
        return []
    kl, agreed, change = (metrics[name] for name in ("divergence", "top1_agreement", "rms_probability_change"))
    return [
        ["divergence, nats", "0", with_interval(kl, "{:.4f}"), ""],
        ["top-1 agreement, %", "100", with_interval(agreed, "{:.1f}", 100), ""],
        ["divergence: median, 99 %, largest", "0", kl if kl == DIVERGED else spread(kl), ""],
        ["true token, RMS change, points", "0", change if change == DIVERGED else f"{100 * change:.1f}", ""],
    ]


def _perplexity(model: Measured) -> str:
    """Format a model's perplexity with its interval over windows, if its losses are known."""
    value, ends = number(model.perplexity), model.perplexity_interval()
    return f"{value} ({interval(ends, number)})" if ends else value


def with_interval(measure: Json | str, form: str, factor: float = 1) -> str:
    """Format a mean with its interval over windows; `diverged` stays."""
    if isinstance(measure, str):
        return measure
    mean, *ends = (form.format(factor * measure[key]) for key in ("mean", "low", "high") if key in measure)
    return f"{mean} ({' to '.join(ends)})" if ends else mean


def spread(kl: Json) -> str:
    """Format the median, the 99 % quantile and the largest of the divergences of single predictions."""
    return ", ".join(f"{kl[key]:.4f}" for key in ("median", "p99", "largest"))


def flips(project: Project) -> list[list[str]]:
    """Return the answers that pruning changed, a row for each task and metric, under `FLIPS`; a sum if several tasks.

    Empty without comparable answers, and for the embedded questions, which are no benchmark.
    """
    found = _flips(project) if project.params.tasks.source != "embedded" else {}
    counted = {task + ("" if metric == "acc" else f", {metric}"): one for (task, metric), one in found.items()}
    by_acc = [one for (_, metric), one in found.items() if metric == "acc"]
    if len(by_acc) > 1 and (total := total_flips(by_acc)):
        counted["all, acc"] = total
    return [[name, *map(str, one[:4]), f"{100 * one.share:.1f}", f"{one.p:.2g}"] for name, one in counted.items()]


def _flips(project: Project) -> dict[tuple[str, str], Flips]:
    """Return the changed answers by task and metric."""
    dense, pruned = (Measured.of(project, model) for model in MODELS)
    apart = measured_apart(project)
    tasks = [task for task in project.params.tasks.names if task not in apart]
    found = {(task, metric): pruned.flips(dense, task, metric) for task in tasks for metric in ANSWERS}
    return {key: one for key, one in found.items() if one}


def measured_apart(project: Project) -> list[str]:
    """Return measures of both models that differ, or may differ, in windows or items.

    Metrics alone, as in a new clone without outputs, count as comparable: one `dvc.lock` has both.
    """
    apart = []
    dense, pruned = (measured(project, model) for model in MODELS)
    for name in dense:
        (metrics, details), (others, theirs) = dense[name], pruned[name]
        protocols = details.get("protocol"), theirs.get("protocol")
        if metrics and others and any(protocols) and not comparable(*protocols):
            apart.append(name)
    return apart


def not_compared(apart: list[str]) -> str:
    """Return the reason for missing comparisons."""
    return f"Not compared: {', '.join(apart)}. The two models may have been measured on different windows or items."


def _title(project: Project) -> list[str]:
    """Describe the settings of the current masks, and whether models/pruned has other masks."""
    if not is_there(project.masks / PROVENANCE):
        return [f"{project.params.model}: no masks yet; `dvc repro` makes them."]
    masks = read_provenance(project.masks, "mask")
    made = masks["params"]
    group = f", group {made.get('group')}" if made["pattern"] == "unstructured" else ""
    if made.get("propagation", "dense") != "dense":
        group += f", propagation {made['propagation']}"
    if made.get("allocation", "uniform") != "uniform":
        group += f", allocation {made['allocation']}"
    if (reconstruction := project.params.chosen_reconstruction.name) != "none":
        group += f", reconstruction {reconstruction}"
    lines = [
        f"{masks['model']['source']}: {made['method']}, sparsity {made.get('sparsity')}, "
        f"pattern {made['pattern']}{group}"
    ]
    if not is_there(project.model("pruned") / PROVENANCE):
        lines.append("models/pruned is missing (DVC does not cache it): `dvc repro` writes it.")
    elif (pruned := read_provenance(project.model("pruned"), "apply"))["masks"] != digest(masks):
        other = pruned["params"]
        lines.append(
            f"models/pruned belongs to another experiment ({other.get('method')}, sparsity {other.get('sparsity')}, "
            f"pattern {other.get('pattern')}): `dvc repro` writes this one's."
        )
    return lines


def _footnotes(project: Project) -> Iterator[str]:
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
    texts = {text: on_text(project, text) for text in project.params.perplexity.texts}
    for text, on in texts.items():
        protocols = {model: of[on].get("protocol", {}) for model, of in details.items()}
        alike = comparable(*(protocol or None for protocol in protocols.values()))
        for model, protocol in [one for one in protocols.items() if one[1]][: 1 if alike else None]:
            yield (
                f"Perplexity{f' on {text}' if len(texts) > 1 else ''}{'' if alike else f' of the {model} model'}: "
                f"{protocol['windows']} windows of {protocol['length']} tokens of {protocol['text']['source']} "
                f"(sha256 {protocol['text']['sha256'][:12]}…), {protocol['dtype']}. {project.params.about_text(text)}."
            )
    if any("divergences" in details["pruned"][on] for on in texts.values()):
        yield (
            "Divergence: KL(dense ‖ pruned) of the predictions of each next token, in nats; agreement: the share of "
            "positions where both models predict the same token. Both on the windows of the perplexity; in brackets "
            "the 95 % interval over windows."
        )
    if any(of[name] for of in details.values() for name in names):
        limit = project.params.items
        yield (
            f"Zero-shot: no examples, {f'first {limit} items' if limit else 'all items'}; ± is one standard error: "
            "differences below two standard errors may be chance."
        )
    yield from _notes_on_continuations(project)
    for model, of in details.items():
        for where in dict.fromkeys(one["not_finite"] for one in of.values() if "not_finite" in one):
            yield f"{model}: activations are not finite from here on: {where}."


def _notes_on_continuations(project: Project) -> Iterator[str]:
    """Describe how far the two models write the same; empty without continuations."""
    dense, pruned = (Measured.of(project, model) for model in MODELS)
    for name, model in zip(MODELS, (dense, pruned), strict=True):
        if skipped := model.continuations.get("skipped"):
            yield f"No continuations by the {name} model: {skipped}."
    if pairs := pruned.continued(dense):
        equal = ", ".join(str(pair.equal) for pair in pairs)
        own, other = (f"{100 * mean_repeated(pairs, which):.0f} %" for which in (0, 1))
        yield (
            f"Greedy continuations of {len(pairs)} prompts, at most {max(pair.tokens for pair in pairs)} tokens: equal "
            f"for {equal} tokens; repeated 4-grams: dense {own}, pruned {other}. `wanda-dvc report` shows the texts."
        )


def _notes_on_layers(linears: dict[str, Json]) -> Iterator[str]:
    """Describe the largest layer error and raised dampings; empty without Gram matrices."""
    if not linears:
        return
    worst = max(linears, key=lambda name: linears[name]["error"])
    masked = sum(measures["masked"] for measures in linears.values()) / len(linears)
    yield (
        f"Layer error: ‖(W−Ŵ)X‖² / ‖WX‖² of a linear on the calibration text. The largest is "
        f"{linears[worst]['error']:.4f}, of {worst}. With the same masks and no reconstruction the mean is "
        f"{masked:.4f}."
    )
    if raised := {name: measures.get("damping", 0) for name, measures in linears.items() if measures.get("raised")}:
        most = max(raised, key=lambda name: raised[name])
        yield (
            f"The Gram matrices of {len(raised)} linears are not positive definite with the default damping. It was "
            f"raised, at most to {raised[most]:g} of the mean diagonal, for {most}."
        )


def _times(project: Project) -> str:
    """Return a table of the last run of each stage in this checkout."""
    known = times(project)
    if not known:
        return ""
    rows = []
    for run, time in known.items():
        peak = time.get("peak_anonymous_gb")
        rows.append([run, f"{time['seconds']:.1f}", "–" if peak is None else f"{peak:.2f}"])
    rows.append(["all", f"{sum(time['seconds'] for time in known.values()):.1f}", ""])
    machines = sorted({f"{time['machine']}, {time['device']}" for time in known.values()})
    shown = table(["stage", "seconds", "peak anonymous memory, GB"], rows)
    return f"{shown}\n\nThe last run of each stage here, on {'; '.join(machines)}."


def _percent(share: float | str | None, error: float | None = None) -> str:
    """Format an accuracy, with its standard error if known; `diverged` stays."""
    if isinstance(share, str):
        return share
    return "–" if share is None else f"{100 * share:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def _ratio(dense: float | str | None, pruned: float | str | None) -> str:
    if isinstance(dense, float) and isinstance(pruned, float):
        return f"{pruned / dense:.2f} ×"
    return ""


def _retained(dense: float | str | None, pruned: float | str | None) -> str:
    known = isinstance(dense, (int, float)) and isinstance(pruned, (int, float))
    return f"{100 * pruned / dense:.1f} % retained" if known and dense else ""
