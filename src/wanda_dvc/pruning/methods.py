"""The table of methods. A new one is a scoring function and a row."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from wanda_dvc.pruning import scores
from wanda_dvc.pruning.selection import keep_by_share, select
from wanda_dvc.pruning.statistics import InputStats


@dataclass(frozen=True)
class Method:
    """How a weight is scored, from the weight and the statistics of its input, and how the scores choose."""

    name: str
    score: Callable[[Tensor, InputStats], Tensor]
    needs_inputs: bool
    paper: str
    select: Callable[..., Tensor] = select
    by_row: bool = True  # whether, where rows are the group, what goes of one depends on no other

    def rows_apart(self, pattern: str, group: str) -> bool:
        """Whether some rows of a linear can be chosen from without the others."""
        return self.by_row and (pattern != "unstructured" or group == "row")


METHODS = {
    method.name: method
    for method in (
        Method("magnitude", lambda weight, _: scores.magnitude(weight), False, "Han et al. 2015, arXiv 1506.02626"),
        Method("wanda", lambda weight, x: scores.wanda(weight, x.norm), True, "Sun et al. 2024, arXiv 2306.11695"),
        Method(
            "wanda-variant",
            lambda weight, x: scores.wanda(weight, x.norm),
            True,
            "Sun et al. 2024, arXiv 2306.11695, appendix",
            lambda score, *, sparsity, **_: keep_by_share(score, sparsity),
            by_row=False,
        ),
    )
}
