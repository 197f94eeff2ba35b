"""All uses of DVC: its command, and its Python interface, most of it private. No other module imports DVC."""

import contextlib
import io
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from wanda_dvc.errors import UserError, notice

# Lines of `dvc repro` that say nothing of a stage; the last is about the locks of a run that was killed.
DVCS_OWN = (
    "Stage ", "Updating lock", "Generating lock", "To track", "To enable", "\tgit add", "\tdvc config", "Use `dvc",
    "WARNING: Process '",
)  # fmt: skip


@contextlib.contextmanager
def repository(root: Path) -> Iterator[Any]:
    """Open the study's DVC repository. UserError without one, or without git."""
    import pygit2
    from dvc.exceptions import NotDvcRepoError
    from dvc.repo import Repo
    from dvc.scm import NoSCM, SCMError

    # pygit2's own reader waits for ever if a blob is missing, as when the checkout of a queued experiment goes.
    vars(pygit2)["BlobIO"] = lambda blob, **_: io.BytesIO(blob.data)
    try:
        repo = Repo(str(root))
    except NotDvcRepoError:
        raise UserError(f"{root}: no DVC repository; `show`, and `export` without --rev, need none") from None
    except SCMError:  # stages run by hand leave .dvc/
        repo = None
    if repo is None or isinstance(repo.scm, NoSCM):
        raise UserError(f"{root}: no git repository; `wanda-dvc init DIR --from {quote(str(root))}` makes one")
    with repo:
        yield repo


def below(root: Path, repository: str) -> str:
    """Return the study's folder in a repository, such as `studies/a/`; "" for its root."""
    folder = root.resolve().relative_to(Path(repository).resolve()).as_posix()
    return "" if folder == "." else f"{folder}/"


def states(root: Path, repo: Any) -> list[Any]:
    """Return the workspace, HEAD, branches, tags and commits with experiments, each with its experiments.

    Other commits are left out: reading every commit takes minutes in a large repository. UserError if DVC cannot.
    """
    from dvc.exceptions import DvcException
    from dvc.repo.experiments.utils import exp_refs

    if repo.scm.no_commits:
        raise UserError(f"{root}: git has no commit; `git add .`, then `git commit -m Begin`")
    try:
        celery = repo.experiments.celery_queue
        waiting = [*celery.iter_queued(), *celery.iter_active(), *(done.entry for done in celery.iter_failed())]
        waiting += repo.experiments.tempdir_queue.iter_active()
        bases = {ref.baseline_sha for ref in exp_refs(repo.scm)} | {entry.baseline_rev for entry in waiting}
        return repo.experiments.show(revs=["HEAD", *sorted(bases)], all_branches=True, all_tags=True)
    except (DvcException, OSError) as error:  # OSError: of files of an experiment that never started
        raise UserError(
            f"{root}: DVC can't list its experiments ({error}); look at `dvc exp show`. One that was killed may still "
            "count as running: `dvc queue status` names it, `dvc queue kill NAME` clears it"
        ) from None


def text_at(root: Path, repo: Any, rev: str, name: str) -> str:
    """Return the text of a study's file in a commit. FileNotFoundError if the commit lacks it."""
    return repo.scm.get_fs(rev).read_text(below(root, repo.scm.root_dir) + name, encoding="utf-8")


