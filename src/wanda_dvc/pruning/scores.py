"""Scores: the importance of each weight, of the weight's shape, or of an expert; the highest are kept."""

from jaxtyping import Float
from torch import Tensor, finfo, float32

from wanda_dvc.pruning.statistics import InputStats, TokenSum


def magnitude(weight: Float[Tensor, "out in"], x: InputStats | None = None) -> Float[Tensor, "out in"]:
    """Return S_ij = |W_ij|, in float32. Han et al. 2015, arXiv 1506.02626."""
    return weight.abs().float()


def wanda(weight: Float[Tensor, "out in"], x: InputStats) -> Float[Tensor, "out in"]:
    """Return S_ij = |W_ij| · ‖X_j‖₂, in float32. Sun et al. 2024, arXiv 2306.11695, equation 1.

    ‖X_j‖₂ is taken over all calibration tokens. Selection compares scores with one another, so a common factor (the
    authors' code divides by the number of windows) changes nothing.
    """
    return weight.abs().float().mul_(x.norm)


def ria(weight: Float[Tensor, "out in"], x: InputStats) -> Float[Tensor, "out in"]:
    """Return S_ij = (|W_ij| / Σ_k|W_kj| + |W_ij| / Σ_k|W_ik|) · ‖X_j‖₂^½, in float32; zero weights score 0.

    The fractions: |W_ij| among its output's and its input's weights. Zhang et al., "Plug-and-Play", ICLR 2024.
    """
    magnitudes = weight.abs().float()
    tiny = finfo(float32).tiny  # all-zero rows and columns give 0 / 0
    of_input = magnitudes.sum(dim=0).clamp_(min=tiny)
    of_output = magnitudes.sum(dim=1, keepdim=True).clamp_(min=tiny)
    return (magnitudes / of_input).add_(magnitudes / of_output).mul_(x.norm.sqrt())


def reap(outputs: TokenSum) -> float:
    """Return REAP's score: the mean over the tokens sent to an expert of gate · ‖output‖₂; 0 without tokens.

    Lasby et al. 2025, arXiv 2510.13999, equation 9. The norm is of the product that the model computes.
    """
    return float(outputs.sum) / outputs.count if outputs.count else 0.0
