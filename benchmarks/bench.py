"""Measure this project against the published procedure, stock lm-eval, and the machine's own floor.

    make bench                                  everything, about 40 minutes on two quiet cores
    make bench ROWS="mask perplexity"           some of it; other rows of the last result stay
    python benchmarks/bench.py --quick          a tiny random model, to try the harness; writes results-quick.*
    python benchmarks/bench.py --resume         go on after an interruption, with what was measured
    python benchmarks/bench.py --mirror DIR     WikiText-2 and the real benchmarks, 200 items a task

Every figure is of a whole process started for it, or of the stage's own clock where a row says "inside". What one row
measures another may use: each is measured once a run. A machine that others share changes its speed within minutes: a
long process is paused now and then while the floor is measured, and a baseline counts at the speed that the machine had
for ours.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from ruamel.yaml import YAML
from tabulate import tabulate

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TASKS = ("piqa", "hellaswag", "arc_easy", "boolq", "rte")
TOLERANCE = 1e-3  # of a log-likelihood in float32; in bfloat16 what stock's own differ by from those in float32
TINY = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300,
}  # fmt: skip

PAUSE_EVERY = 8.0  # seconds

Part = dict[str, Any]


@dataclass
class Row:
    """A line of the result. `ratio` is compared with `goal`; `met` is None where this machine can't tell."""

    name: str
    ours_s: float | None
    baseline_s: float | None
    ratio: float | None
    goal: str
    met: bool | None
    note: str = ""


def reach(name: str, ours: float, baseline: float, ratio: float, goal: str, note: str = "") -> Row:
    """A row whose goal is `≥ 2`, `< 0.05` or the like, of its ratio."""
    sign, bound = goal.split()
    met = ratio >= float(bound) if sign == "≥" else ratio < float(bound)
    return Row(name, round(ours, 3), round(baseline, 3), round(ratio, 4), goal, met, note)


