"""Compute a block's masks, and the new values of the kept weights, from weights and statistics."""

import importlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from wanda_dvc.catalog import SOLVED_UNITS, STRUCTURES, Method, Reconstruction
from wanda_dvc.errors import UserError
from wanda_dvc.pruning.gram import Gram, layer_errors
from wanda_dvc.pruning.patterns import parse_pattern
from wanda_dvc.pruning.selection import keep_by_share, select
from wanda_dvc.pruning.solvers import Prepared, Solved, corrected_target
from wanda_dvc.pruning.statistics import BlockStats, InputStats
from wanda_dvc.pruning.units import Units, highest, spread, summed

# Rows are scored in slices of about so many weights, which bounds memory. Smaller ones are slower: the threads wait for
# the interpreter.
WEIGHTS_AT_A_TIME = 2**20


@runtime_checkable
class Readers(Protocol):
    """The readers of each distinct input of a block; statistics and Gram matrices implement it."""

    @property
    def readers(self) -> dict[str, list[str]]:
        """The linears that read each distinct input."""

    @property
    def transposed(self) -> list[str]:
        """The linears whose weights are stored [in, out]."""


Share = Fraction | Mapping[str, Fraction]  # of a block's weights that go, or of each of its linears'


@dataclass(frozen=True)
class Target:
    """The share of weights to prune and the pattern, for one linear or for several with the same share."""

    share: Fraction  # of the weights that go
    pattern: str = "unstructured"
    group: str = "row"
    units: Units | None = None  # the units that the linear reads, if the pattern removes some of them


def function_of(row: str) -> Callable[..., Any]:
    """Return the function that a row of the catalog names as `module:function`."""
    module, _, name = row.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


