"""The cost of a study as a table, from a config.json without weights; times only if measured."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from wanda_dvc.engine.sizes import reference_bytes
from wanda_dvc.errors import UserError
from wanda_dvc.machine import cores, processor
from wanda_dvc.params import Params, check_params
from wanda_dvc.stages import STAGES
from wanda_dvc.stages.needs import NEEDS, Known, Need, config_of, kept_bytes, known
from wanda_dvc.stages.running import own_device
from wanda_dvc.study.files import json_text
from wanda_dvc.study.markup import table
from wanda_dvc.study.project import Project

TEST_SPLIT = 1_290_590  # bytes of WikiText-2's test split, for a text that is not downloaded yet
MORE = "its masks and weights"


def cost(  # noqa: PLR0913 - the options of the command
    *,
    start: Path,
    config: Path | None = None,
    dtype: str | None = None,
    windows: int | None = None,
    length: int | None = None,
    measure: bool = False,
    as_json: bool = False,
) -> str:
    """Return the cost of each stage with the current settings (the default's outside a project): a table, or JSON.

    With `measure` this machine runs one block of the model's shape, to estimate the time of each stage.
    """
    project, params = _settings(start, dtype, windows, length)
    if config is None:
        if project is None:
            raise UserError(f"{start}: no project here; name a config.json, or cd into a project")
        config = config_of(project)
    if not (config / "config.json" if config.is_dir() else config).is_file():
        raise UserError(
            f"{config}: no config.json, expected a model's directory or its config.json; name one, or fetch this "
            "study's model: `dvc repro download@model`"
        )
    on = known(params, config, project)
    unknown = {f"perplexity/{text}": TEST_SPLIT for text in on.evaluated if not on.tokens(text)}
    on = replace(on, texts={**on.texts, **unknown})
    needs = {stage: need(on) for stage, need in NEEDS.items()}
    pace = _measure(on) if measure else {}
    seconds = {name: sum(x / pace[kind] for kind, x in row.work.items() if x) for name, row in needs.items() if pace}
    return json_text(_records(on, needs, pace, seconds)) if as_json else _table(on, needs, pace, seconds)


def _measure(on: Known) -> dict[str, float]:
    import torch

    from wanda_dvc.engine.pace import measure

    torch.set_num_threads(cores())
    params, device = on.params, own_device(on.params.runtime)
    gram, length = params.calibration.statistics != "norms" or params.plan.records_grams, params.calibration.length
    return measure(on.config, params.plan, dtype=params.dtype, device=device, length=length, gram=gram)


def _table(on: Known, needs: dict[str, Need], pace: dict[str, float], seconds: dict[str, float]) -> str:
    params, model, kept = on.params, on.model, kept_bytes(on)
    tokens = [on.tokens(text) for text in on.evaluated]
    rows = []
    for name, need in needs.items():
        flops = sum(need.work.values())
        sizes = (need.read, need.hidden, need.link, need.memory.anonymous, need.disk)
        row = [name, f"{flops / 1e12:,.1f}" if flops >= 5e10 else "–", *(_gb(x) if x else "–" for x in sizes)]
        rows.append(row + ([_duration(seconds[name])] if pace else []))
    headers = ["stage", "TFLOP", *(f"{what}, GB" for what in ("read", "hidden states", "link", "memory", "disk"))]
    # The stages that another recipe reruns, and the stages that also measure the dense model.
    again = sum(seconds.get(name, 0) for name, x in STAGES.items() if "recipe" in x.settings or "pruned" in x.parts)
    dense = sum(seconds.get(name, 0) for name, stage in STAGES.items() if "dense" in stage.parts)
    first = f"{_duration(sum(seconds.values()))}, and its dense baselines {_duration(dense)} more"
    lines = [
        f"{_count(model.parameters)} parameters, {_count(model.met)} of them in the linears that a token meets; stored "
        f"in {model.dtype}, {_gb(model.stored)} GB; runs in {params.dtype} on {on.device}",
        f"{params.calibration.windows} windows of {params.calibration.length} to calibrate, "
        f"{sum(tokens):,} tokens in windows of {params.perplexity.length} for perplexity"
        f"{f' on {len(tokens)} texts' if len(tokens) > 1 else ''}, {len(params.tasks.names)} tasks"
        + (f" × {params.items}" if params.items else ""),
        "",
        table(headers + ["time"] * bool(pace), rows),
        "",
        f"The dense model's predictions, `reference`, take {_gb(sum(map(reference_bytes, tokens)))} GB of the cache, "
        "once.",
        f"One more experiment adds {_gb(kept)} GB to the cache ({'its masks' if kept < model.count else MORE})"
        + (f" and takes {_duration(again)}; the first one takes {first}." if pace else "."),
    ]
    if params.plan.structure:
        left = _left(on)
        about = "only `wanda-dvc mask` knows whether this configuration can express a smaller model"
        if left:
            share = 100 * (1 - left / model.parameters)
            about = f"the smaller model has {_count(left)} parameters, {_gb(left * model.width)} GB, {share:.1f} % less"
        lines.insert(1, f"pattern {params.pattern}, sparsity {params.sparsity:g}: {about}")
    if pace:
        rates = ", ".join(f"{kind} {rate / 1e9:,.3g}" for kind, rate in pace.items())
        lines.append(
            f"Measured: one block of this shape with random weights, on {processor()}, {cores()} cores, {on.device}; "
            f"GFLOP/s: {rates}. All times are extrapolated from that. File access and process start are not included."
        )
    return "\n".join(lines)


def _left(on: Known) -> int | None:
    """Return the parameters of the smaller model; None if the pattern sets weights to zero, or the count is unknown."""
    structure = on.params.plan.structure
    if structure is None:
        return None
    from wanda_dvc.engine.config import read_config
    from wanda_dvc.engine.smaller import smaller_parameters

    return smaller_parameters(read_config(on.config), structure, on.params.plan.share, on.model.parameters)


def _records(on: Known, needs: dict[str, Need], pace: dict[str, float], seconds: dict[str, float]) -> dict[str, Any]:
    """Return the cost as numbers: bytes, FLOPs and seconds."""
    left = _left(on)
    return {
        "model": {"parameters": on.model.parameters, "linears": on.model.met, "stored_bytes": on.model.stored},
        "smaller": {"parameters": left, "stored_bytes": left * on.model.width} if left else None,
        "device": on.device,
        "dtype": on.params.dtype,
        "tokens": {text: on.tokens(text) for text in on.evaluated},
        "kept_bytes": kept_bytes(on),
        "flops_per_second": pace,
        "stages": [
            {
                "stage": name,
                "flops": sum(need.work.values()),
                "memory_bytes": need.memory.anonymous,
            }
            | {f"{what}_bytes": getattr(need, what) for what in ("read", "hidden", "link", "disk", "least")}
            | ({"seconds": seconds[name]} if pace else {})
            for name, need in needs.items()
        ],
    }


def _settings(start: Path, dtype: str | None, windows: int | None, length: int | None) -> tuple[Project | None, Params]:
    from wanda_dvc.study.settings import DEFAULT, nested, read_preset

    try:
        project = Project.find(start)
    except UserError:
        project = None
    params = project.params if project else check_params(nested(read_preset(DEFAULT)))
    content = params.model_dump()
    for section, count in (("calibration", "windows"), ("perplexity", "windows")):
        content[section] |= {count: windows} if windows else {}
        content[section] |= {"length": length} if length else {}
    return project, check_params(content | ({"dtype": dtype} if dtype else {}))


def _count(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)


def _gb(size: float) -> str:
    if 0 < size < 5e6:
        return f"{size / 1e9:.1g}"  # two decimals would show 0
    return f"{size / 1e9:,.2f}" if size < 1e11 else f"{size / 1e9:,.0f}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
