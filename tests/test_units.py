"""Patterns that remove units: what stays is exact, and the smaller model is the model without the units."""

import contextlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from pkgutil import resolve_name
from typing import Any
from unittest import mock

import pytest
import torch
from cases.grids import OF_WEIGHTS, named, short
from conftest import Make, Patch, fetch, mask_and_apply, prune, save_tiny_model
from families import ALL, EXPERTS, MIXTURES, place, save
from simulated_gpu import simulated_gpu
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

from wanda_dvc.catalog import STRUCTURES, methods
from wanda_dvc.engine import probe as probing
from wanda_dvc.engine.checkpoint import Address, Checkpoint, write_model
from wanda_dvc.engine.decoder import Decoder
from wanda_dvc.engine.finders import block_lists
from wanda_dvc.engine.probe import probe
from wanda_dvc.engine.removal import Removal, SmallerCheckpoint, UnitTensor
from wanda_dvc.engine.structure import build_empty, find_blocks, find_linears, find_slices
from wanda_dvc.errors import UserError
from wanda_dvc.pruning.masks import MaskRule, choose_linear, choose_units
from wanda_dvc.pruning.scores import wanda
from wanda_dvc.pruning.solvers import GramFactors
from wanda_dvc.pruning.statistics import BlockStats, InputStats, TokenSum
from wanda_dvc.pruning.units import Units, count_kept, expand, least_squares_of_units, step_of
from wanda_dvc.stages.inputs import draw_calibration, read_choices
from wanda_dvc.stages.mask import mask
from wanda_dvc.study.artifact import read_provenance
from wanda_dvc.study.files import load_json, write_json
from wanda_dvc.study.tensors import read_fisher, read_masks, read_stats

CPU = torch.device("cpu")
NO_NUMBER = "its configuration has no number"
REFUSED = {
    "neurons": {"bloom": NO_NUMBER, "openai-gpt": NO_NUMBER, "mamba": "several linears"},
    "heads": {
        **dict.fromkeys(("opt", "gpt_neox", "gpt2", "bloom", "stablelm", "mamba", "openai-gpt"), NO_NUMBER),
        "falcon": "transformers builds no model",
        "olmo2": "computes something else",  # a norm of all heads' queries
        "olmoe": "fails its trial",
        "jetmoe": "no linear reads",
    },
    "blocks": {},
    "smaller": {},
    "experts": dict.fromkeys(("llama", "gpt2"), "its configuration has none"),
}
SHARES = {"neurons": "0.25", "heads": "0.5", "blocks": "1/3", "experts": "0.25", "smaller": "0.25"}
CASES = [
    (pattern, family)
    for pattern in STRUCTURES
    for family in (EXPERTS if pattern == "experts" else ALL)
    if family not in REFUSED[pattern]
]


def test_every_mixture_is_here():
    assert {*MIXTURES, "mixtral", "qwen3_moe", "jamba mixed"} == EXPERTS.keys() <= ALL.keys()


@pytest.mark.parametrize(
    ("width", "sparsity", "stay"),
    [
        (1536, "0.2", 1216),  # 1228.8 is nearer to 19 times 64 than to 20 times
        (2048, "0.2", 1664),  # 1638.4: 256 is more than a 16th
        (4096, "0.2", 3328),  # 3276.8 is nearer to 13 times 256 than to 12 times
        (80, "0.25", 60),  # a 16th of 80 is 5: multiples of 4
        (80, "0.99", 4),
        (48, "0.27", 35),  # a 16th of 48 is 3: multiples of 1
        (10, "0.25", 8),  # 7.5, to even
        (11008, "0", 11008),
        (2731, "0.001", 2731),  # never more than there are
    ],
)
def test_the_width_is_the_nearest_multiple(width: int, sparsity: str, stay: int):
    assert count_kept(width, Fraction(sparsity), step_of(width, STRUCTURES["neurons"].multiple)) == stay


@pytest.mark.parametrize("multiple", [1, 2, 3, 6, 48])
def test_every_multiple_leaves_units(multiple: int):
    assert count_kept(16, Fraction("0.5"), step_of(16, multiple)) == 8


