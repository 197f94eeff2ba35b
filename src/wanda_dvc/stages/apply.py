"""Write the pruned model: the dense checkpoint, byte for byte, with zeros outside the masks, or without units.

A reconstruction gives kept weights new values, solved for here, from stats/gram, or read from weights/.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from wanda_dvc.catalog import RECONSTRUCTIONS, SOLVED_UNITS, STRUCTURES
from wanda_dvc.engine.checkpoint import Address, Checkpoint
from wanda_dvc.errors import UserError
from wanda_dvc.pruning.choose import prepare, prune_linear, reconstruct
from wanda_dvc.pruning.selection import count_zeros
from wanda_dvc.pruning.solvers import Prepared
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
    nbytes: int  # of all weights, zeros included
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
        zeros = written.zeros
        work.publish(project.model("pruned"))
    write_json(project.metrics("pruned", "sparsity"), written.metrics)
    write_json(
        project.details("pruned", "sparsity"),
        {linear: round(found.zero / found.size, 6) for linear, found in zeros.items()},
    )
    write_csv(
        project.plots("sparsity"),
        ["block", "linear", "weights", "zeros", "sparsity", "bytes"],
        ([x.block, linear, x.size, x.zero, x.zero / x.size, x.nbytes] for linear, x in zeros.items()),
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
    reconstruction = study.params.chosen_reconstruction.name
    dense, made = read_provenance(study.model("dense"), "download model"), read_provenance(study.masks, "mask")
    if made["model"]["sha256"] != dense["sha256"]:
        raise UserError(
            f"masks/: made for {made['model']['source']}, expected {dense['source']}, the model in models/dense; "
            "run `dvc repro` or `wanda-dvc mask`"
        )
    chosen_with = made["params"].get("reconstruction", reconstruction)  # included if the masks depend on it
    if chosen_with != reconstruction:
        raise UserError(
            f"masks/: chosen with reconstruction {chosen_with}, expected {reconstruction}, as params.yaml has it; "
            "run `dvc repro` or `wanda-dvc mask`"
        )
    # Only the masks' records: with this run's library versions, equal models would have different bytes.
    described = {name: value for name, value in made.items() if name != "blocks"}
    source, from_where = values_from(made, reconstruction), {}
    if source == "weights":
        weights = read_provenance(study.weights, "mask")
        if weights != made:
            raise UserError("weights/: made with other masks, expected those in masks/; run `wanda-dvc mask` again")
        from_where = {"weights": digest(weights)}
    folders = [study.gram] if source == "gram" or block_count(study.gram, "calibrate") else []
    if source == "gram" and reads_gradients(made, reconstruction):
        folders.append(study.gradients)
    for folder in folders:
        gram = read_provenance(folder, "calibrate")
        here = {"model": gram["model"], "calibration": {"text": gram["text"], **gram["params"]}}
        if any(here[name] != made[name] for name in here) or not block_count(folder, "calibrate"):
            raise UserError(
                f"stats/{folder.name}: no Gram matrices of {dense['source']} and the calibration that masks/ name, "
                "expected them; run `dvc repro`, or `wanda-dvc calibrate` with the settings of the masks"
            )
        from_where |= {folder.name: digest(gram)} if source == "gram" else {}
    if source == "gram":  # the weights follow from how `apply` solves, and so do their results
        from_where["apply"] = str(STAGES["apply"].version)
    return described | {"made_by": "apply", "masks": digest(made), "reconstruction": reconstruction} | from_where


def values_from(masks: Json, reconstruction: str) -> Literal["weights", "gram"] | None:
    """Return the source of the kept weights, by the provenance of masks/; None: the dense model."""
    if RECONSTRUCTIONS[reconstruction].function is None:
        return None
    return "weights" if "reconstruction" in masks["params"] else "gram"


def reads_gradients(masks: Json, reconstruction: str) -> bool:
    """Whether a reconstruction reads the Gram matrices of gradients, by the provenance of masks/."""
    return RECONSTRUCTIONS[reconstruction].by_gradients and masks["params"]["pattern"] not in STRUCTURES


class Parts:
    """The parts of a study's pruned model, read a linear at a time."""

    def __init__(self, study: Project, reconstruction: str) -> None:
        self.checkpoint = Checkpoint(study.model("dense"))
        self.reconstruction = RECONSTRUCTIONS[reconstruction]
        self.keeps = [read_masks(study.masks, block) for block in range(block_count(study.masks, "mask"))]
        self.blocks = {linear: block for block, keeps in enumerate(self.keeps) for linear in keeps}
        described = read_provenance(study.masks, "mask")
        self.structure = STRUCTURES.get(described["params"]["pattern"])
        self.share = Fraction(str(described["params"]["sparsity"]))
        self.source = values_from(described, reconstruction)
        stored = block_count(study.weights, "mask") if self.source == "weights" else 0
        self.changed = [read_weights(study.weights, block) for block in range(stored)]
        device = solving_device(study.params.runtime)
        self.grams = [read_grams(study.gram, block, device) for block in range(block_count(study.gram, "calibrate"))]
        self.gradients: list[Grams] = []
        if self.source == "gram" and reads_gradients(described, reconstruction):
            count = block_count(study.gradients, "calibrate")
            self.gradients = [read_grams(study.gradients, block, device) for block in range(count)]
        self._source = {name: read for grams in self.grams for read, names in grams.readers.items() for name in names}
        self._prepared = lru_cache(maxsize=2)(lambda block, source: prepare(self.grams[block][source], source))

    def prepared(self, linear: str) -> "Prepared | None":
        """Return the Gram matrix of a linear's input, or None."""
        block, source = self.blocks[linear], self._source.get(linear)
        return self._prepared(block, source) if source in (self.grams[block] if self.grams else ()) else None

    def make(self, address: Address) -> tuple[Tensor, Zeros]:
        """Return one linear's weights in the pruned model, as stored, and its measures."""
        linear, weight = address.linear, self.checkpoint.read(address)
        block = self.blocks[linear]
        keep, prepared = self.keeps[block][linear], self.prepared(linear)
        if weight.shape != keep.shape:
            raise UserError(
                f"masks/: {linear} is {list(keep.shape)}, expected {list(weight.shape)}; run `wanda-dvc mask` again"
            )
        dense = weight if prepared is None else weight.to(prepared.gram.device)  # once: it crosses the link to a GPU
        keep = keep.to(dense.device)
        transposed = bool(self.grams) and linear in self.grams[block].transposed
        new, solved = None, Json()
        if self.source == "weights":
            weights, diagnostics = self.changed[block]
            new, solved = weights.get(linear), diagnostics.get(linear, {})
        elif self.source == "gram" and prepared is not None:
            reconstruction = SOLVED_UNITS if self.structure else self.reconstruction
            gradients = self.gradients[block].get(linear) if self.gradients else None
            found = reconstruct(
                dense, keep, prepared, reconstruction=reconstruction, gradients=gradients, transposed=transposed
            )
            new, solved = found.weight, found.diagnostics
        of_inputs = self.structure is not None
        made = prune_linear(dense, keep, prepared, new, transposed=transposed, of_inputs=of_inputs)
        made = made._replace(weight=made.weight.to(weight.device))
        zero = count_zeros(made.weight)
        return made.weight, Zeros(block, zero, weight.numel(), weight.nbytes, made.error, made.masked, solved)


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
    """Write a study's pruned checkpoint, model card and provenance into an empty folder; return all measures."""
    made_from, parts = describe_pruned(study), Parts(study, study.params.chosen_reconstruction.name)
    checkpoint, blocks = parts.checkpoint, parts.blocks
    found: dict[str, Zeros] = {}

    def pruned(address: Address) -> Tensor:
        if address.linear not in blocks:  # a norm trained with its block
            return others[address.linear]
        made, found[address.linear] = parts.make(address)
        return made

    others = {name: weight for changed, _ in parts.changed for name, weight in changed.items() if name not in blocks}
    addresses = [checkpoint.find(name) for name in (*blocks, *others)]
    without = (PROVENANCE, CARD)
    if parts.structure is None:
        written = checkpoint.copy(target, addresses, pruned, without=without)
        for _ in progress(written, total=len(addresses), what="apply, weights"):
            pass
        zeros = {linear: found[linear] for linear in blocks}
        result = Written(zeros, sum(x.zero for x in zeros.values()) / sum(x.size for x in zeros.values()))
    else:
        sparsity, removed = _write_smaller(parts, target, addresses, pruned, without)
        for linear in blocks.keys() - found.keys():  # complete experts that went, or that a tensor holds together
            found[linear] = parts.make(checkpoint.find(linear))[1]
        result = Written({linear: found[linear] for linear in blocks}, sparsity, removed)
    (target / CARD).write_text(card(study, result.sparsity, removed=result.removed), encoding="utf-8")
    write_provenance(target, made_from)
    return result


