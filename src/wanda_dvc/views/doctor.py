"""Look at the machine and the study before anything runs: what is there, what is missing, what to do."""

import platform
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from tabulate import tabulate

from wanda_dvc import __version__
from wanda_dvc.errors import UserError
from wanda_dvc.params import Params
from wanda_dvc.stages import STAGES
from wanda_dvc.study.places import on_the_hub, task_items
from wanda_dvc.study.project import Project
from wanda_dvc.views.needs import disk, memory

LINKS = ("reflink", "hardlink", "symlink")
SHOWN = ("torch", "transformers", "dvc", "lm-eval")


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. What is not `needed` may be missing and everything still runs."""

    what: str
    good: bool
    found: str
    todo: str = ""
    needed: bool = True


def doctor(*, start: Path) -> tuple[str, bool]:
    """A table of checks of the study around a folder, and whether all that is needed is there."""
    checks = [*_python(), *_hub()]
    try:
        project = Project.find(start)
        params = project.params
    except UserError as error:
        checks += [Check("params.yaml", False, problem, "correct it, or cd into a study") for problem in error.problems]
    else:
        checks.append(Check("params.yaml", True, "valid"))
        checks += [*_machine(project), *_mirror(params), *_versions(project), *_repository(project)]
    rows = [[check.what, "✓" if check.good else "✗", check.found, "" if check.good else check.todo] for check in checks]
    missing = [check.what for check in checks if check.needed and not check.good]
    said = f"Missing: {', '.join(missing)}." if missing else "Nothing that is needed is missing."
    return f"{tabulate(rows, ['what', '', 'found', 'what to do'], tablefmt='github')}\n\n{said}", not missing


def _python() -> Iterator[Check]:
    from packaging.requirements import Requirement

    yield Check("wanda-dvc", True, f"{__version__}, Python {platform.python_version()}")
    try:
        wanted = [Requirement(text) for text in requires("wanda-dvc") or []]
    except PackageNotFoundError:
        yield Check("libraries", False, "wanda-dvc is not installed", "`make install` in the repository", needed=False)
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
    yield Check("libraries", not wrong, shown, "`make install` in the repository, or an environment of its own")


def _machine(project: Project) -> Iterator[Check]:
    import torch

    from wanda_dvc.engine.decoder import has_units

    device = project.params.runtime.device
    units = " and bf16 units" if has_units(torch.bfloat16) else ""
    yield Check("cpu", True, f"{torch.get_num_threads()} threads{units}, {memory('cpu') / 1e9:.1f} GB of memory free")
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    for gpu in gpus:
        yield Check(gpu, True, f"{torch.cuda.get_device_name(gpu)}, {memory(gpu) / 1e9:.1f} GB free")
    mps = ["mps"] if torch.backends.mps.is_available() else []
    if mps:
        yield Check("mps", True, "there; it shares the machine's memory")
    known = {"auto", "cpu", *gpus, *mps, *(["cuda"] if gpus else [])}
    there = ", ".join(sorted(known))
    yield Check(
        "runtime.device", device in known, device, f"got {device}, expected one of {there}; change it in params.yaml"
    )
    free = disk(project)
    yield Check("disk", free > 1e9, f"{free / 1e9:.1f} GB free", "free some; `dvc gc --workspace` drops old cache")


def _hub() -> Iterator[Check]:
    from huggingface_hub import get_token

    there = get_token() is not None
    found = "a token; whether the Hub takes it: not checked: offline" if there else "no token"
    yield Check("Hub login", there, found, "only for gated models: `hf auth login`", needed=False)


def _mirror(params: Params) -> Iterator[Check]:
    mirror = params.runtime.mirror
    if mirror is None:
        asked = [text.source for text in (params.calibration.text, params.perplexity.text)]
        remote = [source for source in asked if source != "embedded" and not Path(source).is_absolute()]
        if params.tasks.source == "benchmark":
            remote.append("benchmark tasks")
        found = f"not set; {', '.join(dict.fromkeys(remote))} come from the Hub" if remote else "not set, nor asked for"
        yield Check("runtime.mirror", not remote, found, "set it where there is no network", needed=False)
        return
    if not Path(mirror).is_dir():
        yield Check(
            "runtime.mirror", False, f"{mirror} is no directory", "correct it in params.yaml, or set it to null"
        )
        return
    wanted = []
    for text in (params.calibration.text, params.perplexity.text):
        if named := on_the_hub(text):
            wanted.append(Path(named[0].dataset, *named[2]))
    if params.tasks.source == "benchmark":
        wanted += [place for name in params.tasks.names if (place := _place(name))]
    missing = [place.as_posix() for place in wanted if not Path(mirror, place).is_file()]
    holds = f"without {', '.join(missing)}" if missing else f"{mirror} holds what params.yaml asks for"
    yield Check(
        "runtime.mirror",
        not missing,
        holds,
        "put the splits there as JSONL, a row a line; c4's shard as it lies on the Hub",
    )


def _place(task: str) -> Path | None:
    """Where a mirror has the items of one of lm-eval's tasks; None if it has none: `download` says that."""
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    index = TaskManager().task_index
    path = index[task].yaml_path if task in index else None
    items = task_items(load_yaml(path)) if path else None
    return Path(*items.place) if items else None


def _versions(project: Project) -> Iterator[Check]:
    """Whether `dvc.yaml` is there and was written for the stages that this wanda-dvc computes."""
    path = project.root / "dvc.yaml"
    if not path.is_file():
        yield Check("dvc.yaml", False, "not there", "copy the one of the wanda-dvc repository beside params.yaml")
        return
    try:
        stages = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))["stages"]
        commands = {name: str(stage.get("do", stage)["cmd"]) for name, stage in stages.items()}
    except (YAMLError, KeyError, TypeError, AttributeError) as error:
        yield Check("dvc.yaml", False, f"not understood: {' '.join(str(error).split())}", "restore it from git")
        return
    wrong = [
        f"{name} {words[-1] if name in commands else 'missing'}, expected {number}"
        for name, number in ((stage.name, stage.version) for stage in STAGES.values())
        if (words := commands.get(name, "").split())[-2:] != ["--version", str(number)]
    ]
    found = "; ".join(wrong) or "asks for the stages that this wanda-dvc computes"
    yield Check("dvc.yaml", not wrong, found, "write those versions, or install the wanda-dvc that it was written for")


def _repository(project: Project) -> Iterator[Check]:
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from dvc_objects.fs.generic import test_links as links_that_work

    git = shutil.which("git")
    inside = (
        git and not subprocess.run([git, "rev-parse"], cwd=project.root, capture_output=True, check=False).returncode
    )
    yield Check("git", bool(inside), "a repository" if inside else "none", "install git and run `git init`")
    try:
        repository = Repo(str(project.root))
    except DvcException as error:
        yield Check("dvc", False, " ".join(str(error).split()), "run `dvc init`")
        return
    with repository:
        yield Check("dvc", True, "initialised")
        cache = repository.cache.local
        works = links_that_work(list(LINKS), cache.fs, cache.path, repository.fs, repository.root_dir)
        types = repository.config["cache"].get("type") or ["reflink", "copy"]
    first = next((kind for kind in types if kind in works), None)
    yield Check(
        "cache.type",
        first is not None,
        f"{','.join(types)}; this disk can {', '.join(works) or 'only copy'}",
        "every artifact lies here twice; `dvc config cache.type reflink,hardlink,symlink`, and the cache on this disk",
        needed=False,
    )
