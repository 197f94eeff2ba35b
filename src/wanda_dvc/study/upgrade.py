"""Bring an older study to this version: its pipeline, plots, ignore files and settings.

What was shipped once and nobody has edited is replaced; `known.json` has the digests of all that was shipped. What the
user has added or edited stays, or the upgrade is refused with the reason. Text is moved in whole blocks, with comments.
"""

import difflib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import YAMLError

from wanda_dvc.errors import UserError
from wanda_dvc.params import check_params, settings
from wanda_dvc.reading import read_text
from wanda_dvc.study.files import Json, write_text
from wanda_dvc.study.presets import PARAMS, with_settings
from wanda_dvc.study.project import Project
from wanda_dvc.study.provenance import digest
from wanda_dvc.study.ran import LOCK, read_lock
from wanda_dvc.study.scaffold import FILES, PIPELINE, TEMPLATE, quiet
from wanda_dvc.study.settings import flatten

SECTIONS = ("stages", "plots", "artifacts")
IGNORED = (".gitignore", ".dvcignore")
# Values that params.yaml once came with and that mean something else now: they become today's.
ONCE = {"training.rate": 0.0003}  # was no share of the weights
SHARED, UNSHARED = "        - ${item.out}\n", "        - ${item.out}: { push: false }\n"
RESTORE = "restore it from git"


@dataclass(frozen=True)
class Plan:
    """The new texts of a study's files, by place, and what is said about them."""

    new: dict[str, str]
    old: dict[str, str]
    notes: list[str] = field(default_factory=list)

    @property
    def changed(self) -> list[str]:
        """The places whose text changes."""
        return [place for place, text in self.new.items() if text != self.old[place]]

    def difference(self) -> str:
        """Return the changes as a unified diff."""
        lines: list[str] = []
        for place in self.changed:
            before, after = (texts[place].splitlines(keepends=True) for texts in (self.old, self.new))
            lines += difflib.unified_diff(before, after, f"a/{place}", f"b/{place}")
        return "".join(lines).rstrip("\n")


def upgrade(*, project: Project, dry_run: bool = False) -> str:
    """Bring a study's files to this version. Return the difference and the stages that will run again, each with why.

    With `dry_run` nothing is written. UserError, with nothing written, where an edited stage cannot be kept.
    """
    plan = _plan(project)
    if not plan.changed:
        return "\n".join([*plan.notes, f"{project.root}: up to date with this wanda-dvc."])
    lock = read_lock(project.root)
    stages = _stages(project, plan.new)
    carried = _carry(stages, lock, _load(plan.new["params.yaml"], "params.yaml"))
    said = list(_reruns(stages, carried)) if lock else ["Nothing has run yet."]
    if not dry_run:
        for place in plan.changed:
            write_text(_path(project, place), plan.new[place])
        if carried != lock:
            _write_lock(project, carried)
    done = "Would change" if dry_run else "Changed"
    return "\n".join([plan.difference(), "", *plan.notes, f"{done}: {', '.join(plan.changed)}.", *said])


def _plan(project: Project) -> Plan:
    known = shipped_ever()
    old: dict[str, str] = {}
    new: dict[str, str] = {}
    notes: list[str] = []
    for place, file in FILES.items():
        path, shipped = _path(project, place), file.read_text(encoding="utf-8")
        if place in ("README.md", ".dvc/config"):
            continue  # the user's own from the first day
        old[place] = read_text(path, RESTORE) if path.is_file() else ""
        if place == PIPELINE:
            new[place] = _pipeline(old[place], shipped, known, notes)
        elif place == "params.yaml":
            new[place] = _params(old[place])
        elif place in IGNORED:
            lacking = [line for line in shipped.splitlines() if line not in old[place].splitlines()]
            new[place] = "\n".join([*old[place].splitlines(), *lacking, ""])
        elif old[place] and old[place] != shipped and digest(old[place]) not in known:
            new[place] = old[place]
            notes.append(f"{place}: kept as you have edited it.")
        else:
            new[place] = shipped
    return Plan(new, old, notes)


