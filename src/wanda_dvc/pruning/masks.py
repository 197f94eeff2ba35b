"""The masks of linears, and the choice of units, from weights and statistics."""

import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from wanda_dvc.catalog import STRUCTURES, Method, parse_pattern
from wanda_dvc.errors import UserError
from wanda_dvc.pruning.gram import WEIGHTS_AT_A_TIME, Gram
from wanda_dvc.pruning.reconstruction import ReadWeight, oriented
from wanda_dvc.pruning.selection import keep_by_score_fraction, keep_highest, select
from wanda_dvc.pruning.solvers import GramFactors
from wanda_dvc.pruning.statistics import BlockStats, InputStats, TokenSum
from wanda_dvc.pruning.units import Units, expand, greedy_obs, keep_around_neighbours, unit_scores

# The sparsity of all linears of a block, or of each.
BlockSparsity = Fraction | Mapping[str, Fraction]
HOST = torch.device("cpu")


# --- masks of a block ---


def choose_block(
    weights: ReadWeight,
    block: BlockStats,
    *,
    method: Method,
    sparsity: BlockSparsity,
    pattern: str = "unstructured",
    group: str = "row",
    units: Mapping[str, Units] = {},
    device: torch.device = HOST,
) -> dict[str, Tensor]:
    """Return the masks of one block's linears by their scores, oriented as their weights are stored.

    Masks are computed on `device`: one at a time on a GPU, in parallel on the host, with torch's number of threads.
    The arguments are those of `choose_linear`.
    """

    def choose(linear: str, x: InputStats) -> Tensor:
        weight = weights(linear).to(device)
        return choose_linear(
            linear, weight, x, block, method=method, sparsity=sparsity, pattern=pattern, group=group, units=units
        )

    threads = torch.get_num_threads() if device.type == "cpu" else 1
    with ThreadPoolExecutor(max_workers=threads) as pool:  # numpy's partition releases the GIL
        jobs = {linear: pool.submit(choose, linear, x) for linear, x in block.by_linear.items()}
        return {linear: job.result() for linear, job in jobs.items()}


def choose_linear(
    linear: str,
    weight: Tensor,
    statistics: InputStats | GramFactors | None,
    block: BlockStats,
    *,
    method: Method,
    sparsity: BlockSparsity,
    pattern: str = "unstructured",
    group: str = "row",
    units: Mapping[str, Units] = {},
) -> Tensor:
    """Return the mask of one linear, oriented as its weight is stored; True is kept.

    The method reads `statistics` of the linear's input: its norms, or for a solver its factored Gram matrix; None for a
    solver's input without tokens. The fraction `sparsity` is removed, as `pattern` and `group` say. `units` has the
    units to remove, by the linear that reads them; a pattern of units keeps all weights of other linears. UserError if
    the pattern does not fit the linear, or a score is not finite.
    """
    if keeps_all(linear, pattern, units):
        return torch.ones(weight.shape, dtype=torch.bool)
    transposed = linear in block.transposed
    weight = oriented(weight, transposed)
    inputs, n_of_m = weight.shape[1], parse_pattern(pattern)
    if n_of_m and inputs % n_of_m[1]:
        mismatch = f"{linear} has {inputs} inputs, expected a multiple of {n_of_m[1]}"
        raise UserError(f"pattern: got {pattern}, but {mismatch}; choose another m")
    if statistics is None:  # an expert without tokens
        statistics = GramFactors(Gram.empty(inputs).matrix(), linear)
    row_factors = None
    if group == "outputs" and linear in block.fisher:
        row_factors = row_factors_of(block.fisher[linear])
    if linear in units:
        mask = choose_inputs(weight, statistics, units[linear], method=method, row_factors=row_factors, name=linear)
        return oriented(mask, transposed).contiguous()
    if isinstance(sparsity, Mapping):
        sparsity = sparsity[linear]
    if isinstance(statistics, GramFactors):
        mask = choose_by_solver(
            weight, statistics, method=method, sparsity=sparsity, pattern=pattern, group=group, row_factors=row_factors
        )
    else:
        mask = choose_by_score(
            weight,
            statistics,
            method=method,
            sparsity=sparsity,
            pattern=pattern,
            group=group,
            row_factors=row_factors,
            name=linear,
        )
    return oriented(mask, transposed).contiguous()


