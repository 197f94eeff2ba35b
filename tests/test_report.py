"""The report: its laws of inference, and the page on a real DVC repository with experiments of every kind."""

import itertools
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, write_params
from scipy import stats

from wanda_dvc.errors import UserError
from wanda_dvc.params import read_params
from wanda_dvc.report import inference, report
from wanda_dvc.report.charts import Point, curves, times
from wanda_dvc.report.pages import as_markdown
from wanda_dvc.report.published import sources
from wanda_dvc.report.rows import Collected, Row, identity, stale_stages
from wanda_dvc.report.chapters import content
from wanda_dvc.report.chapters.size import stored_bytes
from wanda_dvc.report.chapters.structure import of_block
from wanda_dvc.study.files import write_csv, write_json
from wanda_dvc.study.presets import read_preset
from wanda_dvc.study.project import Project

# --- inference ---


def test_mcnemar_is_the_fair_coin_counted_out():
    """Every outcome of the disagreements, counted one by one."""
    for first, second in itertools.product(range(6), repeat=2):
        total = first + second
        mine = [True] * first + [False] * second + [True, False]
        theirs = [False] * first + [True] * second + [True, False]
        got = inference.mcnemar(mine, theirs)
        outcomes = [sum(coins) for coins in itertools.product((0, 1), repeat=total)]
        as_far = [heads for heads in outcomes if abs(heads - total / 2) >= abs(first - total / 2)]
        assert got == (first, second, pytest.approx(len(as_far) / len(outcomes)))


def test_the_interval_of_accuracy_is_where_a_score_test_does_not_reject():
    """Wilson's interval, found by looking at every p."""
    interval = inference.accuracy([True] * 13 + [False] * 35)
    grid = np.linspace(1e-4, 1 - 1e-4, 99_999)
    kept = grid[np.abs(13 / 48 - grid) <= 1.959964 * np.sqrt(grid * (1 - grid) / 48)]
    assert interval.value == pytest.approx(13 / 48)
    assert (interval.low, interval.high) == pytest.approx((kept.min(), kept.max()), abs=1e-4)
    assert inference.accuracy([True] * 5).high == pytest.approx(1)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    random = np.random.default_rng(0)
    covered = dict.fromkeys(["perplexity", "ratio", "tasks"], 0)
    for _ in range(400):
        first, noise = random.normal(2.0, 0.4, 20), random.normal(0.1, 0.05, 20)
        predictions = [63] * 20
        one = inference.perplexity(list(first), predictions)
        both = inference.ratio(list(first + noise), list(first), predictions)
        assert one
        assert both
        covered["perplexity"] += one.low <= math.exp(2.0) <= one.high
        covered["ratio"] += both.low <= math.exp(0.1) <= both.high
        tasks = [list(random.choice([-1.0, 0.0, 1.0], size, p=[0.2, 0.5, 0.3])) for size in (30, 60)]
        mean = inference.mean_of_tasks(tasks)
        covered["tasks"] += mean.low <= 0.1 <= mean.high
    assert all(0.91 <= count / 400 <= 0.985 for count in covered.values()), covered


def test_the_paired_test_agrees_with_permutations():
    random = np.random.default_rng(1)
    others = random.normal(3, 1, 12)
    losses = others + random.normal(0.05, 0.1, 12)
    got = inference.ratio(list(losses), list(others), [10] * 12)
    assert got
    difference = losses - others
    signs = np.array(list(itertools.product((-1, 1), repeat=12)))
    permuted = np.abs((signs * difference).mean(axis=1))
    assert got.p == pytest.approx((permuted >= abs(difference.mean()) - 1e-12).mean(), abs=0.03)
    assert got.value == pytest.approx(math.exp(difference.mean()))
    unpaired = inference.perplexity(list(losses), [10] * 12)
    assert unpaired
    assert math.log(got.high / got.low) < math.log(unpaired.high / unpaired.low) / 3  # why it is paired


def test_a_shorter_window_counts_by_its_predictions():
    losses, predictions = [1.0, 2.0, 6.0], [10, 10, 5]
    got = inference.perplexity(losses, predictions)
    assert got
    assert got.value == pytest.approx(math.exp((10 + 20 + 30) / 25))


