"""Compare the results of models: which values may be compared, and their paired tests.

One function on protocols, `study.protocol.first_difference`, says whether values may be compared: the same windows or
items, dtype, prompts, and versions of the libraries that computed them.
"""

from collections.abc import Iterator, Mapping, Sequence

from wanda_dvc.results.intervals import Estimate, holm
from wanda_dvc.results.measures import MEASURES, Measure, Results, figures
from wanda_dvc.study.files import Json
from wanda_dvc.study.protocol import first_difference

DENSE = "dense"  # the name of the dense model in tables
MISSING = "missing details"  # a reason: whether the protocols differ is not known


def _compared(results: Results, base: Results) -> Iterator[tuple[Measure, str, str | None]]:
    """Yield each measure with a test that two models have, on what, and why its values may not be compared."""
    for measure in MEASURES:
        if measure.paired_test:
            for target in measure.where(results):
                if target in measure.where(base):
                    yield measure, target, why_not_comparable(measure, results, base, target)


def why_not_comparable(measure: Measure, results: Results, base: Results, target: str) -> str | None:
    """Return the reason why two models' values may not be compared: the first key that differs; None if they may."""
    protocols, base_protocols = measure.protocols_of(results, target), measure.protocols_of(base, target)
    if protocols.keys() != base_protocols.keys():
        return "tasks"
    for name, protocol in protocols.items():
        base_protocol = base_protocols[name]
        if protocol is None or base_protocol is None:
            return MISSING
        key = first_difference(protocol, base_protocol)
        if key:
            return key
    return None


def not_comparable(results: Results, base: Results) -> dict[str, str]:
    """Return the reason of each value of two models that may not be compared, by heading."""
    one_text = len({*results.texts, *base.texts}) <= 1
    compared = _compared(results, base)
    return {measure.heading(target, one_text=one_text): reason for measure, target, reason in compared if reason}


def paired_tests(
    models: Mapping[str, Results], base: str, further: Sequence[tuple[str, str]] = ()
) -> dict[tuple[str, str, str, str], Estimate]:
    """Return the tests of each model but the dense one against `base`, and of `further` pairs of a model and its base.

    They are listed by the names of model, base and measure, and the text or task. P-values are adjusted for all tests.
    """
    tests = {}
    for name, base_name in [*((name, base) for name in models if name not in (base, DENSE)), *further]:
        results, base_results = models[name], models[base_name]
        for measure, target, reason in _compared(results, base_results):
            if measure.paired_test and reason is None:
                estimate = measure.paired_test.run(results, base_results, target)
                if estimate:
                    tests[name, base_name, measure.name, target] = estimate
    adjusted = holm([estimate.p for estimate in tests.values()])
    return {key: estimate._replace(p=p) for (key, estimate), p in zip(tests.items(), adjusted, strict=True)}


def records(models: Mapping[str, Results], *, base: str) -> Json:
    """Return by model its measures, and its paired tests against `base`."""
    content: Json = {name: {"results": figures(results), "tests": []} for name, results in models.items()}
    for (name, _, measure, target), test in paired_tests(models, base).items():
        content[name]["tests"].append({"measure": measure, "on": target, **test.record})
    return content


def headings(models: Sequence[Results], *, brief: bool = True) -> dict[str, tuple[Measure, str]]:
    """Return by heading the measures that a model has, each with a text, a task or ""; `brief`: of a short table."""
    one_text = len({text for results in models for text in results.texts}) <= 1
    measures, columns = [measure for measure in MEASURES if measure.brief or not brief], {}
    for measure in measures:
        for target in measure.where(*models):
            columns[measure.heading(target, one_text=one_text)] = measure, target
    return columns


def side_by_side(
    models: Mapping[str, Results], *, base: str, further: Sequence[tuple[str, str]] = ()
) -> tuple[list[str], list[list[str]]]:
    """Return the headers and rows of a table: a row for each measure, a column for each model and pair of a test."""
    tests = paired_tests(models, base, further)
    pairs = list(dict.fromkeys((name, base_name) for name, base_name, _, _ in tests))
    rows = []
    for heading, (measure, target) in headings(list(models.values()), brief=False).items():
        row = [heading, *(measure.formatted(results, target) for results in models.values())]
        for name, base_name in pairs:
            test = tests.get((name, base_name, measure.name, target))
            row.append(measure.formatted_test(test) if test else "")
        rows.append(row)
    return ["", *models, *(f"{name} against {base_name}" for name, base_name in pairs)], rows