class Bench:
    """A run: its settings, a folder to work in, and what it has measured so far."""

    def __init__(self, words: argparse.Namespace) -> None:
        self.words = words
        self.work: Path = words.work.resolve() / ("quick" if words.quick else "full")
        if not words.resume:
            shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True, exist_ok=True)
        self.state = self.work / "state.json"
        self.parts: dict[str, Part] = json.loads(self.state.read_text()) if self.state.is_file() else {}
        self.bf16 = has_bf16_units() or words.quick  # quick tries every row
        self.beside: Any = None  # the floor that a process is paused for
        self.length, self.samples, self.windows = (128, 4, 4) if words.quick else (2048, 32, 16)
        self.limit = 4 if words.quick else 200
        self.tasks = ("piqa", "boolq") if words.quick else TASKS

    # --- running things ---

    def part(self, name: str, make: Callable[[], Part]) -> Part:
        """Measured once a run, and kept for one that is resumed."""
        if name not in self.parts:
            began = time.perf_counter()
            made = make()
            self.parts[name] = made
            self.state.write_text(json.dumps(self.parts))
            say(f"{name}: {time.perf_counter() - began:.1f} s")
        return self.parts[name]

    def run(self, *words: str | Path, cwd: Path | None = None, path: Path | None = None) -> Part:
        """A process: wall seconds and peak resident memory. RuntimeError with its last lines if it fails."""
        env = os.environ | {"PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        env["PATH"] = os.pathsep.join([*([str(path)] if path else []), str(Path(sys.executable).parent), env["PATH"]])
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "src"), env.get("PYTHONPATH")]))
        log = self.work / "last.log"
        paused = 0.0
        with log.open("wb") as out:
            began = looked = time.perf_counter()
            process = subprocess.Popen(list(map(str, words)), cwd=cwd or self.work, env=env, stdout=out, stderr=out)
            try:
                ended, status, usage = os.wait4(process.pid, os.WNOHANG if self.beside else 0)
                while not ended and self.beside:
                    time.sleep(0.02)
                    if time.perf_counter() - looked > PAUSE_EVERY:
                        looked = time.perf_counter()
                        os.kill(process.pid, signal.SIGSTOP)  # Popen's own way would wait for one that has ended
                        self.beside.sample()
                        os.kill(process.pid, signal.SIGCONT)
                        paused += time.perf_counter() - looked
                        looked = time.perf_counter()
                    ended, status, usage = os.wait4(process.pid, os.WNOHANG)
            except BaseException:
                process.kill()
                raise
            wall = time.perf_counter() - began - paused
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            last = log.read_text(errors="replace").splitlines()[-5:]
            raise RuntimeError(f"{' '.join(map(str, words))}: exit {process.returncode}: {' | '.join(last)}")
        scale = 1 if sys.platform == "darwin" else 1024
        return {"wall": wall, "paused": paused, "peak_gb": usage.ru_maxrss * scale / 1e9}

    def script(self, name: str, *words: str | Path) -> Part:
        """One of the scripts beside this one, in a process of its own, and what it found."""
        result = self.work / "result.json"
        result.unlink(missing_ok=True)
        done = self.run(sys.executable, HERE / f"{name}.py", *words, "--result", result)
        return json.loads(result.read_text()) | done

    def stage(self, project: Path, *words: str) -> Part:
        """A stage through the command line: the process's wall seconds, and those inside the stage, without pauses."""
        done = self.run("wanda-dvc", *words, cwd=project)
        name = "-".join(words)
        inside = json.loads((project / f"metrics/times/{name}.json").read_text())["seconds"]
        return done | {"seconds": inside - done["paused"]}

    # --- projects ---

    def settings(self, folder: Path, changes: dict[str, Any]) -> None:
        """The repository's params.yaml with changes, by dotted name."""
        yaml = YAML()
        path = folder / "params.yaml"
        params = yaml.load((path if path.is_file() else ROOT / "params.yaml").read_text(encoding="utf-8"))
        for name, value in changes.items():
            *sections, leaf = name.split(".")
            target = params
            for section in sections:
                target = target[section]
            target[leaf] = value
        yaml.dump(params, path)

    def sizes(self) -> dict[str, Any]:
        changes: dict[str, Any] = {
            "calibration.samples": self.samples,
            "calibration.length": self.length,
            "perplexity.length": self.length,
            "perplexity.windows": self.windows,
            "tasks.names": list(self.tasks),
            "zero_shot.limit": self.limit,
        }
        if self.words.mirror:
            changes |= {
                "runtime.mirror": str(self.words.mirror.resolve()),
                "calibration.text.source": "wikitext2",
                "calibration.text.split": "validation",
                "perplexity.text.source": "wikitext2",
                "tasks.source": "benchmark",
            }
        return changes | self.source

    @property
    def source(self) -> dict[str, Any]:
        """The model, where it is not params.yaml's own."""
        if self.words.model:
            return {"model": str(self.words.model.resolve())}
        if not self.words.quick:
            return {}
        tiny = self.work / "tiny"
        if not (tiny / "config.json").is_file():
            self.run(sys.executable, HERE / "memory.py", "make", tiny, "--config", json.dumps(TINY))
        return {"model": str(tiny)}

    def project(self, dtype: str = "float32") -> Path:
        """A project without DVC, whose downloads are done. That of another dtype shares them."""
        folder = self.work / dtype
        if (folder / "ready").is_file():
            return folder
        folder.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / "dvc.yaml", folder / "dvc.yaml")
        self.settings(folder, self.sizes() | {"dtype": dtype})
        if dtype == "float32":
            for part in ("model", "calibration", "perplexity", "tasks"):
                say(f"download {part}")
                self.run("wanda-dvc", "download", part, cwd=folder)
        else:
            first = self.project()
            (folder / "models").mkdir(exist_ok=True)
            (folder / "models/dense").symlink_to(first / "models/dense")
            (folder / "data").symlink_to(first / "data")
        (folder / "ready").touch()
        return folder

    @property
    def model(self) -> Path:
        return self.project() / "models/dense"

    def token_file(self, part: str) -> Path:
        """The windows that the project draws, for the baselines."""
        path = self.work / f"{part}.npy"
        if not path.is_file():
            from wanda_dvc.engine.windows import cut, load_tokenizer, tokenize
            from wanda_dvc.stages.inputs import calibration_windows
            from wanda_dvc.study.project import Project

            project = Project(self.project())
            if part == "calibration":
                windows = calibration_windows(project)
            else:
                tokens = tokenize(project.text("perplexity"), load_tokenizer(self.model))
                windows = cut(tokens, length=self.length, windows=self.windows)
            np.save(path, windows.numpy())
        return path

    # --- what is measured, each once ---

    def with_floor(self, dtype: str, measure: Callable[[], Part]) -> Part:
        """Something measured, paused every few seconds for a look at the floor; what it is compared with is their mean.

        A machine that others share is now faster, now slower, by a third within minutes.
        """
        import torch
        from floor import Floor

        floor = Floor(self.model, getattr(torch, dtype), self.length, budget=0.1)
        floor.sample()
        self.beside = floor
        try:
            made = measure()
        finally:
            self.beside = None
        floor.sample()
        return made | {"floor": floor.mean()}

    def calibrate(self, dtype: str) -> Part:
        stage = partial(self.stage, self.project(dtype), "calibrate")
        return self.part(f"calibrate {dtype}", lambda: self.with_floor(dtype, stage))

    def mask_and_apply(self, dtype: str, method: str) -> Part:
        self.calibrate(dtype)
        folder = self.project(dtype)

        def measure() -> Part:
            self.settings(folder, {"method": method})
            runs = [(self.stage(folder, "mask"), self.stage(folder, "apply")) for _ in range(3)]
            self.settings(folder, {"method": "wanda"})
            mask, apply = (min(stages, key=lambda run: run["wall"]) for stages in zip(*runs, strict=True))
            return {"wall": mask["wall"] + apply["wall"], "mask": mask["seconds"], "apply": apply["seconds"]}

        return self.part(f"mask and apply {dtype} {method}", measure)

    def perplexity(self, dtype: str, model: str = "dense") -> Part:
        stage = partial(self.stage, self.project(dtype), "perplexity", model)
        return self.part(f"perplexity {dtype} {model}", lambda: self.with_floor(dtype, stage))

    def perplexity_of_pruned(self, dtype: str) -> float:
        """Of the 50 % model."""

        def measure() -> Part:
            self.calibrate(dtype)
            folder = self.project(dtype)
            for words in (("mask",), ("apply",), ("perplexity", "pruned")):
                done = self.stage(folder, *words)
            found = json.loads((folder / "metrics/pruned/perplexity.json").read_text())
            return done | found

        return self.part(f"perplexity of the 50 % model {dtype}", measure)["perplexity"]

    def plain(self, what: str, dtype: str = "float32") -> Part:
        """(a), or for `perplexity` the authors' loop."""
        tokens = self.token_file("perplexity" if what == "perplexity" else "calibration")
        words: list[str | Path] = [
            what,
            self.model,
            "--windows",
            tokens,
            "--dtype",
            dtype,
            "--out",
            self.work / "plain",
        ]
        script = partial(self.script, "plain", *words)
        # A magnitude prune multiplies nothing that the floor knows of.
        made = self.part(
            f"plain {what} {dtype}", script if what == "magnitude" else lambda: self.with_floor(dtype, script)
        )
        shutil.rmtree(self.work / "plain", ignore_errors=True)
        return made

    def zero_shot(self, dtype: str) -> Part:
        folder = self.project(dtype)

        def measure() -> Part:
            done = {task: self.stage(folder, "zero-shot", "dense", task) for task in self.tasks}
            answers = {}
            for task in self.tasks:
                content = json.loads((folder / f"metrics/details/dense/zero_shot/{task}.json").read_text())
                answers[task] = [item["loglikelihoods"] for item in content["items"]]
            return {
                "wall": sum(run["wall"] for run in done.values()),
                "seconds": sum(run["seconds"] for run in done.values()),
                "tasks": {task: run["seconds"] for task, run in done.items()},
                "loglikelihoods": answers,
            }

        return self.part(f"zero-shot {dtype}", lambda: self.with_floor(dtype, measure))

    def stock(self, dtype: str) -> Part:
        """(b)"""
        batches = ["1", "16"] if self.words.quick else ["1", "4", "16", "64"]
        part = "2" if self.words.quick else "20"
        words: list[str | Path] = [self.model, *self.tasks, "--data", self.project() / "data/tasks", "--dtype", dtype]
        words += ["--batch", *batches, "--part", part, "--limit", str(self.limit)]
        script = partial(self.script, "stock", *words)
        made = self.part(f"stock lm-eval {dtype}", lambda: self.with_floor(dtype, script))
        running = made["wall"] / (made["wall"] + made["paused"])  # its own clock went on while it was paused
        tried = sum(made["tried"].values()) * running  # looking for the batch size is not counted
        return made | {"wall": made["wall"] - tried, "seconds": made["seconds"] * running}

    # --- DVC ---

    @property
    def dvc_project(self) -> Path:
        """The repository's default, in a repository of its own; a shim notes how long each command takes."""
        folder = self.work / "dvc"
        if not (folder / "ready").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            shutil.copyfile(ROOT / "dvc.yaml", folder / "dvc.yaml")
            small = self.sizes() if self.words.quick else {}
            self.settings(folder, small | self.source)
            self.run("git", "init", "-q", cwd=folder)
            self.run("dvc", "init", "-q", cwd=folder)
            shutil.copyfile(ROOT / ".dvc/config", folder / ".dvc/config")
            shutil.copyfile(ROOT / ".gitignore", folder / ".gitignore")
            shim = self.work / "shim/wanda-dvc"
            shim.parent.mkdir(exist_ok=True)
            real = shutil.which("wanda-dvc", path=str(Path(sys.executable).parent))
            shim.write_text(
                f'#!/bin/sh\nbegan=$(date +%s.%N)\n"{real}" "$@"\ncode=$?\n'
                f'echo "$began $(date +%s.%N) $*" >> "{self.work}/commands"\nexit $code\n'
            )
            shim.chmod(0o755)
            (folder / "ready").touch()
        return folder

    def repro(self, *words: str) -> Part:
        """`dvc repro`: its wall seconds, those of the commands that it ran, and those inside their stages."""
        folder, commands = self.dvc_project, self.work / "commands"
        commands.unlink(missing_ok=True)
        done = self.run("dvc", "repro", *words, cwd=folder, path=self.work / "shim")
        ran = [line.split(" ", 2) for line in commands.read_text().splitlines()] if commands.is_file() else []
        inside = 0.0
        for *_, command in ran:
            name = "-".join(command.split(" --version")[0].split())
            inside += json.loads((folder / f"metrics/times/{name}.json").read_text())["seconds"]
        spent = sum(float(end) - float(begin) for begin, end, _ in ran)
        return done | {"commands": spent, "inside": inside, "ran": len(ran)}

    def full_repro(self) -> Part:
        """From nothing."""

        def measure() -> Part:
            shutil.rmtree(self.work / "dvc", ignore_errors=True)
            return self.repro()

        return self.part("dvc repro", measure)


