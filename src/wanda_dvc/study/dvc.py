"""All uses of DVC: its command, and its Python interface, most of it private. No other module imports DVC."""

import io
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from wanda_dvc.errors import PROBLEMS, UserError, notice
from wanda_dvc.study.files import Json


def repository_roots(root: Path) -> tuple[Path, Path]:
    """Return the root of a study's DVC repository, and of its git repository. UserError without one of them."""
    dvc_root = next((folder for folder in (root, *root.parents) if (folder / ".dvc").is_dir()), None)
    if dvc_root is None:
        raise UserError(f"{root}: no DVC repository; `show`, and `export` without --rev, need none")
    top_level = git(root, "rev-parse", "--show-toplevel")
    if top_level.returncode:  # stages run by hand leave .dvc/
        raise UserError(f"{root}: no git repository; `wanda-dvc init DIR --from {quote(str(root))}` makes one")
    return dvc_root, Path(top_level.stdout.strip())


def prefix_of(root: Path, repository: Path) -> str:
    """Return the study's folder in a repository, such as `studies/a/`; "" for its root."""
    folder = root.resolve().relative_to(repository.resolve()).as_posix()
    return "" if folder == "." else f"{folder}/"


def list_revisions(root: Path) -> list[Json]:
    """Return the workspace, HEAD, branches, tags and commits with experiments, each with its experiments.

    The records are those of `dvc exp show --json`. Reading every commit takes minutes in a large repository.
    """
    repository_roots(root)  # UserError without one
    if git(root, "rev-parse", "--verify", "--quiet", "HEAD").returncode:
        raise UserError(f"{root}: git has no commit; `git add .`, then `git commit -m Begin`")
    command = [sys.executable, "-m", "dvc", "exp", "show", "--json", "--all-branches", "--all-tags"]
    for commit in ("HEAD", *sorted(_commits_with_experiments(root))):
        command += ["--rev", commit]
    shown = subprocess.run(command, cwd=root, capture_output=True, encoding="utf-8", check=False)
    if shown.returncode:
        problem = shown.stderr.strip().rpartition("\n")[2].removeprefix("ERROR: ")
        raise UserError(
            f"{root}: DVC can't list its experiments ({problem}); `dvc queue kill NAME` each killed one that `dvc "
            "queue status` calls running"
        )
    records: list[Json] = json.loads(shown.stdout)
    return records


def _commits_with_experiments(root: Path) -> set[str]:
    """Return the commits on which experiments were run or queued.

    Private to DVC are the names of its references and messages in git: `dvc exp list` and `dvc queue status` lack the
    commits of queued and failed experiments.
    """
    names = git(root, "for-each-ref", "--format=%(refname)", "refs/exps").stdout
    commits = {first + rest for first, rest in re.findall(r"^refs/exps/(\w{2})/(\w{38})/", names, flags=re.M)}
    for queue in ("refs/exps/celery/stash", "refs/exps/celery/failed"):
        messages = git(root, "log", "--walk-reflogs", "--format=%gs", queue, "--").stdout
        commits.update(re.findall(r"dvc-exp:\w+:(\w{40})", messages))
    return commits


def git(folder: Path, *arguments: str, check: bool = False) -> subprocess.CompletedProcess[str]:
    """Run git in a folder, in English, because its answer is read. UserError without git, or by `check` if it fails."""
    if shutil.which("git") is None:
        raise UserError("git: not found on PATH; install it, because DVC keeps experiments in git")
    done = subprocess.run(
        ["git", *arguments], cwd=folder, env=os.environ | {"LC_ALL": "C"}, capture_output=True, encoding="utf-8",
        check=False,
    )  # fmt: skip
    if check and done.returncode:
        raise UserError(f"{folder}: `git {' '.join(arguments)}` failed: {' '.join(done.stderr.split())}")
    return done


