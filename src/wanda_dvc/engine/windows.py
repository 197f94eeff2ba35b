"""Makes windows of tokens from text."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from wanda_dvc.errors import UserError, notice, reason

FAR = 2**40  # tokens: more than a document has


class DrawnWindows(NamedTuple):
    """Windows that were drawn from a text, or from several."""

    tokens: Int[Tensor, "windows length"]
    distinct: int  # tokens of the text in these windows; one in several windows counts once


def load_tokenizer(model: Path) -> Any:
    """Load the tokenizer of a model's directory. UserError if it does not load."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # for a damaged file, its library may raise any exception
        raise UserError(f"{model}: the tokenizer does not load ({reason(error)}); copy tokenizer.json again") from error


def tokenize(text: str, tokenizer: Any) -> Int[Tensor, " tokens"]:
    """Return the tokens of the complete text, by the tokenizer's defaults (a BOS token, if any, appears once)."""
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)


def draw(
    tokens: Int[Tensor, " tokens"], *, samples: int, length: int, seed: int, setting: str = "calibration.text"
) -> DrawnWindows:
    """Draw windows of a text as the Wanda authors do. UserError, with the `setting`, if it has too few tokens."""
    if len(tokens) <= length:
        problem = f"{len(tokens)} tokens, expected more than {length}, a window's length"
        raise UserError(f"{setting}: {problem}; take a longer text, or lower calibration.length")
    rng = random.Random(seed)
    starts = [rng.randint(0, len(tokens) - length - 1) for _ in range(samples)]
    windows = torch.stack([tokens[start : start + length] for start in starts])
    return _drawn(windows, torch.tensor(starts), setting)


def draw_from_documents(
    documents: Sequence[str], tokens_of: Callable[[str], Tensor], *, samples: int, length: int, seed: int, setting: str
) -> DrawnWindows:
    """Draw windows within documents, as the Wanda authors do from C4. UserError if no document is long enough."""
    too_short: set[int] = set()
    rng = random.Random(seed)
    windows: list[Tensor] = []
    starts: list[int] = []  # of windows, as if the documents followed each other at large distances
    while len(windows) < samples:
        if len(too_short) == len(documents):
            problem = f"none of its {len(documents)} documents has more than {length} tokens, a window's length"
            raise UserError(f"{setting}: {problem}; take another text, or lower calibration.length")
        index = rng.randint(0, len(documents) - 1)
        tokens = tokens_of(documents[index])
        if len(tokens) <= length:
            too_short.add(index)
            continue
        start = rng.randint(0, len(tokens) - length - 1)
        starts.append(index * FAR + start)
        windows.append(tokens[start : start + length].clone())  # else it keeps the document's tokens
    return _drawn(torch.stack(windows), torch.tensor(starts), setting)


def _drawn(windows: Int[Tensor, "windows length"], starts: Int[Tensor, " windows"], setting: str) -> DrawnWindows:
    """Count the distinct tokens of windows by their positions, and say so if fewer than half are distinct."""
    length = windows.shape[1]
    distinct = (starts[:, None] + torch.arange(length)).unique().numel()
    if 2 * distinct < windows.numel():
        problem = f"{len(windows)} windows of {length} tokens have only {distinct:,} distinct tokens of the text"
        notice(f"{setting}: {problem}; take a longer text")
    return DrawnWindows(windows, distinct)


def interleaved(counts: Sequence[int]) -> list[int]:
    """Return an order of the windows of several texts, which follow one another, by their numbers of windows.

    Each text is among the first windows, and the first windows have the texts in proportion: some steps read only
    these. The order of texts changes from round to round, because other steps read every fourth chunk.
    """
    keys = []
    for text, count in enumerate(counts):
        keys += [(index / count, (text - index) % len(counts)) for index in range(count)]
    return sorted(range(len(keys)), key=keys.__getitem__)


def cut(
    tokens: Int[Tensor, " tokens"], *, length: int, windows: int | str | None, name: str = "the text"
) -> list[Int[Tensor, " _"]]:
    """Cut a text into consecutive windows without overlap: `windows` of them, or, for None, every complete one.

    With "all" the last one may be shorter, of two tokens or more. UserError, with the `name`, for too few tokens.
    """
    smallest = 2 if windows == "all" else length
    pieces = [piece for piece in tokens.split(length) if len(piece) >= smallest]
    count = windows if isinstance(windows, int) else max(1, len(pieces))
    if len(pieces) < count:
        expected = "2 tokens" if windows == "all" else f"{count} windows of {length}"
        what = f"{len(tokens)} tokens, expected {expected} or more"
        raise UserError(f"{name}: {what}; take a longer text, fewer or shorter windows")
    return pieces[:count]
