"""The packed format: nothing is lost, transformers loads it, and what is damaged is refused."""

import itertools
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command_line import wanda_dvc
from conftest import save_tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_families import ALL, BY_WAY, save
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import wanda_dvc as wd
from wanda_dvc.engine import accelerator, attention
from wanda_dvc.engine.checkpoint import STORED, Address, Checkpoint
from wanda_dvc.errors import UserError
from wanda_dvc.packed import linear as packed_linear
from wanda_dvc.packed.directory import pack_directory, unpack_directory
from wanda_dvc.packed.format import (
    FORMAT,
    KEEP,
    METHOD,
    checksum,
    count_nonzeros,
    is_two_of_four,
    pack,
    packing_of,
    unpack,
)
from wanda_dvc.packed.linear import PackedConfig, PackedLinear, PackedQuantizer
from wanda_dvc.pruning.selection import pack_bits, unpack_bits
from wanda_dvc.reading import DTYPES as WIDTHS
from wanda_dvc.stages.download import download
from wanda_dvc.study.project import Project

TYPES = list(STORED)


def same(one: Tensor, other: Tensor) -> bool:
    """Equal in every bit: NaN is NaN, and −0 is not 0."""
    return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(
        one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)
    )


def pack_linear(linear: nn.Linear) -> PackedLinear:
    """A packed linear by hand, without a directory."""
    made = PackedLinear(linear.in_features, linear.out_features, bias=False, dtype=linear.weight.dtype)
    values, made.weight_keep = pack(linear.weight.detach())
    made.weight, made.bias = nn.Parameter(values, requires_grad=False), linear.bias
    made.settle()
    return made


def sparse(rows: int, columns: int, dtype: torch.dtype, share: float, seed: int) -> Tensor:
    """A weight with a share of zeros, and numbers that a careless format would lose."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=draw).to(dtype)
    weight[torch.rand(rows, columns, generator=draw) < share] = 0
    odd = torch.tensor([-0.0, float("nan"), float("inf"), torch.finfo(dtype).smallest_normal / 2], dtype=dtype)
    weight.view(-1)[: len(odd)] = odd[: weight.numel()]
    return weight


# --- the numbers ---


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@settings(max_examples=30)
@given(rows=st.integers(1, 9), columns=st.integers(1, 40), share=st.sampled_from([0, 0.3, 0.7, 1]), seed=st.integers(0))
def test_no_bit_is_lost(dtype: torch.dtype, rows: int, columns: int, share: float, seed: int):
    weight = sparse(rows, columns, dtype, share, seed % 2**31)
    values, bits = pack(weight)
    assert same(unpack(values, bits, columns), weight)
    assert count_nonzeros(weight) == len(values)
    assert bits.nbytes == rows * -(-columns // 8)


def test_the_first_column_is_the_highest_bit():
    keep = torch.tensor([[True, False, False, False, False, False, False, False, True], [False] * 9])
    assert pack_bits(keep).tolist() == [[0b10000000, 0b10000000], [0, 0]]
    assert torch.equal(unpack_bits(pack_bits(keep), 9), keep)


# --- a directory ---


def prune_at_random(folder: Path, share: float = 0.5) -> list[str]:
    """Set weights of all linears to zero, in place; return the linears' names."""
    linears = []
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        for seed, (name, weight) in enumerate(sorted(tensors.items())):
            if weight.dim() == 2 and (".layers." in name or ".h." in name):
                weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < share] = 0
                linears.append(name.removesuffix(".weight"))
        save_file(tensors, path, {"format": "pt"})
    return linears


def equal_directories(one: Path, other: Path) -> bool:
    """The same tensors, bit by bit, and otherwise the same files."""
    first, second = Checkpoint(one), Checkpoint(other)
    for tensor in first.where:
        assert same(first.read(Address(tensor)), second.read(Address(tensor))), tensor
    weights = {path.name for path in first.shards}
    for path in one.iterdir():
        if path.name not in weights and path.name != "config.json" and "index" not in path.name:
            assert path.read_bytes() == (other / path.name).read_bytes(), path.name
    assert json.loads((one / "config.json").read_text()) == json.loads((other / "config.json").read_text())
    return first.where.keys() == second.where.keys() and {p.name for p in one.iterdir()} == {
        p.name for p in other.iterdir()
    }


