"""The floor: how fast this machine multiplies matrices of a model's shapes, and nothing else."""

import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import ours
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

AT_THE_HEAD = 512  # positions at a time; their logits are about as large as the activations of a block


def seconds_of(multiply: Callable[[], object], budget: float) -> float:
    """Return the median of as many calls as fit into `budget` seconds, at least three, after one to warm up."""
    multiply()
    times: list[float] = []
    while len(times) < 3 or sum(times) < budget:
        began = time.perf_counter()
        multiply()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


class Floor:
    """The matrices that a model multiplies, timed repeatedly because the speed of a shared machine changes."""

    def __init__(self, folder: Path, dtype: torch.dtype, tokens: int, budget: float) -> None:
        """Allocate them; `budget` is the seconds for each shape."""
        self.tokens, self.budget = tokens, budget
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        head = model.get_output_embeddings()
        self.shapes = Counter(
            (module.out_features, module.in_features)
            for module in model.modules()
            if isinstance(module, nn.Linear) and module is not head
        )
        self.width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.attention_flops_a_pair = 4 * self.width * config.num_attention_heads * config.num_hidden_layers

        def matrix(rows: int, columns: int) -> Tensor:
            return torch.randn(rows, columns, dtype=dtype)

        self.weights = {shape: matrix(*shape) for shape in self.shapes}
        self.inputs = {features: matrix(tokens, features) for _, features in self.shapes}
        self.head = matrix(*head.weight.shape)
        self.last = matrix(min(tokens, AT_THE_HEAD), self.head.shape[1])
        self.query, self.key = matrix(tokens, self.width), matrix(tokens, self.width)
        self.samples: list[dict[str, float]] = []

    @torch.no_grad()
    def sample(self) -> None:
        """Time the linears of all blocks and the head, in seconds a token, and attention, in seconds a FLOP."""

        def linear(shape: tuple[int, int]) -> float:
            x, weight = self.inputs[shape[1]], self.weights[shape]
            return seconds_of(lambda: ours.multiply(x, weight.T), self.budget) / self.tokens

        def one_head() -> None:
            ours.multiply(ours.multiply(self.query, self.key.T), self.key)

        attention = seconds_of(one_head, self.budget) / (4 * self.width * self.tokens**2)
        head = seconds_of(lambda: ours.multiply(self.last, self.head.T), self.budget) / len(self.last)
        linears = sum(count * linear(shape) for shape, count in self.shapes.items())
        self.samples.append({"linears": linears, "head": head, "attention": attention})

    def mean(self) -> dict[str, float]:
        """Return the mean of the samples, and the rates in GFLOP/s."""
        mean = {name: statistics.fmean(sample[name] for sample in self.samples) for name in self.samples[0]}
        weights = sum(count * out * features for (out, features), count in self.shapes.items())
        return mean | {
            "samples": len(self.samples),
            "attention_flops_a_pair": self.attention_flops_a_pair,
            "gflops_linears": 2 * weights / mean["linears"] / 1e9,
            "gflops_attention": 1e-9 / mean["attention"],
            "gflops_head": 2 * self.head.numel() / mean["head"] / 1e9,
        }
