"""Write measured figures into the documents, between their markers: python scripts/figures.py.

`<!-- figures: NAME -->` and `<!-- end of figures -->` enclose each table. The figures are in benchmarks/*.json.
"""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "docs/results.md")
PLACE = re.compile(r"(<!-- figures: (\S+) -->\n)(.*?)(<!-- end of figures -->)", flags=re.DOTALL)
Row = dict[str, Any]

# The rows of benchmarks/results.json on the page, with the words for what was measured.
TIMES = {
    "first prune float32, against (a) in float32": "first prune in float32: `calibrate`, `mask`, `apply` ¹",
    "every further sparsity as `dvc repro`, against (a)": "each further sparsity: `dvc repro apply`, starts included ¹",
    "zero-shot float32, against (b)": "`zero-shot` in float32, without the start ²",
    "zero-shot bfloat16, against (b)": "`zero-shot` in bfloat16, without the start ²",
    "the whole study in float32, against (a) + (b) in float32": "six prunes and seven evaluations, float32 ³",
    "the whole study in bfloat16, against (a) + (b) in float32": "the same in bfloat16, baseline in float32 ³",
}
# The tasks that the dense model answers better than a constant answer does.
THREE = ("piqa", "hellaswag", "arc_easy")
# The rows on the page; the files have more.
RECIPES = ("magnitude-rows", "wanda", "wanda-refit", "admm", "fisher")
FORMATS = ("Q8_0", "Q5_0", "Q4_1", "Q4_0")
SMALLER = (
    "blocks 0.0333 admm", "blocks 0.0667 admm", "gguf Q5_0 dense", "neurons 0.1 wanda-refit", "neurons 0.2 wanda-refit",
    "neurons 0.2 wanda", "neurons 0.2 admm", "neurons 0.2 magnitude-refit", "neurons 0.3 wanda-refit",
    "2-blocks-and-neurons 0.2 admm",
)  # fmt: skip


def measured(name: str) -> Row:
    """Return a file of benchmarks/."""
    found: Row = json.loads((ROOT / f"benchmarks/{name}.json").read_text(encoding="utf-8"))
    return found


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return a Markdown table; columns after the first `left` ones are aligned to the right."""
    rule = ["---"] * left + ["---:"] * (len(headers) - left)
    return "\n".join(f"| {' | '.join(row)} |" for row in [headers, rule, *rows])


def figure(value: float | str | None, older: bool = False) -> str:
    """Return a perplexity with five digits at most; `diverged` stays. An older figure has a mark."""
    if value is None or isinstance(value, str):
        return value or "–"
    shown = f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:.2f}"
    return f"{shown}\N{NO-BREAK SPACE}¹" if older else shown


def name(row: Row) -> str:
    """Return a recipe's name; the recommended one is bold."""
    return f"**`{row['recipe']}`**" if row.get("recommended") else f"`{row['recipe']}`"


def readme() -> str:
    """Return the README's table."""
    small, gemma = measured("methods")["models"]
    rows = [
        [name(row), *(figure(row[small][column]) for column in ("50 %", "70 %", "2:4")), figure(row[gemma]["50 %"])]
        for row in measured("methods")["recipes"]
        if row["readme"]
    ]
    return table(["`recipe`", "50 %", "70 %", "2:4", f"{gemma}, 50 %"], rows)


def recipes() -> str:
    """Return all recipes at all settings, on another model at those that were measured."""
    methods = measured("methods")
    small, gemma = methods["models"]
    more = [column for column in methods["columns"] if any(row[gemma].get(column) for row in methods["recipes"])]
    rows = [
        [
            name(row),
            *(figure(row[small][column], column in row.get("older", ())) for column in methods["columns"]),
            *(figure(row[gemma].get(column)) for column in more),
        ]
        for row in methods["recipes"]
    ]
    return table(["`recipe`", *methods["columns"], *(f"{gemma}, {column}" for column in more)], rows)


def seconds() -> str:
    """Return how long each recipe takes."""
    methods = measured("methods")
    rows = [[name(row), methods["calibrate"][row["statistics"]], row["time"]] for row in methods["recipes"]]
    return table(["`recipe`", "`calibrate`, once", "`mask` and `apply`, each experiment"], rows)


def times() -> str:
    """Return the benchmarks that have a baseline, with the words of this script."""
    rows = {row["name"]: row for row in measured("results")["rows"]}
    return table(
        ["SmolLM2-135M", "wanda-dvc, s", "baseline, s", "ratio"],
        [
            [words, f"{row['ours_s']:,.0f}", f"{row['baseline_s']:,.0f}", f"{row['ratio']:.2f}"]
            for name, words in TIMES.items()
            for row in [rows[name]]
        ],
    )


