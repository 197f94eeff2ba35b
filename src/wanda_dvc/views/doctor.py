"""Check the machine and the study before a run, and report findings, missing parts and next steps."""

import contextlib
import platform
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from wanda_dvc import __version__
from wanda_dvc.catalog import HUB_ID
from wanda_dvc.errors import EXTRAS, UserError
from wanda_dvc.params import Params, Text
from wanda_dvc.reading import read_text
from wanda_dvc.sources.places import on_the_hub, task_definition, task_items
from wanda_dvc.stages import STAGES
from wanda_dvc.stages.needs import NEEDS, Need, config_of, known
from wanda_dvc.stages.running import device_name, free_memory
from wanda_dvc.study.dvc import link_types
from wanda_dvc.study.files import json_text
from wanda_dvc.study.local import local_sources, sources
from wanda_dvc.study.markup import table
from wanda_dvc.study.project import Project
from wanda_dvc.views.needs import disk

SHOWN = ("torch", "transformers", "dvc", "lm-eval")


@dataclass(frozen=True)
class Check:
    """The result of one check. Stages run even if a check without `needed` fails."""

    what: str
    good: bool
    found: str
    todo: str = ""
    needed: bool = True


def doctor(*, start: Path, as_json: bool = False) -> tuple[str, bool]:
    """Check the study around a folder. Return a table, or JSON, and whether every needed check passed."""
    checks = [*_python()]
    try:
        project = Project.find(start)
        params = project.params
    except UserError as error:
        checks += [
            Check("params.yaml", False, problem, "correct it, cd into a study, or `wanda-dvc init DIR`")
            for problem in error.problems
        ]
    else:
        checks.append(Check("params.yaml", True, "valid"))
        checks += [
            *_hub(params),
            *_machine(project),
            *_workers(params),
            *_sources(project),
            *_mirror(params),
            *_versions(project),
            *_repository(project),
        ]
    missing = [check.what for check in checks if check.needed and not check.good]
    if as_json:
        return json_text({"checks": [asdict(check) for check in checks], "missing": missing}), not missing
    rows = [[check.what, "✓" if check.good else "✗", check.found, "" if check.good else check.todo] for check in checks]
    said = f"Missing: {', '.join(missing)}." if missing else "Nothing that is needed is missing."
    return f"{table(['what', '', 'found', 'what to do'], rows)}\n\n{said}", not missing


def _python() -> Iterator[Check]:
    from packaging.requirements import Requirement

    yield Check("wanda-dvc", True, f"{__version__}, Python {platform.python_version()}")
    try:
        wanted = [Requirement(text) for text in requires("wanda-dvc") or []]
    except PackageNotFoundError:
        yield Check("libraries", False, "wanda-dvc is not installed", "`pip install wanda-dvc`", needed=False)
        return
    wrong = []
    for requirement in wanted:
        if requirement.marker is None:
            try:
                there = version(requirement.name)
            except PackageNotFoundError:
                wrong.append(f"no {requirement.name}")
                continue
            if not requirement.specifier.contains(there, prereleases=True):
                wrong.append(f"{requirement.name} {there}, expected {requirement.specifier}")
    shown = ", ".join(f"{name} {version(name)}" for name in SHOWN) if not wrong else "; ".join(wrong)
    yield Check("libraries", not wrong, shown, "`pip install --upgrade wanda-dvc`, in a new environment")
    for extra in sorted(set(EXTRAS.values())):
        absent = [name for name, one in EXTRAS.items() if one == extra and find_spec(name) is None]
        found = f"no {', '.join(absent)}" if absent else "installed"
        yield Check(f"libraries: {extra}", not absent, found, f"`pip install 'wanda-dvc[{extra}]'`", needed=False)


