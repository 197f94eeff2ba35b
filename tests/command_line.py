"""The command line: in this process, its entry point with its words, folder and environment, or in one of its own."""

import contextlib
import gc
import io
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import NoReturn
from unittest import mock

import torch
from conftest import ROOT

from wanda_dvc.cli import run

SLOW_TO_IMPORT = {
    "accelerate", "datasets", "dvc", "lm_eval", "matplotlib", "numpy", "pandas", "pyarrow", "scipy", "torch",
    "transformers",
}  # fmt: skip


def leave(code: int) -> NoReturn:
    raise SystemExit(code)


def wanda_dvc(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a command as it is typed; its exit code, and what it prints."""
    out, err = io.StringIO(), io.StringIO()
    threads, threshold = torch.get_num_threads(), gc.get_threshold()
    code: object = 0
    with (
        mock.patch.dict(os.environ),
        mock.patch.object(sys, "argv", ["wanda-dvc", *words]),
        mock.patch.object(os, "_exit", leave),
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            run()
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
            code = 1
    torch.set_num_threads(threads)
    gc.set_threshold(*threshold)
    number = code if isinstance(code, int) else int(code is not None)
    return subprocess.CompletedProcess(words, number, out.getvalue(), err.getvalue())


def process(*words: str, cwd: Path = ROOT, first: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own, in which other code runs first."""
    code = f"{first}; import sys; from wanda_dvc.cli import run; sys.argv[0] = 'wanda-dvc'; run()".removeprefix("; ")
    return subprocess.run([sys.executable, "-c", code, *words], cwd=cwd, capture_output=True, text=True, check=False)
