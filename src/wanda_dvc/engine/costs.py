"""What a stage costs on paper: FLOPs, bytes and seconds. docs/cost.md has the formulas in words."""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wanda_dvc.engine import shards
from wanda_dvc.engine.sizes import SELECTION, WIDTH, Memory, Sizes
from wanda_dvc.machine import cores

DISK = 2e9  # bytes a second from a local NVMe disk; from the page cache it is more
PRODUCTS = 20  # of a weight and a Gram matrix, in a solver: conjugate gradients take 10, ADMM 20
ERROR_PRODUCTS = 8  # that take as long as one in float64, of a layer error, with its share of reading the matrix
NETWORK = 1.2e9  # bytes a second to the driver, of 10 Gbit/s Ethernet
HOST = 5e9  # bytes of weights and scores a second in mask and apply, on two cores, at 135 M parameters; more at 7 B


@dataclass(frozen=True)
class Device:
    """Peak rates and bandwidths as published, and the share of them that is reached."""

    name: str
    flops: dict[str, float]  # a second, dense, by dtype
    bandwidth: float  # bytes a second of its memory
    link: float | None  # bytes a second from the host, each way; None: it is the host
    efficiency: float
    holds: float = 0  # bytes of a card


def _flops(half: float, single: float) -> dict[str, float]:
    return {"float32": single, "bfloat16": half, "float16": half}


# An L40S reached 41 % of its peak in the reproduction study's perplexity of LLaMA-2-7B (32 s for 341,000 tokens in
# windows of 4,096, float16); for the others the same share is assumed. The CPU's is that of calibrate and perplexity on
# SmolLM2-135M (docs/experiments.md).
DEVICES = {
    "l40s": Device("NVIDIA L40S", _flops(362e12, 91.6e12), 864e9, 32e9, 0.41, 48e9),
    "h100": Device("NVIDIA H100 SXM", _flops(989e12, 67e12), 3.35e12, 64e9, 0.41, 80e9),
    "h200": Device("NVIDIA H200 SXM", _flops(989e12, 67e12), 4.8e12, 64e9, 0.41, 141e9),
    "a100": Device("NVIDIA A100 80 GB", _flops(312e12, 19.5e12), 2e12, 32e9, 0.41, 80e9),
    "a10": Device("NVIDIA A10", _flops(125e12, 31.2e12), 600e9, 32e9, 0.41, 24e9),
    "l4": Device("NVIDIA L4", _flops(121e12, 30.3e12), 300e9, 32e9, 0.41, 24e9),
    "rtx4090": Device("RTX 4090", _flops(165e12, 82.6e12), 1008e9, 32e9, 0.41, 24e9),
}
CPU_EFFICIENCY = 0.83


@dataclass(frozen=True)
class Work:
    """The weights that one token is multiplied with. Of experts, those that it is sent to count."""

    linears: int  # weights of all blocks
    all_linears: int  # with all experts: what is pruned
    pairs: int  # query features of all blocks: each pair of tokens costs them twice, for q·k and for its share of v
    head: int  # weights
    blocks: int

    def flops(self, windows: float, length: float, *, logits: float = 0) -> float:
        """Count windows through all blocks, with the causal half of attention, and the head at `logits` positions."""
        tokens = windows * length
        return 2 * tokens * self.linears + 2 * tokens * length * self.pairs + 2 * logits * self.head


@dataclass(frozen=True)
class Cost:
    """Of one stage; bytes, and seconds."""

    flops: float
    read: float  # from the checkpoint
    hidden: float  # states that wait between blocks, written and read
    disk: float  # what the stage leaves, or needs while it works
    memory: Memory
    seconds: float


