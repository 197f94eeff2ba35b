"""Time each stage on a GPU, and compare its results with the CPU's: benchmarks/gpu.json.

make gpu                                  on this machine's GPU; 15 minutes on an H100, estimated
make gpu GPU="--device cpu --tiny"        the same code on a machine without one, in a minute

Weights and texts are random. Times are of Llama-3.1-8B's shape in bfloat16 with 4 of its 32 blocks, by the stages of a
study: 28 times the time of a further block is added. Recovery runs with 2 and with 4 blocks, and the difference gives
the time and the memory of a further block. Checks compare float32 runs of 4 blocks of SmolLM2's shape on both devices.
Needs 60 GB of disk in TMPDIR. Exit code 1 if a check fails.
"""

import argparse
import json
import math
import random
import shutil
import string
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from checkpoints import CONFIGS, make_checkpoint
from estimates import requirements
from origin import HERE, ROOT, change_settings, origin, processor, read_rows, write_row
from tqdm import tqdm

from wanda_dvc.engine import accelerator
from wanda_dvc.engine.checkpoint import Checkpoint
from wanda_dvc.engine.forward import ModelRunner
from wanda_dvc.engine.memory import ModelSizes
from wanda_dvc.plan import RECOVERY_BATCH, RECOVERY_LENGTH
from wanda_dvc.pruning.gram import Gram
from wanda_dvc.stages import STAGES, process, run
from wanda_dvc.stages.needs import TRAINING_WAYS
from wanda_dvc.study.files import load_json, write_text
from wanda_dvc.study.folder import Study
from wanda_dvc.study.scaffold import new_params
from wanda_dvc.study.tensors import read_masks, read_stats
from wanda_dvc.training import trainer

sys.path.append(str(ROOT / "scripts"))
from figures import gpu
from floors import Protocol, Work, work_of_stages

TARGET = HERE / "gpu.json"
LLAMA_8B, SMOLLM2 = (json.loads((CONFIGS / f"{name}.json").read_text()) for name in ("llama-3.1-8b", "smollm2-135m"))
TINY = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300,
}  # fmt: skip
BLOCKS = 32
STEPS = 20  # of recovery
GRAM_BOUND = 1e-4  # of a Gram matrix, relative to the norms of both features: stored ones keep 11 bits, which is 5e-4
CHECKED: dict[str, dict[str, str]] = {
    "wanda": {}, "wanda 2:4": {"pattern": "2:4"}, "magnitude": {"recipe": "magnitude"}, "ria": {"method": "ria"},
}  # fmt: skip
Settings = dict[str, Any]


class Size(NamedTuple):
    """How much is run."""

    blocks: tuple[int, int] = (2, 4)  # of the 8B model: for recovery alone, and for all stages
    protocol: Protocol = Protocol()
    tasks: tuple[str, ...] = ("piqa", "hellaswag", "arc_easy", "boolq", "rte")
    questions: int = 48  # of each task: all embedded ones
    product: int = 8192  # rows and columns of the matrices whose product is timed
    checked: tuple[int, int] = (20, 512)  # windows and their length in checks


SMALL = Size((1, 2), Protocol(windows=4, length=32), tasks=("piqa",), questions=2, product=256, checked=(4, 32))
# What runs on the 8B shape: a name, the statistics that are measured first, and the settings, which stay for the next.
PRUNED: list[tuple[str, str, Settings]] = [
    ("wanda", "norms", {"recipe": "wanda"}),
    ("wanda 2:4", "", {"pattern": "2:4"}),
    ("admm", "gram", {"recipe": "admm", "pattern": "unstructured"}),
    ("wanda, group outputs", "fisher", {"recipe": "wanda", "pattern": "unstructured", "group": "outputs"}),
    ("fisher neurons", "", {"recipe": "fisher", "group": None, "pattern": "neurons"}),
    ("fisher", "", {"pattern": "unstructured"}),
]


