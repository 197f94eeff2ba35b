"""The chapter on how a section's rows were measured and calibrated."""

from wanda_dvc.report.pages import Content, Items, code, literal
from wanda_dvc.report.section import Section


def content(section: Section) -> Content:
    """The settings of evaluation, and those of calibration where all rows have the same."""
    settings = section.settings
    windows = "all" if settings["perplexity.windows"] is None else f"the first {settings['perplexity.windows']}"
    limit = settings["zero_shot.limit"]
    texts = [
        f"Perplexity: {windows} windows of {settings['perplexity.length']} tokens of "
        f"{code(settings['perplexity.text.source'])}, {settings['perplexity.text.split']}, rest "
        f"{settings['perplexity.rest']}; {settings['dtype']}.",
        f"Zero-shot: {literal(', '.join(section.tasks)) or 'no tasks'}; "
        f"{f'the first {limit} items' if limit else 'all items'}, no "
        "examples in the prompt.",
    ]
    if section.tasks and settings["tasks.source"] == "samples":
        texts.append(
            "The tasks are samples written for wanda-dvc, not the benchmarks: they compare these models and nothing "
            "else."
        )
    if not any(key.startswith("calibration.") for key in section.varying):
        texts.append(
            f"Calibration: {settings['calibration.samples']} windows of {settings['calibration.length']} tokens of "
            f"{code(settings['calibration.text.source'])}, {settings['calibration.text.split']}, seed "
            f"{settings['calibration.seed']}."
        )
    if "propagation" not in section.varying:
        texts.append(f"`propagation: {settings['propagation']}`.")
    return [Items(texts)]
