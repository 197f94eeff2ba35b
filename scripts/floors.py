"""Compute what each stage does at least on large models, and the time that follows, for docs/limits.md.

`scripts/figures.py` writes the table. `benchmarks/gpu.py` compares measured times with the same work.
"""

import json
import os
import tempfile
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

from estimates import requirements

from wanda_dvc.catalog import RECONSTRUCTIONS
from wanda_dvc.engine.memory import ModelSizes, triangles_size
from wanda_dvc.plan import RECOVERY_LENGTH, WINDOWS_BACK
from wanda_dvc.pruning.solvers import ADMM_ITERATIONS
from wanda_dvc.stages.needs import BYTES_A_TOKEN, Requirements
from wanda_dvc.study.folder import ITEMS, Study
from wanda_dvc.study.scaffold import new_params

CONFIGS = Path(__file__).parents[1] / "tests/configs"
MODELS = {"LLaMA-2-7B": "llama-2-7b", "LLaMA-2-70B": "llama-2-70b"}
# The rows of the page. `mask` and `apply` with `wanda` read and write files alone.
ROWS = [("calibrate", "wanda"), ("calibrate", "fisher"), ("mask", "fisher"), ("apply", "fisher")]
ROWS += [(stage, "") for stage in ("perplexity", "zero-shot", "recover")]
WIKITEXT = 1_349_550  # bytes of WikiText-2's test split as JSON lines
# Bytes of the complete tasks, likewise; of HellaSwag's 10,042 items, 1,000 were weighed.
TASKS = {"hellaswag": 7_504_000, "piqa": 517_450, "arc_easy": 766_235, "boolq": 2_156_965, "rte": 101_552}
ON_GPU = 40e9  # bytes of activations that fit on a GPU of 80 GB, about


class Work(NamedTuple):
    """What a stage does at least, or what a machine does in a second."""

    half: float = 0  # operations on 16-bit numbers
    single: float = 0  # operations on float32 numbers
    link: float = 0  # bytes between host and GPU
    disk: float = 0  # bytes of files, each read or written once

    def plus(self, work: "Work", times: float = 1) -> "Work":
        """Return the sum of this work and `times` as much of other work."""
        return Work(*(mine + times * added for mine, added in zip(self, work, strict=True)))

    def seconds(self, speed: "Work") -> float:
        """Return the time at a machine's speed, if products, transfers and files overlap."""
        products = self.half / speed.half + self.single / speed.single
        return max(products, self.link / speed.link, self.disk / speed.disk)


# By the data sheet, without sparsity. Its memory, 3.35 TB/s, bounds no stage.
H100 = Work(half=989e12, single=67e12, link=64e9, disk=7e9)
CORES = Work(half=170e9, single=170e9, link=inf, disk=7e9)  # measured: the fastest of six products of 2,048² matrices


class Protocol(NamedTuple):
    """The tokens that run through a model."""

    windows: int = 128  # of the calibration
    length: int = 2048  # tokens of a window
    evaluated: int = WIKITEXT // BYTES_A_TOKEN
    questions: int = sum(TASKS.values()) // BYTES_A_TOKEN
    trained: int = 1_000_000


