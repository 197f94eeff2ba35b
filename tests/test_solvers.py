"""Solvers on a Gram matrix: against independent solutions, and the laws that no method may break."""

import itertools
from dataclasses import replace
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Make, fetch, prune
from transformers import AutoModelForCausalLM

from wanda_dvc.catalog import RECONSTRUCTIONS
from wanda_dvc.errors import UserError
from wanda_dvc.pruning import solvers
from wanda_dvc.pruning.gram import Gram
from wanda_dvc.pruning.reconstruction import reconstruct
from wanda_dvc.pruning.selection import count_removed, select
from wanda_dvc.pruning.solvers import GramFactors, admm, fisher_least_squares, least_squares, sparsegpt
from wanda_dvc.stages.inputs import draw_calibration
from wanda_dvc.study.artifact import read_provenance

# Each method that chooses masks, and what gives its kept weights new values.
METHODS: dict[str, Any] = {"sparsegpt": (sparsegpt, solvers.sparsegpt_update), "admm": (admm, least_squares)}
TARGETS = [("unstructured", "row", "0.5"), ("unstructured", "linear", "0.37"), ("unstructured", "row", "0.7"),
           ("2:4", "row", "0.5"), ("4:8", "row", "0.5"), ("1:3", "row", "0.6667"),
           ("20:30", "row", "0.3333")]  # fmt: skip
HALF = Fraction(1, 2)


