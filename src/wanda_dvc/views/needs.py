"""What a stage needs of memory and disk, said before it starts.

Estimates from a model's config.json, which is there before its weights are: what the engine holds
(docs/decisions/0002-the-engine.md) and what a stage writes. They are never a reason of their own
to fail: a stage is refused only where the disk is clearly too small.
"""

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from wanda_dvc.errors import UserError
from wanda_dvc.params import Params
from wanda_dvc.stages import device_name
from wanda_dvc.study.project import TEXT, Project
from wanda_dvc.study.tensors import block_count, read_stats

WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes a number
BYTES_A_TOKEN = 4  # of English text, about
LIBRARIES = 48 * 2**20  # what threads, kernels made at run time and a tokenizer take beyond the imports, about
ALLOCATOR = 64 * 2**20  # pieces of freed memory that glibc keeps, about; none with MALLOC_MMAP_THRESHOLD_ set
TEXT_IN_MEMORY = 32  # bytes for each byte of a text while it is tokenized
SELECTION = 24  # bytes a weight at work: its score, the partition of the scores, and what counts the ties


@dataclass(frozen=True)
class Sizes:
    """A model's parameters, counted; a tied head counts as embeddings."""

    parameters: int
    block: int  # the largest
    rest: int  # embeddings, norms and head: all that is in no block
    linear: int  # the largest linear's weights
    features: int  # that a block's linears read and write, each linear by itself
    widest: int  # the most features that a linear reads
    hidden: int
    vocabulary: int
    dtype: str  # as stored

    @property
    def stored(self) -> int:
        """Bytes on disk."""
        return self.parameters * WIDTH.get(self.dtype, 4)


@dataclass(frozen=True)
class Memory:
    """The most that a stage holds beyond its imports, in bytes, by what it is for."""

    weights: int = 0
    activations: int = 0
    logits: int = 0
    selection: int = 0
    text: int = 0
    mapped: bool = False  # the weights are views of the checkpoint: page cache, which may go and come back

    @property
    def total(self) -> int:
        own = self.weights + self.activations + self.logits + self.selection + self.text
        return own + LIBRARIES + ALLOCATOR

    @property
    def anonymous(self) -> int:
        return self.total - (self.weights if self.mapped else 0)


@dataclass(frozen=True)
class Need:
    """Bytes, about; None where it can't be known yet. With less free disk than `least` it can't end well."""

    memory: Memory | None = None
    disk: int | None = None
    least: int = 0


def sizes(config: Path) -> Sizes:
    """Of the model that a config.json, or the one in a directory, describes. Its weights need not be there."""
    from transformers import AutoConfig

    from wanda_dvc.engine.structure import empty_model, find_blocks, weight_shapes

    model = empty_model(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())  # each once
    blocks = find_blocks(model)[1]
    counts = [sum(parameter.numel() for parameter in block.parameters()) for block in blocks]
    # Each expert's matrix is a linear of its own.
    shapes = [[shape[-2:] for shape in weight_shapes(block) for _ in range(shape[:-2].numel())] for block in blocks]
    stored = AutoConfig.from_pretrained(config).dtype  # the model's own config says what it runs in
    return Sizes(
        parameters=parameters,
        block=max(counts),
        rest=parameters - sum(counts),
        linear=max(shape.numel() for block in shapes for shape in block),
        features=max(sum(sum(shape) for shape in block) for block in shapes),
        widest=max(max(shape) for block in shapes for shape in block),
        hidden=model.config.get_text_config().hidden_size,
        vocabulary=model.get_output_embeddings().weight.shape[0],
        dtype=str(stored or "float32").removeprefix("torch."),
    )


def choosing(stage: str, *, block: int, linear: int, threads: int, rows_apart: bool) -> Memory:
    """Of `mask` and `apply`, which hold no model: by the weights of the largest block and the largest linear."""
    from wanda_dvc.pruning.selection import WEIGHTS_AT_A_TIME

    if stage == "apply":
        return Memory(selection=block + 8 * linear)
    # The masks, a byte a weight, and the scores of as many linears as there are threads, or of some of their rows.
    scores = min(linear, WEIGHTS_AT_A_TIME) if rows_apart else linear
    return Memory(selection=block + SELECTION * min(threads * scores, block))