def packed_bytes(weight: Tensor) -> int:
    return sum(tensor.nbytes for tensor in pack(weight))


def packed(tmp_path: Path, *, source: Path | None = None) -> tuple[Path, Path]:
    """A dense directory with zeros, and the same packed."""
    source = source or save_tiny_model(tmp_path / "source", shard="20KB")
    linears, target = prune_at_random(source), tmp_path / "packed"
    target.mkdir()
    pack_directory(source, target, linears)
    return source, target


# No weight of theirs is a torch Linear's own: GPT-2's are transposed, and Falcon has a linear of its own.
STAY_DENSE = {"gpt2", "openai-gpt", "falcon"}
KINDS = [(torch.float32, "1GB"), (torch.bfloat16, "30KB"), (torch.float16, "1GB")]


@pytest.mark.parametrize("family", BY_WAY)
def test_every_family_comes_back_and_loads_with_the_same_logits(family: str, tmp_path: Path):
    """Each in one of the dtypes, whole or in shards. What cannot be packed stays dense."""
    dtype, shard = KINDS[list(ALL).index(family) % len(KINDS)]
    source, target = packed(tmp_path, source=save(family, tmp_path / "source", dtype, shard))
    stored = packing_of(target)
    assert stored is not None
    assert bool(stored.weights) == (family not in STAY_DENSE)
    (tmp_path / "back").mkdir()
    unpack_directory(target, tmp_path / "back")
    assert equal_directories(source, tmp_path / "back")
    dense, small = (AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval() for path in (source, target))
    found = {f"{name}.weight" for name, module in small.named_modules() if isinstance(module, PackedLinear)}
    assert found == set(stored.weights)
    tokens = torch.randint(3, 256, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert same(dense(input_ids=tokens).logits, small(input_ids=tokens).logits)
    if found:
        assert small.get_memory_footprint() < dense.get_memory_footprint()
    for name, parameter in small.dequantize().state_dict().items():
        assert same(parameter, dense.state_dict()[name]), name


def test_a_weight_that_a_block_multiplies_by_itself_stays_dense(tmp_path: Path):
    """BLOOM's `slow_but_exact` multiplies slices of two weights and does not call their modules."""
    model = save("bloom", tmp_path / "source", pretraining_tp=2, slow_but_exact=True)
    source, target = packed(tmp_path, source=model)
    stored = packing_of(target)
    assert stored is not None
    assert {name.split(".", 3)[3] for name in stored.weights} == {
        "self_attention.query_key_value.weight",
        "mlp.dense_h_to_4h.weight",
    }
    dense, small = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (source, target))
    tokens = torch.arange(3, 12)[None]
    with torch.no_grad():
        assert same(dense(input_ids=tokens).logits, small(input_ids=tokens).logits)


def test_a_model_that_the_engine_runs_in_another_dtype_alone_is_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Mamba's blocks return float32; some CPUs run stored bfloat16 through our attention, after a comparison."""
    monkeypatch.setattr(attention, "is_faster", lambda *_: True)
    _, target = packed(tmp_path, source=save("mamba", tmp_path / "source", torch.bfloat16, residual_in_fp32=True))
    stored = packing_of(target)
    assert stored is not None
    assert {name.split(".", 3)[3] for name in stored.weights} == {
        f"mixer.{name}.weight" for name in ("in_proj", "x_proj", "out_proj")
    }


