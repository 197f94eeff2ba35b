"""From score to mask: against loops, and the laws that no implementation may break."""

from fractions import Fraction
from pkgutil import resolve_name

import oracle
import pytest
import torch
from cases.grids import OF_WEIGHTS
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from operations import Operations
from simulated_gpu import OnDevice, simulated_gpu
from strategies import matrices

from wanda_dvc.catalog import methods
from wanda_dvc.pruning import scores
from wanda_dvc.pruning.masks import MaskRule, choose_by_score
from wanda_dvc.pruning.selection import count_removed, keep_highest, pack_bits, select, unpack_bits
from wanda_dvc.pruning.statistics import InputStats
from wanda_dvc.pruning.units import Units, unit_index, unit_scores
from wanda_dvc.study.tensors import pack_masks

SHARE = st.integers(0, 99).map(lambda percent: Fraction(percent, 100))
HALF = Fraction(1, 2)


def of_norm(norm):
    """Statistics of one token of these absolute values."""
    return InputStats(norm.double() ** 2, norm.double(), 1)


def test_worked_example_of_the_paper():
    """Figure 1 of arXiv 2306.11695: magnitude and Wanda choose differently."""
    weight = torch.tensor([[4.0, 0.0, 1.0, -1.0], [3.0, -2.0, -1.0, -3.0], [-3.0, 1.0, 0.0, 2.0]])
    norm = torch.tensor([1.0, 2.0, 8.0, 3.0])
    score = scores.wanda(weight, of_norm(norm))
    assert score.tolist() == [[4, 0, 8, 3], [3, 4, 8, 9], [3, 2, 0, 6]]
    kept = select(score, sparsity=HALF)
    assert (weight * kept).tolist() == [[4, 0, 1, 0], [0, 0, -1, -3], [-3, 0, 0, 2]]


@given(matrices(), SHARE)
def test_rows_and_layer_equal_the_loops(weight, sparsity):
    score = oracle.scores(weight.tolist())
    rows, columns = weight.shape
    by_row = select(scores.magnitude(weight), sparsity=sparsity, group="row")
    packed = unpack_bits(pack_bits(by_row), columns).tolist()
    assert packed == by_row.tolist() == oracle.keep_by_row(score, int(columns * sparsity))
    without_tokens = scores.wanda(weight, InputStats.empty(columns))  # magnitudes
    by_layer = select(without_tokens, sparsity=sparsity, group="linear")
    assert by_layer.tolist() == oracle.keep_by_layer(score, int(rows * columns * sparsity))


@given(matrices(), SHARE)
@example(torch.tensor([[-3.0, -1.0, 2.0, -2.0]]), Fraction(1, 4))  # their bit patterns are in reverse order
def test_scores_of_any_sign_are_ranked_by_value(score, sparsity):
    """A method of a package may give scores below zero."""
    expected = oracle.keep_by_row(score.tolist(), int(score.shape[1] * sparsity))
    assert select(score, sparsity=sparsity).tolist() == expected


N_OF_M = [(1, 2), (1, 3), (2, 3), (2, 4), (1, 4), (4, 8), (3, 8), (1, 16), (9, 17), (2, 257), (1, 300), (256, 512)]


@given(st.sampled_from(N_OF_M), st.data())
def test_n_of_m_equals_the_loops(n_of_m, data):
    n, m = n_of_m
    weight = data.draw(matrices(st.integers(1, 3).map(lambda groups: groups * m)))
    keep = select(scores.magnitude(weight), sparsity=1 - Fraction(n, m), pattern=f"{n}:{m}")
    assert keep.tolist() == oracle.keep_n_of_m(oracle.scores(weight.tolist()), n, m)
    assert (keep.unflatten(1, (-1, m)).sum(-1) == n).all()


@pytest.mark.parametrize("layout", [(3,), (1, 1), (8, 2), (64,)])
def test_no_mask_depends_on_the_order_in_which_a_gpu_adds(layout: tuple[int, ...]):
    """A float `cumsum` and `index_add_` have no fixed order on CUDA. Sums are those of a CPU, to the bit."""
    units = Units(7, 3, layout)
    score = torch.rand(33, 7 * sum(layout), generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(7).index_add_(0, unit_index(7, layout), score.sum(dim=0))
    with simulated_gpu(), Operations(of_gpu=True) as noted:
        on_gpu = unit_scores(score.to("cuda"), units).cpu()
    assert torch.equal(on_gpu, expected)
    assert torch.equal(unit_scores(score, units), expected)
    assert not noted.counts.keys() & {"cumsum", "index_add_"}


DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
NUMBERS = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.0078125, -3.0, 6e-8, -6e-8, 6e4, float("inf"), -float("inf")])


@given(DTYPES, st.lists(NUMBERS, min_size=1, max_size=40), st.data())
def test_a_gpu_selects_from_one_group_as_the_loops(dtype, numbers, data):
    score = torch.tensor([numbers], dtype=dtype)
    kept = data.draw(st.integers(0, len(numbers)))
    with simulated_gpu():
        mask = keep_highest(score.to("cuda"), kept).cpu()
    assert mask.tolist() == oracle.keep_by_row(score.double().tolist(), len(numbers) - kept)


