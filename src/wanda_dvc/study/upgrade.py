"""Upgrade an older study to this version: its pipeline, plots, ignore files and settings.

An unedited file is replaced: `template/known.json` has the digest of each file that any version shipped. An edited
file is merged by git with the nearest shipped file as the base: this version's, or one in `template/earlier/`.
`MOVED` and `REMOVED` map the settings of earlier versions.
"""

import difflib
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from wanda_dvc.catalog import NAMED_TEXTS, RECIPES, TEXTS
from wanda_dvc.errors import UserError
from wanda_dvc.params import CalibrationText, Params, Text, parse_yaml, settings
from wanda_dvc.plan import CHOICES
from wanda_dvc.reading import name_of, read_text
from wanda_dvc.study.files import Json, write_text
from wanda_dvc.study.presets import OF_TEXTS, with_settings
from wanda_dvc.study.project import Project
from wanda_dvc.study.provenance import digest
from wanda_dvc.study.ran import LOCK, read_lock
from wanda_dvc.study.scaffold import FILES, PIPELINE, PROMPTS, TEMPLATE, git, quiet
from wanda_dvc.study.settings import Settings, flatten, nested

PARAMS = "params.yaml"
OWN = ("README.md", ".dvc/config")  # the user's from the first day
SHARED = ("        - ${item.out}\n", "        - data/perplexity/${key}\n")
PER_TEXT = "  download-perplexity:\n"  # newer than the first versions
SHARING = re.compile(r"^        - \$\{item\.out\}(:.*(?:\n {10,}\S.*)*)", re.MULTILINE)  # an edit of the first one
CONFLICT = re.compile(r"^<{7} mine\n(.*?)^\|{7} base\n(.*?)^={7}\n(.*?)^>{7} new\n", re.MULTILINE | re.DOTALL)
RESTORE = "restore it from git"
TEXT = ("source", "config", "revision", "split", "column", "join")
ONE_TEXT = "perplexity.text."  # before a study could have several


def upgrade(*, project: Project, dry_run: bool = False) -> str:
    """Upgrade a study's files to this version. Return the diff and the stages that will rerun, each with its reason.

    With `dry_run` nothing is written. UserError, before any write, if an edit conflicts with this version.
    """
    old = {place: _path(project, place) for place in FILES if place not in OWN}
    texts = {place: read_text(path, RESTORE) if path.is_file() else "" for place, path in old.items()}
    notes: list[str] = []
    new = {place: _brought(place, text, notes) for place, text in texts.items()}
    changed = [place for place, text in new.items() if text != texts[place]]
    stages = _stages(project, new)
    if not changed:
        return "\n".join([*notes, f"{project.root}: up to date with this wanda-dvc."])
    lock = read_lock(project.root)
    carried = _carry(stages, lock, _settings_of(texts[PARAMS] or new[PARAMS]))
    said = list(_reruns(stages, carried, nested(_settings_of(new[PARAMS])))) if lock else ["Nothing has run yet."]
    if not dry_run:
        for place in changed:
            write_text(old[place].resolve(), new[place])  # a link stays a link
        _write_lock(project, lock, {name: stage for name, stage in carried.items() if name in stages})
    difference = "".join(
        line
        for place in changed
        for line in difflib.unified_diff(
            texts[place].splitlines(keepends=True), new[place].splitlines(keepends=True), f"a/{place}", f"b/{place}"
        )
    )
    done = "Would change" if dry_run else "Changed"
    return "\n".join([difference, *notes, f"{done}: {', '.join(changed)}.", *said])


def _path(project: Project, place: str) -> Path:
    """Return the path of a file of the scaffold. `.dvc/` may be in a parent folder. UserError without `.dvc/`."""
    from dvc.exceptions import NotDvcRepoError
    from dvc.repo import Repo

    try:
        return Path(Repo.find_root(str(project.root)) if place.startswith(".dvc/") else project.root) / place
    except NotDvcRepoError:
        raise UserError(f"{project.root}: no DVC repository, expected a study in one; run `dvc init`") from None


# --- files ---


