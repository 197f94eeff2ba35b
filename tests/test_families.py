"""Families that people use, each as a tiny random model: no code of ours knows any of them."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from cases.grids import short
from cases.models import tensors
from conftest import Make, Patch, outputs, walk
from families import ALL, FINE, RECORDED, RECURRENT, REFUSED_LINEARS, SHAPE, check_answers, drawn_questions, run, save
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaModel

from wanda_dvc.engine.checkpoint import Address, Checkpoint
from wanda_dvc.engine.decoder import Decoder
from wanda_dvc.engine.forward import ModelRunner
from wanda_dvc.engine.questions import loglikelihoods
from wanda_dvc.engine.structure import build_empty
from wanda_dvc.errors import UserError
from wanda_dvc.study.tensors import read_masks

KINDS = [(torch.float32, "1GB"), (torch.bfloat16, "30KB"), (torch.float16, "1GB")]


@pytest.mark.parametrize("family", short(ALL, "stablelm"))
def test_the_engine_is_the_model_and_sees_what_its_linears_read(family: str, tmp_path: Path):
    folder = save(family, tmp_path / "model")
    decoder = Decoder(folder, dtype=torch.float32, device=torch.device("cpu"))
    tokens = torch.randint(3, 256, (2, 48), generator=torch.Generator().manual_seed(1))
    recorded = []
    for step in walk(decoder, tokens, tmp_path / "work"):
        step.run()
        assert [i for i, block in enumerate(decoder.blocks) if not next(block.parameters()).is_meta] == [step.index]
        for name, linear in decoder.linears(step.index).items():
            address = linear.slice.address
            assert (address.linear, address) == (name, decoder.checkpoint.find(name))
            assert torch.equal(linear.weight, decoder.checkpoint.read(address))
        if family not in REFUSED_LINEARS:
            recorded.append(step.record().stats)
    assert all(p.is_meta for block in decoder.blocks for p in block.parameters())
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    read: dict[str, list[torch.Tensor]] = {}
    _, blocks, linears = ALL[family]
    block = model.get_submodule(blocks)[1]
    for name, module in block.named_modules():
        module.register_forward_hook(
            lambda _, args, __, name=name: read.setdefault(name, []).extend(
                x.clone() for x in args[:1] if isinstance(x, torch.Tensor)
            )
        )
    with torch.no_grad():
        for row, hidden in zip(tokens, outputs(decoder, tokens, tmp_path / "work"), strict=True):
            ours = torch.cat([logits for _, logits in decoder.logits(hidden[None], row)])
            assert torch.equal(ours, model(input_ids=row[None]).logits[0])
    if family in REFUSED_LINEARS:
        return
    inputs, consumers, *_ = recorded[1]
    found = [" ".join(x.partition(f"{blocks.rpartition('.')[2]}.1.")[2] for x in names) for names in consumers.values()]
    assert sorted(found) == sorted(linears)
    for names, x in zip(found, inputs.values(), strict=True):
        for name in names.split():
            if name in dict(block.named_modules()):  # experts are none; they have a test of their own
                seen = torch.cat([one.reshape(-1, one.shape[-1]) for one in read[name]]).double()
                torch.testing.assert_close(x.sum_squares, (seen**2).sum(0), rtol=1e-5, atol=1e-6)
                torch.testing.assert_close(x.sum, seen.sum(0), rtol=1e-4, atol=1e-3)
                assert x.count == len(seen)


# Every family in a kind, and one of them in every kind.
RUNS = [*((family, KINDS[place % 3]) for place, family in enumerate(RECORDED)), *(("mistral", kind) for kind in KINDS)]
# ALiBi (its bias is the distance in the row), attention outside transformers' registry, with sinks, or mixed with none.
ONE_BY_ONE = {"bloom", "falcon", "gpt_oss", *RECURRENT}


@pytest.mark.parametrize("family", short(ALL, "stablelm"))
def test_questions_get_the_models_own_answers(family: str, tmp_path: Path):
    """Packed into rows where the model allows it, longer than what a layer with a window sees; else one by one."""
    folder = save(family, tmp_path / "model")
    decoder = Decoder(folder, dtype=torch.float32, device=torch.device("cpu"))
    asked = drawn_questions()
    ours = loglikelihoods(ModelRunner(decoder, tmp_path / "work"), asked, length=128, progress=lambda items: items)
    for one in (decoder, Decoder(folder, dtype=torch.bfloat16, device=torch.device("cpu"))):
        assert one.packs_questions == (family not in ONE_BY_ONE)
    check_answers(folder, asked, ours, length=128)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "kind"), RUNS, ids=lambda value: str(value[0] if isinstance(value, tuple) else value)
)
def test_by_the_command_line_to_a_pruned_model_that_generates(
    study: Make, tmp_path: Path, family: str, kind: tuple[torch.dtype, str]
):
    dtype, shard = kind
    source = save(family, tmp_path / "model", dtype, shard)
    made = study(model=source, perplexity__windows=1)
    lines = ["download model", "download calibration", "download perplexity", "calibrate", "mask", "apply"]
    run(made, *lines, "perplexity dense", "perplexity pruned", "stats --layer 1", f"export {tmp_path / 'exported'}")
    blocks, linears = ALL[family][1:]
    dense, pruned, exported = map(Checkpoint, (source, made.model("pruned"), tmp_path / "exported"))
    assert dense.file_of.keys() == pruned.file_of.keys()
    for name in " ".join(linears).split():
        before, after = (each.weight(f"{blocks}.1.{name}") for each in (dense, pruned))
        transposed = family in ("gpt2", "openai-gpt", "gpt_oss") and "self_attn" not in name  # rows are inputs
        rows, kept = (before.T, after.T) if transposed else (before, after)
        assert ((kept == 0) | (kept == rows)).all(), name
        assert ((kept == 0).sum(1) >= rows.shape[1] // 2).all(), name  # of each output
        assert ((kept == 0).sum(1) <= rows.shape[1] // 2 + (rows == 0).sum(1)).all(), name
    inside = {dense.find(f"{blocks}.1.{name}").tensor for name in " ".join(linears).split()}
    for name in dense.file_of:
        assert torch.equal(pruned.read(Address(name)), exported.read(Address(name))), name
        if blocks not in name or (f"{blocks}.1." in name and name not in inside):
            assert torch.equal(dense.read(Address(name)), pruned.read(Address(name))), name
    model = AutoModelForCausalLM.from_pretrained(made.model("pruned"), dtype=dtype)
    out = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert out.shape[1] > 3


@pytest.mark.parametrize("implementation", ["grouped_mm", "fallback", "eager"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_an_experts_statistics_are_those_of_the_tokens_it_was_sent(
    family: str, implementation: str, tmp_path: Path, monkeypatch: Patch
):
    """Token by token from the stored matrices, by the choice of transformers' router: what the chosen experts read."""
    folder = save(family, tmp_path / "model")
    if implementation == "fallback":
        monkeypatch.setattr("transformers.integrations.moe._can_use_grouped_mm", lambda *_: False)
    decoder = Decoder(folder, dtype=torch.float32, device=torch.device("cpu"))
    decoder.model.set_experts_implementation("eager" if implementation == "eager" else "grouped_mm")
    tokens = torch.randint(3, 256, (2, 24), generator=torch.Generator().manual_seed(1))
    inputs, consumers, *_ = next(iter(walk(decoder, tokens, tmp_path / "work"))).record().stats

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    given: list[tuple[torch.Tensor, torch.Tensor]] = []
    model.model.layers[0].mlp.experts.register_forward_pre_hook(lambda _, x: given.extend(zip(*x[:2], strict=True)))
    with torch.no_grad():
        for row in tokens:
            model(input_ids=row[None])
    stored = Checkpoint(folder)
    inside = "block_sparse_moe" if family == "mixtral" else "mlp"
    gate, up, down = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    count, squares = Counter[int](), dict[str, torch.Tensor]()
    for token, chosen in given:
        for expert in chosen.tolist():
            name = f"model.layers.0.{inside}.experts.{expert}"
            count[expert] += 1
            opened = stored.weight(f"{name}.{gate}") @ token
            between = opened * torch.sigmoid(opened) * (stored.weight(f"{name}.{up}") @ token)
            for linear, x in ((gate, token), (up, token), (down, between)):
                squares[f"{name}.{linear}"] = squares.get(f"{name}.{linear}", 0) + x.double() ** 2
    for source, names in consumers.items():
        for name in names:
            if "experts" in name:
                assert inputs[source].count == count[int(name.split(".")[-2])], name
                expected = squares.get(name, torch.zeros_like(inputs[source].sum))
                torch.testing.assert_close(inputs[source].sum_squares, expected, rtol=1e-4, atol=1e-6)
    assert count.total() == model.config.num_experts_per_tok * tokens.numel()


