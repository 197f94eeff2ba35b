"""A stage that is killed at a file operation is run again and ends with the same bytes."""

import errno
import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from command_line import process, wanda_dvc
from conftest import Factory, Make, Patch, fetch, tree, without_privilege, write_params
from families import save

from wanda_dvc.catalog import STRUCTURES
from wanda_dvc.commands.export import export
from wanda_dvc.errors import explain
from wanda_dvc.stages import STAGES, run
from wanda_dvc.study.artifact import Work
from wanda_dvc.study.folder import Study

CRASHES = int(os.environ.get("WANDA_DVC_CRASHES", "2"))  # points by stage; 1000 are all, in two minutes on two cores
CHANGES_FILES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate"}


class Killed(BaseException):
    """The process has died: no operation after this one happens, whatever a handler tries."""


class Killer:
    """Counts the operations that change files below a folder, and kills at one of them."""

    def __init__(self) -> None:
        self.below, self.at, self.count = "", -1, 0
        sys.addaudithook(self)  # it cannot be taken away: without a folder it does nothing

    def __call__(self, event: str, words: tuple[Any, ...]) -> None:
        if not self.below or not (event in CHANGES_FILES or (event == "open" and writes(words))):
            return
        if any(str(word).startswith(self.below) for word in words[:2] if isinstance(word, str | Path)):
            self.count += 1
            if 0 <= self.at < self.count:
                raise Killed

    def run(self, root: Path, at: int, body: Callable[[], object]) -> bool:
        """Whether the body came to its end before operation number `at` of those below `root` (negative: it does)."""
        self.below, self.at, self.count = str(root), at, 0
        try:
            body()
        except Killed:
            return False
        finally:
            self.below = ""
        return True


def writes(words: tuple[Any, ...]) -> bool:
    path, _, flags = words
    return isinstance(path, str | Path) and bool(flags & (os.O_WRONLY | os.O_RDWR)) and not str(path).endswith(".lock")


@pytest.fixture(scope="module")
def killer() -> Killer:
    return Killer()


@pytest.fixture(scope="module")
def root(tmp_path_factory: Factory, texts: dict[str, str]) -> Path:
    """A study of a mixture of two blocks in which everything has run once."""
    folder, model = tmp_path_factory.mktemp("study"), tmp_path_factory.mktemp("model")
    save("mixtral", model, num_hidden_layers=2, num_local_experts=8)
    small = {"calibration__windows": 2, "perplexity__windows": 2, "tasks__limit": 1}
    pruning = {"calibration__statistics": "fisher", "reconstruction": "output-weighted", "propagation": "pruned"}
    write_params(folder, model, group="outputs", **texts, **small, **pruning)
    study = Study(folder)
    for stage in STAGES.values():
        for _, part, _ in stage.runs(["embedded"]):
            run(stage.name, study=study, variant=part)
    return folder


def leftovers(root: Path) -> list[Path]:
    return [path for path in (root / ".dvc/tmp/wanda-dvc").glob("*") if path.suffix != ".lock"]


Content = dict[str, bytes]
OLD, OTHER, NEW = ({"a": kind, f"{name}/b": kind} for name, kind in (("c", b"old"), ("b", b"other"), ("b", b"new")))


def write(folder: Path, content: Content) -> None:
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def begin(folder: Path, targets: list[Path], earlier: str) -> list[Content]:
    """An empty repository around targets that exist or not; what they hold."""
    for old in folder.iterdir():
        shutil.rmtree(old)
    (folder / ".dvc/tmp/wanda-dvc").mkdir(parents=True)
    for target in targets:
        target.parent.mkdir(parents=True, exist_ok=True)
        if earlier != "nothing":
            write(target.with_name("far") if earlier == "a link" else target, OLD)
        if earlier == "a link":
            target.symlink_to("far")
    return [tree(target) for target in targets]


def publish(study: Study, targets: list[Path], content: Content) -> None:
    """A stage that continues its own work, and publishes it."""
    with study.work({"of": str(content)}) as work:
        for target in targets:
            folder = work.output(target.name if len(targets) > 1 else "")
            write(folder, {name: data for name, data in content.items() if not (folder / name).exists()})
        work.commit(*targets)


def two_file_systems(one: Path) -> Callable[[Path, Path], Path]:
    """A rename that works on one side of a border alone."""
    rename = Path.rename

    def refuse(source: Path, target: Path) -> Path:
        if source.is_relative_to(one) != target.is_relative_to(one):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), source, None, target)
        return rename(source, target)

    return refuse


