"""The Hub: which commit a name means, and the files or rows of it that are wanted.

Only `download` calls this. A branch is resolved once, and what comes after asks for the commit.
"""

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from wanda_dvc.errors import UserError

# What a Hugging Face directory needs beside its weights to load and to be passed on.
MODEL_FILES = (
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*",
    "merges.txt", "chat_template*", "LICENSE*", "NOTICE*",
)  # fmt: skip
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.*")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Repository:
    """One commit of a repository on the Hub."""

    kind: str  # model or dataset
    name: str
    commit: str
    files: tuple[str, ...]
    where: str  # the setting that asks for it

    def fetch(self, target: Path, *files: str) -> None:
        """Some of its files, into `target`; what a killed run has left there is gone on from."""
        from huggingface_hub import snapshot_download

        if not sys.stderr.isatty():  # on a terminal the client's own bars tell
            print(f"{self.name} at {self.commit[:12]}: fetching {', '.join(files)}", file=sys.stderr, flush=True)
        with _problems(self.where, self.kind, self.name, self.commit):
            snapshot_download(
                self.name, repo_type=self.kind, revision=self.commit, local_dir=target, allow_patterns=list(files)
            )
        if missing := [file for file in files if not (target / file).is_file()]:
            raise UserError(f"{self.where}: {self.name} has no {', '.join(missing)} at {self.commit}")


def resolve(kind: str, name: str, revision: str | None, where: str) -> Repository:
    """Ask the Hub once which commit a revision is. UserError where it isn't there or may not be read."""
    from huggingface_hub import HfApi

    api = HfApi()
    with _problems(where, kind, name, revision):
        ask = api.model_info if kind == "model" else api.dataset_info
        info: Any = ask(name, revision=revision)
        if info.gated:  # anyone may look at its list of files
            api.auth_check(name, repo_type=kind)
    return Repository(kind, name, str(info.sha), tuple(file.rfilename for file in info.siblings or ()), where)


@contextlib.contextmanager
def _problems(where: str, kind: str, name: str, revision: str | None) -> Iterator[None]:
    """What the Hub's client raises, as lines for the user."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,  # of the HTTP library that this version of the client is built on
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    noun = {"model": "model", "dataset": "data set"}[kind]
    try:
        yield
    except (OSError, HTTPError, HFValidationError) as raised:
        # Of several files the client says only that they couldn't be had, and keeps the reason as the cause.
        error = raised.__cause__ if isinstance(raised, LocalEntryNotFoundError) and raised.__cause__ else raised
        match error:
            case GatedRepoError() if get_token() is None:
                problem = (
                    f"{name} is gated, and no one is logged in; accept its conditions on its page on the Hub, {name}, "
                    "then log in with `hf auth login`"
                )
            case GatedRepoError():
                problem = (
                    f"{name} is gated, and the account that is logged in has no access; accept its conditions on its "
                    f"page on the Hub, {name}, or log in as someone who has with `hf auth login`"
                )
            case RevisionNotFoundError():
                problem = f"{name} has no revision {revision}; name a commit, a tag or a branch that it has"
            case RepositoryNotFoundError() if get_token() is None:
                problem = (
                    f"found no {noun} {name} that everyone may read; correct its id or, if it is private, log in "
                    "with `hf auth login`"
                )
            case RepositoryNotFoundError():
                problem = f"found no {noun} {name} that the account that is logged in may read; correct its id"
            case HfHubHTTPError() if error.response.status_code == 401:
                problem = f"{name}: the Hub does not accept the login stored here; log in with `hf auth login`"
            case HfHubHTTPError():
                said = error.server_message or error.response.reason_phrase
                problem = f"{name}: the Hub answered {error.response.status_code} ({said}); try again later"
            case OfflineModeIsEnabled():
                problem = f"{name} is on the Hub, and HF_HUB_OFFLINE forbids asking it; unset it, or name a local " + (
                    "directory" if kind == "model" else "file or a runtime.mirror"
                )
            case HTTPError() | ConnectionError() | TimeoutError() | LocalEntryNotFoundError():
                problem = (
                    f"{name} is on the Hub, which can't be reached from here ({type(error).__name__}); connect this "
                    "machine (another run goes on from what is fetched), or name a local "
                    + ("directory" if kind == "model" else "file or a runtime.mirror")
                )
            case HFValidationError():
                problem = f"got {name}, expected the id of a {noun} on the Hub, ORG/NAME"
            case _:
                raise  # a full disk is no matter of the Hub
        raise UserError(f"{where}: {problem}") from error


# --- models ---


def fetch_model(repository: Repository, target: Path) -> list[Path]:
    """The files of a model that are needed, and no second copy of its weights. All that can be known from small
    files is known before a large one is asked for."""
    from wanda_dvc.engine.checkpoint import INDEX, SINGLE

    name, where = repository.name, repository.where
    here = [file for file in repository.files if "/" not in file]
    if "config.json" not in here:
        raise UserError(f"{where}: {name} has no config.json, expected a Hugging Face model")
    repository.fetch(target, "config.json")
    check_decoder(target, f"{where}: {name}")
    if not {SINGLE, INDEX} & set(here):
        pickles = [file for file in here if _any(file, PICKLES)]
        weights = [file for file in here if _any(file, ("*.safetensors", "*.gguf"))]
        if pickles and not weights:
            raise UserError(
                f"{where}: {name} has its weights only as pickles ({', '.join(pickles)}), which nothing here opens; "
                "name a revision or another repository that holds safetensors"
            )
        found = ", ".join(weights or here)
        raise UserError(f"{where}: {name}: found {found}, expected {SINGLE} or {INDEX}; name another repository")
    check_tokenizer(here, f"{where}: {name}")
    shards = [SINGLE]
    if INDEX in here:
        repository.fetch(target, INDEX)
        shards = sorted(set(json.loads((target / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        if missing := [shard for shard in shards if shard not in here]:
            raise UserError(f"{where}: {name}: {INDEX} names {', '.join(missing)}, which is not there")
        shards.append(INDEX)
    wanted = [file for file in here if _any(file, MODEL_FILES)] + shards
    repository.fetch(target, *wanted)
    return [target / file for file in wanted]


def check_tokenizer(names: list[str], where: str) -> None:
    """UserError if a model's files have no tokenizer among them."""
    if not any(_any(name, TOKENIZERS) for name in names):
        raise UserError(f"{where}: no tokenizer (tokenizer.json, tokenizer.model or vocab.*); copy it there")


