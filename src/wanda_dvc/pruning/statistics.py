"""The norms: statistics of each feature of a linear's input (Σx², Σx, count), and of a block's inputs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

# Of the median: an outlier feature's norm is larger. Dettmers et al. 2022, arXiv 2208.07339, where 6 marks one.
MEDIANS_OF_AN_OUTLIER = 6


@dataclass
class InputStats:
    """Sums over all tokens of one distinct input. Sums of several chunks merge.

    `add` sums the tokens of one call in float32, fast and exact enough for ten thousand; calls are summed in float64.
    """

    sum_squares: Float64[Tensor, " in"]
    sum: Float64[Tensor, " in"]  # for methods of packages
    count: int

    @classmethod
    def empty(cls, features: int, device: torch.device | str = "cpu") -> "InputStats":
        """Return the statistics of no tokens."""
        zeros = torch.zeros(features, dtype=torch.float64, device=device)
        return cls(zeros, zeros.clone(), 0)

    def add(self, x: Float[Tensor, "tokens in"]) -> None:
        """Add the tokens of one or more windows."""
        numbers = x.float()
        self.sum += numbers.sum(dim=0).to(self.sum.device)
        self.sum_squares += numbers.square().sum(dim=0).to(self.sum.device)
        self.count += len(x)

    def merge(self, stats: "InputStats") -> None:
        """Add the sums of more tokens of the same input."""
        self.sum_squares += stats.sum_squares.to(self.sum_squares)
        self.sum += stats.sum.to(self.sum)
        self.count += stats.count

    def to(self, device: torch.device | str) -> "InputStats":
        """Return the sums on a device."""
        return InputStats(self.sum_squares.to(device), self.sum.to(device), self.count)

    @property
    def norm(self) -> Float[Tensor, " in"]:
        """‖X_j‖₂ over all tokens, float32; 1 without tokens, so that Wanda's score is the weight's magnitude."""
        return self.sum_squares.sqrt().float() if self.count else torch.ones_like(self.sum_squares).float()


def add_slices(all_stats: Sequence[InputStats], x: Float[Tensor, "tokens in"], slices: Sequence[slice]) -> None:
    """Add a slice of tokens to each of several statistics, in a number of operations that does not depend on them."""
    bounds = torch.tensor([(tokens.start, tokens.stop) for tokens in slices], device=x.device)
    places = torch.arange(len(x), device=x.device)
    is_inside = ((places >= bounds[:, :1]) & (places < bounds[:, 1:])).float()  # [slices, tokens]
    numbers = x.float()
    sums, sum_squares = (is_inside @ numbers).double(), (is_inside @ numbers.square()).double()
    torch._foreach_add_([stats.sum for stats in all_stats], [*sums.unbind()])
    torch._foreach_add_([stats.sum_squares for stats in all_stats], [*sum_squares.unbind()])
    for stats, tokens in zip(all_stats, slices, strict=True):
        stats.count += tokens.stop - tokens.start


@dataclass
class TokenSum:
    """A sum over some tokens, and their number. Sums of several chunks merge."""

    sum: Float64[Tensor, "..."]
    count: int

    def merge(self, token_sum: "TokenSum") -> None:
        """Add the sum over more tokens."""
        self.sum += token_sum.sum.to(self.sum)
        self.count += token_sum.count


# Of the input of a linear, by number of units: (Σ x · ∂ℓ/∂x over a unit)², summed over tokens, [units]. Units are
# neighbouring features: as many as features (neurons), or as key-value heads.
UnitCosts = dict[int, Float64[Tensor, " _"]]


class BlockStats(NamedTuple):
    """The statistics of one block's distinct inputs. A linear is named as the checkpoint stores its weight."""

    inputs: dict[str, InputStats]  # by distinct input, named after the first linear that reads it
    consumers: dict[str, list[str]]  # the linears that read each input
    transposed: list[str]  # linears whose weight is stored [in, out], as GPT-2's are
    fisher: Mapping[str, Float64[Tensor, " out"]] = {}  # Σ of squared gradients by linear, where read
    # Σ of ‖gate · output‖₂ over the tokens that a router sent to an expert, by the expert's last linear.
    outputs: Mapping[str, TokenSum] = {}
    unit_costs: Mapping[str, UnitCosts] = {}  # by linear, where read

    @property
    def by_linear(self) -> dict[str, InputStats]:
        """The statistics of each linear's input."""
        return {linear: self.inputs[name] for name, linears in self.consumers.items() for linear in linears}

    def of(self, name: str) -> "BlockStats":
        """Return the norms of one distinct input alone: without gradients and gates."""
        consumers = self.consumers[name]
        return BlockStats({name: self.inputs[name]}, {name: consumers}, [x for x in self.transposed if x in consumers])

    def unreached(self) -> set[str]:
        """Return the experts that no token reached: their linears' names without the last word."""
        return {linear.rpartition(".")[0] for linear, x in self.by_linear.items() if not x.count}


def summary(norm: Float[Tensor, " in"]) -> dict[str, float]:
    """Return mean, median and largest norm, and the fraction of outliers: norms above 6 times the median."""
    median = norm.quantile(0.5)
    return {
        "mean": norm.mean().item(),
        "median": median.item(),
        "max": norm.max().item(),
        "outliers": (norm > MEDIANS_OF_AN_OUTLIER * median).float().mean().item(),
    }