def _machine(project: Project) -> Iterator[Check]:
    import torch

    from wanda_dvc.engine import accelerator
    from wanda_dvc.engine.attention import has_units

    device = project.params.runtime.device
    units = " and bf16 units" if has_units(torch.bfloat16) else ""
    yield Check(
        "cpu", True, f"{torch.get_num_threads()} threads{units}, {free_memory('cpu') / 1e9:.1f} GB of memory free"
    )
    gpus = accelerator.gpus()
    for gpu in gpus:
        yield Check(gpu, True, f"{accelerator.full_name(gpu)}, {free_memory(gpu) / 1e9:.1f} GB free")
    mps = ["mps"] if accelerator.has_mps() else []
    if mps:
        yield Check("mps", True, "there; it shares the machine's memory")
    known = {"auto", "cpu", *gpus, *mps, *(["cuda"] if gpus else [])}
    there = ", ".join(sorted(known))
    if project.params.runtime.ray is None:  # else the workers need it
        todo = f"got {device}, expected one of {there}; change it in params.yaml"
        yield Check("runtime.device", device in known, device, todo)
    yield from _room(project)


def _room(project: Project) -> Iterator[Check]:
    """Check memory and disk for the stages with the highest needs, if the model's configuration exists."""
    needs = {"a study": Need(least=10**9)}
    with contextlib.suppress(UserError, ValueError, KeyError, OSError):  # missing or invalid
        on = known(project.params, config_of(project), project)
        needs |= {stage: need(on) for stage, need in NEEDS.items()}
        free = free_memory(device_name(project.params.runtime))
        most = max(NEEDS, key=lambda stage: needs[stage].memory.total)
        wanted = needs[most].memory.total
        found = f"{free / 1e9:.1f} GB free; {most} needs about {wanted / 1e9:.1f} GB"
        yield Check("memory", free > wanted, found, "free some, or take shorter windows", needed=False)
    free, most = disk(project), max(needs, key=lambda stage: needs[stage].least)
    found = f"{free / 1e9:.1f} GB free; {most} needs about {max(needs[most].least, needs[most].disk) / 1e9:.1f} GB"
    yield Check(
        "disk",
        free > needs[most].least,
        found,
        "free some; `dvc gc --workspace` also deletes the cached results of experiments",
    )


def _workers(params: Params) -> Iterator[Check]:
    """Check that the configured workers can be reached, with equal library versions."""
    address = params.runtime.ray
    if address is None:
        return
    if find_spec("ray") is None:
        yield Check("runtime.ray", False, "no ray", f"`pip install 'wanda-dvc[{EXTRAS['ray']}]'`")
        return
    from wanda_dvc.engine.cluster import LOCAL, Cluster

    if address == LOCAL:
        yield Check("runtime.ray", True, f"local, Ray {version('ray')}")
        return
    try:
        cluster = Cluster(address, device=params.runtime.device)
        with contextlib.closing(cluster):
            found = ", ".join(f"{count} {what}" for what, count in cluster.counts().items())
            if cluster.has_free or not cluster.has_workers:
                cluster.open()
            else:
                found += ", all in use: versions not compared"
    except UserError as error:
        yield Check("runtime.ray", False, str(error), "check `ray status` on its head node")
        return
    yield Check("runtime.ray", True, found)


def _texts(params: Params) -> list[Text]:
    return [params.calibration.text, *params.perplexity.texts.values()]


def _from_the_hub(params: Params) -> tuple[list[str], list[str]]:
    """Return the models and data sets that `download` fetches from the Hub."""
    models = [params.model] if HUB_ID.fullmatch(params.model) else []
    if params.runtime.mirror is not None:
        return models, []
    data = [text.source for text in _texts(params) if on_the_hub(text.chosen)]
    return models, data + (["benchmark tasks"] if params.tasks.source == "benchmark" else [])


def _hub(params: Params) -> Iterator[Check]:
    """Check the login, if the study uses the Hub."""
    from huggingface_hub import get_token

    models, data = _from_the_hub(params)
    if models or data:
        there = get_token() is not None
        found = "a token, not checked with the Hub" if there else "no token"
        todo = "gated and private models and data sets need `hf auth login`"
        yield Check("Hub login", there, found, todo, needed=False)


