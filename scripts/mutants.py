"""Break the numeric core, one change at a time in a scratch copy, and list the changes that no test notices.

    python scripts/mutants.py                      every mutant, an hour or two
    python scripts/mutants.py pruning/solvers      those of a file

`MUTANTS` has of each file the tests that concern it, and the changes: old text, which is there once, and new text. A
mutant is killed if one of these tests fails or takes ten minutes. Exit 1 if more than one of twenty survives.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path("src/wanda_dvc")
LONGEST = 600  # seconds a mutant

MUTANTS: dict[str, tuple[str, list[tuple[str, str]]]] = {
    "pruning/scores": (
        "selection stages",
        [
            ("return weight.abs().float().mul_(x.norm)", "return weight.abs().float().mul_(x.norm.sqrt())"),
            ("return weight.abs().float()\n", "return weight.float()\n"),
            ("size.sum(dim=0).clamp_", "size.sum(dim=1).mean().expand(size.shape[1]).clone().clamp_"),
            (".mul_(x.norm.sqrt())\n", ".mul_(x.norm)\n"),
        ],
    ),
    "pruning/selection": (
        "selection",
        [
            ("return int(size * share)", "return int(size * float(share))"),
            ('score if group == "row" else score', 'score if group != "linear" else score.abs() if False else score.T'),
            ("place > place[:, -1:] - missing[rows]", "place <= missing[rows]"),
            ("return (above < n)", "return (above <= n)"),
            ("above[earlier] += ~first_wins", "above[earlier] += neighbours[earlier] < neighbours[later]"),
            ("if bits.min() >= 0 else numbers", "if True else numbers"),
            ("sums <= alpha * sums[:, -1:]", "sums < alpha * sums[:, -1:]"),
            ("(low, alpha) if off > 0", "(low, alpha) if off < 0"),
            ("if m > COUNTED:", "if m > COUNTED + 1:"),
            ("np.unpackbits(bits.numpy(), axis=1, count=columns)", "np.unpackbits(bits.numpy(), axis=1)[:, -columns:]"),
        ],
    ),
    "pruning/statistics": (
        "norms gram selection experts",
        [
            ("self.sum_squares += other.sum_squares.to", "self.sum_squares = other.sum_squares.to"),
            (
                "self.sum += other.sum.to(self.sum)\n        self.count",
                "self.sum -= other.sum.to(self.sum)\n        self.count",
            ),
            ("self.count += len(x)", "self.count += 1"),
            (
                "if self.count else torch.ones_like(self.sum_squares)",
                "if self.count else torch.zeros_like(self.sum_squares)",
            ),
            ("numbers.square() if numbers is x", "numbers.square_() if numbers is x"),
        ],
    ),
    "pruning/gram": (
        "gram",
        [
            ("self.upper += other.upper.to(self.upper)", "self.upper = other.upper.to(self.upper)"),
            ("exact.diagonal()[dead] = 0", "pass"),
            ("/ safe[first:] / safe[first]", "/ safe[first:] / safe[first:]"),
            ("error / output if error and output", "error if error and output"),
            ("exact = gram.to(torch.float64, copy=True)", "exact = gram.to(torch.float64, copy=True).float().double()"),
        ],
    ),
    "pruning/solvers": (
        "solvers",
        [
            ("self.dead = self.gram.diagonal() <= 0", "self.dead = self.gram.diagonal() < 0"),
            ("coupled.diagonal().fill_(1 + output_damping)", "coupled.diagonal().fill_(1)"),
            ("alive = keep & ~prepared.dead", "alive = keep"),
            ("return min(1.0, (along + math", "return min(9.0, (along + math"),
            ("along**2 + square * room", "along**2"),
            ("keep_n_of_m(score, *n_of_m).T", "keep_n_of_m(score.abs().sqrt(), *n_of_m).T"),
            ("w[end:].addmm_(factor.matrix[begin:end, end:].T, errors, alpha=-1)", "pass"),
            (
                "go = removed(each * end, share) - removed(each * begin, share)",
                "go = removed(each * (end - begin), share)",
            ),
            ("Fraction(iteration + 1, growing)) ** 3", "Fraction(iteration + 1, growing)) ** 2"),
            ("penalty: float = 1.0,\n    iterations: int = 20", "penalty: float = 0.5,\n    iterations: int = 20"),
            ("score.masked_fill(keep_n_of_m(score, *n_of_m), torch.inf)", "score"),
            ("weight + strength * (off", "weight + (off"),
            ("damping = max(RAISE * damping, FIRST_RAISE)", "damping = max(RAISE * damping, 1.0)"),
            ("torch.where(before > 0, size / before, 0)", "torch.zeros_like(size)"),
            (
                "lower = _gain(dense, start, found, prepared) < 0",
                "lower = _gain(dense, start, found, prepared) < torch.inf",
            ),
            ("mul_(2 * dense - start - found)", "mul_(dense - start)"),
            ("v = torch.where(prepared.dead, w, v) * keep[rows]", "v = v * keep[rows]"),
        ],
    ),
    "pruning/allocation": (
        "allocation",
        [
            ("2 * spread / (most - min(outliers))", "spread / (most - min(outliers))"),
            ("(most - ratio) * scale", "(ratio - min(outliers)) * scale"),
            ("max(wanted - spread, 0.0), max(min(wanted + spread, MOST), wanted)", "0.0, max(MOST, wanted)"),
            ("key=lambda one: abs(off(one))", "key=lambda one: one"),
            ("score > times * mean", "score > mean"),
        ],
    ),
    "pruning/units": (
        "units",
        [
            ("round(width * (1 - share) / multiple)", "int(width * (1 - share) / multiple)"),
            ("/ inverse.diagonal())[one]", "* inverse.diagonal())[one]"),
            ("w -= multiply(w[:, columns].contiguous(), solved)", "pass"),
            ("inverse -= multiply(rows.T.contiguous(), solved)", "pass"),
            ("found[~row] = 0", "pass"),
        ],
    ),
    "pruning/choose": (
        "stages reconstruction selection",
        [
            ("fisher.double() ** 0.25", "fisher.double() ** 0.5"),
            ("scored = scored * worth.to(scored)[:, None]", "pass"),
            (
                "share=share[name] if isinstance(share, Mapping) else share",
                "share=next(iter(share.values())) if isinstance(share, Mapping) else share",
            ),
            ("return oriented(kept, across).contiguous()", "return kept.contiguous()"),
        ],
    ),
    "plan": (
        "plan params presets numerics reconstruction",
        [
            ("share = 1 - Fraction(*n_of_m)", "share = Fraction(*n_of_m)"),
            ("Fraction(str(sparsity))", "Fraction(sparsity)"),
            ('self.group == "outputs" or self.allocation.by_gradients', "self.allocation.by_gradients"),
            ("not self.propagates and (self.method", "(self.method"),
            ('self.propagation == "corrected" and self.solves\n\n', 'self.propagation == "corrected"\n\n'),
        ],
    ),
    "engine/divergence": (
        "divergence",
        [
            ("(steps + offsets[:, None]) / DRAWN", "(steps + 0 * offsets[:, None]) / DRAWN"),
            ("log_r.expm1() - log_r", "-log_r"),
            ("torch.where(p[:, -1] == 0, 0.0, p[:, -1] * within)", "torch.where(p[:, -1] == 0, 0.0, within)"),
            ("float((change**2).sum())", "float(change.abs().sum())"),
            ("(first == dense.first)", "(first <= dense.first)"),
            ("math.ceil(0.99 * total) - 1", "math.floor(0.99 * total) - 1"),
            ("loss * count for loss, count", "loss for loss, count"),
        ],
    ),
    "study/provenance": (
        "results trust divergence",
        [
            (
                'FREE = ("model", "reference", "wanda_dvc", "text")',
                'FREE = ("model", "reference", "wanda_dvc", "text", "dtype")',
            ),
            ('version.partition("+")[0]', 'version.partition(".")[0]'),
            (
                "if first.get(key) != second.get(key)), None)",
                "if key in second and first.get(key) != second.get(key)), None)",
            ),
        ],
    ),
    "results/compare": (
        "results report",
        [
            ("not math.isnan(test.p)", "test.p < 0.05"),
            ("if key := differing(protocol, other):", "if (key := differing(protocol, other)) == 'libraries':"),
        ],
    ),
    "results/inference": (
        "inference",
        [
            ("* len(values) / (len(values) - 1)", ""),
            ("(len(p) - rank) * p[index]", "len(p) * p[index]"),
            ("largest = max(largest, min(1.0,", "largest = max(0.0, min(1.0,"),
            ("min(1.0, 2 * float(bdtr", "min(1.0, float(bdtr"),
        ],
    ),
}


def copy(target: Path) -> None:
    """Copy all files that git tracks."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, target / name)


