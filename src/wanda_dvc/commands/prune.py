"""`wanda-dvc prune`: a model becomes a pruned model, by the stages of a study in the user's cache folder.

A model and a calibration text have one study. Its statistics serve each further recipe, sparsity and pattern.
"""

import contextlib
import os
import shlex
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from wanda_dvc.catalog import EMBEDDED, STRUCTURES
from wanda_dvc.commands.export import check_target, export
from wanda_dvc.engine.checkpoint import positions_of, read_config
from wanda_dvc.engine.sizes import Sizes
from wanda_dvc.errors import UserError, notice
from wanda_dvc.params import Params, nested
from wanda_dvc.plan import TOKENS_A_FEATURE, UNSTRUCTURED
from wanda_dvc.reading import check_place
from wanda_dvc.results.compare import cells, headings
from wanda_dvc.results.experiments import workspace
from wanda_dvc.results.markup import DASH, table
from wanda_dvc.results.show import notes, title
from wanda_dvc.stages import times
from wanda_dvc.stages.needs import computes_twice, free, gigabytes, need
from wanda_dvc.stages.runs import reproduce
from wanda_dvc.study.artifact import digest, locked
from wanda_dvc.study.files import json_text
from wanda_dvc.study.folder import Study
from wanda_dvc.study.scaffold import PARAMS, changed, renew, source_settings

FALLBACK = "wanda"  # needs the least memory and disk
# The runs of a model; all others are the dense model's.
RUNS = {"pruned": ("mask", "apply", "perplexity-pruned"), "recovered": ("recover", "perplexity-recovered")}
GENERATE = 'from transformers import pipeline; print(pipeline("text-generation", {})("Once upon a time"))'


