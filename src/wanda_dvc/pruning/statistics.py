"""Statistics of what a linear reads, per input feature: the norm tier (Σx², Σx, count)."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

OUTLIER = 6  # times the median; as in Dettmers et al. 2022, arXiv 2208.07339, where 6 marks an outlier feature


@dataclass
class InputStats:
    """Sums over all tokens seen, in float64. `add` sums a window in float32 first, which is fast and
    loses nothing that matters over a few thousand tokens; across windows float32 would."""

    sum_squares: Float64[Tensor, " in"]
    sum: Float64[Tensor, " in"]
    count: int

    @classmethod
    def empty(cls, features: int, device: torch.device | str = "cpu") -> "InputStats":
        zeros = torch.zeros(features, dtype=torch.float64, device=device)
        return cls(zeros, zeros.clone(), 0)

    def add(self, x: Float[Tensor, "tokens in"]) -> None:
        """Count in one window."""
        x = x.float()
        self.sum_squares += (x * x).sum(dim=0).to(self.sum_squares)
        self.sum += x.sum(dim=0).to(self.sum)
        self.count += len(x)

    def cpu(self) -> "InputStats":
        """The same in main memory."""
        return InputStats(self.sum_squares.cpu(), self.sum.cpu(), self.count)

    @property
    def norm(self) -> Float[Tensor, " in"]:
        """‖X_j‖₂ over all tokens, float32.

        1 for every feature where no token was seen, as by an expert that none was sent to: nothing is known of
        one feature that is not known of the others, and Wanda's score is the weight's magnitude.
        """
        return self.sum_squares.sqrt().float() if self.count else torch.ones_like(self.sum_squares).float()


class BlockStats(NamedTuple):
    """What one block's linears read. A linear is named as the checkpoint stores its weight."""

    inputs: dict[str, InputStats]  # by distinct input, named after the first linear that reads it
    readers: dict[str, list[str]]  # the linears that read each
    transposed: list[str]  # linears whose weight is stored [in, out], as GPT-2's are

    def unreached(self) -> set[str]:
        """The experts that no token was sent to: the names of their linears but for the last word."""
        unread = [name for name, x in self.inputs.items() if not x.count]
        return {linear.rpartition(".")[0] for name in unread for linear in self.readers[name]}

    def label(self, name: str) -> str:
        """A distinct input by who reads it, such as `q_proj, k_proj, v_proj`."""
        return ", ".join(reader.rpartition(".")[2] for reader in self.readers[name])


def outliers(norm: Float[Tensor, " in"]) -> Bool[Tensor, " in"]:
    """Features whose norm is more than `OUTLIER` times the median of their input."""
    return norm > OUTLIER * norm.quantile(0.5)


def summary(norm: Float[Tensor, " in"]) -> dict[str, float]:
    """Mean, median and largest norm, and the share of features that are outliers."""
    return {
        "mean": norm.mean().item(),
        "median": norm.quantile(0.5).item(),
        "max": norm.max().item(),
        "outliers": outliers(norm).float().mean().item(),
    }
