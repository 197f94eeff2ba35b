"""params.yaml: what is wrong is said, all of it, in one form."""

import itertools
from fractions import Fraction
from pathlib import Path

import pytest
from cases.grids import short
from conftest import committed, write_settings
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from wanda_dvc.catalog import GROUPS, RECIPES, STATISTICS, STRUCTURES
from wanda_dvc.errors import UserError
from wanda_dvc.params import CalibrationText, Params, Text, check_params, read_params, resolved
from wanda_dvc.plan import CHOICES, Plan
from wanda_dvc.stages import stage_inputs


def problems(tmp_path: Path, **changes: object) -> list[str]:
    write_settings(tmp_path, tmp_path, **changes)
    with pytest.raises(UserError) as caught:
        read_params(tmp_path / "params.yaml")
    return list(caught.value.problems)


# Settings, and how the message about them begins.
LINES = {
    "sparsity: 1.5": "sparsity: found 1.5, expected less than 1",
    "method: wands": 'method: found "wands", expected magnitude, wanda, ria, sparsegpt, admm, reap, divergence',
    "recovery__tokens: 1000000001": "recovery.tokens: found 1000000001, expected less than or equal to 1000000000",
    "sparsty: 0.5": "sparsty: no such setting; did you mean sparsity?",
    "calibration: 3": "calibration: found 3, expected settings",
    "TEXT__split: test": "calibration.text: found the text that perplexity is measured on (embedded, test), expected",
    "recovery__text: {source: embedded, split: test}": "recovery.text: found the text that perplexity is measured on",
    "TEXT__source: c4, TEXT__split: test": "calibration.text: found {'source': 'c4', 'split': 'test'}, expected split",
    "TEXT__source: /data/a.txt, TEXT__split: train": "calibration.text: found {'source': '/data/a.txt', 'split':",
    "allocation: owl, pattern: 2:4": "allocation: found owl with pattern 2:4, expected uniform",
    "allocation_strength: 0.1": "allocation_strength: no such setting",
    "method: reap": "method: found reap with pattern unstructured",
    "method: admm, pattern: heads": "method: found admm with pattern heads, expected wanda or another",
    "reconstruction: least-squares, pattern: experts": "reconstruction: found least-squares with pattern experts",
    "propagation: pruned, pattern: experts": "propagation: found pruned with pattern experts, expected dense",
}


def test_each_problem_has_its_line(tmp_path: Path):
    """What a wrong value of each setting says: tests/test_trust.py."""
    for changes, expected in LINES.items():
        given = YAML(typ="safe", pure=True).load(f"{{{changes.replace('TEXT', 'calibration__text')}}}")
        (problem,) = problems(tmp_path, **given)
        assert problem.startswith(f"params.yaml: {expected}")


def test_a_dotted_name_belongs_in_its_section():
    with pytest.raises(UserError, match=r"calibration.windows: found a dotted name, expected windows in the section"):
        check_params(committed() | {"calibration.windows": 8})


def test_all_problems_are_told_at_once(tmp_path: Path):
    assert len(problems(tmp_path, sparsity=-1, method="x", calibration__length=1)) == 3
    assert len(problems(tmp_path, pattern="4:2", runtime__mirror="here")) == 2


def test_the_evaluation_text_is_found_through_a_link(tmp_path: Path):
    (tmp_path / "text.txt").write_text("words")
    (tmp_path / "folder").symlink_to(tmp_path)
    (tmp_path / "link.txt").symlink_to("text.txt")
    for name in ("link.txt", "folder/text.txt", "folder/link.txt", "../" + tmp_path.name + "/text.txt"):
        measured = {"perplexity__texts__embedded__source": str(tmp_path / "text.txt")}
        write_settings(tmp_path, "org/model", calibration__text__source=f"{tmp_path}/{name}", **measured)
        with pytest.raises(UserError, match="calibration.text: found the text that perplexity is measured on"):
            read_params(tmp_path / "params.yaml")


def test_an_unquoted_pattern_is_no_number(tmp_path: Path):
    """`dvc exp run -S pattern=2:4` writes it without quotes; YAML 1.1 would read 124."""
    write_settings(tmp_path, tmp_path, pattern="PATTERN")
    text = (tmp_path / "params.yaml").read_text().replace('"PATTERN"', "2:4")
    (tmp_path / "params.yaml").write_text(text)
    assert read_params(tmp_path / "params.yaml").pattern == "2:4"


# --- recipes ---

WAYS = [(recipe, pattern) for recipe in RECIPES for pattern in ("unstructured", "2:4")]


