"""The results of a study: which may be compared, the table of measures, and its views."""

import math
from pathlib import Path
from typing import Any

import pytest
from conftest import write_params

from wanda_dvc.results.compare import apart, compare, records, side_by_side
from wanda_dvc.results.inference import Estimate
from wanda_dvc.results.measures import Results, figures
from wanda_dvc.study.files import Json, json_text, write_json
from wanda_dvc.study.project import Project

WINDOWS = {
    "model": "dense", "version": 4, "libraries": {"torch": "2.9", "transformers": "5.1"}, "dtype": "float32",
    "text": {"source": "a", "sha256": "t"}, "tokens_sha256": "t", "windows": 4, "length": 64, "rest": "dropped",
}  # fmt: skip
ITEMS = {
    "model": "dense", "libraries": {"torch": "2.9", "transformers": "5.1", "lm_eval": "0.4.13"}, "dtype": "float32",
    "task": {"task": "piqa", "source": "a", "sha256": "i", "lm_eval": "0.4.13"}, "examples": 0, "limit": 40,
}  # fmt: skip


@pytest.fixture
def here(tmp_path: Path) -> Project:
    """A study in which nothing has run."""
    write_params(tmp_path, "org/model")
    return Project(tmp_path)


def write_results(
    study: Project, model: str, loss: float, right: int, *, windows: Json = WINDOWS, items: Json = ITEMS
) -> Results:
    """The files of a model with this mean loss on a text and this number of correct answers of 40."""
    losses = [loss + x for x in ((-0.1, 0.0, 0.02, 0.08) if model == "dense" else (-0.08, -0.02, 0.0, 0.1))]
    of = {"model": model}
    write_json(study.details(model, "perplexity/embedded"), {"protocol": windows | of, "losses": losses})
    numbers: dict[str, Any] = {"perplexity": float(f"{math.exp(sum(losses) / 4):.6g}")}
    answered: dict[str, Any] = {"acc": right / 40}
    if model == "pruned":
        kl = {"mean": 0.5, "low": 0.4, "high": 0.6, "median": 0.25, "p99": 2.0, "largest": 3.0}
        agreed = {"mean": 0.5, "low": 0.45, "high": 0.55}
        numbers |= {"divergence": kl, "top1_agreement": agreed, "rms_probability_change": 0.125}
        answered["flips"] = {"acc": {"lost": 12, "gained": 2, "swapped": 1}}
        write_json(study.metrics(model, "sparsity"), {"sparsity": 0.5})
        linears = {"q": {"error": 0.1, "masked": 0.2}, "k": {"error": 0.3, "masked": 0.4}}
        write_json(study.details(model, "layer_error"), {"protocol": of, "linears": linears})
    write_json(study.metrics(model, "perplexity/embedded"), numbers)
    answers = [{"item": i, "answer": 2 * (i >= right), "acc": float(i < right)} for i in range(40)]
    write_json(study.details(model, "zero_shot"), {"tasks": {"piqa": {"protocol": items | of, "items": answers}}})
    write_json(study.metrics(model, "zero_shot"), {"piqa": answered})
    tokens = [1, 2, 3, 4] * 2 if model == "pruned" else list(range(1, 9))
    written = {"prompt": "The *sea*", "text": f"is {model}", "tokens": tokens}
    write_json(study.details(model, "continuations"), {"protocol": of, "prompts": [written]})
    return Results.of(study, model)


def both(study: Project, **changes: Any) -> tuple[Results, Results]:
    """The results of a dense and a pruned model; `changes` of the pruned model's protocols."""
    dense = write_results(study, "dense", 2.0, 36)
    write_results(study, "pruned", 2.5, 26, **changes)
    return Results.of(study, "pruned", dense=dense), dense


# --- who may be compared ---


@pytest.mark.parametrize("library", ["torch", "transformers", "lm_eval"])
def test_values_of_other_libraries_are_not_compared(here: Project, library: str):
    """Bugs 1 and 2: an upgrade reruns nothing, and a new experiment was then compared across two versions."""
    libraries = {**ITEMS["libraries"], library: "other"}  # type: ignore[dict-item]
    changes = {"items": ITEMS | {"libraries": libraries}}
    if library != "lm_eval":
        changes["windows"] = WINDOWS | {"libraries": {key: libraries[key] for key in ("torch", "transformers")}}
    pruned, dense = both(here, **changes)
    (tests,) = compare([(pruned, dense)])
    assert set(tests) == ({("perplexity", "embedded")} if library == "lm_eval" else set())
    of_tasks = dict.fromkeys(["piqa, acc, %", "mean acc, %"], "libraries")
    assert apart(pruned, dense) == of_tasks | ({} if library == "lm_eval" else {"perplexity": "libraries"})