def problem(out: int = 12, features: int = 120, tokens: int = 500, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and a Gram matrix of correlated features of very different size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(features) + 0.2 * torch.randn(features, features, generator=generator)
    x = torch.randn(tokens, features, generator=generator) @ mix
    x *= torch.rand(features, generator=generator).mul(2).exp()
    return torch.randn(out, features, generator=generator), x.T @ x


def of_gradients(out: int, seed: int = 1) -> torch.Tensor:
    """A Gram matrix of gradients by outputs, whose sizes differ much."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * out, out, generator=generator)
    mix = torch.eye(out) + 0.3 * torch.rand(out, out, generator=generator)
    x = x @ mix * torch.randn(out, generator=generator).mul(0.5).exp()
    return x.T @ x * 1e-6


def wanda(weight: torch.Tensor, gram: torch.Tensor, sparsity: Fraction = HALF, pattern: str = "unstructured"):
    return select(weight.abs() * gram.diagonal().sqrt(), sparsity=sparsity, pattern=pattern)


def row_errors(dense: torch.Tensor, pruned: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    off = (dense - pruned).double()
    return (off @ gram.double() * off).sum(1)


def solve(name, weight, prepared, sparsity=HALF, **words) -> tuple[torch.Tensor, torch.Tensor]:
    choose, update = METHODS[name]
    mask = choose(weight, prepared, sparsity=sparsity, **words)
    return mask, update(weight, mask, prepared)


def every_method(weight, prepared, sparsity, pattern, group):
    """All that solves, each mask with other weights included."""
    solved = {name: solve(name, weight, prepared, sparsity, pattern=pattern, group=group) for name in METHODS}
    swept, alternated = (solved[name][0] for name in METHODS)
    solved["least squares"] = swept, least_squares(weight, swept, prepared)
    weighted = fisher_least_squares(weight, alternated, prepared, of_gradients(len(weight)), steps=15)
    return solved | {"fisher": (alternated, weighted)}


@pytest.mark.parametrize(("pattern", "group", "sparsity"), TARGETS)
def test_masks_are_kept_counts_exact_and_errors_not_larger_than_without_update(pattern, group, sparsity):
    weight, gram = problem()
    sparsity = Fraction(sparsity)
    for name, (mask, solved) in every_method(weight, GramFactors(gram), sparsity, pattern, group).items():
        assert torch.equal(solved != 0, mask), name  # no zero revived, no weight lost
        if pattern != "unstructured":
            n, m = map(int, pattern.split(":"))
            assert (mask.unflatten(1, (-1, m)).sum(-1) == n).all(), name
        elif group == "row":
            assert ((~mask).sum(1) == count_removed(120, sparsity)).all(), name
        else:
            assert (~mask).sum() == count_removed(12 * 120, sparsity), name
        without = row_errors(weight, weight * mask, gram)
        errors = row_errors(weight, solved, gram)
        if name in ("fisher", "sparsegpt"):  # rows make up for one another, or are updated in any case
            errors, without = errors.sum(), without.sum()
        assert (errors <= without * (1 + 1e-6)).all(), name
        unchanged = (solved == weight * mask).all(1)  # the update was applied
        assert unchanged.sum() <= (name != "sparsegpt"), name
        assert errors.sum() < 0.9 * without.sum(), name


@pytest.mark.parametrize("damping", [0.0, 0.01, 1.0])
def test_least_squares_solves_the_normal_equations(damping):
    """Row by row, with numpy in float64: the kept weights make up for those that go."""
    weight, gram = problem(out=5, features=20)
    keep = wanda(weight, gram)
    solved = least_squares(weight, keep, GramFactors(gram, damping=damping), steps=60)
    g = gram.double().numpy()
    g = g + damping * np.diag(g).mean() * np.eye(20)
    for row, mask, found in zip(weight.double().numpy(), keep.numpy(), solved.numpy(), strict=True):
        expected = np.zeros(20)
        expected[mask] = np.linalg.solve(g[np.ix_(mask, mask)], g[mask] @ row)
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-3)


def test_more_steps_never_hurt():
    weight, gram = problem()
    keep, prepared = wanda(weight, gram), GramFactors(gram)
    found = [least_squares(weight, keep, prepared, steps=n) for n in range(0, 30, 3)]
    errors = [row_errors(weight, new, gram).sum() for new in found]
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(errors))


@pytest.mark.parametrize(("damping", "output_damping"), [(0.01, 1.0), (0.1, 3.0)])
def test_fisher_least_squares_solves_the_normal_equations(monkeypatch, damping, output_damping):
    """All rows at once, with numpy in float64, by the Kronecker product of both matrices."""
    weight, gram = problem(out=6, features=20)
    keep, s = wanda(weight, gram), of_gradients(6).double().numpy()
    factors = GramFactors(gram, damping=damping)
    monkeypatch.setattr(solvers, "OUTPUT_DAMPING", output_damping)
    solved = fisher_least_squares(weight, keep, factors, of_gradients(6), steps=300)
    g = gram.double().numpy()
    g = g + damping * np.diag(g).mean() * np.eye(20)
    s = s + output_damping * np.diag(np.diag(s))
    both, w, mask = np.kron(s, g), weight.double().numpy().ravel(), keep.numpy().ravel()
    expected = np.zeros(120)
    expected[mask] = np.linalg.solve(both[np.ix_(mask, mask)], both[mask] @ w)
    plain = least_squares(weight, keep, factors)
    np.testing.assert_allclose(solved.numpy().ravel(), expected, rtol=0, atol=2e-3)
    off = [w - x.double().numpy().ravel() for x in (plain, solved)]
    assert off[1] @ both @ off[1] < 0.99 * (off[0] @ both @ off[0])


@pytest.mark.parametrize("factor", [2.0**-40, 2.0**40])
def test_the_unit_of_the_loss_changes_nothing(factor):
    weight, gram = problem()
    keep, s = wanda(weight, gram), of_gradients(12)
    found = [fisher_least_squares(weight, keep, GramFactors(gram), x, steps=15) for x in (s, factor * s)]
    assert torch.equal(*found)


def test_fisher_least_squares_leaves_dead_features_and_counts_outputs_without_gradients():
    weight, gram = problem()
    gram[[3, 7]] = gram[:, [3, 7]] = 0
    keep, s = wanda(weight, gram), of_gradients(12)
    keep[:6, [3, 7]], keep[6:, [3, 7]] = True, False
    s[4] = s[:, 4] = 0
    prepared = GramFactors(gram)
    solved = fisher_least_squares(weight, keep, prepared, s, steps=15)
    torch.testing.assert_close(solved[:, [3, 7]], (weight * keep)[:, [3, 7]])
    assert torch.equal(solved != 0, keep)
    single = least_squares(weight, keep, prepared, steps=60)[4]  # nothing to make up for in other rows
    found = fisher_least_squares(weight, keep, prepared, s, steps=300)[4]
    torch.testing.assert_close(found, single, atol=0.05, rtol=0)
    nothing = fisher_least_squares(weight, keep, prepared, torch.zeros(12, 12), steps=300)
    torch.testing.assert_close(nothing, least_squares(weight, keep, prepared, steps=60), atol=0.05, rtol=0)


def test_dead_features_do_not_slow_fisher_least_squares_down():
    """After a few steps, the weights are those of the problem without the dead features."""
    weight, gram = problem()
    dead = torch.zeros(len(gram), dtype=torch.bool)
    dead[[3, 7, 50]] = True
    gram[dead] = gram[:, dead] = 0
    keep, s = wanda(weight, gram), of_gradients(12)
    keep[:6, dead], keep[6:, dead] = True, False
    found = fisher_least_squares(weight, keep, GramFactors(gram), s, steps=3)[:, ~dead]
    living = GramFactors(gram[~dead][:, ~dead])
    locked = fisher_least_squares(weight[:, ~dead], keep[:, ~dead], living, s, steps=3)
    torch.testing.assert_close(found, locked, rtol=1e-3, atol=1e-4)


def test_fisher_least_squares_goes_as_far_as_the_layer_error_allows(monkeypatch):
    weight, gram = problem()
    keep, prepared = wanda(weight, gram), GramFactors(gram)
    plain = least_squares(weight, keep, prepared)
    for given, steps in ((of_gradients(12), 0), (None, 15)):
        stays = fisher_least_squares(weight, keep, prepared, given, steps=steps)
        assert torch.equal(stays, plain)
    x = torch.randn(100, 12, generator=torch.Generator().manual_seed(2))
    x[:, 0] = x[:, 1:].sum(1)  # whatever row 0 gets wrong, the others can make up for, and they have large errors then
    with monkeypatch.context() as patch:
        patch.setattr(solvers, "OUTPUT_DAMPING", 1e-6)
        solved = fisher_least_squares(weight, keep, prepared, x.T @ x, steps=300)
    error, by_mask = (row_errors(weight, new, gram).sum().item() for new in (solved, weight * keep))
    assert error == pytest.approx(by_mask, rel=1e-5)
    s = Gram(of_gradients(12).double())
    for steps in (15, 30):
        solved = fisher_least_squares(weight, keep, prepared, s.matrix(), steps=steps)
        how = replace(RECONSTRUCTIONS["output-weighted"], steps=steps)
        assert torch.equal(reconstruct(weight, keep, prepared, reconstruction=how, gradient_gram=s), solved)


def test_rows_that_do_not_improve_keep_their_weights():
    weight, gram = problem()
    keep, prepared = wanda(weight, gram), GramFactors(gram)
    keep[3] = True  # nothing to make up for
    keep[5] = False  # nothing to do it with
    solved = least_squares(weight, keep, prepared)
    assert (solved == weight * keep).all(1).nonzero()[:, 0].tolist() == [3, 5]
    best = least_squares(weight, keep, GramFactors(gram, damping=0), steps=100)
    settled = solvers.better_rows(weight, best, solved, prepared)  # none of them is better
    assert torch.equal(settled, best)


def paper_sparsegpt(weight, gram, sparsity, pattern, damping=0.01, block=128):
    """Algorithm 1 of arXiv 2301.00774 in numpy and float64, on rows × block (`layer`) or n:m."""
    w, h = weight.double().numpy().copy(), gram.double().numpy()
    h = h + damping * np.diag(h).mean() * np.eye(len(h))
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    keep = np.ones(w.shape, dtype=bool)
    for i in range(0, w.shape[1], block):
        end, errors = min(i + block, w.shape[1]), np.zeros((len(w), block))
        for j in range(i, end):
            if pattern is None and j == i:
                score = w[:, i:end] ** 2 / np.diag(upper)[i:end] ** 2
                lowest = np.argsort(score, axis=None)[: int(score.size * sparsity)]
                keep[:, i:end].reshape(-1)[:] = True
                rows, columns = np.unravel_index(lowest, score.shape)
                keep[rows, i + columns] = False
            elif pattern is not None and j % pattern[1] == 0:
                n, m = pattern
                score = w[:, j : j + m] ** 2 / np.diag(upper)[j : j + m] ** 2
                lowest = np.argsort(score, axis=1)[:, : m - n]
                np.put_along_axis(keep[:, j : j + m], lowest, False, axis=1)
            errors[:, j - i] = np.where(keep[:, j], 0, w[:, j]) / upper[j, j]
            w[:, j:end] -= errors[:, j - i, None] * upper[j, None, j:end]
        w[:, end:] -= errors[:, : end - i] @ upper[i:end, end:]
    return keep, w * keep


@pytest.mark.parametrize(
    ("pattern", "sparsity"), [(None, HALF), (None, Fraction("0.75")), ((2, 4), HALF), ((4, 8), HALF)]
)
def test_sparsegpt_is_the_papers_algorithm(monkeypatch, pattern, sparsity):
    monkeypatch.setattr(solvers, "SWEEP_PANEL", 16)
    weight, gram = problem(out=8, features=64)
    keep, expected = paper_sparsegpt(weight, gram, sparsity, pattern, block=16)
    name = "unstructured" if pattern is None else "{}:{}".format(*pattern)
    mask = sparsegpt(weight, GramFactors(gram), sparsity=sparsity, pattern=name, group="linear")
    assert np.array_equal(mask.numpy(), keep)
    solved = solvers.sparsegpt_update(weight, mask, GramFactors(gram))
    changed = ~torch.from_numpy((expected == weight.double().numpy() * keep).all(1))
    assert changed.all()
    np.testing.assert_allclose(solved.numpy(), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def prune_plainly(model, windows, prune_linear):
    """Prune a model block by block, on the outputs of the pruned blocks before, with hooks in transformers' model.

    `prune_linear` returns a linear's new weight, given its block, its weight, and the Gram matrix of its inputs.
    """

    def add(gram, _, inputs):
        x = inputs[0].flatten(0, -2).double()
        gram += x.T @ x

    hidden = model.model.embed_tokens(windows)
    rotary = model.model.rotary_emb(hidden, torch.arange(windows.shape[1])[None])
    for index, block in enumerate(model.model.layers):
        linears = [module for module in block.modules() if isinstance(module, torch.nn.Linear)]
        grams = [torch.zeros(linear.in_features, linear.in_features, dtype=torch.float64) for linear in linears]
        hooks = [x.register_forward_pre_hook(partial(add, gram)) for x, gram in zip(linears, grams, strict=True)]
        block(hidden, position_embeddings=rotary)
        for hook in hooks:
            hook.remove()
        for linear, gram in zip(linears, grams, strict=True):
            linear.weight.copy_(prune_linear(index, linear.weight, gram))
        hidden = block(hidden, position_embeddings=rotary)


def lowest_removed(weight, score, counts):
    """The weight without its lowest scores: so many of each row, of a table of one row or more."""
    scores = score.reshape(len(counts), -1)
    keep = scores.argsort(dim=1, stable=True).argsort(dim=1) >= torch.tensor(counts)[:, None]
    return weight * keep.view(weight.shape)


def plain_wanda(sparsities):
    def prune_linear(block, weight, gram):
        score = weight.abs() * gram.diagonal().sqrt()
        return lowest_removed(weight, score, [count_removed(weight.shape[1], sparsities[block])] * len(weight))

    return prune_linear


def plain_ria(_, weight, gram):
    size = weight.abs().double()
    score = (size / size.sum(0) + size / size.sum(1, keepdim=True)) * gram.diagonal() ** 0.25
    return lowest_removed(weight, score, [weight.numel() // 2])


def plain_sparsegpt(_, weight, gram):
    return torch.from_numpy(paper_sparsegpt(weight, gram, HALF, None, block=16)[1])


def owls_sparsities(model, windows):
    """Each block's sparsity at 50 %, by the formula of OWL's authors; they count outliers of the dense model."""
    scores: list[list[torch.Tensor]] = [[] for _ in model.model.layers]

    def collect(block, weight, gram):
        scores[block].append((weight.abs() * gram.diagonal().sqrt()).flatten())
        return weight

    prune_plainly(model, windows, collect)
    all_scores = [torch.cat(of_block) for of_block in scores]
    outliers = np.array([100 * (x > 5 * x.mean()).double().mean().item() for x in all_scores])
    kept = (outliers - outliers.min()) / (outliers.max() - outliers.min()) * 2 * 0.08
    return 1 - (kept - kept.mean() + 0.5)


@pytest.mark.parametrize("recipe", ["sparsegpt-paper", "ria", "owl"])
def test_recipes_of_papers_are_their_procedures(study: Make, monkeypatch, recipe: str):
    monkeypatch.setattr(solvers, "SWEEP_PANEL", 16)
    made = prune(fetch(study(recipe=recipe, dtype="float32"), "model", "calibration"))
    pruned, plain = (AutoModelForCausalLM.from_pretrained(made.model(name)).eval() for name in ("pruned", "dense"))
    windows = draw_calibration(made).tokens.long()
    oracle = {"sparsegpt-paper": plain_sparsegpt, "ria": plain_ria}.get(recipe)
    if oracle is None:
        sparsities = read_provenance(made.masks, "mask")["sparsities"]
        shift = sparsities - owls_sparsities(plain, windows)  # to the exact count: each row loses a whole number
        assert np.ptp(shift) < 1e-5
        assert 0 <= shift.min() < 1 / 32
        oracle = plain_wanda([Fraction(str(sparsity)) for sparsity in sparsities])
    prune_plainly(plain, windows, oracle)
    for ours, expected in zip(pruned.model.layers.parameters(), plain.model.layers.parameters(), strict=True):
        assert torch.equal(ours != 0, expected != 0)
        torch.testing.assert_close(ours, expected, rtol=2e-3, atol=2e-3)


def paper_admm(weight, gram, sparsities, damping=0.1):
    """The mask of arXiv 2401.02938 as `methods.md` has it, in numpy and float64, a row a group."""
    g = gram.double().numpy()
    scale = np.sqrt(np.diag(g))
    g = g / scale / scale[:, None] + damping * np.eye(len(g))
    w0 = weight.double().numpy() * scale
    k, w, u = np.linalg.inv(g + np.eye(len(g))), w0, np.zeros_like(w0)
    mask = np.ones(w0.shape, dtype=bool)
    for go in sparsities:
        np.put_along_axis(mask, np.argsort(abs(w + u), axis=1), np.arange(mask.shape[1]) >= go, axis=1)
        z = (w + u) * mask
        u = u + w - z
        w = (w0 @ g + z - u) @ k
    return mask


def test_admm_is_the_papers_algorithm():
    weight, gram = problem(out=6, features=40)
    sparsities = [int(40 * (0.5 - 0.5 * (1 - (t + 1) / 15) ** 3) + 1e-9) for t in range(15)]
    mask = admm(weight, GramFactors(gram), sparsity=HALF)
    assert np.array_equal(mask.numpy(), paper_admm(weight, gram, sparsities))


def best_mask_error(weight: torch.Tensor, gram: torch.Tensor, go: int) -> float:
    """The least error of one row over all masks, by trying each."""
    g, w, features = gram.double().numpy(), weight.double().numpy()[0], len(gram)
    best = np.inf
    for lost in itertools.combinations(range(features), go):
        some = np.setdiff1d(np.arange(features), lost)
        v = np.zeros(features)
        v[some] = np.linalg.solve(g[np.ix_(some, some)], g[some] @ w)
        best = min(best, (w - v) @ g @ (w - v))
    return best


def test_admm_is_nearer_to_the_best_of_all_masks_than_wanda():
    ratios: dict[str, list[float]] = {"admm": [], "wanda": []}
    for seed in range(40):
        weight, gram = problem(out=1, features=8, seed=seed)
        best = best_mask_error(weight, gram, 4)
        for name, mask in ("admm", admm(weight, GramFactors(gram), sparsity=HALF)), ("wanda", wanda(weight, gram)):
            polished = least_squares(weight, mask, GramFactors(gram, damping=0), steps=30)
            ratios[name].append(row_errors(weight, polished, gram).item() / best)
    assert min(ratios["admm"]) > 0.999
    assert sum(ratio < 1.001 for ratio in ratios["admm"]) >= 30
    assert np.mean(ratios["admm"]) < 1.05 < np.mean(ratios["wanda"])


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("factor", [2.0**-20, 2.0**20])
def test_scaling_all_inputs_changes_nothing(name, factor):
    weight, gram = problem()
    one, other = (solve(name, weight, GramFactors(g)) for g in (gram, gram * factor))
    assert torch.equal(one[0], other[0])
    torch.testing.assert_close(one[1], other[1])


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("pattern", "group"), [("unstructured", "row"), ("2:4", "row")])
def test_rows_are_solved_apart(monkeypatch, name, pattern, group):
    """Their order changes nothing, nor does their number, nor the slice that they are solved in."""
    weight, gram = problem()
    prepared, order = GramFactors(gram), torch.randperm(12, generator=torch.Generator().manual_seed(0))
    words = {"pattern": pattern, "group": group}
    mask, complete = solve(name, weight, prepared, **words)
    mixed = solve(name, weight[order], prepared, **words)
    monkeypatch.setattr(solvers, "ROWS_AT_A_TIME", 1)
    sliced = solve(name, weight, prepared, **words)
    for (chosen, solved), expected in ((mixed, order), (sliced, torch.arange(12))):
        assert torch.equal(chosen, mask[expected])
        torch.testing.assert_close(solved, complete[expected], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("pattern", "group", "sparsity"), TARGETS)
def test_equal_and_independent_features_make_sparsegpt_magnitude(pattern, group, sparsity):
    weight, _ = problem()
    words = {"sparsity": Fraction(sparsity), "pattern": pattern, "group": group}
    mask, solved = solve("sparsegpt", weight, GramFactors(3 * torch.eye(120)), **words)
    assert torch.equal(mask, select(weight.abs(), **words))
    assert torch.equal(solved, weight * mask)
    assert torch.equal(least_squares(weight, mask, GramFactors(torch.eye(120))), weight * mask)


@pytest.mark.parametrize("name", METHODS)
def test_dead_features_go_first_and_their_kept_weights_stay_or_are_zeros(name):
    """SparseGPT's authors zero them."""
    weight, gram = problem()
    is_zeroed = name == "sparsegpt"
    dead = torch.tensor([3, 7, 11])
    gram[dead] = gram[:, dead] = 0
    mask, _ = solve(name, weight, GramFactors(gram))
    assert not mask[:, dead].any()
    mask, few = solve(name, weight, GramFactors(gram), Fraction(1, 120))
    torch.testing.assert_close(few[:, dead], (weight * mask)[:, dead] * (not is_zeroed))
    assert mask[:, dead].sum() == 2 * 12
    is_live = torch.ones(120, dtype=torch.bool)
    is_live[dead] = not is_zeroed
    assert torch.equal(few != 0, mask & is_live)
    assert few.isfinite().all()
    kept = least_squares(weight, mask, GramFactors(gram, damping=0))
    assert torch.equal(kept[:, dead], (weight * mask)[:, dead])
    mask, every = solve(name, weight, GramFactors(torch.zeros(120, 120)))  # an input of zeros
    assert torch.equal(every, weight * mask * (not is_zeroed))


@pytest.mark.parametrize("update", [solvers.sparsegpt_update, least_squares])
def test_a_gram_matrix_that_is_not_positive_definite_raises_the_damping(update):
    weight, gram = problem()
    root = gram.diagonal().sqrt()
    gram = gram - 0.5 * torch.outer(root, root)  # one eigenvalue far below zero
    mask = wanda(weight, gram)
    damping, mean = 0.001, gram.diagonal().double().mean()
    while torch.linalg.eigvalsh(gram.double() + damping * mean * torch.eye(120)).min() <= 0:
        damping *= 10
    assert damping > 0.001
    solved = update(weight, mask, GramFactors(gram, damping=0.001))
    assert torch.equal(solved, update(weight, mask, GramFactors(gram, damping=damping)))
    assert solved.isfinite().all()


@pytest.mark.parametrize(("off", "damping"), [(0.5, 0.0), (1 + 1e-5, 1e-4), (1 + 5e-4, 1e-3)])
def test_damping_starts_at_a_ten_thousandth_and_grows_tenfold(off: float, damping: float):
    """The matrix has the eigenvalue 1 − off; damping is a share of its mean diagonal, 1."""
    root = GramFactors(torch.tensor([[1.0, off], [off, 1.0]]), damping=0.0).inverse_root.double()
    damped = torch.linalg.inv(root.T @ root)
    assert damped.diagonal().numpy() - 1 == pytest.approx(damping, rel=1e-2, abs=1e-6)


def test_fewer_tokens_than_features_solve_without_raising():
    weight, gram = problem(tokens=20)
    for _, solved in every_method(weight, GramFactors(gram), HALF, "unstructured", "row").values():
        assert solved.isfinite().all()
    zero = least_squares(weight, wanda(weight, gram), GramFactors(gram, damping=0))
    assert zero.isfinite().all()


def test_a_matrix_without_a_factor_is_refused():
    gram = torch.full((4, 4), -1e30).fill_diagonal_(1e-3)
    with pytest.raises(UserError, match="input of a.linear: it cannot be factored"):
        _ = GramFactors(gram, "a.linear").inverse_root


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", METHODS)
def test_half_precision_weights_are_solved_in_float32(name, dtype):
    weight, gram = problem()
    weight = weight.to(dtype)
    (mask, solved), (_, exact) = (solve(name, w, GramFactors(gram)) for w in (weight, weight.float()))
    assert (mask.dtype, solved.dtype) == (torch.bool, torch.float32)
    assert torch.equal(solved, exact)


@pytest.mark.parametrize("group", ["row", "linear"])
def test_sparsegpts_counts_are_exact_over_all_blocks_together(monkeypatch, group):
    """⌊16 · 0.37⌋ of each block would be too few."""
    monkeypatch.setattr(solvers, "SWEEP_PANEL", 16)
    weight, gram = problem()
    keep = sparsegpt(weight, GramFactors(gram), sparsity=Fraction("0.37"), group=group)
    assert (~keep).sum() == {"row": 12 * 44, "linear": 532}[group]


def test_weights_of_dead_features_that_stay_do_not_keep_a_row_from_improving():
    weight, gram = problem()
    dead = torch.arange(4, 8)
    gram[dead] = gram[:, dead] = 0
    mask, solved = solve("admm", weight, GramFactors(gram), pattern="2:4")
    assert (solved != weight * mask).any(1).all()
    torch.testing.assert_close(solved[:, dead], (weight * mask)[:, dead])
    assert (mask[:, dead].sum(1) == 2).all()


@pytest.mark.parametrize("features", [1, 127, 300])
def test_factors_are_those_of_numpy(features: int):
    _, gram = problem(features=features, tokens=2 * features + 10)
    prepared, exact = GramFactors(gram), gram.double().numpy()
    damped = exact + 0.01 * exact.diagonal().mean() * np.eye(features)
    root = prepared.inverse_root.double().numpy()
    assert not np.tril(root, -1).any()
    np.testing.assert_allclose(root.T @ root @ damped, np.eye(features), atol=1e-3)
    scale = np.sqrt(exact.diagonal())
    inverse = prepared.admm_inverse.double().numpy()
    expected = np.linalg.inv(exact / scale[:, None] / scale + 1.1 * np.eye(features))
    np.testing.assert_allclose(inverse, expected, atol=1e-5)
    np.testing.assert_allclose(inverse, inverse.T, atol=1e-6)


@pytest.mark.parametrize("wrong", [0, 150, 299])
def test_a_matrix_without_a_factor_is_damped_more_wherever_that_shows(wrong: int):
    _, gram = problem(features=300)
    gram[wrong, wrong - 1] = gram[wrong - 1, wrong] = 2 * gram.diagonal()[[wrong, wrong - 1]].max()
    root = GramFactors(gram).inverse_root.double()
    damping = (torch.linalg.inv(root.T @ root) - gram).diagonal() / gram.diagonal().mean()
    assert damping.min() > 0.05
