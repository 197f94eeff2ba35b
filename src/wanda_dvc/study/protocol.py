"""The protocol of a figure, and the one function that says whether two figures may be compared."""

from pathlib import Path

from wanda_dvc.study.artifact import digest, files_digest
from wanda_dvc.study.files import Json

# Keys in which comparable figures may differ: texts count by their tokens, which are another key.
MAY_DIFFER = ("model", "reference", "wanda_dvc", "text")
TOKENIZER = ("tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json")  # its files


def identity(version: int, provenance: Json, model: Path) -> Json:
    """Return the entries of a protocol about the stage's version and the measured model: its provenance and folder."""
    dense = provenance.get("model", provenance)["sha256"]  # a model made from the dense one names it
    tokenizer = files_digest(model, TOKENIZER)
    return {"version": version, "model": digest(provenance), "dense": dense, "tokenizer_sha256": tokenizer}


def first_difference(protocol: Json, expected: Json) -> str | None:
    """Return the first key that makes two results incomparable; None if they may be compared.

    Builds of one version of a library, such as `+cpu` and `+cu128` of torch, count as equal.
    """
    first, second = _comparable_entries(protocol), _comparable_entries(expected)
    return next((key for key in first | second if first.get(key) != second.get(key)), None)


def _comparable_entries(protocol: Json) -> Json:
    entries = {key: value for key, value in protocol.items() if key not in MAY_DIFFER}
    versions = protocol.get("libraries", {})
    entries["libraries"] = {name: version.partition("+")[0] for name, version in versions.items()}
    return entries
