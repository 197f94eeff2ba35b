"""Measure what the dense model's activations look like: the norm tier, once for each distinct input."""

import torch

from wanda_dvc.artifacts import Project, describe, read_provenance, write_provenance, write_stats
from wanda_dvc.blocks import Decoder, InputRecorder
from wanda_dvc.stages import STAGES, device_name, progress
from wanda_dvc.stages.mask import check_pattern
from wanda_dvc.windows import draw, load_tokenizer, tokenize


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
        params={
            "samples": params.calibration.samples,
            "length": params.calibration.length,
            "seed": params.calibration.seed,
            "dtype": params.dtype,
        },
    )
    tokens = tokenize(project.text("calibration"), load_tokenizer(project.model("dense")))
    windows = draw(
        tokens, samples=params.calibration.samples, length=params.calibration.length, seed=params.calibration.seed
    )
    decoder = Decoder(
        project.model("dense"),
        dtype=getattr(torch, params.dtype),
        device=torch.device(device_name(params.runtime)),
    )
    check_pattern(params.pattern, decoder.inputs())
    with project.work(made_from) as work:
        steps = decoder.walk(windows, work.path)
        for step in progress(steps, total=len(decoder.blocks), what="calibrate, blocks"):
            recorder = InputRecorder()
            step.advance(recorder)
            write_stats(work.out, step.index, recorder.stats, recorder.readers)
        write_provenance(work.out, made_from)
        work.publish(project.stats)
