"""What `wanda-dvc prune` is asked for: its options as settings, checked before torch is imported."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from wanda_dvc.catalog import STRUCTURES
from wanda_dvc.commands import check_target
from wanda_dvc.errors import UserError
from wanda_dvc.params import FILE, Params, Settings, nested
from wanda_dvc.plan import UNSTRUCTURED
from wanda_dvc.reading import check_place
from wanda_dvc.study.artifact import digest
from wanda_dvc.study.folder import Study
from wanda_dvc.study.scaffold import new_params, source_settings

FALLBACK = "wanda"  # needs the least memory and disk
TOKEN_UNITS = {"": 1, "k": 1_000, "M": 1_000_000}


@dataclass(frozen=True, kw_only=True)
class PruneRequest:
    """The checked options of one `wanda-dvc prune`."""

    settings: Settings  # by dotted name, for a new study
    params: Params  # these settings, checked
    root: Path  # the study of the model and its calibration text, in the user's cache folder
    target: Path  # the new directory
    recipe: str | None  # as given; None: the recommended one
    evaluate: bool


def check_request(
    *,
    model: str | None,
    target: Path | None,
    recipe: str | None = None,
    sparsity: float | None = None,
    pattern: str = UNSTRUCTURED,
    text: str | None = None,
    recover: str | None = None,
    evaluate: bool = True,
) -> PruneRequest:
    """Check the options of `wanda-dvc prune`, and that it may write its target and the cache folder."""
    if sparsity is None:
        sparsity = 0.2 if pattern in STRUCTURES else 0.5
    settings = source_settings(model, text) | {"recipe": recipe or FALLBACK, "sparsity": sparsity, "pattern": pattern}
    settings["recovery.tokens"] = _parse_tokens(recover) if recover else 0
    try:
        params, _ = new_params(nested(settings))
    except UserError as error:
        raise UserError(*(problem.removeprefix(f"{FILE}: ") for problem in error.problems)) from None
    source = params.model.removeprefix("package:").partition("==")[0].partition("@")[0]
    name = Path(source).name
    key = digest({"model": params.model, "text": params.calibration.text.filled})[:8]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wanda-dvc"  # keeps statistics
    root = check_place(cache, "set XDG_CACHE_HOME to a writable folder") / f"{name}-{key}"
    if target is None:
        amount = None if ":" in pattern else f"{sparsity:g}"
        kind = None if pattern == UNSTRUCTURED else pattern.replace(":", "-")
        target = Path("-".join(filter(None, [name, recipe, kind, amount, recover])))
    target = check_target(Study(root), target)
    return PruneRequest(settings=settings, params=params, root=root, target=target, recipe=recipe, evaluate=evaluate)


def _parse_tokens(text: str) -> int:
    digits = re.fullmatch(r"([0-9]+)([kM]?)", text)
    if digits is None:
        raise UserError(f"--recover: found {text}, expected a number of tokens, such as 200k or 1M")
    return int(digits[1]) * TOKEN_UNITS[digits[2]]
