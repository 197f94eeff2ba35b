"""The report: its laws of inference, and the page on a real DVC repository with experiments of every kind."""

import ast
import html
import itertools
import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, write_params
from markdown_it import MarkdownIt
from matplotlib.collections import LineCollection
from repository import Repository
from ruamel.yaml import YAML
from scipy import stats

from wanda_dvc.catalog import methods
from wanda_dvc.engine import flips
from wanda_dvc.errors import UserError
from wanda_dvc.params import check_params
from wanda_dvc.report import report
from wanda_dvc.report.chapters import content, published
from wanda_dvc.report.chapters.structure import by_block, stored_bytes
from wanda_dvc.report.charts import Point, accuracies, curves, svg
from wanda_dvc.report.comparisons import paired_mean
from wanda_dvc.report.pages import Content, Picture, as_html, as_markdown, heading, table, write
from wanda_dvc.report.rows import Collected, Note, Row, identity
from wanda_dvc.report.section import Section, differences, sections
from wanda_dvc.results import inference
from wanda_dvc.study.files import write_csv, write_json
from wanda_dvc.study.local import sources
from wanda_dvc.study.markup import inline
from wanda_dvc.study.project import Project
from wanda_dvc.study.settings import nested, read_preset, resolved
from wanda_dvc.study.tensors import seal


def found(pattern: str, text: str) -> str:
    """The first group of a pattern that is there."""
    match = re.search(pattern, text)
    assert match
    return match[1]


def row_of(study: Project, sizes: dict[str, int] | None = None, *, name: str = "it") -> Row:
    """The row of a study on disk."""
    outs = {path: {"size": size} for path, size in (sizes or {}).items()}
    return Row(name, None, study, outs, [])


def test_a_row_with_damaged_details_says_so(tmp_path: Path):
    study = Project(tmp_path)
    write_params(tmp_path, "org/model")
    assert row_of(study).damage is None
    write_json(study.details("pruned", "layer_error"), {"linears": {"a": {"error": "0.1"}}, "protocol": {"model": "m"}})
    expected = "metrics/details/pruned/layer_error.json: linears.a.error: found '0.1', expected a valid number; run "
    assert (row_of(study).damage or "").startswith(expected)


# --- inference ---


def test_mcnemar_is_the_fair_coin_counted_out():
    """Every outcome of the disagreements, counted one by one."""
    for first, second in itertools.product(range(6), repeat=2):
        total = first + second
        mine = [True] * first + [False] * second + [True, False]
        theirs = [False] * first + [True] * second + [True, False]
        got = flips.mcnemar(mine, theirs)
        outcomes = [sum(coins) for coins in itertools.product((0, 1), repeat=total)]
        as_far = [heads for heads in outcomes if abs(heads - total / 2) >= abs(first - total / 2)]
        assert (got.first, got.second) == (first, second)
        assert got.p == pytest.approx(len(as_far) / len(outcomes))


def test_flips_are_counted_by_the_answers_before_and_after():
    right, wrong, another = flips.Answer(0, True), flips.Answer(1, False), flips.Answer(2, False)
    pairs = (
        [(right, right)] * 3 + [(right, wrong)] * 5 + [(wrong, right)] * 2 + [(wrong, another)] * 4 + [(wrong, wrong)]
    )
    found = flips.flips(*map(list, zip(*pairs, strict=True)))
    assert found[:4] == (15, 5, 2, 4)
    assert found.changed == 11
    assert found.p == pytest.approx(stats.binomtest(2, 7).pvalue)
    same = flips.flips([right, wrong], [right, wrong])
    assert (same.changed, same.p) == (0, 1.0)
    total = flips.total_flips([found, same])
    assert total
    assert total[:4] == (17, 5, 2, 4)
    assert total.p == found.p
    assert flips.total_flips([]) is None
    many = flips.mcnemar([True] * 900 + [False] * 1000, [False] * 900 + [True] * 1000)
    assert many.p == pytest.approx(stats.binomtest(900, 1900).pvalue)


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
        assert mean
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
    same = inference.mean_of_tasks([[0.0] * 9, [0.0] * 9])
    assert same
    assert same.p == 1


@pytest.mark.parametrize("tasks", [[[-1.0]], [[-1.0, -1.0]], [[1.0, 0.0, 1.0], [1.0]], [[1.0] * 3, [0.0] * 3]])
def test_what_does_not_vary_is_no_evidence(tasks: list[list[float]]):
    """A t interval of no width would say that one item is beyond noise."""
    assert inference.mean_of_tasks(tasks) is None


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
    study = read_preset("llama-2-7b") | {"sparsity": 0.5, "calibration.statistics": "gradients"}

    def matches(measure: str = "perplexity", **changes: object) -> set[float | str]:
        changed = study | {key.replace("__", "."): value for key, value in changes.items()}
        params = check_params(nested(changed))
        settings = resolved(params) | published.text_settings(params, "wikitext2")
        found = [(source, row) for source in published.sources() for row in source.rows if measure in row]
        return {row[measure] for source, row in found if not source.differences(settings, measure, row)}

    assert matches() == {5.114, 6.415}
    assert matches(method="magnitude") == {5.114, 11.832}
    assert matches(method="magnitude", calibration__windows=1, propagation="dense") == {5.114, 11.832}
    assert matches(calibration__windows=1) == {5.114}
    assert matches(propagation="dense") == {5.114}
    assert matches(reconstruction="blockwise") == matches(allocation="owl") == {5.114}  # of plain Wanda alone
    assert matches(perplexity__length=2048) == {5.47}  # a source that says nothing of the rest
    assert matches(perplexity__length=1024) == set()
    assert matches(model="/data/Llama-2-7b-hf") == {5.114, 6.415}
    assert matches(model="meta-llama/Llama-2-13b-hf") == set()
    assert matches("piqa") == {78.13, 76.06}
    assert matches("piqa", zero_shot__limit=4) == set()


