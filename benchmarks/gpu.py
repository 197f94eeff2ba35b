"""Check a card against the CPU, and time what it does: with torch, transformers and accelerate, in under ten minutes.

make gpu                                        on the card of this machine
PYTHONPATH=src python benchmarks/gpu.py --device cpu --tiny    the same code, where there is no card

The models are random. Checks compare the card with the CPU on SmolLM2's shape in float32; times are of LLaMA-2-7B's
shape in bfloat16, of a few blocks. The tables go into docs/results.md. Exit 1 if a check fails.
"""

import argparse
import contextlib
import math
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch


class _Anything(types.ModuleType):
    """Stands for jaxtyping, whose names only annotate, on a machine without it."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Annotation


class _Annotation:
    def __class_getitem__(cls, _: object) -> object:
        return torch.Tensor


try:
    import jaxtyping  # noqa: F401 - there or not
except ImportError:
    sys.modules["jaxtyping"] = _Anything("jaxtyping")

from checkpoints import make_checkpoint  # noqa: E402 - after the stand-in

from wanda_dvc.catalog import RECONSTRUCTIONS, methods  # noqa: E402
from wanda_dvc.engine.checkpoint import Changed, write_model  # noqa: E402
from wanda_dvc.engine.decoder import Decoder  # noqa: E402
from wanda_dvc.engine.divergence import measure_windows  # noqa: E402
from wanda_dvc.engine.recorder import Recorded  # noqa: E402
from wanda_dvc.engine.sizes import FIXED, Sizes, Walk  # noqa: E402
from wanda_dvc.engine.walk import Runner, backward  # noqa: E402
from wanda_dvc.pruning.choose import choose_block, prepared_linears, prune_linear, reconstruct  # noqa: E402
from wanda_dvc.pruning.gram import Gram  # noqa: E402
from wanda_dvc.pruning.selection import pack_bits  # noqa: E402

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "rope_theta": 10000.0, "rms_norm_eps": 1e-5,
    "bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": False, "max_position_embeddings": 8192,
}  # fmt: skip
TINY = LLAMA | {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300,
}  # fmt: skip
SMOLLM2 = LLAMA | {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152,
}  # fmt: skip
LLAMA_7B = LLAMA | {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 4, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 32000,
}  # fmt: skip
BLOCKS_7B = 32
TOGETHER = 8192  # tokens a multiplication: they fill a card
HALF = Fraction(1, 2)


class Check(NamedTuple):
    """How far the card is from the CPU, and how far it may be."""

    what: str
    found: float
    bound: float


class Run(NamedTuple):
    """What windows through a model gave."""

    recorded: list[Recorded]
    losses: list[float]
    seconds: float  # of the blocks
    peak: int  # bytes of the card


class Bench:
    """One device, and the windows that go through random models."""

    def __init__(self, device: torch.device, work: Path) -> None:
        self.device, self.work = device, work
        self._runs = 0

    def wait(self) -> None:
        """Wait until the card is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Callable[[], object], times: int = 3) -> float:
        """Return the shortest of some calls, after one to warm up."""
        call()
        spent = []
        for _ in range(times):
            self.wait()
            began = time.perf_counter()
            call()
            self.wait()
            spent.append(time.perf_counter() - began)
        return min(spent)

    def run(
        self,
        folder: Path,
        windows: torch.Tensor,
        dtype: torch.dtype,
        *,
        device: torch.device | None = None,
        gram: bool = False,
    ) -> Run:
        """Windows through all blocks, recorded, and their losses."""
        self._runs += 1
        work, device = self.work / f"run{self._runs}", device or self.device
        on_card = device.type == "cuda"
        decoder = Decoder(folder, dtype=dtype, device=device)
        if on_card:
            torch.cuda.reset_peak_memory_stats(device)
        spent, recorded = [], []
        runner = Runner(decoder, work)
        for step in runner.walk(windows):
            self.wait()
            began = time.perf_counter()
            found = step.record(gram=gram)
            self.wait()
            spent.append(time.perf_counter() - began)
            recorded.append(Recorded(found.stats, _on(torch.device("cpu"), found.grams), {}))
            del found
        losses = [loss for loss, _ in runner.head(measure_windows, lambda shard: [None] * len(shard))]
        peak = torch.cuda.max_memory_allocated(device) if on_card else 0
        return Run(recorded, losses, sum(spent[1:]) / max(1, len(spent) - 1), peak)  # the first block warms up


def _on(device: torch.device, grams: dict[str, Gram]) -> dict[str, Gram]:
    return {name: Gram(gram.upper.to(device), gram.count) for name, gram in grams.items()}


