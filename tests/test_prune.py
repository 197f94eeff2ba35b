"""`wanda-dvc prune`: a model in, a pruned model and a table out; its study, and what stops it."""

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command_line import SLOW_TO_IMPORT, wanda_dvc
from conftest import Capture, Patch, git, save_tiny_model, without_privilege, write_settings
from repository import Repository
from transformers import AutoModelForCausalLM, AutoTokenizer

import wanda_dvc as wd
from wanda_dvc.commands import prune as module
from wanda_dvc.commands.prune import describe_run, prune_model, settings_for_model
from wanda_dvc.commands.request import TOKEN_UNITS, _parse_number, _parse_sparsity, check_request, parse_changes
from wanda_dvc.engine.memory import ModelSizes
from wanda_dvc.errors import UserError, explain
from wanda_dvc.params import read_params, settings
from wanda_dvc.stages import STAGES, run
from wanda_dvc.stages.needs import requirements
from wanda_dvc.study import scaffold
from wanda_dvc.study.artifact import locked
from wanda_dvc.study.folder import Study


def in_this_process(root: Path, stage: str, part: str = "", _: str = "", *, shown: bool = False) -> None:
    """What DVC runs in a new study, without the starts of its processes."""
    assert isinstance(shown, bool)
    study = Study(root)
    for one in STAGES.values():
        for _, named, text in one.runs(study.params.perplexity.texts):
            if named == "tasks":
                continue
            run(one.name, study=study, variant=named, text=text)
            if (one.name, named) == (stage, part):
                return
        if one.name == stage:
            return


@pytest.fixture
def model(tmp_path: Path, texts: dict[str, str], monkeypatch: Patch) -> Path:
    """A tiny model in an empty current directory, with a cache folder of its own and short texts."""
    here = tmp_path / "here"
    here.mkdir()
    write_settings(tmp_path, "org/name", **texts, recipe="fisher")
    monkeypatch.setattr(scaffold, "PARAMS", tmp_path / "params.yaml")
    monkeypatch.setattr(module, "reproduce", in_this_process)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(here)
    return save_tiny_model(tmp_path / "tiny", num_hidden_layers=2)


def prune(**options: Any) -> str:
    return prune_model(check_request(**options)).text


def studies(model: Path) -> list[Path]:
    return sorted(path.parent for path in (model.parent / "cache").glob("wanda-dvc/*/params.yaml"))


def pruned(model: Path, *words: str) -> str:
    done = wanda_dvc("prune", str(model), *words, cwd=Path.cwd())
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_model_becomes_a_directory_and_a_table(model: Path):
    said = pruned(model, "--recipe", "wanda")
    target = Path("tiny-wanda-0.5").absolute()
    loaded = AutoModelForCausalLM.from_pretrained(target)
    assert float((loaded.model.layers[0].mlp.up_proj.weight == 0).float().mean()) == 0.5
    assert AutoTokenizer.from_pretrained(target)("a")["input_ids"]
    card = (target / "README.md").read_text()
    assert "| perplexity" in card
    (made,) = studies(model)
    assert not (made / "models/pruned").exists()
    assert f"The study: {made}. " in said
    summary = said.splitlines()[0]
    assert re.fullmatch(
        r"Size unchanged: 50\.0 % of the linears' weights are zeros; perplexity on embedded: [\d.,]+ → [\d.,]+; "
        r"divergence \d\.\d{4} nats\.",
        summary,
    )
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines() if line.startswith("|")]
    assert summary.partition(" → ")[2].startswith(rows[4][2].partition(" ")[0])
    assert rows[0] == ["", "dense", "pruned"]
    names = [row[0] for row in rows[2:]]
    assert names == ["divergence, nats", "top-1 agreement, %", "perplexity", "size, MB"]
    measured = json.loads((made / "metrics/pruned/perplexity/embedded.json").read_text())["perplexity"]
    assert rows[4][2].startswith(f"{measured:,.2f} (")
    assert f"{target}: the pruned model, with a model card." in said
    assert f"wanda-dvc init my-study --from {made}" in said
    assert not list(Path.cwd().parent.rglob("*.git"))


def test_without_evaluation_nothing_is_measured(model: Path):
    Path("it's out").mkdir()  # an empty directory is a target
    said = pruned(model, "it's out", "--recipe", "wanda", "--no-eval")
    assert "perplexity" not in said
    assert "Stale" not in said
    assert "| size, MB" in said
    assert Path("it's out/model.safetensors").is_file()
    assert not (studies(model)[0] / "metrics/dense").exists()


