"""The results of a study: intervals and paired tests, which may be compared, the table of measures, and its views."""

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Patch, write_params
from scipy import stats

from wanda_dvc.errors import UserError
from wanda_dvc.params import flatten
from wanda_dvc.results import intervals, listing
from wanda_dvc.results.compare import not_comparable, paired_tests, records, side_by_side
from wanda_dvc.results.experiments import workspace
from wanda_dvc.results.intervals import Estimate
from wanda_dvc.results.listing import ListedRevision, flat_records
from wanda_dvc.results.measures import MEASURES, Results, figures
from wanda_dvc.results.show import show, table_notes
from wanda_dvc.study.files import Json, json_text, load_json, write_json
from wanda_dvc.study.folder import Study
from wanda_dvc.study.protocol import first_difference

WINDOWS = {
    "model": "dense", "version": 4, "libraries": {"torch": "2.9", "transformers": "5.1"}, "dtype": "float32",
    "text": {"source": "a", "sha256": "t"}, "tokens_sha256": "t", "windows": 4, "length": 64, "rest": "dropped",
}  # fmt: skip
ITEMS = {
    "model": "dense", "libraries": {"torch": "2.9", "transformers": "5.1", "lm_eval": "0.4.13"}, "dtype": "float32",
    "task": {"task": "piqa", "source": "a", "sha256": "i", "lm_eval": "0.4.13"}, "examples": 0, "limit": 40,
}  # fmt: skip


@pytest.fixture
def here(tmp_path: Path) -> Study:
    """A study in which nothing has run."""
    write_params(tmp_path, "org/model")
    return Study(tmp_path)


def write_results(
    here: Study, model: str, loss: float, right: int, *, windows: Json = WINDOWS, items: Json = ITEMS
) -> Results:
    """The files of a model with this mean loss on a text and this number of correct answers of 40."""
    losses = [loss + x for x in ((-0.1, 0.0, 0.02, 0.08) if model == "dense" else (-0.08, -0.02, 0.0, 0.1))]
    of = {"model": model}
    details: Json = {"protocol": windows | of, "losses": losses}
    numbers: dict[str, Any] = {"perplexity": float(f"{math.exp(sum(losses) / 4):.6g}")}
    answered: dict[str, Any] = {"acc": right / 40}
    if model == "pruned":
        factors = (1.02, 0.98, 1.01, 0.99)
        details |= {"divergences": [loss / 5 * x for x in factors], "agreements": [right / 52 * x for x in factors]}
        numbers |= {"divergence": {"mean": 0.5}, "top1_agreement": {"mean": 0.5}}
        answered["flips"] = {"acc": {"lost": 12, "gained": 2, "swapped": 1}}
        write_json(here.metrics(model, "sparsity"), {"sparsity": 0.5, "removed_parameters": 0.25})
    write_json(here.details(model, "perplexity/embedded"), details)
    write_json(here.metrics(model, "perplexity/embedded"), numbers)
    answers = [{"item": i, "answer": 2 * (i >= right), "acc": float(i < right)} for i in range(40)]
    write_json(here.details(model, "zero_shot"), {"tasks": {"piqa": {"protocol": items | of, "items": answers}}})
    write_json(here.metrics(model, "zero_shot"), {"piqa": answered})
    return Results.of(here, model)


def both(here: Study, **changes: Any) -> tuple[Results, Results]:
    """The results of a dense and a pruned model; `changes` of the pruned model's protocols."""
    dense = write_results(here, "dense", 2.0, 36)
    write_results(here, "pruned", 2.5, 26, **changes)
    return Results.of(here, "pruned"), dense


# --- who may be compared ---


