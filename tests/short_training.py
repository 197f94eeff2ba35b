"""Trainings of a few steps, of tiny models on drawn windows."""

import shutil
from pathlib import Path
from typing import Any

import torch
from conftest import save_tiny_model
from families import save
from safetensors.torch import load_file, save_file

from wanda_dvc.training import trainer

CPU = torch.device("cpu")
LOW = {"low_memory": True, "dtype": torch.bfloat16, "checkpointing": True}


def pair(folder: Path, *, family: str = "", **config: Any) -> tuple[Path, Path]:
    """A dense model, and one whose matrices are 2:4 and whose other values are a little off."""
    dense = save(family, folder / "dense") if family else save_tiny_model(folder / "dense", **config)
    pruned = folder / "pruned"
    shutil.copytree(dense, pruned)
    path = pruned / "model.safetensors"
    weights = load_file(path)
    for name, weight in weights.items():
        if weight.dim() > 1 and "embed" not in name and "wte" not in name and not weight.shape[-1] % 4:
            weight.view(-1, 4)[:, :2] = 0
    save_file(weights, path, {"format": "pt"})
    return dense, pruned


def windows(count: int, length: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 250, (count, length), generator=torch.Generator().manual_seed(seed))


def train(dense: Path, pruned: Path, work: Path, *, steps: int = 20, **changes: Any) -> Any:
    validation = {"text": windows(2, seed=1), "embedded": windows(2, seed=2)}
    kwargs: dict[str, Any] = {
        "windows": windows(2 * steps), "validation": validation, "batch": 2, "rate": 0.01, "dtype": torch.float32,
        "device": CPU, "checkpointing": False, "low_memory": False, "work": work, "on_step": lambda _: None,
    }  # fmt: skip
    return trainer.train(dense, pruned, **kwargs | changes)
