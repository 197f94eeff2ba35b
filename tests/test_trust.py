"""Artifacts that do not belong together and damaged or odd input: one message, exit 2, nothing replaced or written."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from cases import NO_OBJECTS, Case, dotted, models, removed, settings, texts, written
from conftest import ROOT, TEXTS, Factory, Make, fetch, planned, save_tiny_model, tree, without_privilege, write_params
from safetensors import safe_open
from safetensors.torch import save_file

from wanda_dvc import stages
from wanda_dvc.commands import check_target
from wanda_dvc.errors import UserError, explain
from wanda_dvc.params import check_params, parse_yaml, read_params
from wanda_dvc.reading import check_file, is_there, read_object, read_text
from wanda_dvc.results.report import report
from wanda_dvc.stages import run
from wanda_dvc.stages.download import download
from wanda_dvc.stages.plan import plan
from wanda_dvc.study.folder import Study

SETTINGS = {"calibration__statistics": "gram", "perplexity__windows": 2, "recipe": "wanda-refit"}


def made(root: Path, model: Path, texts: dict[str, str]) -> Study:
    """A study whose stages have run, with a reconstruction whose weights are stored, and with one from stats/."""
    root.mkdir()
    write_params(root, model, **SETTINGS, **texts)
    study = fetch(Study(root))
    for name in ("calibrate", "mask", "apply"):
        run(name, study=study)
    run("perplexity", study=study, variant="dense")
    return study


@pytest.fixture(scope="module")
def studies(tmp_path_factory: Factory, texts: dict[str, str]) -> dict[str, Path]:
    """A study, one of another model, and one with another calibration text."""
    folder = tmp_path_factory.mktemp("studies")
    models = [save_tiny_model(folder / f"tiny{seed}", seed=seed, num_hidden_layers=2) for seed in (0, 1)]
    calibration, other = (texts[f"{name}__source"] for name in TEXTS)
    given = {
        "own": (models[0], texts),
        "model": (models[1], texts),
        "text": (models[0], texts | {f"{TEXTS[0]}__source": other, f"{TEXTS[1]}__source": calibration}),
    }
    return {name: made(folder / name, *words).root for name, words in given.items()}


def refused_with(says: str, stage: str, study: Study, part: str = "") -> None:
    """The stage is refused and changes no file."""
    before = tree(study.root)
    with pytest.raises(UserError, match=says):
        run(stage, study=study, variant=part)
    assert tree(study.root) == before


@pytest.mark.parametrize(
    ("stage", "part", "taken", "of", "says"),
    [
        ("calibrate", "", "data/perplexity/embedded>data/calibration", "own", "made by download perplexity"),
        ("mask", "", "stats", "model", "stats/: made from tiny1"),
        ("mask-pruned", "", "data/calibration", "text", "stats/: made from calibration.txt"),
        ("apply", "", "masks", "model", "masks/: made from tiny1"),
        ("apply", "", "stats", "text", "stats/gram: found a calibration of tiny0, expected"),
        ("perplexity", "pruned", "reference", "model", "reference/embedded: measured with dense"),
        ("perplexity", "pruned", "reference", "text", "reference/embedded: measured with tokens"),
        ("perplexity", "pruned", "models/dense>models/pruned", "own", "made by download model, expected apply"),
    ],
)
def test_an_artifact_of_other_inputs_is_refused(
    studies: dict[str, Path], tmp_path: Path, stage: str, part: str, taken: str, of: str, says: str
):
    root = shutil.copytree(studies["own"], tmp_path / "study")
    source, _, target = taken.partition(">")
    shutil.rmtree(root / (target or source))
    shutil.copytree(studies[of] / source, root / (target or source))
    study = Study(root)
    if stage == "mask-pruned":
        stage, study = "mask", study.with_params(study.params.model_copy(update={"propagation": "pruned"}))
        planned(study)
    refused_with(says, stage, study, part)


def spoil_values(path: Path) -> None:
    """Make a value of each tensor of a block's file not finite; its header stays."""
    with safe_open(path, framework="pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    for values in tensors.values():
        if values.is_floating_point() and values.dim():
            values.view(-1)[:1].fill_(float("nan"))
    save_file(tensors, path, header)


@pytest.mark.parametrize(
    ("stage", "changes", "folder"),
    [
        ("mask", {"recipe": "wanda"}, "stats/norms"),
        ("mask", {"recipe": "admm"}, "stats/gram"),
        ("apply", {"recipe": "wanda-refit"}, "stats/gram"),
        ("apply", {"propagation": "pruned"}, "weights"),
    ],
)
def test_values_that_are_not_finite_are_refused_before_the_earlier_output_is_replaced(
    studies: dict[str, Path], tmp_path: Path, stage: str, changes: dict[str, str], folder: str
):
    root = shutil.copytree(studies["own"], tmp_path / "study")
    study = Study(root)
    study = planned(study.with_params(study.params.model_copy(update=changes)))
    if folder == "weights":
        run("mask", study=study)
        run("apply", study=study)
    spoil_values(root / folder / "block_001.safetensors")
    refused_with(f"{folder}/block_001.safetensors: damaged: found values of .* not finite", stage, study)


@pytest.mark.parametrize(
    ("stage", "spoil", "says"),
    [
        ("mask", removed("stats/norms/block_001.safetensors"), "norms: found 1 blocks, expected 2"),
        ("apply", removed("masks/block_000.safetensors"), "found 1 blocks, expected 2"),
        ("apply", written("masks/block_000.safetensors", b"x"), "masks/block_000.*: damaged"),
        ("apply", written("masks/provenance.json", "{"), "provenance.json: found no JSON"),
        ("apply", removed("masks/provenance.json"), "masks/provenance.json: missing; run `dvc"),
    ],
)
def test_a_block_that_is_missing_or_damaged_is_refused(
    studies: dict[str, Path], tmp_path: Path, stage: str, spoil: Callable[[Path], object], says: str
):
    root = shutil.copytree(studies["own"], tmp_path / "study")
    spoil(root)
    refused_with(says, stage, Study(root))


def test_no_provenance_names_a_path(studies: dict[str, Path]):
    for path in studies["own"].rglob("provenance.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        assert str(studies["own"].parent) not in path.read_text(encoding="utf-8")
        assert content["made_by"]


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
def test_a_damaged_model_is_refused_and_the_earlier_one_stays(case: Case, study: Make, tiny: Path, tmp_path: Path):
    download(study=study(), source="model")
    source = shutil.copytree(tiny, tmp_path / "source")
    case.spoil(source)
    made = study(plan=False, model=source)

    def run() -> None:
        plan(study=made)  # it refuses a dangling link
        download(study=made, source="model")

    refused(case, run, tmp_path / "models")


TEXT_CASES = list(texts.cases())


@pytest.mark.parametrize("case", TEXT_CASES, ids=ids(TEXT_CASES))
def test_a_damaged_text_is_refused(case: Case, study: Make, tmp_path: Path):
    source = tmp_path / "source"
    source.mkdir()
    case.spoil(source)
    made = study(plan=False, **naming(case, source))

    def run() -> None:
        plan(study=made)  # it refuses a source that is missing
        download(study=made, source="calibration")

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
def test_an_odd_text_is_taken_whole(name: str, study: Make, tmp_path: Path):
    file, content, expected = texts.RIGHT[name]
    (tmp_path / file).write_bytes(content)
    made = study(calibration__text__source=str(tmp_path / file))
    download(study=made, source="calibration")
    assert made.text("calibration") == expected


def test_a_setting_that_cannot_be_meant():
    """The message names the setting or its section, the value that was found, and what is expected."""
    committed = parse_yaml((ROOT / "params.yaml").read_text(encoding="utf-8"), "params.yaml", "")
    for setting, values in settings.MEANT.items():
        for value in values:
            with pytest.raises(UserError) as caught:
                check_params(dotted(committed, setting, value))
            (message,) = caught.value.problems
            section = setting.rpartition(".")[0]
            assert message.startswith(tuple(f"params.yaml: {name}" for name in (setting, section) if name)), setting
            if "no such setting" not in message:
                found = value[0] if message.startswith(f"params.yaml: {setting}.0") else value  # type: ignore[index]
                shown = json.dumps(found, ensure_ascii=not str(found).isprintable())
                assert repr(found)[:100] in message or shown[:80] in message
                assert ", expected " in message


def test_a_file_that_is_no_settings(tmp_path: Path):
    for content, found in settings.FILES.values():
        (tmp_path / "params.yaml").write_bytes(content)
        with pytest.raises(UserError) as caught:
            read_params(tmp_path / "params.yaml")
        assert found in str(caught.value)
        assert "suppress" not in str(caught.value)  # ruamel's advice about keys


@pytest.mark.parametrize("name", stages.TRACKED)
def test_no_export_into_tracked_outputs(name: str, finished: Path, tmp_path: Path):
    (tmp_path / "link").symlink_to(finished)
    for target in (finished / name / "new", finished / name / "a/b", tmp_path / "link" / name / "new"):
        with pytest.raises(UserError, match=rf"(new|b): inside {name}/, which DVC or git tracks"):
            check_target(Study(finished), target)
        assert not target.exists()
    with pytest.raises(UserError, match=rf"{name}: inside {name}/, which DVC or git tracks"):
        report(study=Study(finished), output=finished / name / "x.html")


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
                assert "Permission denied; change it" in explain(caught.value)[0]
        closed.chmod(0o700)
