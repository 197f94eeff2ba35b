"""An older study comes to this version: what was shipped is replaced, and what is the user's stays."""

import json
import re
import shutil
from pathlib import Path

import pytest
from command_line import wanda_dvc
from conftest import save_tiny_model, script, write_params
from dvc.repo import Repo
from repository import Repository
from ruamel.yaml import YAML
from test_init import contents

from wanda_dvc.errors import UserError
from wanda_dvc.params import settings
from wanda_dvc.stages import STAGES
from wanda_dvc.study import upgrade as upgrading
from wanda_dvc.study.project import Project
from wanda_dvc.study.ran import load_lock
from wanda_dvc.study.scaffold import FILES, TEMPLATE, init
from wanda_dvc.study.upgrade import _blocks, _load, _params, upgrade

PIPELINE = FILES["dvc.yaml"].read_text(encoding="utf-8")
PARAMS = FILES["params.yaml"].read_text(encoding="utf-8")
OLDER = Path(__file__).parent / "older_study"  # of a version before `locate`, Gram matrices and `init`
AGED = PIPELINE.replace(", correction", "")  # as if this version without the setting had been shipped


@pytest.fixture
def study(tmp_path: Path) -> Project:
    init(folder=tmp_path / "study")
    return Project(tmp_path / "study")


@pytest.fixture
def aged(monkeypatch: pytest.MonkeyPatch) -> str:
    ever = upgrading.shipped_ever() | set(script("known").digests("dvc.yaml", AGED))
    monkeypatch.setattr(upgrading, "shipped_ever", lambda: ever)
    return AGED


@pytest.fixture
def older(tmp_path: Path) -> Project:
    for name, place in (("pipeline", "dvc.yaml"), ("settings", "params.yaml"), ("lock", "dvc.lock")):
        shutil.copyfile(OLDER / f"{name}.yaml", tmp_path / place)
    Repo.init(str(tmp_path), no_scm=True).close()
    (tmp_path / ".dvcignore").unlink()  # DVC's own has comments only
    return Project(tmp_path)


def write(study: Project, place: str, text: str) -> None:
    (study.root / place).write_text(text, encoding="utf-8")


def read(study: Project, place: str = "dvc.yaml") -> str:
    return (study.root / place).read_text(encoding="utf-8")


def test_all_that_is_shipped_is_known():
    """`python scripts/known.py` writes it; an upgrade would take an entry that is not known for the user's edit."""
    module = script("known")
    assert set(module.shipped()) <= set(json.loads((TEMPLATE / "known.json").read_text(encoding="utf-8")))


def test_a_new_study_is_up_to_date(study: Project):
    before = contents(study.root)
    assert upgrade(project=study) == f"{study.root}: up to date with this wanda-dvc."
    assert contents(study.root) == before


def test_an_older_study_becomes_a_new_one(older: Project):
    said = upgrade(project=older)
    assert read(older) == PIPELINE.replace("        - ${item.out}\n", "        - ${item.out}: { push: false }\n")
    default, own = (dict(settings_of(text)) for text in (PARAMS, read(older, "params.yaml")))
    assert own == default | {"training.epochs": 1}  # what still means the same stays
    for place in (".gitignore", ".dvcignore", ".dvc/plots/accuracy.json"):
        assert read(older, place) == FILES[place].read_text(encoding="utf-8")
    assert "--- a/dvc.yaml\n+++ b/dvc.yaml\n" in said
    assert "\n+  locate:\n" in said
    assert "  locate: has not run\n  download@model: also reads sources/model\n" in said
    calibrate = f"`wanda-dvc calibrate --version {STAGES['calibrate'].version}`"
    assert f"{calibrate}; also writes fisher, fisher_gram, gram; also depends on calibration." in said
    command, version = "`wanda-dvc perplexity dense --version", STAGES["perplexity"].version
    assert f"  perplexity@dense: {command} 1` is now {command} {version}`\n" in said  # for no other reason
    assert "`push: false` stays" in said
    assert "up to date" in upgrade(project=older)


def settings_of(text: str):
    from wanda_dvc.study.settings import flatten

    return flatten(YAML(typ="safe", pure=True).load(text))


def test_a_dry_run_says_the_same_and_writes_nothing(older: Project):
    before = contents(older.root)
    would = upgrade(project=older, dry_run=True)
    assert contents(older.root) == before
    assert upgrade(project=older) == would.replace("Would change", "Changed")


