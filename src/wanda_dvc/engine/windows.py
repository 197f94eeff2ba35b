"""Makes windows of tokens from text."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from wanda_dvc.errors import UserError, notice, reason

FAR = 2**40  # tokens: more than a document has


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


def draw(tokens: Int[Tensor, " tokens"], *, samples: int, length: int, seed: int) -> Int[Tensor, "windows length"]:
    """Draw windows of the calibration text as the Wanda authors do: each starts at `randint(0, tokens − length − 1)`.

    UserError if the text has too few tokens.
    """
    if len(tokens) <= length:
        raise UserError(
            f"calibration.text: {len(tokens)} tokens, expected more than {length}, a window's length; take a longer "
            "text, or lower calibration.length"
        )
    rng = random.Random(seed)
    starts = [rng.randint(0, len(tokens) - length - 1) for _ in range(samples)]
    _report_repeats(torch.tensor(starts), length, "calibration.text")
    return torch.stack([tokens[start : start + length] for start in starts])


def draw_from_documents(
    documents: Sequence[str], tokens_of: Callable[[str], Tensor], *, samples: int, length: int, seed: int, setting: str
) -> Int[Tensor, "windows length"]:
    """Draw windows within documents, as the Wanda authors do from C4: documents until one is long enough, and a start.

    But the search ends if no document is long enough: UserError, with the `setting` that names the text.
    """
    too_short: set[int] = set()
    rng = random.Random(seed)
    windows: list[Tensor] = []
    starts: list[int] = []  # of windows, as if the documents followed each other at large distances
    while len(windows) < samples:
        if len(too_short) == len(documents):
            raise UserError(
                f"{setting}: none of its {len(documents)} documents has more than {length} tokens, a window's length; "
                "take another text, or lower calibration.length"
            )
        index = rng.randint(0, len(documents) - 1)
        if index in too_short:
            continue
        tokens = tokens_of(documents[index])
        if len(tokens) <= length:
            too_short.add(index)
            continue
        start = rng.randint(0, len(tokens) - length - 1)
        starts.append(index * FAR + start)
        windows.append(tokens[start : start + length])
    _report_repeats(torch.tensor(starts), length, setting)
    return torch.stack(windows)


def _report_repeats(starts: Int[Tensor, " windows"], length: int, setting: str) -> None:
    """Say so if fewer than half of the drawn tokens are distinct. Starts are positions of windows' first tokens."""
    distinct = (starts[:, None] + torch.arange(length)).unique().numel()
    if 2 * distinct < len(starts) * length:
        notice(
            f"{setting}: {len(starts)} windows of {length} tokens have only {distinct:,} distinct tokens of the text; "
            "take a longer text"
        )


def cut(
    tokens: Int[Tensor, " tokens"], *, length: int, windows: int | str | None, name: str = "the text"
) -> list[Int[Tensor, " _"]]:
    """Cut a text into consecutive windows without overlap: `windows` of them, or, for None, every complete one.

    With `windows` "all" the last one may be shorter, of two tokens or more: the first predicts nothing. UserError, with
    the `name` of the text, if it has too few tokens.
    """
    smallest = 2 if windows == "all" else length
    pieces = [piece for piece in tokens.split(length) if len(piece) >= smallest]
    count = windows if isinstance(windows, int) else max(1, len(pieces))
    if len(pieces) < count:
        expected = "2 tokens" if windows == "all" else f"{count} windows of {length}"
        raise UserError(
            f"{name}: {len(tokens)} tokens, expected {expected} or more; take a longer text, fewer or shorter windows"
        )
    return pieces[:count]
