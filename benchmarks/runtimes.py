"""Run the page on deployment with SmolLM2-135M, from pruning to text in llama.cpp: benchmarks/runtimes.json.

    python benchmarks/runtimes.py --mirror DIR --convert python CLONE/convert_hf_to_gguf.py     two hours of a core

llama-imatrix, -quantize, -perplexity, -bench and -completion are on the PATH. Divergence is from the dense f16 file,
in the second halves of four windows. Files that exist are kept, so that a second run, on an idle machine, measures
alone.
Speeds are medians of nine rounds: in each, every file runs once, because the speed of a machine changes.
"""

import json
import re
import subprocess
from argparse import Namespace
from itertools import product
from pathlib import Path
from statistics import median

from origin import HERE, Row, arguments, change_settings, origin, process, protocol, write_row

PROTOCOL = (
    "calibration 32 × 2048 of wikitext2 validation; llama-imatrix on 128 × 512 of it; divergence 4 × 512 of wikitext2 "
    "test; 512 + 128 tokens"
)
SETTINGS: Row = protocol(32, 1, 2048, "wikitext2") | {"recipe": "fisher", "recovery": {"tokens": 0}}
MODELS: dict[str, Row] = {
    "dense": {"recipe": "wanda", "pattern": "unstructured", "sparsity": 0.0},
    "neurons 20%": {"pattern": "neurons", "sparsity": 0.2},
    "neurons 20% 200k": {"pattern": "neurons", "sparsity": 0.2, "recovery": {"tokens": 200_000}},
    "heads 33%": {"pattern": "heads", "sparsity": 0.3333},
    "blocks 10%": {"pattern": "blocks", "sparsity": 0.1},
}
TARGET = HERE / "runtimes.json"
ROUNDS = 9
FORMATS = ("f16", "Q8_0", "Q6_K", "Q4_K_M", "Q3_K_M", "Q2_K")
WANTED = (*product([*MODELS][:3], FORMATS), *product([*MODELS][3:], FORMATS[:1]))


def tool(*words: str | Path) -> str:
    """Run a tool of llama.cpp; return its output, without its log."""
    return subprocess.run([*map(str, words)], capture_output=True, text=True, errors="replace", check=True).stdout


def export(model: str, file: Path, matrix: Path, at: Namespace) -> None:
    """Prune a model; write it, its f16 file and its importance matrix."""
    study, out = at.work / "study", at.work / model
    if not study.is_dir():
        process("wanda-dvc", "init", study, cwd=HERE)
    change_settings(study / "params.yaml", SETTINGS | {"runtime": {"mirror": str(at.mirror)}} | MODELS[model])
    process("dvc", "repro", "recover", "download-perplexity", cwd=study)
    process("wanda-dvc", "export", out, cwd=study)
    process(*at.convert, out, "--outtype", "f16", "--outfile", file, cwd=HERE)
    text = study / "data/calibration/text.txt"
    tool("llama-imatrix", "-m", file, "-f", text, "-o", matrix, "-c", "512", "--chunks", "128", "-t", "1")


def measure(file: Path, at: Namespace) -> Row:
    """Return a file's size, its divergence from the base, and what it writes."""
    test, base = at.work / "study/data/perplexity/wikitext2/text.txt", at.work / "base"
    windows = ("-f", test, "-c", "512", "-b", "512", "--chunks", "4", "-t", "1", "--kl-divergence-base", base)
    if not base.is_file():
        tool("llama-perplexity", "-m", at.work / "dense f16.gguf", *windows)
    found = tool("llama-perplexity", "-m", file, *windows, "--kl-divergence")
    mean, error = re.findall(r"Mean +KLD: +(\S+) ± +(\S+)", found)[0]
    prompt = ("-p", "The capital of France is", "-n", "24", "--temp", "0", "-no-cnv", "-t", "1")
    value: Row = {"bytes": file.stat().st_size, "divergence": {"mean": float(mean), "error": float(error)}}
    return value | {"text": tool("llama-completion", "-m", file, *prompt).strip()}


def speed(file: Path) -> list[float]:
    """Return the tokens a second of a prompt, and written, in one run."""
    runs = json.loads(tool("llama-bench", "-m", file, "-p", "512", "-n", "128", "-r", "1", "-o", "json"))
    return [run["avg_ts"] for run in runs]


def main() -> None:
    """Run the command line."""
    parser = arguments(__doc__, "runtimes")
    parser.add_argument("--convert", nargs="+", required=True)
    at = parser.parse_args()
    at.work, at.mirror = at.work.resolve(), at.mirror.resolve()
    made = origin(PROTOCOL, ("calibrate", "mask", "apply", "recover"), ("torch", "transformers", "gguf"))
    rows: dict[Path, tuple[str, Row]] = {}
    for model, form in (row for row in WANTED if {*at.rows} <= {*row}):
        file, plain, matrix = (at.work / f"{model} {end}.gguf" for end in (form, "f16", "imatrix"))
        if not plain.is_file():
            export(model, plain, matrix, at)
        if not file.is_file():
            tool("llama-quantize", "--imatrix", matrix, plain, file, form)
        rows[file] = f"{model} {form}", measure(file, at)
    rounds = [list(map(speed, rows)) for _ in range(ROUNDS)]
    for (name, value), speeds in zip(rows.values(), zip(*rounds, strict=True), strict=True):
        prompt, written = map(median, zip(*speeds, strict=True))
        write_row(TARGET, name, value | {"tokens a second": {"prompt": prompt, "written": written}}, made)


if __name__ == "__main__":
    main()