@pytest.mark.parametrize(
    ("earlier", "names", "across"),
    [
        *itertools.product(["a folder"], [["stats"], ["masks", "weights"]], [False, True]),
        *itertools.product(["nothing", "a link"], [["stats"]], [False, True]),
    ],
)
def test_every_operation_of_a_publication_is_a_crash_point_that_recovers(
    tmp_path: Path, killer: Killer, monkeypatch: Patch, earlier: str, names: list[str], across: bool,
):  # fmt: skip
    """An artifact is then the earlier one or the new one, or is missing while the new one waits; never a part of one.

    The same run publishes it, also after a run with other inputs, and nothing is left behind.
    """
    study, targets = Study(tmp_path / "study"), [tmp_path / "study/made" / name for name in names]
    (tmp_path / ".dvc").mkdir()
    place = Work(study.work_path({"of": str(NEW)}))
    if across:
        monkeypatch.setattr(Path, "rename", two_file_systems(tmp_path / ".dvc"))

    def killed(at: int) -> bool:
        return not killer.run(tmp_path, at, lambda: publish(study, targets, NEW))

    begin(tmp_path, targets, earlier)
    assert not killed(-1)
    assert [tree(target) for target in targets] == [NEW] * len(targets)
    for at, others in itertools.product(range(killer.count), [[], [OTHER]]):
        before = begin(tmp_path, targets, earlier)
        assert killed(at)
        waiting = [tree(place.path / "out" / name) for name in ("", *names)]
        for target, old in zip(targets, before, strict=True):
            assert tree(target) in [old, NEW] or (not target.exists() and NEW in waiting), at
        for content in (*others, NEW):
            publish(study, targets, content)
            assert [tree(target) for target in targets] == [content] * len(targets), at
        assert not leftovers(tmp_path), at
        assert {path.name for path in (tmp_path / "study/made").iterdir()} - {"far"} == set(names), at


def test_an_earlier_artifact_that_cannot_be_moved_is_an_error(tmp_path: Path, monkeypatch: Patch):
    """Such is a folder in a lower layer of overlayfs. The new artifact waits."""
    target = tmp_path / "made"
    write(target, OLD)
    monkeypatch.setattr(Path, "rename", two_file_systems(target))
    with pytest.raises(OSError, match=os.strerror(errno.EXDEV)):
        publish(Study(tmp_path), [target], NEW)
    assert (tree(target), NEW) == (OLD, tree(Work(Study(tmp_path).work_path({"of": str(NEW)})).out))


# The settings in which a stage is killed: for weights that `mask` stores, and for each kind of smaller model.
OWN = dict.fromkeys(("group", "reconstruction", "propagation"), "")  # the recipe's own choices
SETTINGS: dict[str, dict[str, str]] = {
    "weights": {},
    **{name: OWN | {"pattern": name, "recipe": "admm"} for name in STRUCTURES},
    "blocks": OWN | {"pattern": "blocks", "recipe": "wanda"},  # experts repair no blocks
}
# A stage, its part, its settings, and whether DVC has removed the earlier output.
# The statistics are one run here: Gram matrices that were measured with the norms wait for their own run.
EVERY = [
    (stage.name, part, "weights")
    for stage in STAGES.values()
    for part in ([""] if stage.name == "calibrate" else stage.variants)
    if "recover" not in stage.run_name(part)  # it does nothing here: tests/test_recover.py
]
CRASHES_AT = [
    *((*one, gone) for one in EVERY for gone in (False, True)),
    *((stage, "", name, False) for name in list(SETTINGS)[1:] for stage in ("mask", "apply")),
    ("export", "", "weights", True),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "part", "settings", "gone"), CRASHES_AT)
def test_any_file_operation_is_a_crash_point_that_recovers(
    root: Path, killer: Killer, tmp_path: Path, name: str, part: str, settings: str, gone: bool, monkeypatch: Patch
):
    """A second kill in the recovery is a crash point of the next run. Those of a publication: the test above.

    Some of a stage's operations are tried; the next run leaves what a run without a kill leaves.
    """
    monkeypatch.setattr("wanda_dvc.pruning.units.MULTIPLES_OF_A_WIDTH", 4)  # torch multiplies experts by 16 bytes
    calibrated_study = shutil.copytree(root, tmp_path / "study", symlinks=True, ignore=shutil.ignore_patterns("tmp"))
    if SETTINGS[settings]:
        params = (calibrated_study / "params.yaml").read_text(encoding="utf-8")
        for setting, value in SETTINGS[settings].items():
            params = re.sub(f"^{setting}: .*", f"{setting}: {value}", params, flags=re.MULTILINE)
        (calibrated_study / "params.yaml").write_text(params, encoding="utf-8")
        for stage, variant in (("plan", ""), ("calibrate", "blocks"), ("mask", ""), ("apply", "")):
            run(stage, study=Study(calibrated_study), variant=variant)

    def body() -> None:
        if name == "export":
            export(study=Study(calibrated_study), experiment=None, target=calibrated_study / "exported")
        else:
            run(name, study=Study(calibrated_study), variant=part)

    def remove() -> None:
        for out in removed_before(name, part) if gone else []:
            path = calibrated_study / out
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    remove()
    assert killer.run(calibrated_study, -1, body)
    expected, points = tree(calibrated_study), killer.count
    assert points >= 3
    for at in sorted(random.Random(name).sample(range(points), min(points, CRASHES))):
        remove()
        assert not killer.run(calibrated_study, at, body), f"operation {at} did not happen"
        remove()
        body()
        assert tree(calibrated_study) == expected, f"killed at operation {at} of {points}"
        assert not leftovers(calibrated_study), f"killed at operation {at} of {points}"


