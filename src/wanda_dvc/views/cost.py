"""What a study costs, on paper: FLOPs, bytes, memory, disk and time, from a config.json and no weights.

docs/cost.md has the formulas in words, tables, and how far they are from what was measured.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tabulate import tabulate

from wanda_dvc.errors import UserError
from wanda_dvc.params import Params, check_params
from wanda_dvc.study.project import TEXT, Project
from wanda_dvc.views.needs import BYTES_A_TOKEN, SELECTION, WIDTH, Memory, Sizes, peak, rows_apart, sizes

DISK = 2e9  # bytes a second from a local NVMe disk; from the page cache it is more
HOST = 4e9  # bytes of weights and scores a second in mask and apply, on two cores of 135 M and of 1.5 B parameters
TEST_SPLIT = 1_290_590  # bytes of WikiText-2's test split, for a text that is not there yet

# Of lm-eval's tasks: the items of the split that is asked, the tokens that a question needs (its context once, its
# choices after it) and the positions at which it needs logits; means of the first 200 items with SmolLM2's tokenizer.
TASKS = {
    "piqa": (1838, 57.4, 44.6),
    "hellaswag": (10042, 90.2, 60.4),
    "arc_easy": (2376, 41.6, 14.4),
    "boolq": (3270, 148.8, 1.0),
    "rte": (277, 80.1, 1.0),
}
SAMPLES = 48  # items a task of `tasks.source: samples`


@dataclass(frozen=True)
class Device:
    """Peak rates and bandwidths as published, and the share of them that is reached."""

    name: str
    flops: dict[str, float]  # a second, dense, by dtype
    bandwidth: float  # bytes a second of its memory
    link: float | None  # bytes a second from the host, each way; None: it is the host
    efficiency: float


# An L40S reached 41 % of its peak in the reproduction study's perplexity of LLaMA-2-7B (32 s for 341,000 tokens in
# windows of 4,096, float16); for an H100 the same share is assumed. The CPU's is that of calibrate and perplexity on
# SmolLM2-135M (docs/experiments.md).
DEVICES = {
    "l40s": Device("NVIDIA L40S", {"float32": 91.6e12, "bfloat16": 362e12, "float16": 362e12}, 864e9, 32e9, 0.41),
    "h100": Device("NVIDIA H100 SXM", {"float32": 67e12, "bfloat16": 989e12, "float16": 989e12}, 3.35e12, 64e9, 0.41),
}
CPU_EFFICIENCY = 0.83


@dataclass(frozen=True)
class Work:
    """What one token is multiplied with. Of experts, those that it is sent to count."""

    linears: int  # weights of all blocks
    pairs: int  # query features of all blocks: what each pair of tokens costs twice, for q·k and for its share of v
    head: int  # weights
    blocks: int

    def flops(self, windows: float, length: float, *, logits: float = 0) -> float:
        """Of windows through all blocks, with the causal half of attention, and of the head at `logits` positions."""
        tokens = windows * length
        return 2 * tokens * self.linears + 2 * tokens * length * self.pairs + 2 * logits * self.head


@dataclass(frozen=True)
class StageCost:
    """One stage's; bytes, and seconds."""

    stage: str
    flops: float
    read: float  # from the checkpoint
    hidden: float  # states that wait between blocks, written and read
    disk: float  # what it leaves, or needs while it works
    memory: Memory
    seconds: float


def work(config: Path) -> Work:
    """Of the model that a config.json describes. Windowed attention counts as if it saw all."""
    from wanda_dvc.engine.structure import empty_model, find_blocks, weight_shapes

    model = empty_model(config)
    text = model.config.get_text_config()
    blocks = find_blocks(model)[1]
    experts, asked = _experts(text)
    shapes = [shape for block in blocks for shape in weight_shapes(block)]
    linears = sum(shape.numel() * (asked / experts if len(shape) == 3 else 1) for shape in shapes)
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    head = model.get_output_embeddings().weight.numel()
    return Work(int(linears), len(blocks) * text.num_attention_heads * width, head, len(blocks))


