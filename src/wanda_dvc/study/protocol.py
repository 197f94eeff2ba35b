"""The protocol of a figure, and the one function that says whether two figures may be compared."""

from pathlib import Path

from wanda_dvc.study.artifact import digest, files_digest
from wanda_dvc.study.files import Json

# Keys that may differ: the measured model, the reference that it is compared with, and the text: its tokens count.
FREE = ("model", "reference", "wanda_dvc", "text")
TOKENIZER = ("tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json")  # its files


def identity(version: int, made: Json, model: Path) -> Json:
    """Return the part of a protocol on the stage's version and the measured model, with its provenance and folder."""
    dense = made.get("model", made)["sha256"]  # a model made from the dense one names it
    tokenizer = files_digest(model, TOKENIZER)
    return {"version": version, "model": digest(made), "dense": dense, "tokenizer_sha256": tokenizer}


def differing(one: Json, other: Json) -> str | None:
    """Return the first key that makes two results incomparable; None if they may be compared.

    Builds of one version of a library, such as `+cpu` and `+cu128` of torch, count as equal.
    """
    first, second = _comparable_part(one), _comparable_part(other)
    return next((key for key in first | second if first.get(key) != second.get(key)), None)


def _comparable_part(protocol: Json) -> Json:
    libraries = {name: version.partition("+")[0] for name, version in protocol.get("libraries", {}).items()}
    return {key: value for key, value in protocol.items() if key not in FREE} | {"libraries": libraries}
