"""Damaged and odd input: one message, exit 2, nothing written. The cases are data, in cases/."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cases import NO_OBJECTS, Case, models, settings, texts
from conftest import ROOT, Make, tree, without_privilege

from wanda_dvc import stages
from wanda_dvc.errors import UserError, explain
from wanda_dvc.export.build import export
from wanda_dvc.params import check_params, parse_yaml, read_params
from wanda_dvc.reading import check_file, is_there, read_object, read_text
from wanda_dvc.stages.download import download
from wanda_dvc.stages.plan import plan
from wanda_dvc.study.project import Project


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
def test_a_damaged_model_is_refused_and_the_earlier_one_stays(case: Case, project: Make, tiny: Path, tmp_path: Path):
    download(project=project(), part="model")
    source = shutil.copytree(tiny, tmp_path / "source")
    case.spoil(source)
    made = project(model=source)
    refused(case, lambda: download(project=made, part="model"), tmp_path / "models")


TEXTS = list(texts.cases())


@pytest.mark.parametrize("case", TEXTS, ids=ids(TEXTS))
def test_a_damaged_text_is_refused(case: Case, project: Make, tmp_path: Path):
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


def test_a_setting_that_cannot_be_meant():
    """The message names the setting or its section, the value that was found, and what is expected."""
    committed = parse_yaml((ROOT / "params.yaml").read_text(encoding="utf-8"), "params.yaml", "")
    for setting, values in settings.MEANT.items():
        for value in values:
            with pytest.raises(UserError) as caught:
                check_params(with_defaults(committed, setting, value))
            (message,) = caught.value.problems
            section = setting.rpartition(".")[0]
            assert message.startswith(tuple(f"params.yaml: {name}" for name in (setting, section) if name)), setting
            if "no such setting" not in message:
                found = value[0] if message.startswith(f"params.yaml: {setting}.0") else value  # type: ignore[index]
                shown = json.dumps(found, ensure_ascii=not str(found).isprintable())
                assert repr(found)[:100] in message or shown[:80] in message
                assert ", expected " in message


def with_defaults(content: dict[str, Any], setting: str, value: object) -> dict[str, Any]:
    """The settings with another value of one, which params.yaml may leave out."""
    first, _, rest = setting.partition(".")
    return content | {first: with_defaults(content.get(first, {}), rest, value) if rest else value}


def test_a_file_that_is_no_settings(tmp_path: Path):
    for content, found in settings.FILES.values():
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


@pytest.mark.parametrize("name", stages.TRACKED)
def test_no_export_into_tracked_outputs(name: str, finished: Path, tmp_path: Path):
    (tmp_path / "link").symlink_to(finished)
    for target in (finished / name / "new", finished / name / "a/b", tmp_path / "link" / name / "new"):
        with pytest.raises(UserError, match=rf"(new|b): inside {name}/, which DVC or git tracks"):
            export(project=Project(finished), experiment=None, target=target)
        assert not target.exists()


def test_what_may_not_be_read_is_told_apart_from_what_is_not_there(tmp_path: Path):
    path = tmp_path / "closed/model.safetensors"
    path.parent.mkdir()
    path.write_bytes(b"x")
    for closed in (path, path.parent):
        closed.chmod(0)
        for look in (check_file, is_there, read_text):
            if closed == path.parent or look is read_text:
                with pytest.raises(PermissionError) as caught:
                    without_privilege(partial(look, path))
                assert "Permission denied, expected permission to read" in explain(caught.value)[0]
        closed.chmod(0o700)