@pytest.mark.parametrize("library", ["torch", "transformers", "lm_eval"])
def test_values_of_other_libraries_are_not_compared(here: Study, library: str):
    """Bugs 1 and 2: an upgrade reruns nothing, and a new experiment was then compared across two versions."""
    libraries = {**ITEMS["libraries"], library: "other"}  # type: ignore[dict-item]
    changes = {"items": ITEMS | {"libraries": libraries}}
    if library != "lm_eval":
        changes["windows"] = WINDOWS | {"libraries": {key: libraries[key] for key in ("torch", "transformers")}}
    pruned, dense = both(here, **changes)
    tests = paired_tests({"pruned": pruned, "dense": dense}, "dense")
    assert [key[2:] for key in tests] == ([("perplexity", "embedded")] if library == "lm_eval" else [])
    of_tasks = dict.fromkeys(["piqa, acc, %", "mean acc, %"], "libraries")
    assert not_comparable(pruned, dense) == of_tasks | ({} if library == "lm_eval" else {"perplexity": "libraries"})


@pytest.mark.parametrize("name", ["perplexity/embedded", "zero_shot"])
def test_each_key_of_a_protocol_counts_but_those_of_the_measured_model(finished: Path, name: str):
    details = load_json(Study(finished).details("dense", name))
    own = details.get("protocol") or next(iter(details["tasks"].values()))["protocol"]
    assert {"dtype", "libraries"} <= own.keys()
    for key in own:
        counts = key not in ("model", "reference", "wanda_dvc", "text")
        changed, without = own | {key: {"torch": "0"}}, {name: own[name] for name in own if name != key}
        for one, other in ((own, changed), (own, without), (without, own)):
            assert first_difference(one, other) == (key if counts else None)
    for version, alike in (("+cu128", True), (".1", False)):
        versions = own["libraries"] | {"torch": own["libraries"]["torch"].partition("+")[0] + version}
        assert (first_difference(own, own | {"libraries": versions}) is None) == alike


# --- the table ---


def test_every_measure_is_read_and_formatted(here: Study):
    pruned, dense = both(here)
    headers, rows = side_by_side({"dense": dense, "pruned": pruned}, base="dense")
    assert headers == ["", "dense", "pruned", "pruned against dense"]
    assert rows == [
        ["divergence, nats", "–", "0.5000 (0.4855 to 0.5145)", ""],
        ["top-1 agreement, %", "–", "50.0 (48.5 to 51.5)", ""],
        ["perplexity", "7.39 (6.56 to 8.32)", "12.18 (10.81 to 13.72)", "1.649 × (1.589 to 1.710) *"],
        ["piqa, acc, %", "90.0 (76.9 to 96.0)", "65.0 (49.5 to 77.9)", "-25.0 points (-39.0 to -11.0) *"],
        ["mean acc, %", "90.0 (80.3 to 99.7)", "65.0 (49.6 to 80.4)", "-25.0 points (-39.0 to -11.0) *"],
        ["right → wrong", "–", "12", ""],
        ["wrong → right", "–", "2", ""],
        ["wrong → wrong", "–", "1", ""],
        ["measured sparsity", "–", "0.5000", ""],
        ["parameters removed, %", "–", "25.0", ""],
    ]
    (perplexity,) = (one for one in MEASURES if one.name == "perplexity")
    texts = [perplexity.formatted_test(Estimate(x)) for x in (0.003069, 0.00005, 0.98, 1.0234, 324.2)]
    assert texts == ["0.003069 ×", "5.000e-05 ×", "0.9800 ×", "1.023 ×", "324.2 ×"]


def test_two_pruned_models_are_compared_by_their_distance_from_the_dense_one(here: Study, tmp_path: Path):
    (tmp_path / "other").mkdir()
    write_params(tmp_path / "other", "org/model")
    one, other = write_results(here, "pruned", 2.5, 26), write_results(Study(tmp_path / "other"), "pruned", 3.0, 13)
    _, rows = side_by_side({"one": one, "other": other}, base="one")
    cells = {row[0]: row[3] for row in rows}
    assert cells["divergence, nats"] == "+0.1000 nats (+0.0971 to +0.1029) *"
    assert cells["top-1 agreement, %"] == "-25.0 points (-25.7 to -24.3) *"


