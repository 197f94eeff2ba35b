"""Write measured figures into the documents, between their markers: python scripts/figures.py.

`<!-- figures: NAME -->` and `<!-- end of figures -->` enclose each table. The figures are rows of benchmarks/*.json. A
figure has a mark, ¹, if its row was measured with another version of a stage.
"""

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import floors  # noqa: E402 - a folder of scripts
from breadth import UNSEEN  # noqa: E402
from origin import is_old, read_rows  # noqa: E402 - a folder of scripts
from recipes import LONGER, SMALLER, TOKENS  # noqa: E402
from spread import SEEDED, SEEDS  # noqa: E402

from wanda_dvc import catalog  # noqa: E402
from wanda_dvc.results.intervals import Estimate, holm, perplexity_interval, ratio  # noqa: E402

DOCUMENTS = ("README.md", "docs/results.md", "docs/smaller.md", "docs/limits.md", "benchmarks/README.md")
MARK = "\N{NO-BREAK SPACE}¹"  # of a figure that older code measured
PLACE = re.compile(r"(<!-- figures: (\S+) -->\n)(.*?)(<!-- end of figures -->)", flags=re.DOTALL)
Row = dict[str, Any]
SMALL, GEMMA = "smollm2-135m", "gemma-3-270m"
MODEL_NAMES = {SMALL: "SmolLM2", GEMMA: "Gemma"}
NOTHING = "Not measured yet."

# The rows of benchmarks/peers.json with a baseline on the page, with the words for them.
TIMES = {
    "first prune float32, against (a)": "first prune in float32: `calibrate`, `mask`, `apply`; (a)",
    "a further sparsity by dvc repro apply, against (a)": "each further sparsity: `dvc repro apply`; (a)",
    "zero-shot float32, against (b)": "`zero-shot` in float32; (b)",
    "zero-shot bfloat16, against (b)": "`zero-shot` in bfloat16; (b)",
}
# The rows on the page; the files have more.
RECIPES = ("magnitude-rows", "wanda", "wanda-refit", "admm", "fisher")
AMOUNTS = ("50%", "70%", "2:4")
BASELINES = ("magnitude", "wanda-paper", "sparsegpt", "sparsegpt-paper", "ria", "owl")  # of the page alone
RECOMMENDED = "fisher"
NAMES = {recipe: f"`{recipe}`" for recipe in (*RECIPES, *BASELINES)} | {RECOMMENDED: f"**`{RECOMMENDED}`**"}
TEXTS = {"wikitext2": "WikiText-2", "embedded": "embedded"}
# The perplexities of the authors' code on the same tokens, locuslab/wanda (8e8fc87) and IST-DASLab/sparsegpt, run by
# hand with transformers 5.24; a row of benchmarks/authors.json replaces them. Goals in percent.
AUTHORS = {
    ("wanda-paper", "50%"): (43.1862, 0.5), ("wanda-paper", "70%"): (702.85, 2), ("wanda-paper", "2:4"): (148.134, 0.5),
    ("sparsegpt-paper", "50%"): (36.2844, 1), ("magnitude", "50%"): (465.62, 1), ("magnitude-rows", "2:4"): (1937.7, 1),
    ("ria", "50%"): (None, 1), ("owl", "50%"): (None, 1),
}  # fmt: skip
MODELS = (
    *product(("wanda", "admm", "fisher"), AMOUNTS),
    ("wanda-refit", "50%"),
    *product(("wanda-refit", "fisher"), SMALLER),
)
FIRST_FILES = ("dense f16", "dense Q4_K_M", "dense Q3_K_M", "neurons 20% Q4_K_M")  # in the README
MEASURES = tuple(product(TEXTS, ("perplexity", "divergence")))


def measured(name: str) -> dict[str, Row]:
    """Return the rows of a file of benchmarks/."""
    return read_rows(ROOT / f"benchmarks/{name}.json")