def distance() -> str:
    """Return the pruned models at 50 % and in 2:4, after the dense one, on two texts."""
    lines = []
    for name, row in measured("results-distance")["rows"].items():
        if name == "dense" or (row.get("recipe") in RECIPES and row["amount"] in {"50%", "2:4"}):
            both = [row["texts"][text] for text in ("wikitext2", "embedded")]
            cells = [
                cell for one in both for cell in (figure(one["perplexity"]), mean(one.get("divergence"), "{:.3f}"))
            ]
            lines.append([name.replace("%", "\N{NO-BREAK SPACE}%"), *cells, *_answers(row)])
    heads = [f"{what}, {text}" for text in ("WikiText-2", "embedded") for what in ("perplexity", "divergence")]
    return table(["model", *heads, "agreement, WikiText-2, %", "changed answers, %"], lines)


def formats() -> str:
    """Return the quantized models, after the dense one, on WikiText-2."""
    lines = []
    for name, row in measured("results-distance")["rows"].items():
        if name == "dense" or row.get("format") in FORMATS:
            text = row["texts"]["wikitext2"]
            cells = [figure(text["perplexity"]), mean(text.get("divergence"), "{:.3f}"), *_answers(row)]
            lines.append([name.removeprefix("GGUF "), f"{row['bytes'] / 1e6:.0f}", *cells])
    return table(["model", "MB", "perplexity", "divergence", "agreement, %", "changed answers, %"], lines)


def _answers(row: Row) -> list[str]:
    """Return in percent the agreement on WikiText-2, and the answers that changed; dashes for the dense model."""
    agreement = mean(row["texts"]["wikitext2"].get("top1_agreement"), "{:.1f}", 100)
    return [agreement, f"{100 * changed(row):.1f}" if row["flips"] else "–"]


def changed(row: Row) -> float:
    """Return the share of answers to the three tasks that differ from the dense model's."""
    flips = [row["flips"][task]["acc"] for task in THREE]
    return sum(one[key] for one in flips for key in ("lost", "gained", "swapped")) / sum(one["items"] for one in flips)


def mean(measure: Row | str | None, form: str, factor: float = 1) -> str:
    """Return the mean of a measure; a dash if it is missing, or diverged."""
    return form.format(factor * measure["mean"]) if isinstance(measure, dict) else "–"


def smaller() -> str:
    """Return the smaller models of `SMALLER`, after the dense one of each model."""
    results, rows = measured("results-smaller"), []
    for model, dense in results["dense"].items():
        rows.append([model, "dense", "–", *texts(dense), f"{dense['bytes'] / 1e6:.0f}", "–"])
        for name in SMALLER:
            if row := results["rows"].get(f"{model} {name}"):
                speed = results["tokens_per_second"].get(f"{model} {name}")
                share = 100 * (1 - row["parameters"] / dense["parameters"])
                faster = f"{speed['pruned'] / speed['dense']:.2f} ×" if speed else "–"
                rows.append([model, name, f"{share:.1f} %", *texts(row), f"{row['bytes'] / 1e6:.0f}", faster])
    heads = ["model", "removed", "parameters", "WikiText-2", "divergence", "embedded text", "MB", "tokens a second"]
    return table(heads, rows, left=2)


def texts(row: Row) -> list[str]:
    """Return a model's perplexity and divergence on WikiText-2, and its perplexity on the embedded text."""
    text, other = (row["texts"].get(name, {}) for name in ("wikitext2", "embedded"))
    return [figure(text.get("perplexity")), mean(text.get("divergence"), "{:.3f}"), figure(other.get("perplexity"))]


def written(text: str) -> str:
    """Return a document with the current figures between its markers."""
    tables = {one.__name__: one() for one in (readme, recipes, seconds, times, distance, formats, smaller)}
    return PLACE.sub(lambda found: f"{found[1]}{tables[found[2]]}\n{found[4]}", text)


def main() -> None:
    """Write all documents."""
    for document in DOCUMENTS:
        path = ROOT / document
        text = path.read_text(encoding="utf-8")
        if not PLACE.search(text):
            sys.exit(f"{document}: no place for figures: add <!-- figures: NAME --> and <!-- end of figures -->")
        path.write_text(written(text), encoding="utf-8")


if __name__ == "__main__":
    main()
