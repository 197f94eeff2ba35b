"""One order, three views; a light command line, which imports no more than it needs and says what is not installed."""

import ast
import errno
import json
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pipeline
import pytest
from command_line import SLOW_TO_IMPORT, process, wanda_dvc
from conftest import ROOT, Patch, fetch, read_preset, write_params, write_settings
from safetensors import SafetensorError

from wanda_dvc.catalog import STATISTICS
from wanda_dvc.cli import app
from wanda_dvc.errors import EXTRAS, explain
from wanda_dvc.params import check_params, nested, settings
from wanda_dvc.stages import STAGES, stage_inputs
from wanda_dvc.study.folder import Study
from wanda_dvc.study.scaffold import DEFAULT


def test_the_page_and_the_commands_have_the_stages_in_their_order_and_each_is_a_module():
    page = (ROOT / "docs/how-it-works.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| `([a-z-]+)`", page, flags=re.MULTILINE)
    assert table[: len(STAGES)] == list(STAGES)
    modules = {path.stem.replace("_", "-") for path in (ROOT / "src/wanda_dvc/stages").glob("*.py")}
    assert modules - {"--init--", "device", "inputs", "needs", "process", "candidates"} == set(STAGES)
    commands = [command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands]
    assert commands[-len(STAGES) :] == list(STAGES)


def test_dvc_yaml_and_ignore_files_follow_from_the_table_of_stages():
    """`python scripts/pipeline.py` writes it, here and for a new study."""
    for path in pipeline.TARGETS:
        assert path.read_text(encoding="utf-8") == pipeline.pipeline()
    for path in pipeline.IGNORES:
        assert path.read_text(encoding="utf-8") == pipeline.ignored(path.read_text(encoding="utf-8"))


def test_a_stage_reads_what_an_earlier_one_writes():
    written = set[str]()
    for row in STAGES.values():
        for part in row.variants.values():
            for path in part.deps:
                assert any(path == out or path.startswith(f"{out}/") for out in written), path
            written |= set(part.written)


@pytest.mark.parametrize("name", [name for name, _ in settings() if not name.startswith("runtime.")])
def test_a_setting_reruns_the_stages_that_the_page_of_settings_names(name: str):
    """Each stage depends on its file in plan/, which changes with these settings alone."""
    texts = {"calibration.text.source": "org/prose", "perplexity.texts.embedded.source": "org/verse"}
    content = read_preset(DEFAULT) | texts | {"recipe": "admm", "allocation": "owl", "recovery.tokens": 1000}
    changed = content | {name.replace("NAME", "embedded"): OTHERS[name]}
    changed |= {"allocation": None} if name == "pattern" else {}
    if name == "calibration.text.windows":
        shared: list[dict[str, Any]] = [{"source": "org/prose", "windows": OTHERS[name]}, {"source": "org/verses"}]
        content = {key: value for key, value in content.items() if key != "calibration.text.source"}
        changed = content | {"calibration.text": shared}
        content |= {"calibration.text": [{"source": text["source"]} for text in shared]}
    one, two = (stage_inputs(check_params(nested(dict(content)))) for content in (content, changed))
    files = {f"plan/{file}.json" for file in one if one[file] != two[file]}
    for row in STAGES.values():
        for part in row.variants.values():
            if any(dep.replace("{text}", "embedded") in files for dep in part.deps):
                assert any(name == x or name.startswith(f"{x}.") for x in part.settings), (row.name, name)
    assert files


OTHERS = {
    "model": "org/other", "dtype": "bfloat16", "calibration.text.source": "wikitext2",
    "calibration.text.split": "test", "calibration.text.column": "body", "calibration.text.join": "-",
    "calibration.text.windows": 7,
    "calibration.windows": 7, "calibration.length": 7, "calibration.seed": 7, "calibration.statistics": "fisher",
    "recipe": "fisher", "sparsity": 0.7, "pattern": "2:4", "method": "ria", "group": "linear",
    "allocation": "uniform", "reconstruction": "none", "propagation": "pruned",
    "recovery.tokens": 7, "recovery.text": {"source": "ptb"}, "recovery.rate": 0.5, "recovery.batch": 3,
    "perplexity.texts.NAME.source": "ptb", "perplexity.texts.NAME.split": "train",
    "perplexity.texts.NAME.column": "body", "perplexity.texts.NAME.join": "-", "perplexity.length": 7,
    "perplexity.windows": 7, "tasks.source": "benchmark", "tasks.names": ["piqa"], "tasks.limit": 7,
}  # fmt: skip


