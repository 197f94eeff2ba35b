"""The client of the Hub: resolves a revision to a commit, then fetches files or rows of the commit.

A branch is resolved once. Every later request names the commit.
"""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wanda_dvc.errors import UserError, notice
from wanda_dvc.reading import name_of

NOUNS = {"model": "model", "dataset": "data set"}
LOCAL = {"model": "directory", "dataset": "file or a runtime.mirror"}  # what to name instead of a Hub id


@dataclass(frozen=True)
class Repository:
    """One commit of a repository on the Hub."""

    kind: str  # model or dataset
    name: str
    commit: str
    files: tuple[str, ...]
    where: str  # its setting
    gated: bool = False  # or private
    license: str | None = None  # the Hub's name of the licence, from the model card

    def fetch(self, target: Path, *files: str) -> None:
        """Fetch some of its files into `target`; resume partial files of an interrupted run."""
        from huggingface_hub import snapshot_download

        if not sys.stderr.isatty():  # on a terminal the client shows progress bars
            notice(f"{self.name} at {self.commit[:12]}: fetching {', '.join(files)}")
        with _user_errors(self.where, self.kind, self.name, self.commit):
            snapshot_download(
                self.name, repo_type=self.kind, revision=self.commit, local_dir=target, allow_patterns=list(files)
            )
        if missing := [file for file in files if not (target / file).is_file()]:
            raise UserError(f"{self.where}: {self.name} has no {', '.join(missing)} at {self.commit}")


def resolve(kind: str, name: str, revision: str | None, where: str) -> Repository:
    """Resolve a revision to a commit on the Hub. UserError if it does not exist or this account may not read it."""
    from huggingface_hub import HfApi

    api = HfApi()
    with _user_errors(where, kind, name, revision):
        ask = api.model_info if kind == "model" else api.dataset_info
        info: Any = ask(name, revision=revision)
        if info.gated:  # the list of files is public even so
            api.auth_check(name, repo_type=kind)
    files = tuple(file.rfilename for file in info.siblings or ())
    return Repository(
        kind, name, str(info.sha), files, where, bool(info.gated or info.private), license_of(info.card_data)
    )


def license_of(card: Any) -> str | None:
    """Return the licence in a repository's metadata, in the Hub's spelling."""
    named = card.get("license") if card else None
    return named if isinstance(named, str) else None


def gated_names(*origins: object) -> tuple[str, ...]:
    """Return the names of the gated repositories among some origins."""
    return tuple(sorted({one.name for one in origins if isinstance(one, Repository) and one.gated}))


def load_rows(repository: Repository, config: str | None, split: str, **options: Any) -> Any:
    """Load one split of a data set with `datasets`. UserError, with the existing names, for an unknown split."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    where, name = repository.where, repository.name
    with _user_errors(where, "dataset", name, repository.commit):
        try:
            return load_dataset(name, config, split=split, revision=repository.commit, **options)
        except ConnectionError:
            raise
        except (ValueError, KeyError, RuntimeError, DatasetsError, FileNotFoundError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            asked = f"config {config}, split {split}" if config else f"split {split}"
            raise UserError(f"{where}: {name}, {asked}: {reason}") from error


def column_of(rows: Any, column: str, where: str) -> list[str]:
    """Return one column of a data set's rows. UserError if it is missing or is not text."""
    if column not in rows.column_names:
        raise UserError(f"{where}: found {', '.join(rows.column_names)}, expected a column `{column}`")
    texts = list(rows[column])
    if odd := next((name_of(text) for text in texts if not isinstance(text, str)), None):
        raise UserError(f"{where}: column `{column}` holds {odd}, expected text")
    return texts


# --- errors of the client ---


@contextlib.contextmanager
def _user_errors(where: str, kind: str, name: str, revision: str | None) -> Iterator[None]:
    """Convert errors of the Hub's client into a UserError. Other errors, such as a full disk, pass through."""
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        HFValidationError,
        HTTPError,  # of the HTTP library under this version of the client
        LocalEntryNotFoundError,
    )

    try:
        yield
    except (OSError, HTTPError, HFValidationError) as raised:
        # For several files the client raises LocalEntryNotFoundError, with the reason as its cause.
        error = raised.__cause__ if isinstance(raised, LocalEntryNotFoundError) and raised.__cause__ else raised
        if (problem := _problem(error, kind, name, revision)) is None:
            raise
        raise UserError(f"{where}: {problem}") from error


def _problem(error: BaseException, kind: str, name: str, revision: str | None) -> str | None:
    """Return the Hub's refusal, or the reason for a missing answer; None for an error without the Hub."""
    from huggingface_hub import errors, get_token

    noun, problem = NOUNS[kind], None
    match error:
        case errors.GatedRepoError():
            account = "the account that is logged in has no access" if get_token() else "no account is logged in"
            login = (
                "or log in with another account (`hf auth login`)"
                if get_token()
                else "then log in with `hf auth login`"
            )
            problem = f"{name} is gated, and {account}; accept its conditions on its page on the Hub, {name}, {login}"
        case errors.RevisionNotFoundError():
            problem = f"{name} has no revision {revision}; name a commit, a tag or a branch of it"
        case errors.RepositoryNotFoundError() if get_token():
            problem = f"found no {noun} {name} that the account that is logged in may read; correct its id"
        case errors.RepositoryNotFoundError():
            problem = f"found no public {noun} {name}; correct its id or, if it is private, log in with `hf auth login`"
        case errors.HfHubHTTPError() if error.response.status_code == 401:
            problem = f"{name}: the Hub does not accept the stored login; log in with `hf auth login`"
        case errors.HfHubHTTPError():
            said = error.server_message or error.response.reason_phrase
            problem = f"{name}: the Hub answered {error.response.status_code} ({said}); try again later"
        case errors.OfflineModeIsEnabled():
            problem = f"{name} is on the Hub, and HF_HUB_OFFLINE is set; unset it, or name a local {LOCAL[kind]}"
        case errors.HFValidationError():
            problem = f"got {name}, expected the id of a {noun} on the Hub, ORG/NAME"
        case errors.HTTPError() | ConnectionError() | TimeoutError() | errors.LocalEntryNotFoundError():  # type: ignore[attr-defined]
            problem = (
                f"{name} is on the Hub, and the Hub cannot be reached ({type(error).__name__}); connect this machine "
                f"and run again (finished files are kept), or name a local {LOCAL[kind]}"
            )
    return problem
