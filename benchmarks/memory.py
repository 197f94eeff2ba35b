"""Measure the peak anonymous memory of the stages on a random checkpoint, against the formula of stages/needs.py.

python benchmarks/memory.py make FOLDER             write a checkpoint of Qwen2.5-1.5B's shape, shard by shard
python benchmarks/memory.py measure PROJECT STAGE   run one stage in this process and sample its memory
"""

import argparse
import json
from pathlib import Path

from checkpoints import QWEN, make_checkpoint

from wanda_dvc.machine import cores
from wanda_dvc.stages import STAGES, run
from wanda_dvc.stages.needs import need
from wanda_dvc.stages.running import sampled_memory
from wanda_dvc.study.project import Project


def measure(root: Path, stage: str, part: str) -> dict[str, float]:
    """Run one stage; return its peak above the imports' memory, and the formula's bound."""
    import torch

    project = Project(root)
    torch.set_num_threads(cores())
    _ = STAGES[stage].function  # imported, so that the sampler counts what the run holds
    wanted = need(project, stage, part)  # this imports the family's code, as it does before a stage
    with sampled_memory(samples_a_second=300) as samples:
        run(stage, project=project, part=part)
    return {
        "peak": max(samples) - samples[0],
        "imports": samples[0],
        "bound": wanted.memory - wanted.mapped,
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("make")
    make.add_argument("folder", type=Path)
    make.add_argument("--config", type=json.loads, default={}, help="JSON: what differs from Qwen2.5-1.5B")
    make.add_argument("--shard", type=float, default=1e9, help="bytes")
    look = commands.add_parser("measure")
    look.add_argument("project", type=Path)
    look.add_argument("stage", choices=["calibrate", "mask", "apply", "perplexity"])
    look.add_argument("part", nargs="?", default="")
    look.add_argument("--result", type=Path, required=True)
    words = parser.parse_args()
    if words.command == "make":
        make_checkpoint(words.folder, QWEN | words.config, shard=words.shard)
    else:
        words.result.write_text(json.dumps(measure(words.project, words.stage, words.part)))


if __name__ == "__main__":
    main()