def linear(seed: int, out: int = 12, inputs: int = 24, tokens: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator)
    x = torch.randn(tokens, inputs, generator=generator) @ mixing
    return torch.randn(out, inputs, generator=generator), x


@pytest.mark.parametrize("damping", [0.0, 0.01, 1.0])
def test_least_squares_is_the_solution_of_its_equations_and_never_worse_than_zeros(damping: float):
    weight, x = linear(2)
    gram = x.T @ x
    kept = torch.arange(24) % 3 > 0
    keep = kept.expand(12, 24).clone()
    keep[5] = False  # a row of another removed unit
    solved = least_squares_of_units(weight, keep, GramFactors(gram, damping=damping))
    damped = gram.double() + damping * gram.diagonal().double().mean() * torch.eye(24)
    wanted = (weight.double() @ damped)[:, kept] @ torch.linalg.inv(damped[kept][:, kept])
    rows = torch.arange(12) != 5
    torch.testing.assert_close(solved[rows][:, kept].double(), wanted[rows], rtol=1e-3, atol=1e-3)
    assert not solved[~keep].any()

    def error(v: torch.Tensor) -> torch.Tensor:
        off = (weight - v).double()
        return ((off @ gram.double()) * off).sum(dim=1)

    assert (error(solved) <= error(weight * keep) * (1 + 1e-6)).all()


