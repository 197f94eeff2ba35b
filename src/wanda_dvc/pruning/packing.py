"""Packed weights: the values that are not zero, and one bit a weight that says where they stand. Lossless."""

import numpy as np
import torch
from jaxtyping import Bool, Shaped, UInt8
from torch import Tensor

ZSTD_LEVEL = 9  # higher ones take far longer for less than 1 %
LENGTH = 8  # bytes that say how long a compressed plane is
COUNTED_AT_A_TIME = 2**20  # weights; a core's cache holds them
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def pack_bits(keep: Bool[Tensor, "rows columns"]) -> UInt8[Tensor, "rows bytes"]:
    """Return one bit a weight, uint8 [rows, ⌈columns / 8⌉], the first column in the highest bit."""
    return torch.from_numpy(np.packbits(keep.cpu().numpy(), axis=1))


def unpack_bits(bits: UInt8[Tensor, "rows bytes"], columns: int) -> Bool[Tensor, "rows columns"]:
    """Return the mask of `pack_bits`."""
    return torch.from_numpy(np.unpackbits(bits.numpy(), axis=1, count=columns).view(np.bool_))


def pack(weight: Shaped[Tensor, "rows columns"]) -> tuple[Shaped[Tensor, " nonzeros"], UInt8[Tensor, "rows bytes"]]:
    """Return a weight's nonzeros row by row, and the bits that say where they stand. −0.0 counts as a nonzero."""
    keep = weight.contiguous().view(getattr(torch, f"int{8 * weight.itemsize}")) != 0
    return weight[keep], pack_bits(keep)


def unpack(
    values: Shaped[Tensor, " nonzeros"], bits: UInt8[Tensor, "rows bytes"], columns: int
) -> Shaped[Tensor, "rows columns"]:
    """Return the weight of `pack`, bit by bit. ValueError where there are more or fewer values than bits set."""
    keep = unpack_bits(bits, columns)
    if (count := int(keep.sum())) != len(values):
        raise ValueError(f"{len(values)} values, expected {count}, as many as bits are set")
    return torch.zeros(keep.shape, dtype=values.dtype).masked_scatter_(keep, values)


def count_zeros(weight: Shaped[Tensor, "rows columns"]) -> int:
    """Return how many weights are 0 or −0. Numpy counts integers three times as fast as torch counts numbers."""
    bits = weight.contiguous().view(torch.uint8).numpy().view(UNSIGNED[weight.itemsize]).ravel()
    parts = (bits[start : start + COUNTED_AT_A_TIME] for start in range(0, len(bits), COUNTED_AT_A_TIME))
    return len(bits) - sum(int(np.count_nonzero(part << 1)) for part in parts)  # without the sign


def is_two_of_four(bits: UInt8[Tensor, "rows bytes"], columns: int) -> bool:
    """Whether at most two of every four neighbours are there, and the columns are a multiple of four."""
    return columns % 4 == 0 and bool((unpack_bits(bits, columns).view(len(bits), -1, 4).sum(-1) <= 2).all())


def packed_bytes(weight: Shaped[Tensor, "rows columns"]) -> int:
    """Bytes of a packed weight."""
    bits = weight.contiguous().view(getattr(torch, f"int{8 * weight.itemsize}"))
    return int(torch.count_nonzero(bits)) * weight.itemsize + weight.shape[0] * -(-weight.shape[1] // 8)


def compress(values: Shaped[Tensor, " count"]) -> UInt8[Tensor, " bytes"]:
    """Compress floating-point numbers without loss: byte planes, the exponents' first, each with zstd.

    Numbers are rotated left by one bit first: the sign comes last, and the exponent has a byte of its own in bfloat16
    and float32. Of each plane: its length, 8 bytes, the lowest first; then a zstd frame.
    """
    import pyarrow

    codec = pyarrow.Codec("zstd", compression_level=ZSTD_LEVEL)
    size = values.itemsize
    numbers = values.contiguous().view(torch.uint8).numpy().view(UNSIGNED[size])
    rotated = np.left_shift(numbers, 1) | np.right_shift(numbers, 8 * size - 1)
    planes = rotated.astype(f">u{size}").view(np.uint8).reshape(-1, size).T
    frames = [codec.compress(np.ascontiguousarray(plane), asbytes=True) for plane in planes]
    joined = b"".join(len(frame).to_bytes(LENGTH, "little") + frame for frame in frames)
    return torch.frombuffer(bytearray(joined), dtype=torch.uint8)


def decompress(compressed: UInt8[Tensor, " bytes"], dtype: torch.dtype, count: int) -> Shaped[Tensor, " count"]:
    """Return the numbers of `compress`. ValueError where that does not give `count` of them."""
    import pyarrow

    codec = pyarrow.Codec("zstd")
    size, data, planes, at = dtype.itemsize, compressed.numpy().data, [], 0
    for _ in range(size):
        end = at + LENGTH + int.from_bytes(data[at : at + LENGTH], "little")
        if end > len(data):
            raise ValueError(f"{len(data)} compressed bytes, expected {end} or more")
        try:
            planes.append(np.frombuffer(codec.decompress(data[at + LENGTH : end], count, asbytes=True), np.uint8))
        except OSError as error:
            raise ValueError(f"compressed values: {error}") from None
        at = end
    if at != len(data):
        raise ValueError(f"{len(data)} compressed bytes, expected {at}")
    rotated = np.stack(planes, axis=1).reshape(-1).view(f">u{size}").astype(UNSIGNED[size])
    numbers = np.right_shift(rotated, 1) | np.left_shift(rotated, 8 * size - 1)
    return torch.from_numpy(numbers.view(np.uint8)).view(dtype)