# --- the rows ---


def calibrate_rows(bench: Bench) -> list[Row]:
    rows = []
    for dtype, goal in (("float32", "≥ 0.85"), ("bfloat16", "≥ 0.45")):
        name = f"calibrate {bench.samples} × {bench.length} {dtype}, share of the floor"
        if dtype == "bfloat16" and not bench.bf16:
            rows.append(without_units(name, goal))
            continue
        done = bench.calibrate(dtype)
        floor = pass_floor(done["floor"], bench.samples, bench.length)
        rates = "{gflops_linears:.0f} GFLOP/s in the linears, {gflops_attention:.0f} in attention".format(
            **done["floor"]
        )
        rows.append(reach(name, done["seconds"], floor, floor / done["seconds"], goal, f"inside; {rates}"))
    name = "calibrate bfloat16 against float32"
    if bench.bf16:
        ours, base = bench.calibrate("bfloat16")["seconds"], bench.calibrate("float32")["seconds"]
        rows.append(reach(name, ours, base, base / ours, "≥ 2.5", "inside"))
        low, high = bench.perplexity_of_pruned("bfloat16"), bench.perplexity_of_pruned("float32")
        note = f"not seconds: perplexity {low} in bfloat16, {high} in float32"
        row = reach("perplexity of the 50 % model, bfloat16", low, high, abs(low / high - 1), "< 0.01", note)
        rows.append(Row(row.name, None, None, row.ratio, row.goal, row.met, note))
    else:
        rows += [without_units(name, "≥ 2.5"), without_units("perplexity of the 50 % model, bfloat16", "< 0.01")]
    return rows


