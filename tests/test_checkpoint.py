"""One address for a weight, and one writer: what it writes equals a copy that is then overwritten in place."""

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases.grids import short
from conftest import save_tiny_model, tree, write_params
from families import save
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from wanda_dvc.engine.checkpoint import Address, Checkpoint, EditedCheckpoint, write_model
from wanda_dvc.engine.decoder import Decoder
from wanda_dvc.errors import UserError
from wanda_dvc.stages.apply import write_pruned
from wanda_dvc.study.artifact import finish
from wanda_dvc.study.files import write_json
from wanda_dvc.study.folder import Study
from wanda_dvc.study.tensors import pack_masks, write_masks

UNSIGNED = {"F32": "u4", "BF16": "u2", "F16": "u2"}
words = st.text("ab01", min_size=1, max_size=3)


def overwritten(source: Path, target: Path, keeps: dict[str, np.ndarray]) -> Path:
    """The oracle: the directory copied, then zeros put where the masks (by stored tensor) don't keep a weight."""
    shutil.copytree(source, target)
    for shard in target.glob("*.safetensors"):
        size = int.from_bytes(shard.read_bytes()[:8], "little")
        header = json.loads(shard.read_bytes()[8 : 8 + size])
        for name, keep in keeps.items():
            if name in header:
                bits = np.dtype(UNSIGNED[header[name]["dtype"]])
                begin = 8 + size + header[name]["data_offsets"][0]
                weight = np.memmap(shard, bits, "r+", offset=begin, shape=tuple(header[name]["shape"]))
                weight[~keep] = 0
                weight.flush()
    return target