@pytest.mark.parametrize(("pattern", "places"), [("unstructured", 4096), ("2:4", 2048 * 2), ("4:8", 2048 * 3)])
def test_bytes_are_those_of_a_packing_that_can_be_written_down(
    project: Callable[..., Project], pattern: str, places: int
):
    """Half of 4,096 weights in 16 bits: numpy's own bit packing of where they stand, and the values that stay."""
    made = project(pattern=pattern, sparsity=0.5)
    write_csv(made.plots("sparsity"), ["weights", "zeros", "bytes"], [[4096, 2048, 8192]])
    row = row_of(made, {"models/dense": 10_000})
    kept = np.zeros(2048, np.float16).nbytes + np.packbits(np.ones(places, bool)).nbytes
    assert stored_bytes(row) == 10_000 - 8192 + kept


def test_bytes_are_not_guessed(project: Callable[..., Project]):
    made = project()
    assert stored_bytes(row_of(made, {"models/dense": 10_000})) is None
    write_csv(made.plots("sparsity"), ["weights", "zeros", "bytes"], [[4096, 2048, 8192]])
    assert stored_bytes(row_of(made)) is None


def test_the_bytes_of_a_smaller_model_are_its_own(project: Callable[..., Project]):
    made = project(pattern="neurons", sparsity=0.25)
    write_csv(made.plots("sparsity"), ["weights", "zeros", "bytes"], [[4096, 1024, 8192]])
    assert stored_bytes(row_of(made, {"models/dense": 10_000, "models/pruned": 7900})) == 7900
    assert stored_bytes(row_of(made, {"models/dense": 10_000})) is None


# --- what is set against what ---


def divergence_of(mean: float) -> dict[str, Any]:
    """Measures of a pruned model with this mean divergence."""
    names = ("divergence", "top1_agreement", "rms_probability_change")
    if not math.isfinite(mean):
        return dict.fromkeys(names, "diverged")
    kl = {"mean": mean, "low": 0.9 * mean, "high": 1.1 * mean, "median": mean / 2, "p99": 2 * mean, "largest": 3 * mean}
    return dict(zip(names, (kl, {"mean": 0.5, "low": 0.45, "high": 0.55}, 0.125), strict=True))


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
    layer_error: float | None = None,
    **changes: Any,
) -> None:
    """All that an experiment leaves behind, of a text and a task with these hashes.

    `rest`: a shorter last window's tokens. `layer_error`: of a linear.
    """
    write_params(root, Path("/models/tiny"), method=method, sparsity=sparsity, **changes)
    project = Project(root)
    for folder in ("models/dense", "models/pruned", "data/calibration", "data/perplexity/embedded", "data/tasks/piqa"):
        write_json(
            root / folder / "provenance.json", {"of": [folder, *([method, sparsity] if "pruned" in folder else [])]}
        )
    for part in sources(project.params):
        write_json(project.source(part), {"source": part})
    for tier in (project.stats, project.gram, project.gradients):
        tier.mkdir(parents=True, exist_ok=True)
        seal(tier, {"made_by": "calibrate", "model": {"sha256": "model"}, "text": {"sha256": "text"}})
    write_csv(project.plots("divergence/embedded"), ["window", "divergence"], [[0, loss]])
    write_csv(project.plots("perplexity/embedded"), ["window", "predictions", "dense", "pruned"], [[0, 63, 2.0, loss]])
    for folder in ("masks", "weights", "reference/embedded"):
        write_json(root / folder / "provenance.json", {"of": [method, sparsity]})
    for model, mean, count in (("dense", 2.0, 24), ("pruned", loss, right)):
        of = {"model": [method, sparsity] if model == "pruned" else [], "text": {"sha256": text, "source": "a text"}}
        protocol = of | {
            "dtype": "float32",
            "windows": 3 if rest else 4,
            "length": 64,
            "rest": rest or "dropped",
            "tokens_sha256": text,
        }
        losses = [mean + x if math.isfinite(mean) else "diverged" for x in (-0.1, 0.0, 0.0, 0.1)]
        write_json(project.details(model, "perplexity/embedded"), {"protocol": protocol, "losses": losses})
        weighted = mean + (0.1 * (rest - 1 - 63) / (3 * 63 + rest - 1) if rest else 0)  # the last loss counts less
        value = float(f"{math.exp(weighted):.6g}") if math.isfinite(mean) else "diverged"
        apart = divergence_of(mean - 2.0) if model == "pruned" else {}
        write_json(project.metrics(model, "perplexity/embedded"), {"perplexity": value} | apart)
        wrong = 2 if model == "pruned" else 1
        items = [{"item": i, "answer": wrong * (i >= count), "acc": float(i < count)} for i in range(40)]
        answered = {"protocol": of | {"task": {"sha256": task}}, "items": items}
        write_json(project.details(model, "zero_shot"), {"tasks": {"piqa": answered}})
        tokens = [1, 2, 3, 4] * 2 if model == "pruned" else list(range(1, 9))
        written = {"prompt": "The *sea*", "text": f"is {model}", "tokens": tokens}
        write_json(project.details(model, "continuations"), {"protocol": of, "prompts": [written]})
        write_csv(project.plots(f"{model}/zero_shot"), ["task", "item", "acc"], [["piqa", 0, 1.0]])
        write_json(project.metrics(model, "zero_shot"), {"piqa": {"acc": count / 40}})
    write_json(project.metrics("pruned", "sparsity"), {"sparsity": sparsity})
    write_json(project.details("pruned", "sparsity"), {})
    linears = {} if layer_error is None else {"q_proj": {"error": layer_error, "masked": layer_error}}
    write_json(
        project.details("pruned", "layer_error"), {"protocol": {"model": [method, sparsity]}, "linears": linears}
    )
    lines = [[block, "q_proj", 1000, int(1000 * sparsity), sparsity, 4000] for block in range(2)]
    write_csv(project.plots("sparsity"), ["block", "linear", "weights", "zeros", "sparsity", "bytes"], lines)
    errors = [[block, "q_proj", sparsity / (2 + block), sparsity] for block in range(2)]
    write_csv(project.plots("layer_error"), ["block", "linear", "error", "masked"], errors)
    write_csv(project.plots("norms"), ["block"], [])


