"""Greedy continuations of prompts, by transformers' own generation: the complete model is in memory."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from wanda_dvc.engine.config import positions_of
from wanda_dvc.engine.windows import load_tokenizer
from wanda_dvc.errors import UserError


def continuations(  # noqa: PLR0913 - the model, and how it continues
    folder: Path, prompts: Sequence[str], *, tokens: int, dtype: torch.dtype, device: torch.device, source: str
) -> list[str]:
    """Continue each prompt by the likeliest token, up to `tokens` times; each prompt runs alone, without padding.

    Of the model's own settings for generation only the end of a text counts: a penalty for repetitions would hide them.
    `source` names the prompts' file in messages.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    tokenizer = load_tokenizer(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False).eval().to(device)
    ends = model.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=tokens, eos_token_id=ends or None, pad_token_id=ends[0] if ends else 0
    )
    positions, found = positions_of(model.config), []
    for number, prompt in enumerate(prompts, start=1):
        asked = torch.tensor([tokenizer(prompt, verbose=False)["input_ids"]], device=device)
        if positions is not None and asked.shape[1] + tokens > positions:
            raise UserError(
                f"{source}: prompt {number}: {asked.shape[1]} tokens, expected at most {positions - tokens}: the model "
                f"has {positions} positions; shorten the prompt"
            )
        written = model.generate(asked, attention_mask=torch.ones_like(asked))[0, asked.shape[1] :].tolist()
        found.append(tokenizer.decode(written, skip_special_tokens=True))
    return found
