"""What is measured, each thing once a run, and kept for a run that is resumed."""

import json
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import ours
from processes import Part, Runner, say
from studies import Sizes, Studies


class Bench:
    """One run: its projects, and what it has measured so far."""

    def __init__(self, studies: Studies) -> None:
        self.studies = studies
        self.state = studies.work / "state.json"
        self.parts: dict[str, Part] = json.loads(self.state.read_text()) if self.state.is_file() else {}
        self.bf16 = ours.has_bf16_units() or studies.quick  # a quick run tries every row

    @property
    def runner(self) -> Runner:
        """Runs the processes."""
        return self.studies.runner

    @property
    def sizes(self) -> Sizes:
        """How much is measured."""
        return self.studies.sizes

    def part(self, name: str, make: Callable[[], Part]) -> Part:
        """Return what was measured under a name; measure it where this run has not."""
        if name not in self.parts:
            began = time.perf_counter()
            self.parts[name] = make()
            self.state.write_text(json.dumps(self.parts))
            say(f"{name}: {time.perf_counter() - began:.1f} s")
        return self.parts[name]

    def with_floor(self, dtype: str, measure: Callable[[], Part]) -> Part:
        """Measure something, and the floor before and after it; `floor` is the mean."""
        import torch
        from floor import Floor

        floor = Floor(self.studies.model, getattr(torch, dtype), self.sizes.length, budget=0.1)
        floor.sample()
        made = measure()
        floor.sample()
        return made | {"floor": floor.mean()}

    def stage(self, project: Path, *words: str) -> Part:
        """Run a stage by its command; add the seconds inside the stage to what `run` returns."""
        done = self.runner.run("wanda-dvc", *words, cwd=project)
        return done | {"seconds": ours.seconds_inside(project, *words)}

    # --- ours ---

    def calibrate(self, dtype: str) -> Part:
        """Measure `calibrate`."""
        stage = partial(self.stage, self.studies.project(dtype), "calibrate")
        return self.part(f"calibrate {dtype}", lambda: self.with_floor(dtype, stage))

    def mask_and_apply(self, dtype: str, method: str) -> Part:
        """Measure `mask` and `apply`; of each the best of three."""
        self.calibrate(dtype)
        folder = self.studies.project(dtype)

        def measure() -> Part:
            self.studies.settings(folder, {"method": method})
            runs = [(self.stage(folder, "mask"), self.stage(folder, "apply")) for _ in range(3)]
            self.studies.settings(folder, {"method": "wanda"})
            mask, apply = (min(stages, key=lambda run: run["wall"]) for stages in zip(*runs, strict=True))
            return {"wall": mask["wall"] + apply["wall"], "mask": mask["seconds"], "apply": apply["seconds"]}

        return self.part(f"mask and apply {dtype} {method}", measure)

    def perplexity(self, dtype: str) -> Part:
        """Measure `perplexity dense`."""
        stage = partial(self.stage, self.studies.project(dtype), "perplexity", "dense")
        return self.part(f"perplexity {dtype} dense", lambda: self.with_floor(dtype, stage))

    def zero_shot(self, dtype: str) -> Part:
        """Measure `zero-shot dense` on every task, and keep its log-likelihoods."""
        folder = self.studies.project(dtype)

        def measure() -> Part:
            shutil.rmtree(folder / ".dvc/tmp/wanda-dvc-answers", ignore_errors=True)  # so that all tasks are asked
            done = self.stage(folder, "zero-shot", "dense")
            tasks = json.loads((folder / "metrics/details/dense/zero_shot.json").read_text())["tasks"]
            answers = {task: [item["loglikelihoods"] for item in found["items"]] for task, found in tasks.items()}
            return {"wall": done["wall"], "seconds": done["seconds"], "loglikelihoods": answers}

        return self.part(f"zero-shot {dtype}", lambda: self.with_floor(dtype, measure))

    def full_repro(self) -> Part:
        """Measure `dvc repro` from nothing."""

        def measure() -> Part:
            self.studies.forget_dvc()
            return self.studies.repro()

        return self.part("dvc repro", measure)

    # --- the baselines ---

    def plain(self, what: str) -> Part:
        """Measure (a) in float32: `wanda`, `magnitude`, or the authors' loop of `perplexity`."""
        tokens = self.studies.token_file("perplexity" if what == "perplexity" else "calibration")
        out = self.runner.work / "plain"
        words: list[str | Path] = [what, self.studies.model, "--windows", tokens, "--dtype", "float32", "--out", out]
        script = partial(self.runner.script, "plain", *words)
        # A magnitude prune has no matrix multiplication, so the floor says nothing about it.
        measure = script if what == "magnitude" else lambda: self.with_floor("float32", script)
        made = self.part(f"plain {what} float32", measure)
        shutil.rmtree(out, ignore_errors=True)
        return made

    def stock(self, dtype: str) -> Part:
        """Measure (b) at its best batch size; the search for that size is not counted."""
        data, sizes = self.studies.project() / "data/tasks", self.sizes
        words: list[str | Path] = [self.studies.model, *sizes.tasks, "--data", data, "--dtype", dtype]
        words += ["--batch", *map(str, sizes.batches), "--part", str(sizes.tried), "--limit", str(sizes.limit)]
        script = partial(self.runner.script, "stock", *words)
        made = self.part(f"stock lm-eval {dtype}", lambda: self.with_floor(dtype, script))
        return made | {"wall": made["wall"] - sum(made["tried"].values())}
