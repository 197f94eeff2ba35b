"""Compares a smaller model with the full model that computes without the removed units."""

import gc
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.overrides import TorchFunctionMode

from wanda_dvc.engine.checkpoint import Checkpoint
from wanda_dvc.engine.decoder import Decoder
from wanda_dvc.engine.load import WeightChange
from wanda_dvc.engine.removal import Removal, SmallerCheckpoint, dimension_mask, refused
from wanda_dvc.engine.sequences import States, TokenSequence
from wanda_dvc.errors import UserError, is_out_of_memory

TOKENS = 32
PRODUCTS = ("linear", "matmul", "__matmul__", "mm", "bmm")  # by a router's weight


class MaskedRun(NamedTuple):
    """A block's run in the full model."""

    block: int  # its number in the smaller model
    before: States
    dense: States  # after the block with all units; if blocks are removed, `before`: the effect is all that it adds
    masked: States  # after the block without the removed units


@torch.no_grad()
def probe(source: Checkpoint, removal: Removal, device: torch.device) -> None:
    """Raise UserError if a smaller model differs from the full model without the removed units.

    Random tokens run through one block of each kind in both models, or through all if blocks are removed, on a device
    and in float32. One of the models is in memory at a time.
    """
    try:
        full = Decoder(source, dtype=torch.float32, device=device)
        vocabulary = full.model.get_input_embeddings().weight.shape[0]
        sequence = TokenSequence(torch.randint(vocabulary, (TOKENS,), generator=torch.Generator().manual_seed(0)))
        # The tolerance is relative to the effect of the removed units. It is smaller for blocks, to refuse those that
        # depend on the number of blocks, which differ by little.
        if full.loader.blocks_name in removal.unit_sets:
            runs, tolerance = _run_kept_blocks(full, removal, sequence), 1e-3
        else:
            runs, tolerance = _run_each_kind(full, removal, sequence), 1e-2
        del full
        gc.collect()
        small = Decoder(SmallerCheckpoint(source, removal), dtype=torch.float32, device=device)
        for run in runs:
            small.load(run.block, -1)
            difference = vector_norm(small.run(run.block, run.before, sequence) - run.masked).item()
            effect = vector_norm(run.masked - run.dense).item()
            size = vector_norm(run.dense).item()
            if not difference <= tolerance * max(effect, 1e-4 * size):
                raise ValueError(f"its block {run.block} computes something else without them: off by {difference:.2g}")
    except (UserError, RuntimeError, ValueError, IndexError) as error:
        if is_out_of_memory(error):
            raise
        problem = f"a smaller model fails its trial ({' '.join(str(error).split())[:200]})"
        raise refused(removal.structure, source, problem) from error


def _run_kept_blocks(full: Decoder, removal: Removal, sequence: TokenSequence) -> list[MaskedRun]:
    hidden, runs = full.embed(sequence), []
    kept = removal.kept_masks[full.loader.blocks_name].nonzero()[:, 0].tolist()
    for number, index in enumerate(kept):
        full.load(index, -1)
        after = full.run(index, hidden, sequence)
        runs.append(MaskedRun(number, hidden, hidden, after))
        hidden = after
    return runs


def _run_each_kind(full: Decoder, removal: Removal, sequence: TokenSequence) -> list[MaskedRun]:
    """Run a block of each kind on the embeddings: consumers read zeros, and routers never choose removed experts."""
    hidden, runs = full.embed(sequence), []
    for index in full.one_of_each_kind:
        full.load(index, -1)
        dense = full.run(index, hidden, sequence)
        consumers = full.linears(index).keys() & removal.consumers.keys()
        masks = {linear: dimension_mask(removal.consumers[linear], removal.kept_masks) for linear in consumers}
        full.load(index, -1, WeightChange(masks, {}))
        with MaskedRouters(full.model, removal):
            masked = full.run(index, hidden, sequence)
        runs.append(MaskedRun(index, hidden, dense, masked))
    return runs


class MaskedRouters(TorchFunctionMode):
    """Sets the scores of removed experts to −∞ in a loaded model: where a router multiplies tokens, or adds a bias.

    A router computes scores and chooses experts in one call, so no hook of a module sees the scores before the choice.
    """

    def __init__(self, model: nn.Module, removal: Removal) -> None:
        super().__init__()
        self._removed: dict[int, Tensor] = {}  # the removed experts, by the address of a router's tensor
        state = model.state_dict(keep_vars=True)
        for name, unit_set in removal.routers.items():
            if not state[name].is_meta:  # of a block that is not loaded
                self._removed[state[name].data_ptr()] = ~removal.kept_masks[unit_set].to(state[name].device)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if not isinstance(result, Tensor):
            return result
        for operand in args[:2]:
            removed = self._removed.get(operand.data_ptr()) if isinstance(operand, Tensor) else None
            if removed is None or result.shape[-1:] != removed.shape:
                continue
            is_bias = operand.numel() == len(removed)  # [experts] or [1, experts]; the weight is [experts, width]
            if is_bias or function.__name__ in PRODUCTS:
                return result.masked_fill(removed, -torch.inf)
        return result
