"""Build the pruned model of any experiment in a new directory.

The experiment's files are copied from DVC's cache and git into the work folder. The workspace is only read.
"""

import io
import shutil
from pathlib import Path

from ruamel.yaml import YAML

from wanda_dvc.commands.imatrix import importance
from wanda_dvc.errors import UserError
from wanda_dvc.params import Params, flatten, nested, sources
from wanda_dvc.plan import Plan
from wanda_dvc.reading import is_there
from wanda_dvc.results.card import card
from wanda_dvc.results.compare import DENSE, side_by_side
from wanda_dvc.results.experiments import Experiment, at, made_with_others, workspace
from wanda_dvc.results.listing import WORKSPACE
from wanda_dvc.results.markup import inline, table
from wanda_dvc.results.show import continuations, notes
from wanda_dvc.stages import MODELS, check_outside
from wanda_dvc.stages.apply import describe_pruned, prune
from wanda_dvc.stages.runs import LOCK, Lock
from wanda_dvc.study.artifact import (
    MODEL_COMMANDS,
    PROVENANCE,
    digest,
    read_provenance,
    temporary_place,
    write_provenance,
)
from wanda_dvc.study.dvc import Revision, copy_file
from wanda_dvc.study.folder import Study
from wanda_dvc.study.protocol import differing

REPRODUCE = """\
With wanda-dvc {version}, `wanda-dvc init study`, these settings in `params.yaml`, and `dvc repro`:

````yaml
{settings}````"""


def export(
    *, study: Study, experiment: str | None, target: Path, made: bool = False, imatrix: Path | None = None
) -> str:
    """Write the pruned model of an experiment into a new directory that transformers loads.

    The experiment is a name, commit, branch or tag; None is the workspace. If `made`, its model is in `models/pruned`
    and is copied. `imatrix` is a new file for llama.cpp's importance matrix.
    """
    experiment = None if experiment == WORKSPACE else experiment
    target, what = check_target(study, target), experiment or "the workspace"
    if imatrix:
        file = check_outside(study, imatrix.parent) / imatrix.name
        if is_there(file) or file.resolve().is_relative_to(target.resolve()):
            raise UserError(f"{imatrix}: exists already, or is in {target}; name a new file elsewhere")
    with study.work({"kind": "export", "experiment": experiment}) as work:
        work.discard()  # the links of a killed export
        own_study = Study(work.path / "study")
        own_study.root.mkdir(parents=True)
        if experiment is None:
            found = workspace(study)
            read_provenance(study.masks, "mask")
            parts = ("models/dense", "models/recovered", "masks", "stats", "weights")
            own_study.link_to(study, *parts, "params.yaml", LOCK)
        else:
            found = at(study, experiment, own_study.root)
            _take_experiment(study, own_study, experiment, ["stats/norms"] if imatrix else [])
        stale = Lock.read(own_study.root).stale()
        if "mask" in stale:  # no settings describe these masks
            before = ", ".join(name for name in stale if name.startswith(("calibrate", "mask")))
            raise UserError(
                f"{what}: dvc.lock: the inputs of {before} changed after the run, expected masks of the current model "
                "and statistics; run `dvc repro`"
            )
        here = {"runtime": study.params.runtime}  # of this machine instead of the experiment's
        found.study = own_study = own_study.with_params(found.params.model_copy(update=here))
        if others := made_with_others(found):
            raise UserError(f"{what}: {others[0].removesuffix('.')}")
        made_from = describe_pruned(own_study)
        pruned, metrics = digest(made_from), found.made.metrics.get("sparsity")
        finished = own_study.model("recovered") if own_study.params.recovery.tokens else study.model("pruned")
        if own_study.params.recovery.tokens or made:
            made_from = read_provenance(finished, MODEL_COMMANDS[finished.name])
            if made_from.get("pruned", digest(made_from)) != pruned or not metrics:
                raise UserError(f"{what}: models/{finished.name}: found another pruned model's; run `dvc repro`")
            shutil.copytree(finished, work.out, copy_function=copy_file, dirs_exist_ok=True)
        else:
            _, metrics = prune(own_study, work.out)
        write_provenance(work.out, made_from)
        dense = digest(read_provenance(own_study.model("dense"), "download model"))
        for model, own in zip(MODELS, (dense, pruned, digest(made_from)), strict=True):
            found.results[model].keep_of(own)
        found.made.metrics["sparsity"] = metrics
        (work.out / "README.md").write_text(card(own_study, metrics, sections(found)), encoding="utf-8")
        said = [f"{target}: the {list(found.models)[-1]} model of {what}, with a model card"]
        said += [f"{imatrix}: {importance(own_study, temporary_place(imatrix))}"] if imatrix else []
        check_target(study, target)  # another export may have written it
        work.commit(target)
        if imatrix:  # last: with the matrix alone, the same command would be refused
            temporary_place(imatrix).replace(imatrix)
    return "\n".join([*said, *found.notes])


