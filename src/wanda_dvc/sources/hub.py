"""The Hub, and a mirror with its layout. A revision is resolved once, to a commit, whose files or rows are fetched."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wanda_dvc.errors import UserError, explain, notice
from wanda_dvc.reading import check_file
from wanda_dvc.study.files import Json


@dataclass(frozen=True)
class Repository:
    """One commit of a repository on the Hub."""

    kind: str  # model or dataset
    name: str
    commit: str
    files: tuple[str, ...]
    where: str  # its setting
    license: str | None = None  # the Hub's name of the licence, from the model card

    @property
    def top_level(self) -> list[str]:
        """The names of the files outside folders."""
        return [name for name in self.files if "/" not in name]

    def fetch(self, *files: str) -> Path:
        """Fetch some of its files into the Hub's own cache, unless it has them. Return their folder there.

        The cache shares files with transformers, and resumes partial files of an interrupted run.
        """
        from huggingface_hub import snapshot_download

        notice(f"{self.name} at {self.commit[:12]}: fetching {', '.join(files)}")
        with _user_errors(self.where, self.name):
            folder = Path(
                snapshot_download(self.name, repo_type=self.kind, revision=self.commit, allow_patterns=list(files))
            )
        missing = [file for file in files if not (folder / file).is_file()]
        if missing:
            problem = f"{self.name} has no {', '.join(missing)} at {self.commit}"
            raise UserError(f"{self.where}: {problem}; name another revision")
        return folder


def resolve(kind: str, name: str, revision: str | None, where: str) -> Repository:
    """Resolve a revision to a commit on the Hub. UserError if it does not exist or this account may not read it."""
    from huggingface_hub import HfApi

    api = HfApi()
    with _user_errors(where, name if revision is None else f"{name} at {revision}"):
        info: Any = api.repo_info(name, repo_type=kind, revision=revision)
        if info.gated:  # the list of files is public even so
            api.auth_check(name, repo_type=kind)
    files = tuple(file.rfilename for file in info.siblings or ())
    license_name = getattr(info.card_data, "license", None)
    return Repository(kind, name, str(info.sha), files, where, license_name if isinstance(license_name, str) else None)


def load_rows(repository: Repository, config: str | None, split: str, **options: Any) -> Iterable[Json]:
    """Load one split of a data set with `datasets`. UserError, with the existing names, for an unknown split."""
    from datasets import load_dataset

    with _user_errors(repository.where, f"{repository.name}, config {config}, split {split}"):
        return load_dataset(repository.name, config, split=split, revision=repository.commit, **options)


def in_mirror(mirror: str | None, *parts: str) -> Path | None:
    """Return a file in the mirror; None without a mirror. UserError if the mirror lacks the file."""
    if mirror is None:
        return None
    path = Path(mirror, *parts)
    if ".." in path.parts or not path.is_relative_to(mirror):
        raise UserError(f"runtime.mirror: got {'/'.join(parts)}, expected a place inside {mirror}; correct the setting")
    todo = "put it there, .gz as the Hub has it, .jsonl with one row a line, set the text's source or split"
    check_file(path, f"{todo}, or set runtime.mirror to null")
    return path


@contextlib.contextmanager
def _user_errors(where: str, name: str) -> Iterator[None]:
    """Convert errors of the Hub's client and of `datasets` into a UserError. Explained ones, as a full disk, pass."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        yield
    except Exception as raised:  # the libraries raise exceptions of many classes
        cause = raised.__cause__
        for error in (raised, cause):
            if isinstance(error, Exception) and explain(error):
                raise error from None
        # For several files the client raises LocalEntryNotFoundError, with the reason as its cause.
        error = cause if isinstance(raised, LocalEntryNotFoundError) and cause else raised
        message = getattr(error, "server_message", None) or str(error).strip().partition("\n")[0]
        raise UserError(
            f"{where}: {name}: {type(error).__name__}: {message:.200}; correct its id or revision, accept its "
            "conditions on the Hub and log in (`hf auth login`), or unset HF_HUB_OFFLINE and connect this machine "
            "(finished files are kept), or name a directory, a file or a runtime.mirror"
        ) from raised