@dataclass(frozen=True)
class Revision:
    """An experiment, commit, branch or tag, read out of git and DVC's cache. The workspace is only read."""

    commit: str
    files: Any  # DVC's file system of that state
    prefix: str  # of the study inside the repository

    @classmethod
    def open(cls, root: Path, name: str) -> "Revision":
        """Open a revision. UserError for an unknown name, or without a repository."""
        import pygit2
        from dvc.api import DVCFileSystem
        from dvc.scm import SCMError

        # Private: pygit2's own reader waits for ever if git lacks a blob.
        vars(pygit2)["BlobIO"] = lambda blob, **_: io.BytesIO(blob.data)
        dvc_root, git_root = repository_roots(root)
        try:
            files = DVCFileSystem(str(dvc_root), rev=name, subrepos=True)  # its paths begin at git's root
            commit = str(files.repo.get_rev())  # an unknown name fails here, and not at the first file
            return cls(commit, files, prefix_of(root, git_root))
        except SCMError:
            problem = "no experiment, commit, branch or tag of that name, or several"
            raise UserError(f"{name}: {problem}; `dvc exp list --all-commits` lists the experiments") from None

    def take(self, name: str, target: Path) -> list[str]:
        """Take one file or folder into `target`, laid out like a study. Return the files that are missing.

        Cached files become links into the cache, so that no space is taken.
        """
        from dvc.exceptions import DvcException
        from dvc_data.index import DataIndexDirError  # the cache lacks a folder's list of files
        from scmrepo.exceptions import SCMError  # git lacks an object

        missing_errors = (OSError, DvcException, DataIndexDirError, SCMError)
        try:
            paths = self.files.find(self.prefix + name) or [self.prefix + name]
        except missing_errors:
            return [name]
        missing = []
        for path in paths:
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
            except missing_errors:
                place.unlink(missing_ok=True)
                missing.append(within.as_posix())
        return missing


def repro(root: Path, stages: Sequence[str], *, shown: bool = False) -> None:
    """Run stages of a study and those before them, as far as settings or inputs have changed; print their messages.

    With `shown` the stages write to this process's stderr; in a terminal they draw progress bars.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    failed = f"{root}: `dvc repro {' '.join(stages)}` failed; the messages above give the reason"
    with tempfile.TemporaryDirectory(prefix="wanda-dvc-") as folder:
        file = Path(folder, "problems")
        with subprocess.Popen(
            [sys.executable, "-m", "dvc", "repro", *stages], cwd=root,
            env=os.environ | {"PATH": path, PROBLEMS: str(file)},
            process_group=0,  # `stoppable` ends it too
            stdout=subprocess.DEVNULL,  # DVC's messages about stages and git; the stages' are on stderr
            stderr=None if shown else subprocess.PIPE, encoding="utf-8", errors="replace",
        ) as process:  # fmt: skip
            try:
                for line in map(str.rstrip, process.stderr or ()):
                    notice(line)
                process.wait()
            except BaseException:  # Ctrl-C reaches this process alone
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()  # so that the study is not locked
                raise
        if process.returncode:
            problems = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
            raise UserError(*([failed] if shown else problems or [failed]))


def checkout(root: Path) -> None:
    """Place the cached outputs that a study's `dvc.lock` names, as far as the cache has them."""
    subprocess.run([sys.executable, "-m", "dvc", "checkout", "--quiet"], cwd=root, capture_output=True, check=False)


def share_cache(root: Path, other: Path) -> None:
    """Let a study use the cache of another one, if that is not in the other's `.dvc`."""
    from dvc.exceptions import NotDvcRepoError
    from dvc.repo import Repo

    try:
        with Repo(str(other)) as repo:
            cache = Path(repo.cache.local_cache_dir).resolve()
    except NotDvcRepoError:
        return
    if cache != (other / ".dvc/cache").resolve():
        command = [sys.executable, "-m", "dvc", "cache", "dir", "--local", str(cache)]
        subprocess.run(command, cwd=root, capture_output=True, check=True)


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


def link_file(source: str | Path, target: str | Path) -> None:
    """Hard-link a file that never changes, or copy it to another file system."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)