@pytest.mark.parametrize("family", ["mixtral", "granitemoe", "phi3", "gpt2"])
def test_one_linear_is_replaced_and_no_other(family: str, tmp_path: Path):
    """Also where its parameter holds several linears: other experts, or other rows."""
    folder = save(family, tmp_path / "model")
    decoder, stored = Decoder(folder, dtype=torch.float32, device=torch.device("cpu")), Checkpoint(folder)
    for step in walk(decoder, torch.ones(1, 8, dtype=torch.long), tmp_path / "work"):
        step.run()
        name, linear = next(iter(decoder.linears(step.index).items()))
        step.change({}, {name: torch.full(linear.weight.shape, 0.25)})
        for other, linear in decoder.linears(step.index).items():
            expected = torch.full(linear.weight.shape, 0.25) if other == name else stored.weight(other)
            assert torch.equal(linear.weight, expected), other
        experts = [other for other in decoder.linears(step.index) if "experts.1" in other or "moe.1" in other]
        if experts:
            step.change({}, {experts[-1]: stored.weight(experts[-1]) + 1})
            assert torch.equal(decoder.linears(step.index)[experts[-1]].weight, stored.weight(experts[-1]) + 1)


def one_is_never_chosen(folder: Path) -> Path:
    """A mixture with one expert a token, whose expert 2 has the mean of two others' rows in the router."""
    save("mixtral", folder, num_experts_per_tok=1)
    mix = tensors(lambda x: [g[2].copy_((g[0] + g[1]) / 2) for name, g in x.items() if name.endswith("gate.weight")])
    mix(folder)
    return folder