def statistics_rows(bench: Bench) -> list[Row]:
    done = bench.part("statistics", lambda: bench.script("inside", "statistics", bench.project()))
    share = done["with"] / done["without"] - 1
    note = "inside: 16 windows through three blocks, with the recorder and without, in turn"
    return [reach("statistics, share of calibrate", done["with"], done["without"], share, "< 0.05", note)]


def prune_rows(bench: Bench) -> list[Row]:
    plain = bench.plain("wanda")
    base = then(plain, bench.calibrate("float32"))
    rows = []
    for dtype, goal in (("float32", "≥ 2"), ("bfloat16", "≥ 4")):
        name = f"first prune {dtype}, against (a) in float32"
        if dtype == "bfloat16" and not bench.bf16:
            rows.append(without_units(name, goal))
            continue
        ours = bench.calibrate(dtype)["wall"] + bench.mask_and_apply(dtype, "wanda")["wall"]
        note = (
            f"calibrate, mask and apply; peak {bench.calibrate(dtype)['peak_gb']:.1f} against {plain['peak_gb']:.1f} GB"
            f"; {as_timed(plain)}"
        )
        rows.append(reach(name, ours, base, base / ours, goal, note))
    return rows


def further_rows(bench: Bench) -> list[Row]:
    plain = bench.plain("wanda")["wall"]
    bench.part("dvc repro apply", lambda: bench.repro("apply"))
    changes: dict[str, dict[str, Any]] = {
        "70 %": {"sparsity": 0.7},
        "2:4": {"sparsity": 0.5, "pattern": "2:4"},
        "magnitude": {"sparsity": 0.5, "pattern": "unstructured", "method": "magnitude"},
    }

    def measure() -> Part:
        found = {}
        shutil.rmtree(bench.dvc_project / ".dvc/cache/runs", ignore_errors=True)  # what an interrupted run has answered
        for name, change in changes.items():
            bench.settings(bench.dvc_project, change)
            done = bench.repro("apply")
            if done["ran"] != 2:
                raise RuntimeError(f"{name}: dvc ran {done['ran']} commands, expected mask and apply")
            found[name] = {"wall": done["wall"], "inside": done["inside"]}
        bench.settings(bench.dvc_project, {"sparsity": 0.5, "pattern": "unstructured", "method": "wanda"})
        bench.repro("apply")  # back to where the other rows expect it
        return found

    found = bench.part("further", measure)
    rows = []
    for name, key, goal in (
        ("every further sparsity inside mask + apply, against (a)", "inside", "≥ 50"),
        ("every further sparsity as `dvc repro`, against (a)", "wall", "≥ 15"),
    ):
        slowest = max(done[key] for done in found.values())
        each = ", ".join(f"{what} {done[key]:.2f} s" for what, done in found.items())
        rows.append(reach(name, slowest, plain, plain / slowest, goal, f"the slowest of {each}"))
    return rows


