"""Build the pruned model of any experiment in a new directory. The workspace is only read."""

import io
import json
import shutil
from pathlib import Path

from ruamel.yaml import YAML

from wanda_dvc.commands import check_target
from wanda_dvc.errors import UserError
from wanda_dvc.params import Params, download_sources
from wanda_dvc.plan import Plan
from wanda_dvc.reading import is_there
from wanda_dvc.results.card import card
from wanda_dvc.results.compare import DENSE, side_by_side
from wanda_dvc.results.current import other_settings, stale_stages
from wanda_dvc.results.experiments import Experiment, read_at, workspace
from wanda_dvc.results.listing import WORKSPACE
from wanda_dvc.results.markup import inline, table
from wanda_dvc.results.show import table_notes
from wanda_dvc.stages.apply import apply, describe_pruned
from wanda_dvc.study import artifact
from wanda_dvc.study.artifact import MODEL_COMMANDS, PROVENANCE, digest, read_provenance
from wanda_dvc.study.dvc import Revision, copy_file, link_file
from wanda_dvc.study.files import load_json
from wanda_dvc.study.folder import Study
from wanda_dvc.study.lock import LOCK, Lock

MODEL_CARD = "README.md"
REPRODUCE = """\
With wanda-dvc {version}, `wanda-dvc init study`, these settings in `params.yaml`, and `dvc repro`:

````yaml
{settings}````"""


def export(*, study: Study, experiment: str | None, target: Path) -> str:
    """Write the pruned model of an experiment, by default the workspace, into a new directory for transformers."""
    revision = None if experiment == WORKSPACE else experiment
    what = revision or "the workspace"
    with study.work({"kind": "export", "experiment": revision}) as work:
        work.discard()  # the links of a killed export
        exported = _collect(study, revision, work.path / "study")
        lock = Lock.read(exported.study.root)
        if "mask" in stale_stages(lock, lock.settings):  # no settings describe these masks
            raise UserError(f"{what}: dvc.lock: the inputs of mask changed after the run; run `dvc repro`")
        for problem in other_settings(exported.study):
            raise UserError(f"{what}: {problem.removesuffix('.')}")
        links, pruned = exported.study, describe_pruned(exported.study)
        dense = read_provenance(links.model("dense"), "download model")
        recovered = load_json(links.model("recovered") / PROVENANCE)
        for model, provenance in (("dense", dense), ("pruned", pruned), ("recovered", recovered)):
            exported.results[model].leave_out_others(digest(provenance))
        if not exported.params.recovery.tokens:
            apply(study=links)
            exported.final.metrics["sparsity"] = load_json(links.metrics("pruned", "sparsity"))
        elif recovered.get("pruned") != digest(pruned) or "sparsity" not in exported.final.metrics:
            raise UserError(f"{what}: models/recovered: found another pruned model's; run `dvc repro`")
        move_model(exported, target)
        work.discard()
    model = list(exported.models)[-1]
    return "\n".join([f"{target}: the {model} model of {what}, with a model card", *exported.notes])


def move_model(experiment: Experiment, target: Path) -> None:
    """Move the pruned model that `apply` has just written in a study to a new directory, and add its model card.

    The study then has no second copy: `apply` writes it again where a stage reads it. A recovered model is copied,
    because DVC has it. After an error, such as a full disk, the target is missing and the study has its model.
    """
    study, recovers = experiment.study, experiment.params.recovery.tokens > 0
    model, copy = (study.model("recovered"), copy_file) if recovers else (study.model("pruned"), link_file)
    content = card(study, experiment.final.metrics["sparsity"], sections(experiment))
    with study.work({"kind": "move", "target": str(target)}) as work:
        shutil.copytree(model, work.new(), copy_function=copy, dirs_exist_ok=True)
        (work.out / MODEL_CARD).write_text(content, encoding="utf-8")
        check_target(study, target)
        work.commit(target)
    artifact.remove(study.model("pruned"))


def _collect(study: Study, revision: str | None, folder: Path) -> Experiment:
    """Return an experiment whose files are links in a new folder, with this machine's runtime settings."""
    links = Study(folder)
    links.root.mkdir(parents=True)
    if revision is None:
        experiment = workspace(study)
        read_provenance(study.masks, "mask")  # UserError without masks
        names = ("models/dense", "models/recovered", "masks", "stats", "weights", "params.yaml", LOCK)
        links.link_to(study, *names)
    else:
        experiment = read_at(study, revision, links.root)
        _take_inputs(study, links, revision, recovers=experiment.params.recovery.tokens > 0)
    params = experiment.params.model_copy(update={"runtime": study.params.runtime})
    experiment.study = links.with_params(params)
    return experiment


def _take_inputs(study: Study, links: Study, revision: str, *, recovers: bool) -> None:
    """Take the files that `apply` reads out of git and the cache. UserError if one is missing there."""
    commit = Revision.open(study.root, revision)

    def take(name: str) -> None:
        if commit.take(name, links.root):
            raise UserError(
                f"{revision}: its {name}/ is not complete in DVC's cache; `dvc pull --all-commits` fetches it from a "
                f"remote that has it, `dvc exp apply {revision}` and `dvc exp run` compute it again"
            )

    take("masks")
    if recovers:
        take("models/recovered")
    masks = read_provenance(links.masks, "mask")
    plan = Plan.from_dict(masks["params"])
    if plan.mask_stores_weights:
        take("weights")
    if plan.apply_reconstructs:
        take("stats/gram")
        if plan.used_reconstruction.uses_fisher:
            take("stats/fisher")
    expected, dense = masks["model"], study.model("dense")
    if is_there(dense / PROVENANCE) and read_provenance(dense, "download model")["sha256"] == expected["sha256"]:
        links.link_to(study, "models/dense")
    else:
        take("models/dense")


def sections(experiment: Experiment) -> dict[str, str]:
    """Return the sections on the results of an experiment, by their titles."""
    models, params = experiment.models, experiment.params
    sentences = list(table_notes({experiment.name: params}, models))
    if params.recovery.tokens:
        provenance = read_provenance(experiment.study.model("recovered"), MODEL_COMMANDS["recovered"])
        training = f"on {provenance['tokens']:,} tokens towards the dense model"
        names = " and ".join(Path(text.source).name for text in params.training_texts)
        sentence = f"All parameters but the zeros were then trained {training}, of {names}."
        if not provenance["trained"]:
            sentence = f"A training {training} did not help: its weights are not used."
        sentences.append(sentence)
    results = table(*side_by_side(models, base=DENSE))
    by_title = {"Results": f"{results}\n\n" + "\n".join(f"- {inline(sentence)}" for sentence in sentences)}
    version = read_provenance(experiment.study.masks, "mask")["wanda_dvc"]
    by_title["Reproduce"] = REPRODUCE.format(version=version, settings=settings_of(params))
    return by_title


def settings_of(params: Params) -> str:
    """Return a params.yaml with the given settings. Paths are local, so only their last part is kept."""
    text = json.dumps(params.model_dump(mode="json", exclude={"runtime"}, exclude_unset=True))
    for _, source in download_sources(params).values():
        if Path(source).is_absolute():
            text = text.replace(json.dumps(source), json.dumps(f"/path/to/{Path(source).name}"))
    stream, yaml = io.StringIO(), YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.dump(json.loads(text), stream)
    return stream.getvalue()
