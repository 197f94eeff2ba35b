"""Prune by the published Wanda procedure, plainly: (a), the baseline of a prune. It shares no code with wanda_dvc.

The whole model is in memory. Block by block, forward hooks on the linears collect Σx² over all windows, every row
is sorted, and the windows run through the pruned block again to make the next block's inputs.
"""

import argparse
import contextlib
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer


class _Caught(Exception):
    """Ends a forward pass at the first block."""


class _Catcher(nn.Module):
    def __init__(self, block: nn.Module, caught: list[tuple[Tensor, Any]]) -> None:
        super().__init__()
        self.block, self.caught = block, caught

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def forward(self, hidden: Tensor, **kwargs: Any) -> None:
        self.caught.append((hidden, kwargs))
        raise _Caught


def first_inputs(model: Any, windows: Tensor) -> list[tuple[Tensor, Any]]:
    """Return the arguments of the first block for each window."""
    caught: list[tuple[Tensor, Any]] = []
    layers = model.model.layers
    layers[0] = _Catcher(layers[0], caught)
    for window in windows:
        with contextlib.suppress(_Caught):
            model(window[None], use_cache=False)
    layers[0] = layers[0].block
    return caught


def linears_of(block: nn.Module) -> dict[str, nn.Linear]:
    """Return the linears of a block by name."""
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


@torch.no_grad()
def prune_wanda(model: Any, windows: Tensor, sparsity: float) -> None:
    """Zero the lowest |W|·‖X‖₂ of each row, block by block on the outputs of the pruned blocks before."""
    calls = first_inputs(model, windows)
    hidden = [first for first, _ in calls]
    kwargs = calls[0][1]

    def forward(block: nn.Module, x: Tensor) -> Tensor:
        out = block(x, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    for block in model.model.layers:
        linears = linears_of(block)
        squares = {name: torch.zeros(linear.in_features) for name, linear in linears.items()}

        def collect(name: str, squares: dict[str, Tensor] = squares) -> Any:
            def hook(_: nn.Module, inputs: Any, __: Any) -> None:
                squares[name] += inputs[0].float().flatten(0, -2).pow(2).sum(dim=0)

            return hook

        handles = [linear.register_forward_hook(collect(name)) for name, linear in linears.items()]
        for x in hidden:
            forward(block, x)
        for handle in handles:
            handle.remove()
        for name, linear in linears.items():
            score = linear.weight.float().abs() * squares[name].sqrt()
            order = torch.sort(score, dim=1, stable=True).indices
            goes = order[:, : int(linear.in_features * sparsity)]
            linear.weight.scatter_(1, goes, 0)
        hidden = [forward(block, x) for x in hidden]


@torch.no_grad()
def prune_magnitude(model: Any, sparsity: float) -> None:
    """Zero the lowest |W| of each linear."""
    for block in model.model.layers:
        for linear in linears_of(block).values():
            score = linear.weight.abs()
            order = torch.sort(score.flatten(), stable=True).indices
            linear.weight.view(-1)[order[: int(score.numel() * sparsity)]] = 0


@torch.no_grad()
def perplexity(model: Any, windows: Tensor) -> float:
    """Return exp(mean over windows of the mean loss), from all logits of one window at a time."""
    losses = []
    for window in windows:
        logits = model(window[None], use_cache=False).logits[0, :-1].float()
        losses.append(nn.functional.cross_entropy(logits, window[1:]).item())
    return math.exp(math.fsum(losses) / len(losses))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["wanda", "magnitude", "perplexity"])
    parser.add_argument("model")
    parser.add_argument("--windows", type=Path, required=True, help=".npy, token ids [windows, length]")
    parser.add_argument("--out", type=Path, help="folder of the pruned model")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--result", type=Path, required=True)
    words = parser.parse_args()
    began = time.perf_counter()
    windows = torch.from_numpy(np.load(words.windows))
    model = AutoModelForCausalLM.from_pretrained(words.model, dtype=getattr(torch, words.dtype)).eval()
    result: dict[str, float] = {}
    if words.what == "perplexity":
        result["perplexity"] = perplexity(model, windows)
    else:
        if words.what == "wanda":
            prune_wanda(model, windows, words.sparsity)
        else:
            prune_magnitude(model, words.sparsity)
        model.save_pretrained(words.out)
        AutoTokenizer.from_pretrained(words.model).save_pretrained(words.out)
    words.result.write_text(json.dumps(result | {"seconds": time.perf_counter() - began}))


if __name__ == "__main__":
    main()