MISTAKES: list[tuple[list[str], dict[str, object], str]] = [
    (["-C", "..", "show"], {}, "no params.yaml here or above"),
    (["mask"], {"pattern": "4:2"}, 'params.yaml: pattern: found "4:2", expected unstructured, n:m'),
    (["mask", "--stage-version", "99"], {}, f"dvc.yaml: mask: version 99, expected {STAGES['mask'].version}"),
    (["stats"], {}, "stats/norms/provenance.json: missing; run `dvc repro` or `wanda-dvc calibrate` first"),
    (["perplexity", "thin"], {}, "found thin, expected dense, pruned"),
    (["download", "weights"], {}, "found weights, expected model, calibration, perplexity, recovery, tasks"),
]


def test_a_users_mistake_is_a_line_and_exit_2(tmp_path: Path):
    for words, changes, message in MISTAKES:
        (write_settings if changes else write_params)(tmp_path, tmp_path, **changes)
        done = wanda_dvc(*words, cwd=tmp_path)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_a_bug_is_not_reported_as_a_wrong_input(tmp_path: Path, monkeypatch: Patch):
    write_params(tmp_path, tmp_path)
    monkeypatch.setattr(Study, "model", lambda *_: 1 / 0)
    done = wanda_dvc("calibrate", cwd=tmp_path)
    assert done.returncode == 1
    assert "`wanda-dvc --debug …` prints the traceback" in done.stderr
    assert "Traceback" in wanda_dvc("--debug", "calibrate", cwd=tmp_path).stderr
    assert not explain(ModuleNotFoundError("No module named 'safetensors'", name="safetensors"))  # no extra


def test_a_full_disk_is_no_bug_in_libraries_words_either():
    for error in (
        OSError(errno.EFBIG, "File too large"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("Data processing error: IO Error: No space left on device (os error 28)"),  # of hf_xet
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),  # of torch.save
    ):
        assert explain(error)[0].startswith("disk: disk full (")


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.ENOMEM, "x"), RuntimeError("CUDA out of memory")])
def test_too_little_memory_is_no_bug(error: Exception):
    (message,) = explain(error)
    assert message.startswith("memory: ")
    assert ("runtime.device=cpu" in message) == ("CUDA" in message)  # `auto` takes a GPU of any size, and of any age
    assert message.endswith("in `calibrate` and `perplexity` also shorter windows")  # no remedy in `mask`
    assert "set runtime.device=cpu" in explain(RuntimeError("CUDA error: no kernel image is available"))[0]


def test_the_command_line_loads_no_heavy_library():
    """`make lint` holds the modules of settings, names and errors to it."""
    code = f"import sys, wanda_dvc.cli; print(sorted({SLOW_TO_IMPORT | {'pydantic'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_module_of_tests_is_imported():
    """Code and tables that test modules share are in modules without tests, such as `families.py`."""
    imported = set[tuple[str, str]]()
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names]
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                imported |= {(path.name, part) for name in names for part in name.split(".")}
    assert {(file, name) for file, name in imported if name.startswith("test_")} == set()


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TOOLS = ("dev", "docs")  # extras of commands that are none of ours
NAME = re.compile(r"[A-Za-z0-9_-]+")


def test_pyproject_names_the_same_extras():
    optional = {extra: wanted for extra, wanted in PROJECT["optional-dependencies"].items() if extra not in TOOLS}
    declared = {match[0]: extra for extra, wanted in optional.items() for one in wanted if (match := NAME.match(one))}
    assert declared == EXTRAS
    base = {match[0] for one in PROJECT["dependencies"] if (match := NAME.match(one))}
    assert not base & EXTRAS.keys()


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_refuses_one_argument_more_than_it_has(name: str):
    row = STAGES[name]
    most = 2 if any(variant.by_text for variant in row.variants.values()) else int(bool(row.argument))
    done = wanda_dvc(name, *["x"] * (most + 1))
    assert (done.returncode, "Got unexpected extra argument" in done.stderr) == (2, True)