def mask_rows(bench: Bench) -> list[Row]:
    bench.calibrate("float32")
    done = bench.part("masks", lambda: bench.script("inside", "masks", bench.project()))
    stage = bench.mask_and_apply("float32", "wanda")["mask"]
    name = f"mask, all {done['linears']} linears"
    return [
        Row(name, stage, None, stage, "< 1 s", stage < 1, "inside the stage, best of three"),
        reach(
            f"{name}, against full sorts",
            done["chosen"],
            done["sorted"],
            done["sorted"] / done["chosen"],
            "≥ 4",
            "best of three",
        ),
    ]


def perplexity_rows(bench: Bench) -> list[Row]:
    done = bench.perplexity("float32")
    floor = pass_floor(done["floor"], bench.windows, bench.length, head=True)
    name = f"perplexity {bench.windows} × {bench.length} float32, share of the floor"
    return [reach(name, done["seconds"], floor, floor / done["seconds"], "≥ 0.8", "inside")]


def zero_shot_rows(bench: Bench) -> list[Row]:
    rows = []
    for dtype in ("float32", "bfloat16"):
        names = [f"zero-shot {dtype}, {what}" for what in ("against (b)", "share of the floor", "other answers")]
        if dtype == "bfloat16" and not bench.bf16:
            rows += [without_units(name, goal) for name, goal in zip(names, ("≥ 1.8", "≥ 0.75", "0"), strict=True)]
            continue
        ours, stock = bench.zero_shot(dtype), bench.stock(dtype)
        items = sum(len(found) for found in ours["loglikelihoods"].values())
        note = f"inside; {items} items in {len(bench.tasks)} tasks, stock at batch {stock['batch']}"
        walls = f"; whole processes {ours['wall']:.0f} s and {stock['wall']:.0f} s"
        base = then(stock, ours, "seconds")
        walls += f"; {as_timed(stock, 'seconds')}"
        rows.append(reach(names[0], ours["seconds"], base, base / ours["seconds"], "≥ 1.8", note + walls))
        floor, tokens = needed_floor(ours["floor"], stock)
        note = f"inside; {tokens} tokens are needed"
        rows.append(reach(names[1], ours["seconds"], floor, floor / ours["seconds"], "≥ 0.75", note))
        tolerance = (
            TOLERANCE if dtype == "float32" else furthest_apart(of_stock(stock), of_stock(bench.stock("float32")))
        )
        others, close, furthest = other_answers(ours, stock, tolerance)
        note = f"{others} of {items}; {close} more within {tolerance:.3g}; log-likelihoods differ by ≤ {furthest:.2g}"
        rows.append(Row(names[2], None, None, others, "0", others == 0, note))
    return rows