def model(folder: Path, shape: dict[str, Any], dtype: str) -> Path:
    """Write a random checkpoint."""
    make_checkpoint(folder, shape | {"dtype": dtype})
    return folder


def windows(shape: dict[str, Any], count: int, length: int) -> torch.Tensor:
    """Return random tokens."""
    return torch.randint(0, shape["vocab_size"], (count, length), generator=torch.Generator().manual_seed(0))


def check(bench: Bench, folder: Path, tokens: torch.Tensor) -> Iterator[Check]:
    """Compare the card with the CPU on one model in float32."""
    cpu = torch.device("cpu")
    host = bench.run(folder, tokens, torch.float32, device=cpu, gram=True)
    card = bench.run(folder, tokens, torch.float32, gram=True)
    half = bench.run(folder, tokens, torch.bfloat16)

    yield Check("norms, largest relative difference", _off(card, host), 1e-4)
    yield Check("losses in float32, nats", _apart(card, host), 1e-4)
    yield Check("losses in bfloat16, nats", _apart(half, host), 5e-2)
    for name, pattern, bound in (
        ("wanda", "unstructured", 0.0),
        ("magnitude", "unstructured", 0.0),
        ("wanda", "2:4", 0.0),
        ("ria", "unstructured", 1e-5),
    ):
        found = _masks_apart(bench, folder, host, name, pattern)
        yield Check(f"masks from the same norms, {name} {pattern}, share that differs", found, bound)
    for name in ("least-squares", "output-weighted"):
        found = _solved_apart(bench, folder, host, name)
        yield Check(f"{name}, largest relative difference of a layer error", found, 1e-2)
    found = _fisher_apart(bench, folder, tokens[:2])
    yield Check("Fisher tier of two windows, largest relative difference of a linear's norm", found, 1e-3)
    if card.peak:
        model = Sizes(folder)
        memory = Walk(model, dtype="float32", length=tokens.shape[1], device="cuda")
        formula = memory.weights + memory.activations + memory.norms + memory.grams + memory.logits
        formula += FIXED + 2 * tokens.numel() * model.hidden * 4  # hidden states, before and after a block
        yield Check("peak memory of the card against the formula, GB", card.peak / 1e9, formula / 1e9)


def _off(one: Run, other: Run) -> float:
    pairs = [
        (one_block.stats.inputs[name].norm, x.norm)
        for one_block, other_block in zip(one.recorded, other.recorded, strict=True)
        for name, x in other_block.stats.inputs.items()
    ]
    return max(float((a / b - 1).abs().max()) for a, b in pairs)


def _apart(one: Run, other: Run) -> float:
    return max(abs(a - b) for a, b in zip(one.losses, other.losses, strict=True))


def _masks_apart(bench: Bench, folder: Path, run: Run, name: str, pattern: str) -> float:
    decoder = Decoder(folder, dtype=torch.float32, device=torch.device("cpu"))
    apart = count = 0
    for recorded in run.recorded:
        host, card = (masks(decoder, recorded, name, pattern, device) for device in (None, bench.device))
        apart += sum(int((keep != card[linear].cpu()).sum()) for linear, keep in host.items())
        count += sum(keep.numel() for keep in host.values())
    return apart / count


def masks(
    decoder: Decoder, recorded: Recorded, name: str, pattern: str, device: torch.device | None
) -> dict[str, torch.Tensor]:
    """Return the masks of a block's linears at 50 %."""
    weights, method = decoder.checkpoint.weight, methods()[name]
    return choose_block(weights, recorded.stats, method=method, share=HALF, pattern=pattern, device=device)


def _solved_apart(bench: Bench, folder: Path, run: Run, reconstruction: str) -> float:
    decoder = Decoder(folder, dtype=torch.float32, device=torch.device("cpu"))
    recorded = run.recorded[0]
    keeps = masks(decoder, recorded, "wanda", "unstructured", None)
    errors, gradients = [], dict[str, Gram]()
    for name, keep in keeps.items():
        gradients[name] = Gram.empty(len(keep))
        gradients[name].add(torch.randn(64, len(keep), generator=torch.Generator().manual_seed(0)))
    for device in (torch.device("cpu"), bench.device):
        found = []
        for name, prepared in prepared_linears(recorded.stats.readers, _on(device, recorded.grams)):
            if prepared is None:
                continue
            weight, across = decoder.checkpoint.weight(name), name in recorded.stats.transposed
            solved = reconstruct(
                weight,
                keeps[name],
                prepared,
                reconstruction=RECONSTRUCTIONS[reconstruction],
                gradients=gradients.get(name),
                transposed=across,
            )
            found.append(prune_linear(weight, keeps[name], prepared, solved.weight, transposed=across).error or 0.0)
        errors.append(found)
    return max(abs(a / b - 1) for a, b in zip(*errors, strict=True) if b)


