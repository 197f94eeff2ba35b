"""Check a card against the CPU, and time what it does: with torch, transformers and accelerate, in under ten minutes.

make gpu                                        on the card of this machine
PYTHONPATH=src python benchmarks/gpu.py --device cpu --tiny    the same code, where there is no card

The models are random. Checks compare float32 on SmolLM2's shape; times are of a few blocks of LLaMA-2-7B's shape in
bfloat16. Exit 1 if a check fails.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import MagicMock

import torch

try:
    import jaxtyping  # noqa: F401 - there or not
except ImportError:
    sys.modules["jaxtyping"] = MagicMock()  # its names only annotate

from checkpoints import CONFIGS, make_checkpoint

from wanda_dvc.catalog import RECONSTRUCTIONS, methods
from wanda_dvc.engine import accelerator
from wanda_dvc.engine.backward import backward
from wanda_dvc.engine.decoder import Decoder
from wanda_dvc.engine.divergence import AT_A_TIME, TEMPORARIES, measure_windows
from wanda_dvc.engine.forward import ModelRunner
from wanda_dvc.engine.memory import FIXED, ForwardMemory, ModelSizes
from wanda_dvc.engine.sums import BlockRecord
from wanda_dvc.pruning.gram import Gram
from wanda_dvc.pruning.masks import MaskRule, choose_block
from wanda_dvc.pruning.reconstruction import prune_linear, reconstruct
from wanda_dvc.pruning.selection import pack_bits
from wanda_dvc.pruning.solvers import GramFactors

LLAMA_7B, SMOLLM2 = (
    json.loads((CONFIGS / f"{name}.json").read_text()) | {"num_hidden_layers": blocks, "tie_word_embeddings": False}
    for name, blocks in (("llama-2-7b", 4), ("smollm2-135m", 6))
)
TINY = LLAMA_7B | {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300,
}  # fmt: skip
TOGETHER = 8192  # tokens a multiplication: they fill a card
HALF = Fraction(1, 2)
CPU = torch.device("cpu")
Weights = Callable[[str], torch.Tensor]  # by the linear's name


class Run(NamedTuple):
    """What windows through a model gave."""

    recorded: list[BlockRecord]
    losses: list[float]
    seconds: float  # of the blocks
    peak: int  # bytes of the card


class Bench:
    """One device, and the windows that go through random models."""

    def __init__(self, device: torch.device, work: Path) -> None:
        self.device, self.work = device, work

    def wait(self) -> None:
        """Wait until the card is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Callable[[], object], times: int = 3) -> float:
        """Return the shortest of some calls; the first is slower."""
        spent = []
        for _ in range(1 + times):
            self.wait()
            began = time.perf_counter()
            call()
            self.wait()
            spent.append(time.perf_counter() - began)
        return min(spent)

    def run(
        self, folder: Path, windows: torch.Tensor, dtype: torch.dtype, device: torch.device | None = None, *, gram: bool
    ) -> Run:
        """Windows through all blocks, recorded, and their losses."""
        device = device or self.device
        on_card = device.type == "cuda"
        decoder = Decoder(folder, dtype=dtype, device=device)
        if on_card:
            torch.cuda.reset_peak_memory_stats(device)
        spent, recorded = [], []
        runner = ModelRunner(decoder, Path(tempfile.mkdtemp(dir=self.work)))
        for step in runner.forward(windows):
            self.wait()
            began = time.perf_counter()
            found = step.record(gram=gram)
            self.wait()
            spent.append(time.perf_counter() - began)
            recorded.append(BlockRecord(found.stats, _on(CPU, found.grams), {}))
            del found
        losses = [loss for loss, _ in runner.map_outputs(measure_windows, lambda shard: [None] * len(shard))]
        peak = torch.cuda.max_memory_allocated(device) if on_card else 0
        return Run(recorded, losses, sum(spent[1:]) / max(1, len(spent) - 1), peak)  # the first block warms up


def _on(device: torch.device, grams: dict[str, Gram]) -> dict[str, Gram]:
    return {name: Gram(gram.upper.to(device), gram.count) for name, gram in grams.items()}


