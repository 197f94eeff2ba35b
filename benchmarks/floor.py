"""The floor: how fast this machine multiplies matrices of a model's shapes, with nothing around it."""

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM


def seconds_of(multiply: Callable[[], object], budget: float) -> float:
    """Median of as many calls as fit into `budget` seconds, at least three, after one that warms up."""
    multiply()
    times: list[float] = []
    while len(times) < 3 or sum(times) < budget:
        began = time.perf_counter()
        multiply()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


@torch.no_grad()
def floor(folder: str, dtype: torch.dtype, tokens: int, budget: float) -> dict[str, float]:
    """Seconds a token for the linears of all blocks and for the head, and seconds a FLOP for attention."""
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    shapes = Counter(
        (module.out_features, module.in_features)
        for module in model.modules()
        if isinstance(module, nn.Linear) and module is not head
    )

    def linear(out: int, features: int) -> float:
        x, weight = torch.randn(tokens, features, dtype=dtype), torch.randn(out, features, dtype=dtype)
        return seconds_of(lambda: torch.matmul(x, weight.T), budget) / tokens

    linears = sum(count * linear(*shape) for shape, count in shapes.items())
    weights = sum(count * out * features for (out, features), count in shapes.items())
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    query, key = torch.randn(tokens, width, dtype=dtype), torch.randn(tokens, width, dtype=dtype)
    share = torch.randn(tokens, tokens, dtype=dtype)

    def one_head() -> None:
        torch.matmul(query, key.T, out=share)
        torch.matmul(share, key)

    attention = seconds_of(one_head, budget) / (4 * width * tokens**2)
    on_top = linear(*head.weight.shape)
    return {
        "linears": linears,
        "head": on_top,
        "attention": attention,
        "attention_flops_a_pair": 4 * width * config.num_attention_heads * config.num_hidden_layers,
        "gflops_linears": 2 * weights / linears / 1e9,
        "gflops_attention": 1e-9 / attention,
        "gflops_head": 2 * head.weight.numel() / on_top / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--budget", type=float, default=0.5, help="seconds a shape")
    parser.add_argument("--result", type=Path, required=True)
    words = parser.parse_args()
    measured = floor(words.model, getattr(torch, words.dtype), words.tokens, words.budget)
    words.result.write_text(json.dumps(measured))


if __name__ == "__main__":
    main()