def value(row: Row | None, text: str = "wikitext2", measure: str = "perplexity") -> Any:
    """Return a measure of a row on a text; None if the row or the measure is missing."""
    return row and row["value"].get(text, {}).get(measure)


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return a Markdown table; columns after the first `left` ones are aligned to the right.

    If all figures of a row have a mark, its first cell has it instead; if all rows have it, the first header.
    """
    rows = [_marked_once(row, left) for row in rows]
    if rows and all(row[0].endswith(MARK) for row in rows):
        headers = [headers[0] + MARK, *headers[1:]]
        rows = [[row[0].removesuffix(MARK), *row[1:]] for row in rows]
    rule = ["---"] * left + ["---:"] * (len(headers) - left)
    return "\n".join(f"| {' | '.join(row)} |" for row in [headers, rule, *rows])


def _marked_once(row: Sequence[str], left: int) -> Sequence[str]:
    figures = [cell for cell in row[left:] if cell != "–"]
    if not figures or not all(cell.endswith(MARK) for cell in figures):
        return row
    return [row[0] + MARK, *row[1:left], *(cell.removesuffix(MARK) for cell in row[left:])]


def figure(value: float | str | None, row: Row | None = None) -> str:
    """Return a perplexity with five digits at most; `diverged` stays. A figure of an old `row` has a mark."""
    if value is None or isinstance(value, str):
        return value or "–"
    shown = f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:.2f}"
    return shown + MARK if row and is_old(row) else shown


def by_recipe() -> str:
    """Return the recipes' perplexity on WikiText-2, of SmolLM2 and Gemma."""
    rows, lines = measured("recipes"), []
    for recipe in (*RECIPES, *BASELINES):
        of_recipe = [rows.get(f"{model} {recipe} {amount}") for model, amount in product((SMALL, GEMMA), AMOUNTS)]
        if recipe in RECIPES or any(of_recipe):
            lines.append([NAMES[recipe], *(figure(value(row), row) for row in of_recipe)])
    heads = [*AMOUNTS, *(f"Gemma, {amount}" for amount in AMOUNTS)]
    return table(["`recipe`", *(head.replace("%", " %") for head in heads)], lines)


def first_results() -> str:
    """Return the README's table: the dense model and the recipes on SmolLM2, with the text that is unlike the first."""
    rows = measured("recipes")
    dense = rows.get(f"{SMALL} dense")
    lines = [["dense", "–", figure(value(dense), dense), figure(value(dense, "embedded"), dense), "–", "–"]]
    for recipe in RECIPES:
        half, most, n_of_m = (rows.get(f"{SMALL} {recipe} {amount}") for amount in AMOUNTS)
        paper = catalog.methods()[catalog.RECIPES[recipe].method].paper
        figures = [figure(value(half), half), figure(value(half, "embedded"), half)]
        figures += [figure(value(row), row) for row in (most, n_of_m)]
        lines.append([NAMES[recipe], paper, *figures])
    return table(["`recipe`", "weights chosen by", "50 %", "50 %, other text", "70 %", "2:4"], lines, left=2)


def intervals() -> str:
    """Return perplexities at 50 % with their intervals, and each recipe's ratio to the one before it, with its test.

    The tests are paired by window, and adjusted for all tests of the table. A row without losses of windows has none.
    """
    rows = {recipe: measured("recipes").get(f"{SMALL} {recipe} 50%") for recipe in RECIPES}
    ratios: dict[tuple[str, str], Estimate] = {}
    for (base, recipe), text in product(pairwise(RECIPES), TEXTS):
        losses, base_losses = (value(rows[name], text, "losses") for name in (recipe, base))
        if losses and base_losses:
            estimate = ratio(losses, base_losses, _predictions(rows[recipe], text))
            if estimate:
                ratios[recipe, text] = estimate
    adjusted = dict(zip(ratios, holm([estimate.p for estimate in ratios.values()]), strict=True))
    lines = []
    for recipe, text in product(RECIPES, TEXTS):
        row, of_row = rows[recipe], ratios.get((recipe, text))
        losses = value(row, text, "losses")
        estimate = perplexity_interval(losses, _predictions(row, text)) if losses else None
        cells = [NAMES[recipe], TEXTS[text], figure(value(row, text), row)]
        cells.append(f"{figure(estimate.low)} to {figure(estimate.high)}" if estimate else "–")
        cells.append(f"{of_row.value:.3f} ({of_row.low:.3f} to {of_row.high:.3f})" if of_row else "–")
        cells.append(f"{adjusted[recipe, text]:.2g}" if of_row else "–")
        lines.append(cells)
    heads = ["`recipe`, 50 %", "text", "perplexity", "95 % interval", "ratio to the recipe above", "p (Holm)"]
    return table(heads, lines, left=2)


def _predictions(row: Row | None, text: str) -> list[int]:
    losses = value(row, text, "losses") or []
    return [value(row, text, "length") - 1] * len(losses)


def spread() -> str:
    """Return the lowest and the highest perplexity over the seeds of calibrations, of both models on both texts."""
    first, others = measured("recipes"), measured("spread")
    lines = []
    for model, row in product(MODEL_NAMES, SEEDED):
        of_seeds = [first.get(" ".join((model, *row))), *(others.get(" ".join((model, seed, *row))) for seed in SEEDS)]
        if all(of_seeds):
            mark = MARK * any(is_old(one) for one in of_seeds if one)
            cells = [" ".join((MODEL_NAMES[model], *row)).replace("%", " %")]
            for text in TEXTS:
                values = [value(one, text) for one in of_seeds]
                cells.append(f"{figure(min(values))} to {figure(max(values))}" + mark)
            lines.append(cells)
    return table(["three seeds", *(f"perplexity, {name}" for name in TEXTS.values())], lines) if lines else NOTHING


