"""Train the pruned model towards the dense model."""

import contextlib
import hashlib
import math
import os
import random
import shutil
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from wanda_dvc.engine.checkpoint import EditedCheckpoint, write_model
from wanda_dvc.engine.memory import ModelSizes
from wanda_dvc.engine.windows import cut, draw, interleaved, load_tokenizer, tokenize
from wanda_dvc.errors import UserError, notice
from wanda_dvc.params import apportion, numbered
from wanda_dvc.reading import read_lines
from wanda_dvc.stages import STAGES
from wanda_dvc.stages.device import own_device
from wanda_dvc.stages.inputs import check_ready, draw_documents, setting_of
from wanda_dvc.stages.needs import TrainingWay, announce, training_dtype, training_ways
from wanda_dvc.stages.process import progress_bar, start_at
from wanda_dvc.study.artifact import PROVENANCE, Work, check_source, describe, digest, read_provenance, write_provenance
from wanda_dvc.study.files import Json, load_json, write_csv, write_json
from wanda_dvc.study.folder import Study
from wanda_dvc.training.sharding import launched_processes, of_first_process
from wanda_dvc.training.trainer import Curve, Windows, last_checkpoint, train

VALIDATION_WINDOWS = 4  # of each training text, and of the embedded text
# A validation text of another kind than the training's. `perplexity` reads another split of the embedded text, `test`.
EMBEDDED_TEXT = Path(str(files("wanda_dvc"))) / "embedded/text/train.jsonl"

VALIDATION_TEXTS = {"text": "the training text", "embedded": "the embedded text"}  # by column of the plot


def recover(*, study: Study) -> None:
    """models/dense + models/pruned + data/recovery or data/calibration → models/recovered."""
    settings = study.stage_input("recover")
    pruned_provenance, model_dtype = check_ready(study, "pruned")
    dense_provenance = read_provenance(study.model("dense"), "download model")
    check_source("models/pruned", pruned_provenance["model"], dense_provenance, "apply")
    sparsity = load_json(study.metrics("pruned", "sparsity"))
    if not sparsity:
        raise UserError("metrics/pruned/sparsity.json: missing; run `wanda-dvc apply`")
    sizes = ModelSizes.read(study.model("dense"))
    device = own_device(study.params.runtime)
    ways = training_ways(study, sizes)  # UserError if none fits
    windows, validation = training_windows(study)
    provenances: dict[bool, Json] = {}  # by `low_memory`
    for low_memory in (False, True):
        provenances[low_memory] = pruned_provenance | describe(
            "recover",
            version=STAGES["recover"].version,
            libraries=("torch", "transformers", "accelerate"),
            recovery=settings,
            pruned=digest(pruned_provenance),
            windows_sha256=hashlib.sha256(windows.numpy().data).hexdigest(),
            trained_in="bfloat16" if low_memory else training_dtype(model_dtype, device.type),
        )
    provenances[True] |= {"weights": "bfloat16 and 8 bits", "optimizer_states": "8 bits"}
    way = _way_of_training(study, ways, provenances, device)
    provenance = provenances[way.low_memory]
    is_first = os.environ.get("RANK", "0") == "0"  # of the processes of `accelerate launch`
    if is_first:
        announce(study, "recover", sizes)
        if way.low_memory:
            notice("recover: weights in bfloat16 and optimizer states in 8 bits: training in float32 needs more memory")
    # Only the first process creates this folder and commits the model; the others train in it.
    unfinished = study.work(provenance) if is_first else contextlib.nullcontext(Work(study.work_path(provenance)))
    steps = len(windows) // settings["batch"]
    with unfinished as work, progress_bar(steps, "recover, steps", disable=not is_first) as bar:

        def show_step(step: int) -> None:
            if bar.n == 0:
                start_at(bar, step - 1)
            bar.update()

        recovered, curve = train(
            study.model("dense"), study.model("pruned"), windows=windows, validation=validation,
            batch=settings["batch"], rate=settings["rate"], dtype=getattr(torch, provenance["trained_in"]),
            device=device, work=_training(work.path), on_step=show_step, **way._asdict(),
        )  # fmt: skip
        if is_first:
            _write_results(study, work, provenance, recovered, curve)
            write_json(study.metrics("recovered", "sparsity"), sparsity)  # the training moves no zero
            work.commit(study.model("recovered"))  # last: it removes the checkpoints


def _way_of_training(
    study: Study, ways: Sequence[TrainingWay], provenances: dict[bool, Json], device: torch.device
) -> TrainingWay:
    """Return the fastest of some ways of training, or of those with the `low_memory` of an interrupted training."""
    started = [low for low, made_from in provenances.items() if last_checkpoint(_training(study.work_path(made_from)))]
    way = next((way for way in ways if way.low_memory in started), ways[0])
    # The free memory may differ between processes.
    if launched_processes() > 1:
        way = of_first_process(way, device)
    if started and way.low_memory not in started:
        notice("recover: the interrupted training does not fit the free memory, or this launch: this one begins anew")
    return way