def said_of(tmp_path: Path, *experiments: tuple[tuple[Any, ...], dict[str, Any]]) -> str:
    """The report's content of experiments, with single spaces."""
    rows = []
    for number, (results, words) in enumerate(experiments):
        root = tmp_path / str(number)
        root.mkdir()
        write_results(root, *results, **words)
        rows.append(row_of(Project(root), name=f"e{number}"))
    return re.sub(r" {2,}", " ", as_markdown(content(Collected(rows, [], [])), "pictures"))


def test_an_allocation_is_measured_by_uniform(tmp_path: Path):
    """On the text, on the calibration's layer errors, and with a test of the difference; all else must be equal."""
    sloping = {"allocation": "owl", "allocation_strength": 0.01, "layer_error": 0.04}
    uniform = (("wanda", 0.5, 2.4, 20), {"layer_error": 0.05})
    said = said_of(tmp_path, uniform, (("wanda", 0.5, 2.5, 20), sloping))
    between = "wanda (allocation=owl, allocation_strength=0.01) 50 % against wanda 50 %"
    assert f"- {between}: 1.105 × the perplexity (beyond noise); " in said
    assert "; mean layer error 4.00 % instead of 5.00 %.\n" in said
    (tmp_path / "other").mkdir()
    other = ("wanda", 0.6, 2.4, 20), {"layer_error": 0.05}
    assert "instead of" not in said_of(tmp_path / "other", other, (("wanda", 0.5, 2.5, 20), sloping))


def test_what_read_other_windows_or_items_is_not_compared(tmp_path: Path):
    same = said_of(tmp_path, (("wanda", 0.5, 2.5, 20), {}), (("magnitude", 0.5, 3.5, 4), {}))
    assert "- wanda 50 % against magnitude 50 %: 0.368 × the perplexity (beyond noise); +40.0 points" in same
    (tmp_path / "other").mkdir()
    other = {"text": "another", "task": "another"}
    text = said_of(tmp_path / "other", (("wanda", 0.5, 2.5, 20), {}), (("magnitude", 0.5, 3.5, 4), other))
    assert "measured in 2 ways, which differ in `data/perplexity/embedded`, `data/tasks/piqa`" in text
    assert "against magnitude" not in text
    assert "- wanda 50 % against dense: 1.649 × the perplexity" in text
    assert "- magnitude 50 % against dense: 4.482 × the perplexity" in text


def test_each_text_has_its_tables_and_its_kind(tmp_path: Path):
    """The calibration's source is embedded here, so a reader sees on which text a solver gains by its own text."""
    texts = {"embedded": {"source": "embedded"}, "other": {"source": "/data/other.txt"}}
    rows = []
    for name, results in {"a": ("wanda", 0.5, 2.5, 20), "b": ("magnitude", 0.5, 3.5, 4)}.items():
        root = tmp_path / name
        root.mkdir()
        write_results(root, *results, perplexity__texts=texts, model="/data/models/small")
        project = Project(root)
        for model in ("dense", "pruned"):
            for file in (project.details, project.metrics):
                shutil.copyfile(file(model, "perplexity/embedded"), file(model, "perplexity/other"))
        rows.append(row_of(project, name=name))
    said = re.sub(r" {2,}", " ", as_markdown(content(Collected(rows, [], [])), "pictures"))
    own, other = "embedded (the calibration's source)", "other (another source)"
    for text in (own, other):
        assert f"Perplexity on {text}" in said
        assert f"On {text}. Predictions of each next token" in said
        assert f"0.368 × the perplexity on {text} (beyond noise)" in said
    assert f"Paired: perplexity on {other}" in said
    assert "pictures/s0-perplexity.svg" in said
    assert "pictures/s0-other-perplexity.svg" in said
    assert "Perplexity on other: the first 4 windows of 64 tokens of other.txt" in said
    assert "/data/" not in said  # a report is for others, as the card is


def test_local_paths_are_shown_only_as_far_as_they_tell_rows_apart(tmp_path: Path):
    def said(*sources: str) -> str:
        folder, one = tmp_path / Path(sources[0]).stem, ("wanda", 0.5, 2.5, 20)
        folder.mkdir()
        return said_of(folder, *((one, {"calibration__text__source": source}) for source in sources))

    assert "/data/" not in (text := said("/data/a/one.txt", "/data/b/two.txt"))
    assert "calibration.text.source=one.txt" in text
    text = said("/data/a/same.txt", "/data/b/same.txt")  # else both would be on one curve
    assert "calibration.text.source=/data/a/same.txt" in text
    assert "calibration.text.source=/data/b/same.txt" in text