def test_one_number_that_is_not_finite_is_said_of_the_whole_measure(here: Study):
    pruned, dense = both(here)
    write_json(here.metrics("pruned", "perplexity/embedded"), {"perplexity": "diverged", "divergence": "diverged"})
    write_json(here.metrics("pruned", "zero_shot"), {"piqa": {"acc": "diverged"}})
    pruned = Results.of(here, "pruned")
    _, rows = side_by_side({"dense": dense, "pruned": pruned}, base="dense")
    assert {row[0]: row[2] for row in rows}["mean acc, %"] == "diverged"
    assert {row[0] for row in rows if row[2] == "diverged"} >= {"perplexity", "divergence, nats", "right → wrong"}
    assert paired_tests({"pruned": pruned, "dense": dense}, "dense") == {}


def test_metrics_without_details_are_shown_and_not_compared(here: Study):
    """As in a new clone before `dvc pull`."""
    both(here)
    for model in ("dense", "pruned"):
        here.details(model, "perplexity/embedded").unlink()
    pruned, dense = (Results.of(here, model) for model in ("pruned", "dense"))
    tests = paired_tests({"pruned": pruned, "dense": dense}, "dense")
    assert [key[2:] for key in tests] == [("acc", "piqa"), ("mean_acc", "")]
    assert not_comparable(pruned, dense) == {"perplexity": "missing details"}
    said = next(table_notes({}, {"dense": dense, "pruned": pruned}))
    assert said.startswith("pruned not compared with dense, because of: perplexity (missing details). ")
    assert figures(pruned)["perplexity"] == {"embedded": {"value": 12.1825}}


def test_what_is_not_known_is_left_out_of_json(here: Study):
    """JSON has no NaN: a test of accuracies without variance has no interval."""
    dense, pruned = (write_results(here, model, 2.0, 40) for model in ("dense", "pruned"))
    found = records({"dense": dense, "pruned": pruned}, base="dense")["pruned"]
    assert {"measure": "acc", "on": "piqa", "value": 0.0, "p": 1.0} in found["tests"]  # equal answers to 40 items
    pruned = write_results(here, "pruned", 2.0, 0)
    tests = records({"dense": dense, "pruned": pruned}, base="dense")["pruned"]["tests"]
    assert tests[1] == {"measure": "acc", "on": "piqa", "value": -1.0, "p": tests[1]["p"]}
    json_text(tests)


def test_p_values_are_adjusted_for_the_tests_of_all_pairs(here: Study):
    pruned, dense = both(here)
    models = {"dense": dense, "pruned": pruned, "again": pruned}
    alone, both_pairs = paired_tests({"dense": dense, "pruned": pruned}, "dense"), paired_tests(models, "dense")
    key = ("pruned", "dense", "acc", "piqa")
    assert both_pairs[key].p == pytest.approx(2 * alone[key].p)
    dense.metrics["zero_shot"]["boolq"] = {"acc": 0.5}
    assert not_comparable(pruned, dense) == {"mean acc, %": "tasks"}


def test_files_of_another_run_are_left_out(here: Study):
    both(here)
    others = ["metrics/pruned/sparsity.json", "metrics/details/pruned/perplexity/embedded.json"]
    results = Results.of(here, "pruned", left_out=others)
    assert "sparsity" not in figures(results)
    assert "low" not in figures(results)["perplexity"]["embedded"]
    write_json(here.root / "dvc.lock", {"stages": {"apply": {"outs": [{"path": others[0], "md5": "another"}]}}})
    assert workspace(here).final.metrics == {}


def test_results_have_the_settings_of_their_run(here: Study):
    ran = {"params": {"params.yaml": here.params.model_dump(mode="json")}}
    write_json(here.root / "dvc.lock", {"stages": {"plan": ran}})
    write_params(here.root, "org/model", sparsity=0.7)
    found = workspace(Study(here.root))
    assert found.params.sparsity == 0.5
    assert "params.yaml has sparsity=0.7, which has not run: `dvc repro` runs it." in found.notes


