"""Sums over the inputs of a block's linears, over the gradients of their outputs, and for the repair."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from wanda_dvc.engine.accelerator import float64_device
from wanda_dvc.engine.structure import Linear, unsupported
from wanda_dvc.errors import FIX_NOT_FINITE, UserError
from wanda_dvc.kernels import multiply_in_float32
from wanda_dvc.pruning.gram import Gram
from wanda_dvc.pruning.statistics import BlockStats, InputStats, TokenSum, UnitCosts

Sums = TypeVar("Sums", InputStats, Gram, TokenSum)


class BlockRecord(NamedTuple):
    """The statistics of the inputs of a block's linears. Matrices stay on the device that solves with them."""

    stats: BlockStats  # in main memory
    grams: dict[str, Gram]  # by distinct input; missing for inputs without tokens


@dataclass(kw_only=True)
class InputSums:
    """Sums over the inputs of a block's linears for some sequences, by distinct input. Sums of several chunks merge.

    An input is named after its first consumer. An expert's input is the tokens that the router sends to it.
    """

    stats: dict[str, InputStats] = field(default_factory=dict)
    grams: dict[str, Gram] = field(default_factory=dict)  # missing for inputs without tokens
    input_of: dict[str, str] = field(default_factory=dict)  # the name of each linear's input
    outputs: dict[str, TokenSum] = field(default_factory=dict)  # of routed experts, by the last linear of each
    is_finite: bool = True  # all hidden states after the block

    def merge(self, sums: "InputSums") -> None:
        """Add the sums of other sequences. UserError if a linear reads another input in those sequences."""
        for linear, name in sums.input_of.items():
            self.add_consumer(linear, name)
        merge_by_name(self.stats, sums.stats)
        merge_by_name(self.grams, sums.grams)
        merge_by_name(self.outputs, sums.outputs)
        self.is_finite &= sums.is_finite

    def add_consumer(self, linear: str, name: str) -> None:
        """Add a linear to the consumers of an input. UserError if it reads another input."""
        before = self.input_of.setdefault(linear, name)
        if before != name:
            raise unsupported(linear, f"it reads the input of {before}, and in other windows of {name}")

    def of(self, linears: dict[str, Linear]) -> BlockRecord:
        """Return the statistics of a block's inputs. UserError if the model does not multiply by a linear's weight.

        Inputs are in the order of their first products; those of experts last, by number.
        """
        stats, input_of = dict(self.stats), dict(self.input_of)
        used_parameters = {(linear.module, linear.leaf) for name, linear in linears.items() if name in input_of}
        for matrix, names in group_by_matrix(linears).items():
            if names[0] in input_of:
                continue
            if (matrix.module, matrix.leaf) not in used_parameters:
                raise unsupported(names[0], "the model does not multiply by this weight")
            stats[names[0]] = InputStats.empty(linears[names[0]].features)  # of an expert that got no token
            input_of |= dict.fromkeys(names, names[0])
        ordered = [name for name in input_of if linears[name].slice.expert is None]
        ordered += [name for name, linear in linears.items() if linear.slice.expert is not None]
        consumers: dict[str, list[str]] = {}
        for name in ordered:
            consumers.setdefault(input_of[name], []).append(name)
        of_experts = {name: self.outputs[name] for name in linears if name in self.outputs}
        block_stats = BlockStats(
            inputs={name: stats[name].to("cpu") for name in consumers},
            consumers=consumers,
            transposed=[name for name, linear in linears.items() if linear.transposed],
            outputs={name: replace(output, sum=output.sum.cpu()) for name, output in of_experts.items()},
        )
        return BlockRecord(block_stats, self.grams)


@dataclass(kw_only=True)
class FisherSums:
    """Sums over some sequences of the gradients ∂ℓ/∂y of a block's linears. Sums of several chunks merge.

    A token's gradient is multiplied by ‖x‖, the norm of the linear's input at the token, because the gradient of the
    weights is (∂ℓ/∂y) xᵀ. Linears without a gradient are missing, such as experts without tokens.
    """

    squares: dict[str, Float64[Tensor, " out"]] = field(default_factory=dict)  # Σ ‖x‖² (∂ℓ/∂y)² over all tokens
    grams: dict[str, Gram] = field(default_factory=dict)  # Σ ‖x‖² (∂ℓ/∂y)(∂ℓ/∂y)ᵀ, with that diagonal
    unit_costs: dict[str, UnitCosts] = field(default_factory=dict)  # summed over all tokens

    def merge(self, sums: "FisherSums") -> None:
        """Add the sums of other sequences."""
        add_unit_costs(self.unit_costs, sums.unit_costs)
        for name, squares in sums.squares.items():
            self.squares[name] = self.squares.get(name, 0) + squares
        merge_by_name(self.grams, sums.grams)


@dataclass(kw_only=True)
class RepairSums:
    """Sums over some sequences, by linear: of its input X, and of R, what hidden states lack without removed blocks."""

    grams: dict[str, Gram] = field(default_factory=dict)  # XᵀX
    crosses: dict[str, TokenSum] = field(default_factory=dict)  # RᵀX, [width, in]

    def add(self, linear: str, x: Float[Tensor, "tokens in"], missing: Float[Tensor, "tokens width"]) -> None:
        """Add the tokens of a batch: `missing` is R."""
        device = float64_device(x.device)
        if linear not in self.grams:
            self.grams[linear] = Gram.empty(x.shape[-1], device)
        self.grams[linear].add(x)
        product = multiply_in_float32(missing.T, x).to(device).double()
        merge_by_name(self.crosses, {linear: TokenSum(product, len(x))})

    def merge(self, sums: "RepairSums") -> None:
        """Add the sums of other sequences."""
        merge_by_name(self.grams, sums.grams)
        merge_by_name(self.crosses, sums.crosses)


def add_unit_costs(totals: dict[str, UnitCosts], costs: Mapping[str, UnitCosts]) -> None:
    """Add costs of units, by linear, to their totals."""
    for linear, by_number in costs.items():
        of_linear = totals.setdefault(linear, {})
        for units, of_units in by_number.items():
            of_linear[units] = of_linear.get(units, 0) + of_units


def check_finite(sums: dict[str, Tensor], where: str, what: str) -> None:
    """Raise UserError if sums of some linears are not finite. The host waits for a GPU once."""
    finite = torch.stack([x.isfinite().all() for x in sums.values()]).tolist() if sums else []
    for name, is_finite in zip(sums, finite, strict=True):
        if not is_finite:
            raise UserError(f"{where} of {name}: {what} that are not finite; {FIX_NOT_FINITE}")


def merge_by_name(totals: dict[str, Sums], sums: Mapping[str, Sums]) -> None:
    """Merge each of `sums` into the total of its name. A name without a total gets the sums themselves."""
    for name, addend in sums.items():
        if name in totals:
            totals[name].merge(addend)
        else:
            totals[name] = addend


class Matrix(NamedTuple):
    """A matrix that a model multiplies by: a module's parameter, or one expert's part of it."""

    module: nn.Module
    leaf: str
    expert: int | None


def group_by_matrix(linears: dict[str, Linear]) -> dict[Matrix, list[str]]:
    """Return the names of the linears that are rows of each matrix: they read one input."""
    names: dict[Matrix, list[str]] = {}
    for name, linear in linears.items():
        names.setdefault(Matrix(linear.module, linear.leaf, linear.slice.expert), []).append(name)
    return names