def test_a_row_without_a_sections_first_text_has_no_figure_of_another(tmp_path: Path):
    texts = {"embedded": {"source": "embedded"}, "other": {"source": "/data/other.txt"}}
    rows = []
    for name, loss, names in (("a", 2.5, ["embedded", "other"]), ("b", 3.5, ["other"]), ("c", 3.5, ["embedded"])):
        root = tmp_path / name
        root.mkdir()
        write_results(root, "wanda" if name == "a" else "magnitude", 0.5, loss, 20, perplexity__texts=texts)
        params = YAML().load(root / "params.yaml")
        params["perplexity"]["texts"] = {text: texts[text] for text in names}
        YAML().dump(params, root / "params.yaml")
        project = Project(root)
        for model in ("dense", "pruned"):
            for file in (project.details, project.metrics):
                shutil.copyfile(file(model, "perplexity/embedded"), file(model, "perplexity/other"))
                if "other" not in names:
                    file(model, "perplexity/other").unlink()
                if "embedded" not in names:
                    file(model, "perplexity/embedded").unlink()
        rows.append(row_of(project, name=name))
    said = re.sub(r" {2,}", " ", as_markdown(content(Collected(rows, [], [])), "pictures"))
    lines = [line for line in said.splitlines() if line.startswith(r"| magnitude 50 % \[b\] | – |")]
    assert lines
    assert not [line for line in lines if "33.1" in line]
    for name, text in (("b", "other"), ("c", "embedded")):  # on one text there is no other row of this label
        assert f"- magnitude 50 % \\[{name}\\] against dense: 4.482 × the perplexity on {text}" in said
    assert "| perplexity.texts." not in said


def test_experiments_of_one_name_on_two_commits_have_their_own_figures(tmp_path: Path):
    rows = []
    for commit, sparsity, loss in (("a" * 40, 0.5, 2.5), ("b" * 40, 0.7, 3.5)):
        (tmp_path / commit).mkdir()
        write_results(tmp_path / commit, "wanda", sparsity, loss, 20)
        rows.append(replace(row_of(Project(tmp_path / commit), name="same"), commit=commit))
    said = as_markdown(content(Collected(rows, [], [])), "pictures")
    assert "- wanda 50 % against dense: 1.649 × the perplexity" in said
    assert "- wanda 70 % against dense: 4.482 × the perplexity" in said
    twins = [replace(rows[0], commit=commit) for commit in ("a" * 40, "b" * 40)]
    section = Section(twins, {})
    assert [section.label(row) for row in twins] == ["wanda 50 % [same] [aaaaaaa]", "wanda 50 % [same] [bbbbbbb]"]


def test_a_row_with_damaged_details_of_a_later_text_says_so(tmp_path: Path):
    texts = {"embedded": {"source": "embedded"}, "other": {"source": "/data/other.txt"}}
    write_results(tmp_path, "wanda", 0.5, 2.5, 20, perplexity__texts=texts)
    assert row_of(Project(tmp_path)).damage is None
    write_json(Project(tmp_path).details("pruned", "perplexity/other"), {"losses": "none"})
    assert (row_of(Project(tmp_path)).damage or "").startswith("metrics/details/pruned/perplexity/other.json: ")


def test_a_row_is_compared_with_its_own_dense_model(tmp_path: Path):
    """A directory whose weights were replaced between two runs; of a third row the model is not known."""
    rows = []
    for number, (loss, sha) in enumerate([(2.5, "a" * 64), (2.6, "b" * 64), (2.7, None)]):
        root = tmp_path / str(number)
        root.mkdir()
        write_results(root, "wanda", round(0.4 + 0.1 * number, 1), loss, 20)
        if sha:
            write_json(root / "models/dense/provenance.json", {"sha256": sha})
        rows.append(row_of(Project(root), name=f"e{number}"))
    groups = sections(rows)
    assert [[row.name for row in group.rows] for group in groups] == [["e0", "e2"], ["e1"]]
    assert differences(groups) == ["models/dense"]


def test_each_of_two_rows_with_the_same_parameters_has_a_line(tmp_path: Path):
    text = said_of(
        tmp_path, (("wanda", 0.5, 2.5, 20), {}), (("wanda", 0.5, 3.0, 20), {}), (("magnitude", 0.5, 3.5, 4), {})
    )
    assert "| 50 % \\[e0\\] | 7.39 | 33.12 | 12.18 |" in text
    assert "| 50 % \\[e1\\] | 7.39 | 33.12 | 20.09 |" in text


def test_intervals_in_the_report_are_those_of_the_windows(tmp_path: Path):
    """Student's t by the table: 3 degrees of freedom; and where the last window is shorter, weighted by hand."""
    half = 3.182446 * math.sqrt(0.02 / 3) / 2
    low, high = (f"{math.exp(2.5 + sign * half):.2f}" for sign in (-1, 1))
    assert f"| wanda 50 % | 12.18 | {low} to {high} | 50.0 |" in said_of(tmp_path, (("wanda", 0.5, 2.5, 20), {}))
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
    assert "makes 3 tests" in text
    assert "0.15 of 3 on average would fall below 0.05" in text


def test_rows_are_called_by_what_they_differ_in(tmp_path: Path):
    seeds = [(("wanda", 0.5, 2.5, 20), {"calibration__seed": seed}) for seed in (0, 1)]
    text = said_of(tmp_path, *seeds)
    for seed in (0, 1):
        assert f"| wanda (calibration.seed={seed}) 50 % | 50.0 |" in text
    assert "against wanda" not in text  # another seed is no other method
    (tmp_path / "twins").mkdir()
    text = said_of(tmp_path / "twins", (("wanda", 0.5, 2.5, 20), {}), (("wanda", 0.5, 2.6, 20), {}))
    assert "| wanda 50 % \\[e0\\] | 50.0 |" in text
    assert "| wanda 50 % \\[e1\\] | 50.0 |" in text
    assert "against wanda" not in text


