"""`CompactAdamW` takes AdamW's steps in 5 bytes a parameter, and the loss in slices is the loss of all logits."""

import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases.grids import short
from families import ALL
from short_training import CPU, LOW, pair, train, windows
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from wanda_dvc.engine.memory import VALUES_OF_SCALE, ModelSizes
from wanda_dvc.errors import UserError
from wanda_dvc.stages import needs
from wanda_dvc.stages.needs import TRAINING_WAYS, training_memory
from wanda_dvc.training import compact, trainer
from wanda_dvc.training.compact import CompactAdamW, decode, encode, join, split


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_weight_has_24_bits_and_the_model_reads_its_nearest_in_bfloat16():
    values = torch.cat([random(10_000) * 10.0 ** torch.arange(-30, 30).repeat(167)[:10_000], torch.tensor([0.0, -1.0])])
    rounded, next_bits = split(values)
    nearest = (values - values.bfloat16().float()).abs()
    assert (values - rounded.float()).abs().le(nearest + values.abs() * 2.0**-15).all()
    assert (values - join(rounded, next_bits)).abs().le(values.abs() * 2.0**-16).all()
    again = split(join(rounded, next_bits))
    assert torch.equal(again[0], rounded)
    assert torch.equal(again[1], next_bits)
    assert split(values.bfloat16().float())[1].count_nonzero() == 0
    assert rounded[-2] == 0 == next_bits[-2]


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_codes_are_right_on_average_and_no_value_becomes_zero(dtype: torch.dtype):
    values = random(4, VALUES_OF_SCALE) ** 3
    values = values if dtype is torch.int8 else values.abs()
    values[:, ::2] = 0
    values[1] *= 1e-12
    values[2] = 0
    codes, scales = torch.empty(values.shape, dtype=dtype), torch.empty(4, 1)
    generator, draws = torch.Generator().manual_seed(0), []
    for _ in range(400):
        encode(values, codes, scales, generator)
        draws.append(decode(codes, scales))
        assert torch.equal(draws[-1] == 0, values == 0)
        assert torch.equal(scales, values.abs().amax(1, keepdim=True))
    mean, large = torch.stack(draws).mean(0), values.abs() > 1e-3 * scales
    assert ((mean - values).abs() < 0.03 * values.abs())[large].all()  # five standard errors; the codes are 20 % apart
    assert ((draws[0] - values).abs() < 0.25 * values.abs())[large].all()


def test_the_steps_are_those_of_adamw():
    """Against torch's on float32 weights and states, with noisy gradients of one problem. Rounding would lose them."""
    start, target = random(300, 5), random(300, 5, seed=1)
    start[::2] = 0
    start = start.bfloat16().float()
    models = [nn.ParameterList([start.clone()]), nn.ParameterList([start.bfloat16()])]
    rate = 1e-3
    exact = torch.optim.AdamW(models[0].parameters(), lr=rate, weight_decay=0.0)
    small = CompactAdamW([{"params": [models[1][0]], "lr": rate}])
    for step in range(300):
        for model in models:
            noise = random(300, 5, seed=step) * 3
            loss = ((model[0].float() - target) * (target + noise)).sum() + ((model[0].float() - target) ** 2).sum()
            loss.backward()
            if model is models[0]:
                model[0].grad.mul_(model[0] != 0)
        exact.step()
        exact.zero_grad()
        small.step()
        assert models[1][0].grad is None  # each gradient is freed before the next
        if step in (2, 299):  # the moments begin at 0: the first steps are those of their corrections
            weight = join(models[1][0].detach().reshape(-1), small.state[models[1][0]]["next_bits"].view(-1)[:1500])
            moved, distance = (models[0][0] - start).norm(), (weight.view(300, 5) - models[0][0]).norm()
            assert moved > step * rate * 0.1 * 750**0.5
            assert distance < 0.05 * moved
    assert torch.equal(models[1][0] == 0, start == 0)