def test_what_packing_would_not_shrink_stays_dense(tmp_path: Path):
    source = save_tiny_model(tmp_path / "source")
    linears = prune_at_random(source, share=0.02)  # 1/32 of a weight's bytes are the bits
    (tmp_path / "packed").mkdir()
    sizes = pack_directory(source, tmp_path / "packed", linears)
    weights = Checkpoint(source)
    shrinks = {f"{name}.weight" for name in linears if packed_bytes(w := weights.weight(name)) < w.nbytes}
    stored = packing_of(tmp_path / "packed")
    assert stored is not None
    assert set(stored.weights) == shrinks
    assert sizes.packed == sum(min(packed_bytes(weights.weight(x)), weights.weight(x).nbytes) for x in linears)
    assert sizes.dense == 4 * sizes.weights == sum(weights.weight(name).nbytes for name in linears)
    assert sizes.directory == sum(path.stat().st_size for path in (tmp_path / "packed").iterdir())


def test_each_tensor_begins_at_a_multiple_of_its_types_size(tmp_path: Path):
    """Readers map the file and take a view. The odd numbers of bytes of the bits stand after all that is wider."""
    source = save_tiny_model(tmp_path / "source", hidden_size=40, intermediate_size=50)
    _, target = packed(tmp_path, source=source)
    entries = Checkpoint(target).entries.values()
    assert {entry.length % 4 for entry in entries} != {0}
    assert all(entry.begin % WIDTHS[entry.dtype] == 0 for entry in entries)


def test_what_was_loaded_can_be_saved_in_any_dtype_and_loaded_again(tmp_path: Path):
    source, target = packed(tmp_path)
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).state_dict()
    AutoModelForCausalLM.from_pretrained(target, dtype=torch.bfloat16).save_pretrained(tmp_path / "saved")
    stored = packing_of(tmp_path / "saved")
    assert stored is not None
    (tmp_path / "back").mkdir()
    unpack_directory(tmp_path / "saved", tmp_path / "back")
    back = Checkpoint(tmp_path / "back")
    assert all(same(back.read(Address(name)), dense[name]) for name in back.where)
    with pytest.warns(UserWarning, match="loading attributes"):  # transformers' own
        again = AutoModelForCausalLM.from_pretrained(
            tmp_path / "saved", dtype=torch.bfloat16, quantization_config=PackedConfig(dequantize=True)
        )
    assert not hasattr(again.config, "quantization_config")
    assert not any(isinstance(module, PackedLinear) for module in again.modules())
    for name, parameter in again.state_dict().items():
        assert same(parameter, dense[name]), name
    again.save_pretrained(tmp_path / "dense")
    assert packing_of(tmp_path / "dense") is None


@pytest.mark.parametrize("bias", [False, True])
def test_a_packed_linear_is_the_linear(bias: bool):
    linear = nn.Linear(19, 7, bias=bias)
    linear.weight.data.copy_(sparse(7, 19, torch.float32, 0.5, 0).nan_to_num_(0, 0, 0))
    small, x = pack_linear(linear), torch.randn(3, 2, 19, requires_grad=True)
    wide = pack_linear(nn.Linear(40, 30, bias=False))
    with torch.no_grad():
        first = small(x)
        wide(torch.randn(9, 40))  # takes the same buffer
        torch.testing.assert_close(first, linear(x))
    out = small(x)
    wide(torch.randn(9, 40))
    out.sum().backward()  # the weight at hand is that of the call, whatever came after
    of_dense = x.detach().requires_grad_()
    linear(of_dense).sum().backward()
    assert x.grad is not None
    assert of_dense.grad is not None
    assert same(x.grad, of_dense.grad)
    assert small(x.detach()).requires_grad is bias  # the kernel has no gradients, also none for a bias
    assert same(small.unpacked().weight.detach(), linear.weight.detach())


@pytest.mark.parametrize("kernel", [True, False])
def test_modes_of_autograd_come_in_any_order(kernel: bool, monkeypatch: pytest.MonkeyPatch):
    """Without a kernel, as on a GPU, the buffer of one mode is written in another."""
    linear = nn.Linear(64, 32)
    modes = (torch.inference_mode, torch.no_grad, torch.enable_grad)
    for order in itertools.permutations(modes):
        monkeypatch.setattr("wanda_dvc.packed.linear._scratch", SimpleNamespace())
        small, x = pack_linear(linear), torch.randn(9, 64)
        small.starts = small.starts if kernel else None
        for mode in order:
            with mode():
                torch.testing.assert_close(small(x), linear(x))


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("width", [32, 48])
def test_inputs_of_another_width_are_refused(width: int, tokens: int):
    with pytest.raises(RuntimeError):
        pack_linear(nn.Linear(40, 16))(torch.randn(tokens, width))


