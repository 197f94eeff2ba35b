"""Write measured figures into the documents, between their markers: python scripts/figures.py.

`<!-- figures: NAME -->` and `<!-- end of figures -->` stand around each table. The methods' figures are in
docs/results/methods.json, the times in benchmarks/results.json, those of smaller models in
benchmarks/results-smaller.json, and the distances from the dense model in benchmarks/results-distance.json. A model
without figures has no column.
"""

import json
import re
import sys
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DOCUMENTS = (
    "README.md",
    "docs/methods.md",
    "docs/performance.md",
    "docs/smaller.md",
    "docs/results/better.md",
    "docs/results/distance.md",
)
METHODS = ROOT / "docs/results/methods.json"
BENCHMARKS = ROOT / "benchmarks/results.json"
SMALLER = ROOT / "benchmarks/results-smaller.json"
DISTANCE = ROOT / "benchmarks/results-distance.json"
PLACE = re.compile(r"(<!-- figures: (\S+) -->\n)(.*?)(<!-- end of figures -->)", flags=re.DOTALL)

# The rows of benchmarks/results.json on the page about performance, with the words for what was measured.
TIMES = {
    "first prune float32, against (a) in float32": "first prune in float32: `calibrate`, `mask`, `apply` ¹",
    "every further sparsity as `dvc repro`, against (a)": "each further sparsity: `dvc repro apply`, starts included ¹",
    "zero-shot float32, against (b)": "`zero-shot` in float32, without the start ²",
    "zero-shot bfloat16, against (b)": "`zero-shot` in bfloat16, without the start ²",
    "the whole study in float32, against (a) + (b) in float32": "six prunes and seven evaluations, float32 ³",
    "the whole study in bfloat16, against (a) + (b) in float32": "the same in bfloat16, baseline in float32 ³",
}


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return a Markdown table; columns after the first `left` ones are aligned to the right."""
    rule = ["---"] * left + ["---:"] * (len(headers) - left)
    return "\n".join(f"| {' | '.join(row)} |" for row in [headers, rule, *rows])


def figure(value: float | str | None) -> str:
    """Return a perplexity with five digits at most; `diverged` stays."""
    if value is None or isinstance(value, str):
        return value or "–"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:.2f}"


def others(methods: dict[str, Any]) -> list[str]:
    """Return the models after the first one that have figures."""
    _, *more = methods["models"]
    return [model for model in more if any(row[model]["50 %"] is not None for row in methods["recipes"])]


def other_text(row: dict[str, Any]) -> str:
    """Return the perplexity on the other text, with a mark where least squares took the place of the recipe's own."""
    substitute = row.get("other text, least-squares")
    return f"{figure(substitute)}\N{NO-BREAK SPACE}¹" if substitute is not None else figure(row["other text"])


def readme(methods: dict[str, Any]) -> str:
    """Return the README's table: the recipes at three settings, on another text, on other models, and their times."""
    model, *_ = methods["models"]
    elsewhere = distances()
    columns = ["50 %", "70 %", "2:4"]
    rows = []
    for row in methods["recipes"]:
        if row["readme"]:
            name = f"**`{row['recipe']}`**" if row.get("recommended") else f"`{row['recipe']}`"
            values = [figure(row[model][column]) for column in columns]
            distant = elsewhere.get(f"{row['recipe']} 50%", {}).get("texts", {}).get("embedded", {})
            values.append(figure(distant.get("perplexity")))
            more = [figure(row[other]["50 %"]) for other in others(methods)]
            rows.append([name, *values, *more, methods["calibrate"][row["statistics"]], row["time"]])
    dense = [f"{methods['models'][other]['dense']:.2f}" for other in others(methods)]
    heads = [f"{other}, 50 % (dense {value})" for other, value in zip(others(methods), dense, strict=True)]
    return table(["`recipe`", *columns, "50 %, other text ¹", *heads, "`calibrate`, once ²", "`mask`, `apply` ²"], rows)


def recipes(methods: dict[str, Any]) -> str:
    """Return all recipes at all settings, on another model at those that were measured."""
    model, *_ = methods["models"]
    more = [
        (other, column)
        for other in others(methods)
        for column in methods["columns"]
        if any(row[other].get(column) is not None for row in methods["recipes"])
    ]
    rows = [
        [
            f"`{row['recipe']}`",
            f"`{row['statistics']}`",
            *(figure(row[model][column]) for column in methods["columns"]),
            other_text(row),
            *(figure(row[other].get(column)) for other, column in more),
        ]
        for row in methods["recipes"]
    ]
    heads = [f"{other}, {column}" for other, column in more]
    head = ["`recipe`", "`calibration.statistics`", *methods["columns"], "50 %, other text", *heads]
    return table(head, rows, left=2)


def cases(methods: dict[str, Any]) -> str:
    """Return a command and its time for each case of the page that helps to choose a method."""
    recipes = {row["recipe"]: row for row in methods["recipes"]}
    rows = []
    for case in methods["cases"]:
        settings = " ".join(f"-S {setting}" for setting in case["settings"].split())
        if (time := case.get("time")) is None:
            row = recipes[case["recipe"]]
            took = row["time"].replace("³", "¹")
            time = f"{methods['calibrate'][case.get('statistics', row['statistics'])]} once, then {took}"
        rows.append([case["case"], f"`dvc exp run --temp {settings}`", time])
    return table(["your case", "command", "time"], rows, left=3)


