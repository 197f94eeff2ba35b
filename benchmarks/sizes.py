"""Measure smaller models of three sizes, the choice and the best of one pattern each: benchmarks/sizes.json.

    python benchmarks/sizes.py --mirror DIR --rows smollm2-135m 80%     the rows with all of these words
    python benchmarks/sizes.py --mirror DIR                             all; a day

`chosen` is what `wanda-dvc prune --size` chooses, with all its candidates. The other rows remove blocks, heads or
neurons alone, as many as the candidate of that pattern does, so that all have at most the size. Each is measured as
pruned and after a training, by the protocol of `recipes.py`. Each row is written at once, and a run measures the rows
that are missing or of older code.
"""

from collections.abc import Iterator
from itertools import product

from origin import HERE, Row, arguments, is_old, read_rows
from recipes import MODELS, Comparison, Wanted, update

from wanda_dvc.study.artifact import read_provenance

TARGET = HERE / "sizes.json"
SIZES = {"90%": 0.1, "80%": 0.2, "70%": 0.3}  # of the dense model's parameters, and what goes
CHOSEN = "chosen"
PATTERNS = ("neurons", "heads", "blocks")
TOKENS = "200k"


def wanted() -> Iterator[Wanted]:
    """Yield all rows: model, what goes, size, and of a recovery its tokens. What is chosen comes first."""
    for model, size in product(MODELS, SIZES):
        for kind, tokens in product((CHOSEN, *PATTERNS), ((), (TOKENS,))):
            yield (model, kind, size, *tokens)


def changes_of(row: Wanted, rows: dict[str, Row]) -> Row | None:
    """Return the settings of a row; None if no candidate of its size has the pattern alone."""
    model, kind, size, *_ = row
    if kind == CHOSEN:
        return {"recipe": "fisher", "pattern": "smaller", "sparsity": SIZES[size]}
    chosen = rows.get(f"{model} {CHOSEN} {size}")
    if chosen is None or is_old(chosen):
        raise SystemExit(f"{model} {kind} {size}: the row `{CHOSEN}` is missing or old; measure it first")
    for candidate in chosen["value"]["candidates"]:
        kept = {pattern: [*map(int, candidate[pattern].split("/"))] for pattern in PATTERNS if pattern in candidate}
        if [pattern for pattern, (stay, total) in kept.items() if stay < total] == [kind]:
            stay, total = kept[kind]
            return {"recipe": "fisher", "pattern": kind, "sparsity": round(1 - stay / total, 6)}
    return None


def main() -> None:
    """Run the command line."""
    asked = arguments(__doc__, "sizes").parse_args()
    studies: dict[str, Comparison] = {}

    def measure(row: Wanted) -> Row | None:
        changes = changes_of(row, read_rows(TARGET))
        if changes is None:
            return None
        if row[0] not in studies:
            studies[row[0]] = Comparison(row[0], asked.mirror.resolve(), asked.work.resolve())
        value = studies[row[0]].measure(row, changes)
        if row[1] == CHOSEN:
            value["candidates"] = read_provenance(studies[row[0]].study.masks, "mask")["candidates"]
        return value

    update((row for row in wanted() if set(asked.rows) <= set(row)), TARGET, measure)


if __name__ == "__main__":
    main()