class Bench:
    """One device, and studies of random models on it."""

    def __init__(self, device: torch.device, work: Path, size: Size) -> None:
        self.device, self.work, self.size = device, work, size

    def wait(self) -> None:
        """Wait until the GPU has computed all that was started."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def study(self, name: str, shape: Settings, settings: Settings, *parts: str) -> Study:
        """Return a new study of a random model of a shape, after parts of `download`."""
        root, model = self.work / name, self.work / f"model-{shape['dtype']}-{shape['num_hidden_layers']}"
        if not model.exists():
            make_checkpoint(model, shape)
        _, text = new_params({"model": str(model)}, settings)
        write_text(root / "params.yaml", text)
        study = Study(root)
        run("plan", study=study)
        for part in parts:
            run("download", study=study, variant=part)
        return study

    def settings(self, windows: int, length: int) -> Settings:
        """Return the settings of windows of random texts."""
        for name in ("calibration", "perplexity"):
            letters = random.Random(name).choices(string.ascii_lowercase + "     ", k=(windows + 1) * max(length, 4096))
            write_text(self.work / f"{name}.txt", "".join(letters))
        text, other_text = ({"source": str(self.work / f"{name}.txt")} for name in ("calibration", "perplexity"))
        sizes = {"windows": windows, "length": length}
        calibration, perplexity = {"text": text | {"split": None}} | sizes, {"texts": {"random": other_text}} | sizes
        return {"calibration": calibration, "perplexity": perplexity, "runtime": {"device": self.device.type}}

    def measure(self, study: Study, stage: str, variant: str = "") -> Settings:
        """Run a stage of a study; return its seconds, and the mean of its blocks, or steps, but the first.

        Also the peak of a GPU's memory, and what the stage needs by the formula, in bytes.
        """
        times = defaultdict[str, list[tuple[int, float]]](list)
        run_forward, wait = ModelRunner.forward, self.wait

        class TimedBar(tqdm):  # type: ignore[misc]
            def update(self, n: float | None = 1) -> bool | None:
                wait()
                shown = super().update(n)
                times[self.desc].append((int(self.n), time.perf_counter()))
                return shown

        def forward(runner: ModelRunner, *args: Any, **kwargs: Any) -> Any:
            steps = run_forward(runner, *args, **kwargs)
            is_backward = kwargs.get("kept", 1) > 1  # it shows no bar for its own forward pass
            return process.progress(steps, total=0, what="forward") if is_backward else steps

        needed = requirements(study, stage, ModelSizes.read(study.model("dense"))).memory
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        with mock.patch.object(process, "tqdm", TimedBar), mock.patch.object(ModelRunner, "forward", forward):
            run(stage, study=study, variant=variant)
            self.wait()
        seconds = time.perf_counter() - began
        peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0
        parts = STEPS if stage == "recover" else self.size.blocks[1]
        block = sum(further(shown, parts) for what, shown in times.items() if "windows" not in what)
        return {"seconds": seconds, "block": block, "peak": peak, "needed": needed}


def further(shown: list[tuple[int, float]], parts: int) -> float:
    """Return the mean seconds of each block or step but the first, given when how many items of them were done."""
    items, ended = shown[-1]
    began = next(when for done, when in shown if done >= items // parts)
    return (ended - began) / (parts - 1)


def changed(study: Study, settings: Settings) -> Study:
    """Return the study with changed settings, after `plan`."""
    change_settings(study.root / "params.yaml", settings)
    study = Study(study.root)
    run("plan", study=study)
    return study


# --- times ---


def product_speed(bench: Bench, dtype: torch.dtype) -> float:
    """Return the operations a second of a product of two large matrices, the fastest of five."""
    size, seconds = bench.size.product, math.inf
    a, b = (torch.randn(size, size, device=bench.device).to(dtype) for _ in range(2))
    for _ in range(5):
        bench.wait()
        began = time.perf_counter()
        torch.matmul(a, b)
        bench.wait()
        seconds = min(seconds, time.perf_counter() - began)
    return 2.0 * size**3 / seconds


def times(bench: Bench, shape: Settings, speed: Work) -> Iterator[tuple[str, Settings]]:
    """Run each stage on the 8B shape; yield its name and its figures for all blocks."""
    size, protocol, blocks = bench.size, bench.size.protocol, bench.size.blocks[1]
    tokens = STEPS * RECOVERY_BATCH * min(RECOVERY_LENGTH, protocol.length)
    settings = bench.settings(protocol.windows, protocol.length)
    settings |= {"tasks": {"names": list(size.tasks), "limit": size.questions}}
    settings |= {"recovery": {"tokens": tokens}}
    parts = ("model", "calibration", "perplexity", "tasks")
    study = bench.study("large", shape | {"num_hidden_layers": blocks}, settings, *parts)

    def figures(name: str, measured: Settings) -> Settings:
        one, two = (work_of_stages(shape | {"num_hidden_layers": count}, protocol).get(name) for count in (1, 2))
        share = two.plus(one, -1).seconds(speed) / measured["block"] if one and two else None
        seconds = measured["seconds"] + (BLOCKS - blocks) * measured["block"]
        return measured | {"seconds": seconds, "share": share}

    for recipe, statistics, change in PRUNED:
        study = changed(study, change)
        if statistics:
            name = f"calibrate {statistics}"
            yield name, figures(name, bench.measure(study, "calibrate", statistics))
        for stage in ("mask", "apply"):
            name = f"{stage} {recipe}"
            yield name, figures(name, bench.measure(study, stage))
    protocol = protocol._replace(evaluated=protocol.windows * protocol.length)
    for model in ("dense", "pruned"):
        measured = bench.measure(study, "perplexity", model)
        yield f"perplexity {model}", figures("perplexity", measured)
    with mock.patch.object(ModelRunner, "forward", autospec=True, side_effect=ModelRunner.forward) as passes:
        measured = bench.measure(study, "zero-shot", "dense")
    counts = [len(sequence.tokens) for call in passes.call_args_list for sequence in call.args[1]]
    protocol = protocol._replace(questions=sum(counts))
    yield "zero-shot dense", figures("zero-shot", measured)
    yield f"recover, {STEPS} steps", recovery(bench, study, shape, settings, speed)


def recovery(bench: Bench, study: Study, shape: Settings, settings: Settings, speed: Work) -> Settings:
    """Return the figures of a training of all blocks, from those of two numbers of blocks."""
    few, more = bench.size.blocks
    settings |= {"recipe": "wanda"}
    small = bench.study("small", shape | {"num_hidden_layers": few}, settings, "model", "calibration")
    for stage in ("calibrate", "mask", "apply"):
        run(stage, study=small)
    low = mock.patch("wanda_dvc.stages.recover.training_ways", return_value=TRAINING_WAYS[-1:])  # as 8B needs it
    with mock.patch.object(trainer, "EVALUATIONS", 1), low:  # each writes a checkpoint
        base, measured = (bench.measure(trained, "recover") for trained in (small, study))
    step, peak, needed = (
        measured[name] + (BLOCKS - more) * (measured[name] - base[name]) / (more - few)
        for name in ("block", "peak", "needed")
    )
    protocol = bench.size.protocol._replace(trained=RECOVERY_BATCH * RECOVERY_LENGTH)
    least = work_of_stages(shape, protocol)["recover"].seconds(speed)
    return {"seconds": STEPS * step, "block": step, "peak": int(peak), "needed": int(needed), "share": least / step}


# --- checks ---


def checks(bench: Bench, shape: Settings) -> Iterator[tuple[str, float, float]]:
    """Compare a study on the device with one on the CPU; yield what, the difference, and the largest allowed one."""
    settings = bench.settings(*bench.size.checked) | {"recipe": "fisher", "dtype": "float32"}
    host, gpu_study = (
        bench.study(name, shape, settings | {"runtime": {"device": device}}, "model", "calibration", "perplexity")
        for name, device in (("host", "cpu"), ("gpu", bench.device.type))
    )
    for study in (host, gpu_study):
        run("calibrate", study=study)
        run("perplexity", study=study, variant="dense")
    blocks = range(shape["num_hidden_layers"])
    pairs = [[read_stats(study.norms, block, fisher=study.fisher) for study in (host, gpu_study)] for block in blocks]
    norms = [(a.inputs[name].norm, b.inputs[name].norm) for a, b in pairs for name in a.inputs]
    yield "norms, largest relative difference", max(float((b / a - 1).abs().max()) for a, b in norms), 1e-4
    gradients = [(a.fisher[name], b.fisher[name]) for a, b in pairs for name in a.fisher]
    apart = max(float((b - a).norm() / a.norm()) for a, b in gradients)
    yield "squared gradients, largest relative difference of a linear's", apart, 1e-3
    yield "Gram sums of bfloat16 numbers, relative to norms", gram_error(bench), GRAM_BOUND
    yield "losses in float32, nats", losses_apart(host, gpu_study), 1e-4
    run("perplexity", study=changed(gpu_study, {"dtype": "bfloat16"}), variant="dense")
    yield "losses in bfloat16, nats", losses_apart(host, gpu_study), 5e-2

    shutil.rmtree(gpu_study.root / "stats")
    shutil.copytree(host.root / "stats", gpu_study.root / "stats")  # masks and weights of the same statistics
    plain = {"dtype": "float32", "recipe": "wanda", "pattern": "unstructured", "reconstruction": None}
    for rule, change in CHECKED.items():
        masks = []
        for study in (host, gpu_study):
            study = changed(study, plain | {"method": None} | change)
            run("mask", study=study)
            masks.append([read_masks(study.masks, block) for block in blocks])
        kept = [(a[name], b[name]) for a, b in zip(*masks, strict=True) for name in a]
        share = sum(int((a != b).sum()) for a, b in kept) / sum(a.numel() for a, _ in kept)
        yield f"masks of the same statistics, {rule}, share that differs", share, 1e-5 if rule == "ria" else 0
    linears = [linear for block in blocks for linear in read_masks(host.masks, block)]
    for reconstruction in ("least-squares", "output-weighted"):
        models = []
        for study in (host, gpu_study):
            study = changed(study, plain | {"method": None, "reconstruction": reconstruction})
            run("mask", study=study)
            run("apply", study=study)
            models.append(Checkpoint(study.model("pruned")))
        weights = ([model.weight(name).float() for model in models] for name in linears)
        apart = max(float((b - a).norm() / a.norm()) for a, b in weights)
        yield f"{reconstruction}, largest relative difference of a linear's weights", apart, 1e-2


def losses_apart(host: Study, gpu_study: Study) -> float:
    """Return the largest difference of a window's loss."""
    a, b = (load_json(study.details("dense", "perplexity/random"))["losses"] for study in (host, gpu_study))
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def gram_error(bench: Bench) -> float:
    """Return the largest difference of a sum of products from float64's, relative to both features' norms."""
    x = torch.randn(bench.size.product, 256).bfloat16()
    gram, exact = Gram.empty(256, accelerator.float64_device(bench.device)), x.double().T @ x.double()
    gram.add(x.to(bench.device))
    norm = exact.diagonal().sqrt()
    return float(((gram.upper.cpu() - exact).triu() / norm / norm[:, None]).abs().max())