def test_a_second_moment_follows_its_average():
    """Each step moves it by a thousandth, and its codes are 2 to 5 % apart."""
    weight = nn.Parameter(torch.ones(4, 256, dtype=torch.bfloat16))
    optimizer = CompactAdamW([{"params": [weight], "lr": 0.0}])
    sizes = torch.linspace(0.1, 1, 1024).view(4, 256).bfloat16()
    for step in range(1000):
        (weight * sizes * (1 if step < 500 else 0.5)).sum().backward()
    state = optimizer.state[weight]
    square = decode(state["square"], state["square_scale"])
    expected = (1 - 0.999**500) * 0.999**500 + 0.25 * (1 - 0.999**500)
    assert (square / sizes.float() ** 2).mean().item() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("family", short(ALL, "stablelm"))
def test_the_loss_in_slices_is_that_of_all_logits(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    dense, pruned = (trainer.load_for_training(folder, torch.float32, CPU) for folder in pair(tmp_path, family=family))
    tokens = windows(2)
    trainer.mean_divergence(dense(input_ids=tokens).logits.detach(), pruned(input_ids=tokens).logits).backward()
    expected = {name: parameter.grad for name, parameter in pruned.named_parameters()}
    pruned.zero_grad()
    vocabulary = pruned.get_output_embeddings().weight.shape[0]
    monkeypatch.setattr(trainer, "LOGITS_OF_SLICE", 5 * vocabulary)
    loss = trainer.sliced_divergence(dense, pruned, tokens)
    loss.backward()
    with torch.no_grad():
        whole = trainer.mean_divergence(dense(input_ids=tokens).logits, pruned(input_ids=tokens).logits)
    torch.testing.assert_close(loss.detach(), whole, rtol=1e-5, atol=1e-7)
    for name, parameter in pruned.named_parameters():
        if expected[name] is not None:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5)
    shutil.rmtree(tmp_path)


class Allocated(TorchDispatchMode):
    """The most bytes of tensors that exist at one time, and the most elements of one that an operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}  # by storage
        self.bytes = self.peak = self.largest = 0

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and tensor.device == CPU:
                self.largest = max(self.largest, tensor.numel())
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    self.bytes += storage.nbytes()
                    weakref.finalize(storage, self.free, storage._cdata)
        self.peak = max(self.peak, self.bytes)
        return result

    def free(self, storage: int) -> None:
        self.bytes -= self.sizes.pop(storage)


def test_no_operation_has_the_logits_of_all_positions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    dense, pruned = (trainer.load_for_training(one, torch.float32, CPU) for one in pair(tmp_path, vocab_size=4096))
    monkeypatch.setattr(trainer, "LOGITS_OF_SLICE", 8 * 4096)
    with Allocated() as allocated:
        trainer.sliced_divergence(dense, pruned, windows(4, length=64)).backward()
    assert allocated.largest <= max(8 * 4096, *(parameter.numel() for parameter in pruned.parameters()))


def test_a_head_that_does_not_read_the_decoder_is_refused(tmp_path: Path):
    model = trainer.load_for_training(pair(tmp_path)[0], torch.float32, CPU)
    outputs = model.get_decoder()(input_ids=windows(1))
    model.get_decoder = torch.nn.Identity  # as where the model's class calls another module
    with pytest.raises(UserError, match="llama cannot be trained with little memory: its head does not read"):
        trainer.logits_after(model, outputs)


@pytest.mark.parametrize("tied", [True, False])
def test_the_formula_is_the_memory(tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shape: dict[str, Any] = {"vocab_size": 8192, "hidden_size": 256, "intermediate_size": 512}
    dense, pruned = pair(tmp_path, **shape, tie_word_embeddings=tied, dtype=torch.bfloat16)
    for module in (trainer, needs):
        monkeypatch.setattr(module, "LOGITS_OF_SLICE", 2**18)
    monkeypatch.setitem(compact.UPDATED_AT_A_TIME, "cpu", 2**16)
    settings = SimpleNamespace(calibration=SimpleNamespace(length=32), recovery=SimpleNamespace(batch=2, tokens=0))
    wanted: Any = SimpleNamespace(params=settings, sizes=ModelSizes.read(dense), dtype="bfloat16", device="cpu")
    with Allocated() as allocated:
        train(dense, pruned, tmp_path / "work", steps=2, windows=windows(4, length=32), **LOW)
    formula = training_memory(wanted, TRAINING_WAYS[-1])
    assert allocated.peak == pytest.approx(formula, rel=0.1)
