"""`wanda-dvc clean` removes what failed runs left behind, and nothing that a running stage holds."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import wanda_dvc
from conftest import without_privilege, write_params
from test_crashes import outputs

from wanda_dvc.stages import run
from wanda_dvc.study.files import write_json
from wanda_dvc.study.project import Project
from wanda_dvc.views.leftovers import YOUNG, clean

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
    before, whole = everything(study.root), outputs(study.root)
    work = study.work_root / HEX
    for name in ("", ".gone", ".published", ".published.gone"):
        write_json(work.with_name(HEX + name) / "out/a.json", {})
    write_json(work.with_suffix(".published") / "target.json", {"target": str(study.stats)})
    for name in (".part", ".part.copy", ".part.gone", ".earlier", ".earlier.gone"):
        write_json(study.root / f"stats{name}" / "a.json", {})
    work.with_suffix(".lock").touch()
    left = everything(study.root)
    listed = clean(project=study, dry_run=True)
    assert everything(study.root) == left
    assert "Would remove" in listed
    assert all(f"stats{name} " in listed for name in (".part", ".part.copy", ".part.gone", ".earlier", ".earlier.gone"))
    removed = clean(project=study)
    assert removed.splitlines()[:-1] == listed.splitlines()[:-1]
    assert len(removed.splitlines()) == 4 + 5 + 1 + 1
    assert everything(study.root) == before
    assert outputs(study.root) == whole
    assert clean(project=study) == "Nothing: no failed run has left anything behind."


def test_an_artifact_that_was_moved_away_comes_back(study: Project):
    """Killed between the two renames of a publication: the earlier one is whole, under another name."""
    clean(project=study)
    whole = outputs(study.root)
    study.stats.rename(study.root / "stats.earlier")
    write_json(study.root / "stats.part/a.json", {})
    write_json(study.work_root / f"{HEX}.published/target.json", {"target": str(study.stats)})
    clean(project=study)
    assert outputs(study.root) == whole


def test_the_work_of_a_running_stage_stays(study: Project):
    clean(project=study)
    with study.work({"kind": "busy"}) as work:
        write_json(work.out / "a.json", {})
        held = everything(study.root)
        assert clean(project=study) == "Nothing: no failed run has left anything behind."
        assert everything(study.root) == held
    assert "Removed" in clean(project=study)
    assert not list(study.work_root.iterdir())


@pytest.mark.parametrize("folder", ["tmpabc", "standalone/tmpabc"])
def test_a_killed_experiments_checkout_goes_and_a_running_ones_stays(study: Project, folder: str):
    clean(project=study)
    checkout = study.root / ".dvc/tmp/exps" / folder
    write_json(checkout / "models/pruned/config.json", {})
    assert clean(project=study).startswith("Nothing")  # DVC may still be filling it
    os.utime(checkout, (0, checkout.stat().st_ctime - 2 * YOUNG))
    code = "print('there', flush=True); input()"
    words = [sys.executable, "-c", code]
    with subprocess.Popen(words, cwd=checkout / "models", stdin=subprocess.PIPE, stdout=subprocess.PIPE) as busy:
        assert busy.stdout
        assert busy.stdout.readline()
        assert clean(project=study).startswith("Nothing")
        busy.communicate(b"\n")
    assert f".dvc/tmp/exps/{folder} " in clean(project=study)
    assert not checkout.exists()


@pytest.mark.parametrize("closed", ["stats", ".", ".dvc/tmp/wanda-dvc"])
def test_without_permission_nothing_is_lost_and_the_next_run_ends_well(
    study: Project, tiny: Path, texts: dict[str, str], closed: str
):
    """`calibrate` over what may not be written or read; then it may."""
    write_params(study.root, tiny, calibration__samples=4, **texts)
    run("calibrate", project=Project(study.root))
    expected = outputs(study.root)
    write_params(study.root, tiny, **texts)
    run("calibrate", project=Project(study.root))
    write_params(study.root, tiny, calibration__samples=4, **texts)
    clean(project=study)
    before = outputs(study.root)
    path = study.root / closed
    path.parent.mkdir(parents=True, exist_ok=True)
    mode = path.stat().st_mode
    path.chmod(0o555)
    done = without_privilege(lambda: wanda_dvc("calibrate", cwd=study.root))
    path.chmod(mode)
    assert done.returncode == 2, done.stderr
    assert "Permission denied, expected a place that may be read and written; change its permissions" in done.stderr
    assert outputs(study.root) == before
    again = wanda_dvc("calibrate", cwd=study.root)
    assert again.returncode == 0, again.stderr
    assert outputs(study.root) == expected
    assert {one.suffix for one in study.work_root.iterdir()} == {".lock"}