def _training(work: Path) -> Path:
    """Return the folder of a training's checkpoints; those of split models have a file a process."""
    processes = launched_processes()
    return work / (f"training-{processes}" if processes > 1 else "training")


def _write_results(
    study: Study, work: Work, provenance: Json, recovered: EditedCheckpoint | None, curve: Curve
) -> None:
    """Write the curve and the model."""
    columns = ("tokens", *VALIDATION_TEXTS)
    rows = [[evaluation.get(name, "") for name in columns] for evaluation in curve]
    write_csv(study.plots("recovery"), columns, rows)
    best = min(curve, key=lambda evaluation: evaluation["score"])
    folder = work.new()
    if recovered is None:
        notice("recover: the training did not help on validation windows: models/recovered has the pruned weights")
        shutil.copytree(study.model("pruned"), folder, copy_function=shutil.copyfile, dirs_exist_ok=True)
    else:
        for _ in write_model(recovered, folder, without=(PROVENANCE,)):  # it yields each tensor once it is written
            pass
        for text, about in VALIDATION_TEXTS.items():
            if text in best and best[text] >= curve[0][text]:
                notice(f"recover: warning: it did not help on {about}; metrics/plots/recovery.csv has the curve")
    tokens = int((curve[-1] if recovered is None else best)["tokens"])  # all of them, if no weights were better
    write_provenance(folder, provenance | {"trained": recovered is not None, "tokens": tokens})


def training_windows(study: Study) -> tuple[Windows, dict[str, Windows]]:
    """Return the windows to train on, in order, and the validation windows by text.

    Several texts have windows in proportion to their shares, by turns. All of their validation windows are `text`.
    """
    settings = study.stage_input("recover")
    length = settings["length"]
    count = max(1, settings["tokens"] // length // settings["batch"]) * settings["batch"]
    # Of recovery.text, the shares of the training; of the calibration's texts, their numbers of calibration windows.
    shares, training, held_out = settings["shares"], list[Tensor](), list[Tensor]()
    counts = apportion(count, shares)
    section = "recovery" if settings["text"] else "calibration"
    for source, share, samples in zip(numbered(section, "/", len(shares)), shares, counts, strict=True):
        windows = _windows_of_text(study, source, settings, samples + VALIDATION_WINDOWS, calibrated=share)
        if len(windows) <= VALIDATION_WINDOWS:
            problem = f"{len(windows)} windows of {length} tokens, expected more; take a longer text"
            raise UserError(f"{setting_of(source)}: {problem}")
        held_out.append(windows[:VALIDATION_WINDOWS])
        windows = windows[VALIDATION_WINDOWS:]
        if samples > len(windows):
            text = "the text" if len(shares) == 1 else setting_of(source)
            notice(f"recover: {text} repeats after {windows.numel():,} tokens; recovery.text names a longer one")
        training.append(windows.repeat(math.ceil(samples / len(windows)), 1)[:samples])
    validation = {"text": torch.cat(held_out)}
    if settings["embedded"]:
        notice("recover: validation has no other source: the text is the embedded one; recovery.text names another")
    else:
        text = "\n\n".join(row["text"] for _, row in read_lines(EMBEDDED_TEXT))
        tokens = tokenize(text, load_tokenizer(study.model("dense")))
        embedded = cut(tokens, length=length, windows=VALIDATION_WINDOWS, name="the embedded validation text")
        validation["embedded"] = torch.stack(embedded)
    return torch.cat(training)[interleaved(counts)], validation


def _windows_of_text(study: Study, source: str, settings: Json, count: int, *, calibrated: int) -> Tensor:
    """Return windows of a training text: `count` from separate documents, or all of a plain text in random order.

    The order of a plain text's windows does not depend on the seed. If it is the calibration's text, windows that share
    tokens with the `calibrated` windows drawn from it are last.
    """
    length, seed = settings["length"], settings["seed"]
    # The next seed: with the calibration's, windows of one text would be the calibration's own.
    drawn = draw_documents(study, source, samples=count, length=length, seed=seed + 1)
    if drawn is not None:
        return drawn.tokens
    tokens = tokenize(study.text(source), load_tokenizer(study.model("dense")))
    windows = torch.stack(cut(tokens, length=length, windows=None, name=setting_of(source)))
    order = random.Random(0).sample(range(len(windows)), len(windows))
    if source.startswith("calibration"):
        positions = torch.arange(len(tokens))
        # The same draw as the calibration's, of positions instead of tokens.
        drawn = draw(positions, samples=calibrated, length=settings["calibration_length"], seed=seed)
        is_calibrated = torch.isin(positions, drawn.tokens)
        is_seen = is_calibrated[: windows.numel()].view_as(windows).any(-1).tolist()  # windows follow one another
        order.sort(key=lambda window: is_seen[window])
    return windows[order]