@pytest.mark.parametrize("propagation", ["dense", "pruned"])
def test_an_expert_that_no_token_reached_is_pruned_by_magnitude(study: Make, tmp_path: Path, propagation: str):
    source = one_is_never_chosen(tmp_path / "model")
    made = study(model=source, propagation=propagation)
    run(made, "download model", "download calibration", "calibrate", "mask")
    wanda = [read_masks(made.masks, block) for block in range(3)]
    records = json.loads(run(made, "stats --json"))
    table = run(made, "stats --layer 0")
    made = study(model=source, method="magnitude")
    said = run(made, "mask")
    assert "expert" not in said  # magnitude asks nothing of them
    magnitude = [read_masks(made.masks, block) for block in range(3)]
    for block in range(3):
        for name, keep in wanda[block].items():
            unreached = ".experts.2." in name
            assert torch.equal(keep, magnitude[block][name]) == unreached, name
            if unreached:
                assert (keep.sum(1) == keep.shape[1] - keep.shape[1] // 2).all()
    for record in records:
        if ".experts.2." in record["linears"][0]:
            assert [record[name] for name in ("tokens", "mean", "largest")] == [0, None, None]
    assert sum(record["tokens"] for record in records if record["linears"][0].endswith("w1")) == 3 * 3 * 64
    assert re.search(r"\| 2\.w1, 2\.w3 +\| 0 +\| – ", table)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a way to compute": (
        "mixtral",
        {"experts": "batched_mm"},
        "experts.0.w1: the model does not multiply by this weight",
    ),
    "no expert 1": ("mixtral", {"without": "experts.1.w3"}, "experts.gate_up_proj joins 7 tensors like"),
    "no last expert": ("mixtral", {"without": "experts.3.w2"}, r"are \[3, 32, 48\], expected \[4, 32, 48\]"),
    "none at all": ("mixtral", {"without": ".experts."}, "no tensor for model.layers.0.mlp.experts.gate_up_proj"),
    "rows of all": (
        "dbrx",
        {"d_model": 32, "n_heads": 4, "n_layers": 3, "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4}}
        | {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8}},
        "ffn.experts.mlp.w1 belongs to no linear, and is larger than any",
    ),
    "one block twice": (
        "zamba2",
        SHAPE | {"layers_block_type": ["mamba", "hybrid", "hybrid"], "num_mem_blocks": 1, "n_mamba_heads": 4},
        "blocks share model.layers.1.shared_transformer",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_mixture_that_is_not_understood_is_refused_with_what_was_not(case: str, tmp_path: Path):
    family, changes, message = REFUSED[case]
    changes = dict(changes)
    implementation, without = changes.pop("experts", None), changes.pop("without", None)
    shape = changes or SHAPE | ALL[family][0]
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape)).save_pretrained(tmp_path / "model")
    if without:
        tensors(lambda x: [x.pop(name) for name in list(x) if without in name])(tmp_path / "model")

    def look() -> None:
        decoder = Decoder(tmp_path / "model", dtype=torch.float32, device=torch.device("cpu"))
        if implementation:
            decoder.model.set_experts_implementation(implementation)
        _ = [decoder.linears(index) for index in range(len(decoder.blocks))]
        for step in walk(decoder, torch.ones(1, 8, dtype=torch.long), tmp_path / "work"):
            step.record()

    with pytest.raises(UserError, match=message):
        look()


def through(folder: Path, dtype: torch.dtype, work: Path) -> None:
    decoder = Decoder(folder, dtype=dtype, device=torch.device("cpu"))
    for step in walk(decoder, torch.tensor([[5, 6, 7]]), work):
        step.record()
    assert [*decoder.logits(torch.zeros(1, 3, 32, dtype=dtype), torch.tensor([5, 6, 7]))]


