"""What `wanda-dvc prune` is asked for: its options as settings, checked before torch is imported."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from wanda_dvc.catalog import HUB_ID, STRUCTURES
from wanda_dvc.commands import check_target
from wanda_dvc.errors import UserError
from wanda_dvc.params import FILE, TEXT_SUFFIXES, Params, Settings, flatten, nested, parse_yaml
from wanda_dvc.plan import SMALLER, UNSTRUCTURED
from wanda_dvc.reading import check_place
from wanda_dvc.study.artifact import digest
from wanda_dvc.study.folder import Study
from wanda_dvc.study.scaffold import absolute_source, new_params, source_settings

TOKEN_UNITS = {"": 1, "k": 10**3, "M": 10**6}
PARAMETER_UNITS = TOKEN_UNITS | {"B": 10**9}
BYTE_UNITS = {"MB": 10**6, "GB": 10**9}


@dataclass(frozen=True, kw_only=True)
class PruneRequest:
    """The checked options of one `wanda-dvc prune`."""

    settings: Settings  # by dotted name, for a new study
    params: Params  # these settings, checked
    root: Path  # the study of the model and its calibration text, in the user's cache folder
    target: Path  # the new directory
    evaluate: bool
    # Of the pruned model, at most: bytes, "stored", or "parameters", as ModelSizes has them; None: as the settings say.
    limit: tuple[Literal["stored", "parameters"], int] | None = None


def check_request(
    *,
    model: str | None = None,
    target: Path | None = None,
    recipe: str | None = None,
    sparsity: str | float | None = None,
    pattern: str = UNSTRUCTURED,
    size: str | float | None = None,
    parameters: str | int | None = None,
    text: str | Sequence[str] = (),
    eval_text: str | Sequence[str] = (),
    recover: str | int | None = None,
    evaluate: bool = True,
    changes: Settings | None = None,
) -> PruneRequest:
    """Check the options of `wanda-dvc prune`, and that it may write its target and the cache folder.

    `changes` are settings by dotted name, which replace those of the options.
    """
    changes = changes or {}
    is_on_hub = model is not None and HUB_ID.fullmatch(model) is not None and not os.path.lexists(model)
    settings = source_settings(model, text or (["c4"] if is_on_hub else [])) | {"pattern": pattern}
    if recipe is not None:
        settings["recipe"] = recipe
    if sparsity is not None:
        settings["sparsity"] = _parse_sparsity(sparsity)
    alone = sparsity is None and pattern in (UNSTRUCTURED, SMALLER) and not {"sparsity", "pattern"} & {*changes}
    of_size, limit = _parse_size(None if size is None else str(size), parameters, alone=alone)
    settings |= of_size
    settings["recovery.tokens"] = _parse_number("recover", recover, TOKEN_UNITS) if recover else 0
    if eval_text:
        settings["perplexity.texts"] = _perplexity_texts([eval_text] if isinstance(eval_text, str) else eval_text)
    settings.setdefault("sparsity", 0.2 if str(changes.get("pattern", settings["pattern"])) in STRUCTURES else 0.5)
    for name, value in changes.items():
        for section in [name[:index] for index, letter in enumerate(name) if letter == "."]:
            if not isinstance(settings.get(section, {}), dict):  # such as a list of texts
                del settings[section]
        settings[name] = value
    try:
        params, _ = new_params(nested(settings))
    except UserError as error:
        raise UserError(*(problem.removeprefix(f"{FILE}: ") for problem in error.problems)) from None
    name = _name(params.model)
    key = digest({"model": params.model, "text": [text.filled for text in params.calibration.text]})[:8]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wanda-dvc"  # keeps statistics
    root = check_place(cache, "set XDG_CACHE_HOME to a writable folder") / f"{name}-{key}"
    if target is None:
        amount = None if ":" in params.pattern else str(size or parameters or f"{params.sparsity:g}")
        kind = None if params.pattern == UNSTRUCTURED else params.pattern.replace(":", "-")
        trained = str(recover or params.recovery.tokens) if params.recovery.tokens else None
        target = Path("-".join(filter(None, [name, recipe, kind, amount, trained])))
    target = check_target(Study(root), target)
    return PruneRequest(settings=settings, params=params, root=root, target=target, evaluate=evaluate, limit=limit)


def parse_changes(assignments: Iterable[str]) -> Settings:
    """Parse settings such as `calibration.windows=128`, by dotted name; values are YAML."""
    changes: Settings = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not name or not equals:
            raise UserError(f"--set: found {assignment}, expected KEY=VALUE, such as calibration.windows=128")
        changes[name] = parse_yaml(value, f"--set {name}", "correct the value")
    return dict(flatten(changes))


def _name(model: str) -> str:
    """Return the name of a model, without a version or a revision."""
    if not Path(model).is_absolute():
        model = model.removeprefix("package:").partition("==")[0].partition("@")[0]
    return Path(model).name


def _perplexity_texts(names: Sequence[str]) -> Settings:
    """Return the texts of a new study and further ones, by the name of the text, its file or its data set."""
    texts: Settings = new_params()[0].perplexity.model_dump(exclude_unset=True)["texts"]
    for name in names:
        source = absolute_source(name, is_text=True)
        file = Path(source if Path(source).is_absolute() else re.split("[:@]", source)[0])
        stem = file.stem if file.suffix in TEXT_SUFFIXES else file.name
        label = re.sub(r"[^A-Za-z0-9_-]", "-", stem)[:50]
        if not label[:1].isalpha():
            label = f"text-{label}"
        while label in texts and texts[label]["source"] != source:
            label += "-2"
        texts[label] = {"source": source}
    return texts


def _parse_sparsity(text: str | float, option: str = "sparsity") -> float:
    percent = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?%", text) if isinstance(text, str) else None
    try:
        return float(Fraction(percent[1]) / 100) if percent else float(text)
    except (TypeError, ValueError):
        raise UserError(f"--{option}: found {text}, expected a fraction or a percentage, such as 0.5 or 50%") from None


def _parse_size(size: str | None, parameters: str | int | None, *, alone: bool) -> tuple[Settings, Any]:
    """Return settings, and the limit of a size that becomes a sparsity once the model is known."""
    if size is None and parameters is None:
        return {}, None
    if not alone or (size and parameters):
        raise UserError("--size, --parameters: found with one another, a sparsity or a pattern, expected one alone")
    if size is None:
        return {"pattern": SMALLER}, ("parameters", _parse_number("parameters", parameters, PARAMETER_UNITS))
    if size.endswith("%"):
        return {"pattern": SMALLER, "sparsity": round(1 - _parse_sparsity(size, "size"), 6)}, None
    return {"pattern": SMALLER}, ("stored", _parse_number("size", size, BYTE_UNITS))


def _parse_number(option: str, text: str | int | None, units: Mapping[str, int]) -> int:
    number = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]*)", str(text))
    if number is None or number[2] not in units:
        examples = ["80%"] * (option == "size") + [f"20{unit}" for unit in units]
        raise UserError(f"--{option}: found {text}, expected one such as {', '.join(examples)}")
    return int(Fraction(number[1]) * units[number[2]])
