"""Write the pruned model: the dense checkpoint, byte for byte, with zeros outside the masks, or without units.

A reconstruction gives kept weights new values, solved for here, from stats/gram, or read from weights/.
"""

from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from wanda_dvc.engine.accelerator import float64_device
from wanda_dvc.engine.checkpoint import Address, Checkpoint, EditedCheckpoint, write_model
from wanda_dvc.engine.removal import Removal, SmallerCheckpoint
from wanda_dvc.errors import UserError, shortened
from wanda_dvc.plan import SMALLER, Plan
from wanda_dvc.pruning.reconstruction import check_new_weight, masked, reconstruct
from wanda_dvc.pruning.solvers import GramFactors
from wanda_dvc.stages import STAGES
from wanda_dvc.stages.device import own_device
from wanda_dvc.stages.inputs import removal_of, statistics_provenance
from wanda_dvc.stages.process import progress
from wanda_dvc.study import artifact
from wanda_dvc.study.artifact import PROVENANCE, block_file, check_source, digest, read_provenance
from wanda_dvc.study.files import Json, write_csv, write_json
from wanda_dvc.study.folder import Study
from wanda_dvc.study.tensors import read_grams, read_masks, read_weights


class LinearMeasures(NamedTuple):
    """The measures of one pruned linear."""

    block: int
    zeros: int
    weights: int  # zeros included


def apply(*, study: Study) -> None:
    """models/dense + masks/ + stats/ + weights/ → models/pruned."""
    own_device(study.params.runtime)  # UserError for a device that this machine lacks, before any file is read
    made_from = describe_pruned(study)
    with study.work(made_from) as work:
        folder = work.new()
        measures, metrics = write_pruned(study, folder)
        artifact.write_provenance(folder, made_from)
        work.commit(study.model("pruned"))
    sparsities = {linear: x.zeros / x.weights for linear, x in measures.items()}
    sparsity_rows = [[x.block, linear, x.weights, x.zeros, sparsities[linear]] for linear, x in measures.items()]
    write_json(study.metrics("pruned", "sparsity"), metrics)
    rounded = {linear: round(sparsity, 6) for linear, sparsity in sparsities.items()}
    write_json(study.details("pruned", "sparsity"), rounded)
    write_csv(study.plots("sparsity"), ["block", "linear", "weights", "zeros", "sparsity"], sparsity_rows)


def describe_pruned(study: Study) -> Json:
    """Return the provenance of a study's pruned model. UserError if its inputs do not match."""
    dense, masks = read_provenance(study.model("dense"), "download model"), read_provenance(study.masks, "mask")
    plan = Plan.from_dict(masks["params"])
    check_source("masks", masks["model"], dense, "mask")
    entries: dict[str, str] = {}  # digests of inputs, and the version of the solvers
    if plan.mask_stores_weights:
        weights = read_provenance(study.weights, "mask")
        if weights != masks:
            raise UserError("weights/: made with other masks, expected those in masks/; run `wanda-dvc mask` again")
        entries["weights"] = digest(weights)
    params = {name: value for name, value in masks["calibration"].items() if name != "text"}
    calibrated = {"model": masks["model"], "text": masks["calibration"]["text"], "params": params}
    calibrated["version"] = STAGES["calibrate"].version
    if plan.apply_reconstructs:
        folders = [study.gram, study.fisher] if plan.used_reconstruction.uses_fisher else [study.gram]
        for folder in folders:
            entries[folder.name] = digest(statistics_provenance(folder, calibrated, "masks/"))
        entries["apply"] = str(STAGES["apply"].version)  # new weights follow from how `apply` solves
    # No versions of this run's libraries: they would give equal models different provenance.
    described = {name: value for name, value in masks.items() if name != "blocks"}
    described |= {"made_by": "apply", "masks": digest(masks), "reconstruction": plan.reconstruction.name}
    return described | entries