def choose(  # noqa: PLR0913 - the linear, its statistics, and how its mask is chosen
    weight: Float[Tensor, "out in"],
    x: InputStats,
    *,
    method: Method,
    target: Target,
    name: str = "weight",
    worth: Float[Tensor, " out"] | None = None,
) -> Bool[Tensor, "out in"]:
    """Return `keep` for one linear, on the weight's device; `worth` multiplies the scores of each row.

    Messages use `name`. Where rows do not compete, the host takes a slice of rows at a time: memory does not grow with
    the linear. UserError where a score is not finite, or the target is out of reach.
    """
    score = function_of(method.function)
    by_row = method.selects_by_row(target.pattern, target.group) and not target.units and weight.device.type == "cpu"
    x = x.to(weight.device)
    rows_at_a_time = max(1, WEIGHTS_AT_A_TIME // weight.shape[1]) if by_row else len(weight)
    keep = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
    for rows, into in zip(weight.split(rows_at_a_time), keep.split(rows_at_a_time), strict=True):
        scored = score(rows.contiguous(), x)
        scored = scored.float() if scored.dtype in (torch.bfloat16, torch.float16) else scored  # numpy has no bfloat16
        if worth is not None:  # needed only where rows compete
            scored = scored * worth.to(scored)[:, None]
        if not scored.amax().isfinite():
            raise UserError(f"{name}: scores that are not finite; its weights or the activations it reads overflow")
        select_from = SELECTIONS[method.competition]
        into.copy_(_by_unit(scored, target.units) if target.units else select_from(scored, target))
    return keep


def _by_unit(score: Float[Tensor, "out in"], units: Units) -> Bool[Tensor, "out in"]:
    """Keep the inputs of the units with the highest sums of scores."""
    return spread(highest(summed(score, units), units.stay), units).expand(score.shape)


SELECTIONS: Mapping[str, Callable[[Tensor, Target], Tensor]] = {
    "groups": lambda score, target: select(score, share=target.share, pattern=target.pattern, group=target.group),
    "rows": lambda score, target: keep_by_share(score, float(target.share)),
}


def choose_block(  # noqa: PLR0913 - the weights, the statistics, and how masks are chosen
    weights: Callable[[str], Tensor],
    block: BlockStats,
    *,
    method: Method,
    targets: Mapping[str, Target] | Target,
    grams: Mapping[str, Gram] | None = None,
    device: torch.device | None = None,
) -> dict[str, Tensor]:
    """Return the `keep` masks of one block's linears, oriented as their weights are stored.

    `weights` reads a linear's stored weight. `targets` has an entry for each linear, or is the same for all. `grams`
    holds the Gram matrix of each distinct input where the method needs it. Masks from scores are computed on `device`,
    by default the weight's: one at a time on a GPU, in parallel on the host, with torch's number of threads. A solver
    uses all of a device for one linear, and runs on the device of the Gram matrix.
    """
    if isinstance(targets, Target):
        targets = {name: targets for names in block.readers.values() for name in names}
    worths = {name: row_worth(block.fisher[name]) for name, one in targets.items() if weighs(one, block, name)}
    if method.competition == "solver":
        solve, chosen = function_of(method.function), {}
        for name, prepared in prepared_linears(block, grams or {}):
            across, target = name in block.transposed, targets[name]
            if removes_no_weight(target):
                chosen[name] = torch.ones(weights(name).shape, dtype=torch.bool)
                continue
            weight = oriented(weights(name), across)
            prepared = prepared or prepare(Gram.empty(weight.shape[1]), name)
            there = weight.to(prepared.gram.device)
            if name in worths:  # a row's problem is the same at every scale
                there = there.float() * worths[name].to(there.device)[:, None]
            if target.units:
                stay = function_of(method.units)(there, prepared, target.units)
                chosen[name] = oriented(spread(stay, target.units).expand(there.shape), across).contiguous()
                continue
            group = "row" if target.group == "row" else "linear"  # solvers ignore the row weights
            solved = solve(there, prepared, share=target.share, pattern=target.pattern, group=group)
            chosen[name] = oriented(solved.keep, across).contiguous()
        return chosen

    inputs = {source: x if device is None else x.to(device) for source, x in block.inputs.items()}

    def keep(name: str, x: InputStats) -> Tensor:
        across, weight = name in block.transposed, weights(name)
        target, worth = targets[name], worths.get(name)
        if removes_no_weight(target):
            return torch.ones(weight.shape, dtype=torch.bool)
        weight = weight if device is None else weight.to(device)
        kept = choose(oriented(weight, across), x, method=method, target=target, name=name, worth=worth)
        return oriented(kept, across).contiguous()

    threads = torch.get_num_threads() if device is None or device.type == "cpu" else 1
    with ThreadPoolExecutor(max_workers=threads) as pool:  # numpy's partition releases the GIL
        jobs = {
            name: pool.submit(keep, name, inputs[source]) for source, names in block.readers.items() for name in names
        }
        return {name: job.result() for name, job in jobs.items()}


def targets_of(
    block: Readers, *, share: Share, pattern: str, group: str, units: Mapping[str, Units] | None = None
) -> dict[str, Target]:
    """Return the target of each linear of a block. `units` are those that go, by the linear that reads them."""
    names, units = [name for names in block.readers.values() for name in names], units or {}
    shares = {name: share[name] if isinstance(share, Mapping) else share for name in names}
    return {name: Target(shares[name], pattern, group, units.get(name)) for name in names}


def removes_no_weight(target: Target) -> bool:
    """Whether the pattern removes units, and none that this linear reads."""
    return target.pattern in STRUCTURES and target.units is None


def weighs(target: Target, block: BlockStats, name: str) -> bool:
    """Whether Fisher information weights a linear's rows; without any, all rows count alike."""
    return target.group == "outputs" and not parse_pattern(target.pattern) and name in block.fisher


def row_worth(fisher: Float[Tensor, " out"]) -> Float[Tensor, " out"]:
    """Return F^¼ over its mean, float32. The score's formula asks for √F; F^¼ did better."""
    worth = fisher.double() ** 0.25
    return (worth / worth.mean().clamp_min(torch.finfo(torch.float64).tiny)).float()


def aim_block(
    weights: Callable[[str], Tensor],
    block: Readers,
    *,
    grams: Mapping[str, Gram],
    crosses: Mapping[str, Tensor],
    strength: float,
) -> dict[str, Tensor]:
    """Return the target weights of a block's linears: with them, pruned inputs give the dense outputs.

    float32, as stored. `crosses` holds X_denseᵀX of the distinct inputs; linears without it keep their weights.
    """
    aimed = {}
    sources = {name: source for source, names in block.readers.items() for name in names}
    for name, prepared in prepared_linears(block, grams):
        source, weight = sources[name], weights(name).float()
        if prepared is not None and source in crosses:
            across = name in block.transposed
            there = oriented(weight, across).to(prepared.gram.device)
            target = corrected_target(there, prepared, crosses[source].float(), strength=strength)
            weight = oriented(target, across).to(weight)
        aimed[name] = weight.contiguous()
    return aimed


def reconstruct(  # noqa: PLR0913 - the linear, its statistics, and how it is stored
    weight: Tensor,
    keep: Tensor,
    prepared: Prepared,
    *,
    reconstruction: Reconstruction,
    gradients: Gram | None = None,
    transposed: bool = False,
    of_inputs: bool = False,
) -> Solved:
    """Return the weights of one linear on its mask, oriented, typed and placed as `weight` is stored.

    `gradients` is the Gram matrix of the gradients of its output, if the reconstruction uses it and it exists.
    With `of_inputs` the mask removes complete inputs. Then least squares has one solution that is the best for all
    outputs: gradients cancel, and SparseGPT's sweep is its approximation.
    """
    solve = function_of((SOLVED_UNITS if of_inputs else reconstruction).function or "")
    device, uses = prepared.gram.device, reconstruction.by_gradients and not of_inputs
    there = (oriented(x, transposed).to(device) for x in (weight, keep))
    further = [gradients.matrix().to(device) if gradients else None] if uses else []
    solved = solve(*there, prepared, *further)
    return replace(solved, keep=keep, weight=oriented(solved.weight, transposed).contiguous().to(weight))


class Pruned(NamedTuple):
    """One linear of a pruned model, as its weight is stored."""

    weight: Tensor  # zero off the mask
    error: float | None  # ‖(W−Ŵ)X‖² / ‖WX‖² on the dense model's inputs; None without their Gram matrix
    masked: float | None  # likewise, without a reconstruction
    solved: dict[str, float]  # solver diagnostics; {} without a solver


def prune_linear(  # noqa: PLR0913 - the linear, its statistics, and how it is stored
    weight: Tensor,
    keep: Tensor,
    prepared: Prepared | None,
    *,
    values: Tensor | None = None,
    reconstruction: Reconstruction | None = None,
    gradients: Gram | None = None,
    transposed: bool = False,
    of_inputs: bool = False,
) -> Pruned:
    """Return one linear on its mask, and its layer errors.

    The kept weights get `values`, or `reconstruction` solves for them where the input has a Gram matrix; else they do
    not change. `of_inputs` as in `reconstruct`; then the errors are of the rows that stay, as nothing reads the others,
    and of linears that lose inputs or change.
    """
    if prepared is None:
        return Pruned(masked(weight if values is None else values, keep), None, None, {})
    device, solved = prepared.gram.device, dict[str, float]()
    there, kept = weight.to(device), keep.to(device)  # once: they cross the link to a GPU
    plain = masked(there, kept)
    different = [plain]
    if values is not None:
        different.append(masked(values.to(device), kept))
    elif reconstruction is not None and reconstruction.function is not None:
        one = reconstruct(
            there,
            kept,
            prepared,
            reconstruction=reconstruction,
            gradients=gradients,
            transposed=transposed,
            of_inputs=of_inputs,
        )
        different.append(masked(one.weight, kept))
        solved = one.diagnostics
    made = different[-1].to(weight.device)
    dense, *pruned = (oriented(w, transposed).float() for w in (there, *different))
    if of_inputs:
        stays = oriented(kept, transposed)
        rows = stays.any(dim=1)
        if not rows.any() or (values is None and stays[rows].all()):
            return Pruned(made, None, None, solved)
        dense, pruned = dense[rows], [one[rows] for one in pruned]
    errors = layer_errors(dense, pruned, prepared.gram, prepared.dead)
    return Pruned(made, errors[-1], errors[0], solved)


def masked(weight: Tensor, keep: Tensor) -> Tensor:
    """Return weights with +0 off the mask; kept weights are byte-identical, in every dtype."""
    if weight.device.type != "cpu":
        return weight.masked_fill(~keep.to(weight.device), 0)
    bits = weight.contiguous().view(getattr(torch, f"uint{8 * weight.itemsize}")).numpy() * keep.cpu().numpy()
    return torch.from_numpy(bits).view(weight.dtype)


def prepare(gram: Gram, name: str) -> Prepared:
    """Return a Gram matrix prepared for solvers; `name` is for messages."""
    return Prepared(gram.matrix(), f"{name}: Gram matrix")


def prepared_linears(block: Readers, grams: Mapping[str, Gram]) -> Iterator[tuple[str, Prepared | None]]:
    """Yield each linear with its Gram matrix, prepared once per distinct input; None for an input without tokens."""
    for source, names in block.readers.items():
        prepared = prepare(grams[source], source) if source in grams else None
        for name in names:
            yield name, prepared


def oriented(weight: Tensor, transposed: bool) -> Tensor:
    """Convert a weight between its stored orientation and [out, in]."""
    return weight.T if transposed else weight