@dataclass(frozen=True)
class Setting:
    """A model on a device: what the costs of all stages start from."""

    model: Sizes
    work: Work
    device: Device
    dtype: str
    tokens: int  # of the text that perplexity is measured on
    workers: int = 1

    @property
    def where(self) -> str:
        """The device's kind, as torch names it."""
        return "cuda" if self.device.link else "cpu"

    @property
    def stored_width(self) -> int:
        """Bytes of a stored weight."""
        return WIDTH.get(self.model.dtype, 4)

    @property
    def threads(self) -> int:
        """Threads of the host."""
        return cores()

    @property
    def float32_rate(self) -> float:
        """FLOP/s that the products of Gram matrices and of solvers get, which are in float32."""
        return self.device.flops.get("float32", self.device.flops[self.dtype]) * self.device.efficiency

    def walk(self, windows: float, length: float, memory: Memory, *, logits: float = 0) -> Cost:
        """Cost of windows through all blocks and of the head at `logits` positions."""
        device, width = self.device, WIDTH[self.dtype]
        waiting = 2 * windows * length * self.model.hidden * width  # two files that take turns
        hidden = self.work.blocks * waiting
        flops = self.work.flops(windows, length, logits=logits)
        computed = flops / (device.flops[self.dtype] * device.efficiency)
        read = self.model.stored / DISK
        if device.link:
            # As many windows as fill a card pass through the weights in its memory together. Each block takes those
            # that it has no room for from the host and gives them back. The weights of the next block come meanwhile.
            passes = windows * length / max(length, shards.TOKENS_TOGETHER["cuda"])
            computed = max(computed, passes * self.work.linears * width / (device.bandwidth * device.efficiency))
            room = max(0.0, device.holds - self.model.parameters / self.work.blocks * 2 * width) / 2
            hidden = self.work.blocks * max(0.0, waiting - room)
            computed += hidden / (device.link * device.efficiency)
            read = max(read, self.model.parameters * width / (device.link * device.efficiency))
        return Cost(flops, self.model.stored, hidden, waiting, memory, max(computed * self.share(windows), read))

    def share(self, windows: float) -> float:
        """The part of the work on all windows that the worker does that has most shards."""
        return math.ceil(self._shards(windows) / self.workers) / self._shards(windows)

    def solving_share(self, *, by_block: bool) -> float:
        """The part of all solving that one worker does, of jobs of all blocks, or of one block at a time.

        Then the largest job decides: about two of the largest linears.
        """
        largest = min(1.0, 2 * self.model.linear / self.model.block) if by_block else 0.0
        return max(1 / self.workers, largest) if self.workers > 1 else 1.0

    def sending(self, windows: float, size: float) -> float:
        """Seconds in which all shards' results of so many bytes reach the driver, where others computed them."""
        return 0 if self.workers == 1 else self._shards(windows) * size / NETWORK

    def _shards(self, windows: float) -> int:
        return len(shards.cut(max(1, math.ceil(windows))))


def choosing_seconds(on: Setting) -> float:
    """Return about how long all linears are scored and selected from: by the host, or by a card and the link to it."""
    linears, device = on.work.all_linears, on.device
    if device.link is None:
        return linears * (on.stored_width + SELECTION) / HOST
    scored = SELECTION / device.bandwidth + (on.stored_width + 1) / device.link  # a weight goes, a byte comes back
    return max(linears * (scored / device.efficiency + 1 / HOST), on.model.stored / DISK)


def solving_seconds(solves: bool, on: Setting, *, by_gradients: bool = False) -> float:
    """Return about how long all linears are solved for, each by `PRODUCTS` multiplications of W and XᵀX.

    With `by_gradients` as many more of both its Gram matrices follow.
    """
    return _multiplying_seconds(PRODUCTS * (solves + 2 * by_gradients), on)


def error_seconds(models: int, on: Setting) -> float:
    """Return about how long the outputs and the layer errors of all linears take, of so many pruned models."""
    return _multiplying_seconds(ERROR_PRODUCTS * (1 + models), on)


def _multiplying_seconds(products: int, on: Setting) -> float:
    return products * 2 * on.work.all_linears * on.model.hidden / on.float32_rate


def work(config: Path) -> Work:
    """Count the model that a config.json describes. Windowed attention counts as full attention."""
    from wanda_dvc.engine.structure import empty_model, find_blocks, weight_shapes

    model = empty_model(config)
    text = model.config.get_text_config()
    blocks = find_blocks(model)[1]
    experts, asked = _experts(text)
    shapes = [shape for block in blocks for shape in weight_shapes(block)]
    linears = sum(shape.numel() for shape in shapes)
    met = sum(shape.numel() * (asked / experts if len(shape) == 3 else 1) for shape in shapes)
    heads = getattr(text, "num_attention_heads", None) or 0  # Mamba has none
    width = getattr(text, "head_dim", None) or text.hidden_size // max(1, heads)
    head = model.get_output_embeddings().weight.numel()
    return Work(int(met), linears, len(blocks) * heads * width, head, len(blocks))


def _experts(config: Any) -> tuple[int, int]:
    """Return how many experts a block has, and how many a token is sent to."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    count = next((value for name in names if (value := getattr(config, name, None))), 1)
    return count, getattr(config, "num_experts_per_tok", None) or 1


def this_cpu(name: str, dtype: str) -> Device:
    """Measure the machine at hand by multiplying matrices for a moment."""
    import torch

    from wanda_dvc.pruning.products import multiply

    torch.set_num_threads(cores())
    x, weight = (torch.randn(size, 2048).to(getattr(torch, dtype)) for size in (1024, 2048))
    spent = []
    for _ in range(4):
        began = time.perf_counter()
        multiply(x, weight.T)
        spent.append(time.perf_counter() - began)
    rate = 2 * 1024 * 2048 * 2048 / min(spent)
    return Device(f"{name}, {cores()} cores", {dtype: rate}, HOST, None, CPU_EFFICIENCY)