def _path(project: Project, place: str) -> Path:
    """Return where a file of the scaffold is. `.dvc/` may be further up than the study. UserError without one."""
    from dvc.exceptions import NotDvcRepoError
    from dvc.repo import Repo

    if not place.startswith(".dvc/"):
        return project.root / place
    try:
        return Path(Repo.find_root(str(project.root))) / place
    except NotDvcRepoError:
        raise UserError(f"{project.root}: no DVC repository, expected a study in one; run `dvc init`") from None


# --- the pipeline ---


def shipped_ever() -> frozenset[str]:
    """Return the digests of all that any version has written."""
    return frozenset(json.loads((TEMPLATE / "known.json").read_text(encoding="utf-8")))


def _pipeline(old: str, shipped: str, known: frozenset[str], notes: list[str]) -> str:
    """Return the pipeline of this version, with what the user has added or edited."""
    if not old:
        return shipped
    theirs, ours = _load(old, PIPELINE), _load(shipped, PIPELINE)
    if not isinstance(theirs.get("stages"), CommentedMap):
        raise UserError(f"{PIPELINE}: no stages, expected a pipeline; {RESTORE}, or remove it and run this again")
    lines, own = shipped.splitlines(), old.splitlines()
    edits: list[tuple[int, int, list[str]]] = []  # lines of ours from, to, and what stands there instead
    problems: list[str] = []
    for section in SECTIONS:
        mine = _blocks(ours[section], lines)
        for name, (begin, end, content) in _blocks(theirs.get(section), own).items():
            if digest(content) in known or (name in mine and content == mine[name][2]):
                continue
            if section == "stages" and name in mine and (lost := _lacking(content, mine[name][2])):
                problems.append(
                    f"{PIPELINE}: {name}: edited, and without {lost}, expected the stage as this wanda-dvc runs it; "
                    "undo the edit, run this again, and make the edit in the new text"
                )
                continue
            last = max(stop for _, stop, _ in mine.values())
            first, stop = mine[name][:2] if name in mine else (last, last)
            blank = [""] if section == "stages" and name not in mine else []
            edits.append((first, stop, [*blank, *_indented(own[begin:end])]))
            how = "kept as you have edited it" if name in mine else "yours and stays"
            notes.append(f"{PIPELINE}: {section}: {name} is {how}.")
    for key in theirs.keys() - ours.keys():
        begin, end, _ = _blocks(theirs, own)[key]
        edits.append((len(lines), len(lines), ["", *own[begin:end]]))
        notes.append(f"{PIPELINE}: {key} is yours and stays.")
    if problems:
        raise UserError(*problems)
    edits.sort(key=lambda edit: edit[0])
    for begin, end, block in reversed(edits):  # from the last line up
        lines[begin:end] = block
    text = _unshared(theirs, "\n".join([*lines, ""]), notes)
    _load(text, PIPELINE)
    return text


def _unshared(theirs: Json, text: str, notes: list[str]) -> str:
    """Keep an older study's model and texts off its remote."""
    if '"push": false' in json.dumps(theirs["stages"].get("download")) and SHARED in text:
        notes.append(
            f"{PIPELINE}: download: `push: false` stays, so `dvc pull` needs --allow-missing (docs/sharing.md)."
        )
        return text.replace(SHARED, UNSHARED)
    return text


def _lacking(edited: Json, ours: Json) -> str:
    """Say what a stage of ours has and an edited one lacks; "" where it asks for at least as much."""
    if not isinstance(edited, dict):
        return "its definition"
    inner, wanted = edited.get("do", edited), ours.get("do", ours)
    if inner.get("cmd") != wanted["cmd"]:
        return f"the command `{wanted['cmd']}`"
    for key in ("foreach", "matrix"):
        if edited.get(key) != ours.get(key):
            return f"`{key}: {ours.get(key)}`"
    for key in ("deps", "params", "outs", "metrics"):
        there = {_named(one) for one in inner.get(key, [])}
        lost = [name for one in wanted.get(key, []) if (name := _named(one)) not in there]
        if lost:
            return f"{', '.join(lost)} of `{key}`"
    return ""