def peak(
    stage: str,
    model: Sizes,
    *,
    dtype: str,
    length: int = 0,
    device: str = "cpu",
    threads: int = 1,
    propagates: bool = False,
    rows_apart: bool = True,
    text: int = 0,
) -> Memory:
    """The formula of docs/cost.md: what a stage holds at most beyond its imports.

    `length` is a window's, `text` the bytes of the text that is tokenized, `propagates` says that masks are chosen
    on the outputs of pruned blocks, `rows_apart` that some rows of a linear are chosen from at a time. Zero-shot's rows
    are as long as `questions` packs them.
    """
    from wanda_dvc.engine.decoder import LOGITS_AT_A_TIME
    from wanda_dvc.engine.questions import ROW

    chosen = choosing(stage, block=model.block, linear=model.linear, threads=threads, rows_apart=rows_apart)
    if stage == "apply" or (stage == "mask" and not propagates):
        return chosen
    width = WIDTH[dtype]
    mapped = device == "cpu" and dtype == model.dtype
    measures = stage in ("perplexity", "zero-shot")
    if stage == "zero-shot":
        length = ROW
    activations = length * model.features * width + model.linear * width  # which a matrix library packs
    if not measures:
        activations += length * model.widest * 8  # the statistics' float32 copy, and its square
    return Memory(
        # The block at work, the next one, and all that is in no block.
        weights=(2 * model.block + model.rest) * width,
        activations=activations,
        # A chunk's logits, as the model gives them, in float32, and their log-softmax.
        logits=min(LOGITS_AT_A_TIME, length * model.vocabulary) * (width + 8) if measures else 0,
        # A pruned block is no view of the checkpoint.
        selection=chosen.selection + model.block * width if propagates else 0,
        text=text * TEXT_IN_MEMORY,
        mapped=mapped,
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
    threads = params.runtime.threads or os.cpu_count() or 1
    propagates = stage == "mask" and params.propagation == "pruned" and params.method != "magnitude"
    apart = rows_apart(params)
    if stage == "apply" or (stage == "mask" and not propagates):
        block, linear = _largest(project)
        memory = choosing(stage, block=block, linear=linear, threads=threads, rows_apart=apart)
        size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file()) if stage == "apply" else 0
        return Need(memory, disk=size, least=size)
    model, width = sizes(folder), WIDTH[params.dtype]
    tokens: int | None
    if stage == "perplexity":
        tokens, length = _tokens(project), params.perplexity.length
    else:
        tokens, length = params.calibration.samples * params.calibration.length, params.calibration.length
    text = project.data("perplexity" if stage == "perplexity" else "calibration") / TEXT
    memory = peak(
        stage,
        model,
        dtype=params.dtype,
        length=length,
        device=device_name(params.runtime).partition(":")[0],
        threads=threads,
        propagates=propagates,
        rows_apart=apart,
        text=text.stat().st_size if text.is_file() and stage != "zero-shot" else 0,
    )
    if stage in ("calibrate", "perplexity") or propagates:
        disk = tokens * model.hidden * width * 2 if tokens else None
        return Need(memory, disk=disk, least=(disk or 0) // (2 if stage == "perplexity" else 1))
    return Need(memory, disk=0)


def rows_apart(params: Params) -> bool:
    """Whether `mask` holds the scores of some rows of a linear at a time, or of all."""
    from wanda_dvc.pruning.methods import METHODS

    return METHODS[params.method].rows_apart(params.pattern, params.group)


def _largest(project: Project) -> tuple[int, int]:
    """The weights of the largest block and of the largest linear: of the linears that were measured, where some were,
    since to build a model takes seconds of imports."""
    from wanda_dvc.engine.checkpoint import Checkpoint

    blocks = range(block_count(project.stats))
    if not blocks:
        model = sizes(project.model("dense"))
        return model.block, model.linear
    checkpoint = Checkpoint(project.model("dense"))
    counts = [
        [
            checkpoint.weight(name).numel()
            for names in read_stats(project.stats, block).readers.values()
            for name in names
        ]
        for block in blocks
    ]
    return max(map(sum, counts)), max(map(max, counts))


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
        (f"{_gb(wanted.memory.total)} of memory{on}", f"{_gb(free_memory)} of memory{on}") if wanted.memory else None,
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