def test_a_smaller_model_has_fewer_bytes_and_another_default(model: Path):
    said = pruned(model, "--pattern", "neurons", "--no-eval")
    smaller, dense = (path / "model.safetensors" for path in (Path("tiny-neurons-0.2"), model))
    assert smaller.stat().st_size < dense.stat().st_size
    before, after = (ModelSizes.read(folder).parameters / 1e6 for folder in (model, Path("tiny-neurons-0.2")))
    assert said.startswith(f"Parameters: {before:,.1f} M → {after:,.1f} M (−{100 * (1 - after / before):.1f} %).\n\n")
    assert "tiny: fisher, pattern neurons, sparsity 0.2" in said
    assert AutoModelForCausalLM.from_pretrained("tiny-neurons-0.2").config.intermediate_size < 48


def test_a_recovered_model_is_the_one_that_is_written(model: Path):
    said = pruned(model, "out", "--recipe", "wanda", "--recover", "1k")
    (made,) = studies(model)
    assert Path("out/model.safetensors").read_bytes() == (made / "models/recovered/model.safetensors").read_bytes()
    lines = [line for line in said.splitlines() if line.startswith("|")]
    header, _, divergence, *_ = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    assert header == ["", "dense", "pruned", "recovered"]
    assert "–" not in divergence[2:]
    assert "out: the recovered model, with a model card." in said


def test_a_model_and_a_text_have_one_study(model: Path):
    text = model.with_name("text.txt")
    text.write_text("The sea is deep and blue, and nobody knows its end. " * 40)
    for words in (["--sparsity", "0.3"], ["--pattern", "2:4"], ["--text", str(text)]):
        pruned(model, "--recipe", "wanda", "--no-eval", *words)
    first, second = studies(model)
    assert {path.name.rpartition("-")[0] for path in (first, second)} == {"tiny"}
    sources = {read_params(path / "params.yaml").calibration.text[0].source for path in (first, second)}
    assert str(text) in sources
    assert {path.name for path in Path().iterdir()} == {"tiny-wanda-0.3", "tiny-wanda-2-4", "tiny-wanda-0.5"}


def test_a_further_text_is_measured_and_a_setting_overrides_an_option(model: Path):
    text = model.with_name("my notes.txt")
    text.write_text("The sea is deep and blue, and nobody knows its end. " * 60)
    said = pruned(
        model, "out", "--eval-text", str(text), "--recipe", "wanda", "--sparsity", "30%",
        "--set", "calibration.windows=5", "--set", "calibration={seed: 7}", "--set", "pattern=2:4",
    )  # fmt: skip
    (study,) = studies(model)
    params = read_params(study / "params.yaml")
    assert (params.calibration.windows, params.calibration.seed, params.pattern, params.sparsity) == (5, 7, "2:4", 0.3)
    assert [*params.perplexity.texts] == ["embedded", "my-notes"]
    assert params.perplexity.texts["my-notes"].source == str(text)
    assert "; perplexity on embedded: " in said
    assert "; perplexity on my-notes: " in said


def test_names_and_values_of_options():
    requested = check_request(
        target=Path("/tmp/new-model"), eval_text=["ptb", "org/data:a@b", "org/data", "embedded"],
        changes=parse_changes(["recipe=wanda"]),
    )  # fmt: skip
    several = check_request(model="org/name", target=Path("/tmp/new-model"), text=["wikitext2", "ptb"])
    one = check_request(model="org/name", target=Path("/tmp/new-model"))
    assert [[text.source for text in run.params.calibration.text] for run in (several, one)] == [
        ["wikitext2", "ptb"], ["c4"],
    ]  # fmt: skip
    assert several.root != one.root  # another text, another study
    texts = {name: text.source for name, text in requested.params.perplexity.texts.items()}
    assert texts == {"embedded": "embedded", "ptb": "ptb", "data": "org/data:a@b", "data-2": "org/data"}
    assert [_parse_sparsity(text) for text in ("57%", "0.7 %", "0.3", 0.2)] == [0.57, 0.007, 0.3, 0.2]
    assert parse_changes(["a.b={c: 1, d: [2]}", "e=2:4", "f="]) == {"a.b.c": 1, "a.b.d": [2], "e": "2:4", "f": None}