def study_rows(bench: Bench) -> list[Row]:
    """3 Wanda and 3 magnitude prunes, 7 evaluations, of the processes measured above."""
    prunes = 3 * then(bench.plain("wanda"), bench.calibrate("float32")) + 3 * bench.plain("magnitude")["wall"]
    losses = then(bench.plain("perplexity"), bench.perplexity("float32"))
    base = prunes + 7 * (losses + then(bench.stock("float32"), bench.zero_shot("float32")))
    rows = []
    for dtype, goal in (("float32", "≥ 1.8"), ("bfloat16", "≥ 4")):
        name = f"the whole study in {dtype}, against (a) + (b) in float32"
        if dtype == "bfloat16" and not bench.bf16:
            rows.append(without_units(name, goal))
            continue
        ours = bench.calibrate(dtype)["wall"]
        ours += 3 * sum(bench.mask_and_apply(dtype, method)["wall"] for method in ("wanda", "magnitude"))
        ours += 7 * (bench.perplexity(dtype)["wall"] + bench.zero_shot(dtype)["wall"])
        rows.append(reach(name, ours, base, base / ours, goal, "composed: 6 prunes, 7 evaluations, whole processes"))
    return rows


def dvc_rows(bench: Bench) -> list[Row]:
    full = bench.full_repro()
    again = bench.part("dvc repro, nothing to do", lambda: {"walls": [repro_again(bench) for _ in range(3)]})
    nothing = round(min(again["walls"]), 2)
    overhead = full["wall"] / full["commands"] - 1
    inside = full["wall"] / full["inside"] - 1
    note = f"{full['ran']} commands, model fetched; over the time inside the stages, processes included: {inside:.1%}"
    return [
        Row("dvc repro with nothing to do", nothing, None, nothing, "< 3 s", nothing < 3, "best of three"),
        reach("overhead of DVC on a full run", full["wall"], full["commands"], overhead, "< 0.05", note),
    ]


def repro_again(bench: Bench) -> float:
    done = bench.repro()
    if done["ran"]:
        raise RuntimeError(f"dvc repro ran {done['ran']} commands again, expected none")
    return done["wall"]


def memory_rows(bench: Bench) -> list[Row]:
    """On a random checkpoint of Qwen2.5-1.5B's shape, in bfloat16 as it is stored."""
    folder = bench.work / "memory"
    if not (folder / "ready").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        smaller = ["--config", json.dumps(TINY | {"hidden_size": 256, "intermediate_size": 1024}), "--shard", "1e6"]
        made = bench.work / "random"
        say("making a random checkpoint")
        bench.run(sys.executable, HERE / "memory.py", "make", made, *(smaller if bench.words.quick else []))
        shutil.copyfile(ROOT / "dvc.yaml", folder / "dvc.yaml")
        changes = {"model": str(made), "dtype": "bfloat16", "calibration.samples": 2, "perplexity.windows": 2}
        bench.settings(folder, changes)
        for part in ("model", "calibration", "perplexity"):
            bench.run("wanda-dvc", "download", part, cwd=folder)
        shutil.rmtree(made)
        (folder / "ready").touch()
    checkpoint = sum(path.stat().st_size for path in (folder / "models/dense").glob("*.safetensors"))
    rows = []
    for words in (["calibrate"], ["mask"], ["apply"], ["perplexity", "dense"]):
        name = f"memory {words[0]}"
        done = bench.part(name, partial(bench.script, "memory", "measure", folder, *words))
        peak, bound, share = done["peak"], done["bound"], done["peak"] / checkpoint
        note = (
            f"not seconds: peak {peak / 1e6:.0f} MB above the imports' {done['imports'] / 1e6:.0f}, formula "
            f"{bound / 1e6:.0f} MB, checkpoint {checkpoint / 1e6:.0f} MB"
        )
        met = peak <= bound and share < 0.35
        rows.append(Row(f"{name}, share of the checkpoint", None, None, round(share, 4), "< 0.35", met, note))
    done = bench.parts["memory calibrate"]
    share = done["waited"] / done["seconds"]
    note = "2 windows of 512 tokens, warm page cache"
    rows.append(reach("wait for weights, share of calibrate", done["waited"], done["seconds"], share, "< 0.05", note))
    return rows