def test_nothing_is_said_of_what_is_not_finite_or_alone():
    assert inference.perplexity([1.0, math.nan], [3, 3]) is None
    assert inference.perplexity([1.0], [3]) is None
    assert inference.mean_of_tasks([[0.0] * 9, [0.0] * 9]).p == 1


def test_holm_rejects_step_by_step():
    p = [0.04, 0.001, 0.5, 0.013, 0.012]
    adjusted = inference.holm(p)
    for level in (0.005, 0.05, 0.06, 0.2):
        rejected, left = set(), sorted(range(len(p)), key=p.__getitem__)
        while left and p[left[0]] <= level / len(left):
            rejected.add(left.pop(0))
        assert {i for i, value in enumerate(adjusted) if value <= level} == rejected


# --- published rows, stale stages ---


def test_published_rows_are_compared_under_their_own_protocol_only():
    study = read_preset("llama-2-7b").settings | {"sparsity": 0.5, "method": "wanda"}

    def matches(**changes: object) -> set[float | str]:
        settings = study | {key.replace("__", "."): value for key, value in changes.items()}
        found = [(source, row) for source in sources() for row in source.rows]
        return {row["perplexity"] for source, row in found if not source.differences(settings, "perplexity", row)}

    assert matches() == {5.114, 6.415}
    assert matches(method="magnitude") == {5.114, 11.832}
    assert matches(method="magnitude", calibration__samples=1, propagation="dense") == {5.114, 11.832}
    assert matches(calibration__samples=1) == {5.114}
    assert matches(propagation="dense") == {5.114}
    assert matches(perplexity__length=2048) == {5.47}  # a source that says nothing of the rest
    assert matches(perplexity__length=1024) == set()
    assert matches(model="/data/Llama-2-7b-hf") == {5.114, 6.415}
    assert matches(model="meta-llama/Llama-2-13b-hf") == set()


def test_what_ran_on_other_parameters_is_stale_and_so_is_what_follows(tmp_path: Path):
    write_params(tmp_path, tmp_path)
    params = read_params(tmp_path / "params.yaml")

    def stage(out: str, dep: str | None = None, **asked: object) -> dict:
        deps = [{"path": dep, "md5": dep}] if dep else []
        return {"deps": deps, "params": {"params.yaml": asked}, "outs": [{"path": out, "md5": out}]}

    stages = {
        "perplexity": stage("metrics/pruned/perplexity.json", "models/pruned"),
        "apply": stage("models/pruned", "masks"),
        "mask": stage("masks", "stats", sparsity=0.5),
        "calibrate": stage("stats", dtype="float32"),
        "zero-shot": stage("metrics/dense/zero_shot/piqa.json", "data/tasks/piqa"),
    }
    assert stale_stages(stages, params) == set()
    assert stale_stages(stages | {"mask": stage("masks", "stats", sparsity=0.7)}, params) == {
        "mask",
        "apply",
        "perplexity",
    }
    anew = stage("models/pruned", "masks")
    anew["outs"][0]["md5"] = "other"
    assert stale_stages(stages | {"apply": anew}, params) == {"perplexity"}


@pytest.mark.parametrize(("pattern", "places"), [("unstructured", 4096), ("2:4", 2048 * 2), ("4:8", 2048 * 3)])
def test_bytes_are_those_of_a_packing_that_can_be_written_down(
    project: Callable[..., Project], pattern: str, places: int
):
    """Half of 4,096 weights in 16 bits: numpy's own bit packing of where they stand, and the values that stay."""
    made = project(pattern=pattern, sparsity=0.5)
    write_csv(made.plots("sparsity"), ["weights", "zeros", "bytes"], [[4096, 2048, 8192]])
    row = Row("it", None, made, {"models/dense": 10_000}, {}, [])
    kept = np.zeros(2048, np.float16).nbytes + np.packbits(np.ones(places, bool)).nbytes
    assert stored_bytes(row) == 10_000 - 8192 + kept


def test_bytes_are_not_guessed(project: Callable[..., Project]):
    made = project()
    assert stored_bytes(Row("it", None, made, {"models/dense": 10_000}, {}, [])) is None
    write_csv(made.plots("sparsity"), ["weights", "zeros", "bytes"], [[4096, 2048, 8192]])
    assert stored_bytes(Row("it", None, made, {}, {}, [])) is None


# --- what is set against what ---


