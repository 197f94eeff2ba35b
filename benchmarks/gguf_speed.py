"""Time GGUF files with llama.cpp, by turns, so that a change of the machine's speed affects all of them.

    pip install llama-cpp-python tabulate
    python convert_hf_to_gguf.py DIR --outtype f16 --outfile FILE     in llama.cpp, for the dense and the smaller model
    python benchmarks/gguf_speed.py DENSE.gguf SMALLER.gguf

One sequence: a prompt of 512 tokens, then 128 greedy tokens. Medians of five turns; the ratio is to the first file.
"""

import os
import sys
import time
from pathlib import Path
from statistics import median

from llama_cpp import Llama
from tabulate import tabulate

TURNS, PROMPT, TOKENS = 5, 512, 128


def rates(model: Llama) -> tuple[float, float]:
    """Return the prompt's tokens a second, and the written tokens a second."""
    model.reset()
    start = time.perf_counter()
    model.eval([1000 + place for place in range(PROMPT)])
    read = time.perf_counter()
    for _ in range(TOKENS):
        model.eval([model.sample(temp=0)])
    return PROMPT / (read - start), TOKENS / (time.perf_counter() - read)


def main() -> None:
    """Time the files named on the command line."""
    paths = [Path(name) for name in sys.argv[1:]]
    threads = len(os.sched_getaffinity(0))
    models = [
        Llama(str(path), n_ctx=PROMPT + TOKENS, n_threads=threads, n_threads_batch=threads, verbose=False)
        for path in paths
    ]
    turns = [[rates(model) for model in models] for _ in range(TURNS)]
    found = [[median(turn[at][part] for turn in turns) for part in (0, 1)] for at in range(len(models))]
    table = [
        [path.stem, path.stat().st_size / 1e6]
        + [text for part in (0, 1) for text in (f"{one[part]:.1f}", f"{one[part] / found[0][part]:.2f} ×")]
        for path, one in zip(paths, found, strict=True)
    ]
    headers = ["file", "MB", "prompt, tokens/s", "ratio", "written tokens/s", "ratio"]
    print(tabulate(table, headers, tablefmt="github", floatfmt=".0f"))


if __name__ == "__main__":
    main()
