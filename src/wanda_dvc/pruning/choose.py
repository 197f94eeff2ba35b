"""From weights and statistics to masks: a method's scores, then the selection that its row in the catalog names."""

import importlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from wanda_dvc.catalog import Method
from wanda_dvc.errors import UserError
from wanda_dvc.pruning.selection import keep_by_share, select
from wanda_dvc.pruning.statistics import BlockStats, InputStats

WEIGHTS_AT_A_TIME = 2**22  # rows are scored in slices of about so many weights, to bound memory


@dataclass(frozen=True)
class Target:
    """How much goes, and where zeros may stand: of one linear, or of all with the same share."""

    share: Fraction  # of the weights that go
    pattern: str = "unstructured"
    group: str = "row"


def score_function(method: Method) -> Callable[[Tensor, InputStats], Tensor]:
    """Return the function that a method's row names: (weight [out, in], statistics) → score [out, in], float32."""
    module, _, name = method.function.partition(":")
    function: Callable[[Tensor, InputStats], Tensor] = getattr(importlib.import_module(module), name)
    return function


def choose(
    weight: Float[Tensor, "out in"], x: InputStats, *, method: Method, target: Target, name: str = "weight"
) -> Bool[Tensor, "out in"]:
    """Return `keep` for one linear; `name` stands in messages.

    Where a row's mask depends on that row alone, rows are taken some at a time: memory does not grow with the linear.
    UserError where a score is not finite, or the target is out of the method's reach.
    """
    score = score_function(method)
    by_row = method.selects_by_row(target.pattern, target.group)
    rows_at_a_time = max(1, WEIGHTS_AT_A_TIME // weight.shape[1]) if by_row else len(weight)
    keep = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
    for rows, into in zip(weight.split(rows_at_a_time), keep.split(rows_at_a_time), strict=True):
        scored = score(rows.contiguous(), x)
        if not scored.amax().isfinite():
            raise UserError(f"{name}: scores that are not finite; its weights or the activations it reads overflow")
        into.copy_(SELECTIONS[method.competition](scored, target))
    return keep


SELECTIONS: Mapping[str, Callable[[Tensor, Target], Tensor]] = {
    "groups": lambda score, target: select(score, share=target.share, pattern=target.pattern, group=target.group),
    "rows": lambda score, target: keep_by_share(score, float(target.share)),
}


def choose_block(
    weights: Callable[[str], Tensor], block: BlockStats, *, method: Method, targets: Mapping[str, Target]
) -> dict[str, Tensor]:
    """Return the `keep` masks of one block's linears, oriented as their weights are stored.

    `weights` reads a linear's stored weight, `targets` has an entry for each linear. Linears are chosen in parallel,
    by as many threads as torch has.
    """

    def keep(name: str, x: InputStats) -> Tensor:
        weight, across = weights(name), name in block.transposed
        kept = choose(weight.T if across else weight, x, method=method, target=targets[name], name=name)
        return kept.T.contiguous() if across else kept

    with ThreadPoolExecutor(max_workers=torch.get_num_threads()) as pool:  # numpy's partition releases the GIL
        jobs = {
            name: pool.submit(keep, name, block.inputs[source])
            for source, names in block.readers.items()
            for name in names
        }
        return {name: job.result() for name, job in jobs.items()}