@pytest.mark.parametrize("name", [name for name, _ in settings() if name != "model"])  # the first follows none
def test_a_missing_setting_comes_back_at_its_place_with_its_comment(name: str):
    lines, node = PARAMS.splitlines(keepends=True), _load(PARAMS, "params.yaml")
    *sections, leaf = name.split(".")
    for section in sections:
        node = node[section]
    begin, end, _ = _blocks(node, PARAMS.splitlines())[leaf]
    without = "".join([*lines[:begin], *lines[end:]])
    assert leaf not in (dict(settings_of(without)))
    if name == "zero_shot.limit":  # the only setting of its section, which is then null
        without = without.replace("zero_shot:\n", "")
    assert _params(without) == PARAMS


def test_a_comment_ends_no_block():
    text = "stages:\n  one:\n    cmd: x\n# mine\n    params:\n    - a\n# of two\n  two:\n    cmd: y\n# last\n"
    lines, node = text.splitlines(), _load(text, "dvc.yaml")
    blocks = _blocks(node["stages"], lines)
    assert [blocks[name][:2] for name in ("one", "two")] == [(1, 6), (7, 9)]


@pytest.mark.parametrize("section", ["training", "zero_shot", "runtime"])
def test_a_missing_section_comes_back_whole(section: str):
    lines, node = PARAMS.splitlines(keepends=True), _load(PARAMS, "params.yaml")
    begin, end, _ = _blocks(node, PARAMS.splitlines())[section]
    assert _params("".join([*lines[:begin], *lines[end:]])) == PARAMS


def test_a_setting_is_added_to_a_section_on_one_line_too():
    flow = re.sub(r"^training:.*?(?=^propagation)", "training: { epochs: 2 }\n", PARAMS, flags=re.MULTILINE | re.DOTALL)
    added = dict(settings_of(_params(flow)))
    assert (added["training.epochs"], added["training.rate"], added["training.seed"]) == (2, 0.02, 0)


OWN = """\
  count: # mine
    cmd: wc -c < params.yaml > count.txt
    deps: [params.yaml]
    outs:
      # beside the others
      - count.txt
"""
PLOT = "  - my norms:\n      x: block # of mine\n      y:\n        metrics/plots/norms.csv: largest\n"


def test_what_is_the_users_own_stays(study: Project, aged: str):
    mine = aged.replace("\n# `dvc plots show`", f"\n{OWN}\n# `dvc plots show`")
    mine = mine.replace("\nartifacts:", f"{PLOT}\nartifacts:") + "\nvars:\n  - mine: 1 # too\n"
    write(study, "dvc.yaml", mine)
    said = upgrade(project=study)
    after = read(study)
    for block in (OWN, PLOT, "vars:\n  - mine: 1 # too\n"):
        assert block in after
    content = YAML(typ="safe", pure=True).load(after)
    assert list(content["stages"])[-1] == "count"
    shipped = YAML(typ="safe", pure=True).load(PIPELINE)
    assert all(content["stages"][name] == stage for name, stage in shipped["stages"].items())
    assert all(line in after.splitlines() for line in PIPELINE.splitlines())  # comments too
    for what in ("stages: count", "plots: my norms", "vars"):
        assert f"dvc.yaml: {what} is yours and stays." in said
    assert "up to date" in upgrade(project=study)


def test_an_edit_that_asks_for_more_stays(study: Project):
    edited = PIPELINE.replace(
        "deps: [models/dense, masks, gram, fisher_gram, weights]",
        "deps: [models/dense, masks, gram, fisher_gram, weights, README.md]",
    )
    edited = edited.replace("- ${item.out}\n", "- ${item.out}: { cache: false }\n")
    edited = edited.replace("title: Measured sparsity by block", "title: My title")
    write(study, "dvc.yaml", edited)
    said = upgrade(project=study)
    assert read(study) == edited
    for name in ("stages: download", "stages: apply", "plots: sparsity by block"):
        assert f"dvc.yaml: {name} is kept as you have edited it." in said


@pytest.mark.parametrize("indent", ["", "  ", "    "])
def test_an_edited_stage_keeps_its_place_with_a_comment_of_any_indentation(study: Project, indent: str):
    edited = PIPELINE.replace("  apply:\n", f"  apply:\n{indent}# mine\n")
    edited = edited.replace("deps: [models/dense, masks, gram,", "deps: [mine, models/dense, masks, gram,")
    write(study, "dvc.yaml", edited)
    upgrade(project=study)
    assert read(study) == edited


