"""Rows are cut into shards by their number alone, and what shards give is merged in the shards' order.

So sums are the same bytes, whichever process computes a shard and in whatever order shards end.
"""

# Of several windows in one pass through a block, by kind of device: they fill a card. By the data alone, because the
# last digits depend on it; never of two shards.
TOKENS_TOGETHER = {"cuda": 8192}
FEWEST, LONGEST = 16, 100  # shards, where there are as many rows; rows of a shard


def cut(rows: int) -> list[range]:
    """Return the shards: 128 rows make 16 of 8, ten thousand make 100 of 100. The last may be shorter."""
    size = min(max(rows // FEWEST, 1), LONGEST)
    return [range(start, min(start + size, rows)) for start in range(0, rows, size)]
