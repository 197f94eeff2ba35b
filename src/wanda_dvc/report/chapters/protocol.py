"""The chapter on how a section's rows were measured and calibrated."""

from typing import Any

from wanda_dvc.report.pages import Content, Items, code, literal
from wanda_dvc.report.section import Section


def content(section: Section) -> Content:
    """The settings of evaluation, and those of calibration where all rows have the same."""
    settings = section.settings
    windows = "all" if settings["perplexity.windows"] is None else f"the first {settings['perplexity.windows']}"
    limit = settings["zero_shot.limit"]
    texts = [
        f"Perplexity: {windows} windows of {settings['perplexity.length']} tokens of "
        f"{_text(settings, 'perplexity')}, rest {settings['perplexity.rest']}; {settings['dtype']}.",
        f"Zero-shot: {literal(', '.join(section.tasks)) or 'no tasks'}; "
        f"{f'the first {limit} items' if limit else 'all items'}, no "
        "examples in the prompt.",
    ]
    if section.tasks and settings["tasks.source"] == "embedded":
        texts.append(
            "The tasks are samples written for wanda-dvc, not the benchmarks: they compare these models and nothing "
            "else."
        )
    if not any(key.startswith("calibration.") for key in section.varying):
        texts.append(
            f"Calibration: {settings['calibration.samples']} windows of {settings['calibration.length']} tokens of "
            f"{_text(settings, 'calibration')}, seed {settings['calibration.seed']}."
        )
    if "propagation" not in section.varying:
        texts.append(f"`propagation: {settings['propagation']}`.")
    return [Items(texts)]


def _text(settings: dict[str, Any], part: str) -> str:
    """The source of a text, and its split where it has splits."""
    name, split = settings[f"{part}.text.source"], settings[f"{part}.text.split"]
    return code(name) + (f", {split}" if split else "")