def test_rows_are_one_if_parameters_and_numbers_are_the_same(tmp_path: Path):
    rows = []
    seed: dict[str, Any] = {"calibration__seed": 1}
    for number, (loss, changes) in enumerate([(2.5, {}), (2.5, {}), (2.6, {}), (2.5, seed)]):
        root = tmp_path / str(number)
        root.mkdir()
        write_results(root, "wanda", 0.5, loss, 20, **changes)
        rows.append(identity(row_of(Project(root), name=f"e{number}")))
    assert rows[0] == rows[1]
    assert len(set(rows)) == 3


def test_an_interval_of_accuracies_stays_within_0_and_100(tmp_path: Path):
    """Where the t interval of 39 of 40 ends at 102.6 %, it is cut off."""
    answers = [[True] * 39 + [False], [False] * 39 + [True]]
    plain = inference.mean_of_tasks([[float(x) for x in answers[0]]])
    most, least = inference.mean_accuracy(answers[:1]), inference.mean_accuracy(answers[1:])
    assert plain
    assert most
    assert least
    assert (plain.high > 1, most.high, least.low) == (True, 1, 0)
    assert inference.mean_accuracy(answers) == inference.mean_of_tasks(answers)
    best, worst = [[True, True, False]], [[False, False, False]]
    difference = paired_mean([(best[0], worst[0])])
    assert difference
    assert difference.high == 1
    text = said_of(tmp_path, (("wanda", 0.5, 2.5, 39), {}))
    assert re.search(r"\| wanda 50 % \| 12.18 \| [\d.]+ to [\d.]+ \| 97.5 \| 92.4 to 100.0 \|", text)


def test_a_smaller_model_is_named_by_its_units_and_the_parameters_that_went(tmp_path: Path):
    write_results(tmp_path, "wanda", 0.25, 2.5, 20, pattern="neurons")
    made = Project(tmp_path)
    write_json(made.metrics("pruned", "sparsity"), {"sparsity": 0.25, "removed_parameters": 0.125})
    text = as_markdown(content(Collected([row_of(made)], [], [])), "pictures")
    assert (
        "- wanda neurons 25 %: 25 % of the neurons of each MLP were removed, 12.5 % of the model's parameters." in text
    )
    assert "| 25 % neurons, 12.5 % of all parameters |" in text


def test_any_two_methods_are_compared_in_the_order_of_the_catalog(tmp_path: Path):
    results = [(method, 0.5, loss, 20) for method, loss in (("wanda-variant", 2.4), ("wanda", 2.5), ("magnitude", 3.5))]
    text = said_of(tmp_path, *((one, {}) for one in results))
    for pair in (
        "- wanda 50 % against magnitude 50 %: 0.368 ×",
        "- wanda-variant 50 % against magnitude 50 %: 0.333 ×",
        "- wanda-variant 50 % against wanda 50 %: 0.905 ×",
    ):
        assert pair in text
    assert text.count(" against magnitude 50 %:") == 2
    assert "| sparsity | dense | magnitude | wanda | wanda-variant | wanda's improvement | wanda-variant's" in text
    assert "| 50 % | 7.39 | 33.12 | 12.18 | 11.02 | 63.2 % | 66.7 % |" in text


def test_an_improvement_is_only_said_of_methods_that_are_there(tmp_path: Path):
    assert "improvement" not in said_of(tmp_path, (("wanda", 0.5, 2.5, 20), {}))
    (tmp_path / "two").mkdir()
    text = said_of(tmp_path / "two", (("wanda", 0.5, 2.5, 20), {}), (("wanda-variant", 0.5, 2.4, 20), {}))
    assert "an improvement over wanda is 1 − perplexity / wanda's." in text
    assert "magnitude" not in text.partition("### Reproduction")[0].partition("### Published")[0]


def test_sections_are_called_by_what_they_differ_in(tmp_path: Path):
    one = ("wanda", 0.5, 2.5, 20)
    text = said_of(tmp_path, (one, {}), (one, {"perplexity__windows": 3}), (one, {"perplexity__windows": None}))
    assert "3 ways, which differ in `perplexity.windows`." in text
    for windows in ("4", "3", "null"):
        assert f"## tiny (perplexity.windows={windows})\n" in text
        assert f"### Zero-shot accuracy (perplexity.windows={windows})\n" in text
    (tmp_path / "models").mkdir()
    models = ["/a/tiny", "/b/tiny", "/b/small"]
    text = said_of(tmp_path / "models", *((one, {"model": model}) for model in models))
    assert re.findall(r"^## (.*)$", text, re.MULTILINE)[:3] == ["/a/tiny", "/b/tiny", "small"]
    assert "### Summary (small)\n" in text


def test_results_of_two_versions_of_a_stage_are_in_two_sections(tmp_path: Path):
    rows = []
    for number, (key, value) in enumerate({"version": 8, "limit": 10, "": 0}.items()):
        study = Project(tmp_path / str(number))
        study.root.mkdir()
        write_results(study.root, "wanda", 0.5, 2.5, 20)
        details = json.loads(study.details("pruned", "zero_shot").read_text())
        known = {"version": 9, "limit": 48} | ({key: value} if key else {})
        details["tasks"]["piqa"]["protocol"] |= known
        write_json(study.details("pruned", "zero_shot"), details)
        rows.append(row_of(study, name=f"row {number}"))
    found = sections(rows)
    assert [one.title for one in found] == [
        "tiny (zero-shot --version=8; items of a task=48)",
        "tiny (zero-shot --version=9; items of a task=10)",
        "tiny (zero-shot --version=9; items of a task=48)",
    ]