def mutated(source: str, old: str, new: str) -> str:
    """Return source text with one change. ValueError unless the old text is there once."""
    if source.count(old) != 1:
        raise ValueError(f"found {source.count(old)} times, expected once: {old}")
    return source.replace(old, new)


def run_tests(root: Path, tests: str) -> None:
    """Run some tests of the copy in this process, and exit with pytest's status."""
    import pytest

    os.chdir(root)
    sys.path[:0] = [str(root / "src")]
    words = [f"tests/test_{name}.py" for name in tests.split()]
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        options = ["-q", "-x", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    status = pytest.main([*options, "-m", "not full and not slow and not pipeline", *words])
    os._exit(int(status))


def survives(root: Path, tests: str) -> bool:
    """Whether all tests pass. They run in a fork, which need not import the libraries again."""
    process = get_context("fork").Process(target=run_tests, args=(root, tests))
    process.start()
    process.join(LONGEST)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode == 0


def main(files: list[str]) -> int:
    """Run the mutants of some files, by default of all."""
    import scipy.special  # noqa: F401 - imported once, for all forks
    import torch  # noqa: F401
    import transformers  # noqa: F401

    survivors, count = 0, 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        copy(root)
        for name in files or MUTANTS:
            tests, changes = MUTANTS[name]
            path = root / PACKAGE / f"{name}.py"
            source = path.read_text(encoding="utf-8")
            if not survives(root, tests):
                raise SystemExit(f"{name}: {tests} fail without a change; mend them first")
            for old, new in changes:
                began = time.perf_counter()
                path.write_text(mutated(source, old, new), encoding="utf-8")
                alive = survives(root, tests)
                count, survivors = count + 1, survivors + alive
                took = f"{time.perf_counter() - began:.0f} s"
                print(f"{'SURVIVED' if alive else 'killed'} {took:>6} {name}: {old!r} → {new!r}", flush=True)
            path.write_text(source, encoding="utf-8")
    print(f"{survivors} of {count} mutants survived")
    return survivors > count / 20


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
