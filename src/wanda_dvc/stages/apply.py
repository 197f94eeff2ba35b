"""Write the pruned model: the dense checkpoint, byte for byte, with zeros outside the masks, or without units.

A reconstruction gives kept weights new values, solved for here, from stats/gram, or read from weights/.
"""

import math
import operator
from functools import lru_cache, reduce
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from wanda_dvc.engine.accelerator import solving_device
from wanda_dvc.engine.checkpoint import Address, Checkpoint, EditedCheckpoint, write_model
from wanda_dvc.engine.smaller import SmallerCheckpoint
from wanda_dvc.errors import UserError
from wanda_dvc.plan import Plan
from wanda_dvc.pruning.reconstruction import finite, prune_linear, reconstruct
from wanda_dvc.pruning.solvers import GramFactors
from wanda_dvc.stages import STAGES
from wanda_dvc.stages.device import own_device
from wanda_dvc.stages.inputs import statistics_provenance
from wanda_dvc.stages.mask import removal_of
from wanda_dvc.stages.process import progress
from wanda_dvc.study.artifact import PROVENANCE, block_count, check_source, digest, read_provenance, write_provenance
from wanda_dvc.study.files import Json, write_csv, write_json
from wanda_dvc.study.folder import Study
from wanda_dvc.study.tensors import Grams, read_grams, read_masks, read_weights

CARD = "README.md"


class LinearMeasures(NamedTuple):
    """The measures of one pruned linear."""

    block: int
    zero: int
    size: int  # weights, zeros included
    error: float | None  # ‖(W−Ŵ)X‖² / ‖WX‖² on the dense model's inputs; None without their Gram matrix
    masked: float | None  # likewise, without a reconstruction
    solved: Json  # solver diagnostics


def apply(*, study: Study) -> None:
    """models/dense + masks/ + stats/ + weights/ → models/pruned."""
    own_device(study.params.runtime)  # refused before any file is read
    made_from = describe_pruned(study)
    with study.work(made_from) as work:
        folder = work.new()
        zeros, metrics = prune(study, folder)
        write_provenance(folder, made_from)
        work.commit(study.model("pruned"))
    known = {linear: x for linear, x in zeros.items() if x.error is not None}
    errors = {linear: {"error": x.error, "masked": x.masked} | x.solved for linear, x in known.items()}
    sparsities = {linear: round(x.zero / x.size, 6) for linear, x in zeros.items()}
    write_json(study.metrics("pruned", "sparsity"), metrics)
    write_json(study.details("pruned", "sparsity"), sparsities)
    write_json(study.details("pruned", "layer_error"), {"protocol": {"model": digest(made_from)}, "linears": errors})
    rows: list[list[object]] = [[x.block, linear, x.size, x.zero, x.zero / x.size] for linear, x in zeros.items()]
    write_csv(study.plots("sparsity"), ["block", "linear", "weights", "zeros", "sparsity"], rows)
    rows = [[x.block, linear, x.error, x.masked] for linear, x in known.items()]
    write_csv(study.plots("layer_error"), ["block", "linear", "error", "masked"], rows)


def describe_pruned(study: Study) -> Json:
    """Return the provenance of a study's pruned model. UserError if its parts do not match."""
    dense, made = read_provenance(study.model("dense"), "download model"), read_provenance(study.masks, "mask")
    plan = Plan.read(made["params"])
    check_source("masks", made["model"], dense, "mask")
    read: dict[str, str] = {}
    if plan.weights_come_from == "weights":
        weights = read_provenance(study.weights, "mask")
        if weights != made:
            raise UserError("weights/: made with other masks, expected those in masks/; run `wanda-dvc mask` again")
        read["weights"] = digest(weights)
    solves = plan.weights_come_from == "gram"
    params = {name: value for name, value in made["calibration"].items() if name != "text"}
    calibrated = {"model": made["model"], "text": made["calibration"]["text"], "params": params}
    folders = [study.gram] if solves or block_count(study.gram, "calibrate") else []  # of layer errors, too
    for folder in [*folders, study.fisher] if solves and plan.solver.uses_fisher else folders:
        tier = statistics_provenance(folder, calibrated, "masks/")
        read |= {folder.name: digest(tier)} if solves else {}
    if solves:  # the weights follow from how `apply` solves, and so do their results
        read["apply"] = str(STAGES["apply"].version)
    # Only the masks' records: with this run's library versions, equal models would have different bytes.
    described = {name: value for name, value in made.items() if name != "blocks"}
    return described | {"made_by": "apply", "masks": digest(made), "reconstruction": plan.reconstruction.name} | read