def write_results(
    root: Path,
    method: str,
    sparsity: float,
    loss: float,
    right: int,
    *,
    text: str = "0",
    task: str = "0",
    rest: int = 0,
    **changes: Any,
) -> None:
    """All that an experiment leaves behind, of a text and a task with these hashes; `rest`: a shorter last window's
    tokens."""
    write_params(root, Path("/models/tiny"), method=method, sparsity=sparsity, **changes)
    project = Project(root)
    for folder in ("models/dense", "models/pruned", "data/calibration", "data/perplexity", "data/tasks/piqa"):
        write_json(root / folder / "provenance.json", {"of": [folder, method, sparsity * ("pruned" in folder)]})
    for folder in ("stats", "masks"):
        write_json(root / folder / "provenance.json", {"of": [method, sparsity] if folder == "masks" else []})
    for model, mean, count in (("dense", 2.0, 24), ("pruned", loss, right)):
        protocol = {"windows": 3 if rest else 4, "length": 64, "rest": rest or "dropped", "tokens_sha256": text}
        losses = [mean + x if math.isfinite(mean) else "diverged" for x in (-0.1, 0.0, 0.0, 0.1)]
        write_json(project.details(model, "perplexity"), {"protocol": protocol, "losses": losses})
        value = float(f"{math.exp(mean):.6g}") if math.isfinite(mean) else "diverged"
        write_json(project.metrics(model, "perplexity"), {"perplexity": value})
        write_csv(project.plots(f"{model}/perplexity"), ["window", "predictions", "loss"], [[0, 63, mean]])
        items = [{"item": i, "acc": float(i < count)} for i in range(40)]
        write_json(project.details(model, "zero_shot/piqa"), {"protocol": {"task": {"sha256": task}}, "items": items})
        write_json(project.metrics(model, "zero_shot/piqa"), {"acc": count / 40})
    write_json(project.metrics("pruned", "sparsity"), {"sparsity": sparsity})
    write_json(project.details("pruned", "sparsity"), {})
    lines = [[block, "q_proj", 1000, int(1000 * sparsity), sparsity, 4000] for block in range(2)]
    write_csv(project.plots("sparsity"), ["block", "linear", "weights", "zeros", "sparsity", "bytes"], lines)
    write_csv(project.plots("norms"), ["block"], [])
    runs = [f"download-{part}" for part in ("model", "calibration", "perplexity", "tasks")]
    runs += ["calibrate", "mask", "apply", "perplexity-dense", "perplexity-pruned"]
    for run in [*runs, "zero-shot-dense-piqa", "zero-shot-pruned-piqa"]:
        seconds = loss if run.endswith("pruned") and math.isfinite(loss) else 1.0
        time = {"seconds": round(seconds, 2), "peak_memory_gb": 0.5, "machine": "test", "device": "cpu"}
        write_json(project.times(run), time)


def said_of(tmp_path: Path, *experiments: tuple[tuple[Any, ...], dict[str, Any]]) -> str:
    """The report's content of experiments, with single spaces."""
    rows = []
    for number, (results, words) in enumerate(experiments):
        root = tmp_path / str(number)
        root.mkdir()
        write_results(root, *results, **words)
        rows.append(Row(f"e{number}", None, Project(root), {}, {}, []))
    return re.sub(r" {2,}", " ", as_markdown("study", content(Collected(rows, [], [])), "pictures"))


def test_what_read_other_windows_or_items_is_not_compared(tmp_path: Path):
    same = said_of(tmp_path, (("wanda", 0.5, 2.5, 20), {}), (("magnitude", 0.5, 3.5, 4), {}))
    assert "- Wanda 50 % against magnitude 50 %: 0.368 × the perplexity (beyond noise); +40.0 points" in same
    (tmp_path / "other").mkdir()
    other = {"text": "another", "task": "another"}
    text = said_of(tmp_path / "other", (("wanda", 0.5, 2.5, 20), {}), (("magnitude", 0.5, 3.5, 4), other))
    for pair in ("Wanda 50 % against magnitude 50 %", "magnitude 50 % against dense"):
        assert f"- {pair}: perplexities could not be compared window by window.\n" in text
        assert f"| {pair} | – |" in text
    assert "- Wanda 50 % against dense: 1.649 × the perplexity" in text


