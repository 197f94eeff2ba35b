"""Measures this machine's speed: one block of a model's shape, with random weights, through the engine's code."""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from wanda_dvc.catalog import methods
from wanda_dvc.engine import accelerator
from wanda_dvc.engine.config import read_config
from wanda_dvc.engine.decoder import Decoder
from wanda_dvc.engine.jobs import solving_device
from wanda_dvc.engine.loaded import Loaded
from wanda_dvc.engine.losses import unmeasured, window_losses
from wanda_dvc.engine.shards import TOKENS_TOGETHER
from wanda_dvc.engine.sizes import Linears, count
from wanda_dvc.engine.structure import build_empty
from wanda_dvc.engine.walk import LocalRunner
from wanda_dvc.engine.weights import set_parameter
from wanda_dvc.pruning.choose import choose_block, prepared_linears, prune_linear, reconstruct
from wanda_dvc.pruning.gram import Gram

if TYPE_CHECKING:
    from wanda_dvc.plan import Plan

ENOUGH = 1.0  # seconds of repetitions; the fastest counts


def measure(  # noqa: PLR0913 - the parameters of the measurement
    config: Path, plan: "Plan", *, dtype: str, device: torch.device, length: int, gram: bool
) -> dict[str, float]:
    """Return the FLOP/s of each kind of work in `Need.work`; with `gram` also of Gram matrices and solvers.

    The device's batch of windows of `length` tokens runs through the block. Masks and pruned weights are computed for
    the readers of the block's first input.
    """
    model = one_block(config, getattr(torch, dtype))
    one, weights = count(model.model, dtype=dtype), model.weight
    windows = max(1, TOKENS_TOGETHER.get(device.type, 0) // length)
    tokens = torch.randint(one.vocabulary, (windows, length), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory(prefix="wanda-dvc-") as work:
        run = LocalRunner(Decoder(model, dtype=getattr(torch, dtype), device=device), Path(work))
        for step in run.walk(tokens):
            through = _seconds(step.record)
            summed = _seconds(partial(step.record, gram=True)) - through if gram else 0
            recorded = step.record(gram=gram)
        head = _seconds(lambda: list(run.head(window_losses, unmeasured(windows).get)))
    pace = {"blocks": one.walking(windows, length) / through, "head": 2 * tokens.numel() * one.head / head}
    first, names = next(iter(recorded.stats.readers.items()))
    stats, where, features = recorded.stats.of(first), solving_device(device), len(recorded.stats.inputs[first].sum)
    rows = {name: weights(name).numel() // features for name in names}
    linears = Linears.of([[(out, features) for out in rows.values()]], one.width)
    grams = {first: Gram(recorded.grams[first].upper.to(where), recorded.grams[first].count)} if gram else {}
    # A score a weight, or a solver's work, is about as much for units. Complete blocks and experts have one score each,
    # which is less work than a score a weight.
    words: dict[str, Any] = {"share": plan.share, "group": plan.group}
    words["pattern"] = "unstructured" if plan.structure else plan.pattern
    method = plan.method if plan.method.competition not in ("blocks", "experts") else methods()["magnitude"]
    choosing = partial(choose_block, weights, stats, method=method, grams=grams, device=where, **words)
    pace["choosing"] = linears.choosing(plan.method) / _seconds(choosing)
    keeps, own = choosing(), plan.reconstruction
    gradients = {name: Gram.empty(out, where) for name, out in rows.items()} if gram and plan.by_gradients else {}
    for back in gradients.values():
        back.add(torch.randn(length, len(back.upper), device=where))

    def prune() -> None:
        for name, prepared in prepared_linears(stats.readers, grams):
            weight, across, new = weights(name), name in stats.transposed, None
            if prepared is not None and own.function:
                given = {"reconstruction": own, "gradients": gradients.get(name), "transposed": across}
                new = reconstruct(weight, keeps[name], prepared, **given).weight
            prune_linear(weight, keeps[name], prepared, new, transposed=across)

    flops = linears.pruning(own, gram=gram) + gram * linears.solving(own)
    pace["pruning"] = flops / _seconds(prune)
    if gram:
        pace["grams"] = tokens.numel() * one.squares / max(summed, 1e-6)
    return pace


def one_block(config: Path, dtype: torch.dtype) -> Loaded:
    """Return a model of a configuration's shape with one block and random weights.

    UserError if transformers builds no such model.
    """
    content = read_config(config)
    text = content.get_text_config()
    blocks, text.num_hidden_layers = text.num_hidden_layers, 1
    for name, value in list(vars(text).items()):  # a list with an entry per block
        if isinstance(value, list) and len(value) == blocks:
            setattr(text, name, value[:1])
    model = build_empty(content, str(config), dtype)
    drawn = torch.randn(2**20, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(dtype)
    for name, parameter in list(model.named_parameters()):
        # Repeats a few numbers, because drawing a large random matrix takes longer than multiplying it.
        values = drawn.repeat(-(-parameter.numel() // len(drawn)))[: parameter.numel()].reshape(parameter.shape)
        set_parameter(model, name, values.clone() if parameter.dim() > 1 else torch.ones_like(values))
    model.tie_weights()
    return Loaded(model)


def _seconds(run: Callable[[], object]) -> float:
    """Return the shortest measured time, in seconds."""
    fastest, spent = float("inf"), 0.0
    while not spent or spent < ENOUGH:
        began = time.perf_counter()
        run()
        accelerator.wait()
        taken = time.perf_counter() - began
        fastest, spent = min(fastest, taken), spent + taken
    return fastest
