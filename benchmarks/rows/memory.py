"""Rows of memory, on random checkpoints of the shapes of Qwen2.5-1.5B and LLaMA-2-7B in bfloat16."""

import json

import ours
from limits import forget, limited
from measures import Bench
from processes import ROOT, Part
from results import Measured

LIMIT = 3e9  # bytes, page cache included
LLAMA_7B = ROOT / "tests/configs/llama-2-7b.json"


def peak(bench: Bench, stage: tuple[str, ...]) -> Measured:
    """A stage's peak of anonymous memory against the checkpoint's size; it must stay within the formula too."""
    folder = bench.studies.on_a_random_checkpoint()
    checkpoint = sum(path.stat().st_size for path in (folder / "models/dense").glob("*.safetensors"))
    done = bench.part(f"memory {stage[0]}", lambda: bench.runner.script("memory", "measure", folder, *stage))
    note = (
        f"not seconds: peak {done['peak'] / 1e6:.0f} MB above the imports' {done['imports'] / 1e6:.0f}, formula "
        f"{done['bound'] / 1e6:.0f} MB, checkpoint {checkpoint / 1e6:.0f} MB"
    )
    return Measured(done["peak"] / checkpoint, note=note, holds=done["peak"] <= done["bound"])


def bounded(bench: Bench, stage: tuple[str, ...]) -> Measured:
    """A stage on LLaMA-2-7B's shape under a hard limit: it ends, and its anonymous memory is within the formula."""
    shape = json.loads(LLAMA_7B.read_text()) | {"dtype": "bfloat16"}
    folder = bench.studies.on_a_random_checkpoint(shape, name="7b")

    def measure() -> Part:
        for model in ("dense", "pruned"):
            forget(folder / "models" / model)
        with limited(int(LIMIT)) as words:
            done = bench.runner.run(*words, "wanda-dvc", *stage, cwd=folder)
        return done | {"seconds": ours.seconds_inside(folder, *stage), "bytes": ours.peak_inside(folder, *stage)}

    done = bench.part(f"7b {' '.join(stage)}", measure)
    note = f"{done['seconds']:.0f} s from a cold page cache; ended under a hard limit of 3 GB, page cache included"
    return Measured(done["bytes"] / LIMIT, done["seconds"], note=f"not seconds: {note}")


def warm(bench: Bench) -> Measured:
    """`mask` and `apply` without a limit, from a warm page cache; of each the best of two."""
    bounded(bench, ("calibrate",))
    folder = bench.studies.on_a_random_checkpoint(name="7b")

    def measure() -> Part:
        runs = [{stage: bench.stage(folder, stage)["seconds"] for stage in ("mask", "apply")} for _ in range(2)]
        return {stage: min(run[stage] for run in runs) for stage in ("mask", "apply")}

    done = bench.part("7b mask and apply", measure)
    note = f"{done['mask']:.0f} + {done['apply']:.0f} s, inside"
    return Measured(done["mask"] + done["apply"], done["mask"] + done["apply"], note=note)
