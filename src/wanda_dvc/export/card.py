"""The special sections of an exported model's model card: its results, and how to reproduce it."""

from collections.abc import Iterator, Sequence

from wanda_dvc.reading import DIVERGED
from wanda_dvc.stages import MODELS
from wanda_dvc.study.card import table
from wanda_dvc.study.files import load_json
from wanda_dvc.study.markup import inline
from wanda_dvc.study.project import Project
from wanda_dvc.study.provenance import read_provenance
from wanda_dvc.study.repeat import how_to_repeat
from wanda_dvc.views.show import HEADERS, comparison, measured_apart, not_compared

REPRODUCE = """\
With wanda-dvc {version}, in a new study:

```
{commands}
```
{by_hand}"""


def results(study: Project, torn: Sequence[str] = ()) -> dict[str, str]:
    """Return the sections, by their titles.

    The study's `params` are those of the run. The inputs of `torn` stages have changed after the run.
    """
    commands, by_hand = how_to_repeat(study.params)
    version = read_provenance(study.masks, "mask")["wanda_dvc"]
    notes = "\n".join(f"- {note}" for note in _notes(study, torn))
    return {
        "Results": f"{table(HEADERS, comparison(study))}\n\n{notes}",
        "Reproduce": REPRODUCE.format(version=version, commands=commands, by_hand=by_hand).rstrip(),
    }


def _notes(study: Project, torn: Sequence[str]) -> Iterator[str]:
    """Return the explanation of the numbers."""
    params = study.params
    if torn:
        yield f"Stale when this card was written, because inputs had been made again: {', '.join(torn)}."
    if apart := measured_apart(study):
        yield f"{not_compared(apart)} The notes below are on the pruned model."
    protocols = [load_json(study.details(model, "perplexity")).get("protocol") for model in MODELS]
    if protocol := protocols[1] or protocols[0]:
        yield (
            f"Perplexity: {protocol['windows']} windows of {protocol['length']} tokens of "
            f"{inline(protocol['text']['source'])} (sha256 {protocol['text']['sha256'][:12]}…), {protocol['dtype']}."
        )
    if "divergence" in load_json(study.metrics("pruned", "perplexity")):
        yield (
            "Divergence: KL(dense ‖ pruned) of the predictions of each next token of the same windows, in nats; "
            "agreement: the share of positions where both models predict the same token. In brackets the 95 % "
            "interval over windows."
        )
    if any(load_json(study.metrics(model, "perplexity")).get("perplexity") == DIVERGED for model in MODELS):
        yield "`diverged`: the loss, or its exponential, was not finite."
    limit = params.zero_shot.limit
    yield (
        f"Zero-shot: no examples in the prompt, {f'the first {limit} items' if limit else 'all items'} of each task, "
        f"{params.dtype}; ± is one standard error, and a difference below two of them may be chance."
    )
    if params.tasks.source == "embedded":
        yield (
            "The tasks are samples, not benchmarks: questions written for wanda-dvc. They compare these two models "
            "only."
        )
    if any("–" in row[1:3] for row in comparison(study)[:-1]):
        yield "–: not measured on this model."
