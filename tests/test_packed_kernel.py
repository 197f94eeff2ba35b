"""The kernels of packed weights: right on every path, for every shape, and never a byte past the end."""

import ctypes
import mmap
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from test_packed import pack_linear, packed, same, sparse
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from wanda_dvc.errors import UserError
from wanda_dvc.packed import kernel as packed_kernel
from wanda_dvc.packed.format import pack
from wanda_dvc.packed.kernel import CHOICE, MULTIPLIED, PATHS, expand, kernel, multiply, row_starts
from wanda_dvc.packed.linear import FEW, PackedLinear

SHAPES = [(1, 1), (7, 19), (8, 8), (9, 33), (16, 512), (17, 1000), (40, 1031)]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Each test may choose a path of its own."""
    kernel.cache_clear()
    yield
    kernel.cache_clear()


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A path that this CPU has, taken by all that follows."""
    best = kernel()
    assert best is not None
    if PATHS.index(request.param) > best.path:
        pytest.skip("not on this CPU")
    monkeypatch.setenv(CHOICE, request.param)
    kernel.cache_clear()
    return request.param


def product(weight: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    values, bits = pack(weight)
    starts = row_starts(bits)
    assert starts is not None
    return multiply(x, values, bits, starts, bias)


def expanded(weight: Tensor) -> Tensor:
    values, bits = pack(weight)
    starts, out = row_starts(bits), torch.full_like(weight, 7)
    assert starts is not None
    expand(values, bits, starts, out)
    return out


# --- the numbers ---


def weights(rows: int, columns: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """A weight like any other; with empty and full rows and −0.0; all zero; all there."""
    draw = torch.Generator().manual_seed(rows + columns)
    full = torch.randn(rows, columns, generator=draw).to(dtype)
    some = full.clone()
    some[torch.rand(rows, columns, generator=draw) < 0.6] = 0
    odd = some.clone()
    odd[::3], odd[1::3] = 0, full[1::3]
    odd[:, -1] = -0.0
    yield from (some, odd, torch.zeros_like(full), full)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", MULTIPLIED, ids=str)
def test_it_multiplies(path: str, dtype: torch.dtype, shape: tuple[int, int]):
    """The result is float64's, rounded once, but for what a sum in float32 loses."""
    for weight in weights(*shape, dtype):
        for vectors in (*range(1, FEW + 1), 2 * FEW + 1):
            x = torch.randn(vectors, shape[1], generator=torch.Generator().manual_seed(vectors)).to(dtype)
            for bias in (None, torch.linspace(-1, 1, shape[0]).to(dtype)):
                want = nn.functional.linear(x.double(), weight.double(), bias if bias is None else bias.double())
                found = product(weight, x, bias)
                assert (found.dtype, found.shape) == (dtype, want.shape)
                rounding = torch.finfo(dtype).eps / 2 * want.abs()
                summing = 1e-6 * (x.double().abs() @ weight.double().abs().T + 1)
                assert ((found.double() - want).abs() <= rounding + summing).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_it_expands_bit_by_bit(path: str, dtype: torch.dtype, shape: tuple[int, int]):
    for share in (0, 0.5, 1):
        assert same(expanded(weight := sparse(*shape, dtype, share, 0)), weight)


@pytest.mark.parametrize("dtype", MULTIPLIED, ids=str)
def test_threads_change_no_bit(path: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    weight, x = sparse(500, 100, dtype, 0.5, 0).nan_to_num_(0, 0, 0), torch.randn(3, 100).to(dtype)
    found = {}
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found[threads] = product(weight, x)
        assert same(expanded(weight), weight)
    assert same(found[1], found[3])


@pytest.mark.parametrize("dtype", MULTIPLIED, ids=str)
def test_numbers_that_are_not_finite_stay_in_their_row(path: str, dtype: torch.dtype):
    weight = torch.eye(9, 40, dtype=dtype)
    weight[2, 2], weight[4, 4] = torch.nan, torch.inf
    assert product(weight, torch.ones(1, 40, dtype=dtype))[0].tolist() == [
        1, 1, pytest.approx(torch.nan, nan_ok=True), 1, torch.inf, 1, 1, 1, 1
    ]  # fmt: skip
    # 0 × inf is NaN on the vector paths, as in a dense product; the generic path has only the nonzeros, so inf.
    infinite = product(torch.eye(2, 40, dtype=dtype), torch.full((1, 40), torch.inf, dtype=dtype))
    assert (infinite.isinf() if path == "generic" else infinite.isnan()).all()


def at_the_end(tensor: Tensor) -> Tensor:
    """Copy a tensor to the end of a page, after which no byte may be read."""
    page = mmap.PAGESIZE
    room = -(-max(tensor.nbytes, 1) // page) * page
    memory = mmap.mmap(-1, room + page)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(base + room), ctypes.c_size_t(page), 0) == 0
    copy = torch.from_numpy(np.frombuffer(memory, np.uint8, tensor.nbytes, room - tensor.nbytes))
    return copy.copy_(tensor.contiguous().view(-1).view(torch.uint8)).view(tensor.dtype).view(tensor.shape)


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", MULTIPLIED, ids=str)
def test_no_byte_past_the_end_is_read(path: str, dtype: torch.dtype, shape: tuple[int, int]):
    """Where one is, the process ends here."""
    for share in (0.2, 0.8):
        weight = sparse(*shape, dtype, share, 1).nan_to_num_(0, 0, 0)
        values, bits = (at_the_end(tensor) for tensor in pack(weight))
        starts, x, out = row_starts(bits), at_the_end(torch.randn(FEW, shape[1]).to(dtype)), torch.empty_like(weight)
        assert starts is not None
        for vectors in (1, FEW):
            multiply(x[-vectors:], values, bits, starts, None)
        expand(values, bits, starts, out)
        assert same(out, weight)


# --- as torch's operators ---


@pytest.mark.parametrize("bias", [None, torch.ones(7)], ids=["no bias", "bias"])
def test_torch_knows_what_they_return(bias: Tensor | None):
    values, bits = pack(sparse(7, 19, torch.float32, 0.5, 0))
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(multiply, (torch.randn(2, 19), values, bits, row_starts(bits), bias), test_utils=checks)
    torch.library.opcheck(expand, (values, bits, row_starts(bits), torch.empty(7, 19)), test_utils=checks)


@pytest.mark.parametrize("shape", [(19,), (1, 19), (2, 3, 19), (FEW + 1, 19), (0, 19)], ids=str)
def test_a_packed_linear_takes_any_number_of_tokens(path: str, shape: tuple[int, ...]):
    linear, other, x = nn.Linear(19, 7), nn.Linear(19, 7), torch.randn(shape)
    with torch.no_grad():
        linear.weight[0], other.weight[-1] = 0, 0  # as many nonzeros, in other rows
        small = pack_linear(linear)
        torch.testing.assert_close(small(x), linear(x))
        small.load_state_dict(pack_linear(other).state_dict())
        torch.testing.assert_close(small(x), other(x))


# --- where the library comes from ---


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(5)[None]).logits


Break = Callable[[pytest.MonkeyPatch, Path], object]
BROKEN: dict[str, tuple[Break, str]] = {
    "no compiler": (lambda env, _: env.setenv("CC", "no-such-compiler"), "install gcc or clang, or set CC"),
    "no program": (lambda env, _: env.setenv("CC", "false"), "exit status 1"),
    "an error": (lambda env, at: env.setattr(packed_kernel, "SOURCE", at), "no_such_type"),
    "switched off": (lambda env, _: env.setenv(CHOICE, "off"), ""),
}


@pytest.mark.parametrize(("broken", "said"), BROKEN.values(), ids=BROKEN)
def test_without_a_kernel_a_model_is_dense_once_it_is_loaded(
    broken: Break, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    source, target = packed(tmp_path)
    (tmp_path / "wrong.c").write_text("no_such_type x;\n")
    broken(monkeypatch, tmp_path / "wrong.c")
    model = AutoModelForCausalLM.from_pretrained(target)
    lines = [line for line in capsys.readouterr().err.splitlines() if "packed weights" in line]
    assert len(lines) == bool(said)
    assert said in "".join(lines)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    assert same(logits(model), logits(AutoModelForCausalLM.from_pretrained(source)))
    model.save_pretrained(tmp_path / "saved")
    assert same(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), logits(model))
    linear = nn.Linear(19, 7)  # a packed linear by hand is expanded for each call
    torch.testing.assert_close(pack_linear(linear)(torch.ones(1, 19)), linear(torch.ones(1, 19)))


def test_a_model_with_a_kernel_is_the_dense_one(path: str, tmp_path: Path):
    source, target = packed(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(target)
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) > 0
    dense = logits(AutoModelForCausalLM.from_pretrained(source))
    torch.testing.assert_close(logits(model), dense, rtol=1e-4, atol=1e-4)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that does not optimize: it takes half a second."""
    monkeypatch.setattr(packed_kernel, "FLAGS", ("-O0", "-fPIC", "-shared"))


@pytest.mark.usefixtures("quick")
def test_it_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = kernel()
    (library,) = (tmp_path / "cache" / "wanda-dvc").iterdir()
    made = library.stat().st_mtime_ns
    kernel.cache_clear()
    again = kernel()
    assert first is not None
    assert again is not None
    assert again is not first
    assert [path.stat().st_mtime_ns for path in library.parent.iterdir()] == [made]


@pytest.mark.usefixtures("quick")
def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert kernel() is not None


def test_an_unknown_path_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(CHOICE, "mmx")
    with pytest.raises(UserError, match=f"{CHOICE}: got mmx, expected generic.*, or off"):
        kernel()