def test_ids_are_unique_whatever_the_sections_are_called(tmp_path: Path):
    rows = []
    for number, model in enumerate(["/a/Perplexity", "/b/perplexity", "/b/模型"]):
        (tmp_path / str(number)).mkdir()
        write_results(tmp_path / str(number), "wanda", 0.5, 2.5, 20, model=model)
        rows.append(row_of(Project(tmp_path / str(number)), name=model))
    page = Page(
        as_html(as_markdown([heading(1, "study"), *content(Collected(rows, [], []))], "pictures"), AnyPicture())
    )
    assert len(page.ids) == len(set(page.ids))
    assert {reference[1:] for reference in page.references} <= set(page.ids)
    assert len(page.references) == 4  # each section, and what is excluded


def test_no_method_is_known_by_name():
    """A method is a row of the catalog: the report's code names none."""
    found = set()
    for path in (ROOT / "src/wanda_dvc/report").rglob("*.py"):
        constants = {
            node.value for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Constant)
        }
        names = {name for method in methods().values() for name in (method.name, method.title)}
        found |= {(path.name, name) for name in constants & names}
    assert not found


# --- what comes from outside ---


class AnyPicture(dict[str, str]):
    """An empty picture of any name."""

    def __missing__(self, name: str) -> str:
        return f'<svg id="{name}_"></svg>'


HOSTILE = "<script>alert(1)</script>|`code`|``|&lt;[x](y)|*a*|__b__|$c$|0.12345|\\"
FILE = f"{HOSTILE.replace('/', '')}.txt"


def hostile_content(tmp_path: Path) -> Content:
    """The report of two experiments whose names, model, text and seeds are markup."""
    rows = []
    for number in (0, 1):
        root = tmp_path / str(number)
        root.mkdir()
        write_results(
            root, "wanda", 0.5, 2.5 + number, 20, model=f"/m/{HOSTILE.replace('/', '')}",
            perplexity__texts__embedded__source=f"/t/{FILE}",
        )  # fmt: skip
        row = row_of(Project(root), name=f"{number}{HOSTILE}")
        rows.append(row)
    unfinished = [Note(HOSTILE, f"queued (model={HOSTILE})")]
    return content(Collected(rows, unfinished, [Note(HOSTILE, "no results")]))


def test_html_shows_names_as_they_are(tmp_path: Path):
    parts = hostile_content(tmp_path)
    drawn = {f"{part.name}.svg": svg(part.figure, part.name) for part in parts if isinstance(part, Picture)}
    text = as_html(as_markdown([heading(1, inline(HOSTILE)), *parts], "pictures"), drawn)
    assert "<script" not in text
    assert f"<title>{html.escape(HOSTILE)}</title>" in text
    page = Page(text)
    words = "".join(page.texts)
    assert words.count(f"wanda 50\u00a0% [0{HOSTILE}]") >= 8
    for shown in (f"wanda 50\u00a0% [1{HOSTILE}] against dense: ", f"{HOSTILE}: queued (model={HOSTILE})"):
        assert shown in words
    assert HOSTILE.replace("/", "") in words  # the model's name as a heading
    assert f"windows of 64 tokens of {FILE}; " in words
    in_pictures = "".join(re.findall(r"<text[^>]*>([^<]*)</text>", text))  # a long name stands on several lines
    assert f"[0{html.escape(HOSTILE, quote=False)}]" in in_pictures


def test_markdown_shows_names_as_they_are(tmp_path: Path):
    text = as_markdown([heading(1, inline(HOSTILE)), *hostile_content(tmp_path)], "pictures")
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    flat = [inner for token in tokens for inner in [token, *(token.children or [])]]
    assert not [token.content for token in flat if token.type in ("html_inline", "html_block", "em_open", "link_open")]
    shown = ["".join(inner.content for inner in token.children or []) for token in tokens if token.type == "inline"]
    assert shown[0] == HOSTILE
    for expected in (f"wanda 50 % [0{HOSTILE}]", f"{HOSTILE}: queued (model={HOSTILE})", f"{HOSTILE}: no results"):
        assert expected in shown
    assert any(f"windows of 64 tokens of {FILE}; " in one for one in shown)
    tables = [token for token in tokens if token.type == "table_open"]
    assert len(tables) == 12
    bold = sum(token.type == "strong_open" for token in flat)
    assert bold == sum(token.type == "image" for token in flat) == 7


def test_a_pictures_text_is_not_rewritten():
    """Coordinates are shortened to a hundredth, and ids renamed; names and numbers that people read are not."""
    name = 'seed=0.12345 $x_1$ id="a" #010203'
    figure = curves({name: [Point(50, 0.00123, 0.00121, 0.00125)]}, y_label="y", level=None, log=True)
    drawn = svg(figure, "p")
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", drawn)
    assert html.escape(name, quote=False) in texts
    assert {"0.00122", "0.00124"} <= set(texts)
    assert not re.search(r'="[^"]*\d\.\d{3}', drawn)


# --- pictures ---


def test_a_blocks_sparsity_is_that_of_its_weights():
    assert by_block([(3, 50, 100), (3, 300, 400)]) == [(3, 70.0, 50.0, 75.0)]


