"""What a weight is worth: a score of the weight's own shape, where higher stays."""

from jaxtyping import Float
from torch import Tensor


def magnitude(weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """S_ij = |W_ij|, in float32. Han et al. 2015, arXiv 1506.02626."""
    return weight.abs().float()


def wanda(weight: Float[Tensor, "out in"], input_norm: Float[Tensor, " in"]) -> Float[Tensor, "out in"]:
    """S_ij = |W_ij| · ‖X_j‖₂, in float32. Sun et al. 2024, arXiv 2306.11695, equation 1.

    `input_norm` is ‖X_j‖₂ over all calibration tokens. Selection compares scores with one another,
    so any common factor (the authors' code divides by the number of windows) changes nothing.
    """
    return weight.abs().float().mul_(input_norm)
