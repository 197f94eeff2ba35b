"""Pattern experts: the score of each expert on every mixture family, and the stages."""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases.grids import OF_WEIGHTS, short
from cases.models import tensors
from conftest import Make, walk
from families import EXPERTS, RECORDED, place, run, save
from torch import nn
from transformers import AutoModelForCausalLM

from wanda_dvc.catalog import RECIPES
from wanda_dvc.engine.checkpoint import Address, Checkpoint
from wanda_dvc.engine.decoder import Decoder
from wanda_dvc.engine.record import observing
from wanda_dvc.engine.structure import Linear, ParameterSlice
from wanda_dvc.errors import UserError
from wanda_dvc.pruning.scores import reap
from wanda_dvc.pruning.statistics import TokenSum
from wanda_dvc.results.card import card
from wanda_dvc.stages.mask import mask
from wanda_dvc.study.artifact import block_count, read_provenance
from wanda_dvc.study.files import load_json
from wanda_dvc.study.folder import Study
from wanda_dvc.study.tensors import read_masks, read_stats

TOKENS = torch.randint(3, 256, (2, 48), generator=torch.Generator().manual_seed(1))
Norms = dict[str, dict[int, list[float]]]  # by mixture and expert, of each token


def by_token(seen: Norms, name: str) -> Callable[..., None]:
    """A hook of transformers' modules of experts: each token through each of its experts, alone."""

    def hook(module: Any, args: tuple[torch.Tensor, ...], _: Any) -> None:
        for token, chosen, given in zip(*args, strict=True):
            for expert, gate in zip(chosen.tolist(), given.tolist(), strict=True):
                locked = module.forward(token[None], torch.tensor([[expert]]), torch.ones(1, 1))
                seen[name][expert].append(gate * locked.norm().item())

    return hook


def oracle(model: Any) -> Norms:
    """Collect gate · ‖output‖₂ of each routed token: hooks in the model as transformers runs it."""
    seen: Norms = defaultdict(lambda: defaultdict(list))
    for name, module in model.named_modules():
        if type(module).__name__.endswith("Experts") and hasattr(module, "down_proj"):
            module.register_forward_hook(by_token(seen, name))
    with torch.no_grad():
        for row in TOKENS:
            model(input_ids=row[None])
    return seen


def recorded(folder: Path, work: Path, implementation: str) -> dict[str, TokenSum]:
    decoder = Decoder(folder, dtype=torch.float32, device=torch.device("cpu"))
    decoder.model.set_experts_implementation(implementation)
    return {name: x for step in walk(decoder, TOKENS, work) for name, x in step.record().stats.outputs.items()}


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
@pytest.mark.parametrize(
    "family", short((name for name in EXPERTS if name in RECORDED and name != "jetmoe"), "gpt_oss")
)
def test_the_sums_are_those_of_an_oracle_that_sees_the_whole_model(family: str, implementation: str, tmp_path: Path):
    folder = save(family, tmp_path / "model", **EXPERTS[family])
    tensors(lambda x: [values.normal_() for name, values in x.items() if name.endswith("down_proj_bias")])(folder)
    found = recorded(folder, tmp_path / "work", implementation)
    wanted = oracle(AutoModelForCausalLM.from_pretrained(folder).eval())
    assert sum(len(experts) for experts in wanted.values()) == len(found) > 0
    by_place = {place(name): experts for name, experts in wanted.items()}
    for linear, stats in found.items():
        own = by_place[place(linear)][int(linear.split(".")[-2])]
        assert stats.count == len(own)
        assert stats.sum.item() == pytest.approx(sum(own), rel=1e-4)


# --- stages ---


@pytest.fixture
def mixture(study: Make, tmp_path: Path) -> Make:
    def make(family: str = "qwen2_moe", **changes: Any) -> Study:
        model = save(family, tmp_path / "dense", **EXPERTS[family])
        made = study(model=model, pattern="experts", sparsity=0.25, **changes)
        run(made, "download model", "download calibration", "calibrate")
        return made

    return make


def experts_left(masks: dict[str, torch.Tensor]) -> dict[tuple[str, ...], set[int]]:
    left: dict[tuple[str, ...], set[int]] = defaultdict(set)
    for name, keep in masks.items():
        if "experts" in name and "shared" not in name:
            owner, expert, leaf = name.rsplit(".", 2)
            assert keep.all() or not keep.any()
            left[owner, leaf] |= {int(expert)} if keep.any() else set()
        else:
            assert keep.all()
    return left