def test_curves_stand_where_their_numbers_are():
    series = {"a": [Point(30, 7.0, 6.0, 8.0), Point(70, None)], "b": [Point(30, 9.0), Point(50, 700.0, 600.0, 900.0)]}
    figure = curves(series, y_label="perplexity", level=("dense", 5.0), log=True)
    [ax] = figure.axes
    lines = {line.get_label(): line for line in ax.lines}
    assert [np.asarray(lines[name].get_ydata()).tolist() for name in ("dense", "a", "b")] == [[5, 5], [7], [9, 700]]
    assert np.asarray(lines["b"].get_xdata()).tolist() == pytest.approx([30, 50], abs=0.5)
    bars = [
        segment[:, 1].tolist()
        for bars in ax.collections
        if isinstance(bars, LineCollection)
        for segment in bars.get_segments()
    ]
    assert bars == [[6, 8], [600, 900]]
    low, high = ax.get_ylim()
    assert low < 5
    assert high > 900
    assert ax.get_yscale() == "log"
    [edge] = [line for line in ax.lines if line.get_transform() == ax.get_xaxis_transform()]
    assert np.asarray(edge.get_xydata())[0].tolist() == pytest.approx((70, 1), abs=0.5)
    assert [text.get_text() for text in ax.texts] == ["a diverged"]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["30 %", "50 %", "70 %"]


def test_a_legend_names_what_any_panel_shows():
    """2:4 stands in the second panel alone, and its first task was not measured."""
    points = [Point(0, None), Point(1, 50.0)]
    panels = {"30 %": {"Wanda": points}, "50 %": {"Wanda": points, "Wanda 2:4": points}}
    dense = [Point(1, 60.0)]
    figure = accuracies(panels, ["piqa", "rte"], dense, ["Wanda", "Wanda 2:4"])
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["dense", "Wanda", "Wanda 2:4"]


@pytest.mark.parametrize("values", [(1.02, 1.31), (14.1, 14.9), (101, 104), (3, 60), (2, 9_000), (0.0011, 0.0012)])
def test_a_log_axis_has_ticks_to_read_by(values: tuple[float, float]):
    series = {"a": [Point(30, values[0]), Point(50, values[1])]}
    figure = curves(series, y_label="perplexity", level=None, log=True)
    figure.canvas.draw()
    [ax] = figure.axes
    low, high = ax.get_ylim()
    ticks = [tick for tick in ax.get_yticks() if low <= tick <= high]
    labels = ax.yaxis.get_major_formatter().format_ticks(ticks)
    assert 3 <= len(ticks) <= 8
    assert len(set(labels)) == len(labels)
    assert [float(label.replace(",", "")) for label in labels] == pytest.approx(ticks)


def test_pictures_are_whole_on_a_phone_and_their_text_is_readable():
    """A phone's page is 390 px wide, 32 of which are margins; 9 points are then still 8 px."""
    picture = svg(curves({"a": [Point(30, 7.0)]}, y_label="y", level=None, log=False), "p")
    width = float(found(r'viewBox="0 0 ([\d.]+) ', picture))
    assert 9 * (390 - 32) / width >= 8
    page = as_html("# study", {})
    [rule] = re.findall(r"[^-\w]svg\{(.*?)\}", page)
    assert "min-width" not in rule
    assert "width:100%" in rule


def test_rows_names_wrap_so_that_a_table_fits_its_page():
    """Names such as `A (seed=0) against B (seed=0)` in one line push a table's last columns out of the page."""
    page = as_html("# study\n\n" + table("caption", ["", "a"], [["name", "1"]]), {})
    assert re.search(r'<th[^>]* scope="row">name</th>', page)
    rules = re.findall(r"tbody th\{(.*?)\}", page)
    assert rules
    assert not any("nowrap" in rule for rule in rules)


# --- the page ---


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Repository, Path, str]:
    """The report of four experiments, one diverged and one without its losses in the cache.

    One more is queued, and an older commit has other numbers.
    """
    root = tmp_path_factory.mktemp("report") / "study"
    study = Repository.new(root, root)
    write_results(root, "wanda", 0.5, 2.7, 19)
    study.save("main")
    write_results(root, "wanda", 0.5, 2.5, 20)
    study.save("main")
    write_results(root, "magnitude", 0.5, 3.5, 4)
    study.save("middling")
    write_results(root, "magnitude", 0.7, math.nan, 12)
    study.save("worst")
    write_results(root, "wanda", 0.7, 3.0, 23)
    lost = (root / "metrics/details/pruned/perplexity/embedded.json").read_bytes()
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
        self.open: list[str] = []
        self.texts: list[str] = []
        self.references: list[str] = []
        self.ids: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("href", "src", "xlink:href", "data")]
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "svg"} & set(self.open):
            self.texts.append(data)


@pytest.mark.pipeline
def test_the_page_stands_on_its_own(written: tuple[Repository, Path, str]):
    text = written[1].read_text(encoding="utf-8")
    page = Page(text)
    assert all(reference and reference.startswith("#") for reference in page.references)
    assert {reference[1:] for reference in page.references} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    for outside in ("http", "src=", "@import", "<script", "url(/", str(written[0].root.parent)):
        assert outside not in text
    assert text.count("<svg") == text.count("<svg aria-label=") >= 5
    assert "color-scheme:light dark" in text
    assert "@media print" in text
    assert not set(re.findall(r"#[0-9a-f]{6}", text.partition("</style>")[2]))  # every colour follows the mode


@pytest.mark.pipeline
def test_html_and_markdown_say_the_same(written: tuple[Repository, Path, str]):
    markdown = written[1].with_suffix(".md").read_text(encoding="utf-8")
    page = " ".join(Page(written[1].read_text(encoding="utf-8")).texts)
    words = re.compile(r"\w[\w,.]*\w|\w")
    plain = re.sub(r"!\[.*?\]\(.*?\)", "", markdown)
    assert set(words.findall(plain)) == set(words.findall(page))
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", markdown)
    assert len(pictures) >= 5
    assert all((written[1].parent / picture).is_file() for picture in pictures)


