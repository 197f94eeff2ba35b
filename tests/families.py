"""Tables of model families, tiny random models of them, and questions and commands for these models."""

from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import wanda_dvc
from conftest import kept, save_tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from wanda_dvc.engine.questions import Request
from wanda_dvc.study.folder import Study

SHAPE = {
    "vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LAYERS = "model.layers"
NARROW_WIDE = ["mlp.dense_h_to_4h", "mlp.dense_4h_to_h"]
OPENAI = {"n_embd": 32, "n_layer": 3, "n_head": 4}
JAMBA = {"num_experts": 4, "attn_layer_offset": 0, "mamba_dt_rank": 4}
ATTENTION = ["self_attn.q_proj self_attn.k_proj self_attn.v_proj", "self_attn.o_proj"]
GATED = [*ATTENTION, "mlp.gate_proj mlp.up_proj", "mlp.down_proj"]
SCALED = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32, "rope_theta": 500000.0,
}  # fmt: skip
ALTERNATING = {"head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8}
FINE = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
LATENT = {
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip


def experts(count: int, first: str, second: str) -> list[str]:
    """The linears of `count` experts: of each those that read the tokens, and the one that reads what they put out."""
    return [
        " ".join(f"{name.replace('*', str(expert))}" for name in names.split())
        for names in (first, second)
        for expert in range(count)
    ]


SPARSE = "block_sparse_moe.experts.*"
QWEN = "mlp.experts.*.gate_proj mlp.experts.*.up_proj", "mlp.experts.*.down_proj"
# Of a model type (with a word more where there are several): what differs from SHAPE, where the blocks are, and the
# linears of the middle one as the checkpoint stores them, those of one input in one string.
FAMILIES: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "llama": ({}, LAYERS, GATED),
    "llama tied": ({"tie_word_embeddings": True}, LAYERS, GATED),
    "llama scaled": ({"rope_parameters": SCALED}, LAYERS, GATED),
    "llama scaled-tied": ({"rope_parameters": SCALED, "tie_word_embeddings": True}, LAYERS, GATED),
    "mistral": ({"sliding_window": 16}, LAYERS, GATED),
    "qwen2": ({}, LAYERS, GATED),
    "qwen3": ({"head_dim": 8}, LAYERS, GATED),
    "gemma2": (ALTERNATING, LAYERS, GATED),
    "gemma3_text": (ALTERNATING, LAYERS, GATED),
    "phi3": ({}, LAYERS, ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"]),
    "opt": (
        {"ffn_dim": 48, "word_embed_proj_dim": 32}, "model.decoder.layers",
        [ATTENTION[0], "self_attn.out_proj", "fc1", "fc2"],
    ),
    "gpt_neox": ({}, "gpt_neox.layers", ["attention.query_key_value", "attention.dense", *NARROW_WIDE]),
    "gpt2": ({"n_positions": 128} | OPENAI, "transformer.h", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
    "bloom": (
        {"n_layer": 3, "n_head": 4}, "transformer.h",
        ["self_attention.query_key_value", "self_attention.dense", *NARROW_WIDE],
    ),
    "falcon": (
        {}, "transformer.h",
        [f"self_attention.query_key_value {NARROW_WIDE[0]}", "self_attention.dense", NARROW_WIDE[1]],
    ),
    "stablelm": ({}, LAYERS, GATED),
    "olmo2": ({}, LAYERS, GATED),
    "smollm3": ({}, LAYERS, GATED),
    "mixtral": (
        {"num_local_experts": 4}, LAYERS, [*ATTENTION, *experts(4, f"{SPARSE}.w1 {SPARSE}.w3", f"{SPARSE}.w2")],
    ),
    "qwen3_moe": (FINE | {"num_experts": 12, "head_dim": 8}, LAYERS, [*ATTENTION, *experts(12, *QWEN)]),
}  # fmt: skip
# More mixtures: with a shared expert and its gate, a biased router and a first block without experts, experts stored
# in one tensor, and that in [experts, in, out].
MIXTURES: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "qwen2_moe": (
        FINE | {"num_experts": 4, "shared_expert_intermediate_size": 24}, LAYERS,
        [*ATTENTION, "mlp.shared_expert.gate_proj mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj",
         *experts(4, *QWEN)],
    ),
    "olmoe": ({"num_experts": 4, "num_experts_per_tok": 2}, LAYERS, [*ATTENTION, *experts(4, *QWEN)]),
    "deepseek_v3": (
        FINE | LATENT | {"n_routed_experts": 4, "n_shared_experts": 1}, LAYERS,
        ["self_attn.q_a_proj self_attn.kv_a_proj_with_mqa", "self_attn.q_b_proj", "self_attn.kv_b_proj",
         "self_attn.o_proj", "mlp.shared_experts.gate_proj mlp.shared_experts.up_proj", "mlp.shared_experts.down_proj",
         *experts(4, *QWEN)],
    ),
    "jamba": (  # its router is a plain linear
        JAMBA | {"attn_layer_period": 1, "expert_layer_period": 1, "expert_layer_offset": 0}, LAYERS,
        [*ATTENTION, *(names.replace("mlp", "feed_forward") for names in experts(4, *QWEN))],
    ),
    "granitemoe": (
        {"num_local_experts": 4, "num_experts_per_tok": 2}, LAYERS,
        [*ATTENTION, *experts(4, "block_sparse_moe.*.input_linear", "block_sparse_moe.*.output_linear")],
    ),
    "gpt_oss": (
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}, LAYERS,
        [*ATTENTION, *experts(4, "mlp.experts.*.gate_up_proj", "mlp.experts.*.down_proj")],
    ),
    "jetmoe": (  # it calls every expert, also without tokens; its attention has experts too
        {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8}, LAYERS,
        ["self_attention.kv_proj", *experts(4, "mlp.*.input_linear", "mlp.*.output_linear"),
         *experts(4, "self_attention.experts.*.input_linear", "self_attention.experts.*.output_linear")],
    ),
}  # fmt: skip
MAMBA = ["in_proj", "x_proj", "dt_proj", "out_proj"]  # it multiplies dt_proj's weight itself: refused
RECURRENT: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "mamba": (
        {"state_size": 4, "time_step_rank": 4, "residual_in_fp32": False}, "backbone.layers",
        [f"mixer.{name}" for name in MAMBA],
    ),
    "jamba mixed": (
        JAMBA | {"attn_layer_period": 3, "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 4},
        LAYERS, [*(f"mamba.{name}" for name in MAMBA),
         *(names.replace("mlp", "feed_forward") for names in experts(4, *QWEN))],
    ),
    "bamba": (  # its blocks return something beside the hidden states
        {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 4, "mamba_n_groups": 1},
        LAYERS, [*ATTENTION, "feed_forward.gate_proj feed_forward.up_proj", "feed_forward.down_proj"],
    ),
    "openai-gpt": (  # its blocks return a list
        {"n_positions": 128} | OPENAI, "transformer.h", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
    ),
}  # fmt: skip
ALL = FAMILIES | MIXTURES | RECURRENT
# The engine runs them, and refuses to record their linears.
REFUSED_LINEARS = {"mamba", "jamba mixed"}
RECORDED = [family for family in ALL if family not in REFUSED_LINEARS]
# With more experts than the families' tests, so that some can go.
EXPERTS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {},
    "deepseek_v3": {"n_routed_experts": 8},
    **{family: {"num_experts": 8} for family in ("qwen2_moe", "olmoe", "jamba", "jamba mixed")},
    **{family: {"num_local_experts": 8} for family in ("mixtral", "granitemoe", "gpt_oss", "jetmoe")},
}