def asked(recipe: str, pattern: str = "unstructured", **changes: object) -> Params:
    return check_params(committed() | {"recipe": recipe, "pattern": pattern} | changes)


@pytest.mark.parametrize(("recipe", "pattern"), WAYS)
def test_equal_choices_are_one_plan_however_they_are_written(recipe: str, pattern: str):
    """By the recipe, written out beside it, and written out beside any other recipe."""
    plan = asked(recipe, pattern).plan
    choices = {name: plan.to_dict()[name] for name in CHOICES}
    steps = {way: way_plan["steps"] for way in WAYS if "steps" in (way_plan := asked(*way).plan.to_dict())}
    assert steps == {("fisher", "unstructured"): 15, ("fisher", "2:4"): 30}  # no study of another solver runs again
    assert plan.to_dict()["allocation_strength"] == plan.allocation.strength
    assert asked(recipe, "neurons").plan.to_dict()["multiple"] == STRUCTURES["neurons"].multiple
    for other in RECIPES:
        assert asked(other, pattern, **choices).plan.to_dict() == plan.to_dict()


@pytest.mark.parametrize("recipe", short(RECIPES, "fisher"))
def test_masks_of_pruned_blocks_read_no_cached_gram_matrices(recipe: str):
    """The walk records its own; only sums and Gram matrices of gradients are the dense model's."""
    plan = asked(recipe, propagation="pruned").plan
    uses_fisher = plan.group == "outputs" or plan.allocation.uses_fisher or plan.reconstruction.uses_fisher
    assert plan.tier == ("fisher" if uses_fisher else "norms")


@given(st.integers(1, 999))
def test_a_sparsity_is_the_fraction_that_its_digits_say(thousandths: int):
    assert asked("wanda", sparsity=thousandths / 1000).plan.sparsity == Fraction(thousandths, 1000)


@pytest.mark.parametrize("recipe", short(RECIPES, "fisher"))
@pytest.mark.parametrize("choice", CHOICES)
def test_a_choice_overrides_its_recipe_and_no_other(recipe: str, choice: str):
    row = RECIPES[recipe]
    value = {"method": "ria", "group": "linear", "allocation": "owl", "reconstruction": "least-squares",
             "propagation": "pruned"}[choice]  # fmt: skip
    filled = asked(recipe, **{choice: value}).plan.to_dict()
    expected = {name: getattr(row, name) for name in CHOICES} | {choice: value}
    assert {name: filled[name] for name in CHOICES} == expected


@pytest.mark.parametrize("recipe", short(RECIPES, "fisher"))
def test_a_pattern_leaves_out_what_it_excludes_and_says_so(recipe: str):
    row, plan = RECIPES[recipe], asked(recipe, "2:4").plan
    assert (plan.group, plan.allocation.name) == ("row", "uniform")
    assert len(plan.left_out) == (row.group != "row") + (row.allocation != "uniform")
    assert asked(recipe).plan.left_out == ()
    assert [asked(recipe, units, group="outputs").plan.group for units in ("heads", "blocks")] == ["outputs", "row"]
    for group in GROUPS:
        given = asked(recipe, "2:4", group=group).plan
        assert (given.group, f"group {group}" in given.left_out) == ("row", group != "row")


@pytest.mark.parametrize("pattern", STRUCTURES)
@pytest.mark.parametrize("recipe", short((name for name, row in RECIPES.items() if row.for_units), "fisher"))
def test_a_recipe_for_zeros_has_the_choices_of_another_for_units(recipe: str, pattern: str):
    for choices in ({}, {"group": "outputs"}, {"reconstruction": "none"}):
        of_row = {"group": RECIPES[recipe].group} | choices
        plan = asked(recipe, pattern, **choices).plan
        assert plan.to_dict() == asked(RECIPES[recipe].for_units or "", pattern, **of_row).plan.to_dict()
    assert asked(recipe, pattern).plan.left_out == ()  # it fits units by itself
    assert asked(recipe, pattern, group="linear").plan.left_out == ("group linear",)


NEEDS = {
    "magnitude": "norms", "magnitude-rows": "norms", "wanda": "norms", "wanda-refit": "gram", "sparsegpt": "gram",
    "admm": "gram", "fisher": "fisher", "wanda-paper": "norms",
    "sparsegpt-paper": "norms", "ria": "norms", "owl": "norms",
}  # fmt: skip


@pytest.mark.parametrize("recipe", short(RECIPES, "fisher"))
def test_a_recipe_measures_the_tier_that_it_reads_and_a_named_tier_is_the_least(recipe: str):
    assert asked(recipe).plan.tier == asked(recipe).statistics[-1] == NEEDS[recipe]
    for tier in STATISTICS:
        content = asked(recipe).model_dump()
        content["calibration"]["statistics"] = tier
        assert check_params(content).statistics[-1] == max(tier, NEEDS[recipe], key=STATISTICS.index)


