"""What stages read: statistics, windows, models, each checked in one place."""

from functools import partial
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING

import torch

from wanda_dvc.engine.accelerator import multiplies_natively
from wanda_dvc.engine.checkpoint import Checkpoint, dtype_of, max_positions, read_config
from wanda_dvc.engine.windows import DrawnWindows, draw, draw_from_documents, interleaved, load_tokenizer, tokenize
from wanda_dvc.errors import UserError, notice
from wanda_dvc.params import numbered
from wanda_dvc.plan import FEW_TOKENS, SMALLER, TOKENS_A_FEATURE, TOO_FEW_TOKENS, Plan
from wanda_dvc.reading import check_file, is_there
from wanda_dvc.stages import STAGES
from wanda_dvc.stages.device import own_device
from wanda_dvc.study.artifact import (
    MODEL_COMMANDS,
    PROVENANCE,
    Work,
    check_source,
    digest,
    file_digest,
    read_provenance,
)
from wanda_dvc.study.files import Json, load_json, open_documents
from wanda_dvc.study.folder import DOCUMENTS, Study

if TYPE_CHECKING:
    from wanda_dvc.engine.cluster import Cluster
    from wanda_dvc.engine.depth import DepthChoice
    from wanda_dvc.engine.forward import ModelRunner
    from wanda_dvc.engine.removal import Removal


CHOICES_FILE = "choices.json"  # of stats/blocks


def check_ready(study: Study, model: str, length: int | None = None, setting: str = "") -> tuple[Json, str]:
    """Check device, files, configuration and window length; return the model's provenance and the dtype of its run."""
    own_device(study.params.runtime)
    if study.params.runtime.ray is not None:
        import_module("ray")  # ModuleNotFoundError, which is explained, without the extra
    provenance = read_provenance(study.model(model), MODEL_COMMANDS[model])
    for file in study.model(model).iterdir():
        check_file(file)  # transformers passes over a generation_config.json that it cannot read
    positions = max_positions(read_config(study.model(model)))
    if length and positions is not None and length > positions:
        problem = f"got {length}, expected at most {positions}, the positions of the model in {study.model(model)}"
        raise UserError(f"{setting}: {problem}; set {setting}={positions} or less")
    return provenance, model_dtype(study, model)


def model_dtype(study: Study, model: str = "dense") -> str:
    """Return the dtype in which one of a study's models runs, by name; `auto` is that of the model's config.json."""
    wanted: str = study.stage_input("calibrate/norms")["dtype"]
    return dtype_of(study.model(model)) if wanted == "auto" else wanted


def statistics(study: Study) -> tuple[Json, dict[str, str]]:
    """Return the provenance of stats/norms, and the digests of what else masks read.

    These are `method`, `gram`, `fisher` and `blocks`. UserError if they are of another model, of other settings, or of
    too few tokens.
    """
    norms = read_provenance(study.norms, "calibrate")
    dense = read_provenance(study.model("dense"), MODEL_COMMANDS["dense"])
    check_source("stats", norms["model"], dense, "calibrate")
    params = study.stage_input("calibrate/norms") | {"dtype": model_dtype(study)}
    expected = {"version": STAGES["calibrate"].version, **params}
    measured = {"version": norms.get("version"), **norms["params"]}
    if measured != expected:
        problem = f"measured with {measured}, expected {expected} as params.yaml has it"
        raise UserError(f"stats/: {problem}; run `dvc repro` or `wanda-dvc calibrate`")
    check_distinct(study, norms["distinct"], norms["widest"])
    plan = study.plan
    needs = ((study.gram, plan.mask_reads_gram), (study.fisher, plan.mask_reads_fisher))
    folders = [folder for folder, is_read in (*needs, (study.blocks, plan.measures_blocks)) if is_read]
    digests = {folder.name: digest(statistics_provenance(folder, norms)) for folder in folders}
    if plan.method.package:
        digests["method"] = file_digest(study.source("method"))
    return norms, digests


def check_distinct(study: Study, distinct: int, widest: int) -> str:
    """Return what solvers lack if the windows have few distinct tokens, or "".

    UserError if it is the text that has too few for the plan's solver. Windows that ask for fewer tokens are a choice
    of the user. `widest` is the largest number of features that a linear reads or writes.
    """
    settings, needed = study.stage_input("calibrate/norms"), TOKENS_A_FEATURE * widest
    problem = (
        f"{distinct:,} distinct tokens, expected {needed:,} for solvers, {TOKENS_A_FEATURE} for each of "
        f"{widest:,} features"
    )
    drawn = settings["windows"] * settings["length"]
    if study.plan.solves and drawn >= needed and distinct < TOO_FEW_TOKENS * widest:
        raise UserError(f"calibration.text: {problem}; take a longer text, such as c4, more texts, or recipe wanda")
    return problem if distinct < FEW_TOKENS * widest else ""


def discard_unfinished_gram(study: Study) -> None:
    """Remove Gram matrices that `calibrate norms` measured for `calibrate gram`, if DVC has restored stats/gram.

    `calibrate gram` then did not run, and left them as unfinished work, several gigabytes.
    """
    made_from = stored_gram(study)
    if is_there(study.work_path(made_from)):
        with study.work(made_from) as work:
            work.discard()


