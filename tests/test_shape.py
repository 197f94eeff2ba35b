"""One order, three views; a light command line; and a product that stands on its own."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import process, wanda_dvc
from conftest import ROOT, read_preset, script, write_params, write_settings
from ruamel.yaml import YAML
from typer.testing import CliRunner

from wanda_dvc.cli import app
from wanda_dvc.params import check_params, nested, settings
from wanda_dvc.stages import STAGES, planned
from wanda_dvc.study.project import Project
from wanda_dvc.study.scaffold import DEFAULT


def test_docs_dvc_yaml_modules_and_commands_name_the_same_stages_in_the_same_order():
    table = re.findall(
        r"^\| `([a-z-]+)`", (ROOT / "docs/how-it-works.md").read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    assert table[: len(STAGES)] == list(STAGES)
    modules = {path.stem.replace("_", "-") for path in (ROOT / "src/wanda_dvc/stages").glob("*.py")}
    assert modules - {"--init--", "continuations", "inputs", "needs", "running", "runs"} == set(STAGES)
    commands = [command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands]
    assert commands[-len(STAGES) :] == list(STAGES)


def test_dvc_yaml_and_ignore_files_follow_from_the_table_of_stages():
    """`python scripts/pipeline.py` writes it, here and for a new study."""
    pipeline = script("pipeline")
    for path in pipeline.TARGETS:
        assert path.read_text(encoding="utf-8") == pipeline.pipeline()
    for path in pipeline.IGNORES:
        assert path.read_text(encoding="utf-8") == pipeline.ignored(path.read_text(encoding="utf-8"))


def test_a_stage_reads_what_an_earlier_one_writes():
    written = {"prompts.txt"}
    for row in STAGES.values():
        for part in row.parts.values():
            for path in part.deps:
                assert any(path == out or path.startswith(f"{out}/") for out in written), path
            written |= set(part.written)


@pytest.mark.parametrize("name", [name for name, _ in settings() if not name.startswith("runtime.")])
def test_a_setting_reruns_the_stages_that_the_page_of_settings_names(name: str):
    """Each stage depends on its file in plan/, which changes with these settings alone."""
    texts = {"calibration.text.source": "org/prose", "perplexity.texts.embedded.source": "org/verse"}
    content = read_preset(DEFAULT) | texts | {"recipe": "admm", "allocation": "owl"}
    changed = content | {name.replace("NAME", "embedded"): OTHERS[name]}
    changed |= {"allocation": None} if name == "pattern" else {}
    one, two = (planned(check_params(nested(dict(content)))) for content in (content, changed))
    files = {f"plan/{file}.json" for file in one if one[file] != two[file]}
    for row in STAGES.values():
        for part in row.parts.values():
            if any(dep.replace("{text}", "embedded") in files for dep in part.deps):
                assert any(name == x or name.startswith(f"{x}.") for x in part.settings), (row.name, name)
    assert files


OTHERS = {
    "model": "org/other", "dtype": "bfloat16", "calibration.text.source": "wikitext2",
    "calibration.text.split": "test", "calibration.text.column": "body", "calibration.text.join": "-",
    "calibration.windows": 7, "calibration.length": 7, "calibration.seed": 7, "calibration.statistics": "gradients",
    "recipe": "fisher", "sparsity": 0.7, "pattern": "2:4", "method": "ria", "group": "linear",
    "allocation": "uniform",
    "allocation_strength": 0.01, "reconstruction": "none", "propagation": "pruned",
    "perplexity.texts.NAME.source": "ptb", "perplexity.texts.NAME.split": "train",
    "perplexity.texts.NAME.column": "body", "perplexity.texts.NAME.join": "-", "perplexity.length": 7,
    "perplexity.windows": 7, "tasks.source": "benchmark", "tasks.names": ["piqa"], "zero_shot.limit": 7,
}  # fmt: skip


# Torch is imported once; each command runs in a fork, and an end that is not at once shows in what it prints.
HEAVY = """
import atexit, json, os, sys, torch
for number, words in enumerate(json.loads(sys.argv[1])):
    if not os.fork():
        for stream in (1, 2):
            os.dup2(os.open(f"{sys.argv[2]}/{number}.{stream}", os.O_WRONLY | os.O_CREAT), stream)
        atexit.register(print, "taken apart")
        print("first")
        sys.argv = ["wanda-dvc", *words]
        from wanda_dvc.cli import run
        run()
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


