"""What a study costs on paper, as a table: from a config.json and no weights."""

from pathlib import Path
from typing import Any

from tabulate import tabulate

from wanda_dvc.engine.costs import DEVICES, Cost, Setting, this_cpu, work
from wanda_dvc.engine.sizes import BYTES_A_TOKEN, sizes
from wanda_dvc.errors import UserError
from wanda_dvc.machine import processor
from wanda_dvc.params import Params, check_params
from wanda_dvc.stages import STAGES
from wanda_dvc.study.files import json_text
from wanda_dvc.study.project import TEXT, Project

TEST_SPLIT = 1_290_590  # bytes of WikiText-2's test split, for a text that is not there yet


def cost(  # noqa: PLR0913 - the options of the command
    *,
    start: Path,
    config: Path | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    windows: int | None = None,
    length: int | None = None,
    workers: int = 1,
    as_json: bool = False,
) -> str:
    """Return what each stage costs with the settings at hand (outside a project, the default's): a table, or JSON."""
    project, params = _settings(start, dtype, windows, length)
    if config is None:
        if project is None:
            raise UserError(f"{start}: no project here; name a config.json, or cd into a project")
        local = Path(params.model)
        config = local if local.is_absolute() and local.is_dir() else project.model("dense")
    if not (config / "config.json" if config.is_dir() else config).is_file():
        raise UserError(
            f"{config}: no config.json, expected a model's directory or its config.json; name one, or fetch this "
            "study's model: `dvc repro download@model`"
        )
    if device not in ("cpu", *DEVICES):
        raise UserError(f"--device: got {device}, expected cpu, {', '.join(DEVICES)}")
    model, through = sizes(config), work(config)
    card = DEVICES[device] if device in DEVICES else this_cpu(processor(), params.dtype)
    text = project.data("perplexity") / TEXT if project else None
    there = (text.stat().st_size if text and text.is_file() else TEST_SPLIT) // BYTES_A_TOKEN
    wanted = params.perplexity
    tokens = min(there, wanted.windows * wanted.length) if isinstance(wanted.windows, int) and not windows else there
    tokens = windows * wanted.length if windows else tokens
    on = Setting(model, through, card, params.dtype, tokens, workers)
    costs = {name: row for name, stage in STAGES.items() if (row := stage.cost(params, on))}
    if as_json:
        return json_text(_records(on, costs))
    rows = [
        [
            name,
            f"{row.flops / 1e12:,.1f}" if row.flops else "–",
            _gb(row.read),
            _gb(row.hidden) if row.hidden else "–",
            _gb(row.memory.anonymous),
            _gb(row.disk),
            _duration(row.seconds),
        ]
        for name, row in costs.items()
    ]
    from wanda_dvc.stages.mask import kept_bytes

    kept = kept_bytes(params, model, through.all_linears)
    added = "its masks" if kept == through.all_linears / 8 else "its masks and weights"
    headers = ["stage", "TFLOP", "read, GB", "hidden states, GB", "memory, GB", "disk, GB", "time"]
    rate = f"{card.flops[params.dtype] / 1e12:.3g} TFLOP/s"
    how = "published" if card.link else "measured now"
    estimate = "; an estimate, no card was at hand" if card.link else ""
    seconds = [row.seconds for row in costs.values()]
    baselines = [row.seconds for name, row in costs.items() if STAGES[name].parts]
    return "\n".join(
        [
            f"{_count(model.parameters)} parameters, {_count(through.linears)} of them in the linears that a "
            f"token meets; stored in {model.dtype}, {_gb(model.stored)} GB; runs in {params.dtype}",
            f"{card.name}: {rate} {how}, of which {card.efficiency:.0%} are expected{estimate}",
            *([f"{workers} workers, each like that; what each holds is in the table, once"] if workers > 1 else []),
            f"{params.calibration.samples} windows of {params.calibration.length} to calibrate, {tokens:,} tokens in "
            f"windows of {wanted.length} for perplexity, {len(params.tasks.names)} tasks"
            + (f" × {params.zero_shot.limit}" if params.zero_shot.limit else ""),
            "",
            tabulate(rows, headers, tablefmt="github", disable_numparse=True),
            "",
            f"One more experiment adds {_gb(kept)} GB to the cache ({added}) and takes "
            f"{_duration(sum(seconds[1:]))}; the first one {_duration(sum(seconds))} and its dense baselines "
            f"{_duration(sum(baselines))} more.",
        ]
    )


def _records(on: Setting, costs: dict[str, Cost]) -> dict[str, Any]:
    """The same as numbers: bytes, FLOPs and seconds."""
    return {
        "model": {"parameters": on.model.parameters, "linears": on.work.linears, "stored_bytes": on.model.stored},
        "device": {"name": on.device.name, "flops": on.device.flops[on.dtype], "measured": on.device.link is None},
        "dtype": on.dtype,
        "workers": on.workers,
        "tokens": on.tokens,
        "stages": [
            {
                "stage": name,
                "flops": row.flops,
                "read_bytes": row.read,
                "hidden_bytes": row.hidden,
                "memory_bytes": row.memory.anonymous,
                "disk_bytes": row.disk,
                "seconds": row.seconds,
            }
            for name, row in costs.items()
        ],
    }


def _settings(start: Path, dtype: str | None, windows: int | None, length: int | None) -> tuple[Project | None, Params]:
    from wanda_dvc.study.presets import DEFAULT, read_preset
    from wanda_dvc.study.settings import nested

    try:
        project = Project.find(start)
    except UserError:
        project = None
    params = project.params if project else check_params(nested(read_preset(DEFAULT).settings))
    content = params.model_dump()
    for section, count in (("calibration", "samples"), ("perplexity", "windows")):
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
        return f"{size / 1e9:.1g}"  # two decimals would say that it is nothing
    return f"{size / 1e9:,.2f}" if size < 1e11 else f"{size / 1e9:,.0f}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