def _sources(project: Project) -> Iterator[Check]:
    """Check that the local sources exist."""
    local, named = local_sources(project.params), sources(project.params)
    if not local:
        return
    missing = [f"{named[part][0]}: {path} is missing" for part, path in local.items() if not path.exists()]
    found = "; ".join(missing) or ", ".join(str(path) for path in local.values())
    yield Check("local sources", not missing, found, "restore them, or name others in params.yaml")


def _mirror(params: Params) -> Iterator[Check]:
    mirror = params.runtime.mirror
    if mirror is None:
        _, remote = _from_the_hub(params)
        found = f"not set; {', '.join(dict.fromkeys(remote))} come from the Hub" if remote else "not set, not needed"
        yield Check("runtime.mirror", not remote, found, "set it on a machine without a network", needed=False)
        return
    if not Path(mirror).is_dir():
        yield Check(
            "runtime.mirror", False, f"{mirror} is no directory", "correct it in params.yaml, or set it to null"
        )
        return
    wanted = []
    for text in _texts(params):
        if named := on_the_hub(text.chosen):
            wanted.append(Path(named[0].dataset, *named[2]))
    if params.tasks.source == "benchmark":
        wanted += [place for name in params.tasks.names if (place := _place(name))]
    missing = [place.as_posix() for place in wanted if not Path(mirror, place).is_file()]
    holds = f"without {', '.join(missing)}" if missing else f"{mirror} has every file that params.yaml names"
    todo = "put the splits there as JSONL, one row a line; c4's shard as the Hub has it"
    yield Check("runtime.mirror", not missing, holds, todo)


def _place(task: str) -> Path | None:
    """Return the place of a task's items in a mirror; None for an unknown task, which `download` reports."""
    found = task_definition(task)
    items = task_items(found[1]) if found else None
    return Path(*items.place) if items else None


def _versions(project: Project) -> Iterator[Check]:
    """Check that `dvc.yaml` has all stages, in this wanda-dvc's versions."""
    path = project.root / "dvc.yaml"
    if not path.is_file():
        yield Check("dvc.yaml", False, "missing", "restore it from git")
        return
    try:
        stages = YAML(typ="safe", pure=True).load(read_text(path))["stages"]
        commands: dict[str, list[list[str]]] = {}
        for name, stage in stages.items():  # perplexity-dense is a part of perplexity
            row, _, part = (name, "", "") if name in STAGES else name.rpartition("-")
            if part and (row not in STAGES or part not in STAGES[row].parts):
                continue  # the user's own
            commands.setdefault(row, []).append(str(stage.get("do", stage)["cmd"]).split())
    except (UserError, YAMLError, KeyError, TypeError, AttributeError) as error:
        yield Check("dvc.yaml", False, f"not readable: {' '.join(str(error).split())}", "restore it from git")
        return
    wrong = [
        f"{stage.name} {words[-1] if words else 'missing'}, expected {stage.version}"
        for stage in STAGES.values()
        for words in commands.get(stage.name, [[]])
        if words[-2:] != ["--version", str(stage.version)]
    ]
    found = "; ".join(wrong) or "names the stages that this wanda-dvc computes"
    yield Check(
        "dvc.yaml", not wrong, found, "install the wanda-dvc that it names, or make a new study: `wanda-dvc init DIR`"
    )


def _repository(project: Project) -> Iterator[Check]:
    git = shutil.which("git")
    inside = (
        git and not subprocess.run([git, "rev-parse"], cwd=project.root, capture_output=True, check=False).returncode
    )
    yield Check("git", bool(inside), "a repository" if inside else "none", "install git and run `git init`")
    try:
        types, works = link_types(project.root)
    except UserError as error:
        yield Check("dvc", False, str(error), "run `dvc init`")
        return
    yield Check("dvc", True, "initialised")
    first = next((kind for kind in types if kind in works), None)
    yield Check(
        "cache.type",
        first is not None,
        f"{','.join(types)}; this disk can {', '.join(works) or 'only copy'}",
        "every artifact is stored twice; `dvc config cache.type reflink,hardlink,symlink`, with the cache on this disk",
        needed=False,
    )
