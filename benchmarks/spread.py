"""Measure how far the figures of `recipes.py` spread: other calibrations, and the complete test split: spread.json.

    python benchmarks/spread.py --mirror DIR --rows smollm2-135m seed-1     the rows with all of these words
    python benchmarks/spread.py --mirror DIR                                all; a day

`seed-1` and `seed-2` draw other windows for the calibration, and for a training. `all-windows` are those of the
complete test splits, for the cells of the README. The work folder is that of `recipes.py`, whose dense models and
pruned models are measured here too. Each row is written at once, and a run measures the rows that are missing or of
older code.
"""

from collections.abc import Iterator
from itertools import product
from pathlib import Path

from origin import HERE, Row, arguments, change_settings
from recipes import AMOUNTS, MODELS, SETTINGS, SHARED, Comparison, Wanted, study_folder, update

from wanda_dvc.study.folder import Study

TARGET = HERE / "spread.json"
SEEDS = {"seed-1": 1, "seed-2": 2}  # recipes.json has seed 0
ALL_WINDOWS = "all-windows"
SEEDED = (
    *product(("wanda", "wanda-refit", "admm", "fisher", "sparsegpt-paper", "wanda-paper"), ("50%", "2:4")),
    ("wanda", "70%"), ("fisher", "70%"), ("fisher", "neurons 20%"), ("fisher", "50%", "200k"),
)  # fmt: skip
README = ("magnitude-rows", "wanda", "wanda-refit", "admm", "fisher")


def wanted() -> Iterator[Wanted]:
    """Yield all rows, those that most depends on first: model, variant, recipe, amount, tokens of a recovery."""
    yield MODELS[0], ALL_WINDOWS, "dense"
    yield from ((MODELS[0], ALL_WINDOWS, recipe, amount) for recipe, amount in product(README, AMOUNTS))
    for seed, model, row in product(SEEDS, MODELS, SEEDED):
        if model == MODELS[0] or row[2:] == ():  # one training
            yield (model, seed, *row)


class Spread:
    """The study of each model by `recipes.py`, and its variants."""

    def __init__(self, mirror: Path, work: Path) -> None:
        self.mirror, self.work = mirror, work
        self.studies: dict[tuple[str, str], Comparison] = {}

    def measure(self, row: Wanted) -> Row:
        """Measure a row, by its variant."""
        model, variant, *pruned = row
        study = self.study(model, variant)
        if variant in SEEDS or pruned == ["dense"]:
            return study.measure((model, *pruned))
        first = self.study(model)
        if first.pruned != (model, *pruned):
            first.prune((model, *pruned))
        study.pruned = first.pruned
        recipe, amount = pruned
        sparsity, pattern = AMOUNTS[amount]
        change_settings(study.root / "params.yaml", {"recipe": recipe, "sparsity": sparsity, "pattern": pattern})
        study.stage("plan")
        return study.measure((model, *pruned))

    def study(self, model: str, variant: str = "") -> Comparison:
        """Return a model's study of a variant, prepared; "": that of `recipes.py`."""
        if (model, variant) in self.studies:
            return self.studies[model, variant]
        work, settings = self.work / variant, SETTINGS
        if variant:
            first, root = self.study(model).study, study_folder(work, model)
            shared = ("data", "models", "stats") if variant == ALL_WINDOWS else (*SHARED, "data/calibration")
            if not root.is_dir():
                Study(root).link_to(first, *shared)
        if variant == ALL_WINDOWS:
            settings = SETTINGS | {"perplexity": SETTINGS["perplexity"] | {"windows": None}}
        elif variant:
            settings = SETTINGS | {"calibration": SETTINGS["calibration"] | {"seed": SEEDS[variant]}}
        self.studies[model, variant] = Comparison(model, self.mirror, work, settings)
        return self.studies[model, variant]


def main() -> None:
    """Run the command line."""
    asked = arguments(__doc__, "recipes").parse_args()
    spread = Spread(asked.mirror.resolve(), asked.work.resolve())
    update((row for row in wanted() if set(asked.rows) <= set(row)), TARGET, spread.measure)


if __name__ == "__main__":
    main()
