"""The chapter on the evaluation and calibration of a section's rows."""

from typing import Any

from wanda_dvc.params import ALL
from wanda_dvc.report.formatting import setting
from wanda_dvc.report.pages import Content, bullets
from wanda_dvc.report.section import Section
from wanda_dvc.study.markup import inline


def content(section: Section) -> Content:
    """Return the settings of evaluation, and the settings of calibration if all rows share them."""
    settings = section.settings
    wanted, limit = settings["perplexity.windows"], section.rows[0].params.items
    windows = {None: "all complete windows", ALL: "all tokens, in windows"}.get(wanted, f"the first {wanted} windows")
    one_calibration = not any(key.startswith("calibration.") for key in section.varying)
    texts = [
        *(_perplexity(section, text, windows, one_calibration) for text in section.texts),
        f"Zero-shot: {inline(', '.join(section.tasks)) if section.tasks else 'no tasks'}; "
        f"{f'the first {limit} items' if limit else 'all items'}, no examples in the prompt.",
    ]
    if section.tasks and settings["tasks.source"] == "embedded":
        texts.append(
            "The tasks are samples written for wanda-dvc, not the benchmarks: they compare these models and nothing "
            "else."
        )
    if one_calibration:
        texts.append(
            f"Calibration: {settings['calibration.windows']} windows of {settings['calibration.length']} tokens of "
            f"{_text(settings, 'calibration.text')}, seed {settings['calibration.seed']}."
        )
    return [bullets(texts)]


def _perplexity(section: Section, text: str, windows: str, one_calibration: bool) -> str:
    """Describe the windows of a text."""
    row = next(row for row in section.rows if text in row.params.perplexity.texts)
    name = f" on {inline(text)}" if len(section.texts) > 1 else ""
    source = _text(row.settings, f"perplexity.texts.{text}")
    said = f"Perplexity{name}: {windows} of {row.params.perplexity.length} tokens of {source}; {row.params.dtype}."
    return said + (f" {row.params.about_text(text)}." if one_calibration else "")


def _text(settings: dict[str, Any], text: str) -> str:
    """Return the source of a text, and its split, if any."""
    name, split = settings[f"{text}.source"], settings[f"{text}.split"]
    return inline(setting(name)) + (f", {inline(split)}" if split else "")