def test_solvers_get_ten_tokens_for_each_feature(model: Path, monkeypatch: Patch):
    def download_alone(root: Path, stage: str, part: str = "", *, shown: bool) -> None:
        if stage != "download":
            raise KeyboardInterrupt
        in_this_process(root, stage, part, shown=shown)

    monkeypatch.setattr(module, "reproduce", download_alone)
    for width, length in ((192, 64), (256, 32)):  # another model at the same path, of fewer positions
        save_tiny_model(model, num_hidden_layers=2, intermediate_size=width, max_position_embeddings=length)
        with pytest.raises(KeyboardInterrupt):
            prune(model=str(model), recipe="wanda")
        drawn = read_params(studies(model)[0] / "params.yaml").calibration
        assert (drawn.length, drawn.windows * length) == (length, width * 10)


def test_the_python_function_is_the_command(model: Path):
    options = {"recipe": "wanda", "sparsity": "30%", "calibration": {"windows": 4}}
    pruned = wd.prune(model, "out", **options)
    (made,) = studies(model)
    assert (pruned.path, pruned.study) == (Path("out").absolute(), made)
    params = read_params(made / "params.yaml")
    assert (params.sparsity, params.calibration.windows) == (0.3, 4)
    perplexity = pruned.results["pruned"]["perplexity"]["embedded"]["value"]
    assert f" → {perplexity:,.2f}; " in str(pruned).splitlines()[0]
    text = prune(model=str(model), target=Path("two"), recipe="wanda", sparsity=0.3, changes={"calibration.windows": 4})
    assert text.replace("/two: ", "/out: ") == str(pruned)
    with pytest.raises(UserError, match="calibration.window: no such setting"):
        wd.prune(model, "three", calibration={"window": 4})


# --- a dry run ---


def test_a_dry_run_says_what_a_run_needs_and_writes_nothing(model: Path):
    text = model.with_name("text.txt")
    text.write_text("The sea is deep and blue, and nobody knows its end. " * 40)
    request = check_request(model=str(model), target=Path("out"), text=[str(text)], eval_text=["ptb"], recover="1k")
    lines = describe_run(request).splitlines()
    assert not [*Path().iterdir(), *studies(model)]
    assert lines[0].startswith(f"{model}: fisher, recovery.tokens 1,000, sparsity 0.5, into ")
    assert lines[1] == "Fetched unless present: ptb (perplexity/ptb)."
    sizes = ModelSizes.read(model)
    assert f"{sizes.parameters:,} parameters" in lines[2]
    prune(model=str(model), recipe="fisher", text=[str(text)], evaluate=False)
    (made,) = studies(model)
    drawn = read_params(made / "params.yaml").calibration
    assert lines[3].startswith(f"Calibration: {drawn.windows} windows of {drawn.length} tokens.")
    known = describe_run(check_request(model=str(model), target=Path("out"), text=[str(text)])).splitlines()
    assert known[1] == "Fetched unless present: nothing."
    needed = max(requirements(Study(made), stage, sizes).memory for stage in ("calibrate", "perplexity"))
    assert f"Memory: about {needed / 1e6:.1f} MB" in known[4] or f"Memory: about {needed / 1e9:.1f} GB" in known[4]


def test_a_dry_run_counts_the_masks_of_each_candidate(model: Path, monkeypatch: Patch):
    monkeypatch.setattr("wanda_dvc.stages.needs.gigabytes", str)  # to the byte
    mask = ModelSizes.read(model).linear_weights // 8

    def disk(pattern: str) -> int:
        changes = {"pattern": pattern, "calibration.statistics": "fisher"}
        request = check_request(model=str(model), target=Path("out"), changes=changes, evaluate=False)
        return int(re.findall(r"Disk: at most (\d+)", describe_run(request))[0])

    assert disk("smaller") - disk("blocks") == (6 - 2) * mask
    assert disk("neurons") == disk("heads")


# --- refused before any work ---


@pytest.mark.parametrize(
    ("memory", "disk", "lacking"),
    [(10**6, 10**12, "1.0 MB of memory and .* expected .* [GM]B;"), (10**12, 10**4, ".* 0.1 MB of disk, expected .*;")],
)
def test_a_recipe_that_does_not_fit_is_refused(model: Path, monkeypatch: Patch, memory: int, disk: int, lacking: str):
    """Free memory never changes the method."""
    monkeypatch.setattr("wanda_dvc.stages.needs.free_memory_of", lambda _: memory)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=disk))
    for recipe in (None, "admm"):
        with pytest.raises(UserError, match=f"recipe: {recipe or 'fisher'}: found {lacking}.*`--recipe wanda`"):
            prune(model=str(model), recipe=recipe, evaluate=False)
    assert not studies(model)
    assert "Size unchanged" in prune(model=str(model), recipe="wanda", evaluate=False)


