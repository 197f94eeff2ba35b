"""Measure inside a process: the share of the statistics in calibrate, and the masks against full sorts."""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from wanda_dvc.engine.checkpoint import Checkpoint
from wanda_dvc.engine.memory import keep_freed_memory
from wanda_dvc.engine.recorder import InputRecorder
from wanda_dvc.engine.rows import as_rows
from wanda_dvc.stages.inputs import calibration_windows, open_decoder
from wanda_dvc.stages.mask import keeps
from wanda_dvc.study.project import Project
from wanda_dvc.study.tensors import block_count, read_stats


@torch.no_grad()
def statistics(project: Project) -> dict[str, Any]:
    """Return the seconds of windows through three blocks, with the recorder and without, in turn."""
    decoder, windows = open_decoder(project, "dense"), calibration_windows(project)
    rows = as_rows(windows[:16])
    decoder.calls(rows[0])
    hidden = [decoder.embed(row) for row in rows]
    spent = {True: 0.0, False: 0.0}
    for index in sorted({0, len(decoder.blocks) // 2, len(decoder.blocks) - 1}):
        with decoder.block(index):
            decoder.run(index, hidden[0], rows[0])  # the first run is slower
            recorder = InputRecorder()
            for number, x in enumerate(hidden):
                for recorded in (number % 2 == 0, number % 2 == 1):
                    began = time.perf_counter()
                    if recorded:
                        with recorder.recording(decoder.linears(index)):
                            decoder.run(index, x, rows[number])
                            recorder.end_window()
                    else:
                        decoder.run(index, x, rows[number])
                    spent[recorded] += time.perf_counter() - began
    return {"with": spent[True], "without": spent[False]}


def masks(project: Project) -> dict[str, Any]:
    """Return the seconds to choose all masks as the stage does, and by full stable sorts of rows; the best of three."""
    keep_freed_memory()
    checkpoint, params = Checkpoint(project.model("dense")), project.params
    stats = [read_stats(project.stats, block) for block in range(block_count(project.stats, "calibrate"))]

    def chosen() -> float:
        began = time.perf_counter()
        for block in stats:
            keeps(project, checkpoint.weight, block, params.share)
        return time.perf_counter() - began

    def by_sorting() -> float:
        began = time.perf_counter()
        for block in stats:
            for source, names in block.readers.items():
                norm = block.inputs[source].norm
                for name in names:
                    score = checkpoint.weight(name).float().abs() * norm
                    order = torch.sort(score, dim=1, stable=True).indices
                    keep = torch.ones_like(score, dtype=torch.bool)
                    keep.scatter_(1, order[:, : int(score.shape[1] * params.sparsity)], False)
        return time.perf_counter() - began

    rounds = [(chosen(), by_sorting()) for _ in range(3)]
    linears = sum(len(names) for block in stats for names in block.readers.values())
    return {"chosen": min(ours for ours, _ in rounds), "sorted": min(sort for _, sort in rounds), "linears": linears}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["statistics", "masks"])
    parser.add_argument("project", type=Path)
    parser.add_argument("--result", type=Path, required=True)
    words = parser.parse_args()
    measured = {"statistics": statistics, "masks": masks}[words.what](Project(words.project))
    words.result.write_text(json.dumps(measured))


if __name__ == "__main__":
    main()
