"""The chapter on what the models write: greedy continuations of the study's prompts."""

from wanda_dvc.report.formatting import DASH, percent
from wanda_dvc.report.measures import Continued, mean_repeated
from wanda_dvc.report.pages import Content, table
from wanda_dvc.report.section import Section
from wanda_dvc.study.markup import inline


def content(section: Section) -> Content:
    """A table of all models, and for each prompt the texts."""
    found = {section.name(row): row.pruned.continued(section.dense) for row in section.ordered}
    skipped = dict.fromkeys(
        f"{name}: skipped, {inline(reason)}."
        for name, model in section.models
        if (reason := model.continuations.get("skipped"))
    )
    written = {name: pairs for name, pairs in found.items() if pairs}
    if not written:
        return [*skipped] or ["Not measured: these results are of an earlier version of `zero-shot`."]
    any_pairs = next(iter(written.values()))
    most = max(pair.tokens for pairs in written.values() for pair in pairs)
    rows = [["dense", "", percent(mean_repeated(any_pairs, 0))]]
    rows += [
        [name, _equal(pairs), percent(mean_repeated(pairs, 1)) if pairs else DASH] for name, pairs in found.items()
    ]
    caption = (
        f"Greedy continuations, at most {most} tokens each: the number of tokens before the pruned model's "
        "continuation parts from the dense model's, prompt by prompt; and the percentage of 4-grams that occurred "
        "before in the same continuation, mean over prompts."
    )
    parts: Content = [*skipped, table(caption, ["", "equal tokens", "repeated 4-grams, %"], rows)]
    for number, pair in enumerate(any_pairs):
        texts = [["dense", inline(pair.dense)]]
        texts += [[name, inline(pairs[number].pruned)] for name, pairs in written.items()]
        parts.append(table(f"Prompt {number + 1}: {inline(pair.prompt)} …", ["", "continuation"], texts))
    return parts


def _equal(pairs: list[Continued]) -> str:
    return ", ".join(str(pair.equal) for pair in pairs) or DASH
