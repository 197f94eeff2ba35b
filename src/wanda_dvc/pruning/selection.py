"""Selection: compute masks (True is kept) from scores, with exact counts in every group; masks of one bit a weight.

Ties: the leftmost is pruned first, as in a stable ascending sort.
"""

from fractions import Fraction

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from wanda_dvc.catalog import parse_pattern

LARGEST_COUNTED_M = 16  # the largest m for counting ranks; uint8 overflows at 257


def count_removed(size: int, sparsity: Fraction) -> int:
    """Return ⌊size · sparsity⌋, exactly: of 100 and 0.29 it is 29, where floating point gives 28."""
    return int(size * sparsity)


def select(
    score: Float[Tensor, "out in"], *, sparsity: Fraction, pattern: str = "unstructured", group: str = "row"
) -> Bool[Tensor, "out in"]:
    """Return the mask: every group loses the fraction `sparsity` of its weights.

    Weights compete within a `row` (one output, the Wanda paper's choice) or the complete `linear`. With pattern `n:m`
    they compete within m neighbours along the input, for any `group`, and n are kept.
    """
    n_of_m = parse_pattern(pattern)
    if n_of_m:
        return keep_n_of_m(score, *n_of_m)
    groups = score if group == "row" else score.reshape(1, -1)
    size = groups.shape[1]
    return keep_highest(groups, size - count_removed(size, sparsity)).view(score.shape)


def keep_highest(score: Float[Tensor, "group size"], kept: int) -> Bool[Tensor, "group size"]:
    """Return the mask of the `kept` highest scores of each row, exactly, by one partition instead of a sort."""
    pruned = score.shape[1] - kept
    if pruned == 0:
        return torch.ones_like(score, dtype=torch.bool)
    threshold = kth_lowest(score, pruned)
    mask = score > threshold
    # Weights that equal the threshold fill the row up to `kept`, the rightmost first.
    missing = kept - row_counts(mask)
    rows = missing[:, 0].nonzero()[:, 0]
    if len(rows):
        ties = score[rows] == threshold[rows]
        rank = ties.cumsum(dim=1, dtype=torch.int32)
        mask[rows] |= ties & (rank > rank[:, -1:] - missing[rows])
    return mask


def kth_lowest(score: Float[Tensor, "group size"], k: int) -> Float[Tensor, "group 1"]:
    """Return the k-th lowest score of each row, on a CPU by numpy's partition: 5 times as fast as kthvalue.

    A GPU's kthvalue uses one thread block a row: many rows fill the device, and one row does not.
    """
    if score.device.type != "cpu":
        return kth_by_bits(score, k) if len(score) == 1 else torch.kthvalue(score, k, dim=1, keepdim=True).values
    return torch.from_numpy(np.partition(score.numpy(), k - 1, axis=1)[:, k - 1 : k])


def row_counts(mask: Bool[Tensor, "group size"]) -> Int[Tensor, "group 1"]:
    """Return the number of kept weights of each row, on a CPU by numpy: up to 13 times as fast as torch's sum."""
    if mask.device.type != "cpu":
        return mask.sum(dim=1, keepdim=True, dtype=torch.int32)
    return torch.from_numpy(mask.numpy().sum(axis=1, keepdims=True, dtype=np.int32))


def kth_by_bits(score: Float[Tensor, "group size"], k: int) -> Float[Tensor, "group 1"]:
    """Return the k-th lowest score of each row, by one pass of the complete device for each of a number's bits.

    The threshold rises from the lowest integer by steps of one bit each, the largest first: it takes a step if fewer
    than k scores are then lower. −0 counts as lower than 0, which are ties. Memory: an integer and a boolean a score.
    """
    width = 8 * score.itemsize
    limits = torch.iinfo(getattr(torch, f"int{width}"))

    def reversed_below_zero(bits: Tensor) -> Tensor:  # sorts bit patterns like their numbers; its own inverse
        return (bits >> width - 1).bitwise_and_(limits.max).bitwise_xor_(bits)

    order = reversed_below_zero(score.contiguous().view(getattr(torch, limits.dtype)))
    threshold = torch.full_like(order[:, :1], limits.min)
    # The first step clears the sign bit, the others set a bit.
    for bit in (limits.min, *(1 << position for position in reversed(range(width - 1)))):
        raised = threshold ^ bit
        lower = (order < raised).sum(dim=1, keepdim=True)
        threshold = raised.where(lower < k, threshold)
    return reversed_below_zero(threshold).view(score.dtype)


def keep_n_of_m(score: Float[Tensor, "out in"], n: int, m: int) -> Bool[Tensor, "out in"]:
    """Return the mask of the n highest of every m neighbours along the input."""
    if m > LARGEST_COUNTED_M:
        return keep_highest(score.reshape(-1, m), n).view(score.shape)
    # For small m, counting the higher-ranked neighbours of each weight is faster than a partition.
    neighbours = score.unflatten(1, (-1, m)).movedim(-1, 0).contiguous()  # [m, out, in / m]
    above = torch.zeros(neighbours.shape, dtype=torch.uint8, device=score.device)
    for later in range(m):
        for earlier in range(later):
            first_wins = neighbours[earlier] > neighbours[later]
            above[later] += first_wins
            above[earlier] += ~first_wins
    return (above < n).movedim(0, -1).flatten(1)


def pack_bits(mask: Bool[Tensor, "rows columns"]) -> UInt8[Tensor, "rows bytes"]:
    """Return one bit a weight, on the mask's device: uint8 [rows, ⌈columns / 8⌉], first column in the highest bit."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.packbits(mask.numpy(), axis=1))
    by_byte = nn.functional.pad(mask.view(torch.uint8), (0, -mask.shape[1] % 8)).unflatten(1, (-1, 8))
    return (by_byte << _bit_positions(mask.device)).sum(dim=2, dtype=torch.uint8)


def unpack_bits(bits: UInt8[Tensor, "rows bytes"], columns: int) -> Bool[Tensor, "rows columns"]:
    """Return the mask, on the device of the bits; `pack_bits` is the inverse."""
    if bits.device.type == "cpu":
        return torch.from_numpy(np.unpackbits(bits.numpy(), axis=1, count=columns).view(np.bool_))
    by_bit = (bits[:, :, None] >> _bit_positions(bits.device)).bitwise_and_(1)
    return by_bit.flatten(1)[:, :columns].contiguous().view(torch.bool)


def _bit_positions(device: torch.device) -> UInt8[Tensor, "8"]:
    return torch.arange(7, -1, -1, dtype=torch.uint8, device=device)