ROWS: dict[str, Callable[[Bench], list[Row]]] = {
    "calibrate": calibrate_rows,
    "statistics": statistics_rows,
    "prune": prune_rows,
    "dvc": dvc_rows,
    "further": further_rows,
    "mask": mask_rows,
    "perplexity": perplexity_rows,
    "zero-shot": zero_shot_rows,
    "study": study_rows,
    "memory": memory_rows,
}


# --- floors and comparisons ---


def then(base: Part, ours: Part, key: str = "wall") -> float:
    """A baseline's seconds at the speed that the machine had while ours was measured."""
    return float(base[key] * ours["floor"]["linears"] / base["floor"]["linears"])


def as_timed(base: Part, key: str = "wall") -> str:
    """A baseline's seconds as they were, and the speed that the machine had then."""
    return f"the baseline took {base[key]:.0f} s at {base['floor']['gflops_linears']:.0f} GFLOP/s"


def pass_floor(floor: Part, windows: int, length: int, *, head: bool = False) -> float:
    """Seconds of the linears and the causal half of attention; each window apart."""
    tokens = windows * length
    pairs = windows * length**2 / 2
    each = floor["linears"] + (floor["head"] if head else 0)
    return tokens * each + pairs * floor["attention_flops_a_pair"] * floor["attention"]


def needed_floor(floor: Part, stock: Part) -> tuple[float, int]:
    """Seconds, and tokens, of each question's context once and its choices after it; the head where it is read.

    The last token of a choice is never fed, and the choices' first ones share the context's last position.
    """
    tokens = positions = pairs = 0
    for task in stock["tasks"].values():
        for question in task["needed"]:
            for context, choices in question:
                after = [choice - 1 for choice in choices]
                tokens += context + sum(after)
                positions += 1 + sum(after)
                pairs += context**2 / 2 + sum(fed * context + fed**2 / 2 for fed in after)
    attention = pairs * floor["attention_flops_a_pair"] * floor["attention"]
    return tokens * floor["linears"] + positions * floor["head"] + attention, tokens


def other_answers(ours: Part, stock: Part, tolerance: float) -> tuple[int, int, float]:
    """Items answered otherwise though stock's two best differ by more than the tolerance; otherwise for any other
    reason; and the largest difference of a log-likelihood."""
    far = close = 0
    for task, answers in ours["loglikelihoods"].items():
        for mine, theirs in zip(answers, of_stock(stock)[task], strict=True):
            if np.argmax(mine) != np.argmax(theirs):
                second, best = sorted(theirs)[-2:]
                far, close = (far + 1, close) if best - second > tolerance else (far, close + 1)
    return far, close, furthest_apart(ours["loglikelihoods"], of_stock(stock))


def of_stock(stock: Part) -> Part:
    """Its log-likelihoods by task, as ours are."""
    return {task: found["loglikelihoods"] for task, found in stock["tasks"].items()}


def furthest_apart(one: Part, other: Part) -> float:
    """The largest difference of a log-likelihood, by task, item and choice."""
    return max(
        abs(a - b)
        for task, answers in one.items()
        for mine, theirs in zip(answers, other[task], strict=True)
        for a, b in zip(mine, theirs, strict=True)
    )


def without_units(name: str, goal: str) -> Row:
    return Row(name, None, None, None, goal, None, "not measured: this CPU has no bf16 units")


# --- the result ---


def has_bf16_units() -> bool:
    import torch

    from wanda_dvc.engine.attention import has_units

    return has_units(torch.bfloat16)


def machine(bench: Bench) -> Part:
    from importlib.metadata import version

    from wanda_dvc.stages.running import processor

    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "bf16_units": has_bf16_units(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "lm-eval", "dvc")},
        "model": bench.words.model.name if bench.words.model else "as params.yaml has it",
        "text": "WikiText-2" if bench.words.mirror else "embedded",
        "tasks": f"benchmarks, {bench.limit} items a task" if bench.words.mirror else "samples, 48 items a task",
        "quick": bench.words.quick,
    }


