"""Measured figures on the pages: tables are written from the rows, and sentences repeat them, or a page that they link.

A figure that is no result, such as a setting or a version, is listed with its reason.
"""

import math
import re
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import chain
from statistics import mean

import figures
import pytest
from conftest import ROOT
from page_blocks import without_blocks
from spread import SEEDS

from wanda_dvc.engine.memory import FIXED, ModelSizes
from wanda_dvc.stages.needs import TRAINING_WAYS, Conditions, training_memory
from wanda_dvc.study.folder import Study
from wanda_dvc.study.scaffold import new_params

README, BENCHMARKS = "README.md", "benchmarks/README.md"
RESULTS, SMALLER, PAPER, METHODS, LIMITS = (
    f"docs/{page}.md" for page in ("results", "smaller", "paper", "methods", "limits")
)
CONFIGS = ROOT / "tests/configs"
PARTS = {2: "half", 3: "a third", 4: "a quarter", 5: "a fifth", 6: "a sixth", 7: "a seventh"}
GENERATED = {"docs/settings.md", "docs/commands.md"}  # from the code
PAGES = [README, *sorted({f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} - GENERATED)]
GOALS = re.compile(r"([\d.]+) without 20 % of the neurons, ([\d.]+) for `fisher` at 50 %, ([\d.]+) for `wanda` at 2:4")
# A number with a unit of a result, or with decimals; not a part of a name, a version or an address.
FIGURE = re.compile(
    r"(?<![\w./=:-])(?:\d[\d,]*(?:\.\d+)?(?= (?:%|×|[GM]B\b|M\b|s\b|nats|minutes|hours|times\b))|\d[\d,]*\.\d+\b"
    r"|(?:two|three|four|five|six|seven|eight|nine|ten|a sixth|half)(?= (?:minutes|hours|times|of this rise)))"
)
VERSION = re.compile(r"(Python|Ray|before) \d\.\d+( (or|and) \d\.\d+)?|\(0\.\d+\.\d,?")
AMOUNTS = {"20", "30", "50", "70"}  # percent, of sparsity: a setting
# Figures that are no results of this project, by their page: definitions, settings, limits of scripts, published
# figures, and what was measured by hand.
GIVEN = {
    README: {"Intervals are 95 %"},
    "docs/compare.md": {"**interval**: 95 %", "p < 0.05"},
    LIMITS: {"a GPU in 15 minutes"},
    METHODS: {"up to ten times"},
    PAPER: {
        "needed 71 and 85 minutes for seven models each, on one L40S (48 GB)",
        "the dense model has 5.12",
        "by over 1 %",
    },
    RESULTS: {"the text four times"},
    SMALLER: {"up to 0.25", "noise is up to 14 %"},
}


def prose(page: str) -> list[str]:
    """The paragraphs and list items of a page, without tables, blocks and code."""
    text = figures.PLACE.sub("", without_blocks((ROOT / page).read_text(encoding="utf-8")))
    return [line for line in text.splitlines() if line and not line.startswith(("|", "<", " ", "#"))]


def linked(page: str, line: str) -> Iterator[str]:
    """The pages of this repository that a line links, as text."""
    for target in re.findall(r"\]\(([^)#]*)[^)]*\)", line):
        path = (ROOT / page).parent / target
        if target and path.suffix == ".md" and path.exists():
            yield path.read_text(encoding="utf-8")


@cache
def sentences() -> list[tuple[str, str]]:
    """Pages, and what their sentences repeat of the rows, or of a formula."""
    return [*chain(of_models(), of_other_code(), of_answers(), of_costs(), of_needs())]


