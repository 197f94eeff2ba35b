"""An older study comes to this version: unedited files are replaced, edits and settings stay."""

import functools
import json
import operator
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from command_line import wanda_dvc
from conftest import save_tiny_model, script
from dvc.repo import Repo
from repository import Repository
from ruamel.yaml import YAML
from test_init import contents

from wanda_dvc.errors import UserError
from wanda_dvc.params import settings
from wanda_dvc.stages import STAGES
from wanda_dvc.study.presets import apply_preset
from wanda_dvc.study.project import Project
from wanda_dvc.study.scaffold import FILES, TEMPLATE, init
from wanda_dvc.study.settings import Settings, flatten, nested
from wanda_dvc.study.upgrade import MOVED, REMOVED, _brought, _carry, _migrated, upgrade

PIPELINE = FILES["dvc.yaml"].read_text(encoding="utf-8")
PARAMS = FILES["params.yaml"].read_text(encoding="utf-8")
OLDER = Path(__file__).parent / "older_study"  # of a version before `locate`, Gram matrices and `init`
EARLIER = TEMPLATE / "earlier/2026-11"  # with 44 settings


@pytest.fixture
def study(tmp_path: Path) -> Project:
    init(folder=tmp_path / "study")
    return Project(tmp_path / "study")


@pytest.fixture
def earlier(study: Project) -> Project:
    for place in ("dvc.yaml", "params.yaml"):
        write(study, place, (EARLIER / FILES[place].name).read_text(encoding="utf-8"))
    return study


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


def edit(study: Project, place: str, *edits: tuple[str, str]) -> None:
    text = read(study, place)
    for before, after in edits:
        assert before in text
        text = text.replace(before, after, 1)
    write(study, place, text)


def load(text: str) -> Any:
    return YAML(typ="safe", pure=True).load(text)


def settings_of(text: str) -> Settings:
    return dict(flatten(load(text)))


def test_all_that_is_shipped_is_known():
    """`python scripts/known.py` writes it; an upgrade would take a file that is not known for the user's edit."""
    module = script("known")
    assert set(module.shipped()) <= set(json.loads((TEMPLATE / "known.json").read_text(encoding="utf-8")))


def test_a_new_study_is_up_to_date(study: Project):
    before = contents(study.root)
    assert upgrade(project=study) == f"{study.root}: up to date with this wanda-dvc."
    assert contents(study.root) == before


def test_an_older_study_becomes_a_new_one(older: Project):
    said = upgrade(project=older)
    expected = PIPELINE
    for out in ("        - ${item.out}", "        - data/perplexity/${key}"):
        expected = expected.replace(f"{out}\n", f"{out}: {{ push: false }}\n")
    assert read(older) == expected
    assert read(older, "params.yaml") == PARAMS.replace("windows: 32 ", "windows: 64 ")  # the value of that study
    for place in (".gitignore", ".dvcignore", ".dvc/plots/accuracy.json"):
        assert read(older, place) == FILES[place].read_text(encoding="utf-8")
    assert "--- a/dvc.yaml\n+++ b/dvc.yaml\n" in said
    assert "\n+  locate:\n" in said
    assert "params.yaml: training.epochs: 1 is dropped: this version has no such setting.\n" in said
    assert "  locate: has not run\n  download@model: also reads sources/model\n" in said
    assert f"`wanda-dvc calibrate --version {STAGES['calibrate'].version}`; also writes " in said
    assert "  perplexity-dense@embedded: has not run\n" in said
    assert "`push: false` stays" in said
    assert "up to date" in upgrade(project=older)


def test_a_dry_run_says_the_same_and_writes_nothing(older: Project):
    before = contents(older.root)
    would = upgrade(project=older, dry_run=True)
    assert contents(older.root) == before
    assert upgrade(project=older) == would.replace("Would change", "Changed")


# --- settings ---


def test_every_setting_of_an_earlier_version_is_a_setting_or_moved_or_gone():
    known = {name for name, _ in settings()} | {name for names in MOVED for name in names} | REMOVED.keys()
    assert settings_of((EARLIER / "params.yaml").read_text(encoding="utf-8")).keys() <= known