def check_target(study: Study, target: Path) -> Path:
    """Return the absolute path of a directory for a model. UserError unless it is new, or empty and not this one."""
    target = check_outside(study, target)
    for path, own in ((target, set[str]()), (temporary_place(target), {"out"})):  # the second: an unfinished copy
        if is_there(path) and (not path.is_dir() or {one.name for one in path.iterdir()} - own or path.samefile(".")):
            raise UserError(f"{path}: exists already; name a new directory, or an empty one")
    return target


def _take_experiment(study: Study, own_study: Study, experiment: str, parts: list[str]) -> None:
    """Take the files that `apply` reads, and other parts, out of git and the cache."""
    revision = Revision.open(study.root, experiment)

    def take(part: str, what: str) -> None:
        if revision.take(part, own_study.root):
            raise UserError(
                f"{experiment}: {what} not in DVC's cache, expected all of {part}/; `dvc pull --all-commits` fetches "
                f"it from a remote that has it, `dvc exp apply {experiment}` and `dvc exp run` compute it again"
            )

    take("masks", "its masks are")
    if own_study.params.recovery.tokens:
        take("models/recovered", "its recovered model is")
    made = read_provenance(own_study.masks, "mask")
    plan = Plan.read(made["params"])
    parts = parts + {"weights": ["weights"], "gram": ["stats/gram"]}.get(plan.weights_come_from or "", [])
    if plan.weights_come_from == "gram" and plan.solver.uses_fisher:
        parts.append("stats/fisher")
    for part in parts:
        take(part, f"its {part} is")
    wanted = made["model"]
    here = study.model("dense")
    if (here / PROVENANCE).is_file() and read_provenance(here, "download model")["sha256"] == wanted["sha256"]:
        own_study.link_to(study, "models/dense")
    else:
        take("models/dense", f"its dense model ({wanted['source']}) is")


def sections(experiment: Experiment) -> dict[str, str]:
    """Return the sections on the results of an experiment, by their titles."""
    models, params = experiment.models, experiment.params
    said = list(notes({experiment.name: params}, models))
    if params.recovery.tokens:
        made = read_provenance(experiment.study.model("recovered"), MODEL_COMMANDS["recovered"])
        text = params.recovery.text or params.calibration.text
        how = f"on {made.get('tokens', params.recovery.tokens):,} tokens towards the dense model"
        trained = f"All parameters but the zeros were then trained {how}, of {Path(text.source).name}."
        said.append(trained if made["trained"] else f"A training {how} did not help: its weights are not used.")
    results = table(*side_by_side(models, base="dense"))
    found = {"Results": f"{results}\n\n" + "\n".join(f"- {inline(note)}" for note in said)}
    both = (experiment.made, experiment.results[DENSE])
    own, other = (results.details("continuations").get("protocol") for results in both)
    if own and other and not differing(own, other) and (texts := continuations(models, inline)):
        found["Continuations"] = f"Each token is the likeliest one.\n\n{texts}"
    version = read_provenance(experiment.study.masks, "mask")["wanda_dvc"]
    found["Reproduce"] = REPRODUCE.format(version=version, settings=settings_of(experiment.params))
    return found


def settings_of(params: Params) -> str:
    """Return a params.yaml with the given settings. Paths are local, so only their last part is kept."""
    wanted = dict(flatten(params.model_dump(mode="json", exclude={"runtime"}, exclude_unset=True)))
    for setting, source in sources(params).values():
        if Path(source).is_absolute():
            wanted[setting] = f"/path/to/{Path(source).name}"
    text, yaml = io.StringIO(), YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.dump(nested(wanted), text)
    return text.getvalue()