# --- the table ---


def test_every_measure_is_read_and_formatted(here: Project):
    pruned, dense = both(here)
    headers, rows = side_by_side({"dense": dense, "pruned": pruned}, base="dense")
    assert headers == ["", "dense", "pruned", "pruned against dense"]
    assert rows == [
        ["perplexity", "7.39 (6.56 to 8.32)", "12.18 (10.81 to 13.72)", "1.649 × (1.589 to 1.710) *"],
        ["divergence, nats", "–", "0.5000 (0.4000 to 0.6000)", ""],
        ["divergence, median, nats", "–", "0.2500", ""],
        ["divergence, 99 %, nats", "–", "2.0000", ""],
        ["divergence, largest, nats", "–", "3.0000", ""],
        ["top-1 agreement, %", "–", "50.0 (45.0 to 55.0)", ""],
        ["true token, RMS change, points", "–", "12.5", ""],
        ["piqa, acc, %", "90.0 (76.9 to 96.0)", "65.0 (49.5 to 77.9)", "−25.0 points (−39.0 to −11.0) *"],
        ["mean acc, %", "90.0 (80.3 to 99.7)", "65.0 (49.6 to 80.4)", "−25.0 points (−39.0 to −11.0) *"],
        ["right → wrong", "–", "12", ""],
        ["wrong → right", "–", "2", ""],
        ["wrong → wrong", "–", "1", ""],
        ["layer error, mean", "–", "0.2000", ""],
        ["measured sparsity", "–", "0.5000", ""],
    ]


def test_one_number_that_is_not_finite_is_said_of_the_whole_measure(here: Project):
    pruned, dense = both(here)
    write_json(here.metrics("pruned", "perplexity/embedded"), {"perplexity": "diverged", "divergence": "diverged"})
    write_json(here.metrics("pruned", "zero_shot"), {"piqa": {"acc": "diverged"}})
    pruned = Results.of(here, "pruned", dense=dense)
    _, rows = side_by_side({"dense": dense, "pruned": pruned}, base="dense")
    assert {row[0]: row[2] for row in rows}["mean acc, %"] == "diverged"
    assert {row[0] for row in rows if row[2] == "diverged"} >= {"perplexity", "divergence, nats", "right → wrong"}
    assert compare([(pruned, dense)]) == [{}]


def test_metrics_without_details_are_shown_and_not_compared(here: Project):
    """As in a new clone before `dvc pull`."""
    both(here)
    for model in ("dense", "pruned"):
        here.details(model, "perplexity/embedded").unlink()
    pruned, dense = (Results.of(here, model) for model in ("pruned", "dense"))
    assert compare([(pruned, dense)])[0].keys() == {("acc", "piqa"), ("mean_acc", "")}
    assert apart(pruned, dense) == {"perplexity": "missing details"}
    assert figures(pruned)["perplexity"] == {"embedded": {"value": 12.1825}}


def test_what_is_not_known_is_left_out_of_json(here: Project):
    """JSON has no NaN: a test of accuracies without variance has no interval."""
    dense, pruned = (write_results(here, model, 2.0, 40) for model in ("dense", "pruned"))
    found = records({"dense": dense, "pruned": pruned}, base="dense")["pruned"]
    assert {"measure": "acc", "on": "piqa", "value": 0.0, "low": 0.0, "high": 0.0, "p": 1.0} in found["tests"]
    pruned = write_results(here, "pruned", 2.0, 0)
    tests = records({"dense": dense, "pruned": pruned}, base="dense")["pruned"]["tests"]
    assert {key: value for key, value in tests[1].items() if key != "p"} == {
        "measure": "acc",
        "on": "piqa",
        "value": -1.0,
    }
    json_text(tests)


def test_p_values_are_adjusted_for_the_tests_of_all_pairs(here: Project):
    pruned, dense = both(here)
    (alone,) = compare([(pruned, dense)])
    again, _ = compare([(pruned, dense), (pruned, dense)])
    assert again["acc", "piqa"].p == pytest.approx(2 * alone["acc", "piqa"].p)
    assert isinstance(alone["acc", "piqa"], Estimate)


def test_files_of_another_run_are_left_out(here: Project):
    both(here)
    others = ["metrics/pruned/sparsity.json", "metrics/details/pruned/perplexity/embedded.json"]
    results = Results.of(here, "pruned", left_out=others)
    assert "sparsity" not in figures(results)
    assert "low" not in figures(results)["perplexity"]["embedded"]
