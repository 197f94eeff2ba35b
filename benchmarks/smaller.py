"""Measure smaller dense models: neurons, blocks and both of SmolLM2-135M, and neurons of Gemma 3 270M.

    python benchmarks/smaller.py --mirror DIR     the table, several hours on two quiet cores
    python benchmarks/smaller.py --mirror DIR --only smollm2-135m neurons 0.2     rows with all of these words

Models, windows, texts and studies are those of two_models.py. `flap` is the score of FLAP (An et al. 2023,
arXiv 2312.11983) with the same share in each block, computed here from the study's norms: the variance of a neuron's
output times the squared norm of the weights that read it. Its bias takes the place of the removed neurons' means.
`gguf` rows are the dense model with fewer bits a weight. Rows are written to results-smaller.json at once, and a run
continues with the missing rows.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from generation import measure
from gguf_files import EMBEDDINGS, write_gguf
from processes import HERE, say
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from two_models import WINDOWS, Models, change, read_command_line, read_results, write_results

from wanda_dvc.engine.checkpoint import Checkpoint
from wanda_dvc.sources.models import read_model
from wanda_dvc.study.project import Project
from wanda_dvc.study.tensors import read_grams, read_stats

TARGET = HERE / "results-smaller.json"
TURNS, PROMPT, TOKENS = 3, 128, 64  # of the measurement of speed: dense and smaller by turns
SMOLLM2, GEMMA = "smollm2-135m", "gemma-3-270m"
DAMPING = 0.01  # of FLAP's refit, of the Gram matrix's mean diagonal
CHOICES: dict[str, dict[str, str]] = {
    "admm": {"recipe": "admm"},
    "admm-none": {"recipe": "admm", "reconstruction": "none"},
    "wanda": {"recipe": "wanda"},
    "wanda-refit": {"recipe": "wanda-refit"},
    "flap": {"recipe": "magnitude"},  # whose files FLAP's replace
    "flap-refit": {"recipe": "magnitude"},
    "magnitude": {"recipe": "magnitude"},
    "magnitude-refit": {"recipe": "magnitude", "reconstruction": "least-squares"},
    "admm-pruned": {"recipe": "admm", "propagation": "pruned"},
    "admm-corrected": {"recipe": "admm", "propagation": "corrected"},
    "wanda-refit-corrected": {"recipe": "wanda-refit", "propagation": "corrected"},
    "block": {"recipe": "blockwise"},
}
CLEAR = dict.fromkeys(("method", "group", "allocation", "reconstruction", "propagation"))


class Row(NamedTuple):
    """One smaller model."""

    model: str
    pattern: str  # of params.yaml; `N-blocks-and-neurons`: neurons of the model without N blocks; `gguf`
    amount: str  # the share of the units, or the format
    choice: str

    @property
    def name(self) -> str:
        """The row's key in the results."""
        return " ".join(self)


def rows() -> Iterator[Row]:
    """Yield all rows, the most important first."""
    for share in ("0.2", "0.1", "0.3"):
        for choice in ("admm", "wanda", "flap", "magnitude"):
            yield Row(SMOLLM2, "neurons", share, choice)
    for blocks in (1, 2):
        yield Row(SMOLLM2, "blocks", f"{blocks / 30:.4f}", "admm")
        yield Row(SMOLLM2, f"{blocks}-blocks-and-neurons", "0.2", "admm")
    for choice in ("admm", "wanda", "wanda-refit", "wanda-refit-corrected"):
        yield Row(GEMMA, "neurons", "0.2", choice)
    for kind in ("Q8_0", "Q5_0", "Q4_0"):
        yield Row(SMOLLM2, "gguf", kind, "dense")
    for share in ("0.2", "0.1", "0.3"):
        for choice in ("flap-refit", "wanda-refit", "magnitude-refit", "admm-none"):
            yield Row(SMOLLM2, "neurons", share, choice)
    for choice in ("wanda-refit-corrected", "admm-pruned", "admm-corrected", "block"):
        for share in ("0.2", "0.1", "0.3"):
            yield Row(SMOLLM2, "neurons", share, choice)


