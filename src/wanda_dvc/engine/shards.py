"""Cuts rows into shards. The cut depends only on the number of rows; sums are merged in the shards' order.

So sums are byte-identical for any assignment of shards to processes, and for any order of completion.
"""

# Tokens of several windows in one pass through a block, by kind of device: they fill a GPU. A pass depends on the data
# alone, because last digits depend on its size; it never mixes two shards.
TOKENS_TOGETHER = {"cuda": 8192}
FEWEST, LONGEST = 16, 100  # preferred number of shards; rows of a shard


def cut(rows: int) -> list[range]:
    """Return the shards: 128 rows make 16 of 8, ten thousand make 100 of 100. The last may be shorter."""
    size = min(max(rows // FEWEST, 1), LONGEST)
    return [range(start, min(start + size, rows)) for start in range(0, rows, size)]
