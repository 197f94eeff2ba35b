"""Products through oneDNN are torch's but for last digits, with the same gradients, whatever lies where in memory."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import Patch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from wanda_dvc import kernels as products
from wanda_dvc.engine.decoder import Decoder
from wanda_dvc.engine.divergence import measure_windows
from wanda_dvc.engine.forward import ModelRunner

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN here")


@pytest.fixture(autouse=True)
def forced(monkeypatch: Patch) -> None:
    """On every CPU, and for the smallest matrices."""
    monkeypatch.setattr(products, "is_faster", lambda: True)
    monkeypatch.setattr(products, "SMALLEST_WEIGHT", 0)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def layouts(rows: int, columns: int) -> Iterator[Tensor]:
    """A matrix in each way to lie in memory: by rows, by columns, and parts of larger ones."""
    yield drawn(rows, columns)
    yield drawn(columns, rows).T
    yield drawn(rows, columns + 3)[:, :columns]
    yield drawn(rows, columns + 3)[:, 2:-1]
    yield drawn(columns, 2 * rows)[:, ::2].T
    yield drawn(1, columns).expand(rows, columns)


@pytest.mark.parametrize(("m", "k", "n"), [(33, 64, 130), (1, 1, 1), (5, 7, 3), (64, 1, 17)])
def test_products_are_those_of_torch_in_every_layout(m: int, k: int, n: int):
    for a, b in itertools.product(layouts(m, k), layouts(k, n)):
        torch.testing.assert_close(products.multiply(a, b), a @ b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(4, 5, 6), (6,), (1, 6), (0, 6)])
def test_a_linear_and_its_gradients_are_those_of_torch(shape: tuple[int, ...], bias: bool):
    stock = nn.Linear(6, 9, bias=bias)
    model = nn.Sequential(nn.Linear(6, 9, bias=bias), nn.Conv1d(1, 1, 1))
    products.install(model)
    ours = model[0]
    assert type(ours) is products.OneDnnLinear
    assert type(model[1]) is nn.Conv1d
    ours.load_state_dict(stock.state_dict())
    results = []
    for linear in (stock, ours):
        x = drawn(*shape).requires_grad_()
        out = linear(x)
        (out.square() * (1 + torch.arange(9))).sum().backward()
        with torch.no_grad():
            torch.testing.assert_close(linear(x), out, rtol=1e-5, atol=1e-5)
        results.append([out, x.grad, *(parameter.grad for parameter in linear.parameters())])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(expected, actual, rtol=1e-5, atol=1e-5)


def test_other_dtypes_are_left_to_torch():
    for dtype in (torch.float64, torch.bfloat16):
        a, b = drawn(4, 5).to(dtype), drawn(5, 6).to(dtype)
        assert torch.equal(products.multiply(a, b), a @ b)


def test_a_model_has_the_losses_of_its_own_forward_pass(tiny: Path, tmp_path: Path):
    windows = torch.randint(0, 256, (3, 150), generator=torch.Generator().manual_seed(0))
    run = ModelRunner(Decoder(tiny, dtype=torch.float32, device=torch.device("cpu")), tmp_path)
    for step in run.forward(windows):
        step.run()
    losses = [loss for loss, _ in run.map_outputs(measure_windows, lambda _: ())]
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    expected = [model(window[None], labels=window[None]).loss.item() for window in windows]
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("vendor", ["AuthenticAMD", "GenuineIntel"])
def test_the_choice_follows_from_the_cpus_kind(vendor: str, monkeypatch: Patch):
    monkeypatch.undo()
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: f"processor: 0\nvendor_id: {vendor}\n")
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert products.is_faster.__wrapped__() is (vendor == "AuthenticAMD")
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    assert not products.is_faster.__wrapped__()


def test_bits_do_not_depend_on_the_number_of_threads():
    threads = torch.get_num_threads()
    try:
        for m, k, n in ((500, 300, 700), (64, 2000, 100), (100, 64, 3000)):
            results = []
            for number in (1, 2, 3):
                torch.set_num_threads(number)
                results.append(products.multiply(drawn(m, k), drawn(k, n)))
            assert torch.equal(results[0], results[1])
            assert torch.equal(results[0], results[2])
    finally:
        torch.set_num_threads(threads)