# --- the report ---


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the file's rows are replaced."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try the script")
    parser.add_argument("--out", type=Path, help="file of the rows; default: benchmarks/gpu.json, without --tiny")
    options = parser.parse_args(arguments)
    device, (size, changes) = torch.device(options.device), (SMALL, TINY) if options.tiny else (Size(), {})
    if device.type == "cuda" and not accelerator.gpus():
        parser.error("no CUDA device on this machine; --device cpu --tiny tries the script")
    accelerator.disable_tf32()  # as stages do; NVIDIA's containers turn TF32 on
    name = accelerator.gpu_name(device) if device.type == "cuda" else processor()
    protocol = f"random weights of {'tiny models' if options.tiny else 'Llama-3.1-8B, 4 of 32 blocks'}, {name}"
    with tempfile.TemporaryDirectory(prefix="wanda-dvc-gpu-") as folder:
        target = options.out or (Path(folder, "gpu.json") if options.tiny else TARGET)
        target.unlink(missing_ok=True)

        def write(row: str, value: Settings, *stages: str) -> None:
            write_row(target, row, value, origin(protocol, stages))
            print(f"{row}: {value}", flush=True)

        bench, failures = Bench(device, Path(folder), size), list[str]()
        speeds = {dtype: product_speed(bench, getattr(torch, dtype)) for dtype in ("bfloat16", "float32")}
        for dtype, operations in speeds.items():
            write(f"product in {dtype}", {"tflops": operations / 1e12})
        speed = Work(speeds["bfloat16"], speeds["float32"], math.inf, math.inf)  # no transfers count
        try:
            for what, difference, bound in checks(bench, SMOLLM2 | {"num_hidden_layers": size.blocks[1]} | changes):
                failures += [what] * (difference > bound)
                comparison = {"measured": difference, "bound": bound, "met": difference <= bound}
                write(f"check: {what}", comparison, *STAGES)
        except Exception:  # the times are worth the rent of a GPU too
            failures.append(traceback.format_exc())
        for what, figures in times(bench, LLAMA_8B | changes, speed):
            write(f"stage: {what}", figures)
        print("\n".join(["", gpu(read_rows(target)), *(f"\nfailed: {failure}" for failure in failures)]))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
