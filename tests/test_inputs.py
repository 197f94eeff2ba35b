"""Damaged and odd input: one message, exit 2, nothing written. The cases are data, in cases/."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cases import NO_OBJECTS, Case, models, settings, texts
from command_line import wanda_dvc
from conftest import text_of, without_privilege, write_params, write_settings

from wanda_dvc import stages
from wanda_dvc.errors import UserError, explain
from wanda_dvc.export.build import export
from wanda_dvc.params import read_params
from wanda_dvc.reading import read_object
from wanda_dvc.results.report import report
from wanda_dvc.sources import EMBEDDED
from wanda_dvc.stages.download import download
from wanda_dvc.stages.plan import plan
from wanda_dvc.study.project import ITEMS, Project
from wanda_dvc.study.provenance import describe, file_digest, write_provenance
from wanda_dvc.study.scaffold import init

Make = Callable[..., Project]


def tree(folder: Path) -> dict[str, bytes]:
    """Every file but unfinished work."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".dvc" not in path.parts
    }


def refused(case: Case, run: Callable[[], object], root: Path) -> None:
    """The input is refused with words that say where, what was found, what was expected; nothing is written."""
    before = tree(root)
    with pytest.raises(UserError) as caught:
        run()
    message = str(caught.value)
    missing = [words for words in case.says if words not in message]
    assert not missing, message
    assert all(";" in problem and len(problem) < 1500 for problem in caught.value.problems), message
    assert tree(root) == before


def ids(cases: list[Case]) -> list[str]:
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    return [name.encode("unicode_escape").decode() for name in names]


@pytest.mark.parametrize("name", NO_OBJECTS)
def test_what_is_no_object(name: str, tmp_path: Path):
    """In one message that names the file, whatever the file holds."""
    content, found = NO_OBJECTS[name]
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"file\.json: .*{found}.*expected .*; copy it again"):
        read_object(path)


MODELS = list(models.cases())


@pytest.mark.parametrize("case", MODELS, ids=ids(MODELS))
def test_a_damaged_model(case: Case, project: Make, tiny: Path, tmp_path: Path):
    source = shutil.copytree(tiny, tmp_path / "source")
    case.spoil(source)
    (tmp_path / "study").mkdir()
    made = project(model=source)
    refused(case, lambda: download(project=made, part="model"), tmp_path / "models")
    assert not made.model("dense").exists()


TEXTS = list(texts.cases())