def test_hidden_states_of_another_dtype_than_the_models_are_refused(tmp_path: Path):
    folder = save("mamba", tmp_path / "model", torch.bfloat16, residual_in_fp32=True)
    said = "block 0 returns hidden states in float32, expected the model's dtype; set dtype=float32"
    with pytest.raises(UserError, match=said):
        through(folder, torch.bfloat16, tmp_path / "work")


MORE = "pass.* more than hidden states"
BLOCKS_OF_THEIR_OWN: dict[str, tuple[str, dict[str, Any]]] = {
    # Later blocks read keys and values of earlier ones, from a container that all are given and that is no dict.
    "gemma4_unified_text": (MORE, {"num_kv_shared_layers": 2, "num_hidden_layers": 4, "head_dim": 8}
                            | {"layer_types": ["sliding_attention", "full_attention"] * 2}),
    # Blocks return something else beside the hidden states, which the next one is given.
    "zaya": (MORE, {"num_experts": 4, "head_dim": 8}),
    "xlstm": (MORE, {"num_heads": 2, "num_blocks": 3}),
    "xlnet": (r"block 0 hidden states of \[2, 1, 32\], exp", {"d_inner": 48, "d_model": 32, "n_head": 4, "n_layer": 3}),
    # A rule of transformers for its first checkpoint's names matches `model.norm.weight` too.
    "deepseek_v4": (r"hidden states of \[1, 2, 4, 32\], exp", {"head_dim": 16, "o_groups": 2, "n_routed_experts": 4}
                    | {"mlp_layer_types": ["moe"] * 3, "layer_types": ["sliding_attention"] * 3}),
    "xmod": ("forward pass fails .*Input language unknown", {}),
    "inkling_text": ("shared_experts.0.gate_proj: the model does not multiply",  # one, in three dimensions
                     FINE | {"n_routed_experts": 4, "n_shared_experts": 1, "head_dim": 8}),
    "bert": ("a token changes what its blocks return for the token before it", {}),
    "sarvam_moe": ("holds several parameters", {}),
    "mamba": ("0.mixer.dt_proj: the model does not multiply by this weight", {}),
}  # fmt: skip


@pytest.mark.parametrize("family", BLOCKS_OF_THEIR_OWN)
def test_families_of_another_structure_are_refused_with_the_reason(family: str, tmp_path: Path):
    message, changes = BLOCKS_OF_THEIR_OWN[family]
    with pytest.raises(UserError, match=f"{message}.*unsupported model structure"):
        through(save(family, tmp_path / "model", **changes), torch.float32, tmp_path / "work")


@pytest.mark.parametrize(
    ("order", "factor", "message"),
    [
        ([0, 1, 2], 0.5, "changes hidden states between block 0 and block 1"),
        ([0, 1, 2, 0, 1, 2], 1, "calls 6 blocks and has 3"),
        ([], 1, r"calls blocks \[\] of its 3"),
        ([0, 0, 1, 2], 1, r"calls blocks \[0, 0\] of its 3"),
        ([1, 0, 2], 1, r"calls blocks \[1\] of its 3"),
        ([0, 1, 3], 1, r"forward pass fails \(.*list index out of range"),
        ([0, 1, 2], 0, "other arguments depend on the tokens"),
    ],
)
def test_a_model_that_does_more_than_run_its_blocks_is_refused(
    order: list[int], factor: float, message: str, tmp_path: Path, monkeypatch: Patch
):
    """As RWKV does, which halves hidden states after some blocks, or a model that loops."""

    def forward(self: LlamaModel, input_ids: torch.Tensor, **_: Any) -> BaseModelOutputWithPast:
        hidden = self.embed_tokens(input_ids)
        shift = input_ids[0, 0] * (factor == 0)
        places = self.rotary_emb(hidden, torch.arange(hidden.shape[1])[None] + shift)
        for number in order:
            hidden = [*self.layers][number](hidden, position_embeddings=places) * (factor or 1)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))

    folder = save("llama", tmp_path / "model")
    monkeypatch.setattr(LlamaModel, "forward", forward)
    with pytest.raises(UserError, match=message):
        through(folder, torch.float32, tmp_path / "work")


def test_a_model_in_16_bits_keeps_its_buffers():
    """GPT-J's constructor computes its rotations in torch's default dtype."""
    config = AutoConfig.for_model("gptj", n_embd=32, n_layer=2, n_head=4, rotary_dim=8)
    narrow, wide = (dict(build_empty(config, "", kind).named_buffers()) for kind in (torch.float16, torch.float32))
    assert all(torch.equal(buffer, wide[name]) for name, buffer in narrow.items())