def prune(
    *,
    model: str | None,
    target: Path | None,
    recipe: str | None = None,
    sparsity: float | None = None,
    pattern: str = UNSTRUCTURED,
    text: str | None = None,
    recover: str | None = None,
    evaluate: bool = True,
) -> str:
    """Prune a model into a new directory; return a table of the dense and the pruned model, and the next commands.

    UserError, before any work, for a wrong setting, a target that holds something, or a read-only cache folder.
    """
    if sparsity is None:
        sparsity = 0.2 if pattern in STRUCTURES else 0.5
    settings = source_settings(model, text) | {"recipe": recipe or FALLBACK, "sparsity": sparsity, "pattern": pattern}
    settings["recovery.tokens"] = tokens = _tokens(recover or "0")
    params = _checked(settings)
    name = Path(params.model.removeprefix("package:").partition("==")[0].partition("@")[0]).name
    kind, amount = pattern.replace(":", "-") * (pattern != UNSTRUCTURED), "" if ":" in pattern else f"{sparsity:g}"
    own_study = _studies() / f"{name}-{digest({'model': params.model, 'text': params.calibration.text.filled})[:8]}"
    study = Study(own_study)
    target = check_target(study, target or Path("-".join(filter(None, [name, recipe, kind, amount, recover]))))
    began = time.time()
    with locked(own_study, f"waiting for another `wanda-dvc prune` of this model, in {own_study} …"):
        check_target(study, target)  # the other one may have written it
        (own_study / ".dvc/tmp/rwlock").unlink(missing_ok=True)  # of a stopped run; DVC would warn of it
        renew(own_study, nested(settings))
        reproduce(own_study, "download", "model", shown=True)
        longest = positions_of(read_config(study.model("dense"))) or params.calibration.length
        for name in ("calibration", "perplexity"):
            settings[f"{name}.length"] = min(longest, getattr(params, name).length)
        if tokens:  # refused before any work
            computes_twice(study.with_params(params))
        wanted = TOKENS_A_FEATURE * Sizes(study.model("dense")).widest  # solvers need them
        settings["calibration.windows"] = max(params.calibration.windows, -(-wanted // settings["calibration.length"]))
        if recipe is None:
            units = dict.fromkeys(STRUCTURES, "wanda-refit") | {"experts": FALLBACK}
            best = units.get(pattern, "fisher")  # docs/methods.md
            settings["recipe"] = _recommended(study, _checked(settings | {"recipe": best}))
        renew(own_study, nested(settings))
        reproduce(own_study, "perplexity" if evaluate else "recover" if tokens else "apply", shown=True)
        export(study=Study(own_study), experiment=None, target=target, made=True)
        return _said(Study(own_study), target, recipe, evaluate=evaluate, began=began)


def _checked(settings: dict[str, Any]) -> Params:
    """Check settings by dotted names. UserError, with the options' names, if one is wrong."""
    try:
        return changed(PARAMS.read_text(encoding="utf-8"), nested(settings))[0]
    except UserError as error:
        raise UserError(*(problem.removeprefix("params.yaml: ") for problem in error.problems)) from None


def _tokens(text: str) -> int:
    """Return a number of tokens. UserError for another text than 500000, 500k or 1M."""
    number, unit = (text[:-1], text[-1]) if text[-1:] in ("k", "M") else (text, "")
    if not number.isdecimal():
        raise UserError(f"--recover: found {text}, expected a number of tokens, such as 200k or 1M")
    return int(number) * {"": 1, "k": 1_000, "M": 1_000_000}[unit]


def _studies() -> Path:
    """Return the folder of the studies. UserError if it is not writable."""
    try:
        return check_place(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wanda-dvc")
    except (UserError, OSError) as error:
        raise UserError(f"{error}: the cache folder keeps statistics; set XDG_CACHE_HOME to a writable one") from None


def _recommended(study: Study, params: Params) -> str:
    """Return the recommended recipe, which `params` has, or the fallback if memory or disk is too small for it."""
    own_study, lacks = study.with_params(params), list[str]()
    with contextlib.suppress(UserError, ValueError, KeyError, OSError):  # an unusual model: the stages report it
        needs = [need(own_study, stage) for stage in ("calibrate", "mask", "apply", "apply")]  # and the target
        wanted = max(one.memory - one.mapped for one in needs), sum(one.disk for one in needs)
        for most, (what, left) in zip(wanted, free(own_study).items(), strict=True):
            lacks += [f"{gigabytes(most)} of {what}, {gigabytes(left)} free"] if most > left else []
    if lacks:
        notice(f"recipe: {FALLBACK}; the recommended {params.recipe} needs {' and '.join(lacks)}")
        return FALLBACK
    notice(f"recipe: {params.recipe}, recommended for pattern {params.pattern}; `--recipe` sets another")
    return params.recipe


def _said(study: Study, target: Path, recipe: str | None, *, evaluate: bool, began: float) -> str:
    found = workspace(study)
    models = found.models
    columns = headings(list(models.values())) if evaluate else {}
    rows = [list(row) for row in zip(columns, *(cells(one, columns) for one in models.values()), strict=True)]
    sizes = [sum(path.stat().st_size for path in study.model(name).iterdir()) / 1e6 for name in models]
    seconds = defaultdict[str, float](float)
    for run, content in times(study).items():
        if study.time(run).stat().st_mtime >= began:  # an earlier time may be of other settings
            seconds[next((name for name, runs in RUNS.items() if run.startswith(runs)), "dense")] += content["seconds"]
    rows.append(["size, MB", *(f"{size:,.1f}" for size in sizes)])
    rows.append(["seconds", *(f"{seconds[name]:,.0f}" if name in seconds else DASH for name in models)])
    text = found.params.calibration.text.source
    again = [found.params.model, *(["--text", text] if text != EMBEDDED else [])]
    less, more = "0.5", "0.7"
    if found.params.pattern in STRUCTURES:
        again += ["--pattern", found.params.pattern]
        less, more = "0.1", "0.3"
    again += ["--recipe", recipe] if recipe else []
    again += ["--recover", str(tokens)] if (tokens := found.params.recovery.tokens) else []
    change = "pattern" if ":" in found.params.pattern else "sparsity"
    other = "4:8" if found.params.pattern == "2:4" else "2:4"
    again += [f"--{change}", other if change == "pattern" else more if found.params.sparsity < float(more) else less]
    commands = {
        f"wanda-dvc prune {shlex.join(again)}": f"another {change}, with the same statistics",
        f"python -c {shlex.quote(GENERATE.format(json_text(os.path.relpath(target))))}": "generate text",
        f"wanda-dvc init my-study --from {shlex.quote(str(study.root))}": "a study of your own, to compare several",
    }
    parts = [
        title(found, named=False),
        table(["", *models], rows),
        "Seconds: of the stages that ran now.",
        *(note for note in notes({found.name: found.params}, models) if evaluate and note.startswith("Perplexity on")),
        *(found.notes if evaluate else []),  # else the evaluation is another model's
        f"{target}: the {list(models)[-1]} model, with a model card. Next:",
        "\n".join(f"  {command}   # {about}" for command, about in commands.items()),
        f"The study: {study.root}",
    ]
    return "\n\n".join(parts)