def _named(entry: Any) -> str:
    return next(iter(entry)) if isinstance(entry, dict) else str(entry)


# --- params.yaml ---


def _params(old: str) -> str:
    """Return settings with those that are new, each with its default and its comment, and without those of `ONCE`."""
    text, shipped = old, PARAMS.read_text(encoding="utf-8")
    if not old:
        return shipped
    default = dict(flatten(_load(shipped, "params.yaml")))
    for name, _ in settings():
        have = dict(flatten(_load(text, "params.yaml")))
        if name not in have and not any(key.startswith(f"{name}.") for key in have):
            text = _with_setting(text, shipped, name, default[name])
        elif name in ONCE and have.get(name) == ONCE[name]:
            text = with_settings(text, {name: default[name]})[0]
    check_params(_load(text, "params.yaml"))
    return text


def _with_setting(text: str, shipped: str, name: str, value: Any) -> str:
    """Add a setting after the one that it follows in a new params.yaml, with its section where that is missing too."""
    lines, source = text.splitlines(), shipped.splitlines()
    here: Any = _load(text, "params.yaml")
    there: Any = _load(shipped, "params.yaml")
    for word in name.split("."):
        if isinstance(here.get(word), dict):
            here, there = here[word], there[word]
            continue
        blocks, mine = _blocks(here, lines), _blocks(there, source)
        if here.fa.flow_style() or not blocks:
            return with_settings(text, {name: value})[0]
        order = list(mine)
        earlier = order[: order.index(word)]
        before = [key for key in earlier if key in blocks]
        begin, end, _ = mine[word]
        above = source[mine[earlier[-1]][1] if earlier else begin : begin]  # blank lines and comments
        at = blocks[before[-1]][1] if before else min(first for first, _, _ in blocks.values())
        if lines[at : at + len(above)] == above:
            at, above = at + len(above), []
        block = [
            " " * here.lc.col + line[there.lc.col :] if line.strip() else line for line in [*above, *source[begin:end]]
        ]
        return "\n".join([*lines[:at], *block, *lines[at:], ""])
    return text


# --- blocks of text ---


def _load(text: str, place: str) -> Any:
    """Load YAML with the places of its nodes."""
    try:
        content = YAML().load(text)
    except YAMLError as error:
        raise UserError(f"{place}: not valid YAML: {' '.join(str(error).split())}; {RESTORE}") from None
    if not isinstance(content, CommentedMap):
        raise UserError(f"{place}: got {type(content).__name__}, expected a mapping; {RESTORE}")
    return content


def _blocks(node: Any, lines: list[str]) -> dict[str, tuple[int, int, Json]]:
    """Return the lines, from and to, and the content of every entry of a mapping or list, by its name.

    Blank lines and comments between two entries belong to neither. A comment ends no entry, however it is indented.
    """
    if isinstance(node, CommentedMap):
        starts = [(str(key), node.lc.key(key)[0], node[key]) for key in node]
    elif isinstance(node, CommentedSeq):
        starts = [(_named(one), node.lc.item(index)[0], one) for index, one in enumerate(node)]
    else:
        return {}
    found = {}
    for name, begin, content in starts:
        indent = len(lines[begin]) - len(lines[begin].lstrip())
        end = begin + 1
        for number in range(begin + 1, len(lines)):
            line = lines[number]
            if not line.strip():
                continue
            if len(line) - len(line.lstrip()) > indent:
                end = number + 1
            elif not line.lstrip().startswith("#"):
                break
        found[name] = (begin, end, json.loads(json.dumps(content)))
    return found


def _indented(block: list[str]) -> list[str]:
    """Return the block of an entry indented as ours are."""
    indent = len(block[0]) - len(block[0].lstrip())
    more, less = " " * (2 - indent), " " * (indent - 2)  # a comment may have less indentation than the entry
    return [more + line.removeprefix(less) if line.strip() else "" for line in block]


