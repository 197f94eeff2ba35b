"""What all commands share: JSON instead of a table, exit codes, and completion in the shell."""

import json
import os
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from command_line import process, wanda_dvc
from conftest import Factory, Patch, write_settings
from repository import Repository
from typer.main import get_command
from typer.testing import CliRunner

from wanda_dvc.catalog import RECIPES, methods
from wanda_dvc.cli import _prepare, app
from wanda_dvc.reading import check_place
from wanda_dvc.stages import STAGES
from wanda_dvc.study.files import load_json
from wanda_dvc.study.folder import Study

# Every command but the stages: those that print a table have --json; the others write files and say which.
TABLES = {
    "show": ["show"], "list": ["list"], "stats": ["stats", "--layer", "1"], "doctor": ["doctor"],
    "evaluate": ["evaluate", "models/pruned"], "recipes": ["recipes"],
}  # fmt: skip
WRITE = {"report", "export", "init", "prune"}


def test_a_terminal_without_utf8_gets_its_table(finished: Path):
    done = process("show", cwd=finished, first="import sys; sys.stdout.reconfigure(encoding='cp437')")
    assert done.returncode == 0, done.stderr


def test_a_place_in_the_root_is_a_place():
    assert check_place(Path("/")) == Path("/")


@pytest.fixture(scope="module")
def calibrated_study(tmp_path_factory: Factory, finished: Path) -> Study:
    """A repository whose stages have run without DVC's help."""
    made = Repository.new(tmp_path_factory.mktemp("commands") / "study", finished, real=True)  # it needs DVC once
    shutil.copytree(finished, made.root, symlinks=True, dirs_exist_ok=True)
    made.commit()
    return Study(made.root)


@pytest.fixture
def there(calibrated_study: Study, monkeypatch: Patch) -> Study:
    """The study, in which commands run and an earlier one has failed."""
    (calibrated_study.work_root / ("1" * 32)).mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(calibrated_study.root)
    return calibrated_study


def printed(words: list[str], code: int = 0) -> Any:
    done = CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False)
    assert done.exit_code == code, done.output
    return json.loads(done.stdout, parse_constant=pytest.fail)  # NaN and Infinity are no JSON


def test_every_command_is_a_stage_prints_a_table_or_writes_files():
    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert set(commands) == {*STAGES, *TABLES, *WRITE}
    asked = {name for name, command in commands.items() for option in command.params if "--json" in option.opts}
    assert asked == set(TABLES)
    assert any({"--layer", "--block"} == set(option.opts) for option in commands["stats"].params)


@pytest.mark.parametrize("name", [name for name in TABLES if name != "evaluate"])  # it has tests/test_evaluate.py
def test_json_is_all_that_is_printed_and_says_what_the_table_says(there: Study, name: str):
    table = CliRunner().invoke(app, TABLES[name], catch_exceptions=False)
    assert table.exit_code == 0
    with pytest.raises(ValueError, match="Expecting value|Extra data"):
        json.loads(table.stdout)
    content = printed(TABLES[name])
    rows = [line for line in table.stdout.splitlines() if line.startswith("|")][2:]
    first = [row.split("|")[1].strip() for row in rows]
    match name:
        case "show":
            assert f"{content['models']['dense']['results']['perplexity']['embedded']['value']:,.2f} (" in table.stdout
        case "list":
            assert [record["experiment"] for record in content] == first == ["workspace", "main"]
        case "stats":
            assert [str(record["block"]) for record in content] == first
            numbers = [[f"{record[key]:.4g}" for key in ("mean", "median", "max")] for record in content]
            assert [[cell.strip() for cell in row.split("|")[4:7]] for row in rows] == numbers
        case "doctor":
            assert [record["what"] for record in content["checks"]] == first
        case "recipes":
            assert [record["name"] for record in content] == first == [*RECIPES]
            for record, row in zip(content, rows, strict=True):
                cells = [cell.strip() for cell in row.split("|")[1:-1]]
                weights = "new" if record["changes_weights"] else "unchanged"
                assert cells[1:4] == [record["about"], record["reads"], weights]
                assert len(record["papers"]) == len(cells[-1].split("; ")) == cells[-1].count(" (")


def test_show_as_json_holds_the_files_own_numbers(there: Study):
    content = printed(["show"])
    for model in ("dense", "pruned"):
        expected = load_json(there.metrics(model, "perplexity/embedded"))["perplexity"]
        assert content["models"][model]["results"]["perplexity"]["embedded"]["value"] == expected
    expected = load_json(there.metrics("pruned", "sparsity"))["sparsity"]
    assert content["models"]["pruned"]["results"]["sparsity"] == {"value": expected}
    assert content["experiments"]["workspace"]["settings"]["method"] in methods()
    assert content["models"]["pruned"]["tests"][0]["measure"] == "perplexity"


def test_what_doctor_misses_is_told_by_its_exit_code_too(tmp_path: Path, monkeypatch: Patch):
    monkeypatch.chdir(tmp_path)
    content = printed(["doctor"], code=2)
    assert content["missing"] == ["params.yaml"]
    assert [check["good"] for check in content["checks"] if check["what"] == "params.yaml"] == [False]
    (tmp_path / "params.yaml").write_text("sparsity: 2\nrecipe: no\n", encoding="utf-8")  # several problems
    assert printed(["doctor"], code=2)["missing"] == ["params.yaml"]
    assert wanda_dvc("doctor", cwd=tmp_path).returncode == 2


# --- the environment of a stage ---


@pytest.mark.parametrize("network", [True, False])
def test_only_download_may_reach_the_network(network: bool):
    with mock.patch.dict(os.environ):
        del os.environ["HF_HUB_OFFLINE"]
        _prepare("a stage", network=network)
        assert ("HF_HUB_OFFLINE" in os.environ) is not network


def test_a_stage_sets_the_environment_before_it_imports_libraries(tmp_path: Path):
    """Their progress bars would fill a log: tqdm reads TQDM_DISABLE when it is imported."""
    write_settings(tmp_path, "org/name")
    ends = "import sys, wanda_dvc.cli as cli; cli._prepare = lambda *_, **__: sys.exit(str('tqdm' in sys.modules))"
    assert process("plan", cwd=tmp_path, first=ends).stderr == "False\n"
