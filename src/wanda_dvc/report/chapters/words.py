"""The chapter that says each comparison in a sentence."""

from wanda_dvc.report.comparisons import Comparison, beyond_noise
from wanda_dvc.report.formatting import factor, signed
from wanda_dvc.report.measures import pruned
from wanda_dvc.report.pages import Content, Items
from wanda_dvc.report.section import Section


def content(section: Section) -> Content:
    """A sentence for each comparison."""
    said = []
    for comparison in section.comparisons:
        one, other = section.names(comparison)
        parts = [_of_perplexity(comparison, other)]
        if comparison.mean:
            parts.append(f"{signed(comparison.mean.value)} points of mean accuracy ({_noise(comparison.mean_p)} noise)")
        said.append(f"{one} against {other}: {'; '.join(parts)}.")
    return [Items(said)]


def _of_perplexity(comparison: Comparison, other: str) -> str:
    if pruned(comparison.first).diverged:
        return "its perplexity diverged"
    if comparison.second and pruned(comparison.second).diverged:
        return f"{other}'s perplexity diverged, its own did not"
    if comparison.ratio:
        return f"{factor(comparison.ratio.value)} × the perplexity ({_noise(comparison.ratio_p)} noise)"
    return "perplexities could not be compared window by window"


def _noise(p: float | None) -> str:
    return "beyond" if beyond_noise(p) else "within"
