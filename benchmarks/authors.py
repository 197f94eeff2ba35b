"""Prune SmolLM2-135M with the methods' authors' own code, on the windows of recipes.py: benchmarks/authors.json.

    python benchmarks/authors.py --mirror DIR --rows sparsegpt 50% --code CHECKOUT

CHECKOUT is a clone of the repository in METHODS, which is no part of this one. Its code runs unchanged, on a CPU and
with this transformers; `shims` has what both need. A row of 32 windows takes 4 to 6 minutes of two quiet cores. The
zeros of its weights are counted, and its perplexity is measured by plain transformers.
"""

import math
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from origin import HERE, Row, arguments, origin, write_row
from recipes import AMOUNTS, MODELS, PROTOCOL, TEXTS, Comparison
from torch import Tensor, nn

from wanda_dvc.catalog import parse_pattern
from wanda_dvc.stages.inputs import draw_calibration
from wanda_dvc.stages.perplexity import windows_of
from wanda_dvc.study.artifact import digest, files_digest
from wanda_dvc.study.folder import Study

# The repository of each method, its module, and the function that prunes.
METHODS = {
    "sparsegpt": ("IST-DASLab/sparsegpt", "llama", "llama_sequential"),
    "wanda": ("locuslab/wanda", "lib.prune", "prune_wanda"),
    "magnitude": ("locuslab/wanda", "lib.prune", "prune_magnitude"),
    "owl": ("luuyin/OWL", "lib.prune_all", "prune_wanda_outlier"),
    "ria": ("biomedical-cybernetics/Relative-importance-and-activation-pruning", "lib.prune", "prune_ria"),
}
# The defaults of their command lines, and those of OWL's README. A name with "llama" selects the code for LLaMA.
OPTIONS: Row = {
    "model": "llama", "seed": 0, "calib_dataset": "c4", "prune_method": "ria", "use_variant": False, "a": 0.5,
    "reconstruction": False, "reallocation": False, "per_outneuron": False, "gptq": False, "semi_sparse_acc": False,
    "Hyper_m": 5, "Lamda": 0.08, "percdamp": 0.01, "blocksize": 128, "wbits": 16, "minlayer": -1, "maxlayer": 1000,
    "prune_only": "", "invert": False, "true_sequential": False,
}  # fmt: skip


@contextmanager
def shims(model: Any, windows: Tensor) -> Iterator[None]:
    """Let the authors' code of 2023 run: without a GPU, and with blocks that want the positions' embeddings."""
    length = windows.shape[1]
    model.seqlen, model.hf_device_map = length, {}
    hidden = model.model.embed_tokens(windows[:1])
    rotary = model.model.rotary_emb(hidden, torch.arange(length)[None])
    with ExitStack() as stack:
        stack.enter_context(patch.object(torch.cuda, "synchronize", lambda: None))
        stack.enter_context(patch.object(Tensor, "cuda", lambda self: self))
        for block in model.model.layers:
            stack.enter_context(patch.object(block, "forward", partial(block.forward, position_embeddings=rotary)))
        yield


@torch.no_grad()
def prune(model: Any, windows: Tensor, method: str, sparsity: float, pattern: str) -> None:
    """Prune a model by a method's own code, which is on Python's path."""
    _, module_name, function = METHODS[method]
    module = import_module(module_name)
    kept, size = parse_pattern(pattern) or (0, 0)
    of_pattern = {"prunen": size - kept, "prunem": size}
    of_windows = {"nsamples": len(windows), "seqlen": windows.shape[1]}
    options = Namespace(**OPTIONS, **of_pattern, **of_windows, sparsity=sparsity, sparsity_ratio=sparsity)
    batches, cpu = [(window[None],) for window in windows], torch.device("cpu")
    with shims(model, windows):
        if method == "sparsegpt":
            module.args = options  # type: ignore[attr-defined]
            getattr(module, function)(model, batches, cpu)
        else:
            module.get_loaders = lambda *_, **__: (batches, None)  # type: ignore[attr-defined]
            getattr(module, function)(options, model, None, cpu, prune_n=size - kept, prune_m=size)


@torch.no_grad()
def measure(study: Study, method: str, amount: str, code: Path, text: str = TEXTS[0]) -> Row:
    """Return the perplexity on a text of a study's model after the authors' code, and what it was computed from."""
    from transformers import AutoModelForCausalLM

    dense = study.model("dense")
    windows = draw_calibration(study).tokens.long()
    evaluated, _ = windows_of(study, dense, text)
    model: Any = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    prune(model, windows, method, *AMOUNTS[amount])
    losses = [model(row.tokens[None], labels=row.tokens[None], use_cache=False).loss.item() for row in evaluated]
    linears = [module.weight for module in model.model.layers.modules() if isinstance(module, nn.Linear)]
    zeros = sum(int((weight == 0).sum()) for weight in linears)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=code, capture_output=True, text=True, check=True).stdout
    return {
        text: {"perplexity": float(f"{math.exp(math.fsum(losses) / len(losses)):.6g}")},
        "zeros": zeros / sum(weight.numel() for weight in linears),
        "code": f"{METHODS[method][0]} {commit.strip()}",
        "digests": {
            "model": files_digest(dense),
            "calibration": digest(windows.tolist()),
            "evaluation": digest([row.tokens.tolist() for row in evaluated]),
        },
    }


def main() -> None:
    """Run the command line."""
    parser = arguments(__doc__, "recipes")
    parser.add_argument("--code", type=Path, required=True)
    asked = parser.parse_args()
    code = asked.code.resolve()
    sys.path.insert(0, str(code))
    study = Comparison(MODELS[0], asked.mirror.resolve(), asked.work.resolve()).study
    for method in METHODS:
        for amount in AMOUNTS:
            if set(asked.rows) == {method, amount}:
                value = measure(study, method, amount, code)
                write_row(HERE / "authors.json", f"{MODELS[0]} {method} {amount}", value, origin(PROTOCOL))
                print(f"{method} {amount}: {value}", flush=True)


if __name__ == "__main__":
    main()
