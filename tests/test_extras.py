"""Libraries that only some commands need: without one, a command says in one line what to run."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from command_line import process
from conftest import ROOT, write_params
from typer.main import get_command

from wanda_dvc.cli import app
from wanda_dvc.errors import EXTRAS
from wanda_dvc.stages import STAGES
from wanda_dvc.study.files import write_json

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TOOLS = ("dev", "docs")  # extras of commands that are none of ours
NAME = re.compile(r"[A-Za-z0-9_-]+")


def test_pyproject_names_the_same_extras():
    optional = {extra: wanted for extra, wanted in PROJECT["optional-dependencies"].items() if extra not in TOOLS}
    declared = {match[0]: extra for extra, wanted in optional.items() for one in wanted if (match := NAME.match(one))}
    assert declared == EXTRAS
    base = {match[0] for one in PROJECT["dependencies"] if (match := NAME.match(one))}
    assert not base & EXTRAS.keys()


def said(name: str) -> str:
    return f"{name}: not installed, but this command needs it; run `pip install 'wanda-dvc[{EXTRAS[name]}]'`"


@pytest.mark.parametrize("name", [name for name in EXTRAS if name != "ray"])
def test_a_report_without_its_library_is_one_line_and_exit_2(tmp_path: Path, name: str):
    write_params(tmp_path, tmp_path)
    made = {
        "model": {"source": "m", "sha256": "0"},
        "text": {"source": "t", "sha256": "0"},
        "params": {"dtype": "float32"},
    }
    write_json(tmp_path / "stats/norms/provenance.json", {"format": 1, **made})
    done = process("report", cwd=tmp_path, first=f"import sys; sys.modules[{name!r}] = None")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith(f"{said(name)}\n")


# How a command ends in a project without outputs, by its words.
ENDS = {
    "--help": "", "show": "", "list": "no DVC repository", "stats": "missing", "evaluate model": "missing",
    "init study": "", "export folder --rev name": "no git repository",
    "doctor": "",
}  # fmt: skip
EACH = """
import json, sys
sys.modules.update(dict.fromkeys(json.loads(sys.argv[1])))
from typer.testing import CliRunner
from wanda_dvc.cli import app
from wanda_dvc.errors import explain
for words in json.loads(sys.argv[2]):
    done = CliRunner().invoke(app, words.split())
    failed = isinstance(done.exception, Exception)
    said = [*explain(done.exception)] if failed else [str(done.exception or "")]
    print(json.dumps({"said": said, "bug": failed and not explain(done.exception), "stdout": done.stdout}))
"""


def test_only_reports_and_ray_need_them(tmp_path: Path, tiny: Path):
    """One process runs every command but the stages, and at the end a stage that is to run on Ray."""
    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert {words.split()[0] for words in [*ENDS, "report"]} == {"--help", *commands} - {*STAGES}
    (tmp_path / "ray").mkdir()
    write_params(tmp_path, tiny)
    write_params(tmp_path / "ray", tiny, runtime__ray="local")
    given = [json.dumps(sorted(EXTRAS)), json.dumps([*ENDS, "-C ray perplexity dense"])]
    done = subprocess.run(
        [sys.executable, "-c", EACH, *given], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    *others, ray = map(json.loads, done.stdout.splitlines())
    assert ray == {"said": [said("ray")], "bug": False, "stdout": ""}
    for (words, end), found in zip(ENDS.items(), others, strict=True):
        assert not found["bug"], words
        assert found["said"] == [end] or (end and end in found["said"][0]), words


def test_another_missing_module_is_a_bug(tmp_path: Path):
    write_params(tmp_path, tmp_path)
    done = process("mask", cwd=tmp_path, first="import sys; sys.modules['safetensors'] = None")
    assert done.returncode == 1
    assert "This is a bug" in done.stderr