def test_every_imported_library_is_a_declared_one():
    imported = set[str]()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").partition(".")[0])
    imported -= {*sys.stdlib_module_names, "wanda_dvc"}
    declared = {match[0].lower().replace("_", "-") for one in PROJECT["dependencies"] if (match := NAME.match(one))}
    packages = packages_distributions()
    missing = {
        name for name in imported - EXTRAS.keys()
        if not declared & {package.lower().replace("_", "-") for package in packages[name]}
    }  # fmt: skip
    assert missing - {"ruamel"} == set()  # ruamel.yaml, of a namespace


@pytest.mark.slow  # processes with real imports
@pytest.mark.parametrize("name", EXTRAS)
def test_without_a_library_its_command_is_one_line_and_exit_2_and_others_run(tmp_path: Path, tiny: Path, name: str):
    write_params(tmp_path, tiny, runtime__ray="local" if name == "ray" else None)
    fetch(Study(tmp_path), "model")
    without = f"import sys; sys.modules[{name!r}] = None"
    done = process(*("perplexity dense" if name == "ray" else "report").split(), cwd=tmp_path, first=without)
    assert (done.returncode, done.stdout) == (2, "")
    said = f"{name}: not installed, but this command needs it; run `pip install 'wanda-dvc[{EXTRAS[name]}]'`\n"
    assert done.stderr.endswith(said)
    assert process("show", cwd=tmp_path, first=without).returncode == 0


TORCH = {"numpy", "torch"}
MODELS = TORCH | {"accelerate", "scipy", "transformers"}  # transformers brings the others
QUESTIONS = {"datasets", "lm_eval", "numpy", "pandas", "pyarrow"}
# Of those, what each run may import, in an order in which a process may have imported what the later ones need.
NOTHING = ("plan", "download calibration", "download perplexity")
# Without blocks and without recovery.tokens.
UNASKED = ("calibrate blocks", "download recovery", "recover", "perplexity recovered", "zero-shot recovered")
WALKS = (*(f"calibrate {statistics}" for statistics in STATISTICS), "perplexity dense", "perplexity pruned")
MAY_IMPORT = {
    **{words: set[str]() for words in (*NOTHING, *UNASKED)},
    "download tasks": QUESTIONS,
    **dict.fromkeys(("mask", "apply"), TORCH),
    **dict.fromkeys(("download model", *WALKS), MODELS),
    **dict.fromkeys(("zero-shot dense", "zero-shot pruned"), MODELS | QUESTIONS),
}
# Imported once for a run and those after it.
BEFORE = {"mask": "torch", "download model": "wanda_dvc.engine.decoder", "zero-shot dense": "wanda_dvc.engine.harness"}
RUNS = """
import importlib, json, os, sys
for words, module in json.loads(sys.argv[1]):
    if module:
        importlib.import_module(module)
    if not os.fork():
        from wanda_dvc.cli import app
        app(words.split(), standalone_mode=False)
        print(json.dumps([words, sorted({name.partition(".")[0] for name in sys.modules})]), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.slow  # stages as processes, with real imports
def test_no_run_imports_more_than_it_needs(finished: Path, tmp_path: Path):
    every = [name.partition("@")[0].replace("-", " ") for row in STAGES.values() for name, *_ in row.runs(["embedded"])]
    assert sorted(words.replace("-", " ") for words in MAY_IMPORT) == sorted(every)
    shutil.copytree(finished, tmp_path / "study")
    command = [sys.executable, "-c", RUNS, json.dumps([(words, BEFORE.get(words)) for words in MAY_IMPORT])]
    done = subprocess.run(command, cwd=tmp_path / "study", capture_output=True, text=True, check=True)
    imported = dict(json.loads(line) for line in done.stdout.splitlines())
    assert imported.keys() == MAY_IMPORT.keys(), done.stderr
    more = {words: sorted(SLOW_TO_IMPORT & set(modules) - MAY_IMPORT[words]) for words, modules in imported.items()}
    assert {words: names for words, names in more.items() if names} == {}
