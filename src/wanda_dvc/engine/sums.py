"""Sums over the inputs of a block's linears."""

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from wanda_dvc.engine.structure import Linear, unsupported
from wanda_dvc.errors import FIX, UserError
from wanda_dvc.pruning.gram import Gram
from wanda_dvc.pruning.statistics import BlockStats, InputStats, TokenSum


class BlockRecord(NamedTuple):
    """The statistics of the inputs of a block's linears."""

    stats: BlockStats
    grams: dict[str, Gram]  # by distinct input; missing for inputs without tokens
    crosses: dict[str, Float64[Tensor, "in in"]]  # X_denseᵀX, of inputs with dense rows for all tokens


@dataclass(kw_only=True)
class InputSums:
    """Sums over the inputs of a block's linears for some rows, by distinct input. Sums of several shards merge.

    An input is named after its first reader. An expert's input is the tokens that the router sends to it.
    """

    stats: dict[str, InputStats] = field(default_factory=dict)
    grams: dict[str, Gram] = field(default_factory=dict)  # missing for inputs without tokens
    crosses: dict[str, TokenSum] = field(default_factory=dict)  # X_denseᵀX, or RᵀX of other numbers R
    source: dict[str, str] = field(default_factory=dict)  # each linear's input, by name
    outputs: dict[str, TokenSum] = field(default_factory=dict)  # of routed experts, by the last linear of each
    # Σ (1 − cosine of the block's input and output), and tokens
    influence: Float64[Tensor, "2"] = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))
    is_finite: bool = True  # all hidden states after the block

    def merge(self, other: "InputSums") -> None:
        """Add the sums of other rows. UserError if a linear reads another input in those rows."""
        for linear, source in other.source.items():
            self.add_consumer(linear, source)
        merge_sums(self.stats, other.stats)
        merge_sums(self.grams, other.grams)
        merge_sums(self.crosses, other.crosses)
        merge_sums(self.outputs, other.outputs)
        self.is_finite &= other.is_finite
        self.influence = self.influence.to(other.influence) + other.influence

    def add_consumer(self, linear: str, source: str) -> None:
        """Add a linear to the readers of an input. UserError if it reads another input."""
        if self.source.setdefault(linear, source) != source:
            raise unsupported(linear, f"it reads the input of {self.source[linear]}, and in other windows of {source}")

    def of(self, linears: dict[str, Linear]) -> BlockRecord:
        """Return the statistics of a block's inputs. An expert without tokens has inputs of no tokens."""
        reached = {(linear.module, linear.leaf) for name, linear in linears.items() if name in self.source}
        stats, source = dict(self.stats), dict(self.source)
        for (module, leaf, expert), names in by_weight(linears).items():
            if expert is not None and (module, leaf) not in reached:
                raise unsupported(names[0], "its experts do not multiply by the stored matrices")
            if expert is None and names[0] not in source:
                raise unsupported(names[0], "the model does not call this linear")
            if names[0] not in source:
                stats[names[0]] = InputStats.empty(linears[names[0]].features)
                source |= dict.fromkeys(names, names[0])
        # Experts last and in index order, instead of the order of their first tokens.
        experts = dict.fromkeys(name for name, linear in linears.items() if linear.part.expert is not None)
        consumers: dict[str, list[str]] = {}
        for linear in [*(name for name in source if name not in experts), *experts]:
            consumers.setdefault(source[linear], []).append(linear)
        inputs = {name: stats[name].to("cpu") for name in consumers}
        transposed = [name for name, linear in linears.items() if linear.transposed]
        crosses = {name: x.sum for name, x in self.crosses.items() if x.count == stats[name].count}
        outputs = {name: replace(x, sum=x.sum.cpu()) for name in linears if (x := self.outputs.get(name))}
        measured = BlockStats(inputs, consumers, transposed, outputs=outputs, influence=self.influence.cpu())
        return BlockRecord(measured, self.grams, crosses)


def check_finite(sums: dict[str, Tensor], where: str, what: str) -> None:
    """Raise UserError if sums of some linears are not finite. The host waits for a GPU once."""
    finite = torch.stack([x.isfinite().all() for x in sums.values()]).tolist() if sums else []
    for name, is_finite in zip(sums, finite, strict=True):
        if not is_finite:
            raise UserError(f"{where} of {name}: {what} that are not finite; {FIX}")


def merge_sums(own: dict[str, Any], other: dict[str, Any]) -> None:
    """Add sums to the sums of equal names."""
    for name, sums in other.items():
        if own.setdefault(name, sums) is not sums:
            own[name].merge(sums)


# Linears by their parameter: a module, its leaf and the expert. Linears that are rows of one parameter share its input.
SharedBy = dict[tuple[nn.Module, str, int | None], list[str]]


def by_weight(linears: dict[str, Linear]) -> SharedBy:
    weights: SharedBy = {}
    for name, linear in linears.items():
        weights.setdefault((linear.module, linear.leaf, linear.part.expert), []).append(name)
    return weights
