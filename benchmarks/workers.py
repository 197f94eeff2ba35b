"""Measure what Ray costs: its start, an interrupt, and the driver's memory for many windows.

python benchmarks/workers.py overhead   calibrate in one process and with one worker, and that the bytes are the same
python benchmarks/workers.py interrupt  the seconds from Ctrl-C until no process of the run is left
python benchmarks/workers.py windows    the driver's peak memory with a thousand windows and with ten thousand
"""

import argparse
import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from checkpoints import QWEN, make_checkpoint
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parent.parent
SMALL = {
    "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
    "num_key_value_heads": 4, "vocab_size": 2000, "dtype": "float32",
}  # fmt: skip
TINY = SMALL | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
COMMAND = [sys.executable, "-c", "from wanda_dvc.cli import run; run()"]


def study(root: Path, shape: dict[str, Any], *, samples: int, length: int, **runtime: Any) -> Path:
    """Make a study of a random model with its model and text fetched."""
    model = root.with_name("model")
    if not model.is_dir():
        make_checkpoint(model, QWEN | shape)
    root.mkdir()
    yaml = YAML()
    params = yaml.load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    params["model"] = str(model)
    params["calibration"] |= {"samples": samples, "length": length}
    params["runtime"] |= runtime
    yaml.dump(params, root / "params.yaml")
    for part in ("model", "calibration"):
        subprocess.run([*COMMAND, "download", part], cwd=root, check=True, capture_output=True)
    return root


def calibrate(root: Path) -> float:
    """Run the stage; return its seconds."""
    began = time.perf_counter()
    subprocess.run([*COMMAND, "calibrate"], cwd=root, check=True, capture_output=True)
    return time.perf_counter() - began


def overhead(folder: Path) -> dict[str, object]:
    """Calibrate with and without one worker."""
    alone = study(folder / "alone", SMALL, samples=96, length=512)
    local = study(folder / "local", SMALL, samples=96, length=512, ray="local")
    seconds = [calibrate(alone), calibrate(local)]
    made = [{str(x.relative_to(root)): x.read_bytes() for x in root.glob("stats/*/*")} for root in (alone, local)]
    return {"alone": seconds[0], "local": seconds[1], "same bytes": made[0] == made[1]}


def interrupt(folder: Path) -> dict[str, object]:
    """Stop a calibration at work."""
    root = study(folder / "local", SMALL, samples=96, length=512, ray="local")
    process = psutil.Popen([*COMMAND, "calibrate"], cwd=root, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not list(root.glob(".dvc/tmp/wanda-dvc/*/out/*")):
        time.sleep(0.1)
    children = process.children(recursive=True)
    process.send_signal(signal.SIGINT)
    began = time.perf_counter()
    code, ended = process.wait(), time.perf_counter() - began
    while any(map(_runs, children)) and time.perf_counter() - began < 120:
        time.sleep(0.1)
    all_ended, left = time.perf_counter() - began, sum(map(_runs, children))
    return {"code": code, "driver": ended, "processes": len(children), "all": all_ended, "left": left}


def _runs(process: psutil.Process) -> bool:
    """Whether a process is there and no zombie, which waits only for init."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def windows(folder: Path) -> dict[str, dict[str, float]]:
    """Calibrate with more and more windows."""
    found = {}
    for samples in (1000, 10_000):
        root = study(folder / str(samples), TINY, samples=samples, length=16, ray="local")
        calibrate(root)
        (kept,) = root.glob(".dvc/tmp/wanda-dvc-times/calibrate-*")
        told = json.loads(kept.read_text(encoding="utf-8"))
        found[str(samples)] = {name: told[name] for name in ("seconds", "peak_anonymous_gb", "workers")}
    return found


def main() -> None:
    """Run the command line."""
    rows: dict[str, Callable[[Path], object]] = {row.__name__: row for row in (overhead, interrupt, windows)}
    parser = argparse.ArgumentParser()
    parser.add_argument("row", choices=rows)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(rows[parser.parse_args().row](Path(folder)), indent=2))


if __name__ == "__main__":
    main()
