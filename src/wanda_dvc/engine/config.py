"""A model's config.json, checked before transformers builds anything from it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from wanda_dvc.catalog import STRUCTURES, Dtype
from wanda_dvc.errors import SettingError, UserError
from wanda_dvc.reading import name_of, read_object

MOST_LAYERS = 10_000  # transformers makes lists and modules of this length before any check of ours can run
MOST = 2**27  # of any size; a vocabulary has about 2**18
LAYERS = STRUCTURES["blocks"].fields
SIZES = (
    *LAYERS, "hidden_size", "n_embd", "d_model", "intermediate_size", "n_inner", "ffn_dim", "num_attention_heads",
    "n_head", "n_heads", "num_heads", "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings",
    "n_positions", "max_seq_len",
)  # fmt: skip
DTYPES = get_args(Dtype)  # in which a model may run
TODO = "correct it, or copy the file again"


def read_config(place: Path) -> Any:
    """Read a config.json, or the config.json in a directory. No remote code runs.

    Raises:
        UserError: transformers refuses it, or a size in it is not a valid size.
    """
    from transformers import AutoConfig

    path = place if place.is_file() else place / "config.json"
    stored = read_object(path)
    if problems := [f"{path}: {problem}; {TODO}" for problem in _problems(stored)]:
        raise UserError(*problems)
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # each model's class raises exceptions of its own choice
        raise UserError(
            f"{path}: {reason(error)}, expected a configuration that transformers accepts; {TODO}"
        ) from error


def _problems(stored: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield a problem for each impossible size: *key: found, expected*."""
    for name in SIZES:
        value = stored.get(name)
        sizes = value if isinstance(value, list) else [value] if value is not None else []
        most = MOST_LAYERS if name in LAYERS else MOST
        if not all(type(size) is int and 0 < size <= most for size in sizes):
            yield f"{prefix}{name}: found {_short(value)}, expected a whole number from 1 to {most:,}"
    if isinstance(stored.get("text_config"), dict):
        yield from _problems(stored["text_config"], "text_config.")


def text_key(config: Any) -> str | None:
    """Return the key of a configuration's text part; None if all of it describes the text model."""
    text = config.get_text_config()
    return None if text is config else next(key for key in config.to_dict() if getattr(config, key, None) is text)


def dtype_of(model: Path, wanted: str) -> str:
    """Return the dtype in which a model runs: the wanted one, or for `auto` that of its checkpoint."""
    if wanted != "auto":
        return wanted
    stored = read_object(model / "config.json")
    for config in (stored, stored.get("text_config")):
        for name in ("dtype", "torch_dtype"):
            found = str(config.get(name)).removeprefix("torch.") if isinstance(config, dict) else ""
            if found in DTYPES:
                return found
    return DTYPES[0]


def positions_of(config: Any) -> int | None:
    """Return the maximum tokens of a text, if the configuration has a limit."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions if isinstance(positions, int) else None


def check_length(place: Path, length: int, setting: str) -> None:
    """Raise SettingError if windows are longer than the model's number of positions."""
    positions = positions_of(read_config(place))
    if positions is not None and length > positions:
        raise SettingError(
            f"{setting}: got {length}, expected at most {positions}, the positions of the model in "
            f"{place}; set {setting}={positions} or less"
        )


def reason(error: BaseException) -> str:
    """Return a library's error as one short line, with its name if the text alone is too short."""
    text = " ".join(str(error).split())[:300]
    return text if len(text.split()) > 2 else f"{type(error).__name__} {text}".strip()


def _short(value: object) -> str:
    return f"{name_of(value)} ({str(value)[:40]})" if isinstance(value, (dict, list, str, bool)) else f"{value!s:.40}"
