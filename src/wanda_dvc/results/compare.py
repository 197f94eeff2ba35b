"""Compares the results of models: who may be compared, and the paired tests of those that may.

One function on protocols, `study.provenance.differing`, says whether values may be compared: the same windows or items,
dtype, prompts, and versions of the libraries that computed them.
"""

import math
from collections.abc import Mapping, Sequence

from wanda_dvc.results.intervals import Estimate, holm
from wanda_dvc.results.measures import MEASURES, Measure, Results, figures
from wanda_dvc.study.files import Json
from wanda_dvc.study.protocol import differing

DENSE = "dense"  # the name of the dense model in tables
MISSING = "missing details"  # a reason: whether the protocols differ is not known
Tests = dict[tuple[str, str], Estimate]  # by a measure's name, and the text or task
Column = tuple[Measure, str]  # a measure, and a text, a task or ""


def _both(first: Results, second: Results) -> list[Column]:
    """Return the measures with a paired test that both models have, on each text or task."""
    tested = [measure for measure in MEASURES if measure.test]
    return [(one, on) for one in tested for on in one.where(first) if on in one.where(second)]


def reason(measure: Measure, first: Results, second: Results, on: str) -> str | None:
    """Return why two models' values may not be compared: the first key that differs; None if they may."""
    protocols, others = measure.protocols(first, on), measure.protocols(second, on)
    if protocols.keys() != others.keys():
        return "tasks"
    for name, protocol in protocols.items():
        other = others[name]
        if protocol is None or other is None:
            return MISSING
        if key := differing(protocol, other):
            return key
    return None


def compare(pairs: Sequence[tuple[Results, Results]]) -> list[Tests]:
    """Return the paired tests of each pair's first model against its second, with p-values adjusted for all tests."""
    found: list[Tests] = []
    for first, second in pairs:
        tests: Tests = {}
        for measure, on in _both(first, second):
            alike = not reason(measure, first, second, on)
            if measure.test and alike and (test := measure.test.run(first, second, on)):
                tests[measure.name, on] = test
        found.append(tests)
    known = [(tests, key) for tests in found for key, test in tests.items() if not math.isnan(test.p)]
    for (tests, key), p in zip(known, holm([tests[key].p for tests, key in known]), strict=True):
        tests[key] = tests[key]._replace(p=p)
    return found


def apart(first: Results, second: Results) -> dict[str, str]:
    """Return the values of two models that may not be compared: the measure, and the key that differs."""
    locked = len(first.texts) == 1
    reasons = {one.heading(on, locked=locked): reason(one, first, second, on) for one, on in _both(first, second)}
    return {name: key for name, key in reasons.items() if key}


def against(models: Mapping[str, Results], base: str) -> dict[str, Tests]:
    """Return the paired tests of each model but the dense one against `base`."""
    others = [name for name in models if name not in (base, DENSE)]
    return dict(zip(others, compare([(models[name], models[base]) for name in others]), strict=True))


def records(models: Mapping[str, Results], *, base: str) -> Json:
    """Return by model its measures, and its paired tests against `base`."""
    tests = against(models, base)
    return {
        name: {
            "results": figures(one),
            "tests": [{"measure": key, "on": on, **test.record} for (key, on), test in tests.get(name, {}).items()],
        }
        for name, one in models.items()
    }


def headings(models: Sequence[Results], *, brief: bool = True) -> dict[str, Column]:
    """Return the measures that a model has, each on its texts or tasks, by their heading; `brief`: of a short table."""
    locked = len({text for one in models for text in one.texts}) <= 1
    shown = [measure for measure in MEASURES if measure.brief or not brief]
    return {measure.heading(on, locked=locked): (measure, on) for measure in shown for on in measure.where(*models)}


def cells(results: Results, columns: Mapping[str, Column], *, interval: bool = True) -> list[str]:
    """Return a row of a table: a model's values."""
    return [measure.text(measure.read(results, on), interval=interval) for measure, on in columns.values()]


def side_by_side(models: Mapping[str, Results], *, base: str) -> tuple[list[str], list[list[str]]]:
    """Return the headers and rows of a table: a row for each measure, a column for each model.

    A last column for each model but `base` and the dense one has its paired tests against `base`, if there are any.
    """
    tests = {name: found for name, found in against(models, base).items() if found}
    rows = []
    for heading, (measure, on) in headings(list(models.values()), brief=False).items():
        values = [measure.text(measure.read(one, on)) for one in models.values()]
        known = measure.read(models[base], on) is not None  # the dense model has no divergence from itself
        tested = (measure.test_text(one.get((measure.name, on))) if known else "" for one in tests.values())
        rows.append([heading, *values, *tested])
    return ["", *models, *(f"{name} against {base}" for name in tests)], rows