def test_a_linear_that_reads_no_removed_unit_is_not_solved(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr("wanda_dvc.pruning.units.factor_inverse")  # its cost grows with in³
    weight, x = linear(2)
    keep = torch.ones(12, 24, dtype=torch.bool)
    keep[5] = False
    solved = least_squares_of_units(weight, keep, GramFactors(x.T @ x))
    assert torch.equal(solved, weight * keep)


# --- families ---


def removal_of(folder: Path, pattern: str, sparsity: str = "", device: torch.device = CPU) -> Removal:
    structure = STRUCTURES[pattern]
    return resolve_name(structure.find)(Checkpoint(folder), structure, Fraction(sparsity or SHARES[pattern]), device)


def drawn(removal: Removal) -> Removal:
    """Random units stay in each set, the same number in each group; the first blocks: others may depend on them."""
    generator = torch.Generator().manual_seed(2)
    kept = {}
    for pattern in removal.sets_of:
        removal = removal.with_sparsity(pattern, Fraction("1/3" if pattern == "blocks" else "1/2"))
    for name, units in removal.unit_sets.items():
        orders = [torch.randperm(units.total // units.groups, generator=generator) for _ in range(units.groups)]
        orders = [torch.arange(units.total)] if units.members and removal.structure.name != "experts" else orders
        kept[name] = torch.cat([order < units.kept // units.groups for order in orders])
    return removal.with_kept(kept)


def write(smaller: SmallerCheckpoint, folder: Path) -> Path:
    """A smaller model, as `apply` writes it."""
    assert sorted(write_model(smaller, folder)) == sorted(smaller.changed.values())
    return folder


@contextlib.contextmanager
def masked(folder: Path, removal: Removal) -> Iterator[Any]:
    """The model with zeros in all weights of the units, as masks have them; biases stay."""
    checkpoint = Checkpoint(folder)
    keeps = {}
    for dimension in removal.dimensions:
        weight = checkpoint.read(dimension.address)
        if weight.dim() == 2 and not dimension.address.tensor.endswith("bias"):
            keeps[dimension.address.linear] = torch.ones_like(weight, dtype=torch.bool)
    for linear, dimension in removal.consumers.items():
        along = expand(removal.kept_masks[dimension.unit_set], dimension.layout)
        keeps[linear] &= along if dimension.dim == 1 else along[:, None]
    keeps = replace(removal, kept_masks={}).expand_masks(keeps)  # from the masks of the readers alone
    assert all(torch.equal(found, removal.kept_masks[name]) for name, found in removal.kept_units(keeps).items())
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    slices = find_slices(model, checkpoint)
    where, blocks = find_blocks(model)
    for index, block in enumerate(blocks):
        for name, stored in find_linears(block, f"{where}.{index}.", slices).items():
            if name in keeps:
                stored.weight.data.mul_(keeps[name])
    yield model


@contextlib.contextmanager
def skipping(folder: Path, removal: Removal) -> Iterator[Any]:
    """The model without some blocks in its list."""
    yield cut(AutoModelForCausalLM.from_pretrained(folder).eval(), removal)


def cut(model: Any, removal: Removal) -> Any:
    where, blocks = find_blocks(model)
    parent, _, leaf = where.rpartition(".")
    kept = [block for block, stay in zip(blocks, removal.kept_masks[where].tolist(), strict=True) if stay]
    setattr(model.get_submodule(parent), leaf, torch.nn.ModuleList(kept))
    model.config.get_text_config().num_hidden_layers = len(kept)
    return model


@contextlib.contextmanager
def masked_and_skipping(folder: Path, removal: Removal) -> Iterator[Any]:
    """The model with zeros in all weights of heads and neurons, without some blocks in its list."""
    if not removal.consumers:  # as of Mamba
        with skipping(folder, removal) as model:
            yield model
        return
    (blocks,) = removal.sets_of["blocks"]
    every_block = torch.ones(removal.unit_sets[blocks].total, dtype=torch.bool)
    with masked(folder, removal.with_kept({**removal.kept_masks, blocks: every_block})) as model:
        yield cut(model, removal)


class NeverChosen(TorchFunctionMode):
    """Logits of −∞ for some experts, in the order in which the model computes routers."""

    def __init__(self, routers: list[torch.Tensor], kept: list[torch.Tensor]) -> None:
        super().__init__()
        self.routers, self.kept = routers, kept
        self.used = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for router, stay in zip(self.routers, self.kept, strict=True):
            if function is torch.nn.functional.linear and args[1].data_ptr() == router.data_ptr():
                self.used += 1
                return made.masked_fill(~stay, -torch.inf)
        return made


@contextlib.contextmanager
def not_choosing(folder: Path, removal: Removal) -> Iterator[Any]:
    """The model whose routers never choose some experts."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    total = next(iter(removal.unit_sets.values())).total

    def stay_of(name: str) -> torch.Tensor:
        return next(stay for mixture, stay in removal.kept_masks.items() if place(mixture) == place(name))

    routers = {
        name: parameter
        for name, parameter in model.named_parameters()
        if ("router" in name or "gate" in name)
        and parameter.dim() == 2
        and parameter.shape[0] == total
        and not name.endswith("_bias")
    }
    for name, buffer in model.named_buffers():
        if buffer.shape == (total,):  # what DeepSeek adds to its scores
            buffer.masked_fill_(~stay_of(name), -torch.inf)
    with NeverChosen([*routers.values()], [stay_of(name) for name in routers]) as mode:
        yield model
    assert mode.used == len(removal.unit_sets)


ORACLES = {
    "neurons": masked, "heads": masked, "blocks": skipping, "experts": not_choosing, "smaller": masked_and_skipping
}  # fmt: skip


@pytest.mark.parametrize(("pattern", "family"), short(CASES, ("heads", "llama"), ("blocks", "llama scaled")))
def test_the_smaller_model_is_the_full_model_without_the_units(pattern: str, family: str, tmp_path: Path):
    folder = save(family, tmp_path / "model", **(EXPERTS[family] if pattern == "experts" else {}))
    checkpoint, found = Checkpoint(folder), removal_of(folder, pattern)
    grouped = (pattern, family) == ("experts", "deepseek_v3")
    assert {units.groups for units in found.unit_sets.values()} <= {2 if grouped else 1}
    removal = drawn(found)
    probe(checkpoint, removal, CPU)
    left = Checkpoint(write(SmallerCheckpoint(checkpoint, removal), tmp_path / "smaller"))
    small = AutoModelForCausalLM.from_pretrained(left.folder).eval()
    tokens = torch.randint(3, 256, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        with ORACLES[pattern](folder, removal) as full:
            wanted = full(input_ids=tokens, use_cache=False).logits
        got = small(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())
    every = build_empty(checkpoint.config, "it").parameters()
    assert sum(x.numel() for x in small.parameters()) < sum(x.numel() for x in every)
    shared = [name for name in checkpoint.file_of if "shared" in name and pattern == "experts"]
    assert all(torch.equal(checkpoint.read(Address(name)), left.read(Address(name))) for name in shared)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN here")
@pytest.mark.parametrize("family", short(EXPERTS, "jamba mixed"))
def test_a_probe_sees_routers_that_multiply_through_onednn(family: str, tmp_path: Path, monkeypatch: Patch):
    """As large routers do on some CPUs."""
    monkeypatch.setattr("wanda_dvc.kernels.is_faster", lambda: True)
    monkeypatch.setattr("wanda_dvc.kernels.SMALLEST_WEIGHT", 0)
    folder = save(family, tmp_path / "model", **EXPERTS[family])
    probe(Checkpoint(folder), drawn(removal_of(folder, "experts")), CPU)


@pytest.mark.parametrize(
    ("pattern", "family"), [(pattern, family) for pattern, families in REFUSED.items() for family in families]
)
def test_a_family_that_cannot_be_smaller_is_refused_with_the_reason(pattern: str, family: str, tmp_path: Path):
    why = REFUSED[pattern][family]
    with pytest.raises(UserError, match=f"pattern: got {pattern}, which .* does not support: .*{why}"):
        removal_of(save(family, tmp_path / "model"), pattern)


def test_a_list_of_block_indices_is_no_list_with_an_entry_for_each_block():
    """As `moe_layers` of Llama 4, where all blocks are mixtures."""
    content = {"moe_layers": [0, 1, 2], "layer_types": ["a", "b", "a"]}
    assert block_lists(content, 3) == {"layer_types": ["a", "b", "a"]}


def test_a_model_with_one_key_and_value_head_keeps_it(tmp_path: Path):
    with pytest.raises(UserError, match="num_key_value_heads is 1, expected one number for all blocks, 2 or more"):
        removal_of(save("llama", tmp_path / "model", num_key_value_heads=1), "heads")


def test_a_share_without_a_configuration_is_refused_before_any_work(tmp_path: Path):
    """Llama requires that the heads divide the width; `mask` and `apply` wrote a model that did not load."""
    folder = save("llama", tmp_path / "model", hidden_size=64, num_attention_heads=8, num_key_value_heads=4)
    with pytest.raises(UserError, match="does not support: transformers builds no model with .*num_attention_heads=6"):
        removal_of(folder, "heads", "0.25")
    assert removal_of(folder, "heads", "0.75").config_changes["num_attention_heads"] == 2


def test_more_experts_a_token_than_stay_are_refused(tmp_path: Path):
    folder = save("mixtral", tmp_path / "model", num_local_experts=8, num_experts_per_tok=3)
    assert removal_of(folder, "experts", "0.6").config_changes == {"num_local_experts": 3}
    with pytest.raises(UserError, match="num_experts_per_tok is 3, expected at most the 2 kept experts"):
        removal_of(folder, "experts", "0.75")
    sizes: dict[str, Any] = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 3}
    folder = save("deepseek_v3", tmp_path / "groups", **sizes)
    with pytest.raises(UserError, match="num_experts_per_tok is 3, expected at most the 2 kept experts that a router"):
        removal_of(folder, "experts", "0.5")  # 2 of each group


def test_a_model_that_mixes_its_neurons_fails_the_probe(tmp_path: Path, monkeypatch: Patch):
    def mixing(self: Any, x: torch.Tensor) -> torch.Tensor:
        inner = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(inner / inner.square().mean(dim=-1, keepdim=True).sqrt())

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaMLP.forward", mixing)
    with pytest.raises(UserError, match="computes something else"):
        removal_of(save("llama", tmp_path / "model"), "neurons")


def test_a_router_that_fails_the_probe_is_refused(tmp_path: Path, monkeypatch: Patch):
    def by_number(self: Any, hidden: torch.Tensor) -> Any:
        logits = torch.nn.functional.linear(hidden.reshape(-1, self.hidden_dim), self.weight)
        weights, index = (logits.softmax(dim=-1) * torch.arange(1, len(self.weight) + 1)).topk(self.top_k, dim=-1)
        return logits, weights, index

    monkeypatch.setattr("transformers.models.mixtral.modeling_mixtral.MixtralTopKRouter.forward", by_number)
    folder = save("mixtral", tmp_path / "model", **EXPERTS["mixtral"])
    with pytest.raises(UserError, match="computes something else"):
        probe(Checkpoint(folder), drawn(removal_of(folder, "experts")), CPU)


def test_a_probe_without_memory_does_not_refuse_the_pattern(tmp_path: Path, monkeypatch: Patch):
    folder = save("llama", tmp_path / "model")
    removal = drawn(removal_of(folder, "neurons"))
    monkeypatch.setattr(Decoder, "run", mock.Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory.")))
    with pytest.raises(torch.OutOfMemoryError):
        probe(Checkpoint(folder), removal, CPU)


# Torch makes a mask for keys and values of two sizes, as of deepseek_v3, on the host that the simulated GPU has.
@pytest.mark.parametrize(("pattern", "family"), [case for case in CASES if case[1] != "deepseek_v3"])
def test_the_probe_runs_on_the_device(pattern: str, family: str, tmp_path: Path, monkeypatch: Patch):
    """On a CPU, 70 billion parameters take ten minutes. A smaller model with other values is refused there too."""
    folder = save(family, tmp_path / "model", **(EXPERTS[family] if pattern == "experts" else {}))
    checkpoint, used, build = Checkpoint(folder), list[str](), Decoder.__init__

    def init(self: Decoder, *args: Any, device: torch.device, **kwargs: Any) -> None:
        used.append(device.type)
        build(self, *args, device=device, **kwargs)

    monkeypatch.setattr(Decoder, "__init__", init)
    with simulated_gpu():
        removal = drawn(removal_of(folder, pattern, device=torch.device("cuda")))
        probe(checkpoint, removal, torch.device("cuda"))
        assert set(used) == {"cuda"}
        others = removal.with_kept({name: kept.roll(1) for name, kept in removal.kept_masks.items()})
        monkeypatch.setattr(probing, "SmallerCheckpoint", lambda source, _: SmallerCheckpoint(source, others))
        with pytest.raises(UserError, match="fails its trial"):  # blocks of several kinds
            probe(checkpoint, removal, torch.device("cuda"))


def test_blocks_of_other_parts_of_a_model_keep_their_numbers(tmp_path: Path):
    checkpoint = Checkpoint(save("llama", tmp_path / "model"))
    removal = removal_of(checkpoint.folder, "blocks").with_kept({"model.layers": torch.tensor([True, False, True])})
    tower = [f"vision_tower.encoder.layers.{number}.weight" for number in range(3)]
    names = removal.renumbered([*checkpoint.file_of, *tower])
    assert [names[name] for name in tower] == tower
    assert names["model.layers.1.mlp.up_proj.weight"] == "model.layers.2.mlp.up_proj.weight"
    predictor = UnitTensor("model.layers", 3, "model.layers.", ".eh_proj")  # it predicts more tokens
    more = replace(removal, unit_tensors={"model.layers.3.eh_proj": predictor})
    assert more.renumbered(more.unit_tensors) == {"model.layers.2.eh_proj": "model.layers.3.eh_proj"}


def test_the_number_keeps_the_name_that_config_json_has_for_it(tmp_path: Path):
    """Qwen3's configuration on the Hub has `num_experts`; transformers 5 calls it `num_local_experts`."""
    folder = save("qwen3_moe", tmp_path / "model")
    config = load_json(folder / "config.json")
    config["num_experts"] = config.pop("num_local_experts")
    write_json(folder / "config.json", config)
    write(SmallerCheckpoint(Checkpoint(folder), drawn(removal_of(folder, "experts"))), tmp_path / "smaller")
    assert load_json(tmp_path / "smaller/config.json") == config | {"num_experts": 9}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "smaller")
    assert model.model.layers[0].mlp.experts.down_proj.shape[0] == 9


def test_new_experts_that_one_tensor_holds_are_written(tmp_path: Path):
    """`apply` reads each linear; heads go from other tensors."""
    checkpoint = Checkpoint(save("granitemoe", tmp_path / "model"))
    name = "model.layers.0.block_sparse_moe.input_linear.weight"
    addresses = [Address(name, expert) for expert in range(checkpoint.entries[name].shape[0])]

    def read(address: Address) -> torch.Tensor:
        return checkpoint.read(address) + (address in addresses)

    removal = drawn(removal_of(checkpoint.folder, "heads"))
    write(SmallerCheckpoint(checkpoint, removal, read, addresses), tmp_path / "smaller")
    assert torch.equal(Checkpoint(tmp_path / "smaller").read(Address(name)), checkpoint.read(Address(name)) + 1)


def test_shards_and_their_index_hold_the_smaller_model(tmp_path: Path):
    folder = save_tiny_model(tmp_path / "sharded", shard="20KB")
    smaller = SmallerCheckpoint(Checkpoint(folder), drawn(removal_of(folder, "neurons")))
    written = Checkpoint(write(smaller, tmp_path / "smaller"))
    index = load_json(written.folder / "model.safetensors.index.json")
    assert index["metadata"]["total_size"] == sum(entry.length for entry in written.entries.values())
    AutoModelForCausalLM.from_pretrained(written.folder)


# --- stages ---

CHOICES = [
    *({"recipe": name} for name in ("magnitude-rows", "wanda", "wanda-refit")),
    *({"recipe": name, "propagation": "pruned"} for name in ("wanda-refit", "wanda")),
    {"recipe": "wanda", "method": "ria"},
    {"recipe": "wanda-refit", "group": "outputs"},
    {"recipe": "wanda", "group": "outputs", "propagation": "pruned"},
    {"recipe": "fisher"},
]


# The share of units that goes, what config.json then says, and the linear that reads the units.
LEFT = {
    "neurons": (0.25, {"intermediate_size": 36}, "mlp.down_proj"),
    "heads": (0.5, {"num_key_value_heads": 1, "num_attention_heads": 2, "head_dim": 8}, "self_attn.o_proj"),
}


@pytest.mark.parametrize(
    ("choice", "pattern"), short(itertools.product(CHOICES, LEFT), (CHOICES[-1], "heads")), ids=named
)
def test_every_choice_gives_the_exact_smaller_model(choice: dict[str, str], pattern: str, calibrated_study: Make):
    sparsity, fields, consumer = LEFT[pattern]
    made = mask_and_apply(calibrated_study(pattern=pattern, sparsity=sparsity, **choice))
    dense, pruned = (Checkpoint(made.model(model)) for model in ("dense", "pruned"))
    assert {name: getattr(pruned.config, name) for name in fields} == fields
    found = load_json(made.metrics("pruned", "sparsity"))
    assert found == {"sparsity": sparsity, "removed_parameters": round(1 - pruned.parameters / dense.parameters, 6)}
    assert read_provenance(made.masks, "mask")["config"] == fields
    plan, changed = made.params.plan, set()
    keeps = {name: keep for block in range(2) for name, keep in read_masks(made.masks, block).items()}
    for name in dense.file_of:
        before, after = (each.read(Address(name)) for each in (dense, pruned))
        if (keep := keeps.get(name.removesuffix(".weight"))) is not None:
            before = before[keep.any(dim=1)][:, keep.any(dim=0)]
            assert keep.sum() == before.numel()  # what stays is dense
        assert before.shape == after.shape
        changed |= set() if torch.equal(before, after) else {name.rpartition(".layers.")[2].partition(".")[2]}
    assert changed == ({f"{consumer}.weight"} if plan.reconstructs else set())
    model = AutoModelForCausalLM.from_pretrained(made.model("pruned")).eval()
    with torch.no_grad():
        assert model(input_ids=torch.arange(3, 40)[None]).logits.isfinite().all()


@pytest.mark.parametrize("group", ["row", "outputs"])
@pytest.mark.parametrize("method", [name for name, row in OF_WEIGHTS.items() if row.needs != "gram"])
@pytest.mark.parametrize(
    ("pattern", "consumer", "units"), [("neurons", "mlp.down_proj", 48), ("heads", "self_attn.o_proj", 2)]
)
def test_the_lowest_units_go(group: str, method: str, pattern: str, consumer: str, units: int, calibrated_study: Make):
    """A unit's score is the sum over the weights that read it; in group `outputs` times the root of its cost."""
    made = calibrated_study(pattern=pattern, sparsity=0.5, method=method, group=group)
    mask(study=made)
    dense = Checkpoint(made.model("dense"))
    for block in range(dense.config.num_hidden_layers):
        name = f"model.layers.{block}.{consumer}"
        x = read_stats(made.norms, block).inputs[name]
        scored = resolve_name(methods()[method].function)(dense.weight(name), x).double()
        score = scored.sum(dim=0).view(units, -1).sum(dim=1)
        if group == "outputs":
            score *= read_fisher(made.fisher, block)[1][name][units] ** 0.5
        gone = ~read_masks(made.masks, block)[name].any(dim=0).view(units, -1).any(dim=1)
        assert set(gone.nonzero()[:, 0].tolist()) == set(score.argsort()[: units // 2].tolist())


def test_an_expert_without_gradients_is_ranked_by_its_weights_alone():
    torch.manual_seed(0)
    names, units = ["mlp.0.down_proj", "mlp.1.down_proj"], Units(4, 2)
    inputs = {name: InputStats.empty(4) for name in names}
    for x in inputs.values():
        x.add(torch.rand(8, 4))
    stats, weight = BlockStats(inputs, {name: [name] for name in names}, []), torch.rand(3, 4)
    costs = {names[0]: {4: torch.tensor([0.0, 0, 1, 1]).double()}}
    rule = MaskRule(methods()["wanda"], Fraction(1, 2), "neurons", "linear", {}, costs, dict.fromkeys(names, units))
    masks = [choose_linear(name, weight, inputs[name], stats, rule) for name in names]
    assert masks[0].tolist() == [[False, False, True, True]] * 3
    expected = wanda(weight, inputs[names[1]]).sum(dim=0).argsort()[2:]
    assert set(masks[1][0].nonzero()[:, 0].tolist()) == set(expected.tolist())


@pytest.mark.parametrize("score", [math.inf, math.nan])
def test_an_expert_whose_score_is_not_finite_is_named(score: float):
    experts = [[f"experts.{expert}.down_proj"] for expert in range(2)]
    inputs = {name: InputStats.empty(4) for (name,) in experts}
    for x in inputs.values():
        x.count = 1
    outputs = {name: TokenSum(torch.tensor(score).double(), 1) for name in inputs}
    stats = BlockStats(inputs, {name: [name] for name in inputs}, [], outputs=outputs)
    with pytest.raises(UserError, match=r"experts.0.*: the score of its unit is not finite"):
        choose_units({"experts": Units(2, 1, members=experts)}, [stats], methods()["reap"])


def test_the_measured_block_goes_and_others_are_renumbered(study: Make):
    made = study(pattern="blocks", sparsity=0.25, recipe="magnitude", calibration__statistics="gram")
    prune(fetch(made, "model", "calibration"))
    pruned = Checkpoint(made.model("pruned"))
    (gone,) = read_choices(made.blocks)[0].removed
    assert pruned.config.num_hidden_layers == 3
    assert load_json(made.metrics("pruned", "sparsity"))["sparsity"] == 0.25
    model = AutoModelForCausalLM.from_pretrained(made.model("dense")).eval()
    windows = draw_calibration(made).tokens
    small = AutoModelForCausalLM.from_pretrained(made.model("pruned")).eval()
    del model.model.layers[gone]
    with torch.no_grad():
        assert torch.equal(model(input_ids=windows, use_cache=False).logits, small(input_ids=windows).logits)
    assert small.generate(windows[:1, :8], max_new_tokens=3).shape[1] > 8


@pytest.mark.parametrize(
    ("pattern", "sparsity", "removed"),
    [
        ("neurons", 0.001, "none of the neurons of each MLP"),
        ("heads", 0.2, "none of the groups of attention heads .*"),
        ("unstructured", 1e-9, "no weight"),
    ],
)
def test_a_sparsity_that_removes_none_is_refused(pattern: str, sparsity: float, removed: str, calibrated_study: Make):
    with pytest.raises(UserError, match=f"sparsity: got {sparsity}, which removes {removed}; set a higher sparsity"):
        mask(study=calibrated_study(pattern=pattern, sparsity=sparsity))