CORRECTED = {"reconstruction": "least-squares", "propagation": "corrected", "calibration.gram": "float16"}
HUB = {"calibration.text.source": "org/prose", "calibration.text.split": "train"}
MIGRATIONS: list[tuple[Settings, Settings]] = [  # changes of the earlier settings, changes of this version's
    ({}, {}),
    ({"sparsity": 0.7, "runtime.device": "cpu"}, {"sparsity": 0.7, "runtime.device": "cpu"}),
    ({"method": "magnitude"}, {"recipe": "magnitude"}),
    ({"propagation": "pruned"}, {"recipe": "paper"}),
    ({"method": "magnitude", "group": "layer", "propagation": "pruned"}, {"recipe": "paper", "method": "magnitude"}),
    ({"method": "ria"}, {"method": "ria"}),
    ({"allocation": "owl", "allocation_strength": 0.1}, {"allocation": "owl", "allocation_strength": 0.1}),
    (
        {"method": "admm", "group": "fisher", "allocation": "fisher", "reconstruction": "fisher"}
        | {"calibration.gram": "float16", "calibration.fisher": 8, "calibration.fisher_gram": "float16"},
        {"recipe": "fisher", "calibration.statistics": "fisher"},
    ),
    (CORRECTED, {"recipe": "wanda-refit", "propagation": "corrected", "calibration.statistics": "gram"}),
    (HUB, {"calibration.text.source": "org/prose"}),
    (
        HUB | {"calibration.text.config": "good", "calibration.text.revision": "v1", "calibration.text.split": "dev"},
        {"calibration.text.source": "org/prose:good@v1", "calibration.text.split": "dev"},
    ),
    (
        HUB | {"calibration.text.column": "body", "calibration.text.join": "\n"},
        {"calibration.text.source": "org/prose", "calibration.text.column": "body", "calibration.text.join": "\n"},
    ),
    (
        {"perplexity.text.source": "/texts/mine.txt", "perplexity.text.split": None},
        {f"perplexity.texts.text.{key}": None for key in ("split", "column")}
        | {"perplexity.texts.text.source": "/texts/mine.txt"},
    ),
    (
        {"perplexity.text.source": "ptb", "perplexity.text.split": "validation", "perplexity.text.join": " "},
        {
            "perplexity.texts.ptb.source": "ptb",
            "perplexity.texts.ptb.split": "validation",
            "perplexity.texts.ptb.column": None,
        },
    ),
    ({"perplexity.windows": None, "perplexity.rest": "kept"}, {"perplexity.windows": "all"}),
    ({"perplexity.windows": None}, {"perplexity.windows": None}),
    ({"tasks.source": "benchmark", "zero_shot.limit": 9}, {"tasks.source": "benchmark", "zero_shot.limit": 9}),
    ({"runtime.workers": "local"}, {"runtime.ray": "local"}),
    ({"training.rate": 0.0003}, {}),
]


KEPT: Settings = {"perplexity.windows": 64}  # the default was another, and a study keeps what it wrote


def aged(changes: Settings) -> str:
    """The text of an earlier params.yaml with other values."""
    before = settings_of((EARLIER / "params.yaml").read_text(encoding="utf-8"))
    assert changes.keys() <= before.keys()
    return json.dumps(nested(before | changes))  # JSON is YAML


@pytest.mark.parametrize(("before", "after"), MIGRATIONS)
def test_settings_of_an_earlier_version_keep_their_meaning(before: Settings, after: Settings):
    notes: list[str] = []
    text = _migrated(aged(before), PARAMS, notes)
    expected = settings_of(PARAMS)
    if any(name.startswith("perplexity.texts.") for name in after):  # then the default's text is not among them
        expected = {name: value for name, value in expected.items() if not name.startswith("perplexity.texts.")}
    assert settings_of(text) == expected | KEPT | after
    assert notes == []
    assert _migrated(text, PARAMS, notes) == text


LOST: list[tuple[Settings, Settings]] = [  # a value that this version cannot express, other changes
    ({"correction": 0.7}, CORRECTED),
    ({"training.epochs": 1}, {}),
    ({"training.rate": 0.001}, {}),
    ({"training.seed": 4}, {}),
    ({"perplexity.text.join": " "}, {}),
    ({"calibration.gram": "float32"}, {}),
    ({"calibration.fisher": 16}, {}),
    ({"calibration.fisher_gram": "float32"}, {}),
    ({"perplexity.text.revision": "v1"}, {"perplexity.text.source": "wikitext2"}),
    ({"runtime.threads": 2}, {}),
    ({"runtime.memory_gb": 8}, {}),
    ({"runtime.compile": "on"}, {}),
]


def test_every_removed_setting_has_a_value_that_is_lost():
    assert REMOVED.keys() <= {name for lost, _ in LOST for name in lost}


@pytest.mark.parametrize(("lost", "others"), LOST)
def test_a_value_that_cannot_be_expressed_is_named(lost: Settings, others: Settings):
    notes: list[str] = []
    text = _migrated(aged(lost | others), PARAMS, notes)
    ((name, value),) = lost.items()
    assert notes == [f"params.yaml: {name}: {value!r} is dropped: this version has no such setting."]
    assert name not in settings_of(text)


