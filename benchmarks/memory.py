"""Measure the peak anonymous memory of stages on random checkpoints, against their formula: benchmarks/memory.json.

    python benchmarks/memory.py          Qwen2.5-1.5B's shape, ten minutes
    python benchmarks/memory.py --7b     LLaMA-2-7B's shape under a hard limit of 3 GB, page cache included; as root

`wanda` on two windows of the embedded text, bfloat16. A hard limit needs Linux, root and 27 GB of disk.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from checkpoints import CONFIGS, make_checkpoint
from origin import HERE, ROOT, change_settings, origin, process, write_row

LIMIT = 3e9  # bytes
PROTOCOL = "random weights in bfloat16, 2 windows of 512 tokens of the embedded text"
STAGES = (("calibrate", "norms"), ("mask", ""), ("apply", ""), ("perplexity", "dense"))
GROUPS = Path("/sys/fs/cgroup")  # of version 2, or of version 1, where those of memory have a folder
JOIN = ("sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"')  # it joins the group, then becomes the command


@contextlib.contextmanager
def limited(size: int) -> Iterator[list[str]]:
    """Yield the words that put a command under a limit of `size` bytes. OSError where this user may set none."""
    older = (GROUPS / "memory").is_dir()
    group = GROUPS / ("memory" if older else "") / f"wanda-dvc-{os.getpid()}"
    group.mkdir()
    try:
        (group / ("memory.limit_in_bytes" if older else "memory.max")).write_text(str(size))
        yield [*JOIN, str(group)]
    finally:
        group.rmdir()


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache, so that the next reader is charged for them."""
    os.sync()
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def anonymous() -> int:
    """Return this process's memory without mapped files, whose pages the system may reclaim, in bytes."""
    return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0]) * 1024


@contextlib.contextmanager
def sampled() -> Iterator[list[int]]:
    """Sample the anonymous memory 300 times a second, by a thread, first before what follows."""
    samples, done = [anonymous()], threading.Event()

    def sample() -> None:
        while not done.wait(1 / 300):
            samples.append(anonymous())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()
        samples.append(anonymous())


def measure(root: Path, stage: str, part: str) -> dict[str, float]:
    """Run one stage in this process; return its peak above the imports' memory, and the formula's bound."""
    import torch
    from estimates import requirements

    from wanda_dvc.engine.memory import ModelSizes
    from wanda_dvc.machine import cores
    from wanda_dvc.stages import run
    from wanda_dvc.stages.needs import Conditions
    from wanda_dvc.study.folder import Study

    study = Study(root)
    torch.set_num_threads(cores())
    __import__(f"wanda_dvc.stages.{stage}")  # so that the sampler counts what the run holds
    sizes = ModelSizes.read(study.model("dense"))  # this imports the family's code, as it does before a stage
    need, needs, mapped = requirements(study, stage, sizes), Conditions(study, sizes), 0
    if stage in ("calibrate", "perplexity") and needs.dtype == sizes.dtype:
        mapped = needs.forward(1).weights  # views of the checkpoint's file, which are no anonymous memory
    with sampled() as samples:
        run(stage, study=study, variant=part)
    return {"peak": max(samples) - samples[0], "imports": samples[0], "bound": need.memory - mapped}


def main() -> None:
    """Run the command line; `--run` measures in this process."""
    if sys.argv[1:2] == ["--run"]:
        place, stage, part, target = sys.argv[2:]
        Path(target).write_text(json.dumps(measure(Path(place), stage, part)))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--7b", action="store_true", dest="large")
    large = parser.parse_args().large
    with tempfile.TemporaryDirectory(dir=ROOT.parent) as folder:  # git does not see it; a tmpfs would be memory
        root, model, out = Path(folder, "study"), Path(folder, "model"), Path(folder, "found.json")
        shape = json.loads((CONFIGS / f"{'llama-2-7b' if large else 'qwen2.5-1.5b'}.json").read_text())
        make_checkpoint(model, shape | {"dtype": "bfloat16"})
        process("wanda-dvc", "init", root, "--model", model, cwd=HERE)
        windows = {"calibration": {"windows": 2}, "perplexity": {"windows": 2}, "dtype": "bfloat16"}
        change_settings(root / "params.yaml", windows | {"recipe": "wanda"})
        for words in (["plan"], *(["download", part] for part in ("model", "calibration", "perplexity"))):
            process("wanda-dvc", *words, cwd=root)
        size = sum(path.stat().st_size for path in (root / "models/dense").glob("*.safetensors"))
        for stage, part in STAGES:
            forget(root)
            with contextlib.ExitStack() as stack:
                words = stack.enter_context(limited(int(LIMIT))) if large else []
                process(*words, sys.executable, __file__, "--run", root, stage, part, out, cwd=HERE)
            found = json.loads(out.read_text())
            what, share, goal = f"Qwen2.5-1.5B's shape (3.1 GB): `{stage}`", found["peak"] / size, 0.35
            if large:
                what = f"LLaMA-2-7B's shape (13.5 GB), limit 3 GB: `{stage}`"
                share, goal = (found["peak"] + found["imports"]) / LIMIT, 1
            value = {"share": share, "goal": f"< {goal}", "met": share < goal}
            write_row(HERE / "memory.json", what, value | found, origin(PROTOCOL))
            print(stage, found, flush=True)


if __name__ == "__main__":
    main()