def table(rows: list[Row], *, notes: bool = True) -> str:
    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"

    def ratio(row: Row) -> str:
        if row.ratio is None:
            return "–"
        share = row.goal.split()[-1].startswith("0.")
        return f"{100 * row.ratio:.1f} %" if share else f"{row.ratio:.2f}" + (" s" if row.goal.endswith(" s") else "")

    def goal(row: Row) -> str:
        sign, _, bound = row.goal.partition(" ")
        return f"{sign} {100 * float(bound):g} %" if bound.startswith("0.") else row.goal

    met = {True: "yes", False: "**no**", None: "–"}
    headers = ["what", "ours, s", "baseline or floor, s", "ratio", "goal", "met", "how"]
    lines = [
        [row.name, number(row.ours_s), number(row.baseline_s), ratio(row), goal(row), met[row.met], row.note]
        for row in rows
    ]
    columns = len(headers) - (not notes)
    return tabulate([line[:columns] for line in lines], headers[:columns], tablefmt="github", disable_numparse=True)


def describe(about: Part) -> str:
    return ", ".join(f"{name.replace('_', ' ')}: {value}" for name, value in about.items()) + "."


def write_readme(about: Part, rows: list[Row]) -> None:
    """The block of the README between its two marks."""
    path = ROOT / "README.md"
    before, begin, rest = path.read_text(encoding="utf-8").partition("<!-- benchmarks -->\n")
    _, end, after = rest.partition("<!-- /benchmarks -->\n")
    if begin and end:
        block = f"{describe(about)}\n\n{table(rows, notes=False)}\n"
        path.write_text(before + begin + block + end + after, encoding="utf-8")


def write(bench: Bench, rows: list[Row], failed: dict[str, str]) -> None:
    """results.json and results.md, with the rows of an earlier run on the same machine that this one has not."""
    target = HERE / ("results-quick" if bench.words.quick else "results")
    about = machine(bench)
    kept: list[Row] = []
    with_suffix = target.with_suffix(".json")
    if with_suffix.is_file():
        last = json.loads(with_suffix.read_text(encoding="utf-8"))
        if last["machine"] == about:
            new = {row.name for row in rows}
            kept = [Row(**row) for row in last["rows"] if row["name"] not in new]
    together = [*kept, *rows]
    content = {"machine": about, "rows": [asdict(row) for row in together]}
    with_suffix.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    missed = sum(row.met is False for row in together)
    lines = [
        "# Benchmarks",
        "",
        "Made by `make bench`; what the words mean is in `benchmarks/bench.py`. (a) is a plain implementation of the "
        "published procedure (`plain.py`), (b) stock lm-eval (`stock.py`), the floor the machine's own matrix "
        "multiplication (`floor.py`).",
        "",
        describe(about),
        "",
        table(together),
        "",
        f"{sum(row.met is True for row in together)} goals met, {missed} missed, "
        f"{sum(row.met is None for row in together)} that this machine can't tell.",
    ]
    lines += [f"Failed: {name}: {why}" for name, why in failed.items()]
    target.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if not bench.words.quick:
        write_readme(about, together)


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help=f"of {', '.join(ROWS)}; by default all")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--resume", action="store_true")
    mirror = os.environ.get("WANDA_DVC_MIRROR")
    parser.add_argument("--mirror", type=Path, default=Path(mirror) if mirror else None)
    parser.add_argument("--model", type=Path, help="a directory of safetensors instead of params.yaml's model")
    parser.add_argument("--work", type=Path, default=HERE / ".work")
    words = parser.parse_args()
    if unknown := set(words.rows) - set(ROWS):
        parser.error(f"got {', '.join(sorted(unknown))}, expected {', '.join(ROWS)}")
    bench = Bench(words)
    rows: list[Row] = []
    failed: dict[str, str] = {}
    began = time.perf_counter()
    for name in [name for name in ROWS if name in words.rows or not words.rows]:
        try:
            made = ROWS[name](bench)
        except RuntimeError as error:  # one row that can't be measured does not cost the others
            failed[name] = str(error)
            say(f"{name}: failed: {error}")
            continue
        rows += made
        for row in made:
            say(f"{row.name}: ratio {row.ratio}, goal {row.goal}, {row.met}")
        write(bench, rows, failed)
    write(bench, rows, failed)
    say(f"done in {(time.perf_counter() - began) / 60:.1f} min; benchmarks/results{'-quick' * words.quick}.md")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