def test_comments_of_the_user_stay(earlier: Project):
    edit(
        earlier, "params.yaml", ("sparsity: 0.5 ", "# mine\nsparsity: 0.7 "), ("  length: 512 ", "  length: 512 # too:")
    )
    upgrade(project=earlier)
    own, expected = read(earlier, "params.yaml"), PARAMS.replace("sparsity: 0.5 ", "sparsity: 0.7 ")
    expected = expected.replace("windows: 32 ", "windows: 64 ").replace("limit: 10  ", "limit: null")  # as before
    assert own.count("# mine\n") == 1
    assert own.replace("# mine\n", "") == expected.replace("  length: 512 ", "  length: 512 # too:", 1)


def commented(place: str, at: set[int], *, above: bool) -> tuple[str, list[str]]:
    """An earlier file with comments above or at the end of some lines, and the comments."""
    lines, comments = (EARLIER / FILES[place].name).read_text(encoding="utf-8").splitlines(), []
    for number, line in enumerate(lines):
        if number in at and line.strip():
            comments.append(f"# mine, {number}")
            indent = " " * (len(line) - len(line.lstrip()))
            lines[number] = f"{indent}{comments[-1]}\n{line}" if above else f"{line} {comments[-1]}"
    return "\n".join([*lines, ""]), comments


@pytest.mark.parametrize("above", [True, False])
@pytest.mark.parametrize("place", ["dvc.yaml", "params.yaml"])
@pytest.mark.parametrize("step", [1, 2, 5, 0])
def test_a_comment_stays_wherever_it_is(place: str, step: int, above: bool):
    """With a step of 0, one comment alone, at every ninth line."""
    size = len((EARLIER / FILES[place].name).read_text(encoding="utf-8").splitlines())
    for at in [{*range(0, size, step)}] if step else [{only} for only in range(0, size, 9)]:
        text, comments = commented(place, at, above=above)
        new = _brought(place, text, [])
        found = [line for line in new.splitlines() if "mine" in line]
        assert sorted(comments) == sorted("# mine" + line.partition("# mine")[2] for line in found)
        rest = "\n".join(line for line in new.splitlines() if not line.lstrip().startswith("# mine"))
        plain = _brought(place, (EARLIER / FILES[place].name).read_text(encoding="utf-8"), [])
        assert load(rest) == load(plain)


def test_a_comment_stays_at_its_line(earlier: Project):
    edit(
        earlier,
        "dvc.yaml",
        ("    cmd: wanda-dvc mask --version 7\n", "    # why\n    cmd: wanda-dvc mask --version 7 # 7\n"),
    )
    upgrade(project=earlier)
    version = STAGES["mask"].version
    command = f"    cmd: wanda-dvc mask --version {version}\n"
    assert read(earlier) == PIPELINE.replace(command, f"    # why\n    # 7\n{command}")


@pytest.mark.parametrize("name", ["dtype", "calibration.text.split", "zero_shot", "runtime"])
def test_a_missing_setting_comes_back_at_its_place_with_its_comment(name: str):
    *sections, leaf = name.split(".")
    content = load(PARAMS)
    section = content
    for word in sections:
        section = section[word]
    del section[leaf]
    assert _migrated(json.dumps(content), PARAMS, []) == PARAMS


def test_a_key_that_is_no_text_is_refused(earlier: Project):
    edit(earlier, "params.yaml", ("  limit: null", "  limit\n: null"))
    with pytest.raises(UserError, match=r"params.yaml: None: no such setting; remove it"):
        upgrade(project=earlier)


def test_an_unknown_setting_is_refused_and_nothing_is_written(earlier: Project):
    edit(earlier, "params.yaml", ("sparsity:", "sparsty:"))
    there = contents(earlier.root)
    with pytest.raises(UserError, match=r"params.yaml: sparsty: no such setting; did you mean sparsity\?"):
        upgrade(project=earlier)
    assert contents(earlier.root) == there


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("calibration.fisher", "null0"),
        ("method", ["wanda"]),
        ("calibration.text.source", 5),
        ("calibration.text.source", []),
    ],
)
def test_a_value_of_another_type_is_refused(name: str, value: object):
    with pytest.raises(
        UserError, match=rf"^params.yaml: found .*{name}: .*, expected values of an earlier version; rest"
    ):
        _migrated(aged({name: value}), PARAMS, [])


# --- files ---