def of_rows(name: str) -> str:
    """Return perplexity and divergence of a file's rows on each of its texts, and the mean accuracy where tasks are."""
    rows, lines = measured(name), []
    texts = dict.fromkeys(text for row in rows.values() for text in row["value"] if text in (*TEXTS, *UNSEEN))
    answers = any("tasks" in row["value"] for row in rows.values())
    for key, row in rows.items():
        cells = [key.replace("%", " %")]
        for text in texts:
            divergence = value(row, text, "divergence")
            shown = "–" if divergence is None else f"{divergence['mean']:.3f}"
            cells.append(f"{figure(value(row, text))}, {shown}" + MARK * is_old(row))
        if answers:
            accuracy = mean(task["acc"] for task in row["value"]["tasks"].values())
            cells.append(f"{100 * accuracy:.1f}" + MARK * is_old(row))
        lines.append(cells)
    heads = [f"{TEXTS.get(text, text)}: perplexity, divergence" for text in texts]
    return table(["row", *heads, *["mean accuracy, %"] * answers], lines) if lines else NOTHING


def seconds() -> str:
    """Return how long each recipe takes."""
    rows = {recipe: measured("recipes")[f"{SMALL} {recipe} 50% seconds"] for recipe in RECIPES}
    lines = [[NAMES[key], f"{sum(row['value'].values()):.0f}" + MARK * is_old(row)] for key, row in rows.items()]
    return table(["`recipe`", "`mask` and `apply`, s"], lines)


def times() -> str:
    """Return the benchmarks that have a baseline, with the words of this script."""
    lines = []
    for row, words in ((measured("peers")[key], words) for key, words in TIMES.items()):
        seconds = (row["value"][name] for name in ("ours_s", "baseline_s"))
        lines.append([words, *(f"{one:,.0f}" + MARK * is_old(row) for one in seconds)])
    return table(["SmolLM2-135M", "wanda-dvc, s", "baseline, s"], lines)


def goals() -> str:
    """Return the missed goals, with what was measured; the files have all goals."""
    lines = []
    for file in ("peers", "memory"):
        for key, row in measured(file).items():
            if not (found := row["value"])["met"]:
                ratio = f"{found['ratio' if file == 'peers' else 'share']:.3g}"
                lines.append([key, found["goal"], ratio + MARK * is_old(row)])
    for name, row, _, gap, goal in from_authors():
        if abs(gap) > goal:
            lines.append([f"{name}, as the authors' code", f"{goal} %", f"{abs(gap):.2f} %" + MARK * is_old(row)])
    return table(["missed", "goal", "measured"], lines, left=2)


def memory() -> str:
    """Return the peaks of the stages on random models, above the memory of the libraries."""
    lines = dict[str, list[str]]()
    for shape, row in ((key.partition(": ")[0], row) for key, row in measured("memory").items()):
        peak, bound = (f"{row['value'][name] / 1e9:.2f}" for name in ("peak", "bound"))
        lines.setdefault(shape, []).append(f"{peak} of {bound}" + MARK * is_old(row))
    heads = [f"`{stage}`" for stage in ("calibrate", "mask", "apply", "perplexity")]
    return table(["GB, measured of estimated", *heads], [[shape, *cells] for shape, cells in lines.items()])


def by_text() -> str:
    """Return both measures on both texts: of the dense model, of pruned models, and of these trained ever longer."""
    rows = measured("recipes")
    lines = [["dense", *_from_to([rows[f"{SMALL} dense"]])]]
    short = [tokens for tokens in TOKENS if tokens != LONGER]
    for model, row, lengths in product((SMALL, GEMMA), MODELS, (short, [LONGER])):
        untrained = " ".join((model, *row))
        trained = [tokens for tokens in lengths if f"{untrained} {tokens}" in rows]
        is_alone = (
            model == SMALL and lengths is short and rows.get(untrained, {}).get("value", {}).keys() >= TEXTS.keys()
        )
        if trained or is_alone:
            steps = [rows[untrained], *(rows[f"{untrained} {tokens}"] for tokens in trained)]
            title = untrained.removeprefix(f"{SMALL} ").replace(GEMMA, "Gemma").replace("%", " %")
            lines.append([f"{title}, {LONGER}" if LONGER in trained else title, *_from_to(steps)])
    return table(["model", *(f"{measure}, {TEXTS[text]}" for text, measure in MEASURES)], lines)


