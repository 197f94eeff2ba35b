"""Masks of one bit a weight, and the count of zeros."""

import numpy as np
import torch
from jaxtyping import Bool, Shaped, UInt8
from torch import Tensor

COUNTED_AT_A_TIME = 2**20  # weights; a core's cache holds them
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def pack_bits(keep: Bool[Tensor, "rows columns"]) -> UInt8[Tensor, "rows bytes"]:
    """Return one bit a weight, uint8 [rows, ⌈columns / 8⌉], the first column in the highest bit."""
    return torch.from_numpy(np.packbits(keep.cpu().numpy(), axis=1))


def unpack_bits(bits: UInt8[Tensor, "rows bytes"], columns: int) -> Bool[Tensor, "rows columns"]:
    """Return the mask of `pack_bits`."""
    return torch.from_numpy(np.unpackbits(bits.numpy(), axis=1, count=columns).view(np.bool_))


def count_zeros(weight: Shaped[Tensor, "rows columns"]) -> int:
    """Return the number of weights that are 0 or −0. Numpy counts integers three times as fast as torch floats."""
    bits = weight.contiguous().view(torch.uint8).numpy().view(UNSIGNED[weight.itemsize]).ravel()
    parts = (bits[start : start + COUNTED_AT_A_TIME] for start in range(0, len(bits), COUNTED_AT_A_TIME))
    return len(bits) - sum(int(np.count_nonzero(part << 1)) for part in parts)  # without the sign