def _fisher_apart(bench: Bench, folder: Path, tokens: torch.Tensor) -> float:
    found: list[dict[str, torch.Tensor]] = []
    for device in (torch.device("cpu"), bench.device):
        decoder = Decoder(folder, dtype=torch.float32, device=device)
        came = backward(Runner(decoder, bench.work / f"back{len(found)}"), tokens)
        found.append({name: sums for _, block in came for name, sums in block.sums.items()})
    host, card = found
    return max(float((card[name] - sums).norm() / sums.norm()) for name, sums in host.items())


def times(bench: Bench, folder: Path, tokens: torch.Tensor) -> Iterator[tuple[str, str]]:
    """Time a block of one model in bfloat16."""
    dtype, device = torch.bfloat16, bench.device
    decoder = Decoder(folder, dtype=dtype, device=device)
    with decoder.block(0) as block:
        flops = 2.0 * tokens.numel() * sum(x.numel() for x in block.parameters() if x.dim() > 1)
        weights = [x for x in block.parameters() if x.dim() > 1]
        x = {size: torch.randn(TOGETHER, size, dtype=dtype, device=device) for _, size in (w.shape for w in weights)}
        passes = [bench.seconds(partial(torch.matmul, x[w.shape[1]], w.T)) for w in weights]
        floor = sum(passes) * tokens.numel() / TOGETHER
    yield "linears alone, a block", f"{1e3 * floor:.1f} ms, {flops / floor / 1e12:.1f} TFLOP/s"
    plain = bench.run(folder, tokens, dtype)
    share = floor / plain.seconds
    yield "`calibrate`, a block", f"{1e3 * plain.seconds:.1f} ms, {100 * share:.0f} % of the linears' speed"
    yield f"`calibrate` of {BLOCKS_7B} such blocks", f"{BLOCKS_7B * plain.seconds:.1f} s for {tokens.numel():,} tokens"
    checkpoint, first = decoder.checkpoint, plain.recorded[0]
    for name, pattern in (("wanda", "unstructured"), ("wanda", "2:4")):

        def choose(name: str = name, pattern: str = pattern) -> None:
            for keep in masks(decoder, first, name, pattern, device).values():
                pack_bits(keep)

        yield f"`mask`, {name} {pattern}, a block", f"{1e3 * bench.seconds(choose):.0f} ms"
    addresses = [checkpoint.find(linear) for names in first.stats.readers.values() for linear in names]
    began = time.perf_counter()
    for _ in write_model(Changed(checkpoint, checkpoint.read, addresses), bench.work / "copy"):
        pass
    written = sum(math.prod(entry.shape) for entry in checkpoint.entries.values()) * dtype.itemsize
    yield "writing a checkpoint", f"{written / 1e9 / (time.perf_counter() - began):.2f} GB/s"
    if device.type == "cuda":
        content = torch.empty(2**28, dtype=torch.uint8).pin_memory()
        yield "link, host to card", f"{0.268 / bench.seconds(lambda: content.to(device)):.1f} GB/s"
        yield "peak memory of the card", f"{plain.peak / 1e9:.2f} GB"


def machine(device: torch.device) -> str:
    """Return what the results are of."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU, not a card"
    return f"{name}, torch {torch.__version__}"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try the harness")
    parser.add_argument("--work", type=Path, help="a folder for 3 GB of models; by default a temporary one")
    words = parser.parse_args(arguments)
    device = torch.device(words.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device on this machine; --device cpu --tiny tries the harness")
    with contextlib.ExitStack() as stack:
        work = words.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bench = Bench(device, work)
        small, large = (TINY, TINY) if words.tiny else (SMOLLM2, LLAMA_7B)
        checked, timed = (
            (windows(small, 20, 32), windows(large, 4, 32))
            if words.tiny
            else (windows(small, 20, 512), windows(large, 16, 2048))
        )
        print(f"{machine(device)}\n\n| check | found | bound | holds |\n| --- | ---: | ---: | --- |")
        holds = True
        for one in check(bench, model(work / "small", small, "float32"), checked):
            holds = holds and one.found <= one.bound
            print(
                f"| {one.what} | {one.found:.2g} | {one.bound:.2g} | {'yes' if one.found <= one.bound else '**no**'} |"
            )
        print("\n| LLaMA-2-7B's shape, bfloat16 | measured |\n| --- | ---: |")
        for what, found in times(bench, model(work / "large", large, "bfloat16"), timed):
            print(f"| {what} | {found} |", flush=True)
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
