"""From text to rows of tokens."""

import random
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from wanda_dvc.errors import UserError


def load_tokenizer(model: Path) -> Any:
    """The tokenizer of a model's directory. UserError if it can't be loaded."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{model}: no tokenizer that loads ({reason}), expected tokenizer.json or its like") from error


def tokenize(text: str, tokenizer: Any) -> Int[Tensor, " tokens"]:
    """The whole text as one string, with the tokenizer's own defaults (where it adds a first token, once)."""
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)


def draw(tokens: Int[Tensor, " tokens"], *, samples: int, length: int, seed: int) -> Int[Tensor, "samples length"]:
    """Windows at random places, as the Wanda authors draw them: `randint(0, tokens − length − 1)` from `seed`."""
    if len(tokens) <= length:
        raise UserError(
            f"calibration text: {len(tokens)} tokens, expected more than {length} (calibration.length); "
            "take a longer text or shorter windows"
        )
    rng = random.Random(seed)
    starts = [rng.randint(0, len(tokens) - length - 1) for _ in range(samples)]
    return torch.stack([tokens[start : start + length] for start in starts])


def cut(tokens: Int[Tensor, " tokens"], *, length: int, windows: int | None) -> Int[Tensor, "windows length"]:
    """Windows one after another without overlap, at most `windows` of them; what is left over is dropped."""
    whole = len(tokens) // length
    if whole < (windows or 1):
        raise UserError(
            f"perplexity text: {len(tokens)} tokens make {whole} windows of {length}, expected {windows or 1} or more; "
            "take a longer text, fewer or shorter windows"
        )
    count = windows or whole
    return tokens[: count * length].view(count, length)
