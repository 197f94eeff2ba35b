"""Write the pruned model: the dense checkpoint, byte for byte, with zeros outside the masks, or without units.

A reconstruction gives kept weights new values, solved for here, from stats/gram, or read from weights/.
"""

import math
import operator
from functools import lru_cache, reduce
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from wanda_dvc.engine.checkpoint import Address, Changed, Checkpoint, write_model
from wanda_dvc.errors import UserError
from wanda_dvc.plan import Plan
from wanda_dvc.pruning.choose import prepare, prune_linear, reconstruct
from wanda_dvc.pruning.selection import count_zeros
from wanda_dvc.stages import STAGES
from wanda_dvc.stages.mask import removal_of
from wanda_dvc.stages.running import progress, solving_device
from wanda_dvc.study.card import card
from wanda_dvc.study.files import Json, write_csv, write_json
from wanda_dvc.study.project import Project
from wanda_dvc.study.provenance import PROVENANCE, digest, read_provenance, write_provenance
from wanda_dvc.study.tensors import Grams, block_count, read_grams, read_masks, read_weights

CARD = "README.md"


class Zeros(NamedTuple):
    """The measures of one pruned linear."""

    block: int
    zero: int
    size: int  # weights, zeros included
    error: float | None  # ‖(W−Ŵ)X‖² / ‖WX‖² on the dense model's inputs; None without their Gram matrix
    masked: float | None  # likewise, without a reconstruction
    solved: Json  # solver diagnostics


def apply(*, project: Project) -> None:
    """models/dense + masks/ + stats/ + weights/ → models/pruned."""
    solving_device(project.params.runtime)  # refused before any file is read
    made_from = describe_pruned(project)
    with project.work(made_from) as work:
        folder = work.fresh()
        written = prune(project, folder)
        write_provenance(folder, made_from)
        work.publish(project.model("pruned"))
    zeros = written.zeros
    write_json(project.metrics("pruned", "sparsity"), written.metrics)
    write_json(
        project.details("pruned", "sparsity"),
        {linear: round(found.zero / found.size, 6) for linear, found in zeros.items()},
    )
    write_csv(
        project.plots("sparsity"),
        ["block", "linear", "weights", "zeros", "sparsity"],
        ([x.block, linear, x.size, x.zero, x.zero / x.size] for linear, x in zeros.items()),
    )
    measured = {linear: x for linear, x in zeros.items() if x.error is not None}
    write_json(
        project.details("pruned", "layer_error"),
        {
            "protocol": {"model": digest(made_from)},
            "linears": {linear: {"error": x.error, "masked": x.masked} | x.solved for linear, x in measured.items()},
        },
    )
    write_csv(
        project.plots("layer_error"),
        ["block", "linear", "error", "masked"],
        ([x.block, linear, x.error, x.masked] for linear, x in measured.items()),
    )


def describe_pruned(study: Project) -> Json:
    """Return the provenance of a study's pruned model. UserError if its parts do not match."""
    dense, made = read_provenance(study.model("dense"), "download model"), read_provenance(study.masks, "mask")
    plan = Plan.read(made["params"])
    if made["model"]["sha256"] != dense["sha256"]:
        raise UserError(
            f"masks/: made for {made['model']['source']}, expected {dense['source']}, the model in models/dense; "
            "run `dvc repro` or `wanda-dvc mask`"
        )
    read: dict[str, str] = {}
    if plan.weights_come_from == "weights":
        weights = read_provenance(study.weights, "mask")
        if weights != made:
            raise UserError("weights/: made with other masks, expected those in masks/; run `wanda-dvc mask` again")
        read["weights"] = digest(weights)
    solves = plan.weights_come_from == "gram"
    folders = [study.gram] if solves or block_count(study.gram, "calibrate") else []  # of layer errors, too
    for folder in [*folders, study.gradients] if solves and plan.solver.by_gradients else folders:
        gram = read_provenance(folder, "calibrate")
        here = {"model": gram["model"], "calibration": {"text": gram["text"], **gram["params"]}}
        if any(here[name] != made[name] for name in here) or not block_count(folder, "calibrate"):
            raise UserError(
                f"stats/{folder.name}: no Gram matrices of {dense['source']} and the calibration that masks/ name, "
                "expected them; run `dvc repro`, or `wanda-dvc calibrate` with the settings of the masks"
            )
        read |= {folder.name: digest(gram)} if solves else {}
    if solves:  # the weights follow from how `apply` solves, and so do their results
        read["apply"] = str(STAGES["apply"].version)
    # Only the masks' records: with this run's library versions, equal models would have different bytes.
    described = {name: value for name, value in made.items() if name != "blocks"}
    return described | {"made_by": "apply", "masks": digest(made), "reconstruction": plan.reconstruction.name} | read