def _experts(config: Any) -> tuple[int, int]:
    """How many experts a block has, and how many a token is sent to."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    count = next((value for name in names if (value := getattr(config, name, None))), 1)
    return count, getattr(config, "num_experts_per_tok", None) or 1


def this_cpu(dtype: str) -> Device:
    """The machine at hand: its rate is measured, by multiplying matrices for a moment."""
    import torch

    from wanda_dvc.stages import processor

    torch.set_num_threads(os.cpu_count() or 1)
    x, weight = (torch.randn(size, 2048).to(getattr(torch, dtype)) for size in (1024, 2048))
    spent = []
    for _ in range(4):
        began = time.perf_counter()
        x @ weight.T
        spent.append(time.perf_counter() - began)
    rate = 2 * 1024 * 2048 * 2048 / min(spent)
    return Device(f"{processor()}, {os.cpu_count()} cores", {dtype: rate}, HOST, None, CPU_EFFICIENCY)


def stage_costs(params: Params, model: Sizes, through: Work, device: Device, *, tokens: int) -> Iterator[StageCost]:
    """Of every stage after the downloads, for one model; `tokens` are those of the perplexity text."""
    width, stored = WIDTH[params.dtype], WIDTH.get(model.dtype, 4)
    where = "cuda" if device.link else "cpu"
    rate, threads = device.flops[params.dtype] * device.efficiency, os.cpu_count() or 1
    apart = rows_apart(params)
    memory = partial(peak, model=model, dtype=params.dtype, device=where, threads=threads, rows_apart=apart)

    def walk(stage: str, windows: float, length: float, logits: float = 0) -> StageCost:
        waiting = 2 * windows * length * model.hidden * width  # two files that take turns
        hidden = through.blocks * waiting
        flops = through.flops(windows, length, logits=logits)
        computed = flops / rate
        read = model.stored / DISK
        if device.link:
            # Each window passes through all weights in the card's memory, and each block takes every window from the
            # host and gives it back. The weights of the next block come meanwhile.
            computed = max(computed, windows * through.linears * width / (device.bandwidth * device.efficiency))
            computed += hidden / (device.link * device.efficiency)
            read = max(read, model.parameters * width / (device.link * device.efficiency))
        size = memory(stage, length=int(length))
        return StageCost(stage, flops, model.stored, hidden, waiting, size, max(computed, read))

    calibration, measured = params.calibration, params.perplexity
    calibrate = walk("calibrate", calibration.samples, calibration.length)
    yield calibrate
    masks = through.linears / 8
    chosen = StageCost("mask", 0, model.stored, 0, masks, memory("mask"), through.linears * (stored + SELECTION) / HOST)
    if params.propagation == "pruned" and params.method != "magnitude":  # each block is run twice more
        twice = walk("mask", 2 * calibration.samples, calibration.length)
        size = memory("mask", length=calibration.length, propagates=True)
        chosen = replace(twice, disk=masks + calibrate.disk, memory=size, seconds=twice.seconds + chosen.seconds)
    yield chosen
    # Copied to the disk, then read, multiplied and counted.
    seconds = model.stored / DISK + through.linears * (4 * stored + 1) / HOST
    yield StageCost("apply", 0, model.stored, 0, model.stored, memory("apply"), seconds)
    windows = tokens / measured.length
    yield walk("perplexity", windows, measured.length, logits=tokens)
    most = min(params.zero_shot.limit or 10**9, SAMPLES if params.tasks.source == "samples" else 10**9)
    needed = [_task(name) for name in params.tasks.names]
    asked = sum(min(items, most) * fed for items, fed, _ in needed)
    logits = sum(min(items, most) * positions for items, _, positions in needed)
    rows = max(1.0, asked / 2048)  # packed; attention is within a question, and so small that rows overstate it
    yield walk("zero-shot", rows, asked / rows, logits)


def _task(name: str) -> tuple[int, float, float]:
    """A task that is not in the table is taken for an average one."""
    known = list(TASKS.values())
    average = (int(sum(x[0] for x in known) / 5), sum(x[1] for x in known) / 5, sum(x[2] for x in known) / 5)
    return TASKS.get(name, average)


def cost(
    *,
    start: Path,
    config: Path | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    windows: int | None = None,
    length: int | None = None,
) -> str:
    """A table of what each stage costs with the settings at hand (outside a project, the default's)."""
    project, params = _settings(start, dtype, windows, length)
    if config is None:
        if project is None:
            raise UserError(f"{start}: no project here; name a config.json, or cd into a project")
        config = project.model("dense")
    if not (config / "config.json" if config.is_dir() else config).is_file():
        raise UserError(f"{config}: no config.json, expected a model's directory or its config.json")
    if device not in ("cpu", *DEVICES):
        raise UserError(f"--device: got {device}, expected cpu, {', '.join(DEVICES)}")
    model, through = sizes(config), work(config)
    on = DEVICES[device] if device in DEVICES else this_cpu(params.dtype)
    text = project.data("perplexity") / TEXT if project else None
    there = (text.stat().st_size if text and text.is_file() else TEST_SPLIT) // BYTES_A_TOKEN
    wanted = params.perplexity
    tokens = min(there, wanted.windows * wanted.length) if wanted.windows and not windows else there
    tokens = windows * wanted.length if windows else tokens
    costs = list(stage_costs(params, model, through, on, tokens=tokens))
    rows = [
        [
            row.stage,
            f"{row.flops / 1e12:,.1f}" if row.flops else "–",
            _gb(row.read),
            _gb(row.hidden) if row.hidden else "–",
            _gb(row.memory.anonymous),
            _gb(row.disk),
            _duration(row.seconds),
        ]
        for row in costs
    ]
    headers = ["stage", "TFLOP", "read, GB", "hidden states, GB", "memory, GB", "disk, GB", "time"]
    rate = f"{on.flops[params.dtype] / 1e12:.3g} TFLOP/s"
    how = "published" if on.link else "measured now"
    card = "; an estimate, no card was at hand" if on.link else ""
    return "\n".join(
        [
            f"{model.parameters / 1e9:.2f} B parameters, {through.linears / 1e9:.2f} B of them in the linears that a "
            f"token meets; stored in {model.dtype}, {_gb(model.stored)} GB; runs in {params.dtype}",
            f"{on.name}: {rate} {how}, of which {on.efficiency:.0%} are expected{card}",
            f"{params.calibration.samples} windows of {params.calibration.length} to calibrate, {tokens:,} tokens in "
            f"windows of {wanted.length} for perplexity, {len(params.tasks.names)} tasks"
            + (f" × {params.zero_shot.limit}" if params.zero_shot.limit else ""),
            "",
            tabulate(rows, headers, tablefmt="github", disable_numparse=True),
            "",
            f"One more experiment adds {_gb(through.linears / 8)} GB to the cache (its masks) and takes "
            f"{_duration(sum(row.seconds for row in costs[1:]))}; the first one "
            f"{_duration(sum(row.seconds for row in costs))} and its dense baselines "
            f"{_duration(sum(row.seconds for row in costs[3:]))} more.",
        ]
    )


def _settings(start: Path, dtype: str | None, windows: int | None, length: int | None) -> tuple[Project | None, Params]:
    from wanda_dvc.study.presets import DEFAULT, read_preset

    try:
        project = Project.find(start)
    except UserError:
        project = None
    params = project.params if project else check_params(_nested(read_preset(DEFAULT).settings))
    content = params.model_dump()
    for section, count in (("calibration", "samples"), ("perplexity", "windows")):
        content[section] |= {count: windows} if windows else {}
        content[section] |= {"length": length} if length else {}
    return project, check_params(content | ({"dtype": dtype} if dtype else {}))


def _nested(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings by dotted name, as the schema has them."""
    content: dict[str, Any] = {}
    for name, value in settings.items():
        *sections, leaf = name.split(".")
        target = content
        for section in sections:
            target = target.setdefault(section, {})
        target[leaf] = value
    return content


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f}" if size < 1e11 else f"{size / 1e9:,.0f}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
