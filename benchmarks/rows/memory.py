"""Rows of memory, on a random checkpoint of Qwen2.5-1.5B's shape in bfloat16."""

from measures import Bench
from processes import Part
from results import Measured


def _measured(bench: Bench, *stage: str) -> Part:
    folder = bench.studies.on_a_random_checkpoint()
    return bench.part(f"memory {stage[0]}", lambda: bench.runner.script("memory", "measure", folder, *stage))


def peak(bench: Bench, stage: tuple[str, ...]) -> Measured:
    """A stage's peak of anonymous memory against the checkpoint's size; it must stay within the formula too."""
    folder = bench.studies.on_a_random_checkpoint()
    checkpoint = sum(path.stat().st_size for path in (folder / "models/dense").glob("*.safetensors"))
    done = _measured(bench, *stage)
    note = (
        f"not seconds: peak {done['peak'] / 1e6:.0f} MB above the imports' {done['imports'] / 1e6:.0f}, formula "
        f"{done['bound'] / 1e6:.0f} MB, checkpoint {checkpoint / 1e6:.0f} MB"
    )
    return Measured(done["peak"] / checkpoint, note=note, holds=done["peak"] <= done["bound"])


def wait_for_weights(bench: Bench) -> Measured:
    """The time that `calibrate` waits for a block's weights."""
    done = _measured(bench, "calibrate")
    note = "2 windows of 512 tokens, warm page cache"
    return Measured(done["waited"] / done["seconds"], done["waited"], done["seconds"], note)