@pytest.mark.parametrize(
    ("before", "after", "lost"),
    [
        ("params: [zero_shot.limit, dtype]", "params: [dtype]", "without zero_shot.limit of `params`"),
        (
            "deps: [models/dense, masks, gram, fisher_gram, weights]",
            "deps: [models/dense, masks, gram, fisher_gram]",
            "without weights of `deps`",
        ),
        ("      - stats\n", "", "without stats of `outs`"),
        ("wanda-dvc mask --version", "nice wanda-dvc mask --version", "without the command `wanda-dvc mask"),
        ("      model: [dense, pruned]\n      task", "      model: [pruned]\n      task", "without `matrix"),
    ],
)
def test_an_edit_that_asks_for_less_is_refused_and_nothing_is_written(
    study: Project, before: str, after: str, lost: str
):
    assert before in PIPELINE
    write(study, "dvc.yaml", PIPELINE.replace(before, after))
    there = contents(study.root)
    with pytest.raises(UserError, match=re.escape(lost)):
        upgrade(project=study)
    assert contents(study.root) == there


def test_an_edited_plot_template_and_ignore_file_stay(study: Project):
    write(study, ".dvc/plots/accuracy.json", "{}")
    write(study, ".gitignore", "/mine/\n")
    assert ".dvc/plots/accuracy.json: kept as you have edited it." in upgrade(project=study)
    assert read(study, ".dvc/plots/accuracy.json") == "{}"
    assert read(study, ".gitignore") == "/mine/\n" + FILES[".gitignore"].read_text(encoding="utf-8")


def test_the_plots_of_a_study_below_the_root_of_its_dvc_repository_are_in_the_root(older: Project):
    below = older.root / "below"
    below.mkdir()
    for place in ("dvc.yaml", "params.yaml"):
        (older.root / place).rename(below / place)
    upgrade(project=Project(below))
    assert (older.root / ".dvc/plots/accuracy.json").is_file()
    assert sorted(path.name for path in below.iterdir()) == [".dvcignore", ".gitignore", "dvc.yaml", "params.yaml"]


def test_without_a_dvc_repository_it_says_so(older: Project):
    shutil.rmtree(older.root / ".dvc")
    with pytest.raises(UserError, match="no DVC repository, expected a study in one; run `dvc init`"):
        upgrade(project=older)
    assert not (older.root / ".dvc").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages: [", "dvc.yaml: not valid YAML"),
        ("- 1", "dvc.yaml: got CommentedSeq, expected a mapping"),
        ("plots: []\n", "dvc.yaml: no stages, expected a pipeline"),
    ],
)
def test_a_pipeline_that_is_none_is_refused(study: Project, text: str, message: str):
    write(study, "dvc.yaml", text)
    with pytest.raises(UserError, match=message):
        upgrade(project=study)
    assert read(study) == text


def test_the_command_says_it(study: Project):
    (study.root / "dvc.yaml").unlink()
    done = wanda_dvc("init", "--upgrade", "--dry-run", cwd=study.root)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Would change: dvc.yaml." in done.stdout
    assert not (study.root / "dvc.yaml").exists()
    assert wanda_dvc("init", "--upgrade", "--model", "a/b", cwd=study.root).returncode == 2
    assert wanda_dvc("init", "--dry-run", cwd=study.root / ".dvc").returncode == 2


@pytest.mark.pipeline
def test_dvc_runs_what_the_upgrade_says(tmp_path: Path, aged: str):
    """A setting that is new and has its default runs nothing again; another value runs the stage again."""
    repository = Repository.new(tmp_path / "study", save_tiny_model(tmp_path / "tiny"))
    repository.repro(tasks__names=[])
    study, new = Project(repository.root), read(Project(repository.root), "params.yaml")
    assert load_lock(read(study, "dvc.lock"))["mask"]["params"]["params.yaml"]["correction"] == 0.5
    whole = read(study, "dvc.lock")

    def age(params: str) -> None:
        write(study, "dvc.yaml", aged)
        write(study, "dvc.lock", whole.replace("        correction: 0.5\n", ""))
        write(study, "params.yaml", params)

    age(re.sub(r"^correction:.*\n", "", new, flags=re.MULTILINE))
    assert "every result stays valid" in upgrade(project=Project(study.root))
    assert (read(study), read(study, "dvc.lock")) == (PIPELINE, whole)
    assert repository.repro() == set()

    age(new.replace("correction: 0.5", "correction: 0.6"))
    assert "\n  mask: also depends on correction" in upgrade(project=Project(study.root))
    assert repository.repro() == {"mask"}
    write_params(repository.root, repository.model)