@pytest.mark.pipeline
def test_the_report_says_what_is_so(written: tuple[Repository, Path, str]):
    study, output, said = written
    assert said.startswith(f"{output}: 4 rows, 1 unfinished or failed")
    text = re.sub(r" {2,}", " ", output.with_suffix(".md").read_text(encoding="utf-8"))
    improvement = 100 * (1 - math.exp(2.5) / math.exp(3.5))
    for expected in (
        f"| 50 % | 7.39 | 33.12 | 12.18 | {improvement:.1f} % |",
        "| 70 % | 7.39 | diverged | 20.09 | – (magnitude diverged) |",
        "| wanda 50 % | 50.0 | 50.0 | 83.3 |",
        "magnitude 50 % against dense: 4.482 × the perplexity (beyond noise); −50.0 points of mean accuracy (beyond "
        "noise); 90.0 % of the answers changed.",
        "magnitude 70 % against dense: its perplexity diverged",
        "wanda 70 % against dense: perplexities could not be compared window by window; −2.5 points of mean accuracy "
        "(within noise); 42.5 % of the answers changed.",
        "| wanda 70 % against dense | 0 / 1 |",
        "| magnitude 50 % against dense | 0 / 20 * |",
        "| magnitude 50 % | 20 / 0 / 16 * | 90.0 |",
        "Greedy continuations, at most 8 tokens each",
        "| dense | | 0.0 |",
        "| magnitude 50 % | 4 | 20.0 |",
        "Prompt 1: The \\*sea\\* …",
        "| magnitude 50 % | is pruned |",
        "| shared by the rows | 4.0 | 1.0 | – | – | 1.0 | 1.0 | 7.0 |",
        "| wanda 50 % | – | – | 1.0 | 1.0 | 2.5 | 2.5 | 7.0 |",
        "Diverged, shown at the upper edge: magnitude 70 %",
        "This report knows no published row with the protocol",
        "waiting: queued (sparsity=0.3)",
        "lost: not in DVC's cache, and so not read: metrics/details/pruned/perplexity/embedded.json",
        "main, workspace",
        "-S sparsity=0.7",
    ):
        assert expected in text
    tests = int(found(r"makes (\d+) tests", text))
    # Each of 4 against dense in one task and the mean, 2 methods' pairs likewise; perplexity where both have losses.
    assert tests == 6 * 2 + 3
    assert study.run("git", "status", "--porcelain") == ""
    assert not [
        path for path in (study.root / ".dvc/tmp/wanda-dvc").iterdir() if path.is_dir() and path.name != "times"
    ]


@pytest.mark.pipeline
def test_files_of_others_beside_the_report_stay(written: tuple[Repository, Path, str], tmp_path: Path):
    """Quarto and browsers write `NAME_files/`, too; of its files only pictures of an earlier report may go."""
    output, pictures = tmp_path / "report.html", tmp_path / "report_files"
    (pictures / "libs").mkdir(parents=True)
    foreign = [pictures / "libs/quarto.js", pictures / "s9-notes.txt", pictures / "s9-drawing.svg"]
    for path in foreign:
        path.write_text("mine")
    project = Project(written[0].root)
    report(project=project, output=output)
    drawn = sorted(pictures.glob("s0-*.svg"))
    (pictures / "s9-time.svg").write_text(drawn[-1].read_text("utf-8").replace(drawn[-1].stem, "s9-time"), "utf-8")
    report(project=project, output=output)
    assert [path.read_text() for path in foreign] == ["mine"] * 3
    assert sorted(pictures.glob("*.svg")) == [*drawn, foreign[-1]]
    figure = curves({"a": [Point(30, 7.0)]}, y_label="y", level=None, log=False)
    parts: Content = [heading(1, "study"), Picture(drawn[0].stem, "title", "description", figure)]
    for taken in (output, output.with_suffix(".md"), drawn[0]):
        before = taken.read_bytes()
        taken.write_text("mine")
        with pytest.raises(UserError, match=f"{taken.name}: found a file that `wanda-dvc report` did not write"):
            write(output, parts)
        assert taken.read_text() == "mine"
        taken.unlink()
        taken.mkdir()
        with pytest.raises(UserError, match=f"{taken.name}: found a directory that"):
            write(output, parts)
        taken.rmdir()
        (tmp_path / "another").write_bytes(before)
        taken.symlink_to(tmp_path / "another")
        with pytest.raises(UserError, match=f"{taken.name}: found a link that"):
            write(output, parts)
        taken.unlink()
    pictures.rename(tmp_path / "moved")
    pictures.symlink_to(tmp_path / "moved")
    with pytest.raises(UserError, match="report_files: found a link that"):
        report(project=project, output=output)


@pytest.mark.pipeline
def test_a_killed_experiment_that_counts_as_running_is_named_as_the_cause(
    written: tuple[Repository, Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
def test_numbers_of_other_parameters_are_left_out(written: tuple[Repository, Path, str], tmp_path: Path):
    study, _, _ = written
    params = (study.root / "params.yaml").read_text(encoding="utf-8")
    try:
        (study.root / "params.yaml").write_text(params.replace("sparsity: 0.5", "sparsity: 0.9"), encoding="utf-8")
        report(project=Project(study.root), output=tmp_path / "report.html")
    finally:
        (study.root / "params.yaml").write_text(params, encoding="utf-8")
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "workspace: not run on these parameters, and left out: " in text
    assert "wanda 90 %" not in text
    with pytest.raises(UserError, match="no experiment of a model named like large with results"):
        report(project=Project(study.root), output=tmp_path / "report.html", model="large")
    number = study.root / "metrics/pruned/perplexity/embedded.json"
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
    assert "wanda 50 %" not in text
