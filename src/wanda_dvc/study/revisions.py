"""An experiment, commit, branch or tag, read out of git and DVC's cache. The workspace is only read."""

import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from wanda_dvc.errors import UserError
from wanda_dvc.study.project import Project


@dataclass(frozen=True)
class Revision:
    """One state of a study's repository."""

    name: str
    files: Any  # DVC's file system of that state
    prefix: str  # of the project inside the repository

    @classmethod
    def open(cls, project: Project, name: str, *, otherwise: str) -> "Revision":
        """Open a revision. UserError for an unknown name; `otherwise` is the advice without a repository."""
        from dvc.api import DVCFileSystem
        from dvc.exceptions import NotDvcRepoError
        from dvc.repo import Repo
        from dvc.scm import NoSCM, SCMError

        try:
            root = Path(Repo.find_root(str(project.root)))
            files = DVCFileSystem(str(root), rev=name)
            if isinstance(files.repo.scm, NoSCM):
                raise UserError(f"{root}: no git repository, expected one that knows {name}; run `git init`")
        except NotDvcRepoError:
            raise UserError(f"{project.root}: no DVC repository, expected one that knows {name}; {otherwise}") from None
        except SCMError as error:
            if "mbiguous" in str(error):
                raise UserError(f"{name}: {error}, expected one; name its commit (`dvc exp show --sha`)") from None
            raise UserError(
                f"{name}: no experiment, commit, branch or tag of that name; `dvc exp list --all-commits` lists "
                "the experiments"
            ) from None
        below = project.root.resolve().relative_to(root.resolve()).as_posix()
        return cls(name, files, "" if below == "." else below)

    @classmethod
    def exists(cls, project: Project, name: str) -> bool:
        """Whether the study's repository has an experiment, commit, branch or tag of that name."""
        try:
            cls.open(project, name, otherwise="")
        except UserError:
            return False
        return True

    @cached_property
    def _cache(self) -> Any:
        return self.files.repo.cache.local

    def take(self, part: str, target: Project) -> list[str]:
        """Take one file or folder into `target`, laid out like a project. Return the files that are missing.

        Cached files become links into the cache, so that no space is taken.
        """
        from dvc.exceptions import DvcException
        from dvc_data.index import DataIndexDirError  # the cache lacks a folder's list of files

        lost = (OSError, DvcException, DataIndexDirError)
        inside = f"{self.prefix}/{part}" if self.prefix else part
        try:
            found = self.files.find(inside) or [inside]
        except lost:
            return [part]
        missing = []
        for path in found:
            within = Path(path.removeprefix("/")).relative_to(self.prefix or ".")
            if ".." in within.parts:  # a list of files not written by DVC
                missing.append(within.as_posix())
                continue
            place = target.root / within
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                md5 = self.files.info(path).get("md5")
                cached = Path(self._cache.oid_to_path(md5)) if md5 else None
                if cached and cached.is_file():
                    place.symlink_to(cached)
                else:
                    self.files.get_file(path, str(place))
            except lost:
                place.unlink(missing_ok=True)
                missing.append(within.as_posix())
        return missing

    def copy_all(self, part: str, target: Project) -> bool:
        """Take a file or a complete folder, or nothing. Return whether it was complete."""
        if self.take(part, target):
            shutil.rmtree(target.root / part, ignore_errors=True)
            return False
        return True