def place(name: str) -> tuple[int, bool]:
    """The block of a mixture, or of its expert's linear, and whether it is in its attention, as one of JetMoE's is."""
    return int(name.split(".")[2]), "attention" in name


def save(family: str, folder: Path, dtype: torch.dtype = torch.float32, shard: str = "1GB", **changes: Any) -> Path:
    key = (family, dtype, shard, sorted(changes.items()))
    kept(folder, key, lambda new: _make(family, new, dtype, shard, changes))
    torch.manual_seed(0)
    return folder


def _make(family: str, folder: Path, dtype: torch.dtype, shard: str, changes: dict[str, Any]) -> None:
    save_tiny_model(folder)  # for its tokenizer
    torch.manual_seed(0)
    kind = family.split()[0]
    known = set(AutoConfig.for_model(kind).to_dict()) | {"num_key_value_heads", "num_attention_heads"}
    own = ALL[family][0] if family in ALL else {}
    shape = {name: value for name, value in SHAPE.items() if name in known} | own | changes
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape))
    for parameter in model.parameters():
        parameter.data.mul_(3)
    for name, buffer in model.state_dict().items():
        if name not in dict(model.named_parameters(remove_duplicate=False)):
            buffer.normal_()
    (folder / "model.safetensors").unlink()
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)


def drawn_questions() -> list[Request]:
    """Shared contexts, one-token choices, equal choices, a choice that begins another, and one that is too long."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for question in range(9):
        context = tuple(torch.randint(3, 256, (3 + 5 * question,), generator=generator).tolist())
        for choice in range(1 + question % 4):
            size = 1 if question % 3 == 0 else 1 + choice
            made.append(Request(context, tuple(torch.randint(3, 256, (size,), generator=generator).tolist())))
    last = made[-1]
    return [*made, last, Request(last.context, (*last.continuation, 7, 8)), Request((9,) * 70, (5, 6))]


def check_answers(folder: Path, asked: list[Request], answers: list[tuple[float, bool]], length: int) -> None:
    """Hold answers to those of the model as transformers runs it, which gets the last tokens of a long question."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for request, (value, greedy) in zip(asked, answers, strict=True):
        tokens, size = torch.tensor(request.context + request.continuation)[-length - 1 :], len(request.continuation)
        with torch.no_grad():
            logprobs = model(input_ids=tokens[None, :-1], use_cache=False).logits[0].log_softmax(-1)[-size:]
        assert value == pytest.approx(logprobs.gather(1, tokens[-size:, None]).sum().item(), abs=1e-4)
        assert greedy == bool((logprobs.argmax(-1) == tokens[-size:]).all())


def run(study: Study, *lines: str) -> str:
    """Commands as they are typed, in this process; what they print."""
    said = ""
    for line in lines:
        done = wanda_dvc(*line.split(), cwd=study.root)
        assert done.returncode == 0, done.stderr
        said += done.stdout + done.stderr
    return said