def _brought(place: str, old: str, notes: list[str]) -> str:
    """Return the text of a file of the scaffold in this version. UserError if an edit conflicts with it."""
    new = FILES[place].read_text(encoding="utf-8")
    if place == PROMPTS and old:  # the user's
        return old
    if place == PARAMS and old:
        return _migrated(old, new, notes)
    if place.endswith("ignore"):
        return "\n".join([*old.splitlines(), *(line for line in new.splitlines() if line not in old.splitlines()), ""])
    shipped = json.loads((TEMPLATE / "known.json").read_text(encoding="utf-8"))  # digests of all versions' files
    if old not in ("", new) and digest(old) not in shipped:
        merged = CONFLICT.sub(_only_comments, _merge(place, old, new))
        if conflicts := [*_conflicts(place, old, merged)]:
            raise UserError(*conflicts)
        new = merged
        notes.append(f"{place}: {'kept as you have edited it' if new == old else 'your edits are kept'}.")
    if place == PIPELINE and PER_TEXT not in old and (edited := SHARING.search(new)):  # what was private stays private
        new = new.replace(SHARED[1], SHARED[1].replace("\n", f"{edited[1]}\n"))
    if place == PIPELINE and "push: false" in old and SHARED[0] in new:  # likewise
        for out in SHARED:
            new = new.replace(out, out.replace("\n", ": { push: false }\n"))
        notes.append(f"{place}: download: `push: false` stays, so `dvc pull` needs --allow-missing (docs/sharing.md).")
    return new


def _merge(place: str, mine: str, new: str) -> str:
    """Merge an edited file with this version's. `CONFLICT` finds the lines that git cannot merge."""

    def likeness(text: str) -> float:
        return difflib.SequenceMatcher(None, _contents(text), _contents(mine), autojunk=False).ratio()

    file, versions = FILES[place], (TEMPLATE / "earlier").iterdir()
    shipped = [file, *(earlier for version in versions if (earlier := version / file.name).is_file())]
    base = max((one.read_text(encoding="utf-8") for one in shipped), key=likeness)
    with tempfile.TemporaryDirectory() as scratch:
        for name, text in (("mine", mine), ("base", base), ("new", new)):
            write_text(Path(scratch, name), text)
        words = ("merge-file", "--stdout", "--quiet", "--diff3", "mine", "base", "new")
        return git(Path(scratch), *words).stdout


def _only_comments(conflict: re.Match[str]) -> str:
    """Resolve a conflict in which the user added only comments; leave any other."""
    edit, base, _ = conflict.groups()
    return _with_comments(conflict) if _contents(edit) == _contents(base) else conflict[0]


def _with_comments(conflict: re.Match[str]) -> str:
    """Return a conflict's new lines, with the user's comments, each above the line of its setting or item."""
    edit, base, new = conflict.groups()
    ours = [comment for _, comment in map(_split, base.splitlines()) if comment]
    lines, waiting, at = new.splitlines(keepends=True), list[str](), 0
    for line in edit.splitlines():
        content, comment = _split(line)
        if shipped := next((one for one in ours if comment.startswith(f"{one} ")), ""):
            comment = f"# {comment.removeprefix(shipped).lstrip(' #')}"
        earlier = any(comment in one for one in ours) or difflib.get_close_matches(comment, ours, n=1)
        if comment and not earlier:  # an earlier version of our comments is replaced
            waiting.append(f"{line[: len(line) - len(line.lstrip())]}{comment}\n")
        names = [_split(other)[0].partition(":")[0] for other in lines[at:]]
        if (name := content.partition(":")[0]) and name in names:
            at += names.index(name)
            lines[at:at] = waiting
            at, waiting = at + len(waiting) + 1, []
    lines[at:at] = waiting
    return "".join(lines)


def _contents(text: str) -> list[str]:
    """Return the lines without comments."""
    return [content for content, _ in map(_split, text.splitlines()) if content]


def _split(line: str) -> tuple[str, str]:
    """Return a line of YAML before its comment, and the comment."""
    starts = (found.start() for found in re.finditer(r"(?<!\S)#", line))
    start = next((start for start in starts if line.count('"', 0, start) % 2 == 0), len(line))
    return line[:start].rstrip(), line[start:].rstrip()


def _conflicts(place: str, mine: str, merged: str) -> Iterator[str]:
    """Yield a problem for each edit that git cannot merge, with its lines in the user's file."""
    at = 0
    for edit, _, ours in CONFLICT.findall(merged):
        at = max(at, mine.find(edit, at))
        first, last = (mine.count("\n", 0, end) for end in (at, at + len(edit)))
        where = f"lines {first + 1} to {last}" if edit else "removed lines"
        yield (
            f"{place}: {where}: edited, and this version needs\n{ours}"
            "Undo the edit, run this again, and make the edit in the new text."
        )


# --- settings ---


def _text(part: str, kind: type[Text]) -> Callable[..., Settings]:
    def move(*values: Any) -> Settings:
        source, config, revision, *others = values
        if source not in TEXTS:
            source += (f":{config}" if config else "") + (f"@{revision}" if revision else "")
            revision = None
        own = vars(kind(source=source).chosen)
        new = {key: None if value == own[key] else value for key, value in zip(TEXT[3:], others, strict=True)}
        new |= {"source": source, "revision": revision} | ({"column": None} if new["column"] == "text" else {})
        return {f"{part}.text.{key}": x for key, x in new.items() if x is not None or key in kind.model_fields}

    return move