def test_mcnemar_is_the_test_of_a_fair_coin():
    for first, second in (*itertools.product(range(6), repeat=2), (900, 1000)):
        mine = [True] * first + [False] * second + [True, False]
        theirs = [False] * first + [True] * second + [True, False]
        expected = stats.binomtest(first, first + second).pvalue if first + second else 1
        assert intervals.mcnemar(mine, theirs) == pytest.approx(expected)


def test_the_interval_of_accuracy_is_wilsons():
    expected = stats.binomtest(13, 48).proportion_ci(method="wilson")
    assert intervals.accuracy_interval([True] * 13 + [False] * 35)[:3] == pytest.approx((13 / 48, *expected))
    assert intervals.accuracy_interval([True] * 5).high == pytest.approx(1)


def test_the_interval_of_several_tasks_is_welchs():
    """The mean of two tasks is half the difference between one and the negative of the other."""
    random = np.random.default_rng(0)
    one, other = (random.choice([-1.0, 0.0, 1.0], size, p=[0.2, 0.5, 0.3]) for size in (30, 60))
    welch, locked = stats.ttest_ind(one, -other, equal_var=False), stats.ttest_1samp(one, 0)
    for tasks, expected in (([one, other], welch), ([one], locked)):
        ends = [end / len(tasks) for end in expected.confidence_interval()]
        found = intervals.mean_of_tasks([list(task) for task in tasks], least=-1)
        assert found
        assert found[1:] == pytest.approx((*ends, expected.pvalue))


def test_the_paired_test_is_students():
    random = np.random.default_rng(1)
    others = random.normal(3, 1, 12)
    losses = others + random.normal(0.05, 0.1, 12)
    got = intervals.ratio(list(losses), list(others), [10] * 12)
    assert got
    difference = losses - others
    assert got.value == pytest.approx(math.exp(difference.mean()))
    moved = intervals.mean_difference(list(losses), list(others), [10] * 12)
    assert moved
    expected = stats.ttest_rel(losses, others)
    assert (moved.value, moved.p, got.p) == pytest.approx((difference.mean(), expected.pvalue, expected.pvalue))
    assert moved[1:3] == pytest.approx(tuple(expected.confidence_interval()))
    unpaired = intervals.perplexity_interval(list(losses), [10] * 12)
    assert unpaired
    assert math.log(got.high / got.low) < math.log(unpaired.high / unpaired.low) / 3  # why it is paired


def test_a_shorter_window_counts_by_its_predictions(here: Study):
    losses, predictions = [1.0, 2.0, 6.0], [10, 10, 5]
    got = intervals.perplexity_interval(losses, predictions)
    assert got
    assert got.value == pytest.approx(math.exp((10 + 20 + 30) / 25))
    words: Json = {"windows": WINDOWS | {"windows": 3, "rest": 8}}  # the last window has 8 tokens
    dense, pruned = (write_results(here, model, loss, 36, **words) for model, loss in (("dense", 2.0), ("pruned", 2.5)))
    said = list(table_notes({"dense": here.params}, {"dense": dense, "pruned": pruned}))
    assert any("3 windows of 64 tokens and one of 8 of a" in one for one in said)
    assert any("the first 40 items of each" in one for one in said)  # as measured, whatever params.yaml has now
    tests = paired_tests({"pruned": pruned, "dense": dense}, "dense")
    mean = (63 * (0.52 + 0.48 + 0.48) + 7 * 0.52) / (3 * 63 + 7)
    assert tests["pruned", "dense", "perplexity", "embedded"].value == pytest.approx(math.exp(mean), rel=1e-9)