def combinations(methods: dict[str, Any]) -> str:
    """Return the choices that are no recipe."""
    choices = ("reconstruction", "allocation", "propagation")
    rows = [
        [
            row["method"],
            *(f"`{row[choice]}`" if row[choice] else "–" for choice in choices),
            *map(figure, row["values"]),
        ]
        for row in methods["combinations"]
    ]
    return table(["method", *choices, *methods["columns"]], rows, left=4)


def _code(word: str | None) -> str:
    return f"`{word}`" if word else "–"


def times(rows: Sequence[dict[str, Any]]) -> str:
    """Return the benchmarks that have a baseline, with the words of this script."""
    measured = {row["name"]: row for row in rows}
    return table(
        ["SmolLM2-135M", "wanda-dvc, s", "baseline, s", "ratio"],
        [
            [words, f"{row['ours_s']:,.0f}", f"{row['baseline_s']:,.0f}", f"{row['ratio']:.2f}"]
            for name, words in TIMES.items()
            for row in [measured[name]]
        ],
    )


# --- distances from the dense model ---

NOT_MEASURED = "Not measured yet."
PICTURE = """<picture>
  <source media="(prefers-color-scheme: dark)" srcset="../pictures/distance-dark.svg">
  <source media="(prefers-color-scheme: light)" srcset="../pictures/distance-light.svg">
  <img alt="Accuracy and changed answers of {count} pruned models against three measures. Rank correlations: \
{said}" src="../pictures/distance-light.svg">
</picture>"""
# A model's measures that may predict its accuracy: the name, and the value in a row.
PREDICTORS: dict[str, Callable[[dict[str, Any]], float | str | None]] = {
    "layer error": lambda row: row.get("layer_error"),
    "perplexity, WikiText-2": lambda row: row["texts"]["wikitext2"]["perplexity"],
    "perplexity, embedded text": lambda row: row["texts"]["embedded"]["perplexity"],
    "divergence, WikiText-2": lambda row: _mean(row["texts"]["wikitext2"].get("divergence")),
    "divergence, embedded text": lambda row: _mean(row["texts"]["embedded"].get("divergence")),
}


def distances() -> dict[str, dict[str, Any]]:
    """Return the measured models by name; empty before benchmarks/distance.py has run."""
    return json.loads(DISTANCE.read_text(encoding="utf-8"))["rows"] if DISTANCE.is_file() else {}


THREE = ("piqa", "hellaswag", "arc_easy")  # the tasks that the dense model answers better than a constant answer does


def accuracy(row: dict[str, Any], tasks: Collection[str] = ()) -> float:
    """Return a model's mean accuracy over some tasks; by default over all."""
    found = [value for task, value in row["accuracies"].items() if task in (tasks or row["accuracies"])]
    return sum(found) / len(found)


def changed(row: dict[str, Any]) -> float:
    """Return the share of answers to the three tasks that differ from the dense model's."""
    flips = [row["flips"][task]["acc"] for task in THREE]
    return sum(one[key] for one in flips for key in ("lost", "gained", "swapped")) / sum(one["items"] for one in flips)


OUTCOMES: dict[str, Callable[[dict[str, Any]], float]] = {
    "accuracy, five tasks": accuracy,
    "accuracy, three tasks": partial(accuracy, tasks=THREE),
    "changed answers, three tasks": changed,
}


def pairs(
    rows: dict[str, dict[str, Any]], predictor: str, outcome: str = "accuracy, three tasks"
) -> list[tuple[float, float, dict[str, Any]]]:
    """Return of each pruned model with finite figures a measure, an outcome, and the row."""
    models = [row for row in rows.values() if "recipe" in row]
    found = [(PREDICTORS[predictor](row), OUTCOMES[outcome](row), row) for row in models]
    return [(value, other, row) for value, other, row in found if isinstance(value, float)]


def rank_correlation(points: Sequence[tuple[float, float, Any]]) -> float:
    """Return Spearman's rank correlation of the first two numbers of each point."""
    from scipy.stats import spearmanr

    x, y, _ = zip(*points, strict=True)
    return float(spearmanr(x, y).statistic)


def signed(value: float) -> str:
    """Return a correlation with two decimals and a minus sign."""
    return f"{value:.2f}".replace("-", "−")


def distance(rows: dict[str, dict[str, Any]], key: str) -> str:
    """Return the table of the models with a key, `recipe` or `format`, after the dense model's row."""
    if not any(key in row for row in rows.values()):
        return NOT_MEASURED
    lines = [_distance(name, row) for name, row in rows.items() if key in row or name == "dense"]
    heads = ["model", "MB"]
    heads += [f"{what}, {text}" for text in ("WikiText-2", "embedded") for what in ("perplexity", "divergence")]
    heads += ["agreement, WikiText-2, %", *(f"{name}, %" for name in OUTCOMES)]
    return table(
        heads + ["layer error"] * (key == "recipe"), [line if key == "recipe" else line[:-1] for line in lines]
    )


