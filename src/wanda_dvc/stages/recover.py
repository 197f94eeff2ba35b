"""Train the pruned model towards the dense model."""

import contextlib
import os
import random
import shutil
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from wanda_dvc.engine.checkpoint import write_model
from wanda_dvc.engine.windows import cut, draw, load_tokenizer, tokenize
from wanda_dvc.errors import UserError, notice
from wanda_dvc.plan import RECOVERY_BATCH
from wanda_dvc.reading import read_lines
from wanda_dvc.stages import STAGES
from wanda_dvc.stages.device import own_device
from wanda_dvc.stages.inputs import check_ready, windows_of_documents
from wanda_dvc.stages.needs import announce, computes_twice, trained_in
from wanda_dvc.stages.process import progress
from wanda_dvc.study.artifact import PROVENANCE, Work, check_source, describe, digest, read_provenance, write_provenance
from wanda_dvc.study.files import load_json, write_csv, write_json
from wanda_dvc.study.folder import Study
from wanda_dvc.training.trainer import recover as train

HELD = 4  # windows of each text that the guard measures on
COLUMNS = ("tokens", "text", "other")  # of the curve
GUARD = Path(str(files("wanda_dvc"))) / "embedded/text/train.jsonl"  # evaluations have the split `test`


def recover(*, study: Study) -> None:
    """models/dense + models/pruned + data/recovery or data/calibration → models/recovered."""
    settings, folder = study.stage_input("recover"), study.model("pruned")
    pruned, dtype = check_ready(study, "pruned")
    check_source("models/pruned", pruned["model"], read_provenance(study.model("dense"), "download model"), "apply")
    device, checkpointing = own_device(study.params.runtime), computes_twice(study)
    dtype = trained_in(dtype, device.type)
    rows, held = windows(study)
    own = {"version": STAGES["recover"].version, "pruned": digest(pruned), "windows_sha256": digest(rows.tolist())}
    own["trained_in"] = dtype
    made = pruned | describe("recover", libraries=("torch", "transformers", "accelerate"), recovery=settings, **own)
    first = os.environ.get("RANK", "0") == "0"  # of the processes of `accelerate launch`
    if first:
        announce(study, "recover")
    with study.work(made) if first else contextlib.nullcontext(Work(study.work_path(made))) as work:
        steps = len(rows) // RECOVERY_BATCH
        bar = progress(range(steps), total=steps, what="recover, steps") if first else iter(())
        view, curve = train(
            study.model("dense"), folder, rows=rows, held=held, rate=settings["rate"], device=device,
            dtype=getattr(torch, dtype), checkpointing=checkpointing,
            work=work.path / "training", step=lambda: next(bar, None),
        )  # fmt: skip
        if not first:
            return
        best = min(curve, key=lambda one: one["score"])
        if view is None:
            notice("recover: the training did not help on held-out windows: models/recovered has the pruned weights")
            shutil.copytree(folder, work.new(), copy_function=shutil.copyfile, dirs_exist_ok=True)
        else:
            list(write_model(view, work.new(), without=(PROVENANCE,)))
            if worse := [name for name in held if best[name] >= curve[0][name]]:
                notice(f"recover: warning: it did not help on {worse[0]}; metrics/plots/recovery.csv has the curve")
        tokens = int(best["tokens"] or curve[-1]["tokens"])
        write_provenance(work.out, made | {"trained": view is not None, "tokens": tokens})  # behind the best weights
        work.commit(study.model("recovered"))
    write_csv(study.plots("recovery"), COLUMNS, [[one.get(name, "") for name in COLUMNS] for one in curve])
    write_json(study.metrics("recovered", "sparsity"), load_json(study.metrics("pruned", "sparsity")))


def windows(study: Study) -> tuple[Tensor, dict[str, Tensor]]:
    """Return windows to train on in random order, the calibration's last, and the guard's, by text."""
    settings, tokenizer = study.stage_input("recover"), load_tokenizer(study.model("dense"))
    length, seed, part = settings["length"], settings["seed"], "recovery" if settings["text"] else "calibration"
    count = max(1, settings["tokens"] // length // RECOVERY_BATCH) * RECOVERY_BATCH
    rows = windows_of_documents(study, part, samples=count + HELD, length=length, seed=seed + 1)
    if rows is None:
        tokens = tokenize(study.text(part), tokenizer)
        rows = torch.stack(cut(tokens, length=length, windows=None, name="recovery.text"))
        order, used = random.Random(0).sample(range(len(rows)), len(rows)), torch.zeros(len(tokens), dtype=torch.bool)
        if part == "calibration":
            words = {"samples": settings["windows"], "length": settings["calibrated"], "seed": seed}
            used[draw(torch.arange(len(tokens)), **words).flatten()] = True
        rows = rows[sorted(order, key=used[: rows.numel()].view_as(rows).any(-1).tolist().__getitem__)]
    if len(rows) <= HELD:
        raise UserError(f"recovery.text: {len(rows)} windows of {length} tokens, expected more; take a longer text")
    held, rows = {"text": rows[:HELD]}, rows[HELD:]
    if settings["embedded"]:
        notice("recover: the guard has no other source: the text is the embedded one; recovery.text names another")
    else:
        tokens = tokenize("\n\n".join(row["text"] for _, row in read_lines(GUARD)), tokenizer)
        held["other"] = torch.stack(cut(tokens, length=length, windows=HELD, name="the guard's text"))
    if count > len(rows):
        notice(f"recover: the text repeats after {rows.numel():,} tokens; recovery.text names a longer one")
    return rows.repeat(-(-count // len(rows)), 1)[:count], held
