"""Find candidates for the patterns `blocks` and `smaller`, and measure each as it would be written."""

import math
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
from wanda_dvc.errors import UserError, notice
from wanda_dvc.plan import MEASURED_WINDOWS
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
    """A smaller model."""

    removal: Removal  # with the number of units of each set, and the blocks
    size: float  # its parameters, as a fraction of the dense model's
    predicted: float  # divergence, in nats: measured without the blocks, or a sum, plus half of the other units' costs

    @property
    def units(self) -> dict[str, Units]:
        """The first set of each pattern; the others of a pattern are in proportion."""
        return {pattern: self.removal.unit_sets[names[0]] for pattern, names in self.removal.sets_of.items()}

    def describe(self, divergence: float) -> Json:
        """Describe it with its measured divergence, as the provenance of masks has it."""
        units_kept = {pattern: f"{units.kept}/{units.total}" for pattern, units in self.units.items()}
        (kept,) = self.removal.kept_masks.values()
        numbers = {"size": round(self.size, 4), "predicted": round(self.predicted, 4)}
        removed = {"removed blocks": (~kept).nonzero()[:, 0].tolist()}
        return {**units_kept, **removed, **numbers, "divergence": json_number(divergence)}


def size_of(checkpoint: Checkpoint, removal: Removal) -> Fraction:
    """Return a smaller model's parameters, as a fraction of the dense model's."""
    return Fraction(SmallerCheckpoint(checkpoint, removal).parameters, checkpoint.parameters)


def block_candidates(study: Study, checkpoint: Checkpoint, removal: Removal, device: torch.device) -> list[Candidate]:
    """Return the measured choice of blocks, from stats/blocks; and neighbours, which a repair may help more.

    Without each neighbour alone, the divergence was measured; these have the least sum. UserError if the choice was not
    measured, or the model without it computes something else.
    """
    notice(f"mask: {removal.describe(study.plan.sparsity)}")
    ((name, units),) = removal.unit_sets.items()
    number, choices = units.total - units.kept, inputs.read_choices(study.blocks)
    if number > len(choices):
        problem = f"has choices of up to {len(choices)} blocks, expected {number}"
        raise UserError(f"stats/blocks: {problem}; run `dvc repro` or `wanda-dvc calibrate blocks`")
    choice = choices[number - 1] if number else depth.no_choice(units.total)
    groups: dict[frozenset[int], float] = {frozenset(choice.removed): choice.divergence}
    if study.plan.repairs:
        rises = [math.inf if rise is None else rise for rise in choice.rises]
        starts = range(units.total - number + 1)
        total, first = min((math.fsum(rises[start : start + number]), start) for start in starts)
        if total < math.inf:
            groups.setdefault(frozenset(range(first, first + number)), total)
    candidates = list[Candidate]()
    for removed, predicted in groups.items():
        without = removal.with_kept({name: torch.tensor([block not in removed for block in range(units.total)])})
        try:
            probe(checkpoint, without, device)
        except UserError:
            if not candidates:  # the measured choice
                raise
            continue
        candidates.append(Candidate(without, float(size_of(checkpoint, without)), predicted))
    return candidates


def candidates_of_size(study: Study, checkpoint: Checkpoint, removal: Removal, device: torch.device) -> list[Candidate]:
    """Return the candidates to measure: a number of blocks, of heads, and the widest MLP that then fits the size.

    Those of one pattern come first, then those with the least predicted divergence: the measured one without the
    blocks, and the costs of the units. UserError if none is small enough.
    """
    (blocks_name,) = removal.sets_of["blocks"]
    blocks = removal.unit_sets[blocks_name].total
    dense, costs = DenseModel(checkpoint, removal.structure), read_costs(study, removal)
    candidates, too_large = list[Candidate](), list[float]()
    choices = [depth.no_choice(blocks), *inputs.read_choices(study.blocks)]

    for heads in removal.sparsities_of("heads"):
        for choice in choices:
            kept = torch.tensor([block not in choice.removed for block in range(blocks)])
            start = removal.with_kept({blocks_name: kept}).with_sparsity("heads", heads)
            models = [start.with_sparsity("neurons", neurons) for neurons in removal.sparsities_of("neurons")]
            # The models become smaller: the place of the first one that fits.
            place = bisect_left(models, True, key=lambda model: size_of(checkpoint, model) <= 1 - study.plan.sparsity)
            if place == len(models):
                too_large.append(float(size_of(checkpoint, models[-1])))
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
            candidates.append(Candidate(model, float(size_of(checkpoint, model)), choice.divergence + of_units))
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
    tokens = measured["windows_back"] * measured["params"]["length"]
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
    windows = [TokenSequence(window) for window in inputs.draw_calibration(study, further=1).tokens[:MEASURED_WINDOWS]]

    def run(checkpoint: Checkpoint) -> ModelRunner:
        return ModelRunner(Decoder(checkpoint, dtype=dtype, device=device), work.path / "measured")

    dense = depth.measure_dense(run(Checkpoint(study.model("dense"))), windows)
    for candidate, own_work in tries:
        of_candidate = study.with_params(study.params)  # the same study, with masks of its own
        of_candidate.masks, of_candidate.weights = own_work.output("masks"), own_work.output("weights")
        view = pruned_view(of_candidate, DenseToPruned(of_candidate), candidate.removal)
        yield next(depth.measure_choices(run(view), windows, [[]], dense))
