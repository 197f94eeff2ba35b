"""The protocol of a result: all inputs that determine it. Two results may be compared if their protocols say so."""

from wanda_dvc.study.files import Json

# Keys that may differ: the measured model, the reference that it is compared with, and the text: its tokens count.
FREE = ("model", "reference", "wanda_dvc", "text")


def dense_of(model: str, provenance: Json) -> str:
    """Return the SHA-256 of the dense model, from its own provenance or from that of a model pruned from it."""
    sha256: str = provenance["sha256"] if model == "dense" else provenance["model"]["sha256"]
    return sha256


def differing(one: Json, other: Json) -> str | None:
    """Return the first key that makes two results incomparable; None if they may be compared.

    Builds of one version of a library, such as `+cpu` and `+cu128` of torch, count as equal.
    """
    first, second = _comparable_part(one), _comparable_part(other)
    return next((key for key in first | second if first.get(key) != second.get(key)), None)


def comparable(one: Json | None, other: Json | None) -> bool:
    """Whether two results may be compared, by their protocols; unknown protocols may not."""
    return one is not None and other is not None and differing(one, other) is None


def _comparable_part(protocol: Json) -> Json:
    libraries = {name: version.partition("+")[0] for name, version in protocol.get("libraries", {}).items()}
    return {key: value for key, value in protocol.items() if key not in FREE} | {"libraries": libraries}