def test_intervals_in_the_report_are_those_of_the_windows(tmp_path: Path):
    """Student's t by the table: 3 degrees of freedom; and where the last window is shorter, weighted by hand."""
    half = 3.182446 * math.sqrt(0.02 / 3) / 2
    low, high = (f"{math.exp(2.5 + sign * half):.2f}" for sign in (-1, 1))
    assert f"| Wanda 50 % | 12.18 | {low} to {high} | 50.0 |" in said_of(tmp_path, (("wanda", 0.5, 2.5, 20), {}))
    (tmp_path / "rest").mkdir()
    text = said_of(tmp_path / "rest", (("wanda", 0.5, 2.5, 20), {"rest": 11}))
    shares, losses = np.array([63, 63, 63, 10]) / 199, np.array([2.4, 2.5, 2.5, 2.6])
    mean = shares @ losses
    half = 3.182446 * math.sqrt(shares**2 @ (losses - mean) ** 2 * 4 / 3)
    low, high = (f"{math.exp(mean + sign * half):.2f}" for sign in (-1, 1))
    assert f"to {high} |" in text
    assert f"| {low} to" in text


def test_p_values_are_adjusted_before_they_are_judged(tmp_path: Path):
    """Three tests: the ratio's p is 0, the task's 1, so the mean's counts twice."""
    text = said_of(tmp_path, (("wanda", 0.5, 2.5, 23), {}))
    p = stats.ttest_1samp([-1.0] + [0.0] * 39, 0).pvalue
    assert f"| < 0.001 | −2.5 | −7.6 to +2.6 | {2 * p:.3f}, within noise |" in text
    assert "3 tests were made" in text


def test_rows_are_called_by_what_they_differ_in(tmp_path: Path):
    seeds = [(("wanda", 0.5, 2.5, 20), {"calibration__seed": seed}) for seed in (0, 1)]
    text = said_of(tmp_path, *seeds)
    for seed in (0, 1):
        assert f"| Wanda (calibration.seed={seed}) 50 % | 50.0 |" in text
    assert "against Wanda" not in text  # another seed is no other method
    (tmp_path / "twins").mkdir()
    text = said_of(tmp_path / "twins", (("wanda", 0.5, 2.5, 20), {}), (("wanda", 0.5, 2.6, 20), {}))
    assert "| Wanda 50 % [e0] | 50.0 |" in text
    assert "| Wanda 50 % [e1] | 50.0 |" in text
    assert "against Wanda" not in text


def test_rows_are_one_if_parameters_and_numbers_are_the_same(tmp_path: Path):
    rows = []
    for number, (loss, changes) in enumerate([(2.5, {}), (2.5, {}), (2.6, {}), (2.5, {"calibration__seed": 1})]):
        root = tmp_path / str(number)
        root.mkdir()
        write_results(root, "wanda", 0.5, loss, 20, **changes)
        rows.append(identity(Row(f"e{number}", None, Project(root), {}, {}, [])))
    assert rows[0] == rows[1]
    assert len(set(rows)) == 3


def test_a_blocks_sparsity_is_that_of_its_weights():
    assert of_block(3, [(50, 100), (300, 400)]) == (3, 70.0, 50.0, 75.0)


def test_curves_stand_where_their_numbers_are():
    series = {"a": [Point(30, 7.0, 6.0, 8.0), Point(70, None)], "b": [Point(30, 9.0), Point(50, 700.0, 600.0, 900.0)]}
    figure = curves(series, y_label="perplexity", level=("dense", 5.0), log=True)
    [ax] = figure.axes
    lines = {line.get_label(): line for line in ax.lines}
    assert [list(lines[name].get_ydata()) for name in ("dense", "a", "b")] == [[5, 5], [7], [9, 700]]
    assert list(lines["b"].get_xdata()) == pytest.approx([30, 50], abs=0.5)
    bars = [segment[:, 1].tolist() for bars in ax.collections for segment in bars.get_segments()]
    assert bars == [[6, 8], [600, 900]]
    low, high = ax.get_ylim()
    assert low < 5
    assert high > 900
    assert ax.get_yscale() == "log"
    [edge] = [line for line in ax.lines if line.get_transform() == ax.get_xaxis_transform()]
    assert edge.get_xydata()[0] == pytest.approx((70, 1), abs=0.5)
    assert [text.get_text() for text in ax.texts] == ["a diverged"]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["30 %", "50 %", "70 %"]