class PrunedLinears:
    """The parts of a study's pruned model, read a linear at a time; `zeros` has the measures of those read so far."""

    def __init__(self, study: Study) -> None:
        self.plan = plan = Plan.read(read_provenance(study.masks, "mask")["params"])
        self.checkpoint, device = Checkpoint(study.model("dense")), solving_device(own_device(study.params.runtime))
        blocks = range(block_count(study.masks, "mask"))
        masks = [read_masks(study.masks, block) for block in blocks]
        self.blocks = {linear: block for block, keeps in enumerate(masks) for linear in keeps}
        self.addresses = {self.checkpoint.find(linear) for linear in self.blocks}
        self.keeps, self.zeros = reduce(operator.or_, masks), dict[str, LinearMeasures]()
        self.changed, self.fisher = list[tuple[dict[str, Tensor], Json]](), list[Grams]()
        if plan.weights_come_from == "weights":
            self.changed = [read_weights(study.weights, block) for block in blocks]
        elif plan.weights_come_from == "gram" and plan.solver.uses_fisher:
            self.fisher = [read_grams(study.fisher, block, device) for block in blocks]
        measured = 0 if plan.repairs else block_count(study.gram, "calibrate")  # a repaired linear differs on purpose
        self.grams = [read_grams(study.gram, block, device) for block in range(measured)]
        self._source = {name: read for grams in self.grams for read, names in grams.consumers.items() for name in names}
        self._prepared = lru_cache(maxsize=2)(lambda block, source: GramFactors(self.grams[block][source].matrix()))

    def read(self, address: Address) -> Tensor:
        """Return a tensor of the dense model; of a linear, its weights in the pruned model, as stored."""
        linear, weight = address.linear, self.checkpoint.read(address)
        if address not in self.addresses:
            return weight
        block = self.blocks[linear]
        keep, source = self.keeps[linear], self._source.get(linear)
        prepared = self._prepared(block, source) if self.grams and source in self.grams[block] else None
        dense = weight if prepared is None else weight.to(prepared.gram.device)  # once: it crosses the link to a GPU
        keep = keep.to(dense.device)
        transposed = bool(self.grams) and linear in self.grams[block].transposed
        new, solved = None, Json()
        if self.changed:
            weights, diagnostics = self.changed[block]
            new, solved = weights.get(linear), diagnostics.get(linear, {})
        elif self.plan.solves and prepared is not None:
            gradients = self.fisher[block].get(linear) if self.fisher else None
            found = reconstruct(
                dense, keep, prepared, reconstruction=self.plan.solver, gradients=gradients, transposed=transposed
            )
            new, solved = finite(linear, found.weight), found.diagnostics
        of_inputs = self.plan.structure is not None
        made = prune_linear(dense, keep, prepared, new, transposed=transposed, of_inputs=of_inputs)
        pruned = made.weight.to(weight.device)
        zero = weight.numel() - int(pruned.count_nonzero())
        self.zeros[linear] = LinearMeasures(block, zero, weight.numel(), made.error, made.masked, solved)
        return pruned


def prune(study: Study, target: Path) -> tuple[dict[str, LinearMeasures], Json]:
    """Write a study's pruned checkpoint into an empty folder; return each linear's measures, and metrics.

    `sparsity` is the share of the linears' weights that are zero, or of the units that were removed. Of removed units,
    `removed_parameters` is the share of the stored weights that went; without units, zeros are stored.
    """
    parts = PrunedLinears(study)
    checkpoint = parts.checkpoint
    view, removal = EditedCheckpoint(checkpoint, parts.read, parts.addresses), removal_of(checkpoint, parts.plan)
    if removal:
        kept = removal.kept_units(parts.keeps)
        view = SmallerCheckpoint(checkpoint, removal.with_kept(kept), parts.read, parts.addresses)
    written = write_model(view, target, without=(PROVENANCE, CARD))
    list(progress(written, total=sum(name is not None for name in view.new_names.values()), what="apply, tensors"))
    for linear in parts.blocks.keys() - parts.zeros.keys():  # of complete experts or blocks that went
        parts.read(checkpoint.find(linear))
    zeros = {linear: parts.zeros[linear] for linear in parts.blocks}
    if removal is None:
        return zeros, {"sparsity": round(sum(x.zero for x in zeros.values()) / sum(x.size for x in zeros.values()), 6)}
    left, every = (sum(math.prod(x.shape) for x in one.entries.values()) for one in (view, checkpoint))
    return zeros, {"sparsity": round(removal.sparsity, 6), "removed_parameters": round(1 - left / every, 6)}
