"""Write the embedded text, from the language reference that CPython 3.11 carries (`pydoc_data.topics`).

    python3.11 scripts/embedded_text.py src/wanda_dvc/embedded/text

Many topics are excerpts of others. Topics that share a passage (a paragraph of 40 characters or more,
a sentence of more than 60) go to the same split, so that perplexity is never measured on a passage
of the calibration text. The text differs between Python versions; the committed one is from 3.11.7.
"""

import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from pydoc_data.topics import topics


def passages(text: str) -> set[str]:
    """Return the paragraphs and sentences of a text that are long enough to identify it."""

    def flat(piece: str) -> str:
        return " ".join(piece.split())

    paragraphs = {flat(paragraph) for paragraph in re.split(r"\n\s*\n", text)}
    sentences = set(re.split(r"(?<=[.:])\s+", flat(text)))
    return {p for p in paragraphs if len(p) >= 40} | {s for s in sentences if len(s) > 60}


def families() -> list[list[str]]:
    """Return the topics grouped by shared passages, direct or through others; the longest family first."""
    family = {name: {name} for name in topics}
    holders = defaultdict(list)
    for name, text in topics.items():
        for passage in passages(text):
            holders[passage].append(name)
    for first, *others in holders.values():
        for other in others:
            if family[other] is not family[first]:
                family[first] |= family[other]
                for name in family[other]:
                    family[name] = family[first]
    unique = {id(members): sorted(members) for members in family.values()}
    return sorted(unique.values(), key=lambda members: (-sum(len(topics[name]) for name in members), members))


def main(folder: Path) -> None:
    """Write `train.jsonl` and `test.jsonl`, of nearly the same size."""
    splits: dict[str, list[str]] = {"train": [], "test": []}
    size = {"train": 0, "test": 0}
    for members in families():
        split = min(size, key=lambda name: size[name])
        splits[split] += members
        size[split] += sum(len(topics[name]) for name in members)
    for split, names in splits.items():
        rows = [{"topic": name, "text": topics[name]} for name in sorted(names)]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
        sys.stdout.write(f"{split}: {len(rows)} topics, {size[split]:,} characters\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