def test_a_packed_model_can_be_pickled_and_is_as_large_as_a_device_map_thinks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    thought: list[dict[str, int]] = []
    before = PackedQuantizer._process_model_before_weight_loading

    def noted(self: Any, model: Any, *given: Any, **words: Any) -> None:
        before(self, model, *given, **words)
        thought.append({name: x.numel() for name, x in model.state_dict().items()})

    monkeypatch.setattr(PackedQuantizer, "_process_model_before_weight_loading", noted)
    model = AutoModelForCausalLM.from_pretrained(packed(tmp_path)[1])
    assert thought == [{name: x.numel() for name, x in model.state_dict().items()}]
    again, tokens = pickle.loads(pickle.dumps(model)), torch.arange(9)[None]
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    with pytest.raises(UserError, match=r"^model: got quantized or packed weights, .*dequantize"):
        wd.perplexity(model, tokens)


# --- the plug-in ---

LOADS = """
{imports}
import sys
try:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
except Exception as error:
    sys.exit(f"refused: {{error}}")
print(type(model.model.layers[0].mlp.up_proj).__name__)
"""
PLUGIN, MODELS = "import wanda_dvc", "from transformers import AutoModelForCausalLM"


@pytest.mark.slow  # each begins a process that loads a model
@pytest.mark.parametrize(
    ("imports", "found"),
    [
        (f"{PLUGIN}; assert 'torch' not in sys.modules\n{MODELS}", "PackedLinear"),
        (f"{MODELS}\n{PLUGIN}", "PackedLinear"),
        (f"{MODELS}, LlamaForCausalLM\n{PLUGIN}", "PackedLinear"),
        (MODELS, "refused"),
    ],
    ids=["first", "after transformers", "after its models", "without"],
)
def test_transformers_loads_it_after_our_import_and_refuses_it_without(imports: str, found: str, tmp_path: Path):
    _, target = packed(tmp_path)
    code = LOADS.format(imports=f"import sys\n{imports}")
    done = subprocess.run([sys.executable, "-c", code, str(target)], capture_output=True, text=True, check=False)
    assert found in (done.stderr if done.returncode else done.stdout)


# --- 2:4 on a GPU: all but the card ---


def two_of_four(folder: Path, share: float = 1) -> list[str]:
    """Prune a share of every linear's groups of four to two, in place; return the linears' names."""
    path, linears = folder / "model.safetensors", []
    tensors = load_file(path)
    for name, weight in tensors.items():
        if weight.dim() == 2 and ".layers." in name:
            groups = weight.view(-1, 4)
            groups[: int(share * len(groups)), ::2] = 0
            linears.append(name.removesuffix(".weight"))
    save_file(tensors, path, {"format": "pt"})
    return linears


def packed_sparse(tmp_path: Path, share: float = 1) -> Path:
    source, target = save_tiny_model(tmp_path / "source"), tmp_path / "packed"
    target.mkdir()
    pack_directory(source, target, two_of_four(source, share))
    return target


def loaded_sparse(tmp_path: Path, share: float = 1) -> Any:
    target = packed_sparse(tmp_path, share)
    with pytest.warns(UserWarning, match="loading attributes"):
        return AutoModelForCausalLM.from_pretrained(target, quantization_config=PackedConfig(sparse="2:4"))


@pytest.mark.parametrize(
    ("weight", "found"),
    [([[1, 0, 0, 2, 0, 0, 0, 0]], True), ([[0, 1, 2, 0, 0, 1, 1, 1]], False), ([[1, 0]], False), ([[1] * 4], False)],
)
def test_the_pattern_is_known_by_the_bits(weight: list[list[int]], found: bool):
    assert is_two_of_four(pack_bits(torch.tensor(weight) != 0), len(weight[0])) is found


