"""What the harness reads of wanda_dvc from within Python. It starts everything else as a process.

`memory.py` and `stock.py` import wanda_dvc too; each runs in its own process.
"""

from pathlib import Path
from typing import Any

from wanda_dvc.machine import processor
from wanda_dvc.stages import times
from wanda_dvc.study.project import Project

__all__ = ["has_bf16_units", "multiply", "peak_inside", "processor", "seconds_inside", "windows"]


def seconds_inside(folder: Path, *words: str) -> float:
    """Return the seconds of a project's last runs of a stage, by the stage's own clock: without processes' starts.

    Raises:
        RuntimeError: the project holds no result of that stage.
    """
    return sum(float(run["seconds"]) for run in _last(folder, *words))


def peak_inside(folder: Path, *words: str) -> float:
    """Return the bytes of anonymous memory that the last runs of a stage held at most, imports included."""
    return max(float(run["peak_anonymous_gb"]) for run in _last(folder, *words)) * 1e9


def _last(folder: Path, *words: str) -> list[dict[str, Any]]:
    """Return the last run of each part and text of a stage, or of those named."""
    project, run = Project(folder), "-".join(words[:2]) + "".join(f"@{text}" for text in words[2:])
    known = times(project)
    found = [time for name, time in known.items() if name == run or name.startswith((f"{run}-", f"{run}@"))]
    if not found:
        raise RuntimeError(f"{folder}: no time of {run}, expected one of {', '.join(known) or 'none'}")
    return found


def windows(folder: Path, part: str) -> Any:
    """Return the windows [windows, length] that a project draws from the text of `calibration` or `perplexity`."""
    import torch

    from wanda_dvc.engine.windows import cut, load_tokenizer, tokenize
    from wanda_dvc.stages.inputs import calibration_windows

    project = Project(folder)
    if part == "calibration":
        return calibration_windows(project).numpy()
    wanted = project.params.perplexity
    tokens = tokenize(project.text(f"{part}/{next(iter(wanted.texts))}"), load_tokenizer(project.model("dense")))
    asked = wanted.windows if isinstance(wanted.windows, int) else None
    return torch.stack(cut(tokens, length=wanted.length, windows=asked)).numpy()


def multiply(a: Any, b: Any) -> Any:
    """Return a · b as fast as this machine does it."""
    from wanda_dvc.pruning.products import multiply

    return multiply(a, b)


def has_bf16_units() -> bool:
    """Whether this CPU multiplies matrices in bfloat16 natively."""
    import torch

    from wanda_dvc.engine.attention import has_units

    return has_units(torch.bfloat16)