def test_nothing_is_said_of_what_is_not_finite_or_alone():
    assert intervals.perplexity_interval([1.0, math.nan], [3, 3]) is None
    assert intervals.perplexity_interval([1.0], [3]) is None
    assert (found := intervals.perplexity_interval([3.0, 3.7], [3, 3]))
    assert found.low == 1  # no perplexity is less
    same = intervals.mean_of_tasks([[0.0] * 9, [0.0] * 9], least=-1)
    assert same
    assert same.p == 1
    for test in (intervals.mean_difference, intervals.ratio):
        assert (equal := test([0.5, 0.7], [0.5, 0.7], [9, 9]))
        assert (equal.p, math.isnan(equal.low), math.isnan(equal.high)) == (1, True, True)
    assert (found := intervals.perplexity_interval([0.0, 0.0], [9, 9]))
    assert math.isnan(found.low)


@pytest.mark.parametrize("tasks", [[[-1.0]], [[-1.0, -1.0]], [[1.0, 0.0, 1.0], [1.0]], [[1.0] * 3, [0.0] * 3]])
def test_what_does_not_vary_is_no_evidence(tasks: list[list[float]]):
    """A t interval of no width would say that one item is beyond noise."""
    assert intervals.mean_of_tasks(tasks, least=-1) is None
    assert intervals.mean_difference([300 / 511, 280 / 511], [290 / 511, 270 / 511], [511, 511]) is None


def test_holm_rejects_step_by_step():
    p = [0.04, 0.001, 0.5, 0.013, 0.012]
    adjusted = intervals.holm(p)
    for level in (0.005, 0.045, 0.05, 0.06, 0.2):
        rejected, left = set(), sorted(range(len(p)), key=p.__getitem__)
        while left and p[left[0]] <= level / len(left):
            rejected.add(left.pop(0))
        assert {i for i, value in enumerate(adjusted) if value <= level} == rejected


def test_an_interval_of_accuracies_stays_within_0_and_1(here: Study):
    """Where the t interval of 39 of 40 ends at 102.6 %, it is cut off."""
    assert all(intervals.accuracy_interval([True] * count).high <= 1 for count in range(1, 50))
    answers = [[True] * 39 + [False], [False] * 39 + [True]]
    most, least = intervals.mean_of_tasks(answers[:1], least=0), intervals.mean_of_tasks(answers[1:], least=0)
    assert most
    assert least
    assert most.value + (most.value - most.low) == pytest.approx(1.0256, abs=1e-4)  # the other end, not cut
    assert (most.high, least.low) == (1, 0)
    both = intervals.mean_of_tasks(answers, least=0)
    assert both
    assert both.high - both.value == pytest.approx(both.value - both.low) != 0  # not cut
    assert figures(write_results(here, "dense", 2.0, 1))["mean_acc"]["low"] == 0


# --- show ---


def test_show_leads_with_the_distance_and_has_every_measure(here: Study):
    both(here)
    with pytest.raises(UserError, match="dense: the dense model has this name in tables"):
        show(study=here, names=["dense"])
    shown = [line.split("|")[1].strip() for line in show(study=here).splitlines() if line.startswith("|")]
    assert shown[2:5] == ["divergence, nats", "top-1 agreement, %", "perplexity"]
    assert {"piqa, acc, %", "mean acc, %"} <= set(shown)
    assert "mean_acc" in json.loads(show(study=here, as_json=True))["models"]["pruned"]["results"]


MEASURED, DIVERGED = (Results({"perplexity/embedded": {"perplexity": x}}) for x in (2.0, "diverged"))


def revision(results: dict[str, Results], **settings: object) -> ListedRevision:
    return ListedRevision("a", "a", "branch", settings=settings, results=results)


