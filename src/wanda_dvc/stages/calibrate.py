"""Measure what the dense model's activations look like: the norm tier, once for each distinct input."""

import sys
from functools import partial

import torch
from jaxtyping import Int
from torch import Tensor

from wanda_dvc.engine.checkpoint import Checkpoint
from wanda_dvc.engine.decoder import Decoder, has_units
from wanda_dvc.engine.recorder import InputRecorder
from wanda_dvc.engine.windows import draw, draw_from_documents, load_tokenizer, tokenize
from wanda_dvc.pruning.patterns import check_pattern
from wanda_dvc.pruning.statistics import summary
from wanda_dvc.stages import STAGES, device_name, progress, say_unreached
from wanda_dvc.study.files import write_csv
from wanda_dvc.study.project import Project
from wanda_dvc.study.provenance import describe, read_provenance, write_provenance
from wanda_dvc.study.tensors import block_count, read_stats, write_stats


def calibrate(*, project: Project) -> None:
    """models/dense + data/calibration → stats/"""
    params = project.params
    model, text = (
        read_provenance(project.model("dense"), "download model"),
        read_provenance(project.data("calibration"), "download calibration"),
    )
    made_from = describe(
        "stats",
        version=STAGES["calibrate"],
        libraries=("torch", "transformers"),
        model={"source": model["source"], "sha256": model["sha256"]},
        text={"source": text["source"], "sha256": text["sha256"]},
        params=params.calibrated_with(),
    )
    windows = calibration_windows(project)
    decoder = open_decoder(project, "dense")
    check_pattern(params.pattern, decoder.inputs())
    with project.work(made_from) as work:
        steps = decoder.walk(windows, work.path)
        for step in progress(steps, total=len(decoder.blocks), what="calibrate, blocks"):
            recorder = InputRecorder()
            step.advance(recorder)
            write_stats(work.out, step.index, recorder.result())
        blocks = range(len(decoder.blocks))
        say_unreached("calibrate", {block: read_stats(work.out, block).unreached() for block in blocks})
        write_provenance(work.out, made_from)
        work.publish(project.stats)
    _write_norms(project)


def _write_norms(project: Project) -> None:
    """The norms by block, for plots."""
    rows: list[list[object]] = []
    for block in range(block_count(project.stats)):
        stats = read_stats(project.stats, block)
        for name, x in stats.inputs.items():
            rows.append([block, stats.label(name), len(x.norm), *summary(x.norm).values()])
    headers = ["block", "input", "features", "mean", "median", "largest", "outliers"]
    write_csv(project.plots("norms"), headers, rows)


def calibration_windows(project: Project) -> Int[Tensor, "samples length"]:
    """The windows that data/calibration and params.yaml ask for."""
    calibration = project.params.calibration
    wanted = {"samples": calibration.samples, "length": calibration.length, "seed": calibration.seed}
    tokenizer = load_tokenizer(project.model("dense"))
    with project.documents("calibration") as documents:
        if documents is not None:
            return draw_from_documents(documents, partial(tokenize, tokenizer=tokenizer), **wanted)
    return draw(tokenize(project.text("calibration"), tokenizer), **wanted)


def open_decoder(project: Project, model: str) -> Decoder:
    """The engine on one of the project's models, in the dtype and on the device that params.yaml asks for."""
    params, folder = project.params, project.model(model)
    dtype, budget = getattr(torch, params.dtype), params.runtime.memory_gb
    device = torch.device(device_name(params.runtime))
    if device.type == "cpu" and not has_units(dtype):
        print(
            f"dtype: this CPU has no units for {params.dtype} and computes it many times slower than float32; "
            "set dtype=float32 (other last digits), or run it where there are some",
            file=sys.stderr,
            flush=True,
        )
    resident = budget is not None and Checkpoint(folder).size(dtype) <= budget * 1e9
    return Decoder(folder, dtype=dtype, device=device, resident=resident)
