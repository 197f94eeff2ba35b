"""Choose how many blocks, heads and neurons a model of a requested size keeps, for the pattern `smaller`.

A candidate is a number of blocks, a number of heads, and the widest MLP that then fits the size. The measured
divergence without the blocks and the costs of the units predict its divergence; the best candidates are measured.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from wanda_dvc.catalog import STRUCTURES
from wanda_dvc.engine import depth
from wanda_dvc.engine.checkpoint import Checkpoint
from wanda_dvc.engine.decoder import Decoder
from wanda_dvc.engine.finders import DenseModel, find_block_units
from wanda_dvc.engine.forward import ModelRunner
from wanda_dvc.engine.probe import probe
from wanda_dvc.engine.removal import Removal, SmallerCheckpoint
from wanda_dvc.engine.sequences import TokenSequence
from wanda_dvc.errors import UserError
from wanda_dvc.plan import WINDOWS_BACK
from wanda_dvc.pruning.units import Units
from wanda_dvc.stages import inputs
from wanda_dvc.stages.apply import DenseToPruned, pruned_view
from wanda_dvc.stages.device import own_device
from wanda_dvc.study import tensors
from wanda_dvc.study.artifact import Work, read_provenance
from wanda_dvc.study.files import Json, json_number
from wanda_dvc.study.folder import Study

MEASURED = 6  # candidates, at most


class Candidate(NamedTuple):
    """A smaller model of at most the requested size."""

    removal: Removal  # with the number of units of each set, and the blocks
    size: float  # its parameters, as a fraction of the dense model's
    predicted: float  # divergence without the blocks, plus half of the costs of the other removed units, in nats

    @property
    def units(self) -> dict[str, Units]:
        """The first set of each pattern; the others of a pattern are in proportion."""
        return {pattern: self.removal.unit_sets[names[0]] for pattern, names in self.removal.sets_of.items()}

    def describe(self, divergence: float) -> Json:
        """Describe it with its measured divergence, as the provenance of masks has it."""
        kept = {pattern: f"{units.kept}/{units.total}" for pattern, units in self.units.items()}
        numbers = {"size": round(self.size, 4), "predicted": round(self.predicted, 4)}
        return {**kept, **numbers, "divergence": json_number(divergence)}


def find_candidates(study: Study, checkpoint: Checkpoint, removal: Removal, device: torch.device) -> list[Candidate]:
    """Return the candidates to measure: those of one pattern first, then those with the least predicted divergence.

    UserError if none is small enough.
    """
    (blocks_name,) = removal.sets_of["blocks"]
    blocks = removal.unit_sets[blocks_name].total
    dense, costs = DenseModel(checkpoint, removal.structure), read_costs(study, removal)
    candidates, too_large = list[Candidate](), list[float]()
    choices = [depth.no_choice(blocks), *inputs.read_choices(study.blocks)]

    def size_of(model: Removal) -> Fraction:
        return Fraction(SmallerCheckpoint(checkpoint, model).parameters, checkpoint.parameters)

    for heads in removal.sparsities_of("heads"):
        for choice in choices:
            kept = torch.tensor([block not in choice.removed for block in range(blocks)])
            start = removal.with_kept({blocks_name: kept}).with_sparsity("heads", heads)
            models = [start.with_sparsity("neurons", neurons) for neurons in removal.sparsities_of("neurons")]
            # The models become smaller: the place of the first one that fits.
            place = bisect_left(models, True, key=lambda model: size_of(model) <= 1 - study.plan.sparsity)
            if place == len(models):
                too_large.append(float(size_of(models[-1])))
                continue
            model = models[place]
            try:  # heads may not divide the width, or blocks change their kind
                dense.build(model.config_changes)
                DenseModel(SmallerCheckpoint(checkpoint, model), removal.structure)
            except UserError:
                continue
            of_units = 0.0
            for name, (block, cost) in costs.items():
                if kept[block]:
                    of_units += cost[model.unit_sets[name].total - model.unit_sets[name].kept].item()
            candidates.append(Candidate(model, float(size_of(model)), choice.divergence + of_units))
            if place == 0:  # all neurons stay: more blocks or heads would leave a smaller model than requested
                del choices[len(choice.removed) :]
    if not candidates:
        sizes = " and ".join(f"{1 - size - 5e-4:.3f}" for size in sorted(too_large)[:2])
        found = f"sparsity: got {float(study.plan.sparsity):g}, expected at most {sizes}"
        raise UserError(f"{found}, of the smallest models; set one of these or less")
    # Whether it removes units of several patterns, then what is predicted.
    candidates.sort(key=lambda x: (sum(units.kept < units.total for units in x.units.values()) > 1, x.predicted))
    return list(islice(_working(checkpoint, candidates, device), MEASURED))


def _working(checkpoint: Checkpoint, candidates: Iterable[Candidate], device: torch.device) -> Iterator[Candidate]:
    """Yield the candidates whose blocks compute the same without the removed ones."""
    blocks = find_block_units(checkpoint, STRUCTURES["blocks"], Fraction(0), device)
    refused = set[tuple[bool, ...]]()
    for candidate in candidates:
        (kept,) = candidate.removal.kept_masks.values()
        if tuple(kept.tolist()) not in refused:
            try:
                probe(checkpoint, blocks.with_kept(candidate.removal.kept_masks), device)
                yield candidate
            except UserError:
                refused.add(tuple(kept.tolist()))


def read_costs(study: Study, removal: Removal) -> dict[str, tuple[int, Tensor]]:
    """Return the block of each set of heads or neurons, and the cost without its 0, 1, 2, … cheapest units, in nats."""
    measured = read_provenance(study.fisher, "calibrate")
    tokens = measured["windows"] * measured["params"]["length"]
    costs = {}
    for block in range(measured["blocks"]):
        for linear, by_number in tensors.read_fisher(study.fisher, block)[1].items():
            if linear in removal.consumers:
                name = removal.consumers[linear].unit_set
                cheapest = by_number[removal.unit_sets[name].total].double().sort().values
                costs[name] = block, torch.cat([cheapest.new_zeros(1), cheapest.cumsum(0)]) / (2 * tokens)
    return costs


def measure_candidates(study: Study, tries: Iterable[tuple[Candidate, Work]], work: Work) -> Iterator[float]:
    """Yield the divergence of each candidate, whose masks and weights are in a work folder of its own.

    Measured on windows of the calibration's text, by another seed than the calibration's.
    """
    dtype, device = getattr(torch, inputs.model_dtype(study)), own_device(study.params.runtime)
    windows = [TokenSequence(window) for window in inputs.draw_calibration(study, further=1).tokens[:WINDOWS_BACK]]

    def run(checkpoint: Checkpoint) -> ModelRunner:
        return ModelRunner(Decoder(checkpoint, dtype=dtype, device=device), work.path / "measured")

    dense = depth.measure_dense(run(Checkpoint(study.model("dense"))), windows)
    for candidate, own_work in tries:
        of_candidate = study.with_params(study.params)  # the same study, with masks of its own
        of_candidate.masks, of_candidate.weights = own_work.output("masks"), own_work.output("weights")
        view = pruned_view(of_candidate, DenseToPruned(of_candidate), candidate.removal)
        yield next(depth.measure_choices(run(view), windows, [[]], dense))