def _statistics(gram: str, fisher: int, fisher_gram: str) -> Settings:
    by_gradients = fisher > 0 or fisher_gram != "none"
    return {"calibration.statistics": "fisher" if by_gradients else "norms" if gram == "none" else "gram"}


def _recipe(*values: str) -> Settings:
    """Return the recipe with the fewest explicit choices; of several, one of the same method, then the default."""
    asked = dict(zip(CHOICES, values, strict=True))
    found: list[Settings] = []
    for recipe in sorted(RECIPES.values(), key=lambda recipe: recipe.name != Params.model_fields["recipe"].default):
        own = vars(recipe) | {"group": recipe.group_with.get(asked["method"], recipe.group)}
        explicit = {name: None if value == own[name] else value for name, value in asked.items()}
        found.append({"recipe": recipe.name} | explicit)
    return min(found, key=lambda new: (sum(value is not None for value in new.values()), new["method"] is not None))


# Settings of earlier versions, and the function from their values to the settings of this version. A name of an earlier
# version in the result has a value that this version cannot express.
MOVED: Mapping[tuple[str, ...], Callable[..., Settings]] = {
    tuple(f"calibration.text.{name}" for name in TEXT): _text("calibration", CalibrationText),
    tuple(f"perplexity.text.{name}" for name in TEXT): _text("perplexity", Text),
    ("calibration.gram", "calibration.fisher", "calibration.fisher_gram"): _statistics,
    CHOICES: _recipe,
    ("perplexity.windows", "perplexity.rest"): lambda windows, rest: {
        "perplexity.windows": "all" if windows is None and rest == "kept" else windows
    },
    ("tasks.source",): lambda source: {"tasks.source": "embedded" if source == "samples" else source},
    ("zero_shot.limit",): lambda limit: {"zero_shot.limit": limit},
    ("runtime.workers",): lambda workers: {"runtime.ray": workers},
}
# Removed settings, with the values that match this version's fixed behaviour.
REMOVED: Mapping[str, tuple[Any, ...]] = {
    "calibration.gram": ("none", "float16"),
    "calibration.fisher": (0, 8),
    "calibration.fisher_gram": ("none", "float16"),
    "correction": (0.5,),
    "training.epochs": (3,),
    "training.rate": (0.02, 0.0003),  # the latter was an earlier default, in another unit
    "training.seed": (0,),
    "runtime.threads": (None,),
    "runtime.memory_gb": (None,),
    "runtime.compile": ("off",),
}


def migrate(given: Settings, study: Settings) -> Settings:
    """Return settings in this version's form; `study` is all settings of their study.

    This version's settings stay. A name of an earlier version remains if its value cannot be expressed.
    """
    if "recipe" in study:
        return _by_name(given, study)
    full = _earlier() | study | given
    moved = [names for names in MOVED if given.keys() & names]
    new = {
        name: value
        for name, value in given.items()
        if name not in {*REMOVED, *(old for names in moved for old in names)}
    }
    for names in moved:
        try:
            new |= MOVED[names](*(full[name] for name in names))
        except (AttributeError, TypeError, ValueError):  # a value of another type than any version wrote
            found = ", ".join(f"{name}: {full[name]!r:.40}" for name in names if name in given)
            raise UserError(f"{PARAMS}: found {found}, expected values of an earlier version; {RESTORE}") from None
    new |= {name: given[name] for name in REMOVED if name in given and given[name] not in REMOVED[name]}
    return _by_name(new, full)


def _by_name(settings: Settings, study: Settings) -> Settings:
    """Return settings with the one text of the perplexity as a text with a name: a named text's own, else `text`."""
    source = settings.get(f"{ONE_TEXT}source", study.get(f"{ONE_TEXT}source"))
    name = f"perplexity.texts.{source if source in NAMED_TEXTS else 'text'}."
    renamed = {f"{ONE_TEXT}{field}": f"{name}{field}" for field in Text.model_fields}
    return {renamed.get(key, key): value for key, value in settings.items()}


@cache
def _earlier() -> Settings:
    """Return the settings of a new study of the last version before recipes."""
    return _settings_of((TEMPLATE / "earlier/2026-11" / PARAMS).read_text(encoding="utf-8"))


def _migrated(old: str, shipped: str, notes: list[str]) -> str:
    """Return the text of params.yaml with this version's settings. The user's values stay, and comments if possible."""
    given, earlier = _settings_of(old), {*REMOVED, *(name for names in MOVED for name in names)}
    own = migrate(given, given)
    default = _settings_of(shipped)
    if any(name.startswith(OF_TEXTS) for name in own):
        default = {name: value for name, value in default.items() if not name.startswith(OF_TEXTS)}
    new = default | own
    for name in sorted(new.keys() & earlier - dict(settings()).keys()):
        notes.append(f"{PARAMS}: {name}: {new.pop(name)!r} is dropped: this version has no such setting.")
    if new == given:
        return old
    text, _ = with_settings(shipped, new)
    merged = CONFLICT.sub(_with_comments, _merge(PARAMS, old, text))
    return merged if _settings_of(merged) == new else text