def keeps_all(linear: str, pattern: str, units: Mapping[str, Units]) -> bool:
    """Whether the pattern removes units, and none that this linear reads."""
    return pattern in STRUCTURES and linear not in units


def row_factors_of(fisher: Float[Tensor, " out"]) -> Float[Tensor, " out"]:
    """Return F^¼ over its mean, float32. The score's formula asks for √F; F^¼ did better."""
    row_factors = fisher.double() ** 0.25
    return (row_factors / row_factors.mean().clamp_min(torch.finfo(torch.float64).tiny)).float()


# --- the mask of one linear ---


def choose_by_score(
    weight: Float[Tensor, "out in"],
    x: InputStats,
    *,
    method: Method,
    sparsity: Fraction,
    pattern: str = "unstructured",
    group: str = "row",
    row_factors: Float[Tensor, " out"] | None = None,
    name: str = "weight",
) -> Bool[Tensor, "out in"]:
    """Return the mask of the highest scores, on the weight's device.

    `row_factors` multiply the scores of each row. Where rows do not compete, the host scores a slice of rows at a time:
    memory does not grow with the linear. UserError, with `name`, if a score is not finite, or the sparsity is out of
    reach.
    """
    rows_at_a_time = len(weight)
    if method.selects_by_row(pattern, group) and row_factors is None and weight.device.type == "cpu":
        rows_at_a_time = max(1, WEIGHTS_AT_A_TIME // weight.shape[1])
    mask = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
    for rows, mask_rows in zip(weight.split(rows_at_a_time), mask.split(rows_at_a_time), strict=True):
        score = scores_of(rows.contiguous(), x.to(weight.device), method=method, row_factors=row_factors, name=name)
        if method.competition == "rows":
            mask_rows.copy_(keep_by_score_fraction(score, float(sparsity)))
        else:
            mask_rows.copy_(select(score, sparsity=sparsity, pattern=pattern, group=group))
    return mask


def scores_of(
    weight: Float[Tensor, "out in"],
    x: InputStats,
    *,
    method: Method,
    row_factors: Float[Tensor, " out"] | None,
    name: str,
) -> Float[Tensor, "out in"]:
    """Return a method's scores, times the row weights. UserError if they are not finite, or of another shape."""
    score = method(weight, x)
    if score.shape != weight.shape:
        raise UserError(
            f"method {method.name}: {method.function} returned {list(score.shape)}, expected the weight's "
            f"{list(weight.shape)}; correct it"
        )
    if score.dtype in (torch.bfloat16, torch.float16):  # numpy has no bfloat16
        score = score.float()
    if row_factors is not None:
        score = score * row_factors.to(score)[:, None]
    if not score.amax().isfinite():
        raise UserError(
            f"{name}: scores of method {method.name} that are not finite: weights or activations overflow; set "
            "dtype=float32 or bfloat16"
        )
    return score


def choose_by_solver(
    weight: Float[Tensor, "out in"],
    factors: GramFactors,
    *,
    method: Method,
    sparsity: Fraction,
    pattern: str = "unstructured",
    group: str = "row",
    row_factors: Float[Tensor, " out"] | None = None,
) -> Bool[Tensor, "out in"]:
    """Return the mask that a solver chooses, on the Gram matrix's device.

    Solvers know the groups `row` and `linear`. `row_factors` multiply the rows: a row's problem is the same at every
    scale, but weights of other rows compete with it.
    """
    weight = _weighted(weight, factors, row_factors)
    mask: Tensor = method(
        weight, factors, sparsity=sparsity, pattern=pattern, group="row" if group == "row" else "linear"
    ).mask
    return mask


def choose_inputs(
    weight: Float[Tensor, "out in"],
    statistics: InputStats | GramFactors,
    units: Units,
    *,
    method: Method,
    row_factors: Float[Tensor, " out"] | None = None,
    name: str = "weight",
) -> Bool[Tensor, "out in"]:
    """Return the mask without the inputs of removed units: those of lowest scores, or of least cost for a solver."""
    if isinstance(statistics, GramFactors):
        kept = greedy_obs(_weighted(weight, statistics, row_factors), statistics, units)
    else:
        score = scores_of(
            weight.contiguous(), statistics.to(weight.device), method=method, row_factors=row_factors, name=name
        )
        kept = keep_highest(unit_scores(score, units)[None], units.kept)[0]
    return expand(kept, units.layout).expand(weight.shape)


def _weighted(weight: Tensor, factors: GramFactors, row_factors: Tensor | None) -> Tensor:
    weight = weight.to(factors.gram.device)
    return weight if row_factors is None else weight.float() * row_factors.to(weight.device)[:, None]


# --- units that are complete linears ---


def choose_units(
    sets: Mapping[str, Units],
    weights: ReadWeight,
    blocks: Iterable[BlockStats],
    *,
    method: Method,
    neighbours: bool = False,
    dtype: torch.dtype = torch.float64,
    device: torch.device = HOST,
) -> dict[str, Bool[Tensor, " units"]]:
    """Return the mask of each set's units by their scores: the highest are kept; of ties the first is removed.

    With `neighbours` the removed units are neighbours, and not the first.

    The units are complete linears: blocks or experts. `dtype` is that of the scores and the sums. `weights` reads a
    linear's stored weight. UserError if a score is not finite, or the outputs of experts were not recorded.
    """
    scores: dict[str, list[float]] = {name: [] for name in sets}
    for block in blocks:
        inputs = block.by_linear
        for name, units in sets.items():
            for linears in units.members:
                if linears[0] not in inputs:  # of another block
                    continue
                score = _unit_score(linears, weights, block, inputs, method=method, dtype=dtype, device=device)
                if not math.isfinite(score):
                    raise UserError(
                        f"{linears[0]}: the score of its unit is not finite: weights or activations overflow; set "
                        "dtype=float32"
                    )
                scores[name].append(score)
    masks = {}
    for name, units in sets.items():
        kept = units.kept // units.groups
        masks_of_groups = []
        for group in torch.tensor(scores[name], dtype=dtype).chunk(units.groups):
            mask = keep_around_neighbours(group, kept) if neighbours else keep_highest(group[None], kept)[0]
            masks_of_groups.append(mask)
        masks[name] = torch.cat(masks_of_groups)
    return masks


def _unit_score(
    linears: Sequence[str],
    weights: ReadWeight,
    block: BlockStats,
    inputs: Mapping[str, InputStats],
    *,
    method: Method,
    dtype: torch.dtype,
    device: torch.device,
) -> float:
    if method.competition == "blocks":
        return float(method(block))
    if method.competition == "experts":
        return float(method(_outputs(block, linears, inputs, method)))
    total = 0.0
    for linear in linears:
        weight = oriented(weights(linear).to(device), linear in block.transposed)
        total += method(weight, inputs[linear].to(weight.device)).sum(dtype=dtype).item()
    return total


def _outputs(block: BlockStats, linears: Sequence[str], inputs: Mapping[str, InputStats], method: Method) -> TokenSum:
    tokens = max(inputs[linear].count for linear in linears)
    recorded = [block.outputs[linear] for linear in linears if linear in block.outputs]
    outputs = recorded[0] if recorded else TokenSum(torch.zeros((), dtype=torch.float64), 0)
    if outputs.count != tokens or len(recorded) > 1:
        raise UserError(
            f"method: {method.name}: {linears[0]}: calibration recorded {outputs.count} gates for {tokens} tokens of "
            "this expert, expected as many; set method=wanda"
        )
    return outputs
