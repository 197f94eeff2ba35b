"""The Fisher tier is that of the model's own gradients, for every family, and goes on where a killed run stopped."""

import contextlib
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from cases.grids import short
from conftest import Patch
from families import RECORDED, save
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from wanda_dvc.catalog import STRUCTURES
from wanda_dvc.engine import activations
from wanda_dvc.engine.backward import backward
from wanda_dvc.engine.decoder import Decoder
from wanda_dvc.engine.finders import find_input_units
from wanda_dvc.engine.forward import ModelRunner
from wanda_dvc.engine.record import GradientRecorder
from wanda_dvc.engine.sequences import TokenSequence
from wanda_dvc.engine.structure import Linear
from wanda_dvc.engine.sums import FisherSums
from wanda_dvc.errors import UserError
from wanda_dvc.pruning.masks import row_factors_of
from wanda_dvc.pruning.statistics import UnitCosts

CPU = torch.device("cpu")


def measured(decoder: Decoder, tokens: Tensor, work: Path) -> dict[str, Tensor]:
    return {name: x for _, found in backward(ModelRunner(decoder, work), tokens) for name, x in found.squares.items()}


def stock(folder: Path) -> nn.Module:
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model


def parameters(decoder: Decoder) -> dict[str, tuple[str, Linear]]:
    """By linear, the parameter's name in the model, and the linear."""
    names = {id(parameter): name for name, parameter in decoder.model.named_parameters()}
    return {
        name: (names[id(linear.module.get_parameter(linear.leaf))], linear)
        for index in range(len(decoder.blocks))
        for name, linear in decoder.linears(index).items()
    }


@pytest.mark.parametrize("family", short(RECORDED, "falcon"))
def test_they_are_the_squares_of_the_models_own_gradients(family: str, tmp_path: Path):
    """Of every linear that is a module, times the norm of its input, summed over tokens and windows."""
    folder = save(family, tmp_path / "model")
    tokens = torch.randint(3, 256, (3, 24), generator=torch.Generator().manual_seed(1))
    model, expected, products = stock(folder), dict[str, Tensor](), dict[str, Tensor]()

    def add(name: str, norms: Tensor, gradient: Tensor) -> None:
        scaled = gradient.double().flatten(0, -2) * norms.flatten(0, -2)
        expected[name] = expected.get(name, 0) + scaled.square().sum(dim=0)
        products[name] = products.get(name, 0) + scaled.T @ scaled

    def see(name: str, _: nn.Module, args: tuple[object, ...], out: object) -> None:
        if isinstance(out, Tensor) and out.requires_grad and args and isinstance(args[0], Tensor) and args[0].dim() > 1:
            out.register_hook(partial(add, name, args[0].detach().double().norm(dim=-1, keepdim=True)))

    for name, module in model.named_modules():
        module.register_forward_hook(partial(see, name))
    for row in tokens:
        nn.functional.cross_entropy(model(input_ids=row[None]).logits[0, :-1], row[1:], reduction="sum").backward()
    decoder, checked = Decoder(folder, dtype=torch.float32, device=CPU), 0
    blocks = [block for _, block in backward(ModelRunner(decoder, tmp_path / "work"), tokens)]
    sums_of = {name: sums for block in blocks for name, sums in block.squares.items()}
    grams = {name: gram.matrix() for block in blocks for name, gram in block.grams.items()}
    for name, gram in grams.items():  # of experts and of parts of a weight too
        torch.testing.assert_close(gram.diagonal().double(), sums_of[name], rtol=1e-5, atol=0)
    assert grams.keys() == sums_of.keys()
    for name, (parameter, linear) in parameters(decoder).items():
        if linear.slice.is_complete and parameter.endswith(".weight") and linear.slice.expert is None:
            wanted = expected[parameter.removesuffix(".weight")]
            torch.testing.assert_close(sums_of[name], wanted, rtol=1e-3, atol=1e-6 * wanted.max().item())
            product = products[parameter.removesuffix(".weight")].float()
            torch.testing.assert_close(grams[name], product, rtol=1e-3, atol=1e-5 * wanted.max().item())
            checked += 1
    assert checked >= len(decoder.blocks)