def _distance(name: str, row: dict[str, Any]) -> list[str]:
    measured = [row["texts"][text] for text in ("wikitext2", "embedded")]
    error = row.get("layer_error")
    return [
        name.replace("%", "\N{NO-BREAK SPACE}%"),
        f"{row['bytes'] / 1e6:.0f}",
        *(cell for one in measured for cell in (figure(one["perplexity"]), _shown(one.get("divergence"), "{:.3f}"))),
        _shown(measured[0].get("top1_agreement"), "{:.1f}", 100),
        *(f"{100 * of(row):.1f}" if row["flips"] or of is not changed else "–" for of in OUTCOMES.values()),
        "–" if error is None else f"{error:.3f}",
    ]


def _mean(measure: dict[str, float] | str | None) -> float | None:
    """Return the mean of a measure; None if it is missing, or diverged."""
    return measure["mean"] if isinstance(measure, dict) else None


def _shown(measure: dict[str, float] | str | None, form: str, factor: float = 1) -> str:
    value = _mean(measure)
    return "–" if value is None else form.format(factor * value)


def correlations(rows: dict[str, dict[str, Any]]) -> str:
    """Return the rank correlations of the measures with each outcome, over the pruned models."""
    found = {name: points for name in PREDICTORS if len(points := pairs(rows, name)) > 2}
    lines = [
        [name, *(signed(rank_correlation(pairs(rows, name, outcome))) for outcome in OUTCOMES), str(len(points))]
        for name, points in found.items()
    ]
    return table(["measure", *OUTCOMES, "models"], lines) if lines else NOT_MEASURED


def picture(rows: dict[str, dict[str, Any]]) -> str:
    """Return the picture's markup; empty before three models are measured."""
    if len(points := pairs(rows, "layer error")) < 3:
        return ""
    said = ", ".join(f"{name} {signed(rank_correlation(found))}" for name in PREDICTORS if (found := pairs(rows, name)))
    return PICTURE.format(count=len(points), said=said)


def smaller(results: dict[str, Any]) -> str:
    """Return the smaller models, and the dense one above those of each model."""
    rows = []
    for model, dense in results["dense"].items():
        rows.append([model, "–", "–", "dense", "–", *_texts(dense), f"{dense['bytes'] / 1e6:.0f}", "–"])
        for name, row in sorted(results["rows"].items(), key=lambda item: (item[1]["pattern"], item[1]["amount"])):
            if row["model"] == model:
                speed = results["tokens_per_second"].get(name)
                rows.append(
                    [
                        model,
                        row["pattern"],
                        row["amount"],
                        "influence" if row["pattern"] == "blocks" else row["choice"],
                        f"{100 * (1 - row['parameters'] / dense['parameters']):.1f} %",
                        *_texts(row),
                        f"{row['bytes'] / 1e6:.0f}",
                        f"{speed['pruned'] / speed['dense']:.2f} ×" if speed else "–",
                    ]
                )
    return table(
        [
            *("model", "removed", "share", "choice", "parameters removed"),
            *("WikiText-2", "divergence, nats", "embedded text", "MB", "tokens a second"),
        ],
        rows,
        left=4,
    )


def _texts(row: dict[str, Any]) -> list[str]:
    """Return a model's perplexity and divergence on WikiText-2, and its perplexity on the embedded text."""
    text, other = (row["texts"].get(name, {}) for name in ("wikitext2", "embedded"))
    divergence = text.get("divergence")
    mean = "–" if divergence is None else f"{divergence['mean']:.3f}" if isinstance(divergence, dict) else divergence
    return [figure(text.get("perplexity")), mean, figure(other.get("perplexity"))]


METHOD_TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "readme": readme,
    "recipes": recipes,
    "cases": cases,
    "combinations": combinations,
}


def written(text: str) -> str:
    """Return a document with the current figures between its markers."""
    methods = json.loads(METHODS.read_text(encoding="utf-8"))
    tables = {name: make(methods) for name, make in METHOD_TABLES.items()}
    rows = distances()
    tables |= {"distance": distance(rows, "recipe"), "formats": distance(rows, "format")}
    tables |= {"correlations": correlations(rows), "distance-picture": picture(rows)}
    tables["times"] = times(json.loads(BENCHMARKS.read_text(encoding="utf-8"))["rows"])
    tables["smaller"] = smaller(json.loads(SMALLER.read_text(encoding="utf-8")))
    return PLACE.sub(
        lambda found: f"{found[1]}{tables[found[2]]}\n{found[4]}".replace("-->\n\n<!--", "-->\n<!--"), text
    )


def main() -> None:
    """Write all documents."""
    for name in DOCUMENTS:
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        if not PLACE.search(text):
            sys.exit(f"{name}: no place for figures; expected <!-- figures: NAME --> and <!-- end of figures -->")
        path.write_text(written(text), encoding="utf-8")


if __name__ == "__main__":
    main()