def work_of_stages(config: dict[str, Any], protocol: Protocol) -> dict[str, Work]:
    """Return the work of each stage on a Llama with 16-bit weights, by stage and statistics or recipe."""
    blocks, hidden, features = (config[name] for name in ("num_hidden_layers", "hidden_size", "intermediate_size"))
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    inputs = (hidden, hidden, hidden, features)  # of a block, by distinct input
    shapes = [(hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden), (hidden, features)]
    shapes += [(features, hidden)] * 2
    linears, head = blocks * sum(out * width for out, width in shapes), hidden * config["vocab_size"]
    model, masks = 2 * (linears + 2 * head), linears / 8  # bytes
    input_squares, output_squares = blocks * sum(x**2 for x in inputs), blocks * sum(x**2 for x, _ in shapes)
    grams, gradient_grams = triangles_size(input_squares), triangles_size(output_squares)
    tokens, length = protocol.windows * protocol.length, protocol.length
    back, evaluated, trained = WINDOWS_BACK * length, protocol.evaluated, protocol.trained

    def attention(tokens: float, length: int) -> float:  # two products of half of all pairs
        return 2 * tokens * length * hidden * blocks

    def forward(tokens: float, length: int) -> float:
        return 2 * tokens * linears + attention(tokens, length)

    def moved(tokens: float, stored: int) -> float:  # activations that do not fit, written and read
        return 4 * tokens * hidden * blocks if 2 * tokens * hidden * stored > ON_GPU else 0

    def products(by_input: float, by_output: float = 0) -> float:  # of weights with Gram matrices
        return 2 * blocks * sum(out * width * (by_input * width + by_output * out) for out, width in shapes)

    # Conjugate gradients have one product more than steps. One or two products compare errors.
    least_squares, weighted = (RECONSTRUCTIONS[name].steps + 1 for name in ("least-squares", "output-weighted"))
    cubes = blocks * sum(width**3 for width in inputs)  # of an inverse; a Cholesky factor takes a third
    files, fisher = Work(link=model, disk=model), Work(link=gradient_grams, disk=gradient_grams)
    norms = files.plus(Work(half=forward(tokens, length), link=moved(tokens, 2)))
    # One triangle of a Gram matrix. A block runs again before its backward half, without gradients of weights.
    backward = 3 * forward(back, length) + attention(back, length) + 4 * back * head
    gradients = Work(half=backward, single=back * output_squares, link=model + moved(back, 2 * blocks))
    mask = Work(single=linears, link=2 * linears + masks, disk=2 * linears + masks)
    admm = mask.plus(Work(single=cubes + products(ADMM_ITERATIONS - 1), link=grams, disk=grams))
    write = Work(disk=2 * model + masks)
    refit = Work(single=cubes / 3 + products(least_squares + 1), link=4 * linears + grams, disk=grams)
    coupled = fisher.plus(Work(single=products(weighted + 2, weighted)))
    head_runs = 2 * evaluated * head
    # The teacher runs forward, the model forward twice and backward, with gradients of weights.
    training = 5 * (forward(trained, RECOVERY_LENGTH) + 2 * trained * head)
    return {
        "calibrate norms": norms,
        "calibrate gram": norms.plus(Work(half=tokens * input_squares, link=grams, disk=grams)),
        "calibrate fisher": files.plus(gradients).plus(fisher),
        "mask wanda": mask,
        "mask admm": admm,
        "mask fisher": admm.plus(Work(link=2 * linears)),  # sensitivities read the weights too
        "apply wanda": write,
        "apply admm": write.plus(refit),
        "apply fisher": write.plus(refit).plus(coupled),
        "perplexity": files.plus(Work(half=forward(evaluated, length) + head_runs, link=moved(evaluated, 2))),
        "zero-shot": files.plus(Work(half=forward(protocol.questions, 0), link=moved(protocol.questions, 2))),
        "recover": Work(half=training, link=2 * model, disk=3 * model),
    }


def needed(folder: Path, sizes: ModelSizes, stage: str, recipe: str, device: str) -> Requirements:
    """Return a stage's memory and disk by the product's own formulas, for a study without a model."""
    protocol, dtype = Protocol(), "auto" if device == "cuda" else "float32"
    windows = {"windows": protocol.windows, "length": protocol.length}
    settings = {
        "recipe": recipe, "dtype": dtype, "runtime": {"device": device}, "calibration": windows,
        "perplexity": windows | {"windows": protocol.evaluated // protocol.length},
        "tasks": {"source": "benchmark", "names": list(TASKS)}, "recovery": {"tokens": protocol.trained},
    }  # fmt: skip
    return requirements(Study(folder).with_params(new_params(settings)[0]), stage, sizes)


def table() -> str:
    """Return the page's table, after the speeds."""
    heads = ["model", "stage", "GPU memory, GB", "CPU memory, GB", "disk, GB", "H100, s", "two cores, s"]
    rows = [heads, ["---"] * 2 + ["---:"] * 5]
    with tempfile.TemporaryDirectory() as folder:
        for name, size in TASKS.items():
            path = Path(folder, "data/tasks", name, ITEMS)
            path.parent.mkdir(parents=True)
            path.touch()
            os.truncate(path, size)
        for model, file in MODELS.items():
            config = CONFIGS / f"{file}.json"
            sizes = ModelSizes.read(config)
            work = work_of_stages(json.loads(config.read_text(encoding="utf-8")), Protocol())
            work["calibrate wanda"] = work["calibrate norms"]
            work["calibrate fisher"] = work["calibrate fisher"].plus(work["calibrate gram"])
            for stage, recipe in ROWS:
                least = work[f"{stage} {recipe}".strip()]
                gpu, cpu = (needed(Path(folder), sizes, stage, recipe or "wanda", kind) for kind in ("cuda", "cpu"))
                figures = [size / 1e9 for size in (gpu.memory, cpu.memory, gpu.disk)]
                figures += [least.seconds(H100), least.seconds(CORES)]
                shown = [f"{figure:,.0f}" if figure >= 10 else f"{figure:.2g}" for figure in figures]
                rows.append([model, f"`{stage}`" + f", `{recipe}`" * bool(recipe), *shown])
    speeds = [f"{speed:.0f}" for speed in (H100.half / 1e12, H100.single / 1e12, H100.link / 1e9, H100.disk / 1e9)]
    sentence = (
        "H100: {} TFLOP/s in bfloat16 and {} in float32; link {} GB/s, disk {} GB/s. "
        f"Two cores: {CORES.single / 1e9:.0f} GFLOP/s in float32, as measured."
    )
    return "\n".join([sentence.format(*speeds), "", *(f"| {' | '.join(row)} |" for row in rows)])
