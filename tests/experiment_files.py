"""The files that an experiment leaves behind, written without a run."""

import math
from pathlib import Path
from typing import Any

from conftest import write_settings

from wanda_dvc.study.files import write_json
from wanda_dvc.study.folder import Study


def write_results(root: Path, recipe: str, sparsity: float, loss: float, right: int, **words: Any) -> Study:
    """All that an experiment leaves behind. `text`: the digest of its text `on`."""
    text, on = words.pop("text", "0"), words.pop("on", "embedded")
    root.mkdir(parents=True, exist_ok=True)
    write_settings(root, words.pop("model", "/models/tiny"), recipe=recipe, sparsity=sparsity, **words)
    study = Study(root)
    for model, mean, count in (("dense", 2.0, 24), ("pruned", loss, right)):
        finite = math.isfinite(mean)
        protocol: dict[str, Any] = {"libraries": {"torch": "2.9", "transformers": "5.1"}, "dtype": "float32"}
        read = protocol | {"windows": 4, "length": 64, "rest": "dropped", "tokens_sha256": text}
        read |= {"text": {"source": "embedded", "sha256": "0" * 64}}
        losses = [mean * x if finite else "diverged" for x in (0.95, 1.0, 1.0, 1.05)]
        details: dict[str, Any] = {"protocol": read, "losses": losses}
        value = float(f"{math.exp(mean):.6g}") if finite else "diverged"
        metrics: dict[str, Any] = {"perplexity": value}
        if model == "pruned":
            measured = {"divergence": {"mean": mean - 2.0}, "top1_agreement": {"mean": 0.5}}
            metrics |= measured if finite else dict.fromkeys(measured, "diverged")
            factors = (0.9, 1.0, 1.0, 1.1) if finite else ()
            details |= {"divergences": [(mean - 2.0) * x for x in factors], "agreements": [0.5 * x for x in factors]}
        write_json(study.details(model, f"perplexity/{on}"), details)
        write_json(study.metrics(model, f"perplexity/{on}"), metrics)
        items = [{"item": i, "acc": float(i < count)} for i in range(40)]
        asked = {"libraries": protocol["libraries"] | {"lm_eval": "0.4"}, "task": {"sha256": "0"}}
        answered = {"protocol": protocol | asked, "items": items}
        write_json(study.details(model, "zero_shot"), {"tasks": {"piqa": answered}})
        changed = {"lost": max(0, 24 - count), "gained": max(0, count - 24), "swapped": 3}
        flips = {"flips": {"acc": changed}} if model == "pruned" else {}
        write_json(study.metrics(model, "zero_shot"), {"piqa": {"acc": count / 40} | flips})
    write_json(study.metrics("pruned", "sparsity"), {"sparsity": sparsity})
    return study