def test_a_gpu_selects_from_one_group_by_as_many_passes_for_any_size():
    """`kthvalue` runs a long group on one thread block. The host waits once, for the number of ties."""
    operations = []
    for size in (100, 10_000):
        score = torch.rand(1, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
        with simulated_gpu(), Operations(of_gpu=True) as noted:
            mask = keep_highest(score.to("cuda"), size // 2)
        assert mask.cpu().sum() == size // 2
        operations.append(noted.counts)
    assert operations[0] == operations[1]
    assert not noted.counts.keys() & {"kthvalue", "sort", "topk", "_local_scalar_dense"}
    assert noted.counts["nonzero"] == 1


@pytest.mark.parametrize("columns", [*range(1, 18), 64])
def test_a_gpu_sends_one_bit_a_weight(columns: int, monkeypatch):
    mask = torch.rand(3, columns, generator=torch.Generator().manual_seed(columns)) < 0.5
    bytes_sent: list[int] = []
    for transfer in ("cpu", "to"):
        monkeypatch.setattr(OnDevice, transfer, counted(getattr(OnDevice, transfer), bytes_sent))
    with simulated_gpu():
        masks = pack_masks({"up": mask.to("cuda")})
        mask_again = masks.on("cuda", "up")
        assert mask_again.is_cuda
    assert bytes_sent == [3 * -(-columns // 8)]
    assert torch.equal(masks.data["up"][0], pack_bits(mask))
    assert torch.equal(mask_again.cpu(), mask)
    assert torch.equal(masks["up"], mask)


def counted(transfer, sizes):
    """A method of tensors of the device that notes their bytes."""

    def call(tensor, *args, **kwargs):
        sizes.append(tensor.nbytes)
        return transfer(tensor, *args, **kwargs)

    return call


@given(st.data())
def test_wanda_equals_the_loops(data):
    weight = data.draw(matrices(st.integers(1, 8)))
    shape = data.draw(st.integers(1, 6)), weight.shape[1]
    tokens = arrays.arrays("float32", shape, elements=st.sampled_from([0.0, 1.0, -2.0, 3.0]))
    inputs = torch.from_numpy(data.draw(tokens))
    stats = InputStats.empty(weight.shape[1])
    stats.add(inputs)
    score = resolve_name(methods()["wanda"].function)(weight, stats)
    expected = torch.tensor(oracle.scores(weight.tolist(), inputs.tolist()), dtype=torch.float64)
    torch.testing.assert_close(score.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", ["row", "linear"])
def test_counts_are_exact_where_almost_every_score_is_tied(dtype, group):
    weight = torch.randn(64, 200, generator=torch.Generator().manual_seed(0)).mul(4).round().to(dtype)
    keep = select(scores.magnitude(weight), sparsity=Fraction("0.37"), group=group)
    if group == "row":
        assert (keep.sum(1) == 200 - 74).all()
    assert keep.sum() == 64 * (200 - 74)


@pytest.mark.parametrize(
    ("size", "sparsity", "expected"), [(100, 0.29, 29), (1536, 0.3, 460), (576, 0.5, 288), (10, 0.0, 0), (3, 0.999, 2)]
)
def test_the_number_removed_is_that_of_the_decimal(size, sparsity, expected):
    assert count_removed(size, Fraction(str(sparsity))) == expected


@pytest.mark.parametrize("group", ["row", "linear"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("name", [name for name, row in OF_WEIGHTS.items() if row.needs != "gram"])
def test_masks_of_large_matrices_are_those_of_small_ones(monkeypatch, name: str, pattern: str, group: str):
    """Whatever a row of the catalog says, slicing changes no mask."""
    rule = MaskRule(methods()[name], HALF, pattern, group)
    generator = torch.Generator().manual_seed(0)
    weight = (4 * torch.randn(13, 24, generator=generator)).round()  # some scores are equal
    x = of_norm(torch.randint(1, 4, (24,), generator=generator).float())
    direct = choose_by_score(weight, x, rule)
    monkeypatch.setattr("wanda_dvc.pruning.gram.WEIGHTS_AT_A_TIME", 50)
    assert torch.equal(choose_by_score(weight, x, rule), direct)
    assert direct.sum() == 13 * 12


@given(matrices(), st.sampled_from([1.0, 4.0]))
def test_ria_equals_the_loops(weight, scale):
    """A weight's share of its column plus its share of its row, times the root of the norm; zeros score nothing."""
    norm = torch.arange(1.0, weight.shape[1] + 1) * scale
    size = weight.abs().double()
    expected = torch.zeros(size.shape)
    for i, j in size.nonzero().tolist():
        sparsities = size[i, j] / size[:, j].sum() + size[i, j] / size[i].sum()
        expected[i, j] = sparsities.item() * norm[j].item() ** 0.5
    torch.testing.assert_close(scores.ria(weight, of_norm(norm)), expected, rtol=1e-5, atol=1e-6)