def windows(shape: dict[str, Any], count: int, length: int) -> torch.Tensor:
    """Return random tokens."""
    return torch.randint(0, shape["vocab_size"], (count, length), generator=torch.Generator().manual_seed(0))


def check(bench: Bench, folder: Path, tokens: torch.Tensor) -> Iterator[tuple[str, float, float]]:
    """Compare the card with the CPU on one model in float32; yield how far it is, and how far it may be."""
    weights = Decoder(folder, dtype=torch.float32, device=CPU).checkpoint.weight
    host = bench.run(folder, tokens, torch.float32, CPU, gram=True)
    card = bench.run(folder, tokens, torch.float32, gram=True)
    half = bench.run(folder, tokens, torch.bfloat16, gram=False)

    yield ("norms, largest relative difference", _off(card, host), 1e-4)
    yield ("losses in float32, nats", _apart(card, host), 1e-4)
    yield ("losses in bfloat16, nats", _apart(half, host), 5e-2)
    for words in ("wanda unstructured", "magnitude unstructured", "wanda 2:4", "ria unstructured"):
        found, bound = _masks_apart(bench, weights, host, *words.split()), 1e-5 if words.startswith("ria") else 0.0
        yield (f"masks from the same norms, {words}, share that differs", found, bound)
    for name in ("least-squares", "output-weighted"):
        found = _solved_apart(bench, weights, host, name)
        yield (f"{name}, largest relative difference of a layer error", found, 1e-2)
    found = _fisher_apart(bench, folder, tokens[:2])
    yield ("Fisher tier of two windows, largest relative difference of a linear's norm", found, 1e-3)
    if card.peak:
        model = ModelSizes.read(folder)
        memory = ForwardMemory(model, dtype="float32", length=tokens.shape[1])
        formula = memory.weights + memory.activations + memory.norms + memory.grams + memory.logits
        formula += FIXED + 2 * tokens.numel() * model.hidden * 4  # hidden states, before and after a block
        formula += TEMPORARIES * min(AT_A_TIME["cuda"], tokens.shape[1] * model.vocabulary)
        yield ("peak memory of the card against the formula, GB", card.peak / 1e9, formula / 1e9)


def _off(one: Run, other: Run) -> float:
    return max(
        float((own.stats.inputs[name].norm / x.norm - 1).abs().max())
        for own, theirs in zip(one.recorded, other.recorded, strict=True)
        for name, x in theirs.stats.inputs.items()
    )


def _apart(one: Run, other: Run) -> float:
    return max(abs(a - b) for a, b in zip(one.losses, other.losses, strict=True))


def _masks_apart(bench: Bench, weights: Weights, run: Run, name: str, pattern: str) -> float:
    apart = count = 0
    for recorded in run.recorded:
        host, card = (masks(weights, recorded, name, pattern, device) for device in (CPU, bench.device))
        apart += sum(int((keep != card[linear].cpu()).sum()) for linear, keep in host.items())
        count += sum(keep.numel() for keep in host.values())
    return apart / count


def masks(
    weights: Weights, recorded: BlockRecord, name: str, pattern: str, device: torch.device
) -> dict[str, torch.Tensor]:
    """Return the masks of a block's linears at 50 %."""
    return choose_block(weights, recorded.stats, MaskRule(methods()[name], HALF, pattern), device)


def _solved_apart(bench: Bench, weights: Weights, run: Run, reconstruction: str) -> float:
    recorded, row, errors = run.recorded[0], RECONSTRUCTIONS[reconstruction], []
    masks_of_block = masks(weights, recorded, "wanda", "unstructured", CPU)
    for device in (CPU, bench.device):
        errors_of_device = []
        for source, gram in _on(device, recorded.grams).items():
            factors = GramFactors(gram.matrix(), source)
            for name in recorded.stats.consumers[source]:
                weight, mask, transposed = weights(name), masks_of_block[name], name in recorded.stats.transposed
                gradients = Gram.empty(len(mask))
                gradients.add(torch.randn(64, len(mask), generator=torch.Generator().manual_seed(0)))
                new = reconstruct(
                    weight, mask, factors, reconstruction=row, gradient_gram=gradients, transposed=transposed
                ).weight
                errors_of_device.append(prune_linear(weight, mask, factors, new, transposed=transposed).error or 0.0)
        errors.append(errors_of_device)
    return max(abs(a / b - 1) for a, b in zip(*errors, strict=True) if b)