OWN = """\
  count: # mine
    cmd: wc -c < params.yaml > count.txt
    deps: [params.yaml]
    outs:
      # beside the others
      - count.txt
"""
PLOT = "  - my norms:\n      x: block # of mine\n      y:\n        metrics/plots/norms.csv: largest\n"


def test_edits_of_an_earlier_pipeline_are_merged(earlier: Project):
    edits = (
        ("\n# `dvc plots show`", f"\n{OWN}\n# `dvc plots show`"),
        ("\nartifacts:", f"{PLOT}\nartifacts:"),
        ("title: Measured sparsity by block", "title: My title"),
        ("wanda-dvc, causal-lm]\n", "wanda-dvc, causal-lm]\n\nvars:\n  - mine: 1 # too\n"),
    )
    edit(earlier, "dvc.yaml", *edits)
    assert "dvc.yaml: your edits are kept.\n" in upgrade(project=earlier)
    expected = PIPELINE
    for before, after in edits:
        expected = expected.replace(before, after, 1)
    assert read(earlier) == expected
    assert "dvc.yaml: kept as you have edited it.\n" in upgrade(project=earlier)
    assert read(earlier) == expected


@pytest.mark.parametrize("options", [" { cache: false }", " { push: false } # mine", "\n            cache: false"])
def test_what_was_not_shared_is_not_shared_after_an_upgrade(earlier: Project, options: str):
    """The text of the evaluation was an item of `download`; now it has a stage of its own."""
    edit(earlier, "dvc.yaml", ("        - ${item.out}\n", f"        - ${{item.out}}:{options}\n"))
    upgrade(project=earlier)
    expected = PIPELINE
    for out in ("        - ${item.out}", "        - data/perplexity/${key}"):
        expected = expected.replace(f"{out}\n", f"{out}:{options}\n")
    assert read(earlier) == expected
    edit(earlier, "dvc.yaml", (f"data/perplexity/${{key}}:{options}", "data/perplexity/${key}"))
    mine = read(earlier)
    upgrade(project=earlier)
    assert read(earlier) == mine


def test_an_edit_of_what_this_version_changes_is_refused_and_nothing_is_written(earlier: Project):
    edit(earlier, "dvc.yaml", ("training, propagation, correction]", "training, propagation, correction, mine]"))
    line = next(n for n, line in enumerate(read(earlier).splitlines(), start=1) if "correction, mine]" in line)
    there = contents(earlier.root)
    with pytest.raises(UserError, match=rf"^dvc.yaml: lines \d+ to {line}: edited, and this version needs\n.*recipe, "):
        upgrade(project=earlier)
    assert contents(earlier.root) == there


def test_an_edited_plot_template_and_ignore_file_stay(study: Project):
    write(study, ".dvc/plots/accuracy.json", "{}")
    write(study, ".gitignore", "/mine/\n")
    assert ".dvc/plots/accuracy.json: kept as you have edited it." in upgrade(project=study)
    assert read(study, ".dvc/plots/accuracy.json") == "{}"
    assert read(study, ".gitignore") == "/mine/\n" + FILES[".gitignore"].read_text(encoding="utf-8")


def test_prompts_are_the_users(study: Project):
    write(study, "prompts.txt", "My prompt\n")
    write(study, ".gitignore", "/mine/\n")  # something to upgrade
    upgrade(project=study)
    assert read(study, "prompts.txt") == "My prompt\n"
    (study.root / "prompts.txt").unlink()
    upgrade(project=study)
    assert read(study, "prompts.txt") == FILES["prompts.txt"].read_text(encoding="utf-8")


def test_the_plots_of_a_study_below_the_root_of_its_dvc_repository_are_in_the_root(older: Project):
    below = older.root / "below"
    below.mkdir()
    for place in ("dvc.yaml", "params.yaml"):
        (older.root / place).rename(below / place)
    upgrade(project=Project(below))
    assert (older.root / ".dvc/plots/accuracy.json").is_file()
    written = [".dvcignore", ".gitignore", "dvc.yaml", "params.yaml", "prompts.txt"]
    assert sorted(path.name for path in below.iterdir()) == written


def test_without_a_dvc_repository_it_says_so(older: Project):
    shutil.rmtree(older.root / ".dvc")
    with pytest.raises(UserError, match="no DVC repository, expected a study in one; run `dvc init`"):
        upgrade(project=older)
    assert not (older.root / ".dvc").exists()


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("dvc.yaml", "stages: ["),
        ("dvc.yaml", "- 1"),
        ("params.yaml", "a: ["),
        ("params.yaml", "[" * 3000),
        ("params.yaml", "a: " + "9" * 5000),
    ],
    ids=["half", "list", "half settings", "deep", "large"],
)
def test_a_file_that_cannot_be_read_is_refused(study: Project, place: str, text: str):
    write(study, place, text)
    with pytest.raises(UserError, match=rf"^{place}: .*; restore it from git"):
        upgrade(project=study)
    assert read(study, place) == text