def test_bars_of_time_add_up():
    bars = {"shared": {"calibrate": 4.0}, "one": {"mask": 1.0, "apply": 2.0}}
    [ax] = times(bars, ["calibrate", "mask", "apply"]).axes
    ends = [patch.get_x() + patch.get_width() for patch in ax.patches if patch.get_width()]
    assert ends == [4, 1, 3]
    assert [text.get_text() for text in ax.texts] == ["4 s", "3 s"]


# --- the page ---


class Study:
    """A repository whose stages were run elsewhere, it seems: their outs are written, and DVC told of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.run("git", "init", "--quiet", "--initial-branch", "main")
        self.run("git", "config", "user.name", "test")
        self.run("git", "config", "user.email", "test@example.org")
        self.run("dvc", "init", "--quiet")
        for name in ("dvc.yaml", ".gitignore", ".dvc/config"):
            shutil.copyfile(ROOT / name, root / name)

    def run(self, *words: str) -> str:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, "DVC_NO_ANALYTICS": "1", "PYTHONWARNINGS": "ignore"}
        environment.pop("DVC_ROOT", None)
        done = subprocess.run(words, cwd=self.root, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def write(self, *results: Any) -> None:
        write_results(self.root, *results)

    def save(self, name: str) -> None:
        self.run("dvc", "commit", "--force", "--quiet")
        if name == "main":
            self.run("git", "add", "--all")
            self.run("git", "commit", "--quiet", "--message", "state")
        else:
            self.run("dvc", "exp", "save", "--quiet", "--force", "--name", name)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Path, str]:
    """The report of four experiments, one diverged and one without its losses in the cache; one more is queued, and
    an older commit has other numbers."""
    root = tmp_path_factory.mktemp("report") / "study"
    root.mkdir()
    study = Study(root)
    study.write("wanda", 0.5, 2.7, 19)
    study.save("main")
    study.write("wanda", 0.5, 2.5, 20)
    study.save("main")
    study.write("magnitude", 0.5, 3.5, 4)
    study.save("middling")
    study.write("magnitude", 0.7, math.nan, 12)
    study.save("worst")
    study.write("wanda", 0.7, 3.0, 23)
    lost = (root / "metrics/details/pruned/perplexity.json").read_bytes()
    study.save("lost")
    cached = [path for path in (root / ".dvc/cache").rglob("*") if path.is_file() and path.read_bytes() == lost]
    assert len(cached) == 1
    study.run("git", "checkout", "--", ".")
    study.run("dvc", "exp", "run", "--queue", "--name", "waiting", "--set-param", "sparsity=0.3")
    study.run("dvc", "checkout", "--force")
    cached[0].unlink()
    output = root.parent / "out" / "report.html"
    return study, output, report(project=Project(root), output=output)


class Page(HTMLParser):
    """Its tags' balance, its text, and what it refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.texts, self.references, self.ids = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self.references += [value for name, value in attrs if name in ("href", "src", "xlink:href", "data")]
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "svg"} & set(self.open):
            self.texts.append(data)


@pytest.mark.pipeline
def test_the_page_stands_on_its_own(written: tuple[Study, Path, str]):
    text = written[1].read_text(encoding="utf-8")
    page = Page(text)
    assert all(reference and reference.startswith("#") for reference in page.references)
    assert {reference[1:] for reference in page.references} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    for outside in ("http", "src=", "@import", "<script", "url(/", str(written[0].root.parent)):
        assert outside not in text
    assert text.count("<svg") == text.count("<desc") >= 7
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    assert not re.search(r"#0[a1]0[b2]0\d", text)  # no stand-in for a colour is left


@pytest.mark.pipeline
def test_html_and_markdown_say_the_same(written: tuple[Study, Path, str]):
    markdown = written[1].with_suffix(".md").read_text(encoding="utf-8")
    page = " ".join(Page(written[1].read_text(encoding="utf-8")).texts)
    words = re.compile(r"\w[\w,.]*\w|\w")
    plain = re.sub(r"!\[.*?\]\(.*?\)", "", markdown)
    assert set(words.findall(plain)) == set(words.findall(page))
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", markdown)
    assert len(pictures) >= 7
    assert all((written[1].parent / picture).is_file() for picture in pictures)