def test_the_lowest_scores_go_and_apply_writes_the_smaller_model(mixture: Make):
    made = mixture()
    said = run(made, "plan", "mask", "apply")
    assert "num_experts from 8 to 6" in said
    assert "method wanda ignored (recipe wanda)" in said
    dense, pruned = (Checkpoint(made.model(model)) for model in ("dense", "pruned"))
    assert (pruned.config.num_experts, pruned.config.shared_expert_intermediate_size) == (6, 24)
    params = read_provenance(made.masks, "mask")
    assert (params["params"]["method"], params["config"]) == ("reap", {"num_experts": 6})
    for block in range(3):
        stats, masks = read_stats(made.norms, block), read_masks(made.masks, block)
        left = experts_left(dict(masks))
        (stay,) = {tuple(sorted(x)) for x in left.values()}
        scores = []
        for expert in range(8):
            outputs = stats.outputs.get(f"model.layers.{block}.mlp.experts.{expert}.down_proj")
            scores.append(outputs.sum.item() / outputs.count if outputs else 0)  # none if no token reached it
        wanted = sorted(sorted(range(8), key=scores.__getitem__)[2:])
        assert list(stay) == wanted
        router = f"model.layers.{block}.mlp.gate"
        assert torch.equal(pruned.weight(router), dense.weight(router)[wanted])
        for new, old in enumerate(wanted):
            one, other = (f"model.layers.{block}.mlp.experts.{x}.down_proj" for x in (new, old))
            assert torch.equal(pruned.weight(one), dense.weight(other))
    found = load_json(made.metrics("pruned", "sparsity"))
    assert found == {"sparsity": 0.25, "removed_parameters": round(1 - pruned.parameters / dense.parameters, 6)}
    model = AutoModelForCausalLM.from_pretrained(made.model("pruned"))
    assert model.generate(TOKENS[:1, :8], max_new_tokens=3, do_sample=False, pad_token_id=0).shape[1] > 8
    assert "routed experts of each block were removed" in card(made, load_json(made.metrics("pruned", "sparsity")))


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral", "granitemoe", "deepseek_v3"])
def test_stages_on_other_ways_to_store_experts(family: str, mixture: Make):
    made = mixture(family)
    run(made, "mask", "apply")
    assert load_json(made.metrics("pruned", "sparsity"))["sparsity"] == 0.25
    model = AutoModelForCausalLM.from_pretrained(made.model("pruned"))
    with torch.no_grad():
        assert model(input_ids=TOKENS).logits.isfinite().all()


class Experts(nn.Module):
    """Two experts, as transformers' `eager` calls them; `order` sorts the tokens of each."""

    def __init__(self, order: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = (nn.Parameter(torch.randn(2, 4, 4)) for _ in range(2))
        self.order = order

    def forward(self, hidden: torch.Tensor, experts: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        result = torch.zeros_like(hidden)
        for expert in range(2):
            tokens = self.order((experts == expert).any(dim=1).nonzero()[:, 0])
            inner = nn.functional.linear(hidden[tokens], self.gate_up_proj[expert]).relu()
            outputs = nn.functional.linear(inner, self.down_proj[expert])
            result.index_add_(0, tokens, outputs * gates[tokens])
        return result


@pytest.mark.parametrize("is_known", [True, False])
def test_gates_are_those_of_the_tokens_or_none_are_recorded(is_known: bool):
    """In an unknown order of tokens, another token's gate would multiply an output: no norm is better than that."""
    torch.manual_seed(0)
    module = Experts(lambda tokens: tokens if is_known else tokens.flip(0))
    hidden, experts, gates = torch.randn(6, 4), torch.tensor([[0], [1], [0], [0], [1], [0]]), torch.rand(6, 1)
    linears = {
        f"{expert}.{leaf}": Linear(module, leaf, ParameterSlice(Address(leaf, expert), expert=expert))
        for leaf in ("gate_up_proj", "down_proj")
        for expert in range(2)
    }
    norms: dict[str, torch.Tensor] = {}
    with torch.no_grad(), observing(linears, lambda *_: None, norms.__setitem__):
        module(hidden, experts, gates)
    assert norms.keys() == ({"0.down_proj", "1.down_proj"} if is_known else set())
    for expert in range(2 if is_known else 0):
        tokens = (experts[:, 0] == expert).nonzero()[:, 0]
        outputs = (hidden[tokens] @ module.gate_up_proj[expert].T).relu() @ module.down_proj[expert].T
        torch.testing.assert_close(norms[f"{expert}.down_proj"], outputs.norm(dim=1) * gates[tokens, 0])


def test_outputs_of_shards_merge():
    one, other = TokenSum(torch.tensor(2.0).double(), 3), TokenSum(torch.tensor(0.5).double(), 2)
    one.merge(other)
    assert (one.sum.item(), one.count, reap(one)) == (2.5, 5, 0.5)
    assert reap(TokenSum(torch.tensor(0.0).double(), 0)) == 0


def test_reap_ranks_experts_without_tokens(mixture: Make):
    made = mixture("deepseek_v3", calibration__windows=1, calibration__length=8)
    assert any(read_stats(made.norms, block).unreached() for block in range(block_count(made.norms, "calibrate")))
    mask(study=made)


def test_experts_with_another_signature_are_refused(mixture: Make):
    """JetMoE's experts get the number of tokens of each, and no gates."""
    made = mixture("jetmoe")
    with pytest.raises(UserError, match="recorded 0 gates for .*; set pattern=neurons or heads"):
        mask(study=made)


@pytest.mark.parametrize("recipe", short(RECIPES, "fisher"))
def test_recipes_use_reap(recipe: str, study: Make):
    plan = study(pattern="experts", sparsity=0.25, recipe=recipe).params.plan
    assert (plan.method.name, plan.reconstruction.name, plan.propagation) == ("reap", "none", "dense")
    assert plan.tier == "norms"


@pytest.mark.parametrize("method", OF_WEIGHTS)
@pytest.mark.parametrize("pattern", ["experts", "blocks"])
def test_a_method_that_scores_weights_scores_no_experts_and_no_blocks(pattern: str, method: str, study: Make):
    said = f"method: found {method} with pattern {pattern}, expected (reap|divergence) or another"
    with pytest.raises(UserError, match=said):
        study(pattern=pattern, method=method)