def test_sparse_cores_are_asked_for_before_anything_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target = packed_sparse(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with (
        pytest.warns(UserWarning, match="loading attributes"),
        pytest.raises(UserError, match="no CUDA device for it, expected Ampere"),
    ):
        AutoModelForCausalLM.from_pretrained(target, quantization_config=PackedConfig(sparse="2:4"))
    with pytest.raises(UserError, match="sparse: got 4:8, expected 2:4"):
        PackedConfig(sparse="4:8")
    with pytest.raises(UserError, match="expected one of them"):
        PackedConfig(sparse="2:4", dequantize=True)


def test_only_what_a_card_can_take_goes_to_its_sparse_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(accelerator, "has_sparse_cores", lambda: True)
    with pytest.raises(UserError, match='on cpu, expected a CUDA device for sparse=2:4; add device_map="cuda"'):
        loaded_sparse(tmp_path)


# A CPU has no sparse cores: a model on it passes for one on a card, and the conversion is another one.
@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    taken: list[Tensor] = []

    def take(weight: Tensor) -> Tensor:
        taken.append(weight)
        return 2 * weight

    monkeypatch.setattr(accelerator, "has_sparse_cores", lambda: True)
    monkeypatch.setattr(packed_linear, "CARD", "cpu")
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", take)
    return taken


def test_each_weight_is_given_to_torch_once(card: list[Tensor], tmp_path: Path):
    model = loaded_sparse(tmp_path)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    blocks = [module for module in dense.model.layers.modules() if isinstance(module, nn.Linear)]
    assert len(card) == len(blocks)
    for taken, linear in zip(card, blocks, strict=True):
        assert torch.equal(taken, linear.weight)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, 2 * dense.model.layers[0].mlp.up_proj.weight)
    with pytest.raises(UserError, match="load it with dequantize=True"):
        model.dequantize()
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "saved")


def test_a_model_of_another_pattern_is_refused(card: list[Tensor], tmp_path: Path):
    with pytest.raises(UserError, match="no 2:4 pattern, expected one for sparse=2:4; prune with pattern=2:4"):
        loaded_sparse(tmp_path, share=0.9)
    assert card == []


