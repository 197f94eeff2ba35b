"""Libraries that only some commands need: without one, a command says in one line what to run."""

import re
import tomllib
from pathlib import Path

import pytest
from command_line import process
from conftest import ROOT, write_params

from wanda_dvc.errors import EXTRAS
from wanda_dvc.study.files import write_json
from wanda_dvc.views.doctor import doctor

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TOOLS = ("dev", "docs")  # extras of commands that are none of ours
NAME = re.compile(r"[A-Za-z0-9_-]+")


def test_pyproject_names_the_same_extras():
    optional = {extra: wanted for extra, wanted in PROJECT["optional-dependencies"].items() if extra not in TOOLS}
    declared = {match[0]: extra for extra, wanted in optional.items() for one in wanted if (match := NAME.match(one))}
    assert declared == EXTRAS
    base = {match[0] for one in PROJECT["dependencies"] if (match := NAME.match(one))}
    assert not base & EXTRAS.keys()


NEEDS = [
    ("matplotlib", ["report"]),
    ("ray", ["perplexity", "dense"]),
    ("scipy", ["report"]),
]


@pytest.mark.parametrize(("name", "words"), NEEDS)
def test_a_command_without_its_library_is_one_line_and_exit_2(tmp_path: Path, name: str, words: list[str]):
    assert {name for name, _ in NEEDS} == EXTRAS.keys()
    write_params(tmp_path, tmp_path, runtime__ray="local" if name == "ray" else None)
    made = {
        "model": {"source": "m", "sha256": "0"},
        "text": {"source": "t", "sha256": "0"},
        "params": {"dtype": "float32"},
    }
    write_json(tmp_path / "stats/norms/provenance.json", {"format": 1, **made})
    done = process(*words, cwd=tmp_path, first=f"import sys; sys.modules[{name!r}] = None")
    assert (done.returncode, done.stdout) == (2, "")
    said = f"{name}: not installed, but this command needs it; run `pip install 'wanda-dvc[{EXTRAS[name]}]'`\n"
    assert done.stderr.endswith(said)


@pytest.mark.parametrize("words", [["--help"], ["preset"], ["init", "study"], ["doctor"], ["cost"]])
def test_other_commands_need_none_of_them(tmp_path: Path, words: list[str]):
    hidden = f"import sys; sys.modules.update(dict.fromkeys({sorted(EXTRAS)}))"
    done = process(*words, cwd=tmp_path, first=hidden)
    assert "not installed" not in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode in (0, 2)


def test_another_missing_module_is_a_bug(tmp_path: Path):
    write_params(tmp_path, tmp_path)
    done = process("mask", cwd=tmp_path, first="import sys; sys.modules['safetensors'] = None")
    assert done.returncode == 1
    assert "This is a bug" in done.stderr


def test_the_doctor_names_an_extra_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("wanda_dvc.views.doctor.find_spec", lambda name: None)
    table, _ = doctor(start=tmp_path)
    (line,) = [line for line in table.splitlines() if line.startswith("| libraries: report")]
    assert "✗" in line
    assert "no matplotlib, scipy" in line
    assert "`pip install 'wanda-dvc[report]'`" in line
    assert "libraries: report" not in table.partition("Missing:")[2]