def stored_gram(study: Study) -> Json:
    """Return the provenance of stats/gram without its number of blocks, as of unfinished work; {} without one."""
    return {name: value for name, value in load_json(study.gram / PROVENANCE).items() if name != "blocks"}


def statistics_provenance(folder: Path, made_with: Json, what: str = "stats/norms") -> Json:
    """Return the provenance of stats/gram, stats/fisher or stats/blocks.

    UserError if it was not measured, or is of another run than `made_with`: model, text and parameters of `what`.
    """
    provenance = read_provenance(folder, "calibrate")
    if any(provenance.get(name) != made_with.get(name) for name in ("version", "model", "text", "params")):
        raise UserError(
            f"stats/{folder.name}: found a calibration of {provenance['model']['source']}, expected that of the model, "
            f"text and version that {what} names; run `dvc repro` or `wanda-dvc calibrate` with those settings"
        )
    return provenance


def read_choices(folder: Path) -> "list[DepthChoice]":
    """Read the best choices of one, two and more blocks to remove; none if the folder has none yet."""
    from wanda_dvc.engine.depth import DepthChoice  # imports transformers, which takes seconds

    return [DepthChoice(**choice) for choice in load_json(folder / CHOICES_FILE).get("choices", [])]


def draw_calibration(study: Study, *, further: int = 0) -> DrawnWindows:
    """Draw windows from data/calibration, with the dense model's tokenizer, and count the tokens in them, each once.

    `further` is added to the seed. Each of several texts is drawn from alone, by one seed; then windows take turns.
    """
    settings = study.stage_input("calibrate/norms")
    shares, length, seed, texts = settings["shares"], settings["length"], settings["seed"] + further, []
    for source, samples in zip(numbered("calibration", "/", len(shares)), shares, strict=True):
        drawn = draw_documents(study, source, samples=samples, length=length, seed=seed)
        if drawn is None:
            tokens = tokenize(study.text(source), load_tokenizer(study.model("dense")))
            drawn = draw(tokens, samples=samples, length=length, seed=seed, setting=setting_of(source))
        texts.append(drawn)
    windows = torch.cat([drawn.tokens for drawn in texts])[interleaved(shares)]
    return DrawnWindows(windows, sum(drawn.distinct for drawn in texts))


def setting_of(source: str) -> str:
    """Return the setting of a text in `data/`: `calibration.text.0` of `calibration/0`."""
    section, *number = source.split("/")
    return ".".join([section, "text", *number])


def draw_documents(study: Study, source: str, *, samples: int, length: int, seed: int) -> DrawnWindows | None:
    """Draw windows from a text of separate documents in `data/`, such as `calibration/0`; None of another text."""
    folder = study.data(source)
    if not is_there(folder / DOCUMENTS):
        return None
    downloaded = read_provenance(folder, f"download {source.partition('/')[0]}")
    tokens_of = partial(tokenize, tokenizer=load_tokenizer(study.model("dense")))
    documents = open_documents(folder / DOCUMENTS, downloaded["column"], downloaded["sha256"])
    setting = setting_of(source)
    return draw_from_documents(documents, tokens_of, samples=samples, length=length, seed=seed, setting=setting)


def removal_of(checkpoint: Checkpoint, plan: Plan, device: torch.device) -> "Removal | None":
    """Return how many units a pattern removes, and where they are; None if it sets weights to zero.

    UserError if a sparsity above 0 removes no unit.
    """
    if plan.structure is None:
        return None
    # The import of transformers takes seconds.
    removal: Removal = resolve_name(plan.structure.find)(checkpoint, plan.structure, plan.sparsity, device)
    if plan.sparsity and not removal.sparsity and plan.pattern != SMALLER:
        problem = f"got {float(plan.sparsity):g}, which removes none of the {removal.structure.about}"
        raise UserError(f"sparsity: {problem}; set a higher sparsity, or another pattern")
    return removal


def runner(study: Study, model: str, work: Work) -> "ModelRunner":
    """Return a runner of sequences through a model, here or on the cluster of params.yaml."""
    from wanda_dvc.engine.decoder import Decoder  # imports transformers, which takes seconds
    from wanda_dvc.engine.forward import ModelRunner

    runtime, dtype = study.params.runtime, model_dtype(study, model)
    device = own_device(runtime) if runtime.ray is None else torch.device("cpu")
    if device.type == "cpu" and runtime.ray is None and not multiplies_natively(getattr(torch, dtype)):
        problem = f"this CPU has no instructions for {dtype}, so it is many times slower than float32"
        notice(f"dtype: {problem}; set dtype=float32 (last digits differ), or use another machine")
    decoder = Decoder(study.model(model), dtype=getattr(torch, dtype), device=device)
    return ModelRunner(decoder, work.path.absolute(), cluster(study))


def cluster(study: Study) -> "Cluster | None":
    """Return the Ray cluster of params.yaml; None if the setting names no cluster."""
    runtime = study.params.runtime
    if runtime.ray is None:
        return None
    from wanda_dvc.engine.cluster import Cluster

    connected = Cluster(runtime.ray, device=runtime.device)
    notice(f"runtime.ray: workers: {connected.workers}")
    return connected
