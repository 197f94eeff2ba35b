"""What the settings of pruning come to: the rows that they name, and what the stages then need of each other.

Stages, views and provenance read a `Plan`; nobody else asks which method or reconstruction it is.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

from wanda_dvc.catalog import (
    ALLOCATIONS,
    GROUPS,
    RECIPES,
    RECONSTRUCTIONS,
    STATISTICS,
    Allocation,
    Method,
    Reconstruction,
    methods,
)

UNSTRUCTURED = "unstructured"
CHOICES = ("method", "group", "allocation", "reconstruction", "propagation")  # what a recipe fills
# Of `reconstruction: block`: passes over the calibration windows; the learning rate at the first step, as a share of
# the root mean square of a parameter's weights; the seed of the windows' order. docs/decisions/0026-block-training.md.
TRAINING: dict[str, Any] = {"epochs": 3, "rate": 0.02, "seed": 0}
# Of `propagation: corrected`: how far the weights move to those that give the dense outputs. With 1 the weights overfit
# the calibration text (docs/decisions/0027-fisher.md).
CORRECTION = 0.5
GRAM_DTYPE = "float16"  # in which Gram matrices are kept, scaled: as exact as float32 in every figure measured
WINDOWS_BACK = 8  # windows of the backward pass; 16 gained 1 % once, in 2:4
WINDOWS_HELD_OUT = 2  # windows on which choices that statistics decide are compared


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a model is pruned. Equal plans give equal masks and weights, however the settings were written."""

    method: Method
    group: str
    allocation: Allocation
    strength: float | None  # of the allocation; None where it has none
    reconstruction: Reconstruction
    propagation: str
    pattern: str
    share: Fraction  # of the weights that go
    left_out: tuple[str, ...] = ()  # choices of the recipe that the pattern excludes

    @classmethod
    def of(
        cls, recipe: str, given: Mapping[str, str | None], *, strength: float | None, pattern: str, share: Fraction
    ) -> "Plan":
        """Return the plan of a recipe and the choices that are set by themselves."""
        chosen, left_out = fill(recipe, given, pattern)
        allocation = ALLOCATIONS[chosen["allocation"]]
        return cls(
            method=methods()[chosen["method"]],
            group=chosen["group"],
            allocation=allocation,
            strength=allocation.strength(share) if strength is None else strength,
            reconstruction=RECONSTRUCTIONS[chosen["reconstruction"]],
            propagation=chosen["propagation"],
            pattern=pattern,
            share=share,
            left_out=left_out,
        )

    @property
    def compared(self) -> int:
        """How many models are compared on held-out windows: with and without each choice that statistics decide."""
        masks = (self.group == "fisher" and self.pattern == UNSTRUCTURED) + (self.allocation.name != "uniform")
        weights = self.reconstruction.by_gradients and self.weights_come_from == "gram"
        return (masks + 1 if masks else 0) + 2 * weights

    @property
    def described(self) -> dict[str, object]:
        """The choices that masks follow from, by the names of the settings, as provenance has them."""
        described: dict[str, object] = {
            "method": self.method.name,
            "sparsity": float(self.share),
            "pattern": self.pattern,
            "group": self.group,
            "propagation": self.propagation,
            "allocation": self.allocation.name,
            "allocation_strength": self.strength,
        }
        if self.propagates:  # what the next block reads
            described["reconstruction"] = self.reconstruction.name
            described |= {"training": TRAINING} if self.reconstruction.trains else {}
            described |= {"correction": CORRECTION} if self.corrects else {}
        return described

    # --- what the masks follow from ---

    @property
    def solves(self) -> bool:
        """Whether the weights that stay get other values."""
        return self.reconstruction.function is not None

    @property
    def trains(self) -> bool:
        """Whether each block is trained on its mask."""
        return self.reconstruction.trains

    @property
    def propagates(self) -> bool:
        """Whether masks are chosen on the outputs of pruned blocks, and not from stats/."""
        return self.propagation != "dense" and (self.method.needs_inputs() or self.solves)

    @property
    def corrects(self) -> bool:
        """Whether the weights aim at the dense model's outputs."""
        return self.propagation == "corrected" and self.solves

    @property
    def runs_dense(self) -> bool:
        """Whether a walk through pruned blocks takes the dense model's windows along."""
        return self.propagates and (self.trains or self.corrects)

    @property
    def records_grams(self) -> bool:
        """Whether a walk through pruned blocks keeps the Gram matrices of the block at work."""
        return self.propagates and (self.method.needs == "gram" or self.solves)

    @property
    def selects_by_row(self) -> bool:
        """Whether some rows' masks can be chosen without the other rows."""
        return self.method.selects_by_row(self.pattern, self.group)

    # --- which statistics are read ---

    @property
    def masks_read_gram(self) -> bool:
        """Whether masks follow from stats/gram."""
        return (self.method.needs == "gram" and not self.propagates) or self.allocation.needs == "gram"

    @property
    def masks_read_sums(self) -> bool:
        """Whether masks follow from the sums of stats/fisher."""
        return "fisher" in (self.allocation.needs, GROUPS[self.group].needs)

    @property
    def masks_read_gradients(self) -> bool:
        """Whether masks follow from the Gram matrices of gradients: the next block reads what they make of weights."""
        return self.propagates and self.reconstruction.by_gradients

    @property
    def masks_read_fisher(self) -> bool:
        """Whether masks follow from anything in stats/fisher."""
        return self.masks_read_sums or self.masks_read_gradients

    @property
    def weights_come_from(self) -> str | None:
        """The artifact that the weights which stay come from: `weights`, `gram`, or None, the dense model."""
        return None if not self.solves else "weights" if self.propagates else "gram"

    @cached_property
    def needs(self) -> str:
        """The statistics that the stages read: norms, gram or fisher."""
        return max((tier for _, tier in self.needing()), key=STATISTICS.index, default="norms")

    def needing(self) -> Iterator[tuple[str, str]]:
        """Yield each choice that reads more than norms, as `setting name`, and the statistics that it reads."""
        by_method = self.method.needs == "gram" and not self.propagates
        if by_method:
            yield f"method {self.method.name}", "gram"
        if GROUPS[self.group].needs == "fisher":
            yield f"group {self.group}", "fisher"
        if self.allocation.needs in ("gram", "fisher"):
            yield f"allocation {self.allocation.name}", self.allocation.needs
        if self.reconstruction.by_gradients:
            yield f"reconstruction {self.reconstruction.name}", "fisher"
        elif self.weights_come_from == "gram":
            yield f"reconstruction {self.reconstruction.name}", "gram"


def fill(recipe: str, given: Mapping[str, str | None], pattern: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return every choice by name, those that are not given from the recipe; and the recipe's that were left out.

    A pattern has groups and shares of its own, so it excludes the recipe's group and allocation, and any group.
    """
    row = RECIPES[recipe]
    filled: dict[str, str] = {name: getattr(row, name) for name in CHOICES}
    if (method := given["method"]) and method != row.method:
        filled["group"] = row.group_with.get(method, filled["group"])
    left_out: list[str] = []
    if pattern != UNSTRUCTURED:
        plain = {"group": "row", "allocation": "uniform"}
        left_out = [f"{name} {filled[name]}" for name in plain if not given[name] and filled[name] != plain[name]]
        filled |= plain
    filled |= {name: value for name, value in given.items() if value is not None}
    if pattern != UNSTRUCTURED:
        filled["group"] = "row"
    return filled, tuple(left_out)
