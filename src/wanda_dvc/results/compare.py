"""Compare the results of models: which values may be compared, and their paired tests.

One function on protocols, `study.protocol.differing`, says whether values may be compared: the same windows or items,
dtype, prompts, and versions of the libraries that computed them.
"""

from collections.abc import Iterator, Mapping, Sequence

from wanda_dvc.results.intervals import Estimate, holm
from wanda_dvc.results.measures import MEASURES, Measure, Results, figures
from wanda_dvc.study.files import Json
from wanda_dvc.study.protocol import differing

DENSE = "dense"  # the name of the dense model in tables
MISSING = "missing details"  # a reason: whether the protocols differ is not known
Tests = dict[tuple[str, str], Estimate]  # by a measure's name, and the text or task
Pair = tuple[str, str]  # the names of a model and its base
Column = tuple[Measure, str]  # a measure, and a text, a task or ""


def _tested(results: Results, base: Results) -> Iterator[tuple[Measure, str, str | None]]:
    """Yield each tested measure of two models, the text or task, and the reason why they may not be compared."""
    for measure in MEASURES:
        for target in measure.where(results):
            if measure.test and target in measure.where(base):
                yield measure, target, why_not_comparable(measure, results, base, target)


def why_not_comparable(measure: Measure, results: Results, base: Results, target: str) -> str | None:
    """Return the reason why two models' values may not be compared: the first key that differs; None if they may."""
    protocols, base_protocols = measure.protocols(results, target), measure.protocols(base, target)
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
    keys = [(tests, key) for tests in all_tests for key in tests]
    adjusted = holm([tests[key].p for tests, key in keys])
    for (tests, key), p in zip(keys, adjusted, strict=True):
        tests[key] = tests[key]._replace(p=p)
    return all_tests


def _tests(results: Results, base: Results) -> Tests:
    tests: Tests = {}
    for measure, target, reason in _tested(results, base):
        test = measure.test.run(results, base, target) if measure.test and not reason else None
        if test:
            tests[measure.name, target] = test
    return tests


def not_comparable(results: Results, base: Results) -> dict[str, str]:
    """Return the reason of each value of two models that may not be compared, by heading."""
    one_text = len({*results.texts, *base.texts}) <= 1
    tested = _tested(results, base)
    return {measure.heading(target, one_text=one_text): reason for measure, target, reason in tested if reason}


def paired_tests(models: Mapping[str, Results], base: str, pairs: Sequence[Pair]) -> dict[Pair, Tests]:
    """Return the paired tests of each model but the dense one against `base`, and of further pairs of names."""
    pairs = [*((name, base) for name in models if name not in (base, DENSE)), *pairs]
    return dict(zip(pairs, compare([(models[name], models[other]) for name, other in pairs]), strict=True))


def records(models: Mapping[str, Results], *, base: str) -> Json:
    """Return by model its measures, and its paired tests against `base`."""
    tests_of = paired_tests(models, base, [])
    content: Json = {}
    for name, results in models.items():
        tests = tests_of.get((name, base), {}).items()
        listed = [{"measure": measure, "on": target, **test.record} for (measure, target), test in tests]
        content[name] = {"results": figures(results), "tests": listed}
    return content


def headings(models: Sequence[Results], *, brief: bool = True) -> dict[str, Column]:
    """Return the measures that a model has, each on its texts or tasks, by their heading; `brief`: of a short table."""
    one_text = len({text for results in models for text in results.texts}) <= 1
    columns = {}
    for measure in MEASURES:
        if brief and not measure.brief:
            continue
        for target in measure.where(*models):
            columns[measure.heading(target, one_text=one_text)] = measure, target
    return columns


def cells(results: Results, columns: Mapping[str, Column], *, interval: bool = True) -> list[str]:
    """Return a row of a table: a model's values."""
    return [measure.text(measure.read(results, target), interval=interval) for measure, target in columns.values()]


def side_by_side(
    models: Mapping[str, Results], *, base: str, pairs: Sequence[Pair] = ()
) -> tuple[list[str], list[list[str]]]:
    """Return the headers and rows of a table: a row for each measure, a column for each model.

    Further columns have paired tests: of each model but the dense one against `base`, and of the `pairs`.
    """
    tests_of = {pair: tests for pair, tests in paired_tests(models, base, pairs).items() if tests}
    rows = []
    for heading, (measure, target) in headings(list(models.values()), brief=False).items():
        row = [heading, *(measure.text(measure.read(results, target)) for results in models.values())]
        for (_, other), tests in tests_of.items():
            tested = measure.read(models[other], target) is not None  # the dense model has no divergence from itself
            row.append(measure.test_text(tests.get((measure.name, target))) if tested else "")
        rows.append(row)
    return ["", *models, *(f"{name} against {other}" for name, other in tests_of)], rows