def _from_to(steps: Sequence[Row]) -> list[str]:
    """Return the measures of some models, each as one cell: from the first model to the last."""
    mark, cells = MARK * any(map(is_old, steps)), []
    for text, measure in MEASURES:
        values = [value(step, text, measure) for step in steps]
        shown = [f"{one['mean']:.3f}" if isinstance(one, dict) else figure(one) for one in values]
        cells.append(" → ".join(shown) + mark * (shown != ["–"]))
    return cells


def from_authors() -> Iterator[tuple[str, Row, float, float, float]]:
    """Yield what was compared with the authors' code: its name, our row, their perplexity, and gap and goal in %."""
    rows = measured("recipes")
    for (recipe, amount), (by_hand, goal) in AUTHORS.items():
        method = recipe.removesuffix("-paper").removesuffix("-rows")
        theirs = value(measured("authors").get(f"{SMALL} {method} {amount}")) or by_hand
        row = rows.get(f"{SMALL} {recipe} {amount}")
        if row and theirs:
            yield f"{recipe} {amount}".replace("%", " %"), row, theirs, 100 * (value(row) / theirs - 1), goal


def authors() -> str:
    """Return the papers' procedures next to the authors' code."""
    lines = []
    for name, row, theirs, gap, _ in from_authors():
        apart = f"{gap:+.2f} %".replace("-", "−").replace("+0.00", "0.00")
        lines.append([name, figure(value(row), row), figure(theirs), apart])
    return table(["recipe", "ours", "authors' code", "difference"], lines)


def runtimes(files: Sequence[str] = ()) -> str:
    """Return the files of llama.cpp, all or some; rounding can make a zero negative."""
    rows = measured("runtimes")
    lines = []
    for key in files or rows:
        row = rows[key]["value"]
        speeds = (f"{speed:.0f}" for speed in row["tokens a second"].values())
        name, kind = key.replace("%", " %").rsplit(" ", 1)
        lines.append([name, kind, f"{row['bytes'] / 1e6:.0f}", f"{abs(row['divergence']['mean']):.3f}", *speeds])
    model = "model" + MARK * any(map(is_old, rows.values()))
    return table([model, "format", "MB", "divergence", "prompt, tokens/s", "generation, tokens/s"], lines, left=2)


def gpu(rows: dict[str, Row]) -> str:
    """Return the times and the checks of a GPU: the rows of benchmarks/gpu.json."""
    if not rows:
        return "No GPU has been measured yet."
    stages, checks, speeds = [], [], []
    for name, row in rows.items():
        kind, _, what = name.partition(": ")
        found, mark = row["value"], MARK * is_old(row)
        if kind == "stage":
            share = f"{100 * found['share']:.0f} %" if found["share"] else "–"
            peaks = f"{found['peak'] / 1e9:.1f} of {found['needed'] / 1e9:.1f}"
            stages.append([what, f"{found['seconds']:.1f}" + mark, peaks, share])
        elif kind == "check":
            met = "yes" if found["met"] else "**no**"
            checks.append([what, f"{found['measured']:.2g}" + mark, f"{found['bound']:.2g}", met])
        else:
            speeds.append(f"{name}: {found['tflops']:.1f} TFLOP/s")
    heads = ["stage, 32 blocks", "seconds", "GPU memory, GB, of least", "share of the product's speed"]
    origin = next(iter(rows.values()))["origin"]
    tables = [table(heads, stages), table(["check", "measured", "bound", "met"], checks)]
    return "\n\n".join([f"{origin['protocol']}, {origin['date']}; {'; '.join(speeds)}.", *tables])


def demo() -> str:
    """Return what the demo prints."""
    row = measured("demo")["printed"]
    return f"```text\n{row['value']}```" + "\n\n¹ Measured with older code." * is_old(row)


TABLES: dict[str, Callable[[], str]] = {  # by the names of their places in the documents
    "demo": demo, "readme": first_results, "smaller": lambda: runtimes(FIRST_FILES), "recipes": by_recipe,
    "texts": by_text, "seconds": seconds, "times": times, "goals": goals, "memory": memory, "authors": authors,
    "intervals": intervals, "spread": spread, "runtimes": runtimes, "gpu": lambda: gpu(measured("gpu")),
    "floors": floors.table, **{name: partial(of_rows, name) for name in ("breadth", "sizes", "blocks")},
}  # fmt: skip


def written(text: str) -> str:
    """Return a document with the current figures between its markers."""
    return PLACE.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[4]}", text)


if __name__ == "__main__":
    for path in (ROOT / document for document in DOCUMENTS):
        path.write_text(written(path.read_text(encoding="utf-8")), encoding="utf-8")