class Smaller(Models):
    """Makes smaller models in the studies of two_models.py."""

    def measure_smaller(self, row: Row) -> dict[str, Any]:
        """Make a smaller model and measure it."""
        folder, took = self.study(row.model, 0), {}
        if row.pattern == "gguf":
            place(folder, self._quantized(folder, row.amount))
        elif row.pattern.endswith("-and-neurons"):
            place(folder, self._neurons_of_fewer_blocks(folder, row))
        else:
            took = self._prune(folder, row.pattern, row.amount, row.choice)
        if row.choice.startswith("flap"):
            flap(folder, refit=row.choice.endswith("-refit"))
        found = {**row._asdict(), **took, **sizes(folder / "models/pruned")}
        if row.pattern == "gguf":
            found["bytes"] = (self.runner.work / f"{row.amount}.gguf").stat().st_size
        return found | {"texts": {text: self.perplexity(folder, "pruned", text) for text in WINDOWS}}

    def _prune(self, folder: Path, pattern: str, share: str, choice: str) -> dict[str, float]:
        """Run `mask` and `apply`; return their seconds."""
        change(folder, {**CLEAR, **CHOICES[choice], "pattern": pattern, "sparsity": float(share)})
        return {stage: round(self.stage(folder, stage), 1) for stage in ("mask", "apply")}

    def _neurons_of_fewer_blocks(self, folder: Path, row: Row) -> Path:
        """Return a model without blocks and neurons; the model without the blocks has a study of its own."""
        blocks = row.pattern.partition("-")[0]
        fewer = self.runner.work / f"{row.model}-without-{blocks}"
        if not fewer.is_dir():
            self._prune(folder, "blocks", f"{int(blocks) / 30:.4f}", "admm")
            half = fewer.with_suffix(".part")
            shutil.rmtree(half, ignore_errors=True)
            shutil.copytree(folder / "models/pruned", half)
            (half / "provenance.json").unlink()
            half.rename(fewer)
        study = fewer.with_name(f"{fewer.name}-seed-0")
        study.mkdir(exist_ok=True)
        shutil.copy(folder / "params.yaml", study)
        change(study, {"model": str(fewer), "calibration": {"statistics": "gram"}})
        for part, where in (("model", "models/dense"), ("calibration", "data/calibration")):
            if not (study / where).is_dir():
                self.stage(study, "download", part)
        if not (study / "stats").is_dir():
            self.stage(study, "calibrate")
        self._prune(study, "neurons", row.amount, row.choice)
        return study / "models/pruned"

    def _quantized(self, folder: Path, kind: str) -> Path:
        """Return the dense model after a GGUF format has rounded its weights."""
        file, out = self.runner.work / f"{kind}.gguf", self.runner.work / kind
        if not out.is_dir():
            write_gguf(folder / "models/dense", file, kind, EMBEDDINGS.get(kind))
            half = out.with_suffix(".part")
            shutil.rmtree(half, ignore_errors=True)
            read_model(file, half)
            half.rename(out)
        return out

    def speed(self, row: Row) -> dict[str, float]:
        """Return the median tokens a second of the dense and the smaller model, measured by turns."""
        models = self.study(row.model, 0) / "models"
        found: dict[str, list[float]] = {"dense": [], "pruned": []}
        for _ in range(TURNS):
            for model, rates in found.items():
                one = measure(models / model, prompt=PROMPT, tokens=TOKENS)
                rates.append(one.tokens_per_second)
        return {model: round(median(rates), 2) for model, rates in found.items()}


def place(folder: Path, other: Path) -> None:
    """Put another model's weights and configuration into the pruned model of a study, which has been applied before."""
    target = folder / "models/pruned"
    for name in ("config.json", "model.safetensors"):
        (target / name).unlink(missing_ok=True)
        shutil.copy(other / name, target)


@torch.no_grad()
def flap(folder: Path, *, refit: bool) -> None:
    """Replace a study's smaller Llama by FLAP's, with as many neurons: with its bias, or with least squares."""
    project = Project(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(project.model("dense"))
    width = json.loads((project.model("pruned") / "config.json").read_text())["intermediate_size"]
    state, config = model.state_dict(), model.config
    for block in range(config.num_hidden_layers):
        parts = {name: f"model.layers.{block}.mlp.{name}_proj" for name in ("gate", "up", "down")}
        x, weight = read_stats(project.stats, block).inputs[parts["down"]], state[f"{parts['down']}.weight"].double()
        mean = x.sum / x.count
        score = (x.sum_squares / x.count - mean**2) * weight.square().sum(dim=0)
        stay = torch.zeros(len(score), dtype=torch.bool)
        stay[score.topk(width).indices] = True
        for name in ("gate", "up"):
            state[f"{parts[name]}.weight"] = state[f"{parts[name]}.weight"][stay].clone()
        kept = weight[:, stay]
        if refit:
            gram = read_grams(project.gram, block)[parts["down"]].matrix().double()
            damped = gram[stay][:, stay] + DAMPING * gram.diagonal().mean() * torch.eye(width, dtype=torch.float64)
            kept = kept + weight[:, ~stay] @ torch.linalg.solve(damped, gram[stay][:, ~stay]).T
        else:
            state[f"{parts['down']}.bias"] = (weight[:, ~stay] @ mean[~stay]).float()
            for name in ("gate", "up"):  # the configuration gives all three a bias
                state[f"{parts[name]}.bias"] = torch.zeros(width)
        state[f"{parts['down']}.weight"] = kept.float().contiguous()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    config.intermediate_size, config.mlp_bias = width, not refit
    config.save_pretrained(project.model("pruned"))
    save_file(state, project.model("pruned") / "model.safetensors", metadata={"format": "pt"})


def sizes(folder: Path) -> dict[str, int]:
    """Return a model's parameters, and the bytes of its weights in two bytes each, as models are deployed."""
    entries = Checkpoint(folder).entries.values()
    parameters = sum(torch.Size(entry.shape).numel() for entry in entries)
    return {"parameters": parameters, "bytes": 2 * parameters}


def main() -> None:
    """Run the command line."""
    runner, mirror, only = read_command_line(__doc__)
    models, results = Smaller(runner, mirror), read_results(TARGET, "dense", "rows", "tokens_per_second")
    for row in rows():
        texts = results["rows"].get(row.name, {}).get("texts", {})
        if WINDOWS.keys() <= texts.keys() or not only <= set(row):
            continue
        if row.model not in results["dense"]:
            study = models.study(row.model, 0)
            texts = {text: models.perplexity(study, "dense", text) for text in WINDOWS}
            results["dense"][row.model] = {**sizes(study / "models/dense"), "texts": texts}
            write_results(TARGET, results)
        results["rows"][row.name] = models.measure_smaller(row)
        say(f"{row.name}: {results['rows'][row.name]['texts']}")
        write_results(TARGET, results)
        if row.choice in ("admm", "wanda-refit"):
            results["tokens_per_second"][row.name] = models.speed(row)
            write_results(TARGET, results)


if __name__ == "__main__":
    main()