@pytest.mark.parametrize("case", TEXTS, ids=ids(TEXTS))
def test_a_damaged_text(case: Case, project: Make, tmp_path: Path):
    source = tmp_path / "source"
    source.mkdir()
    case.spoil(source)
    made = project(plan=False, **naming(case, source))

    def run() -> None:
        plan(project=made)  # it refuses a source that is missing
        download(project=made, part="calibration")

    refused(case, run, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def naming(case: Case, source: Path) -> dict[str, object]:
    """The settings that name the file of a case."""
    if case.name.startswith("gz"):
        mirror = source / "mirror"
        place = mirror / "allenai/c4/en"
        place.mkdir(parents=True)
        (source / texts.SHARD).rename(place / texts.SHARD)
        return {"calibration__text__source": "c4", "runtime__mirror": str(mirror)}
    name = texts.TEXT if case.name.startswith("t") and "jsonl" not in case.name else texts.LINES
    return {"calibration__text__source": str(source / name)}


@pytest.mark.parametrize("name", texts.RIGHT)
def test_an_odd_text_is_taken_whole(name: str, project: Make, tmp_path: Path):
    file, content, expected = texts.RIGHT[name]
    (tmp_path / file).write_bytes(content)
    made = project(calibration__text__source=str(tmp_path / file))
    download(project=made, part="calibration")
    assert made.text("calibration") == expected


@pytest.mark.parametrize(
    ("setting", "value"),
    settings.MEANT,
    ids=[f"{name} {str(value)[:40]!r}" for name, value in settings.MEANT],
)
def test_a_setting_that_cannot_be_meant(setting: str, value: object, tmp_path: Path):
    """The message names the setting or its section, what was found, and what is expected."""
    write_settings(tmp_path, "org/model", **{setting.replace(".", "__"): value})
    with pytest.raises(UserError) as caught:
        read_params(tmp_path / "params.yaml")
    (message,) = caught.value.problems
    section = setting.rpartition(".")[0]
    assert message.startswith(tuple(f"params.yaml: {name}" for name in (setting, section) if name))
    if "no such setting" not in message:
        found = value[0] if message.startswith(f"params.yaml: {setting}.0") else value  # type: ignore[index]
        shown = json.dumps(found, ensure_ascii=not str(found).isprintable())
        assert repr(found)[:100] in message or shown[:80] in message
        assert ", expected " in message


@pytest.mark.parametrize("name", settings.FILES)
def test_a_file_that_is_no_settings(name: str, tmp_path: Path):
    content, found = settings.FILES[name]
    (tmp_path / "params.yaml").write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_params(tmp_path / "params.yaml")
    assert found in str(caught.value)


def test_a_key_that_is_there_twice_is_named_with_its_line(tmp_path: Path):
    (tmp_path / "params.yaml").write_text("sparsity: 0.5\nsparsity: 0.6\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read_params(tmp_path / "params.yaml")
    assert 'line 2: found duplicate key "sparsity"' in str(caught.value)
    assert "suppress" not in str(caught.value)


@pytest.fixture(scope="module")
def finished(tiny: Path, texts: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study whose stages have all run."""
    root = tmp_path_factory.mktemp("finished")
    changes = {"calibration__statistics": "gradients", "perplexity__windows": 1, "zero_shot__limit": 1}
    write_params(root, tiny, **changes, **texts)
    made = Project(root)
    for part in ("model", "calibration", "perplexity"):
        download(project=made, part=part, text=text_of(part))
    piqa = made.data("tasks") / "piqa"  # as `download tasks` writes it, without lm-eval's index, which takes seconds
    piqa.mkdir(parents=True)
    shutil.copyfile(EMBEDDED / "tasks/baber/piqa/validation.jsonl", piqa / ITEMS)
    keys: dict[str, Any] = {
        "task": "piqa",
        "source": "embedded",
        "role": "validation",
        "definition": "piqa/piqa.yaml",
        "lm_eval": "0",
    }
    write_provenance(piqa, describe("download tasks", sha256=file_digest(piqa / ITEMS), **keys))
    for name in ("calibrate", "mask", "apply"):
        stages.run(name, project=made)
    stages.run("perplexity", project=made, part="dense")
    return root


PLACES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "too long a name": (lambda root: root / ("x" * 300), "File name too long"),
    "too long for a .part": (lambda root: root / ("x" * 253), "File name too long"),
    "below a file": (lambda root: made_file(root / "f") / "a/b", "/f is no directory"),
    "a dangling link": (lambda root: made_link(root / "l", root / "nowhere"), "/l is no directory"),
    "a file": (lambda root: made_file(root / "f"), "/f is no directory"),
}


def made_file(path: Path) -> Path:
    path.write_text("mine", encoding="utf-8")
    return path


def made_link(path: Path, target: Path) -> Path:
    path.symlink_to(target)
    return path


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("command", ["init", "export", "report"])
def test_a_place_where_nothing_can_be_written(command: str, name: str, finished: Path, tmp_path: Path):
    if (command, name) == ("report", "too long for a .part"):
        pytest.skip("a report's files have other names")
    make, says = PLACES[name]
    place, made = make(tmp_path), Project(finished)
    before = sorted(tmp_path.rglob("*"))
    runs: dict[str, Callable[[], object]] = {
        "init": lambda: init(folder=place),
        "export": lambda: export(project=made, experiment=None, target=place),
        "report": lambda: report(project=made, output=place / "report.html"),
    }
    with pytest.raises((UserError, OSError)) as caught:
        runs[command]()
    assert says in " ".join(explain(caught.value))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", stages.TRACKED)
def test_no_export_into_tracked_outputs(name: str, finished: Path, tmp_path: Path):
    (tmp_path / "link").symlink_to(finished)
    for target in (finished / name / "new", finished / name / "a/b", tmp_path / "link" / name / "new"):
        with pytest.raises(UserError, match=rf"(new|b): inside {name}/, which DVC or git tracks"):
            export(project=Project(finished), experiment=None, target=target)
        assert not target.exists()


class Reads:
    """Notes the files below a folder that are opened to be read."""

    def __init__(self) -> None:
        self.below, self.files = "", set[Path]()
        sys.addaudithook(self)  # it cannot be taken away: without a folder it does nothing

    def __call__(self, event: str, words: tuple[Any, ...]) -> None:
        if self.below and event == "open" and str(words[0]).startswith(self.below) and not words[2] & 3:
            self.files.add(Path(words[0]))

    def during(self, root: Path, body: Callable[[], object]) -> set[Path]:
        self.below, self.files = f"{root}{os.sep}", set()
        try:
            body()
        finally:
            self.below = ""
        return self.files


@pytest.fixture(scope="module")
def reads() -> Reads:
    return Reads()


# A stage, and what it does not need to read: its earlier output is replaced; `apply` only sizes its line about memory
# by stats/.
UNREAD = {
    "download model": ("models/dense",),
    "download calibration": ("data/calibration",),
    "calibrate": ("stats",),
    "mask": ("masks", "weights"),
    "apply": ("models/pruned", "metrics", "stats"),
    "perplexity dense": ("metrics", "reference"),
    "zero-shot dense": ("metrics",),
}


@pytest.mark.parametrize("command", UNREAD)
def test_what_may_not_be_read_is_told_apart_from_what_is_not_there(
    command: str, finished: Path, tiny: Path, texts: dict[str, Any], reads: Reads, tmp_path: Path
):
    """Whatever file the stage reads, and whatever library opens it: its name, why, and exit 2."""
    root = shutil.copytree(finished, tmp_path / "study", symlinks=True)
    shutil.copytree(tiny, tmp_path / "tiny")
    shutil.copyfile(texts["calibration__text__source"], tmp_path / "text.txt")
    changes: dict[str, Any] = {"perplexity__windows": 1, "zero_shot__limit": 1}
    write_params(root, tmp_path / "tiny", calibration__text__source=str(tmp_path / "text.txt"), **changes)
    opened = reads.during(tmp_path, lambda: wanda_dvc(*command.split(), cwd=root))
    shutil.rmtree(Project(root).answers, ignore_errors=True)  # with them the tasks are not asked again
    before = tree(root)
    made = tuple(str(root / name) for name in (".dvc", *UNREAD[command]))
    opened = {path for path in opened if path.exists() and not str(path).startswith(made)}
    if command.startswith(("calibrate", "perplexity", "zero-shot")):
        opened |= set((root / "models/dense").glob("tokenizer*"))  # not opened by Python
    assert len(opened) >= 2
    folders = {path.parent for path in opened} - {tmp_path, root}
    for path in sorted(opened | folders):
        mode = path.stat().st_mode
        path.chmod(0)
        done = without_privilege(lambda: wanda_dvc(*command.split(), cwd=root))
        path.chmod(mode)
        assert done.returncode == 2, (path, done.stderr)
        assert str(path) in done.stderr
        assert "Permission denied" in done.stderr
        assert "missing" not in done.stderr
    assert tree(root) == before