def of_models() -> Iterator[tuple[str, str]]:
    rows = figures.measured("recipes")

    def perplexity(name: str, text: str = "wikitext2") -> float:
        return float(figures.value(rows[f"{figures.SMALL} {name}"], text))

    def change(name: str, of: str, text: str) -> float:
        """A perplexity, relative to another one, in percent."""
        return 100 * perplexity(name, text) / perplexity(of, text) - 100

    dense, fisher, wanda = map(perplexity, ("dense", "fisher 50%", "wanda 50%"))
    gemma = figures.value(rows[f"{figures.GEMMA} dense"])
    yield README, f"perplexity from {dense:.1f} to {fisher:.1f}"
    yield RESULTS, f"Dense: SmolLM2 {dense:.2f}, Gemma {gemma:.2f}"
    yield RESULTS, f"from Wanda's {wanda:.1f} to {fisher:.1f}, on 16 windows; the dense model has {dense:.1f}"
    others = figures.measured("spread")
    of_fisher = "Over three draws of the calibration's windows `fisher` has"
    for recipe, sentence in (("fisher", of_fisher), ("wanda", "and `wanda`")):
        drawn = [figures.value(others[f"{figures.SMALL} {seed} {recipe} 50%"]) for seed in SEEDS]
        every = (perplexity(f"{recipe} 50%"), *drawn)
        yield RESULTS, f"{sentence} {min(every):.1f} to {max(every):.1f}"
    half, more = ([-change(f"fisher {at}", f"wanda {at}", text) for text in figures.TEXTS] for at in ("50%", "70%"))
    yield RESULTS, f"by {half[0]:.0f} % on WikiText-2, and by {half[1]:.0f} % on the embedded text"
    yield RESULTS, f"at 70 %, by {more[0]:.0f} and {more[1]:.0f} %"
    yield README, f"by {half[0]:.0f} % on WikiText-2, and by {half[1]:.0f} % [on other text]"
    names = ("dense", "wanda-refit neurons 20%", "wanda-refit blocks 4")
    whole, narrow, shallow = (rows[f"{figures.SMALL} {name}"]["value"]["parameters"] / 1e6 for name in names)
    without = f"{narrow:.1f} M without 20 % of the neurons and {shallow:.1f} M without 4 of 30 blocks"
    yield RESULTS, f"{whole:.1f} M parameters, {without}"
    once = "wanda-refit neurons 20% 1M"
    same, other = (change(f"{once} longer text", once, text) for text in figures.TEXTS)
    yield RESULTS, f"is {-other:.0f} % lower than with `1M`, WikiText-2's {same:.1f} % higher"
    goals = GOALS.search((ROOT / BENCHMARKS).read_text(encoding="utf-8"))
    assert goals
    trained = (once, "fisher 50% 1M", "wanda 2:4 1M")
    over = [100 * perplexity(row) / float(goal) - 100 for row, goal in zip(trained, goals.groups(), strict=True)]
    yield BENCHMARKS, f"missed three goals on WikiText-2 by {min(over):.1f} to {max(over):.1f} %"
    fewer = "wanda-refit neurons 20%"
    here, there = (1 - change(f"{fewer} 200k", "dense", text) / change(fewer, "dense", text) for text in figures.TEXTS)
    parts = PARTS[round(1 / there)], PARTS[round(1 / here)]
    yield SMALLER, f"removes {parts[0]} of this rise, and {parts[1]} of the rise on WikiText-2"


def rounded_up(percent: float) -> float:
    """What a gap is within."""
    return math.ceil(10 * percent) / 10


def of_other_code() -> Iterator[tuple[str, str]]:
    """What the papers' authors have, and what their code has."""
    gaps = {name: abs(gap) for name, _, _, gap, _ in figures.from_authors()}
    half = max(gaps[f"{recipe} 50 %"] for recipe in ("wanda-paper", "sparsegpt-paper", "magnitude"))
    yield PAPER, f"within {rounded_up(half)} % of the authors' code at 50 %"
    yield PAPER, f"within [{rounded_up(gaps['sparsegpt-paper 50 %'])} % of their code]"
    yield PAPER, f"**{gaps['wanda-paper 50 %']:.1f} % at 50 %, more at 70 %**"
    yield PAPER, f"**{gaps['magnitude-rows 2:4']:.0f} % for magnitude at 2:4**"
    published = (ROOT / PAPER).read_text(encoding="utf-8")
    dense, *pruned = (5.114, 5.524, 6.415, 68.804)
    assert all(f" {one}" in published for one in (dense, *pruned))
    yield METHODS, f"from {dense:.2f} to {pruned[0]:.2f}, {pruned[1]:.2f} and {pruned[2]:.1f} with Wanda"


def of_answers() -> Iterator[tuple[str, str]]:
    """How many answers to questions changed, by the table of methods.md."""
    table = (ROOT / METHODS).read_text(encoding="utf-8")
    found = re.findall(r"^\| (?:30|50) % \|.* \| (0\.\d+) \| ([\d.]+) % \|$", table, flags=re.MULTILINE)
    (near, few), (far, many) = (tuple(map(float, row)) for row in found)
    said = f"changed {few:.0f} % of the benchmarks' answers at {near:.2f}, and {many} % at {far:.2f}"
    yield "docs/quickstart.md", said


