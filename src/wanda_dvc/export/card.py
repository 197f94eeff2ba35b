"""The special sections of an exported model's model card: its results, and how to reproduce it."""

from collections.abc import Iterator, Sequence

from wanda_dvc.reading import DIVERGED
from wanda_dvc.report.measures import Measured
from wanda_dvc.stages import MODELS
from wanda_dvc.study.card import table
from wanda_dvc.study.files import load_json
from wanda_dvc.study.markup import inline
from wanda_dvc.study.project import Project
from wanda_dvc.study.provenance import read_provenance
from wanda_dvc.study.repeat import how_to_repeat
from wanda_dvc.views.show import FLIPS, HEADERS, comparison, flips, measured_apart, not_compared

REPRODUCE = """\
With wanda-dvc {version}, in a new study:

```
{commands}
```
{by_hand}"""


def results(study: Project, outdated: Sequence[str] = ()) -> dict[str, str]:
    """Return the sections, by their titles.

    The study's `params` are those of the run. The inputs of `outdated` stages have changed after the run.
    """
    commands, by_hand = how_to_repeat(study.params)
    version = read_provenance(study.masks, "mask")["wanda_dvc"]
    notes = "\n".join(f"- {note}" for note in _notes(study, outdated))
    changed = flips(study)
    tables = [table(HEADERS, comparison(study)), *([table(FLIPS, changed)] if changed else [])]
    return {
        "Results": "\n\n".join([*tables, notes]),
        **_continuations(study),
        "Reproduce": REPRODUCE.format(version=version, commands=commands, by_hand=by_hand).rstrip(),
    }


def _continuations(study: Project) -> dict[str, str]:
    """Return the section on what the models write; empty without comparable continuations."""
    dense, pruned = (Measured.of(study, model) for model in MODELS)
    pairs = pruned.continued(dense)
    skipped = [
        f"The {name} model's were skipped: {inline(reason)}."
        for name, model in zip(MODELS, (dense, pruned), strict=True)
        if (reason := model.continuations.get("skipped"))
    ]
    if not pairs:
        return {"Continuations": " ".join(skipped)} if skipped else {}
    rows = [
        [inline(one.prompt), inline(one.dense), inline(one.pruned), str(one.equal), _shares(one.repeated)]
        for one in pairs
    ]
    about = (
        f"Greedy continuations, at most {max(one.tokens for one in pairs)} tokens: the two models' are equal for the "
        "given number of tokens. Repeated 4-grams occurred before in the same continuation (dense, pruned)."
    )
    headers = ["prompt", "dense", "pruned", "equal tokens", "repeated 4-grams"]
    return {"Continuations": f"{about}\n\n{table(headers, rows)}"}


def _shares(repeated: tuple[float, float]) -> str:
    return ", ".join(f"{100 * share:.0f} %" for share in repeated)


def _notes(study: Project, outdated: Sequence[str]) -> Iterator[str]:
    """Return the explanation of the numbers."""
    params = study.params
    if outdated:
        yield f"Stale at the time of this export, because their inputs had changed: {', '.join(outdated)}."
    if apart := measured_apart(study):
        yield f"{not_compared(apart)} The notes below are on the pruned model."
    texts = list(params.perplexity.texts)
    for text in texts:
        protocols = [load_json(study.details(model, f"perplexity/{text}")).get("protocol") for model in MODELS]
        if protocol := protocols[1] or protocols[0]:
            yield (
                f"Perplexity{f' on {inline(text)}' if len(texts) > 1 else ''}: {protocol['windows']} windows of "
                f"{protocol['length']} tokens of {inline(protocol['text']['source'])} "
                f"(sha256 {protocol['text']['sha256'][:12]}…), {protocol['dtype']}. {params.about_text(text)}."
            )
    metrics = {model: [load_json(study.metrics(model, f"perplexity/{text}")) for text in texts] for model in MODELS}
    if any("divergence" in one for one in metrics["pruned"]):
        yield (
            "Divergence: KL(dense ‖ pruned) of the predictions of each next token of the same windows, in nats; "
            "agreement: the share of positions where both models predict the same token. In brackets the 95 % "
            "interval over windows."
        )
    if any(one.get("perplexity") == DIVERGED for of in metrics.values() for one in of):
        yield "`diverged`: the loss, or its exponential, was not finite."
    limit = params.items
    yield (
        f"Zero-shot: no examples in the prompt, {f'the first {limit} items' if limit else 'all items'} of each task, "
        f"{params.dtype}; ± is one standard error, and a difference below two of them may be chance."
    )
    if flips(study):
        yield "Changed answers: p is that of McNemar's exact test on right → wrong against wrong → right."
    if params.tasks.source == "embedded":
        yield (
            "The tasks are samples, not benchmarks: questions written for wanda-dvc. They compare these two models "
            "only."
        )
    if any("–" in row[1:3] for row in comparison(study)[:-1]):
        yield "–: not measured on this model."