def test_the_command_says_it(study: Project):
    (study.root / "dvc.yaml").unlink()
    done = wanda_dvc("init", "--upgrade", "--dry-run", cwd=study.root)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Would change: dvc.yaml." in done.stdout
    assert not (study.root / "dvc.yaml").exists()
    assert wanda_dvc("init", "--upgrade", "--model", "a/b", cwd=study.root).returncode == 2
    assert wanda_dvc("init", "--dry-run", cwd=study.root / ".dvc").returncode == 2


def test_a_stage_that_this_version_lacks_leaves_the_lock(older: Project):
    """`show` would name its settings as those of the last run. DVC keeps it."""
    assert re.search(r"No longer a stage: .*zero-shot@dense-piqa", upgrade(project=older))
    stages = load(read(older, "dvc.lock"))["stages"]
    assert not [name for name in stages if name.startswith("zero-shot@")]
    assert {"calibrate", "mask"} <= stages.keys()


@pytest.mark.parametrize(("revision", "carried"), [("v1", False), (None, True)])
def test_a_stage_runs_again_if_this_version_cannot_express_its_settings(revision: str | None, carried: bool):
    """A named text has a revision of its own."""
    text = {"source": "c4", "config": None, "revision": revision, "split": "train", "column": "text", "join": " "}
    lock = {"download@calibration": {"params": {"params.yaml": {"calibration.text": text}}}}
    after = _carry({"download@calibration": {"params": ["calibration.text"]}}, lock, {})
    new = {"source": "c4", "split": None, "column": None, "join": None}
    found = after["download@calibration"]["params"]["params.yaml"]["calibration.text"]
    assert found == (new if carried else text)


@pytest.mark.pipeline
def test_dvc_runs_what_the_upgrade_says(tmp_path: Path):
    """Stages of the same version do not run again for settings that only have another name."""
    repository = Repository.new(tmp_path / "study", save_tiny_model(tmp_path / "tiny"))
    end = ("download@calibration", "download@tasks", "calibrate")
    repository.repro_up_to(*end)
    study = Project(repository.root)
    lock = load(read(study, "dvc.lock"))
    new, ran = read(study, "params.yaml"), read(study, "dvc.lock")
    earlier = settings_of((EARLIER / "params.yaml").read_text(encoding="utf-8"))
    own = settings_of(new)
    moved = {name for names in MOVED for name in names} - {"perplexity.windows", "zero_shot.limit"}
    before = nested(earlier | {name: own[name] for name in earlier.keys() & own.keys() - moved})
    for stage in lock["stages"].values():
        params = stage.get("params", {}).get("params.yaml", {})
        for name in [name for name in params if not name.startswith("perplexity.")]:
            *sections, leaf = name.split(".")
            if name != "calibration.statistics":
                params[name] = functools.reduce(operator.getitem, sections, before)[leaf]
        if params.pop("calibration.statistics", None):
            tiers = ("gram", "fisher", "fisher_gram")
            params |= {f"calibration.{tier}": before["calibration"][tier] for tier in tiers}

    def age(**changes: Any) -> None:
        write(study, "params.yaml", json.dumps(nested(dict(flatten(before)) | changes)))
        write(study, "dvc.lock", json.dumps(lock))

    age()
    said = upgrade(project=Project(study.root))
    assert settings_of(read(study, "params.yaml")) == own
    assert load(read(study, "dvc.lock")) == load(ran)
    assert not re.search(r"^  (locate|download@calibration|download@tasks|calibrate)", said, re.MULTILINE)
    assert repository.repro_up_to(*end) == set()

    age(**{"calibration.samples": 2})
    assert "\n  calibrate: other settings: calibration.samples\n" in upgrade(project=Project(study.root))
    assert repository.repro_up_to(*end) == {"calibrate"}


def test_a_link_stays_a_link(earlier: Project, tmp_path: Path):
    for place in ("dvc.yaml", "params.yaml"):
        path, target = earlier.root / place, tmp_path / f"mine-{place}"
        path.rename(target)
        path.symlink_to(target)
    upgrade(project=earlier)
    apply_preset(project=earlier, name="paper")
    for place in ("dvc.yaml", "params.yaml"):
        path = earlier.root / place
        assert path.readlink() == tmp_path / f"mine-{place}"
    assert read(earlier) == PIPELINE