def removed_before(name: str, part: str) -> list[str]:
    """What DVC removes before it runs a stage, or a user before an export is repeated."""
    if name == "export":
        return ["exported"]
    rows = [row for one, row in STAGES[name].variants.items() if part in (one, "")]
    found = [path for row in rows for path in (*row.outs, *row.metrics)]
    return [path.replace("{text}", "embedded") for path in found]


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.full)], ids=lambda number: number.name
)
def test_a_stopped_stage_says_what_is_kept_and_where_it_goes_on(tmp_path: Path, tiny: Path, number: signal.Signals):
    """Whatever it computes; the next run tells from where it goes on and ends with the same bytes."""
    write_params(tmp_path, tiny, calibration__windows=120)
    study = fetch(Study(tmp_path), "model", "calibration")
    code = "import sys; sys.argv[0] = 'wanda-dvc'; from wanda_dvc.cli import run; run()"
    words = [sys.executable, "-c", code, "-C", str(tmp_path), "calibrate"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    progress = ".dvc/tmp/wanda-dvc/*/progress.json"
    deadline = time.monotonic() + 120
    while not any('"finished": 1' in path.read_text() for path in tmp_path.glob(progress)):
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(number)
    _, said = process.communicate()
    assert process.returncode == 128 + number
    assert "calibrate-norms: stopped; finished work is kept" in said
    assert "Traceback" not in said
    again = wanda_dvc("calibrate", cwd=tmp_path)
    assert again.returncode == 0
    assert re.search(r"resuming after [1-3] of 4 blocks", again.stderr)
    resumed = tree(tmp_path)
    run("calibrate", study=study)
    assert tree(tmp_path) == resumed


@pytest.mark.slow
@pytest.mark.parametrize("limit", [10_000, pytest.param(15_000, marks=pytest.mark.full)])
def test_a_disk_that_is_full_is_told_and_nothing_is_lost(tmp_path: Path, tiny: Path, limit: int):
    """`ulimit -f`: a file may not grow beyond; the earlier output stays as it is."""
    write_params(tmp_path, tiny, calibration__windows=40)
    study = fetch(Study(tmp_path), "model", "calibration")
    run("calibrate", study=study)
    write_params(tmp_path, tiny, calibration__windows=41)
    before = tree(tmp_path)
    limited = "import sys, signal, resource; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limited += "sys.dont_write_bytecode = True; "  # Python 3.11 would keep half a file of it
    limited += f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    done = process("calibrate", cwd=tmp_path, first=limited)
    assert done.returncode == 2, done.stderr
    assert "disk full (File too large); free some space" in done.stderr
    assert tree(tmp_path) == before
    assert wanda_dvc("calibrate", cwd=tmp_path).returncode == 0


def test_a_stage_ends_soon_after_the_dvc_process_that_ran_it():
    """A killed DVC leaves its stage running, and that stage may be inside a multiplication."""
    stage = (
        "import os, time\n"
        "from wanda_dvc.stages.process import stoppable\n"
        "with stoppable('mask'):\n"
        "    print(os.getpid(), flush=True)\n"
        "    time.sleep(120)\n"
    )
    dvc = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {stage!r}])"
    words, environment = [sys.executable, "-c", dvc], os.environ | {"DVC_STAGE": "mask"}
    with subprocess.Popen(words, stdout=subprocess.PIPE, env=environment, text=True) as process:
        assert process.stdout
        pid = int(process.stdout.readline())
        process.kill()
    deadline = time.monotonic() + 20
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("closed", ["stats", "stats/norms", ".dvc/tmp/wanda-dvc"])
def test_without_permission_nothing_is_lost_and_the_next_run_ends_well(calibrated_study: Make, closed: str):
    """`calibrate` over what may not be written or read; then it may."""
    norms = {"calibration__statistics": "norms"}
    made = calibrated_study(**norms)
    root = made.root
    run("calibrate", study=made)
    expected = tree(root)
    run("calibrate", study=calibrated_study(calibration__windows=3, **norms))
    calibrated_study(**norms)
    before = tree(root)
    path = root / closed
    mode = path.stat().st_mode
    path.chmod(0o555)
    with pytest.raises(OSError, match="Permission denied") as raised:
        without_privilege(lambda: run("calibrate", study=made))
    path.chmod(mode)
    assert "Permission denied; change it" in explain(raised.value)[0]
    assert tree(root) == before
    again = wanda_dvc("calibrate", cwd=root)
    assert again.returncode == 0, again.stderr
    assert tree(root) == expected
    assert {one.suffix for one in made.work_root.iterdir()} == {".lock"}