def test_a_local_model_is_named_by_its_folder_alone(model: Path):
    """A folder above it may have the signs of a package's version or a revision."""
    for parent in ("user@corp", "x==1"):
        moved = model.with_name(parent) / "llama"
        moved.mkdir(parents=True)
        assert check_request(model=str(moved)).target.name == "llama-0.5"


def test_a_setting_below_a_value_is_refused(model: Path):
    for name, _ in settings():
        setting = name.replace("NAME", "embedded")
        with pytest.raises(UserError, match=rf"{setting}(\.x)?: "):
            check_request(model=str(model), changes={f"{setting}.x": 1})


@pytest.mark.parametrize("recover", ["0", "0k", 0, None])
def test_no_tokens_to_train_on_are_not_in_the_directorys_name(model: Path, recover: str | int | None):
    assert check_request(model=str(model), recover=recover).target.name == f"{model.name}-0.5"
    assert check_request(model=str(model), recover="1k").target.name == f"{model.name}-0.5-1k"
    changed = check_request(model=str(model), changes={"recovery.tokens": 512})
    assert changed.target.name == f"{model.name}-0.5-512"


def test_a_model_without_a_limit_of_positions_keeps_the_evaluations_windows(model: Path, monkeypatch: Patch):
    monkeypatch.setattr(module, "max_positions", lambda _: None)
    request = check_request(model=str(model), changes={"calibration.length": 16})
    fitting = settings_for_model(request, model / "config.json", ModelSizes.read(model))
    assert (fitting["calibration.length"], fitting["perplexity.length"]) == (16, request.params.perplexity.length)


def test_a_recovery_without_the_memory_is_refused_before_the_calibration(model: Path, monkeypatch: Patch):
    monkeypatch.setattr("wanda_dvc.stages.needs.free_memory_of", lambda _: 10**6)
    with pytest.raises(UserError, match=r"recovery.tokens: found 1.0 MB, expected .* of memory"):
        prune(model=str(model), recipe="wanda", recover="200k")
    assert not studies(model)
    assert [_parse_number("recover", text, TOKEN_UNITS) for text in ("7", "200k", "2M")] == [7, 200_000, 2_000_000]


