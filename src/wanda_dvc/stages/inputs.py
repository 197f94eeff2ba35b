"""The inputs of stages, checked in one place: matching models, statistics and texts; and what runs a model."""

import importlib
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from wanda_dvc.errors import UserError, notice
from wanda_dvc.reading import check_file, is_there
from wanda_dvc.stages.running import own_device
from wanda_dvc.study.files import Documents, Json
from wanda_dvc.study.project import DOCUMENTS, Project, Work
from wanda_dvc.study.provenance import MADE_BY, check_source, read_provenance
from wanda_dvc.study.tensors import block_count

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

    from wanda_dvc.engine.decoder import Decoder
    from wanda_dvc.engine.rows import Executor
    from wanda_dvc.engine.walk import Runner

HEAD = "output head"


def check_ready(project: Project, model: str, length: int | None = None, setting: str = "") -> Json:
    """Check device, files, configuration and length of windows before a model runs; return the model's provenance."""
    from wanda_dvc.engine.checkpoint import positions_of, read_config

    own_device(project.params.runtime)
    if project.params.runtime.ray is not None:
        importlib.import_module("ray")
    provenance = read_provenance(project.model(model), MADE_BY[model])
    for file in project.model(model).iterdir():
        check_file(file)  # transformers passes over a generation_config.json that it cannot read
    positions = positions_of(read_config(project.model(model)))
    if length and positions is not None and length > positions:
        raise UserError(
            f"{setting}: got {length}, expected at most {positions}, the positions of the model in "
            f"{project.model(model)}; set {setting}={positions} or less"
        )
    return provenance


def model_dtype(project: Project, model: str = "dense") -> str:
    """Return the dtype in which a study's dense or pruned model runs, by name; `auto` is the dense checkpoint's."""
    from wanda_dvc.engine.checkpoint import dtype_of

    return dtype_of(project.model(model), project.planned("calibrate/norms")["dtype"])


def say_not_finite(run: str, where: str | None) -> None:
    """Report the place of a model's first non-finite activations, if any."""
    if where:
        notice(f"{run}: {where}: activations that are not finite; results are `diverged`, or without a comparison")


# --- statistics ---


def calibrated_with(project: Project) -> Json:
    """Return the settings that determine the calibration windows and the run."""
    planned = project.planned("calibrate/norms")
    return {name: planned[name] for name in ("windows", "length", "seed")} | {"dtype": model_dtype(project)}


def statistics(project: Project) -> Json:
    """Return the provenance of stats/norms. UserError if it is of another model, or of other settings."""
    stats, expected = read_provenance(project.stats, "calibrate"), calibrated_with(project)
    check_source("stats", stats["model"], read_provenance(project.model("dense"), MADE_BY["dense"]), "calibrate")
    if stats["params"] != expected:
        raise UserError(
            f"stats/: measured with {stats['params']}, expected {expected} as params.yaml has it; "
            "run `dvc repro` or `wanda-dvc calibrate`"
        )
    return stats


def tier_provenance(folder: Path, made_with: Json, what: str = "stats/norms") -> Json:
    """Return the provenance of stats/gram or stats/gradients.

    UserError if it has no blocks, or is of another run than `made_with`: model, text and parameters of `what`.
    """
    tier, blocks = read_provenance(folder, "calibrate"), block_count(folder, "calibrate")
    if not blocks or any(tier[name] != made_with[name] for name in ("model", "text", "params")):
        raise UserError(
            f"stats/{folder.name}: found {blocks} blocks of {tier['model']['source']}, expected those of the model and "
            f"the calibration that {what} names; run `dvc repro`, or `wanda-dvc calibrate` with those settings"
        )
    return tier


def calibration_windows(project: Project, measured_with: Json | None = None) -> "Int[Tensor, 'windows length']":
    """Draw windows from data/calibration, with the dense model's tokenizer.

    The settings are params.yaml's, or `measured_with`, the parameters of the statistics.
    """
    from wanda_dvc.engine.windows import draw, draw_from_documents, load_tokenizer, tokenize

    wanted = measured_with or calibrated_with(project)
    words = {"samples": wanted["windows"], "length": wanted["length"], "seed": wanted["seed"]}
    tokenizer, folder = load_tokenizer(project.model("dense")), project.data("calibration")
    if not is_there(folder / DOCUMENTS):
        return draw(tokenize(project.text("calibration"), tokenizer), **words)
    column = read_provenance(folder, "download calibration")["column"]
    project.work_root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=project.work_root) as scratch:  # the system's own folder may be in memory
        documents = Documents(folder / DOCUMENTS, column, scratch)
        return draw_from_documents(documents, partial(tokenize, tokenizer=tokenizer), **words)


# --- what runs ---


def runner(project: Project, model: str, work: Work, *, dtype: str | None = None) -> "Runner":
    """Return a runner of rows through one of the project's models, in this process or on the cluster."""
    from wanda_dvc.engine.walk import Runner

    run = executor(project, [project.model(model), project.work_root])
    return Runner(open_decoder(project, model, dtype=dtype), work.path.absolute(), run)


def executor(project: Project, folders: Sequence[Path]) -> "Executor":
    """Return what maps functions that read some folders: this process, or the cluster of params.yaml."""
    runtime = project.params.runtime
    if runtime.ray is None:
        from wanda_dvc.engine.rows import Executor

        return Executor(own_device(runtime))
    from wanda_dvc.engine.cluster import Cluster

    cluster = Cluster(runtime.ray, device=runtime.device, folders=[folder.absolute() for folder in folders])
    notice(f"runtime.ray: workers: {cluster.workers}")
    return cluster


def open_decoder(project: Project, model: str, *, dtype: str | None = None) -> "Decoder":
    """Open the engine on one of the project's models, in a dtype and on a device, by default params.yaml's.

    With a cluster it is on the CPU: this process computes nothing itself.
    """
    import torch

    from wanda_dvc.engine.attention import has_units
    from wanda_dvc.engine.decoder import Decoder

    runtime, dtype = project.params.runtime, dtype or model_dtype(project, model)
    device = own_device(runtime) if runtime.ray is None else torch.device("cpu")
    if device.type == "cpu" and runtime.ray is None and not has_units(getattr(torch, dtype)):
        notice(
            f"dtype: this CPU has no instructions for {dtype}, so it is many times slower than float32; set "
            "dtype=float32 (last digits differ), or use another machine"
        )
    return Decoder(project.model(model), dtype=getattr(torch, dtype), device=device)