# --- what ran before ---


def _carry(stages: dict[str, Json], lock: Json, asked: Json) -> Json:
    """Return the lock with the settings that a stage of the same version has gained and that have their default.

    The version says that the results are the same, so such a stage does not run again.
    """
    default = _load(PARAMS.read_text(encoding="utf-8"), "params.yaml")
    carried: Json = json.loads(json.dumps(lock))
    for name, stage in stages.items():
        if carried.get(name, {}).get("cmd") != stage["cmd"]:
            continue
        params = carried[name].setdefault("params", {}).setdefault("params.yaml", {})
        gained = {key: _at(asked, key) for key in stage["params"] if key not in params}
        params |= {key: value for key, value in gained.items() if value == _at(default, key)}
    return carried


def _write_lock(project: Project, stages: Json) -> None:
    """Write the settings of stages into dvc.lock, as DVC writes them."""
    from dvc.utils.serialize import modify_yaml

    with modify_yaml(str(project.root / LOCK)) as content:
        for name, stage in stages.items():
            if "params" in stage:
                content["stages"][name]["params"] = {
                    file: dict(sorted(values.items())) for file, values in stage["params"].items()
                }


def _reruns(stages: dict[str, Json], ran: Json) -> Iterator[str]:
    """Yield a line for each stage that DVC runs again whatever the data are, and why."""
    reasons = {name: "; ".join(_why(stage, ran.get(name))) for name, stage in stages.items()}
    if any(reasons.values()):
        yield "`dvc repro` runs again, and then what reads their results where these have changed:"
        yield from (f"  {name}: {why}" for name, why in reasons.items() if why)
    else:
        yield "`dvc repro` runs nothing again: every result stays valid."
    if gone := [name for name in ran if name not in stages]:
        yield f"No longer a stage: {', '.join(gone)}."


def _why(stage: Json, ran: Json | None) -> Iterator[str]:
    if ran is None:
        yield "has not run"
        return
    if stage["cmd"] != ran.get("cmd"):
        yield f"`{ran.get('cmd')}` is now `{stage['cmd']}`"
    before = {
        "deps": {one["path"] for one in ran.get("deps", [])},
        "outs": {one["path"] for one in ran.get("outs", [])},
        "params": set(ran.get("params", {}).get("params.yaml", {})),
    }
    for key, what in (("deps", "also reads"), ("outs", "also writes"), ("params", "also depends on")):
        if new := sorted(set(stage[key]) - before[key]):  # DVC ignores what a stage has no more
            yield f"{what} {', '.join(new)}"


def _stages(project: Project, texts: dict[str, str]) -> dict[str, Json]:
    """Return command, deps, outs and params of each stage, as DVC reads the new texts. UserError where it cannot.

    The texts are read in a directory of their own, beside links to the study's other files, which dvc.yaml may name.
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
        for place in (PIPELINE, "params.yaml"):
            write_text(root / place, texts[place])
        try:
            with quiet(), Repo.init(str(root), no_scm=True) as repo:
                stages = [stage for stage in repo.index.stages if stage.path == str(root / PIPELINE)]
        except DvcException as error:
            problem = " ".join(str(error).split())
            raise UserError(f"{PIPELINE}: DVC cannot read what the upgrade would write: {problem}") from None
        for stage in stages:
            params = [dep for dep in stage.deps if isinstance(dep, ParamsDependency)]
            found[stage.addressing] = {
                "cmd": stage.cmd,
                "deps": [dep.def_path for dep in stage.deps if not isinstance(dep, ParamsDependency)],
                "outs": [out.def_path for out in stage.outs],
                "params": [key for dep in params for key in dep.params],
            }
    return {name.rpartition(":")[2]: stage for name, stage in found.items()}


def _at(content: Any, name: str) -> Any:
    for word in name.split("."):
        content = content.get(word) if isinstance(content, dict) else None
    return json.loads(json.dumps(content))