def test_units_that_a_model_does_not_let_go_are_refused_before_the_calibration(model: Path, tmp_path: Path):
    """Seven of eight heads do not divide a width of 64."""
    wide = save_tiny_model(tmp_path / "wide", hidden_size=64, num_attention_heads=8, num_key_value_heads=8, head_dim=8)
    with pytest.raises(UserError, match="pattern: got heads, which .*/models/dense does not support"):
        prune(model=str(wide), pattern="heads", sparsity=0.2)
    (started,) = studies(model)
    assert not (started / "stats").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["full"], "full: exists already; name a new directory, or an empty one"),
        (["."], "here: exists already"),
        (["out", "--sparsity", "2"], "sparsity: found 2.0, expected"),
        (["out", "--recipe", "wand"], "recipe: found \"wand\", expected magnitude"),
        (["out", "--text", "../caf\udce9.txt"], "not a .txt or .jsonl file, named in UTF-8; name one"),
        (["out", "--text", "./missing.txt"], "missing.txt: missing, or not a .txt or .jsonl file"),
        (["out", "--pattern", "3:2"], "pattern: found \"3:2\", expected"),
        (["out", "--sparsity", "half"], "--sparsity: found half, expected a fraction or a percentage"),
        (["out", "--size", "80"], "--size: found 80, expected one such as 80%, 20MB, 20GB"),
        (["out", "--parameters", "80%"], "--parameters: found 80%, expected one such as 20, 20k, 20M, 20B"),
        (["out", "--size", "120%"], "sparsity: found -0.2, expected"),
        (["out", "--size", "80%", "--sparsity", "0.2"], "--size, --parameters: found with one another, a sparsity"),
        (["out", "--size", "80%", "--pattern", "blocks"], "--size, --parameters: found with one another, a sparsity"),
        (["out", "--size", "1MB", "--set", "sparsity=0.5"], "--size, --parameters: found with one another, a sparsity"),
        (["out", "--size", "1MB", "--parameters", "1M"], "--size, --parameters: found with one another, a sparsity"),
        (["out", "--sparsity", "20"], "sparsity: found 20.0, expected less than 1"),
        (["out", "--set", "windows"], "--set: found windows, expected KEY=VALUE, such as"),
        (["out", "--set", "calibration.window=2"], "calibration.window: no such setting; did you mean"),
        (["out", "--set", "recipe.x=2"], "recipe: found {'x': 2}, expected"),
        (["out", "--set", "sparsity={"], "--set sparsity: not valid YAML"),
        (["out", "--eval-text", "./missing.txt"], "missing.txt: missing, or not a .txt or .jsonl file"),
        (["out", "--recover", "1G"], "--recover: found 1G, expected one such as 20, 20k, 20M"),
        (["out", "--recover", "٣"], "--recover: found ٣, expected one such as 20"),
        (["out", "--recover", "9" * 20 + "M"], "recovery.tokens: found 99999999999999999999000000, expected less"),
        (["out", "--recipe", ""], "'': has no value; give one, or leave"),
        (["out", "--recipe="], "--recipe=: has no value"),
        ([""], "'': has no value"),
        (["/proc/x"], "/proc/x: /proc is no directory with permission to write, expected one"),
    ],
)  # fmt: skip
def test_a_wrong_target_or_setting_is_refused_before_any_work(model: Path, words: list[str], says: str):
    Path("full").mkdir()
    Path("full/thesis.txt").write_text("mine")
    with contextlib.suppress(OSError):  # macOS has no names that are not UTF-8
        Path(model.parent, "caf\udce9.txt").write_text("mine")
    done = wanda_dvc("prune", str(model), *words, cwd=Path.cwd())
    assert done.returncode == 2
    assert says in done.stderr
    assert "params.yaml" not in done.stderr
    assert [path.name for path in Path().rglob("*")] == ["full", "thesis.txt"]
    assert not (model.parent / "cache").exists()


WRONG = [
    "prune . new --recipe typo", "prune . new --sparsity 2", "prune . new --pattern 9", "prune . full", "export full",
    "prune . new --recover 1G", "prune ./missing new", "prune . new --text ./missing.txt", "init new --preset typo",
    "init full", "init new --model ./missing", "mask", "plan", "calibrate",
]  # fmt: skip
REFUSED = """
import json, os, sys
from wanda_dvc.cli import run
for words in sys.argv[1:]:
    if not os.fork():
        sys.argv[1:] = words.split()
        try:
            run()
        except SystemExit as end:
            print(json.dumps([words, end.code, list(sys.modules)]), flush=True)
            os._exit(0)
    os.wait()
"""