class DenseToPruned:
    """Reads the tensors of a study's pruned model; `measures` has those of the linears read so far.

    A block's files are opened when its first linear is read; two blocks are in memory at a time.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        self.plan = Plan.from_dict(read_provenance(study.masks, "mask")["params"])
        self.checkpoint = Checkpoint(study.model("dense"))
        self.device = float64_device(own_device(study.params.runtime))
        self.block_of = dict[str, int]()
        for block in range(artifact.block_count(study.masks, "mask")):
            linears = linears_of_masks(study, block, with_gram=self.plan.apply_reconstructs)
            self.block_of |= dict.fromkeys(linears, block)
        self.addresses = {self.checkpoint.find(linear) for linear in self.block_of}
        self.measures = dict[str, LinearMeasures]()
        self.masks_of = lru_cache(maxsize=2)(partial(read_masks, study.masks))
        self.weights_of = lru_cache(maxsize=2)(partial(read_weights, study.weights))
        self.grams_of = lru_cache(maxsize=2)(partial(read_grams, study.gram, device=self.device))
        self.gradient_grams_of = lru_cache(maxsize=2)(partial(read_grams, study.fisher, device=self.device))
        self.factors_of = lru_cache(maxsize=2)(self._factorize)

    def _factorize(self, block: int, name: str) -> GramFactors | None:
        """Return the factors of an input's Gram matrix; None if it was not measured, or no token reached it."""
        grams = self.grams_of(block)
        return GramFactors(grams[name].matrix(), name) if name in grams else None

    def read(self, address: Address) -> Tensor:
        """Return a tensor of the dense model; of a linear, its weights in the pruned model, as stored."""
        stored = self.checkpoint.read(address)
        if address not in self.addresses:
            return stored
        linear, plan = address.linear, self.plan
        block = self.block_of[linear]
        factors = None
        if plan.mask_stores_weights:
            stored = self.weights_of(block).get(linear, stored)
        if plan.apply_reconstructs:
            grams = self.grams_of(block)
            factors = self.factors_of(block, grams.input_of[linear])
        dense = stored if factors is None else stored.to(self.device)
        mask = self.masks_of(block).on(dense.device, linear)
        new = dense
        if factors is not None and mask.any():  # else a removed block's
            reconstruction = plan.used_reconstruction
            gradients = self.gradient_grams_of(block).get(linear) if reconstruction.uses_fisher else None
            new = reconstruct(dense, mask, factors, reconstruction, gradients, transposed=linear in grams.transposed)
            check_new_weight(linear, new)
        weight = masked(new, mask).to(stored.device)
        zeros = weight.numel() - int(weight.count_nonzero())
        self.measures[linear] = LinearMeasures(block, zeros, weight.numel())
        return weight


def linears_of_masks(study: Study, block: int, *, with_gram: bool) -> list[str]:
    """Return the linears of a block's masks, without reading the masks.

    UserError if they are another block's, or, `with_gram`, not those of its Gram matrices.
    """
    masks, gram = block_file(study.masks, block), block_file(study.gram, block)
    _, header = artifact.load_tensors(masks, "mask", lambda _: False)
    linears = list(header["columns"])
    # A block's number is a part of its linears' names. An expert may have that number too; other linears then differ.
    wrong = sorted(linear for linear in linears if str(block) not in linear.split("."))
    if wrong:
        raise UserError(
            f"{masks}: found {shortened(wrong)}, expected linears of block {block}; restore the file with "
            "`dvc checkout masks`, or run `wanda-dvc mask` again"
        )
    differing = sorted(set(linears) ^ read_grams(study.gram, block, of=()).input_of.keys()) if with_gram else []
    if differing:
        problem = f"expected the linears of {gram}, which differ by {shortened(differing)}"
        raise UserError(f"{masks}: {problem}; run `wanda-dvc calibrate` and `wanda-dvc mask` again")
    return linears


def write_pruned(study: Study, target: Path) -> tuple[dict[str, LinearMeasures], Json]:
    """Write a study's pruned checkpoint into an empty folder; return each linear's measures, and metrics.

    `sparsity` is the fraction of the linears' weights that are zero, or of the units that are removed. Of removed
    units, `removed_parameters` is the fraction of the stored weights that are removed; without units, zeros are stored.
    """
    reader = DenseToPruned(study)
    checkpoint, view = reader.checkpoint, pruned_view(study, reader)
    tensors = write_model(view, target, without=(PROVENANCE, "README.md"))  # which describes the dense model
    for _ in progress(tensors, total=len(view.changed), what="apply, tensors"):
        pass
    for linear in reader.block_of:
        if linear not in reader.measures:  # of a removed expert or block
            reader.read(checkpoint.find(linear))
    measures = {linear: reader.measures[linear] for linear in reader.block_of}
    if not isinstance(view, SmallerCheckpoint):
        zeros = sum(of_linear.zeros for of_linear in measures.values())
        return measures, {"sparsity": round(zeros / sum(of_linear.weights for of_linear in measures.values()), 6)}
    removed = 1 - view.parameters / checkpoint.parameters
    sparsity = removed if reader.plan.pattern == SMALLER else view.removal.sparsity
    return measures, {"sparsity": round(sparsity, 6), "removed_parameters": round(removed, 6)}


def pruned_view(study: Study, reader: DenseToPruned, removal: Removal | None = None) -> EditedCheckpoint:
    """Return a view of a study's dense model with the pruned model's weights, and without removed units."""
    removal = removal or removal_of(reader.checkpoint, reader.plan, reader.device)
    if removal is None:
        return EditedCheckpoint(reader.checkpoint, reader.read, reader.addresses)
    kept: dict[str, Tensor] = {}  # units of each set; one may span blocks, as that of the blocks does
    for block in range(artifact.block_count(study.masks, "mask")):
        for name, units in removal.kept_units(read_masks(study.masks, block)).items():
            kept[name] = kept[name] | units if name in kept else units
    return SmallerCheckpoint(reader.checkpoint, removal.with_kept(kept), reader.read, reader.addresses)
