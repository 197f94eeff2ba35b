"""Compare choices of blocks to remove, before and after a training, with five tasks: benchmarks/blocks.json.

    python benchmarks/blocks.py --mirror DIR --rows gemma-3-270m measured     the rows with all of these words
    python benchmarks/blocks.py --mirror DIR                                  all; hours

`measured` is what `pattern: blocks` chooses; the other choices are given, and compete with no neighbours. All have the
same repair, training and measures: the protocol of `recipes.py`, and the first questions of each task. Each row is
written at once, and a run measures the rows that are missing or of older code.
"""

from collections.abc import Iterator, Sequence
from itertools import product

from origin import HERE, Row, arguments
from recipes import MODELS, PROTOCOL, SETTINGS, Comparison, Wanted, model_of, stages_of, update

from wanda_dvc.engine.depth import DepthChoice
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
        if "dense" not in row:
            self.given = GIVEN[row[0]].get(row[1], ())
            sparsity = round(int(row[2].removeprefix("blocks ")) / BLOCKS[row[0]], 6)
            changes = {"recipe": "fisher", "pattern": "blocks", "sparsity": sparsity}
        value, model = super().measure(row, changes), model_of(row)
        if not self.study.data("tasks").is_dir():
            self.stage("download", "tasks")
        self.stage("zero-shot", model)
        return value | {"tasks": load_json(self.study.metrics(model, "zero_shot"))}


def choices_of(removed: Sequence[int], blocks: int) -> Row:
    """Return choices of one, two and more of these blocks, as `calibrate` writes them.

    `mask` tries no neighbours beside them, as if the predictions without each block were not finite.
    """
    choices = [DepthChoice(removed[: number + 1], 0.0, [None] * blocks) for number in range(len(removed))]
    return {"choices": [choice._asdict() for choice in choices]}


def main() -> None:
    """Run the command line."""
    asked = arguments(__doc__, "blocks").parse_args()
    studies: dict[str, Chosen] = {}
    tasks = {"tasks": {"source": "benchmark", "limit": QUESTIONS}}  # the names are those of params.yaml

    def measure(row: Wanted) -> Row:
        if row[0] not in studies:
            studies[row[0]] = Chosen(row[0], asked.mirror.resolve(), asked.work.resolve(), SETTINGS | tasks)
        return studies[row[0]].measure(row)

    rows = (row for row in wanted() if set(asked.rows) <= set(row))
    update(rows, TARGET, measure, protocol=PROTOCOL_OF_TASKS, stages=lambda row: (*stages_of(row), "zero-shot"))


if __name__ == "__main__":
    main()
