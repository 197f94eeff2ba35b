"""The plan of a pruning: the catalog rows named in the settings, and the resulting dependencies of stages.

Stages, views and provenance read a `Plan`: what a stage reads, solves or stores is a property here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

from wanda_dvc import catalog
from wanda_dvc.catalog import Allocation, Method, Reconstruction, Structure

UNSTRUCTURED = "unstructured"
SMALLER = "smaller"  # blocks, heads and neurons together
CHOICES = ("method", "group", "allocation", "reconstruction", "propagation")  # the choices of a recipe
RECOVERY_LENGTH = 512  # tokens of a window of `recover`, at most
RECOVERY_BATCH = 2  # windows of a step of `recover`, by default; `recovery.rate` is for so many
GRAM_DTYPE = "float16"  # of stored Gram matrices, scaled: as exact as float32 in every measured figure
MEASURED_BLOCKS = 0.25  # the fraction of the blocks for which `calibrate` measures choices, at least
TOKENS_OF_CHOICES = 4096  # that it measures each choice on, about
WINDOWS_BACK = 8  # windows of each text in the backward pass; of one text 16 gained 1 % once, in 2:4
MEASURED_WINDOWS = 8  # that `mask` measures each candidate on
TOKENS_A_FEATURE = 10  # calibration tokens for each input feature; solvers overfit with fewer (docs/methods.md)
# For each feature, tokens of the text, each counted once in however many windows: fewer are reported, or refused.
FEW_TOKENS, TOO_FEW_TOKENS = 9, 5


def choices_of_pattern(pattern: str, reconstructs: bool) -> dict[str, str]:
    """Return the choices that a pattern requires, by setting; `reconstructs`: a reconstruction is requested."""
    if pattern == UNSTRUCTURED:
        return {}
    choices = {"allocation": "uniform"}
    structure = catalog.STRUCTURES.get(pattern)
    if structure and structure.method:  # experts and blocks
        choices["reconstruction"] = "least-squares" if pattern == "blocks" and reconstructs else "none"
    if structure and (structure.method or pattern == SMALLER):
        choices["propagation"] = "dense"
    return choices


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The choices of a pruning. Equal plans give equal masks and weights, for any spelling of the settings."""

    method: Method
    group: str
    allocation: Allocation
    reconstruction: Reconstruction
    propagation: str  # of catalog.PROPAGATIONS
    pattern: str
    sparsity: Fraction  # the fraction of weights that is pruned
    left_out: tuple[str, ...] = field(default=(), compare=False)  # choices that the pattern replaces: "allocation owl"

    @classmethod
    def from_recipe(cls, recipe: str, given: Mapping[str, str | None], *, pattern: str, sparsity: float) -> "Plan":
        """Return the plan of a recipe and separately set choices, which replace the recipe's.

        A pattern replaces choices that are not separately set. It also sets the group to `row`, even a separately set
        one, because weights then compete as the pattern says; only neurons and heads keep group `outputs`, which
        multiplies the score of each.
        """
        row, structure = catalog.RECIPES[recipe], catalog.STRUCTURES.get(pattern)
        recipe_for_units = row.for_units if structure else None
        if recipe_for_units:
            row = replace(catalog.RECIPES[recipe_for_units], group=row.group)
        set_separately = {name: choice for name, choice in given.items() if choice is not None}
        requested: dict[str, Any] = {name: getattr(row, name) for name in CHOICES} | set_separately

        reconstructs = catalog.RECONSTRUCTIONS[requested["reconstruction"]].function is not None
        of_pattern = choices_of_pattern(pattern, reconstructs)
        if structure and structure.method:  # experts, blocks
            of_pattern["method"] = structure.method
        chosen = requested | of_pattern | set_separately
        if pattern != UNSTRUCTURED:
            scores_inputs = structure is not None and not structure.method  # neurons, heads
            chosen["group"] = "outputs" if scores_inputs and requested["group"] == "outputs" else "row"

        # A recipe for units fits them by itself: nothing of the recipe that it replaces is reported.
        reported = [name for name in CHOICES if name in set_separately or not recipe_for_units]
        left_out = tuple(f"{name} {requested[name]}" for name in reported if requested[name] != chosen[name])
        return replace(cls.from_dict(chosen | {"pattern": pattern, "sparsity": sparsity}), left_out=left_out)

    @classmethod
    def from_dict(cls, choices: Mapping[str, Any]) -> "Plan":
        """Return the plan of stored choices, as in a provenance; its method need not be installed."""
        name, pattern = choices["method"], choices["pattern"]
        # `apply` needs no method: it does not read what a missing one needs.
        missing = Method(name, "a method of a package that is not installed", paper="", function="", needs="norms")
        n_of_m = catalog.parse_pattern(pattern)
        # An exact fraction: 0.29 of 100 weights is 29, where floating point gives 28. A pattern n:m has its own.
        sparsity = 1 - Fraction(*n_of_m) if n_of_m else Fraction(str(choices["sparsity"]))
        return cls(
            method=catalog.methods().get(name, missing),
            group=choices["group"],
            allocation=catalog.ALLOCATIONS[choices["allocation"]],
            reconstruction=catalog.RECONSTRUCTIONS[choices["reconstruction"]],
            propagation=choices["propagation"],
            pattern=pattern,
            sparsity=sparsity,
        )

    def to_dict(self) -> dict[str, object]:
        """Return the choices by the names of the settings, as provenance stores them."""
        choices: dict[str, object] = {
            "method": self.method.name,
            "sparsity": float(self.sparsity),
            "pattern": self.pattern,
            "group": self.group,
            "propagation": self.propagation,
            "allocation": self.allocation.name,
            "allocation_strength": self.allocation.strength,
            "reconstruction": self.reconstruction.name,
        }
        # Numbers of one solver and one pattern: when they change, masks of other plans keep their provenance.
        if self.used_reconstruction.uses_fisher:
            choices["steps"] = self.used_reconstruction.steps
        if self.structure and self.structure.multiple > 1:
            choices["multiple"] = self.structure.multiple
        return choices

    @property
    def structure(self) -> Structure | None:
        """The kind of units that the pattern removes; None: it sets weights to zero."""
        return catalog.STRUCTURES.get(self.pattern)

    @property
    def used_reconstruction(self) -> Reconstruction:
        """The reconstruction that runs, and its description: `reconstruction`, unless the pattern has its own."""
        row = self.reconstruction
        if self.structure and self.reconstructs:
            return catalog.REPAIR if self.pattern == "blocks" else catalog.SOLVED_UNITS
        if self.pattern != UNSTRUCTURED and row.steps_n_of_m:
            return replace(row, steps=row.steps_n_of_m)
        return row

    @property
    def reconstructs(self) -> bool:
        """Whether kept weights get new values."""
        return self.reconstruction.function is not None

    @property
    def repairs(self) -> bool:
        """Whether linears of the blocks that stay take over a part of what removed blocks add."""
        return self.measures_blocks and self.reconstructs

    @property
    def propagates(self) -> bool:
        """Whether masks depend on the outputs of pruned blocks instead of stats/."""
        return self.propagation != "dense" and (self.method.needs != "weights" or self.reconstructs)

    @property
    def mask_solves(self) -> bool:
        """Whether `mask` solves equations with Gram matrices, for one distinct input at a time."""
        return self.method.is_solver or (self.propagates and self.reconstructs)

    @property
    def solves(self) -> bool:
        """Whether `mask` or `apply` solves equations with Gram matrices."""
        return self.mask_solves or self.apply_reconstructs

    @property
    def mask_reads_gram(self) -> bool:
        """Whether `mask` reads stats/gram: a solver on the dense model's statistics, or the candidates of a size."""
        return (self.method.is_solver and not self.propagates) or (self.pattern == SMALLER and self.reconstructs)

    @property
    def measures_blocks(self) -> bool:
        """Whether blocks are removed by measured choices, stats/blocks."""
        return self.pattern in ("blocks", SMALLER)

    @property
    def mask_reads_fisher(self) -> bool:
        """Whether `mask` reads stats/fisher: gradients for masks, or their Gram matrices for weights."""
        for_masks = self.group == "outputs" or self.allocation.uses_fisher
        return for_masks or self.pattern == SMALLER or (self.propagates and self.used_reconstruction.uses_fisher)

    @property
    def mask_stores_weights(self) -> bool:
        """Whether `mask` computes new weights, and stores them in weights/."""
        return self.reconstructs and (self.propagates or self.repairs)

    @property
    def apply_reconstructs(self) -> bool:
        """Whether `apply` computes new weights, from stats/gram; with pattern `smaller` from weights/ on."""
        return self.reconstructs and (self.pattern == SMALLER or not self.mask_stores_weights)

    @property
    def tier(self) -> str:
        """The last statistics that stages read, norms, gram or fisher; each tier includes those before it."""
        if self.mask_reads_fisher or self.used_reconstruction.uses_fisher:
            return "fisher"
        return "gram" if self.mask_reads_gram or self.apply_reconstructs else "norms"

    def conflicts(self) -> Iterator[str]:
        """Yield choices that exclude one another, or have no effect, as *setting: found, expected*."""
        method, pattern, structure = self.method, self.pattern, self.structure
        of_method = f"method: found {method.name} with pattern {pattern}"
        scores_pattern = pattern in method.patterns
        if structure and (method.is_solver or (structure.method and not scores_pattern)):
            yield f"{of_method}, expected {structure.method or 'wanda'} or another method that scores {pattern}"
        elif method.patterns and not scores_pattern:
            yield f"{of_method}, expected pattern {' or '.join(method.patterns)}"
        choices = self.to_dict()
        for name, expected in choices_of_pattern(pattern, self.reconstructs).items():
            if choices[name] != expected:
                yield f"{name}: found {choices[name]} with pattern {pattern}, expected {expected}"