@dataclass(frozen=True)
class Revision:
    """An experiment, commit, branch or tag, read out of git and DVC's cache. The workspace is only read."""

    commit: str
    files: Any  # DVC's file system of that state
    prefix: str  # of the project inside the repository

    @classmethod
    def open(cls, root: Path, name: str) -> "Revision":
        """Open a revision. UserError for an unknown name, or without a repository."""
        from dvc.api import DVCFileSystem
        from dvc.scm import SCMError

        with repository(root) as repo:
            around, prefix = repo.root_dir, below(root, repo.scm.root_dir)
        try:
            files = DVCFileSystem(around, rev=name or " ", subrepos=True)  # at git's root; "" would be the workspace
            commit = str(files.repo.get_rev())  # an unknown name fails here, and not at the first file
            return cls(commit, files, prefix)
        except SCMError as error:
            raise UserError(
                f"{name}: no experiment, commit, branch or tag of that name, or several ({error}); `dvc exp list "
                "--all-commits` lists the experiments, and `dvc exp show --sha` their commits"
            ) from None

    def take(self, part: str, target: Path) -> list[str]:
        """Take one file or folder into `target`, laid out like a project. Return the files that are missing.

        Cached files become links into the cache, so that no space is taken.
        """
        from dvc.exceptions import DvcException
        from dvc_data.index import DataIndexDirError  # the cache lacks a folder's list of files
        from scmrepo.exceptions import SCMError  # git lacks an object

        lost = (OSError, DvcException, DataIndexDirError, SCMError)
        try:
            found = self.files.find(self.prefix + part) or [self.prefix + part]
        except lost:
            return [part]
        missing = []
        for path in found:
            within = Path(path.removeprefix("/")).relative_to(self.prefix or ".")
            if ".." in within.parts:  # a list of files not written by DVC
                missing.append(within.as_posix())
                continue
            place = target / within
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                info = self.files.info(path)
                cached = Path(info["repo"].cache.local.oid_to_path(info["md5"])) if info.get("md5") else None
                if cached and cached.is_file():
                    place.symlink_to(cached)
                else:
                    self.files.get_file(path, str(place))
            except lost:
                place.unlink(missing_ok=True)
                missing.append(within.as_posix())
        return missing


def repro(root: Path, stages: Sequence[str], *, shown: bool = False) -> None:
    """Run stages of a study and those before them, as far as settings or inputs have changed; print their messages.

    With `shown` the stages write to this process's stderr; in a terminal they draw progress bars. UserError if a stage
    fails; without `shown` with its messages.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    said: list[str] = []  # by the current stage
    with subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro", *stages], cwd=root, env=os.environ | {"PATH": path},
        stdout=subprocess.PIPE, stderr=None if shown else subprocess.STDOUT, encoding="utf-8", errors="replace",
    ) as process:  # fmt: skip
        assert process.stdout
        for line in map(str.rstrip, process.stdout):
            if line.startswith("> "):
                said.clear()
            elif line and not line.startswith(DVCS_OWN):
                said.append(line)
                notice(line)
    if process.returncode:
        own = [line for line in said if not line.startswith("ERROR:")]
        failed = f"{root}: `dvc repro {' '.join(stages)}` failed{'; the messages above give the reason' * shown}"
        raise UserError(*((not shown and (own or said)) or [failed]))


def checkout(root: Path) -> None:
    """Place the cached outputs that a study's `dvc.lock` names, as far as the cache has them."""
    subprocess.run([sys.executable, "-m", "dvc", "checkout", "--quiet"], cwd=root, capture_output=True, check=False)


def init_repository(folder: Path, *, inside: bool) -> None:
    """Make a DVC repository; with `inside`, below the root of a git repository."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    logging.getLogger("dvc").setLevel(logging.WARNING)  # without DVC's message about a new repository
    try:
        Repo.init(str(folder), subdir=inside).close()
    except DvcException as error:
        raise UserError(f"{folder}: DVC cannot make a repository here: {' '.join(str(error).split())}") from None


def copy_file(source: str | Path, target: str | Path) -> None:
    """Copy a file to a new place: a reflink where the file system supports it, else its bytes.

    A reflink shares the blocks of the original until either file changes, so it takes no space. A hard link would
    expose the user's own file: DVC makes cached files read-only, and users overwrite their files in place.
    """
    from dvc_objects.fs import system  # its import takes a fifth of a second

    try:
        system.reflink(source, target)
    except OSError:
        shutil.copyfile(source, target)
    else:
        Path(target).chmod(Path(target).stat().st_mode | 0o200)  # macOS clones the permissions too


def link_file(source: str | Path, target: str | Path) -> None:
    """Hard-link a file that never changes, or copy it to another file system."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)