@pytest.mark.slow  # processes with real imports
def test_a_process_that_holds_torch_ends_as_one_without(tmp_path: Path):
    """It is not taken apart in the end, but all that it prints comes out, and its status is the same."""
    commands = [["--help"], ["perplexity"], ["mask", "--no-such-option"]]
    arguments = [sys.executable, "-c", HEAVY, json.dumps(commands), str(tmp_path)]
    codes = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for number, words in enumerate(commands):
        light = process(*words)
        assert light.stdout + light.stderr
        heavy = [(tmp_path / f"{number}.{stream}").read_text(encoding="utf-8") for stream in (1, 2)]
        assert (int(codes[number]), *heavy) == (light.returncode, "first\n" + light.stdout, light.stderr)


def test_help_shows_the_panels_in_order():
    shown = CliRunner().invoke(app, ["--help"]).output
    panels = [shown.index(panel) for panel in ("Results", "Studies", "Stages, in the order of the pipeline")]
    assert panels == sorted(panels)
    assert all(command in shown[panels[1] :] for command in ("init", "export", "doctor"))


@pytest.mark.parametrize(
    ("words", "changes", "message"),
    [
        (["mask"], {"sparsity": 1.5}, "params.yaml: sparsity: found 1.5, expected less than 1"),
        (
            ["mask"],
            {"pattern": "4:2"},
            'params.yaml: pattern: found "4:2", expected unstructured, n:m',
        ),
        (["mask"], {"sparsety": 1}, "params.yaml: sparsety: no such setting; did you mean sparsity?"),
        (
            ["mask", "--stage-version", "99"],
            {},
            f"dvc.yaml: mask: version 99, expected {STAGES['mask'].version}",
        ),
        (["mask"], {}, "models/dense/provenance.json: missing; run `dvc repro` or `wanda-dvc download model` first"),
        # DVC refuses it too, in words of its own, before any stage runs.
        (["show"], {"tasks__names": "piqa"}, 'params.yaml: tasks.names: found "piqa", expected a valid list'),
        (["stats"], {}, "stats/norms/provenance.json: missing; run `dvc repro` or `wanda-dvc calibrate` first"),
        (["perplexity", "thin"], {}, "found thin, expected dense, pruned"),
        (["download", "weights"], {}, "found weights, expected model, calibration, perplexity, tasks"),
    ],
)
def test_a_users_mistake_is_a_line_and_exit_2(
    tmp_path: Path, words: list[str], changes: dict[str, object], message: str
):
    (write_settings if changes else write_params)(tmp_path, tmp_path, **changes)
    done = wanda_dvc(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_outside_a_project_it_says_so(tmp_path: Path):
    done = wanda_dvc("show", cwd=tmp_path)
    assert done.returncode == 2
    assert "no params.yaml here or above" in done.stderr


def test_a_bug_is_not_reported_as_a_wrong_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_params(tmp_path, tmp_path)
    monkeypatch.setattr(Project, "model", lambda *_: 1 / 0)
    done = wanda_dvc("mask", cwd=tmp_path)
    assert done.returncode == 1
    assert "`wanda-dvc --debug …` prints the traceback" in done.stderr
    assert "Traceback" in wanda_dvc("--debug", "mask", cwd=tmp_path).stderr


def test_git_ignores_every_out_that_dvc_keeps():
    """Otherwise `dvc repro` writes into .gitignore. Metrics are committed instead."""
    content = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    outs = [out for stage in content.values() for out in stage.get("do", stage).get("outs", [])]
    paths = [path for out in outs for path in (out if isinstance(out, dict) else [out])]
    named = {re.sub(r"\$\{.*?\}", "x", path) for path in paths} - {"x"}
    assert len(named) > 15
    lines = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    folders = tuple(line.lstrip("/") for line in lines if line.endswith("/"))
    assert [path for path in sorted(named) if not f"{path}/".startswith(folders)] == []


def test_the_core_names_a_setting_and_no_file():
    for folder in ("pruning", "engine"):
        for module in (ROOT / "src/wanda_dvc" / folder).glob("*.py"):
            assert "params.yaml:" not in module.read_text(encoding="utf-8"), module
