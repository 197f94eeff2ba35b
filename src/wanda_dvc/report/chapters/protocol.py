"""The chapter on how a section's rows were measured and calibrated."""

from typing import Any

from wanda_dvc.params import ALL
from wanda_dvc.report.pages import Content, bullets
from wanda_dvc.report.section import Section
from wanda_dvc.study.markup import inline


def content(section: Section) -> Content:
    """The settings of evaluation, and those of calibration where all rows have the same."""
    settings = section.settings
    wanted, limit = settings["perplexity.windows"], settings["zero_shot.limit"]
    windows = {None: "all whole windows", ALL: "all tokens, in windows"}.get(wanted, f"the first {wanted} windows")
    texts = [
        f"Perplexity: {windows} of {settings['perplexity.length']} tokens of {_text(settings, 'perplexity')}; "
        f"{settings['dtype']}.",
        f"Zero-shot: {inline(', '.join(section.tasks)) if section.tasks else 'no tasks'}; "
        f"{f'the first {limit} items' if limit else 'all items'}, no examples in the prompt.",
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
    return [bullets(texts)]


def _text(settings: dict[str, Any], part: str) -> str:
    """The source of a text, and its split where it has splits."""
    name, split = settings[f"{part}.text.source"], settings[f"{part}.text.split"]
    return inline(name) + (f", {inline(split)}" if split else "")
