"""Measure how far pruned and quantized models are from the dense one: SmolLM2-135M, all recipes without a training.

    python benchmarks/distance.py --mirror DIR     35 models, about two hours on two quiet cores
    python benchmarks/distance.py --mirror DIR --only fisher 50%     rows with all of these words

DIR holds WikiText-2 and the five tasks laid out like the Hub, as `runtime.mirror` takes it. The study is that of
two_models.py: `gradients` statistics of 32 windows of 2,048 tokens of WikiText-2's validation split. Of each model:
perplexity and divergence on 16 windows of 1,024 tokens of WikiText-2's test split and of the embedded text, 200 items
of each task, bytes, and of pruned models the layer error. Each row is written to results-distance.json at once, and a
run goes on with the rows that are missing there.
"""

import csv
import json
import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gguf_files import EMBEDDINGS, FORMATS, write_gguf
from processes import HERE, say
from two_models import Models, change, read_command_line, read_results, write_results

from wanda_dvc.catalog import RECIPES, RECONSTRUCTIONS, parse_pattern
from wanda_dvc.study.files import load_json

TARGET = HERE / "results-distance.json"
AMOUNTS = {
    "50%": (0.5, "unstructured"),
    "70%": (0.7, "unstructured"),
    "2:4": (0.5, "2:4"),
    "30%": (0.3, "unstructured"),
}
SETTINGS: dict[str, Any] = {
    "perplexity": {"texts": {"wikitext2": {"source": "wikitext2"}}, "length": 1024, "windows": 16},
    "tasks": {"source": "benchmark"},
    "zero_shot": {"limit": 200},
}
DENSE = "dense"


class Row(NamedTuple):
    """One model: the dense one, a pruned one, or the dense one in a GGUF format."""

    name: str
    recipe: str = ""
    amount: str = ""
    format: str = ""


def rows() -> Iterator[Row]:
    """Yield all rows, those that most depends on first."""
    recipes = [name for name, row in RECIPES.items() if not RECONSTRUCTIONS[row.reconstruction].trains]
    yield Row(DENSE)
    for amount in AMOUNTS:
        yield from (Row(f"{recipe} {amount}", recipe, amount) for recipe in recipes)
        if amount == "50%":
            yield from (Row(f"GGUF {kind}", format=kind) for kind in FORMATS)


class Study:
    """The study, with its dense model measured."""

    def __init__(self, models: Models) -> None:
        self.models, self.root = models, models.study("smollm2-135m", 0)
        change(self.root, SETTINGS)
        (self.root / "prompts.txt").write_text("\n")  # no continuations

    def measure(self, row: Row) -> dict[str, Any]:
        """Measure a model."""
        if row.format:
            return self._gguf(row.format)
        return self._dense() if row.name == DENSE else self._pruned(row)

    def _dense(self) -> dict[str, Any]:
        for part in ("perplexity", "tasks"):
            self.models.stage(self.root, "download", part)
        took = self._evaluate("dense")
        return {"bytes": _size(self.root / "models/dense"), **self._shown("dense"), "seconds": took}

    def _pruned(self, row: Row) -> dict[str, Any]:
        sparsity, pattern = AMOUNTS[row.amount]
        change(self.root, {"recipe": row.recipe, "sparsity": sparsity, "pattern": pattern})
        took = {stage: round(self.models.stage(self.root, stage), 1) for stage in ("mask", "apply")}
        took |= self._evaluate("pruned")
        with (self.root / "metrics/plots/sparsity.csv").open(encoding="utf-8") as file:
            linears = list(csv.DictReader(file))
        size = without_zeros(linears, _size(self.root / "models/dense"), pattern)
        return {"recipe": row.recipe, "amount": row.amount, "bytes": size, **self._shown("pruned"), "seconds": took}

    def _evaluate(self, model: str) -> dict[str, float]:
        return {stage: round(self.models.stage(self.root, stage, model), 1) for stage in ("perplexity", "zero-shot")}

    def _shown(self, model: str) -> dict[str, Any]:
        folder = self.root / "metrics" / model
        files = {path.relative_to(folder).with_suffix("").as_posix(): path for path in folder.rglob("*.json")}
        found = self._numbers({name: load_json(path) for name, path in files.items()})
        errors = load_json(self.root / f"metrics/details/{model}/layer_error.json").get("linears", {})
        mean = sum(one["error"] for one in errors.values()) / len(errors) if errors else None
        return found | ({} if mean is None else {"layer_error": mean})

    def _numbers(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """Return the measures on each text, and the accuracy and the changed answers of each task."""
        texts = {name.removeprefix("perplexity/"): of for name, of in metrics.items() if name.startswith("perplexity/")}
        tasks = metrics.get("zero_shot", {})
        answered = load_json(self.root / "metrics/details/dense/zero_shot.json")["tasks"]
        flips = {task: of["flips"] for task, of in tasks.items() if "flips" in of}
        for task, by_metric in flips.items():
            for counts in by_metric.values():
                counts["items"] = len(answered[task]["items"])
        return {"texts": texts, "accuracies": {task: of["acc"] for task, of in tasks.items()}, "flips": flips}

    def _gguf(self, kind: str) -> dict[str, Any]:
        file = self.root / f"{kind}.gguf"
        write_gguf(self.root / "models/dense", file, kind, EMBEDDINGS.get(kind))
        began = time.perf_counter()
        (_, found) = self._json("evaluate", str(file), "--json")
        size = file.stat().st_size
        file.unlink()
        seconds = {"evaluate": round(time.perf_counter() - began, 1)}
        return {"bytes": size, **self._numbers(found["metrics"]), "format": kind, "seconds": seconds}

    def _json(self, *words: str) -> Any:
        self.models.runner.run("wanda-dvc", *words, cwd=self.root)
        said = (self.models.runner.work / "last.log").read_text(encoding="utf-8")
        start = re.search(r"^[{[]", said, re.MULTILINE)  # after the lines of standard error
        assert start
        return json.loads(said[start.start() :])


def without_zeros(linears: Iterable[Mapping[str, str]], total: int, pattern: str) -> int:
    """Return a model's bytes without zeros, from the lines of metrics/plots/sparsity.csv and the dense model's bytes.

    Unstructured: each linear as one bit a weight, and the kept values. n:m: the kept values, each with ⌈log₂ m⌉ bits
    for its place among m (as sparse tensor cores read 2:4). All other tensors are unchanged.
    """
    n_of_m = parse_pattern(pattern)
    for line in linears:
        weights, zeros, size = int(line["weights"]), int(line["zeros"]), int(line["bytes"])
        kept = weights - zeros
        places = kept * math.ceil(math.log2(n_of_m[1])) if n_of_m else weights
        total += kept * (size // weights) + math.ceil(places / 8) - size
    return total


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def main() -> None:
    """Run the command line."""
    runner, mirror, only = read_command_line(__doc__)
    study, results = Study(Models(runner, mirror)), read_results(TARGET, "rows")
    for row in rows():
        if row.name in results["rows"] or not (only <= {*row.name.split()} or row.name == DENSE):
            continue
        results["rows"][row.name] = found = study.measure(row)
        write_results(TARGET, results)
        say(f"{row.name}: {found['texts']['wikitext2']['perplexity']}, {found['seconds']}")


if __name__ == "__main__":
    main()