class Parts:
    """The parts of a study's pruned model, read a linear at a time."""

    def __init__(self, study: Project) -> None:
        self.plan = plan = Plan.read(read_provenance(study.masks, "mask")["params"])
        self.checkpoint, device = Checkpoint(study.model("dense")), solving_device(study.params.runtime)
        blocks = range(block_count(study.masks, "mask"))
        self.keeps = [read_masks(study.masks, block) for block in blocks]
        self.blocks = {linear: block for block, keeps in enumerate(self.keeps) for linear in keeps}
        self.changed, self.gradients = list[tuple[dict[str, Tensor], Json]](), list[Grams]()
        if plan.weights_come_from == "weights":
            self.changed = [read_weights(study.weights, block) for block in blocks]
        elif plan.weights_come_from == "gram" and plan.solver.by_gradients:
            self.gradients = [read_grams(study.gradients, block, device) for block in blocks]
        self.grams = [read_grams(study.gram, block, device) for block in range(block_count(study.gram, "calibrate"))]
        self._source = {name: read for grams in self.grams for read, names in grams.readers.items() for name in names}
        self._prepared = lru_cache(maxsize=2)(lambda block, source: prepare(self.grams[block][source], source))

    def make(self, address: Address) -> tuple[Tensor, Zeros]:
        """Return one linear's weights in the pruned model, as stored, and its measures."""
        linear, weight = address.linear, self.checkpoint.read(address)
        block = self.blocks[linear]
        keep, source = self.keeps[block][linear], self._source.get(linear)
        prepared = self._prepared(block, source) if self.grams and source in self.grams[block] else None
        if weight.shape != keep.shape:
            raise UserError(
                f"masks/: {linear} is {list(keep.shape)}, expected {list(weight.shape)}; run `wanda-dvc mask` again"
            )
        dense = weight if prepared is None else weight.to(prepared.gram.device)  # once: it crosses the link to a GPU
        keep = keep.to(dense.device)
        transposed = bool(self.grams) and linear in self.grams[block].transposed
        new, solved = None, Json()
        if self.changed:
            weights, diagnostics = self.changed[block]
            new, solved = weights.get(linear), diagnostics.get(linear, {})
        elif self.plan.solves and prepared is not None:
            gradients = self.gradients[block].get(linear) if self.gradients else None
            found = reconstruct(
                dense, keep, prepared, reconstruction=self.plan.solver, gradients=gradients, transposed=transposed
            )
            new, solved = found.weight, found.diagnostics
            if not new.isfinite().all():
                raise UserError(f"{linear}: new weights that are not finite in {new.dtype}; set reconstruction=none")
        of_inputs = self.plan.structure is not None
        made = prune_linear(dense, keep, prepared, new, transposed=transposed, of_inputs=of_inputs)
        made = made._replace(weight=made.weight.to(weight.device))
        zero = count_zeros(made.weight)
        return made.weight, Zeros(block, zero, weight.numel(), made.error, made.masked, solved)


class Written(NamedTuple):
    """A pruned checkpoint."""

    zeros: dict[str, Zeros]  # the measures of each linear; removed weights count as zeros
    sparsity: float  # the share of the linears' weights that are zero, or of the units that were removed
    removed: float | None = None  # the share of the stored weights that was removed; None: zeros are stored

    @property
    def metrics(self) -> Json:
        """The content of metrics/pruned/sparsity.json."""
        removed = {} if self.removed is None else {"removed_parameters": round(self.removed, 6)}
        return {"sparsity": round(self.sparsity, 6)} | removed


def prune(study: Project, target: Path) -> Written:
    """Write a study's pruned checkpoint and model card into an empty folder; return all measures."""
    parts = Parts(study)
    checkpoint, blocks = parts.checkpoint, parts.blocks
    found: dict[str, Zeros] = {}

    def pruned(address: Address) -> Tensor:
        if address.linear not in blocks:  # a norm trained with its block
            return others[address.linear]
        made, found[address.linear] = parts.make(address)
        return made

    others = {name: weight for changed, _ in parts.changed for name, weight in changed.items() if name not in blocks}
    addresses = {checkpoint.find(name) for name in (*blocks, *others)}

    def read(address: Address) -> Tensor:
        return pruned(address) if address in addresses else checkpoint.read(address)

    removal = removal_of(checkpoint, parts.plan.structure, parts.plan.share)
    if removal is None:
        view = Changed(checkpoint, read, addresses)
    else:
        from wanda_dvc.engine.removal import Smaller  # imports transformers, which takes seconds

        stays = removal.stays_in(reduce(operator.or_, parts.keeps))
        view = Smaller(checkpoint, removal.with_stays(stays), read, addresses)
    written = write_model(view, target, without=(PROVENANCE, CARD))
    for _ in progress(written, total=sum(name is not None for name in view.new.values()), what="apply, tensors"):
        pass
    for linear in blocks.keys() - found.keys():  # of complete experts or blocks that went
        found[linear] = parts.make(checkpoint.find(linear))[1]
    zeros = {linear: found[linear] for linear in blocks}
    if removal is None:
        result = Written(zeros, sum(x.zero for x in zeros.values()) / sum(x.size for x in zeros.values()))
    else:
        left, every = (sum(math.prod(x.shape) for x in one.entries.values()) for one in (view, checkpoint))
        result = Written(zeros, removal.share, 1 - left / every)
    (target / CARD).write_text(card(study, result.sparsity, removed=result.removed), encoding="utf-8")
    return result