@pytest.mark.pipeline
def test_the_report_says_what_is_so(written: tuple[Study, Path, str]):
    study, output, said = written
    assert said.startswith(f"{output}: 4 rows, 1 unfinished or failed")
    text = re.sub(r" {2,}", " ", output.with_suffix(".md").read_text(encoding="utf-8"))
    improvement = 100 * (1 - math.exp(2.5) / math.exp(3.5))
    for expected in (
        f"| 50 % | 7.39 | 33.12 | 12.18 | {improvement:.1f} % |",
        "| 70 % | 7.39 | diverged | 20.09 | – (magnitude diverged) |",
        "| Wanda 50 % | 50.0 | 50.0 | 83.3 |",
        "magnitude 50 % against dense: 4.482 × the perplexity (beyond noise); −50.0 points of mean accuracy (beyond "
        "noise).",
        "magnitude 70 % against dense: its perplexity diverged",
        "Wanda 70 % against dense: perplexities could not be compared window by window; −2.5 points of mean accuracy "
        "(within noise).",
        "| Wanda 70 % against dense | 0 / 1 |",
        "| magnitude 50 % against dense | 0 / 20 * |",
        "| shared by the rows | 4.0 | 1.0 | – | – | 1.0 | 1.0 | 7.0 |",
        "| Wanda 50 % | – | – | 1.0 | 1.0 | 2.5 | 1.0 | 5.5 |",
        "Diverged, and so at the upper edge: magnitude 70 %",
        "No published row that this report knows has the protocol",
        "waiting: queued (sparsity=0.3)",
        "lost: not in DVC's cache, and so not read: metrics/details/pruned/perplexity.json",
        "main, workspace",
        "-S sparsity=0.7",
    ):
        assert expected in text
    tests = int(re.search(r"(\d+) tests were made", text)[1])
    # Each of 4 against dense in one task and the mean, 2 methods' pairs likewise; perplexity where both have losses.
    assert tests == 6 * 2 + 3
    assert study.run("git", "status", "--porcelain") == ""
    assert not [path for path in (study.root / ".dvc/tmp/wanda-dvc").iterdir() if path.is_dir()]


@pytest.mark.pipeline
def test_a_killed_experiment_that_counts_as_running_is_named_as_the_cause(
    written: tuple[Study, Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """`dvc exp show` fails so, too, after `dvc queue stop --kill` if a worker had already taken the next one."""
    from dvc.repo.experiments.queue.base import QueueEntry
    from dvc.repo.experiments.queue.celery import LocalCeleryQueue

    root, head = str(written[0].root), written[0].run("git", "rev-parse", "HEAD").strip()
    entry = QueueEntry(root, root, "refs/exps/celery/stash", "1" * 40, head, None, "lost")
    monkeypatch.setattr(LocalCeleryQueue, "iter_active", lambda _: iter([entry]))
    with pytest.raises(UserError, match=r"may still count as running: .*`dvc queue kill NAME` clears it"):
        report(project=Project(written[0].root), output=tmp_path / "report.html")


@pytest.mark.pipeline
def test_numbers_of_other_parameters_are_left_out(written: tuple[Study, Path, str], tmp_path: Path):
    study, _, _ = written
    params = (study.root / "params.yaml").read_text(encoding="utf-8")
    try:
        (study.root / "params.yaml").write_text(params.replace("sparsity: 0.5", "sparsity: 0.9"), encoding="utf-8")
        report(project=Project(study.root), output=tmp_path / "report.html")
    finally:
        (study.root / "params.yaml").write_text(params, encoding="utf-8")
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "workspace: not run on these parameters, and left out: " in text
    assert "Wanda 90 %" not in text
    with pytest.raises(UserError, match="no experiment of a model named like large with results"):
        report(project=Project(study.root), output=tmp_path / "report.html", model="large")
    number = study.root / "metrics/pruned/perplexity.json"
    by_dvc = number.read_bytes()
    try:
        number.write_text('{"perplexity": 987.25}', encoding="utf-8")  # by hand: not what dvc.lock knows of
        report(project=Project(study.root), output=tmp_path / "report.html", model="TINY")
    finally:
        number.write_bytes(by_dvc)
    assert "987.25" not in (tmp_path / "report.md").read_text(encoding="utf-8")
    report(project=Project(study.root), output=tmp_path / "report.html", revs=["middling"])
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "magnitude 50 %" in text
    assert "Wanda 50 %" not in text