@pytest.mark.parametrize("setting", ["sparsity", "model", "dtype", "perplexity.windows", "tasks.names", "tasks.limit"])
def test_a_list_says_which_settings_of_its_measurements_differ(here: Study, monkeypatch: Patch, setting: str):
    """Of those that have results of the model that their settings make."""
    listed = [revision({"pruned": MEASURED}, **{setting: x}) for x in "ab"]
    listed += [revision({"dense": DIVERGED, "pruned": Results({})}, dtype=x) for x in "cd"]
    monkeypatch.setattr(listing, "listed_revisions", lambda _: listed)
    differ = re.findall(r"Not all comparable: (.*?) differ", listing.list_text(study=here))
    assert differ == ([] if setting == "sparsity" else [setting])


def test_a_setting_that_is_left_out_is_its_default(here: Study, monkeypatch: Patch):
    plain = {key: x for key, x in flatten(here.params.model_dump(mode="json")) if key != "perplexity.windows"}
    for windows in (None, 4):  # None is the default
        every = [plain, plain | {"perplexity.windows": windows}]
        listed = [revision({"pruned": MEASURED}, **one) for one in every]
        monkeypatch.setattr(listing, "listed_revisions", lambda _, listed=listed: listed)
        assert ("perplexity.windows differ" in listing.list_text(study=here)) == (windows is not None)


def test_a_model_that_diverged_is_a_word_in_json_and_ranks_last_as_a_number(here: Study, monkeypatch: Patch):
    monkeypatch.setattr(listing, "listed_revisions", lambda _: [revision({"dense": DIVERGED, "pruned": Results({})})])
    (record,) = json.loads(listing.list_text(study=here, as_json=True))
    assert record["dense.perplexity.embedded"] == "diverged"
    broken = Results({"zero_shot": {"piqa": {"acc": "diverged"}}, "perplexity/embedded": {"divergence": "diverged"}})
    (record,) = flat_records([revision({"pruned": broken})])
    assert math.isnan(record["pruned.acc.piqa"])  # infinity would rank it first
    assert record["pruned.divergence.embedded"] == math.inf


def test_lost_answers_are_summed_over_tasks_that_all_have_them():
    flips = {"flips": {"acc": {"lost": 1, "gained": 0, "swapped": 0}}}
    for other, lost in (({}, None), (flips, 2.0)):  # a sum of some tasks would be too low
        tasks = Results({"zero_shot": {"piqa": {"acc": 0.5} | flips, "rte": {"acc": 0.5} | other}})
        (record,) = flat_records([revision({"pruned": tasks})])
        assert record.get("pruned.lost") == lost


def test_the_list_hides_a_removed_text_as_show_does(here: Study, monkeypatch: Patch):
    files = {f"metrics/pruned/perplexity/{on}.json": {"data": {"perplexity": 2.0}} for on in ("embedded", "removed")}
    settings = {"params.yaml": {"data": here.params.model_dump(mode="json")}}
    record = {"rev": "workspace", "data": {"params": settings, "metrics": files}}
    monkeypatch.setattr("wanda_dvc.study.dvc.list_revisions", lambda _: [record])
    monkeypatch.setattr("wanda_dvc.study.dvc.repository_roots", lambda root: (root, root))
    write_json(here.root / "dvc.lock", {"stages": {"perplexity": {"outs": [{"path": path} for path in files]}}})
    (revision,) = listing.listed_revisions(here)
    assert revision.final.texts == ["embedded"]


def test_an_unreadable_experiment_has_no_changes(here: Study, monkeypatch: Patch):
    settings = {"params.yaml": {"data": here.params.model_dump(mode="json")}}
    unreadable = {"revs": [{"rev": "a" * 40, "error": {"msg": "damaged"}}], "name": "bad"}
    record = {"rev": "b" * 40, "name": "main", "data": {"params": settings}, "experiments": [unreadable]}
    monkeypatch.setattr("wanda_dvc.study.dvc.list_revisions", lambda _: [record])
    monkeypatch.setattr("wanda_dvc.study.dvc.repository_roots", lambda root: (root, root))
    _, experiment = listing.listed_revisions(here)
    assert (experiment.status, experiment.changes) == ("unreadable: damaged", {})