def test_equal_settings_of_two_files_are_those_that_give_equal_results():
    """Null is the first 10 items of the embedded questions, and all of a benchmark.

    A null text of a recovery is one of its own: the calibration's, without its windows.
    """

    def limit_of(source: str, limit: int | None) -> object:
        return resolved(asked("wanda", tasks={"source": source, "limit": limit}))["tasks.limit"]

    assert (limit_of("embedded", None), limit_of("embedded", 10), limit_of("embedded", 3)) == (10, 10, 3)
    assert (limit_of("benchmark", None), limit_of("benchmark", 10)) == (None, 10)
    text = {"source": "c4"}
    null, named = (
        asked("wanda", calibration={"text": text}, recovery={"tokens": 1000, "text": source}) for source in (None, text)
    )
    assert stage_inputs(null)["recover"] != stage_inputs(named)["recover"]
    assert (resolved(null)["recovery.text.source"], resolved(named)["recovery.text.source"]) == (None, "c4")


@pytest.mark.parametrize(("pattern", "expected"), [("2:4", "1/2"), ("1:3", "2/3"), ("3:4", "1/4")])
@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_a_pattern_sets_the_sparsity(pattern: str, expected: str, sparsity: float):
    params = asked("wanda", pattern, sparsity=sparsity)
    assert params.plan.sparsity == Fraction(expected)
    assert resolved(params)["sparsity"] == float(Fraction(expected))
    assert Plan.from_dict(params.plan.to_dict()) == params.plan


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("embedded", (None, None, None, "test", "text", "\n\n")),
        ("wikitext2", ("Salesforce/wikitext", "wikitext-2-raw-v1", None, "test", "text", "\n\n")),
        ("c4", ("allenai/c4", None, None, "validation", "text", " ")),
        ("ptb", ("ptb-text-only/ptb_text_only", "penn_treebank", None, "test", "sentence", " ")),
        ("org/prose", ("org/prose", None, None, "test", "text", "\n\n")),
        ("org/prose:small", ("org/prose", "small", None, "test", "text", "\n\n")),
        ("org/prose:small@v1/x", ("org/prose", "small", "v1/x", "test", "text", "\n\n")),
        ("/data/a.jsonl", (None, None, None, None, "text", "\n\n")),
    ],
)
def test_a_source_is_enough(source: str, expected: tuple[str | None, ...]):
    chosen = Text(source=source).chosen
    assert (chosen.dataset, chosen.config, chosen.revision, chosen.split, chosen.column, chosen.join) == expected
    temporary = CalibrationText(source=source).chosen
    assert (temporary.split, temporary.join) == (None if source.startswith("/") else "train", " ")


@pytest.mark.parametrize(
    ("source", "same"),
    [("embedded", True), ("wikitext2", False), ("/data/test.txt", False), ("Salesforce/wikitext", False)],
)
def test_a_text_of_the_calibrations_source_is_known(tmp_path: Path, source: str, same: bool):
    write_settings(tmp_path, "/models/any", perplexity__texts__embedded__source=source)
    said = read_params(tmp_path / "params.yaml").about_text("embedded")
    assert said.startswith(f"The calibration text has {'the same' if same else 'another'} source")


@pytest.mark.parametrize(
    "texts",
    [*({name: {"source": "ptb"}} for name in ("a/b", "a.b", "a@b", "1e3", 1, "x" * 260)), {}, [{"source": "ptb"}]],
    ids=str,
)
def test_texts_have_names(texts: object):
    """A name is a part of file names, which have at most 255 characters."""
    content = committed()
    content["perplexity"]["texts"] = texts
    with pytest.raises(UserError) as refused:
        check_params(content)
    (problem,) = refused.value.problems
    assert problem.startswith("params.yaml: perplexity.texts")


SPELLINGS = ["wikitext2", "Salesforce/wikitext:wikitext-2-raw-v1", "Salesforce/wikitext:wikitext-2-raw-v1@main"]


@pytest.mark.parametrize(("one", "other"), list(itertools.product(SPELLINGS, SPELLINGS)))
def test_a_text_is_not_calibrated_on_in_any_spelling(one: str, other: str, tmp_path: Path):
    texts = {"calibration__text__source": one, "calibration__text__split": "test"}
    found = problems(tmp_path, **texts, perplexity__texts__embedded__source=other)
    assert any("found the text that perplexity is measured on" in problem for problem in found)
