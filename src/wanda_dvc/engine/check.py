"""Checks of a complete model before any computation, by headers and configuration; no weight is read."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from wanda_dvc.engine.checkpoint import STORED, Checkpoint
from wanda_dvc.engine.structure import Part, build_empty, find_blocks, stored_parts
from wanda_dvc.engine.windows import load_tokenizer
from wanda_dvc.errors import UserError


def check_model(folder: Path) -> None:
    """Check that a directory holds a complete model that the stages can run, with its tokenizer.

    Raises:
        UserError: index, shards, configuration, weights or tokenizer are damaged, or do not match.
    """
    checkpoint = Checkpoint(folder)
    model = build_empty(checkpoint.config, checkpoint.config_name, tensors=len(checkpoint.where))
    find_blocks(model)
    check_parts(model, checkpoint, stored_parts(model, checkpoint))
    check_vocabulary(folder, load_tokenizer(folder), model.get_input_embeddings().weight.shape[0])


def check_parts(model: nn.Module, checkpoint: Checkpoint, parts: Mapping[str, Sequence[Part]]) -> None:
    """Check that every parameter (of tied ones, at least one) is stored completely, in a supported dtype."""
    entries = checkpoint.entries
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    for names in aliases.values():
        stored = [name for name in names if name in parts]
        if not stored:
            raise missing(checkpoint, names[0])
        for name in stored:
            for tensor in dict.fromkeys(part.address.tensor for part in parts[name]):
                if (dtype := entries[tensor].dtype) not in STORED.values():
                    usual = ", ".join([*STORED.values()][:3])
                    raise UserError(
                        f"{checkpoint.where[tensor]}: {tensor} is {dtype}, expected {usual}; "
                        "name the model before it was quantized, or convert it"
                    )
            if parts[name][0].is_complete:
                tensor, expected = parts[name][0].address.tensor, list(model.get_parameter(name).shape)
                if entries[tensor].shape != expected:
                    raise UserError(
                        f"{checkpoint}: {tensor} is {entries[tensor].shape}, expected {expected} by "
                        "config.json; copy both again"
                    )


def missing(checkpoint: Checkpoint, parameter: str) -> UserError:
    """Return the error for a parameter without a stored tensor."""
    return UserError(
        f"{checkpoint}: no tensor for {parameter}, expected one by config.json; the checkpoint is incomplete, or "
        "stores it in an unsupported form"
    )


def check_vocabulary(folder: Path, tokenizer: Any, rows: int) -> None:
    """Raise UserError if a tokenizer's vocabulary is larger than the embeddings.

    Added tokens do not count: many models have a padding token without an embedding, and no text contains it.
    """
    added = set(tokenizer.get_added_vocab())
    ids = [number for token, number in tokenizer.get_vocab().items() if token not in added]
    if ids and max(ids) >= rows:
        raise UserError(
            f"{folder}: the tokenizer has ids up to {max(ids)}, expected at most {rows - 1}: the model has {rows:,} "
            "embeddings; copy the tokenizer that belongs to it"
        )