def test_a_shape_that_torch_refuses_is_named(card: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(weight: Tensor) -> Tensor:
        raise RuntimeError("must be a multiple of (32, 64)")

    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", refuse)
    with pytest.raises(UserError, match=r"q_proj: sparse=2:4: must be a multiple of \(32, 64\); load without it"):
        loaded_sparse(tmp_path)


# --- what is damaged ---

Damage = Callable[[dict[str, Tensor], dict[str, Any]], object]
NAME = "model.layers.0.mlp.up_proj.weight"
BITS = NAME + KEEP
CHANGED = r"checksum [0-9a-f]{8}, expected [0-9a-f]{8}: changed after it was packed; export it again"


def moved(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
    """Another weight of the first row stays: the numbers of bits and values are as before."""
    keep = unpack_bits(tensors[BITS], 32)
    first = keep[0].tolist()
    keep[0, first.index(True)], keep[0, first.index(False)] = False, True
    tensors[BITS] = pack_bits(keep)


def nan(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """A NaN that was there when the checksum was computed."""
    tensors[NAME][:1].fill_(float("nan"))
    config["crc32"][NAME] = checksum(tensors[NAME])


def flipped(name: str) -> Damage:
    return lambda tensors, _: tensors[name].view(torch.uint8).view(-1)[:1].bitwise_xor_(1)


DAMAGED: dict[str, tuple[Damage, str]] = {
    "no bits": (lambda tensors, _: tensors.pop(BITS), f"no tensor {BITS}, which config.json names; export it again"),
    "no values": (lambda tensors, _: tensors.pop(NAME), f"no tensor {NAME}, which config.json names"),
    "no norm": (lambda tensors, _: tensors.pop("model.norm.weight"), "no tensor model.norm.weight, which config"),
    "a value less": (lambda tensors, _: tensors.update({NAME: tensors[NAME][:-1].clone()}), f"{NAME}: {CHANGED}"),
    "a value more": (lambda tensors, _: tensors.update({NAME: tensors[NAME].repeat(2)}), f"{NAME}: {CHANGED}"),
    "a row of bits less": (lambda tensors, _: tensors.update({BITS: tensors[BITS][1:].clone()}), f"{BITS}: {CHANGED}"),
    "bits of another type": (
        lambda tensors, _: tensors.update({BITS: tensors[BITS].view(torch.int8)}),
        f"{BITS}: found I8, expected U8; export it again",
    ),
    "values of another type": (
        lambda tensors, _: tensors.update({NAME: tensors[NAME].half()}),
        f"{NAME}: found F16, expected F32; export it again",
    ),
    "a bit flipped": (lambda tensors, _: tensors[BITS].view(-1)[:1].bitwise_xor_(4), f"{BITS}: {CHANGED}"),
    "a bit moved": (moved, f"{BITS}: {CHANGED}"),
    "the last digit of a value": (flipped(NAME), f"{NAME}: {CHANGED}"),
    "two values change places": (
        lambda tensors, _: tensors.update({NAME: tensors[NAME].roll(1)}),
        f"{NAME}: {CHANGED}",
    ),
    "the last digit of an embedding": (flipped("model.embed_tokens.weight"), f"embed_tokens.weight: {CHANGED}"),
    "the last digit of a norm": (flipped("model.norm.weight"), f"model.norm.weight: {CHANGED}"),
    "a NaN": (nan, f"{NAME}: found NaN, expected numbers"),
    "another format": (lambda _, config: config.update(format_version=FORMAT + 1), f"format {FORMAT + 1}, expected"),
    "the format before": (lambda _, config: config.update(format_version=1), "packed in format 1, expected 2; install"),
    "no format": (lambda _, config: config.pop("format_version"), "packed in format null"),
    "a list of weights": (lambda _, config: config.update(weights=[]), "no weights, expected those"),
    "a shape of three": (lambda _, config: config["weights"][NAME].update(shape=[1, 2, 3]), f"{NAME}: expected dtype"),
    "an unknown dtype": (lambda _, config: config["weights"][NAME].update(dtype="int3"), f"{NAME}: expected dtype"),
    "another dtype": (
        lambda _, config: config["weights"][NAME].update(dtype="float16"),
        f"{NAME}: found F32, expected F16; export it again",
    ),
    "a weight that is none": (
        lambda _, config: config["weights"].update(lm_head={"dtype": "float32", "shape": [2, 2]}),
        "quantization_config: crc32: expected a checksum of each tensor; export it again",
    ),
    "no checksums": (
        lambda _, config: config.pop("crc32"),
        "quantization_config: crc32: expected a checksum of each tensor; export it again",
    ),
    "a list of checksums": (
        lambda _, config: config.update(crc32=[1]),
        "quantization_config: crc32: expected a checksum of each tensor; export it again",
    ),
    "no checksum of bits": (
        lambda _, config: config["crc32"].pop(BITS),
        "quantization_config: crc32: expected a checksum of each tensor; export it again",
    ),
    "a checksum in text": (
        lambda _, config: config["crc32"].update({NAME: "1"}),
        "quantization_config: crc32: expected a checksum of each tensor; export it again",
    ),
    "a checksum of a norm in text": (
        lambda _, config: config["crc32"].update({"model.norm.weight": "1"}),
        "crc32: exp",
    ),
    "another checksum": (
        lambda _, config: config["crc32"].update({NAME: 1}),
        rf"{NAME}: checksum \w+, expected 00000001",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_damaged_is_refused(name: str, tmp_path: Path):
    """In one line, before anything is written or loaded; a NaN when its tensor is read."""
    damage, said = DAMAGED[name]
    _, target = packed(tmp_path, source=save_tiny_model(tmp_path / "source"))
    tensors, config = load_file(target / "model.safetensors"), json.loads((target / "config.json").read_text())
    damage(tensors, config["quantization_config"])
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    (target / "config.json").write_text(json.dumps(config))
    (tmp_path / "back").mkdir()
    for take in (
        lambda: unpack_directory(target, tmp_path / "back"),
        lambda: AutoModelForCausalLM.from_pretrained(target),
    ):
        with pytest.raises(UserError, match=said) as caught:
            take()
        assert "\n" not in str(caught.value)
    assert name == "a NaN" or not list((tmp_path / "back").iterdir())


def test_a_list_as_dtype_is_refused(tmp_path: Path):
    """Transformers itself fails on it."""
    _, target = packed(tmp_path)
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"]["weights"][NAME]["dtype"] = ["float32"]
    (target / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"{NAME}: expected dtype and shape"):
        unpack_directory(target, tmp_path / "back")


def test_a_model_that_was_changed_in_memory_is_saved_with_new_checksums(tmp_path: Path):
    _, target = packed(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(target)
    linear = model.model.layers[0].mlp.up_proj
    linear.weight.data.mul_(2)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert same(again.model.layers[0].mlp.up_proj.weight.detach(), linear.weight.detach())


def test_a_directory_that_is_not_packed_is_told_so(tiny: Path, tmp_path: Path):
    assert packing_of(tiny) is None
    with pytest.raises(UserError, match="no packed directory"):
        unpack_directory(tiny, tmp_path)


def test_neither_hidden_files_nor_tensors_that_no_index_names_go_along(tmp_path: Path):
    """The Hub's client notes times in .cache: with them the same model would have another hash in each download."""
    source = save("llama", tmp_path / "model", shard="30KB")
    linears = prune_at_random(source, share=0.5)
    (source / ".cache").mkdir()
    (source / ".cache/when").write_text("1")
    shard = sorted(source.glob("*.safetensors"))[0]
    save_file(load_file(shard) | {"extra.inv_freq": torch.zeros(4)}, shard, metadata={"format": "pt"})
    expected = {name: Checkpoint(source).read(Address(name)) for name in Checkpoint(source).where}
    pack_directory(source, tmp_path / "packed", linears)
    (tmp_path / "packed/.cache").mkdir()
    (tmp_path / "packed/.cache/when").write_text("2")
    unpack_directory(tmp_path / "packed", tmp_path / "dense")
    dense = Checkpoint(tmp_path / "dense")
    assert dense.where.keys() == expected.keys()
    assert all(same(weight, dense.read(Address(name))) for name, weight in expected.items())
    assert not list((tmp_path / "dense").glob(".*"))


# --- by the command line ---


def test_export_writes_it_and_download_takes_it(project: Callable[..., Project], tmp_path: Path):
    made = project(method="magnitude", sparsity=0.7)
    run = ["-C", str(made.root)]
    for stage in (["download", "model"], ["download", "calibration"], ["calibrate"], ["mask"], ["apply"]):
        assert wanda_dvc(*run, *stage).returncode == 0
    dense, target = Checkpoint(made.model("pruned")), tmp_path / "packed"
    pruned = {name: dense.read(Address(name)).clone() for name in dense.where}
    assert wanda_dvc(*run, "export", str(target), "--format", "packed").returncode == 0
    stored = json.loads((target / "config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == METHOD
    card = (target / "README.md").read_text()
    for said in ("import wanda_dvc", "bits a weight", "int8", "logits may differ in their last bits"):
        assert said in card
    assert not list((made.root / ".dvc" / "tmp").rglob("dense"))
    again = project(model=target)
    download(project=again, part="model")
    unpacked = Checkpoint(again.model("dense"))
    assert unpacked.where.keys() == pruned.keys()
    assert all(same(pruned[name], unpacked.read(Address(name))) for name in pruned)
    assert packing_of(unpacked.folder) is None
    content = bytearray((target / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (target / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=CHANGED):
        download(project=again, part="model")
    assert wanda_dvc(*run, "evaluate", str(target)).returncode == 2
