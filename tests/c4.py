"""A shard of C4 with documents that are drawn here."""

import gzip
import json
import random

SHARD = "en/c4-train.00000-of-01024.json.gz"


def packed(documents: list[str]) -> bytes:
    lines = "".join(json.dumps({"text": text, "url": "x"}) + "\n" for text in documents)
    return gzip.compress(lines.encode(), mtime=0)


def documents(count: int = 60) -> list[str]:
    rng = random.Random(5)
    return ["".join(rng.choices("abc é\n", k=rng.choice([5, 40, 64, 65, 66, 90, 200]))) for _ in range(count)]
