"""What a stage needs of memory and disk, said before it starts.

Estimates from a model's config.json, which is there before its weights are: what the engine holds
(docs/decisions/0002-the-engine.md) and what a stage writes. They are never a reason of their own
to fail: a stage is refused only where the disk is clearly too small.
"""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from wanda_dvc.artifacts import TEXT, Project
from wanda_dvc.errors import UserError
from wanda_dvc.stages import device_name

WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes a number
BYTES_A_TOKEN = 4  # of English text, about


@dataclass(frozen=True)
class Sizes:
    """A model's parameters, counted; a tied head counts as embeddings."""

    parameters: int
    block: int  # the largest
    hidden: int
    rest: int  # embeddings, norms and head: all that is in no block
    stored: int  # bytes on disk, in the dtype that the config names


@dataclass(frozen=True)
class Need:
    """Bytes, about; None where it can't be known yet. With less free disk than `least` it can't end well."""

    memory: int | None = None
    disk: int | None = None
    least: int = 0


def sizes(folder: Path) -> Sizes:
    """Of the model that a directory's config.json describes. Its weights need not be there."""
    from transformers import AutoConfig

    from wanda_dvc.blocks import empty_model, find_blocks

    model = empty_model(folder)
    parameters = sum(parameter.numel() for parameter in model.parameters())  # each once
    blocks = [sum(parameter.numel() for parameter in block.parameters()) for block in find_blocks(model)[1]]
    stored = AutoConfig.from_pretrained(folder).dtype  # the model's own config says what it runs in
    width = WIDTH.get(str(stored).removeprefix("torch."), 4)
    return Sizes(
        parameters,
        max(blocks),
        model.config.get_text_config().hidden_size,
        parameters - sum(blocks),
        parameters * width,
    )


def need(*, project: Project, stage: str, part: str | None = None) -> Need:
    """Of one stage; `part` is what `download` fetches, or the model that is measured."""
    params = project.params
    if stage == "download":
        source = Path(params.model)
        if part != "model" or not source.is_dir():
            return Need()
        size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        return Need(disk=2 * size, least=size)  # in models/dense and, where it can't be linked, in the cache
    folder = project.model(part if stage in ("perplexity", "zero-shot") and part else "dense")
    if not (folder / "config.json").is_file():
        return Need()
    if stage == "apply":
        size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
        return Need(disk=size, least=size)
    model, width = sizes(folder), WIDTH[params.dtype]
    if stage == "zero-shot":
        return Need(memory=model.parameters * width, disk=0)
    walking = (2 * model.block + model.rest) * width
    if stage == "perplexity":
        from wanda_dvc.blocks import LOGITS_AT_A_TIME

        tokens = _tokens(project)
        disk = tokens * model.hidden * width * 2 if tokens else None
        return Need(memory=walking + LOGITS_AT_A_TIME * (4 + width), disk=disk, least=(disk or 0) // 2)
    disk = params.calibration.samples * params.calibration.length * model.hidden * width * 2
    propagates = params.propagation == "pruned" and params.method != "magnitude"
    if stage == "calibrate" or propagates:
        return Need(memory=walking, disk=disk, least=disk)
    return Need(memory=model.block * width, disk=0)


def announce(*, project: Project, stage: str, part: str | None = None) -> None:
    """Say on stderr what a stage needs and what is free. UserError if the disk is clearly too small for it."""
    try:
        wanted = need(project=project, stage=stage, part=part)
    except (UserError, ValueError, KeyError, OSError):
        return  # a model that can't be made sense of: the stage says so better, or does not mind
    device = device_name(project.params.runtime)
    free_memory, free_disk = memory(device), disk(project)
    if wanted.least > free_disk:
        raise UserError(
            f"{project.root}: {_gb(free_disk)} of disk free, expected about {_gb(wanted.disk or 0)} for {stage}; "
            "free some (`dvc gc --workspace` drops what no experiment at hand uses), or take a larger disk"
        )
    on = f" on {device}" if device.startswith("cuda") else ""
    parts = [
        (f"{_gb(wanted.memory)} of memory{on}", f"{_gb(free_memory)} of memory{on}") if wanted.memory else None,
        (f"{_gb(wanted.disk)} of disk", f"{_gb(free_disk)} of disk") if wanted.disk else None,
    ]
    known = [part for part in parts if part]
    if known:
        needs, free = (" and ".join(words) for words in zip(*known, strict=True))
        print(f"{stage} needs about {needs}; free: {free}", file=sys.stderr, flush=True)


def memory(device: str) -> int:
    """Free bytes, of a GPU's memory where that is what a stage runs on."""
    if device.startswith("cuda"):
        import torch

        if torch.cuda.is_available():
            return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)


def disk(project: Project) -> int:
    """Free bytes; what unfinished work holds counts as free, since a run that goes on from it takes no more."""
    work = project.root / ".dvc/tmp/wanda-dvc"
    unfinished = sum(path.lstat().st_blocks * 512 for path in work.rglob("*") if not path.is_dir())
    return shutil.disk_usage(project.root).free + unfinished


def _tokens(project: Project) -> int | None:
    """Of the text that perplexity is measured on: at most as many as the windows hold."""
    text = project.data("perplexity") / TEXT
    wanted = project.params.perplexity
    known = [text.stat().st_size // BYTES_A_TOKEN] if text.is_file() else []
    return min([*known, wanted.windows * wanted.length] if wanted.windows else known, default=None)


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 5e7 else f"{max(size / 1e6, 0.1):.1f} MB"
