"""`wanda-dvc clean` removes what failed runs left behind, and nothing that a running stage holds."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cases.grids import thinned
from command_line import wanda_dvc
from conftest import without_privilege, write_params
from test_crashes import outputs

from wanda_dvc.stages import run
from wanda_dvc.study.checkouts import RUNNER, _host
from wanda_dvc.study.files import load_json, write_json
from wanda_dvc.study.project import Project
from wanda_dvc.views.leftovers import clean

HEX = "0123456789abcdef" * 2


@pytest.fixture
def study(project: Callable[..., Project]) -> Project:
    """A study in which calibration has run."""
    made = project()
    for name, part in (("download", "model"), ("download", "calibration"), ("calibrate", None)):
        run(name, project=made, part=part)
    return made


def everything(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*")}


def test_all_of_a_failed_run_is_listed_and_removed(study: Project):
    clean(project=study)
    before, kept = everything(study.root), outputs(study.root)
    for name in ("", ".gone"):
        write_json(study.work_root / f"{HEX}{name}" / "out/a.json", {})
    for name in (".lock", ".next.lock"):
        (study.work_root / f"{HEX}{name}").touch()
    left = everything(study.root)
    listed = clean(project=study, dry_run=True)
    assert everything(study.root) == left
    assert "Would remove" in listed
    removed = clean(project=study)
    assert removed.splitlines()[:-1] == listed.splitlines()[:-1]
    assert len(removed.splitlines()) == 4 + 1
    assert everything(study.root) == before
    assert outputs(study.root) == kept
    assert clean(project=study) == "Nothing to remove: failed runs left no files."


def test_the_work_of_a_running_stage_stays(study: Project):
    clean(project=study)
    with study.work({"kind": "busy"}) as work:
        write_json(work.out / "a.json", {})
        held = everything(study.root)
        assert clean(project=study) == "Nothing to remove: failed runs left no files."
        assert everything(study.root) == held
    assert "Removed" in clean(project=study)
    assert not list(study.work_root.iterdir())


@pytest.fixture(params=["tmpabc", "standalone/tmpabc"])
def checkout(project: Callable[..., Project], request: pytest.FixtureRequest) -> Path:
    """An experiment's checkout that is an hour old, in which no process of this host works."""
    folder = project().root / ".dvc/tmp/exps" / request.param
    write_json(folder / "models/pruned/config.json", {})
    (folder / ".dvc/tmp").mkdir(parents=True)
    os.utime(folder, (0, folder.stat().st_ctime - 3600))
    return folder


def ended() -> int:
    """The number of a process that has ended."""
    with subprocess.Popen(["true"]) as process:
        return process.pid


@pytest.mark.parametrize(
    ("note", "removed"),
    [
        ({"host": _host(), "process": ended()}, True),
        ({"host": _host(), "process": os.getpid()}, False),
        ({"host": _host(), "process": 1}, False),  # another user's, where the tests do not run as root
        ({"host": "another", "process": ended()}, False),
        ({"host": _host()}, False),
        ({}, False),  # DVC may still be filling it
    ],
    ids=["ended", "running", "another user's", "another host's", "no process", "no note"],
)
def test_only_a_checkout_whose_process_certainly_ended_is_removed(
    project: Callable[..., Project], checkout: Path, note: dict[str, object], removed: bool
):
    if note:
        write_json(checkout / RUNNER, note)
    assert (f"{checkout.name} " in clean(project=project())) == removed
    assert checkout.exists() != removed


def test_a_killed_experiments_checkout_goes_and_a_running_ones_stays(project: Callable[..., Project], checkout: Path):
    """DVC works in the checkout; a stage that it runs notes the process of DVC, and ends before it."""
    study = project()
    stage = (
        "from pathlib import Path; from wanda_dvc.stages.running import watch_dvc; "
        "from wanda_dvc.study.project import Project; watch_dvc(Project(Path('..').resolve()))"
    )
    dvc = f"import subprocess; subprocess.run([{sys.executable!r}, '-c', {stage!r}], check=True); print(1); input()"
    environment = os.environ | {"DVC_ROOT": str(study.root), "DVC_STAGE": "apply", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", dvc], cwd=checkout / "models", env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as busy:  # fmt: skip
        assert busy.stdout
        assert busy.stdout.readline()
        assert load_json(checkout / RUNNER)["process"] == busy.pid
        assert clean(project=study).startswith("Nothing")
        busy.communicate("\n")
    assert f"{checkout.name} " in clean(project=study)
    assert not checkout.exists()


@pytest.mark.parametrize("closed", thinned(["stats", "stats/norms", ".", ".dvc/tmp/wanda-dvc"], 4))
def test_without_permission_nothing_is_lost_and_the_next_run_ends_well(
    study: Project, tiny: Path, texts: dict[str, str], closed: str
):
    """`calibrate` over what may not be written or read; then it may."""
    write_params(study.root, tiny, calibration__windows=4, **texts)
    run("calibrate", project=Project(study.root))
    expected = outputs(study.root)
    write_params(study.root, tiny, **texts)
    run("calibrate", project=Project(study.root))
    write_params(study.root, tiny, calibration__windows=4, **texts)
    clean(project=study)
    before = outputs(study.root)
    path = study.root / closed
    path.parent.mkdir(parents=True, exist_ok=True)
    mode = path.stat().st_mode
    path.chmod(0o555)
    done = without_privilege(lambda: wanda_dvc("calibrate", cwd=study.root))
    path.chmod(mode)
    assert done.returncode == 2, done.stderr
    assert "Permission denied, expected permission to read and write; change it" in done.stderr
    assert outputs(study.root) == before
    again = wanda_dvc("calibrate", cwd=study.root)
    assert again.returncode == 0, again.stderr
    assert outputs(study.root) == expected
    assert {one.suffix for one in study.work_root.iterdir()} == {".lock"}
