"""Run the page on deployment with SmolLM2-135M, from pruning to text in llama.cpp: benchmarks/runtimes.json.

    python benchmarks/runtimes.py --mirror DIR --llama-cpp CLONE     an hour of a slow core

CLONE has the converter, and in build/bin llama-quantize, -perplexity and -completion. Divergence is from the dense f16
file, in the second halves of four windows. Files that exist are kept.
"""

import re
import subprocess
import sys
from argparse import Namespace
from collections import Counter
from pathlib import Path

from gguf import GGUFReader
from origin import HERE, Row, arguments, origin, process, protocol, write_row

from wanda_dvc.study.scaffold import change_settings

PROTOCOL = "calibration 8 × 512 of wikitext2 validation; evaluation 4 × 512 of wikitext2 test"
MODELS: dict[str, Row] = {
    "dense": {"recipe": "wanda", "pattern": "unstructured", "sparsity": 0.0},
    "neurons 0.2": {"recipe": "wanda-refit", "pattern": "neurons", "sparsity": 0.2},
}
TARGET = HERE / "runtimes.json"
FORMATS = ("f16", "Q8_0", "Q4_K_M", "Q3_K_M")


def tool(*words: str | Path) -> str:
    """Run a tool of llama.cpp; return its output, without its log."""
    return subprocess.run([*map(str, words)], capture_output=True, text=True, errors="replace", check=True).stdout


def export(model: str, file: Path, matrix: Path, at: Namespace) -> None:
    """Prune a model; write it, its f16 file and its importance matrix."""
    study, out = at.work / "study", at.work / model
    if not study.is_dir():
        process("wanda-dvc", "init", study, cwd=HERE)
    settings = protocol(8, 1, 512, "wikitext2") | {"runtime": {"mirror": str(at.mirror)}} | MODELS[model]
    change_settings(study / "params.yaml", settings)
    process("dvc", "repro", "mask", "download-perplexity", cwd=study)
    process("wanda-dvc", "export", out, "--imatrix", matrix, cwd=study)
    convert = (sys.executable, at.llama_cpp / "convert_hf_to_gguf.py", out, "--outtype", "f16", "--outfile", file)
    process(*convert, cwd=HERE)


def measure(file: Path, at: Namespace) -> Row:
    """Return the size of a file and its tensors' formats, its divergence from the base, and what it writes."""
    test, base = at.work / "study/data/perplexity/wikitext2/text.txt", at.work / "base"
    windows = ("-f", test, "-c", "512", "-b", "512", "--chunks", "4", "-t", "1", "--kl-divergence-base", base)
    if not base.is_file():
        tool(at.llama_cpp / "build/bin/llama-perplexity", "-m", at.work / "dense f16.gguf", *windows)
    found = tool(at.llama_cpp / "build/bin/llama-perplexity", "-m", file, *windows, "--kl-divergence")
    mean, error = re.findall(r"Mean +KLD: +(\S+) ± +(\S+)", found)[0]
    prompt = ("-p", "The capital of France is", "-n", "24", "--temp", "0", "-no-cnv", "-t", "1")
    text = tool(at.llama_cpp / "build/bin/llama-completion", "-m", file, *prompt).strip()
    formats = Counter(tensor.tensor_type.name for tensor in GGUFReader(file).tensors)
    value = {"bytes": file.stat().st_size, "formats": formats, "text": text}
    return value | {"divergence": {"mean": float(mean), "error": float(error)}}


def main() -> None:
    """Run the command line."""
    parser = arguments(__doc__, "runtimes")
    parser.add_argument("--llama-cpp", type=Path, required=True)
    at = parser.parse_args()
    at.work, at.mirror, at.llama_cpp = (path.resolve() for path in (at.work, at.mirror, at.llama_cpp))
    made = origin(PROTOCOL, ("calibrate", "mask", "apply"), ("torch", "transformers", "gguf"))
    for model, form in ((model, form) for model in MODELS for form in FORMATS if {*at.rows} <= {model, form}):
        file, plain, matrix = (at.work / f"{model} {end}.gguf" for end in (form, "f16", "imatrix"))
        if not plain.is_file():
            export(model, plain, matrix, at)
        if not file.is_file():
            tool(at.llama_cpp / "build/bin/llama-quantize", "--imatrix", matrix, plain, file, form)
        write_row(TARGET, f"{model} {form}", measure(file, at), made)


if __name__ == "__main__":
    main()
