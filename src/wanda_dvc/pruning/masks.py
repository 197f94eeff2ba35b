"""The masks of a block's linears, and the choice of units, from weights and statistics."""

import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from wanda_dvc.catalog import STRUCTURES, Method, parse_pattern
from wanda_dvc.errors import UserError
from wanda_dvc.kernels import empty
from wanda_dvc.pruning.gram import WEIGHTS_AT_A_TIME, Gram
from wanda_dvc.pruning.reconstruction import ReadWeight, factors_of_linears, oriented
from wanda_dvc.pruning.selection import keep_by_score_share, keep_highest, select
from wanda_dvc.pruning.solvers import GramFactors
from wanda_dvc.pruning.statistics import BlockStats, InputStats, TokenSum
from wanda_dvc.pruning.units import Units, expand, greedy_obs, neighbours, unit_scores

Sparsity = Fraction | Mapping[str, Fraction]  # of a block's weights that go, or of each of its linears'
HOST = torch.device("cpu")


# --- masks ---


def choose(
    weight: Float[Tensor, "out in"],
    given: InputStats | GramFactors,
    *,
    method: Method,
    sparsity: Fraction,
    pattern: str = "unstructured",
    group: str = "row",
    units: Units | None = None,
    row_weights: Float[Tensor, " out"] | None = None,
    name: str = "weight",
) -> Bool[Tensor, "out in"]:
    """Return `keep` for one linear: by the scores of its weights, on their device, or by a solver, on its matrix's.

    `given` are the statistics of the linear's input, or for a solver its Gram matrix. `share` of the weights go, at
    places that `pattern` and `group` allow; with `units`, the inputs of some units go. `worth` multiplies the scores
    of each row. Messages use `name`. Where rows do not compete, the host scores a slice of rows at a time: memory does
    not grow with the linear. UserError where a score is not finite, or the share is out of reach.
    """
    if isinstance(given, GramFactors):
        weight = weight.to(given.gram.device)
        if row_weights is not None:  # a row's problem is the same at every scale
            weight = weight.float() * row_weights.to(weight.device)[:, None]
        if units:
            return expand(greedy_obs(weight, given, units), units.layout).expand(weight.shape)
        among = "row" if group == "row" else "linear"  # solvers ignore the row weights
        return method(weight, given, sparsity=sparsity, pattern=pattern, group=among).keep
    by_row = method.selects_by_row(pattern, group) and not units and weight.device.type == "cpu"
    x = given.to(weight.device)
    rows_at_a_time = max(1, WEIGHTS_AT_A_TIME // weight.shape[1]) if by_row else len(weight)
    keep = empty(weight.shape, torch.bool, weight.device)
    for rows, into in zip(weight.split(rows_at_a_time), keep.split(rows_at_a_time), strict=True):
        scored = method(rows.contiguous(), x)
        if scored.shape != rows.shape:
            found = f"{method.function} returned {list(scored.shape)}"
            raise UserError(f"method {method.name}: {found}, expected the weight's {list(rows.shape)}; correct it")
        scored = scored.float() if scored.dtype in (torch.bfloat16, torch.float16) else scored  # numpy has no bfloat16
        if row_weights is not None:  # needed only where rows compete
            scored = scored * row_weights.to(scored)[:, None]
        if not scored.amax().isfinite():
            raise UserError(
                f"{name}: scores of method {method.name} that are not finite: weights or activations overflow; set "
                "dtype=float32 or bfloat16"
            )
        if units:
            stays = keep_highest(unit_scores(scored, units)[None], units.stay)[0]
            into.copy_(expand(stays, units.layout).expand(scored.shape))
        elif method.competition == "rows":
            into.copy_(keep_by_score_share(scored, float(sparsity)))
        else:
            into.copy_(select(scored, sparsity=sparsity, pattern=pattern, group=group))
    return keep


def choose_block(
    weights: ReadWeight,
    block: BlockStats,
    *,
    method: Method,
    sparsity: Sparsity,
    pattern: str = "unstructured",
    group: str = "row",
    units: Mapping[str, Units] = {},
    grams: Mapping[str, Gram] | None = None,
    device: torch.device = HOST,
) -> dict[str, Tensor]:
    """Return the `keep` masks of one block's linears, oriented as their weights are stored.

    `units` has those that go, by the linear that reads them; such a pattern keeps all weights of other linears. `grams`
    has the Gram matrix of each distinct input where the method needs it. Masks from scores are computed on
    `device`: one at a time on a GPU, in parallel on the host, with torch's number of threads. A solver uses all of a
    device for one linear, and runs on the device of the Gram matrix.
    """
    n_of_m = parse_pattern(pattern)

    def keep(name: str, given: InputStats | GramFactors | None) -> Tensor:
        """Return a linear's mask, from the statistics of its input, or for a solver from its Gram matrix."""
        weight, across = weights(name), name in block.transposed
        if keeps_all(name, pattern, units):
            return torch.ones(weight.shape, dtype=torch.bool)
        weight = oriented(weight.to(device), across)
        if n_of_m and weight.shape[1] % n_of_m[1]:
            found = f"{name} has {weight.shape[1]} inputs, expected a multiple of {n_of_m[1]}"
            raise UserError(f"pattern: got {pattern}, but {found}; choose another m")
        kept = choose(
            weight,
            given or GramFactors(Gram.empty(weight.shape[1]).matrix()),  # an expert without tokens
            method=method,
            sparsity=sparsity[name] if isinstance(sparsity, Mapping) else sparsity,
            pattern=pattern,
            group=group,
            units=units.get(name),
            row_weights=row_weights_of(block.fisher[name]) if group == "outputs" and name in block.fisher else None,
            name=name,
        )
        return oriented(kept, across).contiguous()

    if method.needs == "gram":
        return {name: keep(name, prepared) for name, prepared in factors_of_linears(block.consumers, grams or {})}
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    with ThreadPoolExecutor(max_workers=threads) as pool:  # numpy's partition releases the GIL
        jobs = {name: pool.submit(keep, name, x) for name, x in block.by_linear.items()}
        return {name: job.result() for name, job in jobs.items()}


def keeps_all(name: str, pattern: str, units: Mapping[str, Units]) -> bool:
    """Whether the pattern removes units, and none that this linear reads."""
    return pattern in STRUCTURES and name not in units


def row_weights_of(fisher: Float[Tensor, " out"]) -> Float[Tensor, " out"]:
    """Return F^¼ over its mean, float32. The score's formula asks for √F; F^¼ did better."""
    row_weights = fisher.double() ** 0.25
    return (row_weights / row_weights.mean().clamp_min(torch.finfo(torch.float64).tiny)).float()


def choose_units(
    sets: Mapping[str, Units],
    weights: ReadWeight,
    blocks: Iterable[BlockStats],
    *,
    method: Method,
    together: bool = False,
    dtype: torch.dtype = torch.float64,
    device: torch.device = HOST,
) -> dict[str, Bool[Tensor, " units"]]:
    """Return the units of each set that stay: those with the highest scores; of ties the first goes.

    With `together` the units that go are neighbours, and not the first.

    The units are complete linears: blocks or experts. Without a score of units, a unit's is the sum of its weights'
    scores. `dtype` is that of the scores and the sums. `weights` reads a linear's stored weight. UserError if a score
    is not finite, or the outputs of experts were not recorded.
    """
    scores: dict[str, list[float]] = {name: [] for name in sets}
    for block in blocks:
        inputs = block.by_linear
        for name, units in sets.items():
            for linears in units.members:
                if linears[0] not in inputs:  # of another block
                    continue
                if method.competition == "blocks":
                    found = method(block)
                elif method.competition == "experts":
                    found = method(_outputs(block, linears, inputs, method))
                else:
                    found = 0.0
                    for linear in linears:
                        weight = oriented(weights(linear).to(device), linear in block.transposed)
                        found += method(weight, inputs[linear].to(weight.device)).sum(dtype=dtype).item()
                if not math.isfinite(found):
                    raise UserError(
                        f"{linears[0]}: the score of its unit is not finite: weights or activations overflow; set "
                        "dtype=float32"
                    )
                scores[name].append(found)
    stays = {}
    for name, units in sets.items():
        parts = torch.tensor(scores[name], dtype=dtype).chunk(units.groups)
        count = units.stay // units.groups
        kept = (neighbours(x, count) if together else keep_highest(x[None], count)[0] for x in parts)
        stays[name] = torch.cat([*kept])
    return stays


def _outputs(block: BlockStats, linears: Sequence[str], inputs: Mapping[str, InputStats], method: Method) -> TokenSum:
    """Return the sums over the outputs of one expert. UserError if they do not cover all of its tokens."""
    tokens = max(inputs[name].count for name in linears)
    found = [block.outputs[name] for name in linears if name in block.outputs]
    outputs = found[0] if found else TokenSum(torch.zeros((), dtype=torch.float64), 0)
    if outputs.count != tokens or len(found) > 1:
        raise UserError(
            f"method: {method.name}: {linears[0]}: calibration recorded {outputs.count} gates for {tokens} tokens of "
            "this expert, expected as many; set method=wanda"
        )
    return outputs