def check_decoder(folder: Path, where: str) -> None:
    """UserError if config.json is not that of a causal decoder that transformers knows, with plain weights."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    try:
        stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = stored["model_type"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{where}: config.json: no model_type, expected that of a causal decoder") from None
    own = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    own_names = own if isinstance(own, (tuple, list)) else (own,)
    if own is None and "auto_map" in stored:
        raise UserError(
            f"{where}: config.json: {kind} comes with code of its own, which nothing here runs; "
            "name a model that transformers knows"
        )
    if own is not None:
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{where}: config.json: {str(error).splitlines()[0]}") from error
        # BERT and its like can be told to be decoders; what they are stored as says whether they were.
        encoder = getattr(config, "is_decoder", None) is False and not set(stored.get("architectures") or ()) & set(
            own_names
        )
        if config.is_encoder_decoder or encoder:
            own = None
    if own is None:
        raise UserError(f"{where}: config.json: found {kind}, expected a causal decoder, such as llama or qwen3")
    if quantized := stored.get("quantization_config"):
        how = quantized.get("quant_method", "some way") if isinstance(quantized, dict) else "some way"
        raise UserError(
            f"{where}: config.json: weights quantized by {how}, expected plain ones; name the model it was made from"
        )


def _any(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


# --- data sets ---


def load_rows(repository: Repository, config: str | None, split: str, **options: Any) -> Any:
    """One split of a data set, as `datasets` has it. UserError naming what exists, where that doesn't."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    where, name = repository.where, repository.name
    with _problems(where, "dataset", name, repository.commit):
        try:
            return load_dataset(name, config, split=split, revision=repository.commit, **options)
        except ConnectionError:
            raise
        except (ValueError, KeyError, RuntimeError, DatasetsError, FileNotFoundError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            asked = f"config {config}, split {split}" if config else f"split {split}"
            raise UserError(f"{where}: {name}, {asked}: {reason}") from error


def column_of(rows: Any, column: str, where: str) -> list[str]:
    """One column of a data set's rows, which must be text."""
    if column not in rows.column_names:
        raise UserError(f"{where}: found {', '.join(rows.column_names)}, expected a column `{column}`")
    texts = list(rows[column])
    if odd := next((text for text in texts if not isinstance(text, str)), None):
        raise UserError(f"{where}: column `{column}` holds {type(odd).__name__}, expected text")
    return texts
