"""Compare choices of blocks to remove, before and after a training, with five tasks: benchmarks/blocks.json.

    python benchmarks/blocks.py --mirror DIR --rows gemma-3-270m measured     the rows with all of these words
    python benchmarks/blocks.py --mirror DIR                                  all; hours

`measured` is what `pattern: blocks` chooses; the other choices are given. All have the same repair, training and
measures: the protocol of `recipes.py`, and the first questions of each task. Each row is written at once, and a run
measures the rows that are missing or of older code.
"""

import time
from collections.abc import Iterator, Sequence
from itertools import product

from origin import HERE, Row, arguments, is_old, origin, read_rows, write_row
from recipes import MODELS, PROTOCOL, SETTINGS, STAGES, Comparison, Wanted

from wanda_dvc.engine.depth import no_choice
from wanda_dvc.study.files import load_json, write_json

TARGET = HERE / "blocks.json"
MEASURED, TOKENS, QUESTIONS = "measured", "200k", 200
SMALL, GEMMA = MODELS
BLOCKS = {SMALL: 30, GEMMA: 18}
# By model and name: the removed blocks.
GIVEN: dict[str, dict[str, Sequence[int]]] = {
    SMALL: {},
    GEMMA: {
        "neighbours": (14, 15, 16, 17),  # those with the least divergence
        "influence": (8, 9, 14, 17),  # by the angle between a block's input and output
        "rearchitecting": (8, 9, 14, 16),  # peremartra/Rearchitecting-LLMs at 79bc123, chapter 6, experiment 1
    },
}
NUMBERS = {SMALL: (2, 4), GEMMA: (4,)}
PROTOCOL_OF_TASKS = f"{PROTOCOL}; the first {QUESTIONS} questions of each task"


def wanted() -> Iterator[Wanted]:
    """Yield all rows: model, choice, blocks, and of a recovery its tokens."""
    for model in MODELS:
        yield model, "dense"
        for choice, number in product((MEASURED, *GIVEN[model]), NUMBERS[model]):
            yield from ((model, choice, f"blocks {number}", *tokens) for tokens in ((), (TOKENS,)))


class Chosen(Comparison):
    """A study whose choices of blocks may be given, and which answers tasks."""

    given: Sequence[int] = ()  # the blocks to remove; none: those of `calibrate`
    measured: Row | None = None  # the choices of `calibrate`

    def stage(self, *words: str) -> float:
        """Run a stage; before `mask`, write the choices that it reads."""
        choices = self.study.blocks / "choices.json"
        if words == ("mask",):
            self.measured = self.measured or load_json(choices)
            blocks = len(self.measured["choices"][0]["rises"])
            write_json(choices, choices_of(self.given, blocks) if self.given else self.measured)
        return super().stage(*words)

    def measure(self, row: Wanted, changes: Row | None = None) -> Row:
        """Prune and measure, tasks too."""
        self.given = GIVEN[row[0]].get(row[1], ())
        value = super().measure(row, changes)
        model = "dense" if "dense" in row else "recovered" if row[3:] else "pruned"
        if not self.study.data("tasks").is_dir():
            self.stage("download", "tasks")
        self.stage("zero-shot", model)
        return value | {"tasks": load_json(self.study.metrics(model, "zero_shot"))}


def choices_of(removed: Sequence[int], blocks: int) -> Row:
    """Return choices of one, two and more of these blocks, as `calibrate` writes them."""
    first = no_choice(blocks)._asdict()
    return {"choices": [first | {"removed": [*removed[: number + 1]]} for number in range(len(removed))]}


def main() -> None:
    """Run the command line."""
    asked = arguments(__doc__, "blocks").parse_args()
    studies: dict[str, Chosen] = {}
    tasks = {"tasks": {"source": "benchmark", "limit": QUESTIONS}}  # the names are those of params.yaml
    for row in (row for row in wanted() if set(asked.rows) <= set(row)):
        name, known = " ".join(row), read_rows(TARGET).get(" ".join(row))
        if known and not is_old(known):
            continue
        model = row[0]
        if model not in studies:
            studies[model] = Chosen(model, asked.mirror.resolve(), asked.work.resolve(), SETTINGS | tasks)
        made = origin(PROTOCOL_OF_TASKS, (*STAGES, *["recover"] * len(row[3:]), "zero-shot"))
        changes = None
        if "dense" not in row:
            number = int(row[2].removeprefix("blocks "))
            changes = {"recipe": "fisher", "pattern": "blocks", "sparsity": round(number / BLOCKS[model], 6)}
        write_row(TARGET, name, studies[model].measure(row, changes), made)
        print(f"[{time.strftime('%H:%M:%S')}] {name}: {read_rows(TARGET)[name]['value']}", flush=True)


if __name__ == "__main__":
    main()