def test_a_wrong_argument_is_refused_before_libraries_are_imported(tmp_path: Path):
    """Their import takes seconds."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").touch()
    (tmp_path / "params.yaml").touch()
    command = [sys.executable, "-c", REFUSED, *WRONG]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    refused = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(words, code) for words, code, _ in refused] == [(words, 2) for words in WRONG], done.stderr
    assert len(done.stderr.splitlines()) == len(WRONG)
    imported = {words: SLOW_TO_IMPORT & set(modules) for words, _, modules in refused}
    assert not any(imported.values()), imported


def test_a_cache_folder_without_permission_is_named_with_what_to_do(model: Path):
    (cache := model.parent / "cache").mkdir(mode=0o500)
    says = re.escape(f"{cache}/wanda-dvc: {cache} is no directory with permission to write") + ".*set XDG_CACHE_HOME"
    with pytest.raises(UserError, match=says):
        without_privilege(lambda: prune(model=str(model), target=Path("out")))
    assert not Path("out").exists()


# --- stopped ---


def test_a_full_disk_loses_nothing(model: Path, monkeypatch: Patch):
    def full(_: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    with monkeypatch.context() as filled:
        filled.setattr("wanda_dvc.commands.export.link_file", full)
        done = wanda_dvc("prune", str(model), "out", "--recipe", "wanda", cwd=Path.cwd())
    assert done.returncode == 2
    assert "disk full (No space left on device); free some space and run the command again" in done.stderr
    assert list(Path().iterdir()) == []
    assert (studies(model)[0] / "models/pruned/model.safetensors").is_file()
    pruned(model, "out", "--recipe", "wanda")
    copied = shutil.Error([("/s/a", "/t/b", "[Errno 28] No space left on device: '/s/a' -> '/t/b'")])
    assert explain(copied)[0].startswith("/t/b: disk full")  # and not the disk of the source


def test_a_second_command_waits_for_the_first(model: Path, monkeypatch: Patch, capsys: Capture):
    """And then does not replace its result."""
    prune(model=str(model), target=Path("out"), recipe="wanda")
    (made,) = studies(model)
    (model.parent / "here/out").rename(model.parent / "here/done")
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    first = locked(made, "")
    first.__enter__()

    def finished(said: str) -> None:
        assert f"waiting for another `wanda-dvc prune` of this model, in {made}" in said
        Path("done").rename("out")
        first.__exit__(None, None, None)

    monkeypatch.setattr("wanda_dvc.study.artifact.notice", finished)
    with pytest.raises(UserError, match="out: exists already"):
        prune(model=str(model), target=Path("out"), recipe="wanda")
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_command_stops_the_processes_that_it_started(number: signal.Signals):
    """Also those that a child starts while it is asked to end: a process that is left keeps the output open."""
    child = (
        "import os, subprocess, time\n"
        "print(os.getpid(), flush=True)\n"
        "started = [subprocess.Popen(['sleep', '600']) for _ in range(200)]\n"
        "time.sleep(600)\n"
    )
    script = (
        "import os, signal, subprocess, sys\n"
        "from wanda_dvc.stages.process import stoppable\n"
        "with stoppable('prune', 'run the same command again', with_children=True):\n"
        f"    started = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE, process_group=0)\n"
        "    print(started.stdout.readline().decode().strip(), flush=True)\n"
        f"    os.kill(os.getpid(), {number.value})\n"
        "    started.wait()\n"
        "    signal.pause()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (128 + number, "prune: stopped; run the same command again\n")
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)


# --- with DVC ---


@pytest.mark.pipeline
@pytest.mark.timeout(1800)  # some thirty processes
def test_with_dvc_another_sparsity_keeps_the_statistics_and_a_stopped_run_resumes(
    tmp_path: Path, texts: dict[str, str], tiny: Path, monkeypatch: Patch
):
    """From an empty directory, in processes of their own; then as a study in git, which runs nothing again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    text = texts["calibration__text__source"]
    wanda = [sys.executable, "-c", "from wanda_dvc.cli import run; run()"]
    words = ["prune", str(tiny), "--recipe", "wanda-refit", "--text", text, "--no-eval"]

    with subprocess.Popen([*wanda, *words, "a"], stderr=subprocess.PIPE, text=True) as stopped:
        assert stopped.stderr
        for line in stopped.stderr:
            if line.startswith("calibrate needs"):
                stopped.send_signal(signal.SIGINT)
                break
        rest = stopped.stderr.read()
    assert stopped.returncode == 130, rest
    assert "prune: stopped; finished work is kept; run the same command again to resume" in rest
    assert not list(Path().iterdir())

    here = Repository(Path.cwd(), tiny, real=True)
    here.run(*wanda, *words, "a")
    (made,) = (path.parent for path in tmp_path.glob("cache/wanda-dvc/*/params.yaml"))
    measured = {path: path.stat().st_mtime_ns for path in (made / "stats").rglob("*.safetensors")}
    assert measured
    size = (tiny / "model.safetensors").stat().st_size  # of no other file; links have one inode
    files = [path.stat() for folder in (made, Path("a")) for path in folder.rglob("*") if path.is_file()]
    assert len({status.st_ino for status in files if status.st_size == size}) == 2  # the dense model and the target
    masks = (made / "dvc.lock").read_text()
    here.run(*wanda, *words, "b", "--sparsity", "0.7")
    assert {path: path.stat().st_mtime_ns for path in (made / "stats").rglob("*.safetensors")} == measured
    assert (made / "dvc.lock").read_text() != masks
    assert {path.name for path in Path().iterdir()} == {"a", "b"}

    here.run(*wanda, "init", "own", "--from", str(made))
    own = Path("own").absolute()
    assert read_params(own / "params.yaml") == read_params(made / "params.yaml")
    assert git(own, "status", "--porcelain") == ""
    again = Repository(own, tiny, real=True).run("dvc", "repro", "apply")
    assert "> wanda-dvc calibrate" not in again
    assert "> wanda-dvc mask" not in again
    assert (own / "models/pruned/model.safetensors").read_bytes() == Path("b/model.safetensors").read_bytes()