def _settings_of(text: str) -> Settings:
    """Return the settings in the text of a params.yaml. UserError if it is not valid."""
    content = parse_yaml(text, PARAMS, RESTORE)
    if not isinstance(content, dict):
        raise UserError(f"{PARAMS}: got {name_of(content)}, expected a mapping of settings; {RESTORE}")
    return dict(flatten(content))


# --- earlier runs ---


def _carry(stages: dict[str, Json], lock: Json, study: Settings) -> Json:
    """Return the lock with this version's names of settings.

    New settings of a stage get their default: at the same version, the stage's results are the same.
    """
    carried: Json = json.loads(json.dumps(lock))
    default = _settings_of(FILES[PARAMS].read_text(encoding="utf-8"))
    for name, stage in stages.items():
        if name in carried and stage["params"]:
            params = carried[name].setdefault("params", {})
            ran = migrate(dict(flatten(params.get(PARAMS, {}))), study)
            if not ran.keys() - default.keys():  # else this version cannot repeat the run
                params[PARAMS] = {key: _at(nested(default | ran), key) for key in sorted(stage["params"])}
    return carried


def _write_lock(project: Project, old: Json, new: Json) -> None:
    """Write changed settings into the lock, and remove stages that dvc.yaml no longer has: DVC keeps those."""
    from dvc.utils.serialize import modify_yaml

    if old != new:
        with modify_yaml(str(project.root / LOCK)) as content:
            for name in old:
                if name not in new:
                    del content["stages"][name]
                elif new[name] != old[name]:
                    content["stages"][name]["params"] = new[name]["params"]


def _reruns(stages: dict[str, Json], ran: Json, asked: Json) -> Iterator[str]:
    """Yield a line for each stage that DVC reruns for any data, with the reason."""
    reasons = {name: "; ".join(_why(stage, ran.get(name), asked)) for name, stage in stages.items()}
    if any(reasons.values()):
        yield "`dvc repro` reruns these stages, and later stages whose inputs change:"
        yield from (f"  {name}: {why}" for name, why in reasons.items() if why)
    else:
        yield "`dvc repro` reruns nothing: all results are valid."
    if removed := [name for name in ran if name not in stages]:
        yield f"No longer a stage: {', '.join(removed)}."


def _why(stage: Json, ran: Json | None, asked: Json) -> Iterator[str]:
    if ran is None:
        yield "has not run"
        return
    if stage["cmd"] != ran.get("cmd"):
        yield f"`{ran.get('cmd')}` is now `{stage['cmd']}`"
    for key, what in (("deps", "also reads"), ("outs", "also writes")):
        if new := sorted(set(stage[key]) - {one["path"] for one in ran.get(key, [])}):  # DVC ignores missing files
            yield f"{what} {', '.join(new)}"
    before = ran.get("params", {}).get(PARAMS, {})
    if changed := sorted(key for key in stage["params"] if key not in before or before[key] != _at(asked, key)):
        yield f"other settings: {', '.join(changed)}"


def _stages(project: Project, texts: dict[str, str]) -> dict[str, Json]:
    """Return command, deps, outs and params of each stage, as DVC reads the new texts. UserError if it cannot.

    The texts are read in a separate directory, with links to the study's other files, because dvc.yaml may name them.
    """
    from dvc.dependency.param import ParamsDependency
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch).resolve()
        for path in project.root.iterdir():
            if path.is_file() and path.name not in texts:
                (root / path.name).symlink_to(path)
        for place in (PIPELINE, PARAMS):
            write_text(root / place, texts[place])
        try:
            with quiet(), Repo.init(str(root), no_scm=True) as repo:
                stages = [stage for stage in repo.index.stages if stage.path == str(root / PIPELINE)]
        except DvcException as error:
            raise UserError(f"{PIPELINE}: DVC cannot read it: {' '.join(str(error).split())}; {RESTORE}") from None
        for stage in stages:
            params = [dep for dep in stage.deps if isinstance(dep, ParamsDependency)]
            found[stage.addressing.rpartition(":")[2]] = {
                "cmd": stage.cmd,
                "deps": [dep.def_path for dep in stage.deps if not isinstance(dep, ParamsDependency)],
                "outs": [out.def_path for out in stage.outs],
                "params": [key for dep in params if dep.def_path == PARAMS for key in dep.params],
            }
    return found


def _at(content: Any, name: str) -> Any:
    for word in name.split("."):
        content = content.get(word) if isinstance(content, dict) else None
    return content
