"""Families that people use, each as a tiny random model: no code of ours knows any of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from wanda_dvc.artifacts import Project
from wanda_dvc.blocks import Decoder, InputRecorder
from wanda_dvc.errors import UserError
from wanda_dvc.stages.apply import apply
from wanda_dvc.stages.calibrate import calibrate
from wanda_dvc.stages.download import download
from wanda_dvc.stages.mask import mask

SHAPE = {
    "vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ATTENTION = ["self_attn.q_proj self_attn.k_proj self_attn.v_proj", "self_attn.o_proj"]
GATED = [*ATTENTION, "mlp.gate_proj mlp.up_proj", "mlp.down_proj"]
ALTERNATING = {"head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8}
# What differs from SHAPE, where the blocks are, and their linears: those of one input in one string.
FAMILIES: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "llama": ({}, "model.layers", GATED),
    "mistral": ({"sliding_window": 16}, "model.layers", GATED),
    "qwen2": ({}, "model.layers", GATED),
    "qwen3": ({"head_dim": 8}, "model.layers", GATED),
    "gemma2": (ALTERNATING, "model.layers", GATED),
    "gemma3_text": (ALTERNATING, "model.layers", GATED),
    "phi3": ({}, "model.layers", ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"]),
    "opt": (
        {"ffn_dim": 48, "word_embed_proj_dim": 32},
        "model.decoder.layers",
        ["self_attn.q_proj self_attn.k_proj self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2"],
    ),
    "gpt_neox": (
        {},
        "gpt_neox.layers",
        ["attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"],
    ),
    "gpt2": (
        {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128},
        "transformer.h",
        ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
    ),
    "bloom": (
        {"n_layer": 3, "n_head": 4},
        "transformer.h",
        ["self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"],
    ),
    "falcon": (
        {},
        "transformer.h",
        ["self_attention.query_key_value mlp.dense_h_to_4h", "self_attention.dense", "mlp.dense_4h_to_h"],
    ),
    "stablelm": ({}, "model.layers", GATED),
    "olmo2": ({}, "model.layers", GATED),
    "smollm3": ({}, "model.layers", GATED),
}


def save(family: str, folder: Path, dtype: torch.dtype = torch.float32, shard: str = "1GB") -> Path:
    save_tiny_model(folder)  # for its tokenizer
    torch.manual_seed(0)
    known = set(AutoConfig.for_model(family).to_dict()) | {"num_key_value_heads", "num_attention_heads"}
    shape = {name: value for name, value in SHAPE.items() if name in known} | FAMILIES[family][0]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape)).to(dtype)
    for parameter in model.parameters():
        parameter.data.mul_(3)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_the_engine_is_the_model_and_sees_what_its_linears_read(family: str, tmp_path: Path):
    folder = save(family, tmp_path / "model")
    decoder = Decoder(folder, dtype=torch.float32, device=torch.device("cpu"))
    tokens = torch.randint(3, 256, (2, 48), generator=torch.Generator().manual_seed(1))
    recorders = []
    for step in decoder.walk(tokens, tmp_path / "work"):
        recorders.append(InputRecorder())
        step.advance(recorders[-1])
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    read: dict[torch.nn.Module, torch.Tensor] = {}
    _, blocks, linears = FAMILIES[family]
    block = model.get_submodule(blocks)[1]
    for name in " ".join(linears).split():
        linear = block.get_submodule(name)
        linear.register_forward_hook(
            lambda m, args, _: read.update({m: read.get(m, 0) + (args[0].reshape(-1, args[0].shape[-1]) ** 2).sum(0)})
        )
    with torch.no_grad():
        for row, hidden in zip(tokens, decoder.outputs(tokens, tmp_path / "work"), strict=True):
            ours = torch.cat([logits for _, logits in decoder.logits(hidden[None], row)])
            assert torch.equal(ours, model(input_ids=row[None]).logits[0])
    inputs, readers, _ = recorders[1].result()
    found = [
        " ".join(name.partition(f"{blocks.rpartition('.')[2]}.1.")[2] for name in names) for names in readers.values()
    ]
    assert sorted(found) == sorted(linears)
    for names, x in zip(found, inputs.values(), strict=True):
        for name in names.split():
            torch.testing.assert_close(x.sum_squares.float(), read[block.get_submodule(name)], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "shard"), [(torch.float32, "1GB"), (torch.bfloat16, "30KB"), (torch.float16, "1GB")], ids=str
)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_pruned_model_loads_and_generates(
    project: Callable[..., Project], tmp_path: Path, family: str, dtype: torch.dtype, shard: str
):
    source = save(family, tmp_path / "model", dtype, shard)
    made = project(model=source)
    for part in ("model", "calibration"):
        download(project=made, part=part)
    calibrate(project=made)
    mask(project=made)
    apply(project=made)
    _, blocks, linears = FAMILIES[family]
    dense, pruned = (AutoModelForCausalLM.from_pretrained(path, dtype=dtype) for path in (source, made.model("pruned")))
    inside = {f"{blocks}.{block}.{name}.weight" for block in range(3) for name in " ".join(linears).split()}
    for (name, before), after in zip(dense.named_parameters(), pruned.parameters(), strict=True):
        if name not in inside:
            assert torch.equal(before, after), name
            continue
        rows, kept = (before.T, after.T) if family == "gpt2" else (before, after)
        assert ((kept == 0) | (kept == rows)).all(), name
        assert ((kept == 0).sum(1) >= rows.shape[1] // 2).all(), name  # of each output
        assert ((kept == 0).sum(1) <= rows.shape[1] // 2 + (rows == 0).sum(1)).all(), name
    out = pruned.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert out.shape[1] > 3


def test_a_mixture_of_experts_is_refused(tmp_path: Path):
    """transformers fuses the experts into one tensor, which is none that the checkpoint holds."""
    config = AutoConfig.for_model("mixtral", **SHAPE | {"num_local_experts": 4})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    decoder = Decoder(tmp_path, dtype=torch.float32, device=torch.device("cpu"))
    with pytest.raises(UserError, match="no tensor for .*experts.*, which is not understood"):
        decoder.calls(8)
