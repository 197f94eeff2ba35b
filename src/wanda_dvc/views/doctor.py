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
from wanda_dvc.machine import cores
from wanda_dvc.params import Params
from wanda_dvc.reading import read_text
from wanda_dvc.stages import STAGES
from wanda_dvc.stages.needs import NEEDS, Need, free_disk, gigabytes, need
from wanda_dvc.stages.running import device_name, free_memory
from wanda_dvc.study.dvc import link_types
from wanda_dvc.study.files import json_text
from wanda_dvc.study.markup import table
from wanda_dvc.study.project import Project
from wanda_dvc.study.settings import local_sources, sources

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
    checks, needs = [*_libraries()], dict[str, Need]()
    try:
        project = Project.find(start)
        params = project.params
    except UserError as error:
        todo = "correct it, cd into a study, or `wanda-dvc init DIR`"
        checks += [Check("params.yaml", False, problem, todo) for problem in error.problems]
    else:
        checks.append(Check("params.yaml", True, "valid"))
        checks += [*_hub(params), *_machine(params), *_workers(params), *_sources(project)]
        checks += [*_pipeline(project), *_repository(project)]
        with contextlib.suppress(UserError, ValueError, KeyError, OSError):  # no model, or an invalid one
            needs = {stage: need(project, stage) for stage in NEEDS}
        checks += _room(project, needs)
    missing = [check.what for check in checks if check.needed and not check.good]
    if as_json:
        content = {stage: {"memory_bytes": one.memory, "disk_bytes": one.disk} for stage, one in needs.items()}
        said = json_text({"checks": [asdict(check) for check in checks], "missing": missing, "needs": content})
        return said, not missing
    rows = [[check.what, "✓" if check.good else "✗", check.found, "" if check.good else check.todo] for check in checks]
    said = f"Missing: {', '.join(missing)}." if missing else "Nothing that is needed is missing."
    return f"{table(['what', '', 'found', 'what to do'], rows)}\n\n{said}", not missing


def _libraries() -> Iterator[Check]:
    """Check the installed libraries against our requirements, and the extras."""
    from packaging.requirements import Requirement

    yield Check("wanda-dvc", True, f"{__version__}, Python {platform.python_version()}")
    try:
        wanted = [Requirement(text) for text in requires("wanda-dvc") or []]
    except PackageNotFoundError:
        yield Check("libraries", False, "wanda-dvc is not installed", "`pip install wanda-dvc`", needed=False)
        return
    wrong = []
    for requirement in wanted:
        if requirement.marker is not None:
            continue
        try:
            there = version(requirement.name)
        except PackageNotFoundError:
            wrong.append(f"no {requirement.name}")
        else:
            if not requirement.specifier.contains(there, prereleases=True):
                wrong.append(f"{requirement.name} {there}, expected {requirement.specifier}")
    shown = "; ".join(wrong) or ", ".join(f"{name} {version(name)}" for name in SHOWN)
    yield Check("libraries", not wrong, shown, "`pip install --upgrade wanda-dvc`, in a new environment")
    for extra in sorted(set(EXTRAS.values())):
        absent = [name for name, one in EXTRAS.items() if one == extra and find_spec(name) is None]
        found = f"no {', '.join(absent)}" if absent else "installed"
        yield Check(f"libraries: {extra}", not absent, found, f"`pip install 'wanda-dvc[{extra}]'`", needed=False)


def _hub(params: Params) -> Iterator[Check]:
    """Check the login and the mirror, if the study uses the Hub."""
    from huggingface_hub import get_token

    mirror = params.runtime.mirror
    if mirror is not None and not Path(mirror).is_dir():
        yield Check(
            "runtime.mirror", False, f"{mirror} is no directory", "correct it in params.yaml, or set it to null"
        )
    texts = [params.calibration.text, *params.perplexity.texts.values()]
    fetched = [text.source for text in texts if text.chosen.dataset]
    fetched += ["benchmark tasks"] if params.tasks.source == "benchmark" else []
    fetched = [params.model] * bool(HUB_ID.fullmatch(params.model)) + fetched * (mirror is None)
    if fetched:
        there = get_token() is not None
        found = f"{'a token, not checked with the Hub' if there else 'no token'}; {', '.join(dict.fromkeys(fetched))}"
        todo = "gated and private models and data sets need `hf auth login`; without a network set `runtime.mirror`"
        yield Check("Hub login", there, found, todo, needed=False)


