"""Measure what the kinds and the number of calibration texts change, on four texts: benchmarks/breadth.json.

    python benchmarks/breadth.py --mirror DIR --rows fisher 4-texts     the rows with all of these words
    python benchmarks/breadth.py --mirror DIR                           all; a day

WikiText-2 and the embedded text are of kinds that a calibration has seen; no calibration reads the novel or the news.
`texts.py` makes the texts, in `--texts`. Each calibration has a study of its own, in which its statistics are measured
once. The first study measures the dense model for all. Each row is written at once, and a run measures the rows that
are missing or of older code.
"""

from collections.abc import Iterator
from itertools import product
from pathlib import Path

from origin import HERE, Row, arguments, protocol
from recipes import SHARED, Comparison, Wanted, study_folder, update
from texts import make

from wanda_dvc.study.folder import Study

TARGET = HERE / "breadth.json"
PROTOCOL = "calibration N × 2048, as many of each text; evaluation 16 × 2048 of wikitext2, embedded, novel and news"
MODEL = "smollm2-135m"
LENGTH, MEASURED = 2048, 16  # tokens a window; windows of each text that is measured
CALIBRATIONS = {
    "1-text": ("wikitext2",),
    "2-texts": ("wikitext2", "docstrings"),
    "4-texts": ("wikitext2", "docstrings", "speeches", "emails"),
}
WINDOWS = {"32-windows": 32, "64-windows": 64}
FIRST, BROADEST = ("1-text", "32-windows"), ("4-texts", "64-windows")
UNSEEN = ("novel", "news")
PRUNED = (
    *product(("wanda", "wanda-refit", "admm", "fisher"), ("50%",)), ("fisher", "neurons 20%"), ("fisher", "blocks 4"),
    ("fisher", "50%", "200k"), ("fisher", "neurons 20%", "200k"),
)  # fmt: skip


def wanted() -> Iterator[Wanted]:
    """Yield all rows, those that most depends on first: model, texts, windows, recipe, amount, tokens of a recovery."""
    yield MODEL, "dense"
    for calibration in dict.fromkeys((FIRST, BROADEST, *product(CALIBRATIONS, WINDOWS))):
        yield from ((MODEL, *calibration, *pruned) for pruned in PRUNED)


def settings(calibration: str, windows: str, texts: Path) -> Row:
    """Return the settings of a study: the texts and windows that calibrate, and those that are measured."""
    wanted_windows = protocol(WINDOWS[windows], MEASURED, LENGTH, "wikitext2", "embedded")
    wikitext2 = wanted_windows["calibration"]["text"]
    sources = [wikitext2 if name == "wikitext2" else source(name, texts) for name in CALIBRATIONS[calibration]]
    wanted_windows["calibration"] |= {"text": sources if len(sources) > 1 else wikitext2, "statistics": "gram"}
    wanted_windows["perplexity"]["texts"] |= {name: source(name, texts) for name in UNSEEN}
    return wanted_windows


def source(name: str, texts: Path) -> Row:
    """Return the settings of a text of `texts.py`, made if it is missing."""
    return {"source": str(make(name, texts))}


class Breadth:
    """A study for each calibration; the first one measures the dense model for all."""

    def __init__(self, mirror: Path, work: Path, texts: Path) -> None:
        self.mirror, self.work, self.texts = mirror, work, texts
        self.studies: dict[Path, Comparison] = {}

    def measure(self, row: Wanted) -> Row:
        """Prune by a recipe after a calibration, and measure; of the dense model, return the first study's figures."""
        if "dense" in row:
            return self.study(*FIRST).measure(row)
        return self.study(row[1], row[2]).measure((MODEL, *row[3:]))

    def study(self, calibration: str, windows: str) -> Comparison:
        """Return the study of a calibration, prepared."""
        work = self.work / f"{calibration}-{windows}"
        if work not in self.studies:
            root = study_folder(work, MODEL)
            if (calibration, windows) != FIRST and not (root / "models/dense").is_dir():
                Study(root).link_to(self.study(*FIRST).study, *SHARED)
            wanted_settings = settings(calibration, windows, self.texts)
            self.studies[work] = Comparison(MODEL, self.mirror, work, wanted_settings)
        return self.studies[work]


def main() -> None:
    """Run the command line."""
    parser = arguments(__doc__, "breadth")
    parser.add_argument("--texts", type=Path, help="the folder of the texts; by default in --work")
    asked = parser.parse_args()
    work = asked.work.resolve()
    breadth = Breadth(asked.mirror.resolve(), work, (asked.texts or work / "texts").resolve())
    rows = [row for row in wanted() if set(asked.rows) <= set(row)]
    update(rows, TARGET, breadth.measure, protocol=PROTOCOL)


if __name__ == "__main__":
    main()