def of_costs() -> Iterator[tuple[str, str]]:
    seconds = figures.measured("peers")["a further sparsity by dvc repro apply, against (a)"]["value"]
    yield README, f"[{seconds['ours_s']:.0f} s, where a plain script needs {seconds['baseline_s']:.0f} s]"
    met = [row["value"]["met"] for file in ("peers", "memory") for row in figures.measured(file).values()]
    yield BENCHMARKS, f"Of {len(met)} goals of speed and memory, {met.count(False)} were missed"
    rows = figures.measured("recipes")[f"{figures.SMALL} dense seconds"]["value"]
    norms = figures.measured("peers")["calibrate float32, share of the floor"]["value"]["ours_s"]
    gram, more = rows["norms"] + rows["gram"], rows["gradients"]
    costs = f"{norms:.0f} s for the norms, {gram:.0f} s with Gram matrices, {more:.0f} s more for gradients"
    yield RESULTS, f"`calibrate` comes first, once: {costs}"
    speeds = {name: row["value"]["tokens a second"] for name, row in figures.measured("runtimes").items()}
    gains = {
        kind: mean(
            speeds[f"{model} {file}"][kind] / speeds[f"dense {file}"][kind] - 1
            for model in ("neurons 20%", "neurons 20% 200k")
            for file in ("f16", "Q8_0", "Q4_K_M", "Q3_K_M")
        )
        for kind in ("prompt", "written")
    }
    yield SMALLER, f"generation is {100 * gains['written']:.0f} % faster on average of the eight files"
    assert abs(gains["prompt"]) < 0.05  # "prompt processing is not"
    imports = {row["value"]["imports"] / 1e9 for row in figures.measured("memory").values()}
    yield RESULTS, f"without the libraries' {mean(imports):.1f} GB"
    demo = figures.measured("demo")["needs"]["value"]
    yield README, f"The demo needs {demo['processor_seconds'] / 60:.0f} minutes of one core"
    yield README, f"keeps {demo['cache'] / 1e6:.0f} MB in"


def of_needs() -> Iterator[tuple[str, str]]:
    """What formulas say of memory."""
    _, checkpointed, low = training_gigabytes("llama-3.1-8b")
    yield LIMITS, f"`recover` needs {low:.0f} GB, or {checkpointed:.0f} GB to train in float32"
    fastest, _, low = training_gigabytes("gemma-3-270m")
    yield METHODS, f"{fastest:.0f} GB for Gemma 3 270M"
    yield METHODS, f"{low:.0f} GB for Gemma"
    gram = 8 * (3 * 4096**2 + 11008**2)  # float64, a matrix for each distinct input of a LLaMA-2-7B block
    yield "docs/workers.md", f"need {gram / 1e9:.1f} GB per block and chunk"


def training_gigabytes(model: str) -> list[float]:
    """What each way of training needs, the fastest first."""
    conditions = Conditions(Study(ROOT).with_params(new_params({})[0]), ModelSizes.read(CONFIGS / f"{model}.json"))
    return [(FIXED + training_memory(conditions, way)) / 1e9 for way in TRAINING_WAYS]


def uncovered(page: str, known: Sequence[str]) -> list[str]:
    """The figures of a page that neither a known sentence nor a linked page has."""
    missing = []
    for line in prose(page):
        words = re.sub(r"`[^`]*`|\]\([^)]*\)", lambda found: " " * len(found[0]), line)
        spans = [(start.start(), start.end()) for fragment in known for start in re.finditer(re.escape(fragment), line)]
        spans += [(found.start(), found.end()) for found in VERSION.finditer(line)]
        others = list(linked(page, line))
        for found in FIGURE.finditer(words):
            inside = any(start <= found.start() and found.end() <= end for start, end in spans)
            amount = found[0] in AMOUNTS and words[found.end() :].startswith(" %")
            if not (inside or amount or any(re.search(rf"(?<![\d.]){found[0]}(?![\d])", text) for text in others)):
                missing.append(f"{line[max(0, found.start() - 60) : found.end() + 30]}")
    return missing


def test_a_sentence_that_repeats_a_figure_has_the_measured_one():
    assert [one for one in sentences() if one[1] not in (ROOT / one[0]).read_text(encoding="utf-8")] == []


@pytest.mark.parametrize("page", PAGES)
def test_no_figure_of_a_page_is_without_a_source(page: str):
    known = [sentence for name, sentence in sentences() if name == page]
    assert uncovered(page, [*known, *GIVEN.get(page, ())]) == []


def test_a_figure_without_a_source_is_found(monkeypatch: pytest.MonkeyPatch):
    lines = ["It needs 12 minutes, 3.456 GB and 50 % zeros; [Python 3.11](docs/results.md) has `9.9`.", "By 0.97."]
    monkeypatch.setattr(sys.modules[__name__], "prose", lambda _: lines)
    found = uncovered(README, ["It needs 12 minutes"])
    assert [one.count("3.456") + 2 * one.count("0.97") for one in found] == [1, 2]


@pytest.mark.parametrize("page", figures.DOCUMENTS)
def test_the_tables_of_a_page_are_those_of_the_figures(page: str):
    """`python scripts/figures.py` writes them."""
    text = (ROOT / page).read_text(encoding="utf-8")
    assert figures.PLACE.search(text)
    assert figures.written(text) == text


def test_every_quantized_dense_model_diverges_less_than_every_smaller_model():
    means = {name: row["value"]["divergence"]["mean"] for name, row in figures.measured("runtimes").items()}
    dense = [mean for name, mean in means.items() if name.startswith("dense")]
    assert max(dense) < min(mean for name, mean in means.items() if not name.startswith("dense"))