def _machine(params: Params) -> Iterator[Check]:
    """Show CPU and GPUs, and check that the device exists."""
    from wanda_dvc.engine import accelerator

    yield Check("cpu", True, f"{cores()} threads, {gigabytes(free_memory('cpu'))} of memory free")
    gpus = accelerator.gpus()
    for gpu in gpus:
        yield Check(gpu, True, f"{accelerator.full_name(gpu)}, {gigabytes(free_memory(gpu))} free")
    mps = ["mps"] if accelerator.has_mps() else []
    known = {"auto", "cpu", *gpus, *mps, *(["cuda"] if gpus else [])}
    device = params.runtime.device
    if params.runtime.ray is None:  # else the workers need it
        todo = f"got {device}, expected one of {', '.join(sorted(known))}; change it in params.yaml"
        yield Check("runtime.device", device in known, device, todo)


def _room(project: Project, needs: dict[str, Need]) -> Iterator[Check]:
    """Check memory and disk for all stages."""
    free = free_memory(device_name(project.params.runtime))
    if needs:
        said = ", ".join(f"{stage} {gigabytes(one.memory)}" for stage, one in needs.items())
        enough = free > max(one.memory for one in needs.values())
        todo = "free some, set `dtype` to the checkpoint's own, or take shorter windows"
        yield Check("memory", enough, f"{gigabytes(free)} free; needs about: {said}", todo, needed=False)
    free = free_disk(project)
    least = max((one.least for one in needs.values()), default=10**9)
    said = ", ".join(f"{stage} {gigabytes(one.disk)}" for stage, one in needs.items()) or "1 GB"
    todo = "free some; `dvc gc --workspace` also deletes the cached results of experiments"
    yield Check("disk", free > least, f"{gigabytes(free)} free; needs about: {said}", todo)


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
        with contextlib.closing(Cluster(address, device=params.runtime.device)) as cluster:
            found = ", ".join(f"{count} {what}" for what, count in cluster.counts().items())
            cluster.open()
    except UserError as error:
        yield Check("runtime.ray", False, str(error), "check `ray status` on its head node")
    else:
        yield Check("runtime.ray", True, found)


def _sources(project: Project) -> Iterator[Check]:
    """Check that the local sources exist."""
    local, named = local_sources(project.params), sources(project.params)
    if not local:
        return
    missing = [f"{named[part][0]}: {path} is missing" for part, path in local.items() if not path.exists()]
    found = "; ".join(missing) or ", ".join(str(path) for path in local.values())
    yield Check("local sources", not missing, found, "restore them, or name others in params.yaml")


def _pipeline(project: Project) -> Iterator[Check]:
    """Check that `dvc.yaml` has all stages, in this wanda-dvc's versions; it may have stages of the user's own."""
    path = project.root / "dvc.yaml"
    try:
        stages = YAML(typ="safe", pure=True).load(read_text(path))["stages"]
        commands = [str(stage.get("do", stage)["cmd"]).split() for stage in stages.values()]
    except (UserError, YAMLError, KeyError, TypeError, AttributeError) as error:
        yield Check("dvc.yaml", False, f"not readable: {' '.join(str(error).split())}", "restore it from git")
        return
    wrong = []
    for stage in STAGES.values():
        ours = [words for words in commands if words[:2] == ["wanda-dvc", stage.name]]
        if not ours:
            wrong.append(f"no {stage.name}")
        wrong += [
            f"{stage.name} {words[-1]}, expected {stage.version}"
            for words in ours
            if words[-2:] != ["--stage-version", str(stage.version)]
        ]
    found = "; ".join(dict.fromkeys(wrong)) or "has the stages of this wanda-dvc"
    yield Check("dvc.yaml", not wrong, found, "install the wanda-dvc that it names, or copy dvc.yaml from a new study")


def _repository(project: Project) -> Iterator[Check]:
    """Check git, DVC, and that the cache links to files where the disk can."""
    git = shutil.which("git")
    words = [git or "git", "rev-parse"]
    inside = git and not subprocess.run(words, cwd=project.root, capture_output=True, check=False).returncode
    yield Check("git", bool(inside), "a repository" if inside else "none", "install git and run `git init`")
    try:
        types, works = link_types(project.root)
    except UserError as error:
        yield Check("dvc", False, str(error), "run `dvc init`")
        return
    yield Check("dvc", True, "initialised")
    found = f"{','.join(types)}; this disk can {', '.join(works) or 'only copy'}"
    todo = (
        "every artifact is stored twice; `dvc config cache.type reflink,hardlink,symlink`, with the cache on this disk"
    )
    yield Check("cache.type", any(kind in works for kind in types), found, todo, needed=False)
