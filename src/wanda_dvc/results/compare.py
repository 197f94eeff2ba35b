"""Compare the results of models: which values may be compared, and their paired tests.

One function on protocols, `study.protocol.differing`, says whether values may be compared: the same windows or items,
dtype, prompts, and versions of the libraries that computed them.
"""

import math
from collections.abc import Mapping, Sequence

from wanda_dvc.results.intervals import Estimate, holm
from wanda_dvc.results.measures import MEASURES, Measure, Results, figures
from wanda_dvc.study.files import Json
from wanda_dvc.study.protocol import differing

DENSE = "dense"  # the name of the dense model in tables
MISSING = "missing details"  # in place of a key: whether the protocols differ is not known
Tests = dict[tuple[str, str], Estimate]  # by a measure's name, and the text or task
Column = tuple[Measure, str]  # a measure, and a text, a task or ""


def _tested(results: Results, base: Results) -> list[Column]:
    columns = []
    for measure in MEASURES:
        if measure.test:
            columns += [(measure, on) for on in measure.where(results) if on in measure.where(base)]
    return columns


def why_not_comparable(measure: Measure, results: Results, base: Results, on: str) -> str | None:
    """Return why two models' values may not be compared: the first key that differs; None if they may."""
    protocols, base_protocols = measure.protocols(results, on), measure.protocols(base, on)
    if protocols.keys() != base_protocols.keys():
        return "tasks"
    for name, protocol in protocols.items():
        base_protocol = base_protocols[name]
        if protocol is None or base_protocol is None:
            return MISSING
        key = differing(protocol, base_protocol)
        if key:
            return key
    return None


def compare(pairs: Sequence[tuple[Results, Results]]) -> list[Tests]:
    """Return the paired tests of each pair's model against its base, with p-values adjusted for all tests."""
    all_tests = [_tests(results, base) for results, base in pairs]
    known = [(tests, key) for tests in all_tests for key, test in tests.items() if not math.isnan(test.p)]
    for (tests, key), p in zip(known, holm([tests[key].p for tests, key in known]), strict=True):
        tests[key] = tests[key]._replace(p=p)
    return all_tests


def _tests(results: Results, base: Results) -> Tests:
    tests: Tests = {}
    for measure, on in _tested(results, base):
        if measure.test is None or why_not_comparable(measure, results, base, on):
            continue
        test = measure.test.run(results, base, on)
        if test:
            tests[measure.name, on] = test
    return tests


def not_comparable(results: Results, base: Results) -> dict[str, str]:
    """Return the values of two models that may not be compared: the measure, and the key that differs."""
    one_text = len(results.texts) == 1
    keys = {}
    for measure, on in _tested(results, base):
        key = why_not_comparable(measure, results, base, on)
        if key:
            keys[measure.heading(on, one_text=one_text)] = key
    return keys


def tests_against(models: Mapping[str, Results], base: str) -> dict[str, Tests]:
    """Return the paired tests of each model but the dense one against `base`."""
    names = [name for name in models if name not in (base, DENSE)]
    return dict(zip(names, compare([(models[name], models[base]) for name in names]), strict=True))


def records(models: Mapping[str, Results], *, base: str) -> Json:
    """Return by model its measures, and its paired tests against `base`."""
    tests_of = tests_against(models, base)
    content: Json = {}
    for name, results in models.items():
        tests = tests_of.get(name, {}).items()
        listed = [{"measure": measure, "on": on, **test.record} for (measure, on), test in tests]
        content[name] = {"results": figures(results), "tests": listed}
    return content


def headings(models: Sequence[Results], *, brief: bool = True) -> dict[str, Column]:
    """Return the measures that a model has, each on its texts or tasks, by their heading; `brief`: of a short table."""
    one_text = len({text for results in models for text in results.texts}) <= 1
    shown = [measure for measure in MEASURES if measure.brief or not brief]
    return {measure.heading(on, one_text=one_text): (measure, on) for measure in shown for on in measure.where(*models)}


def cells(results: Results, columns: Mapping[str, Column], *, interval: bool = True) -> list[str]:
    """Return a row of a table: a model's values."""
    return [measure.text(measure.read(results, on), interval=interval) for measure, on in columns.values()]


def side_by_side(models: Mapping[str, Results], *, base: str) -> tuple[list[str], list[list[str]]]:
    """Return the headers and rows of a table: a row for each measure, a column for each model.

    A last column for each model but `base` and the dense one has its paired tests against `base`, if there are any.
    """
    tests_of = {name: tests for name, tests in tests_against(models, base).items() if tests}
    rows = []
    for heading, (measure, on) in headings(list(models.values()), brief=False).items():
        values = [measure.text(measure.read(results, on)) for results in models.values()]
        tests = [measure.test_text(tests.get((measure.name, on))) for tests in tests_of.values()]
        if measure.read(models[base], on) is None:  # the dense model has no divergence from itself
            tests = [""] * len(tests)
        rows.append([heading, *values, *tests])
    return ["", *models, *(f"{name} against {base}" for name in tests_of)], rows