def _write_smaller(
    parts: Parts,
    target: Path,
    addresses: list[Address],
    pruned: Callable[[Address], Tensor],
    without: tuple[str, ...],
) -> tuple[float, float]:
    """Write a checkpoint without the removed units; return the share of the units and of the weights that went."""
    from wanda_dvc.engine.smaller import Smaller, write_smaller  # imports transformers, which takes seconds

    removal = removal_of(parts.checkpoint, parts.structure, parts.share)
    assert removal
    stays = {name: stay for keeps in parts.keeps for name, stay in removal.stays(keeps).items()}
    new = {(address.tensor, address.expert) for address in addresses}
    experts = Counter(address.tensor for address in addresses if address.expert is not None)

    def read(address: Address) -> Tensor:
        if address.expert is None and (count := experts[address.tensor]):  # one tensor holds all of them
            return torch.stack([pruned(Address(address.tensor, expert)) for expert in range(count)])
        return pruned(address) if (address.tensor, address.expert) in new else parts.checkpoint.read(address)

    removal = removal.fitted(stays)
    smaller, tensors = Smaller(parts.checkpoint, removal, stays, read), {address.tensor for address in addresses}
    names = smaller.rewritten(tensors)
    written: Iterator[None] = progress(itertools.repeat(None, len(names)), total=len(names), what="apply, tensors")
    write_smaller(
        smaller, target, replaced=tensors, without=without, progress=lambda piece: piece.name in names and next(written)
    )
    next(written, None)  # the line after the last tensor
    return removal.share, smaller.removed
