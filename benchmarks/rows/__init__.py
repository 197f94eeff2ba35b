"""The table of rows. A row is measured by its function and held to its goal; a new one is a function and a row here."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from measures import Bench
from results import Measured, Result, judge, without_units

from rows import dvc, evaluate, memory, prune, study


@dataclass(frozen=True)
class Row:
    """One row of the results."""

    name: str  # what `make bench ROWS=` calls it; several rows may share one
    what: str  # the first column; {bench} and {dtype} are filled in
    measure: Callable[..., Measured]  # of the run, and of `dtype` where the row has one
    goal: str  # of the ratio: `≥ 2`, `< 0.05`, `< 1 s`, or `0`
    dtype: str = ""  # bfloat16: not measured on a CPU without native bf16

    def result(self, bench: Bench) -> Result:
        """Measure the row and compare it with its goal."""
        if self.dtype == "bfloat16" and not bench.bf16:
            return without_units(self.title(bench), self.goal)
        found = self.measure(bench, self.dtype) if self.dtype else self.measure(bench)
        return judge(self.title(bench), self.goal, found)

    def title(self, bench: Bench) -> str:
        """Return the first column."""
        return self.what.format(bench=bench, dtype=self.dtype)


CALIBRATE = "calibrate {bench.sizes.samples} × {bench.sizes.length} {dtype}, share of the floor"
PERPLEXITY = "perplexity {bench.sizes.windows} × {bench.sizes.length} {dtype}, share of the floor"
FIRST = "first prune {dtype}, against (a) in float32"
STUDY = "the whole study in {dtype}, against (a) + (b) in float32"
MEMORY = "memory {}, share of the checkpoint"

ROWS = (
    Row("calibrate", CALIBRATE, prune.calibrate, "≥ 0.85", "float32"),
    Row("calibrate", CALIBRATE, prune.calibrate, "≥ 0.65", "bfloat16"),
    Row("prune", FIRST, prune.first_prune, "≥ 2", "float32"),
    Row("prune", FIRST, prune.first_prune, "≥ 2", "bfloat16"),
    Row("dvc", "dvc repro with nothing to do", dvc.nothing_to_do, "< 3 s"),
    Row(
        "further", "every further sparsity inside mask + apply, against (a)", partial(dvc.further, key="inside"), "≥ 50"
    ),
    Row("further", "every further sparsity as `dvc repro`, against (a)", partial(dvc.further, key="wall"), "≥ 15"),
    Row("mask", "mask, all linears", prune.mask, "< 1 s"),
    Row("perplexity", PERPLEXITY, evaluate.perplexity, "≥ 0.8", "float32"),
    *(
        Row("zero-shot", f"zero-shot {{dtype}}, {what}", measure, goal, dtype)
        for dtype, share in (("float32", "≥ 0.82"), ("bfloat16", "≥ 0.62"))
        for what, measure, goal in (
            ("against (b)", evaluate.zero_shot_against_stock, "≥ 1.8"),
            ("share of the floor", evaluate.zero_shot, share),
            ("other answers", evaluate.zero_shot_answers, "0"),
        )
    ),
    Row("study", STUDY, study.study, "≥ 1.9", "float32"),
    Row("study", STUDY, study.study, "≥ 3", "bfloat16"),
    Row("memory", MEMORY.format("calibrate"), partial(memory.peak, stage=("calibrate",)), "< 0.35"),
    Row("memory", MEMORY.format("mask"), partial(memory.peak, stage=("mask",)), "< 0.35"),
    Row("memory", MEMORY.format("apply"), partial(memory.peak, stage=("apply",)), "< 0.35"),
    Row("memory", MEMORY.format("perplexity"), partial(memory.peak, stage=("perplexity", "dense")), "< 0.35"),
)
# Measured where they are asked for, into results of their own: 10 minutes, 27 GB of disk, and root for the limit.
ASKED = (
    *(
        Row("7b", f"LLaMA-2-7B's shape under 3 GB, {' '.join(stage)}", partial(memory.bounded, stage=stage), "< 1")
        for stage in (("calibrate",), ("mask",), ("apply",), ("perplexity", "dense"))
    ),
    Row("7b", "LLaMA-2-7B's shape, mask + apply, warm", memory.warm, "< 45 s"),
)
NAMES = tuple(dict.fromkeys(row.name for row in (*ROWS, *ASKED)))
