"""The chapter that summarizes each comparison in a sentence."""

from wanda_dvc.report.comparisons import Comparison, beyond_noise
from wanda_dvc.report.formatting import factor, percent, signed
from wanda_dvc.report.measures import mean_layer_error
from wanda_dvc.report.pages import Content, bullets
from wanda_dvc.report.section import Section
from wanda_dvc.results.inference import Estimate


def content(section: Section) -> Content:
    """A sentence for each comparison."""
    said = []
    by_text = {text: {one.rows: one for one in section.on(text).comparisons} for text in section.texts}
    for comparison in section.comparisons:
        names = section.names(comparison)
        parts = [
            _of_perplexity(found[comparison.rows], section.name(comparison.second), section.about(text))
            for text, found in by_text.items()
            if comparison.rows in found
        ]
        if mean := comparison.mean:
            parts.append(f"{signed(mean.value)} points of mean accuracy ({_noise(mean)} noise)")
        if comparison.second is None and (total := comparison.first.pruned.all_flips(section.dense, section.tasks)):
            parts.append(f"{percent(total.share)} % of the answers changed")
        if errors := _layer_errors(comparison):
            parts.append(errors)
        said.append(f"{names}: {'; '.join(parts)}.")
    return [bullets(said)]


def _of_perplexity(comparison: Comparison, other: str, text: str) -> str:
    on = text and f" on {text}"
    if comparison.first.pruned.diverged:
        return f"its perplexity{on} diverged"
    if comparison.second and comparison.second.pruned.diverged:
        return f"{other}'s perplexity{on} diverged, its own did not"
    if ratio := comparison.ratio:
        return f"{factor(ratio.value)} × the perplexity{on} ({_noise(ratio)} noise)"
    return f"perplexities{on} could not be compared window by window"


def _layer_errors(comparison: Comparison) -> str:
    """Return the mean layer errors of two rows, if Gram matrices exist."""
    rows = (comparison.first, comparison.second)
    own, other = (mean_layer_error(row.study) if row else None for row in rows)
    return "" if own is None or other is None else f"mean layer error {100 * own:.2f} % instead of {100 * other:.2f} %"


def _noise(test: Estimate) -> str:
    return "beyond" if beyond_noise(test) else "within"