def with_odd_bits(folder: Path) -> Path:
    """−0, infinities, and numbers that are none, with payloads, in every tensor."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for tensor in tensors.values():
            bits = tensor.view({2: torch.int16, 4: torch.int32}[tensor.itemsize]).flatten()
            odd = [-(2 ** (8 * tensor.itemsize - 1)), -1, -3, 2 ** (8 * tensor.itemsize - 1) - 5]
            bits[: min(len(odd), len(bits))] = torch.tensor(odd, dtype=bits.dtype)[: len(bits)]
        save_file(tensors, file, {"format": "pt"})
    return folder


MODELS: dict[str, Callable[[Path], Path]] = {
    "float32, one file": save_tiny_model,
    "bfloat16, shards": lambda folder: save_tiny_model(folder, dtype=torch.bfloat16, shard="30KB"),
    "float16, untied": lambda folder: save_tiny_model(folder, dtype=torch.float16, tie_word_embeddings=False),
    "transposed": lambda folder: save("gpt2", folder),
    "experts in one tensor": lambda folder: save("granitemoe", folder, torch.bfloat16, "30KB"),
    "experts apart": lambda folder: save("mixtral", folder),
}


@pytest.mark.parametrize("kind", short(MODELS, "transposed"))
def test_the_pruned_model_is_the_copy_overwritten_byte_for_byte(kind: str, tmp_path: Path):
    source = MODELS[kind](tmp_path / "dense")
    decoder = Decoder(source, dtype=torch.float32, device=torch.device("cpu"))
    linears = [decoder.linears(index) for index in range(len(decoder.blocks))]
    with_odd_bits(source)
    (source / "inside").mkdir()
    (source / "inside" / "model.safetensors").write_bytes(b"no shard of this checkpoint")
    (source / "LICENSE").write_text("do what you like")
    write_json(source / "provenance.json", {"made_by": "download model", "source": "x", "sha256": "0"})
    generator = torch.Generator().manual_seed(0)
    keeps: dict[str, np.ndarray] = {}
    calibrated_study = Study(tmp_path / "study")
    calibrated_study.masks.mkdir(parents=True)
    write_params(calibrated_study.root, source)
    checkpoint = Checkpoint(source)
    zeros = {}
    for block, names in enumerate(linears):
        masks = {n: torch.rand(x.weight.shape, generator=generator) < 0.5 for n, x in names.items()}
        write_masks(calibrated_study.masks, block, pack_masks(masks))
        for name, keep in masks.items():
            address, weight = checkpoint.find(name), checkpoint.weight(name)
            zeros[name] = (block, int(((weight == 0) | ~keep).sum()), weight.numel())
            if address.expert is None:
                keeps[address.tensor] = keep.numpy()
            else:
                shape = checkpoint.read(Address(address.tensor)).shape
                keeps.setdefault(address.tensor, np.ones(shape, dtype=bool))[address.expert] = keep.numpy()
    made: dict[str, Any] = {"made_by": "mask", "model": {"source": "x", "sha256": "0"}}
    made |= {"params": calibrated_study.params.plan.to_dict()}
    made |= {"calibration": {"text": {"source": "x"}, "windows": 1, "length": 1, "seed": 0, "dtype": "float32"}}
    finish(calibrated_study.masks, made)
    calibrated_study.model("dense").parent.mkdir()
    calibrated_study.model("dense").symlink_to(source)
    found = {name: entry[:3] for name, entry in write_pruned(calibrated_study, tmp_path / "pruned")[0].items()}

    expected, written = tree(overwritten(source, tmp_path / "expected", keeps)), tree(tmp_path / "pruned")
    for name in ("README.md", "provenance.json"):
        expected.pop(name, None)
        written.pop(name, None)
    assert written.keys() == expected.keys()
    assert [name for name in written if written[name] != expected[name]] == []
    assert list(found.items()) == list(zeros.items())  # in the order of the blocks, whatever the files'


def test_weights_are_asked_for_one_at_a_time_in_the_order_of_the_file(tmp_path: Path):
    """So memory is bounded by two weights: what comes before the one before is written by then."""
    source = Checkpoint(save("granitemoe", tmp_path / "dense"))
    stored = [name for name in source.file_of if "linear" in name and "layers" in name]
    addresses = [Address(name, expert) for name in reversed(stored) for expert in (3, 1, 0, 2)]
    sizes, asked = [], []

    def weight(address: Address) -> torch.Tensor:
        sizes.append((tmp_path / "copy" / "model.safetensors").stat().st_size)
        asked.append(address)
        return source.read(address) + 1

    written = list(write_model(EditedCheckpoint(source, weight, addresses), tmp_path / "copy"))
    assert sorted(written) == sorted(stored)
    assert sorted(asked, key=str) == sorted(addresses, key=str)
    begins = {name: entry.begin for name, entry in source.header(source.shards[0]).items()}
    places = [begins[address.tensor] + (address.expert or 0) * source.read(address).nbytes for address in asked]
    assert all(one < other for one, other in pairwise(places))
    assert all(place - size < 2**17 for place, size in zip(places, sizes[1:], strict=False))  # a file object's buffer
    copied = Checkpoint(tmp_path / "copy")
    for name in source.file_of:
        assert torch.equal(copied.read(Address(name)), source.read(Address(name)) + (name in stored))


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (torch.zeros(32, 31), r"up_proj.weight: its new weight is \[32, 31\] in torch.float32, expected \[48, 32\] in"),
        (torch.zeros(48, 32, dtype=torch.float16), r"is \[48, 32\] in torch.float16, expected \[48, 32\] in F32, as"),
    ],
)
def test_a_new_weight_must_be_stored_as_the_old_one(tiny: Path, tmp_path: Path, new: torch.Tensor, message: str):
    source, addresses = Checkpoint(tiny), [Address("model.layers.1.mlp.up_proj.weight")]
    with pytest.raises(UserError, match=message):
        list(write_model(EditedCheckpoint(source, lambda _: new, addresses), tmp_path / "copy"))


@given(st.lists(words, min_size=2, max_size=4).map(".".join), st.none() | st.integers(0, 200))
def test_a_linears_name_leads_back_to_its_address(name: str, expert: int | None):
    for stored in (f"{name}.weight", *([] if expert is None else [name])):
        address, checkpoint = Address(stored, expert), Checkpoint(Path())
        checkpoint.__dict__["file_of"] = {stored: Path()}
        assert checkpoint.find(address.linear) == address