def squared_derivatives(model: nn.Module, tokens: Tensor, heads: int) -> dict[tuple[str, int], Tensor]:
    """Σ over tokens of (∂ℓ/∂m)², by linear and number of units; m = 1 is a factor on a unit's inputs at one token."""
    factors: dict[tuple[str, int], Tensor] = {}
    totals: dict[tuple[str, int], Tensor] = {}

    def multiply(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0]
        for units in {x.shape[-1], heads}:
            if x.shape[-1] % units == 0:
                factors[name, units] = torch.ones(*x.shape[:-1], units, requires_grad=True)
                x = x * factors[name, units].repeat_interleave(x.shape[-1] // units, dim=-1)
        return (x, *args[1:])

    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            module.register_forward_pre_hook(partial(multiply, name))
    for row in tokens:
        nn.functional.cross_entropy(model(input_ids=row[None]).logits[0, :-1], row[1:], reduction="sum").backward()
        for key, factor in factors.items():
            if factor.grad is not None:
                totals[key] = totals.get(key, 0) + factor.grad.double().flatten(0, -2).square().sum(dim=0)
        factors.clear()
    return totals


def consumers_of_units(decoder: Decoder) -> set[str]:
    """The linears that read neurons or heads."""
    consumers = set[str]()
    for pattern in ("neurons", "heads"):
        with contextlib.suppress(UserError):  # a family without them
            consumers |= find_input_units(decoder.checkpoint, STRUCTURES[pattern], Fraction(1, 2), CPU).consumers.keys()
    return consumers


@pytest.mark.parametrize("family", short(RECORDED, "falcon"))
def test_a_unit_costs_the_squared_derivative_of_the_loss_by_a_factor_on_it(family: str, tmp_path: Path):
    folder = save(family, tmp_path / "model")
    decoder = Decoder(folder, dtype=torch.float32, device=CPU)
    tokens = torch.randint(3, 256, (2, 12), generator=torch.Generator().manual_seed(1))
    heads = getattr(decoder.model.config.get_text_config(), "num_key_value_heads", None) or 1
    expected, consumers = squared_derivatives(stock(folder), tokens, heads), consumers_of_units(decoder)
    costs: dict[str, UnitCosts] = {}
    for _, sums in backward(ModelRunner(decoder, tmp_path / "work"), tokens):
        costs |= sums.unit_costs
    of_modules = {  # without experts, which are no modules
        name: parameter.removesuffix(".weight")
        for name, (parameter, linear) in parameters(decoder).items()
        if name in consumers and linear.slice.expert is None
    }
    for name, module in of_modules.items():
        for units, of_units in costs[name].items():
            wanted = expected[module, units]
            torch.testing.assert_close(of_units, wanted, rtol=1e-3, atol=1e-6 * wanted.max().item())
    assert costs.keys() >= of_modules.keys()


@pytest.mark.parametrize("family", short(RECORDED, "falcon"))
def test_a_row_has_the_squares_of_its_weights_gradients(family: str, tmp_path: Path):
    """Of two tokens only the first predicts, so every weight's gradient is g xᵀ; experts' and fused weights' too."""
    folder = save(family, tmp_path / "model")
    decoder, model, tokens = Decoder(folder, dtype=torch.float32, device=CPU), stock(folder), torch.tensor([[17, 101]])
    found = measured(decoder, tokens, tmp_path / "work")
    nn.functional.cross_entropy(model(input_ids=tokens).logits[0, :1], tokens[0, 1:]).backward()
    gradients, unreached = {name: parameter.grad for name, parameter in model.named_parameters()}, 0
    largest = max(x.max().item() for x in found.values())
    assert all(x.any() for x in found.values())  # what only the last token reaches, which predicts nothing, has none
    for name, (parameter, linear) in parameters(decoder).items():
        gradient = gradients[parameter]
        part = torch.zeros(1, 1) if gradient is None else linear.slice.of(gradient)
        squares = part.square().sum(dim=0 if linear.transposed else 1)
        ours = found.get(name, torch.zeros(1)).float()
        if ours.max() <= 1e-9 * largest:  # an expert without tokens; and one token's attention is 1 whatever it asks
            assert squares.max() <= 1e-6 * largest
            unreached += 1
        else:
            torch.testing.assert_close(ours, squares, rtol=1e-3, atol=1e-5 * squares.max().item())
    assert unreached < len(parameters(decoder))


def test_tokens_count_however_they_are_batched(llama: Callable[[], Decoder]):
    """One of two windows has no gradient. On a GPU both are one batch. A linear without any gradient is missing."""
    decoder = llama()
    decoder.load(0, -1)
    name, linear = next((name, x) for name, x in decoder.linears(0).items() if name.endswith("down_proj"))
    random = torch.Generator().manual_seed(0)
    inputs, gradients = torch.randn(2, 5, linear.features, generator=random), torch.randn(2, 5, 1, generator=random)
    gradients[1] = 0

    def sums_of(*batches: list[int]) -> FisherSums:
        recorder = GradientRecorder({name: linear})
        with recorder.recording():
            for windows in batches:
                x = inputs[windows].requires_grad_()
                y = linear.module(x)
                torch.autograd.grad(y, x, gradients[windows].expand_as(y))
        return recorder.result()

    together, apart = sums_of([0, 1]), sums_of([0], [1])
    torch.testing.assert_close(together.squares, apart.squares)
    torch.testing.assert_close(together.grams[name].matrix(), apart.grams[name].matrix())
    assert sums_of([1]) == FisherSums()


def test_a_model_of_one_block_goes_back_too(tmp_path: Path):
    decoder = Decoder(save("llama", tmp_path / "model", num_hidden_layers=1), dtype=torch.float32, device=CPU)
    ((index, found),) = backward(ModelRunner(decoder, tmp_path / "work"), torch.tensor([[17, 101, 5]]))
    assert index == 0
    assert found.squares


def test_each_pass_reads_a_blocks_weights_once(llama: Callable[[], Decoder], tmp_path: Path):
    decoder = llama()
    rows = [TokenSequence(torch.tensor([17, 101, 5]))] * 2  # a shard each
    with mock.patch.object(decoder.loader, "read_block", wraps=decoder.loader.read_block) as read:
        list(backward(ModelRunner(decoder, tmp_path / "work"), rows))
    assert sorted(call.args[0] for call in read.call_args_list) == [0, 0, 1, 1, 2, 2]


@pytest.fixture
def llama(tmp_path: Path) -> Callable[[], Decoder]:
    folder = save("llama", tmp_path / "model")
    return lambda: Decoder(folder, dtype=torch.float32, device=CPU)


@pytest.mark.parametrize(("taken", "kept", "left"), [(0, 0, 3), (1, 0, 3), (3, 2, 1), (3, 1, 3)])
def test_a_killed_run_goes_on_after_the_last_block_that_was_kept(
    llama: Callable[[], Decoder], tmp_path: Path, taken: int, kept: int, left: int, monkeypatch: Patch
):
    """The last one that it gave may not have been written. Where the caller has lost more, all come back anew."""
    rows = [TokenSequence(x) for x in torch.randint(3, 256, (2, 24), generator=torch.Generator().manual_seed(1))]
    expected = list(backward(ModelRunner(llama(), tmp_path / "whole"), rows))
    killed = backward(ModelRunner(llama(), tmp_path / "work"), rows)
    found = [next(killed) for _ in range(taken)]
    del killed
    decoder = llama()
    if taken:  # nothing goes forward again
        monkeypatch.setattr(decoder, "embed", None)
    again = list(backward(ModelRunner(decoder, tmp_path / "work"), rows, finished=kept))
    assert len(again) == left
    alike(found[: 3 - left] + again, expected)
    damaged = tmp_path / "work/own/0001-0000.bin"  # the backward pass reads it
    damaged.write_bytes(bytes(damaged.stat().st_size))  # by a power cut, after which the machine starts again
    monkeypatch.setattr(activations, "BOOT_ID", "another")
    alike(list(backward(ModelRunner(llama(), tmp_path / "work"), rows)), expected)


def alike(found: list[tuple[int, FisherSums]], expected: list[tuple[int, FisherSums]]) -> None:
    assert [index for index, _ in found] == [index for index, _ in expected] == [2, 1, 0]
    for (_, ours), (_, wanted) in zip(found, expected, strict=True):
        assert ours.squares.keys() == wanted.squares.keys() == ours.grams.keys() == wanted.grams.keys()
        assert all(torch.equal(ours.squares[name], wanted.squares[name]) for name in wanted.squares)
        assert all(torch.equal(ours.grams[name].upper, wanted.grams[name].upper) for name in wanted.squares)


def test_gradients_that_are_not_finite_are_refused(llama: Callable[[], Decoder], tmp_path: Path):
    decoder = llama()
    product = decoder.loss_gradient
    decoder.loss_gradient = lambda *words: product(*words) * torch.inf  # type: ignore[method-assign]
    tokens = torch.randint(3, 256, (1, 8), generator=torch.Generator().manual_seed(1))
    with pytest.raises(UserError, match=r"block 2, output of model.layers.2.*gradients that are not finite"):
        measured(decoder, tokens, tmp_path / "work")


def test_a_rows_worth_has_no_unit():
    fisher = torch.rand(50, dtype=torch.float64) + 0.1
    factors = row_factors_of(fisher)
    torch.testing.assert_close(factors, row_factors_of(1e-30 * fisher))
    torch.testing.assert_close(factors / factors[0], ((fisher / fisher[0]) ** 0.25).float())
    assert row_factors_of(torch.zeros(3, dtype=torch.float64)).tolist() == [1, 1, 1]  # a linear without influence