def _fisher_apart(bench: Bench, folder: Path, tokens: torch.Tensor) -> float:
    found: list[dict[str, torch.Tensor]] = []
    for device in (CPU, bench.device):
        decoder = Decoder(folder, dtype=torch.float32, device=device)
        came = backward(ModelRunner(decoder, bench.work / f"back{len(found)}"), tokens)
        found.append({name: sums for _, block in came for name, sums in block.sums.items()})
    host, card = found
    return max(float((card[name] - sums).norm() / sums.norm()) for name, sums in host.items())


def times(bench: Bench, folder: Path, tokens: torch.Tensor) -> Iterator[tuple[str, str]]:
    """Time a block of one model in bfloat16."""
    dtype, device = torch.bfloat16, bench.device
    decoder = Decoder(folder, dtype=dtype, device=device)
    decoder.load(0, -1)
    weights = [x for x in decoder.blocks[0].parameters() if x.dim() > 1]
    decoder.unload()
    flops = 2.0 * tokens.numel() * sum(x.numel() for x in weights)
    x = {size: torch.randn(TOGETHER, size, dtype=dtype, device=device) for _, size in (w.shape for w in weights)}
    passes = [bench.seconds(partial(torch.matmul, x[w.shape[1]], w.T)) for w in weights]
    floor = sum(passes) * tokens.numel() / TOGETHER
    yield "linears alone, a block", f"{1e3 * floor:.1f} ms, {flops / floor / 1e12:.1f} TFLOP/s"
    plain = bench.run(folder, tokens, dtype, gram=False)
    sparsity = floor / plain.seconds
    yield "`calibrate`, a block", f"{1e3 * plain.seconds:.1f} ms, {100 * sparsity:.0f} % of the linears' speed"
    for pattern in ("unstructured", "2:4"):
        choose = partial(masks, decoder.checkpoint.weight, plain.recorded[0], "wanda", pattern, device)
        spent = bench.seconds(lambda: [*map(pack_bits, choose().values())])  # noqa: B023 - it runs at once
        yield f"`mask`, wanda {pattern}, a block", f"{1e3 * spent:.0f} ms"
    if device.type == "cuda":
        yield "peak memory of the card", f"{plain.peak / 1e9:.2f} GB"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try the harness")
    words = parser.parse_args(arguments)
    device = torch.device(words.device)
    accelerator.disable_tf32()  # as stages do; NVIDIA's containers turn TF32 on
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device on this machine; --device cpu --tiny tries the harness")
    with tempfile.TemporaryDirectory() as folder:
        work, holds = Path(folder), True
        bench = Bench(device, work)
        small, large = (TINY, TINY) if words.tiny else (SMOLLM2, LLAMA_7B)
        rows = ((20, 32), (4, 32)) if words.tiny else ((20, 512), (16, 2048))
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU, not a card"
        print(f"{name}, torch {torch.__version__}\n\n| check | found | bound | holds |\n| --- | ---: | ---: | --- |")
        make_checkpoint(work / "small", small | {"dtype": "float32"})
        for what, found, bound in check(bench, work / "small", windows(small, *rows[0])):
            holds = holds and found <= bound
            print(f"| {what} | {found:.2g} | {bound:.2g} | {'yes' if found <= bound else '**no**'} |")
        print("\n| LLaMA-2-7B's shape, bfloat16 | measured |\n| --- | ---: |")
        make_checkpoint(work / "large", large | {"dtype": "bfloat16"})
        for what, took in times(bench, work / "large", windows(large, *rows[1])):
            print(f"| {what} | {took} |", flush=True)
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
