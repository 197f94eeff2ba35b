"""Compares a smaller model with the full model that computes without the removed units."""

import gc
from typing import Any

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
PRODUCTS = ("linear", "matmul", "__matmul__", "mm", "bmm", "_linear_pointwise")  # by a router's weight


@torch.no_grad()
def probe(source: Checkpoint, removal: Removal, device: torch.device) -> None:
    """Raise UserError if a smaller model differs from the full model without the removed units.

    The embeddings of random tokens run through one block of each kind in both models, or each block if blocks are
    removed, on a device and in float32. One of the models is in memory at a time.
    """
    try:
        full = Decoder(source, dtype=torch.float32, device=device)
        vocabulary = full.model.get_input_embeddings().weight.shape[0]
        sequence = TokenSequence(torch.randint(vocabulary, (TOKENS,), generator=torch.Generator().manual_seed(0)))
        # The tolerance is relative to the effect of the removed units. It is smaller for blocks, to refuse those that
        # depend on the number of blocks, which differ by little.
        tolerance = 1e-3 if full.loader.blocks_name in removal.unit_sets else 1e-2
        hidden = full.embed(sequence)
        runs = _run_full(full, removal, hidden, sequence)
        del full
        gc.collect()
        small = Decoder(SmallerCheckpoint(source, removal), dtype=torch.float32, device=device)
        for block, dense, masked in runs:
            small.load(block, -1)
            difference = vector_norm(small.run(block, hidden, sequence) - masked).item()
            effect, size = vector_norm(masked - dense).item(), vector_norm(dense).item()
            if not difference <= tolerance * max(effect, 1e-4 * size):
                raise ValueError(f"its block {block} computes something else without them: off by {difference:.2g}")
    except (UserError, RuntimeError, ValueError, IndexError) as error:
        if is_out_of_memory(error):
            raise
        problem = f"a smaller model fails its trial ({' '.join(str(error).split())[:200]})"
        raise refused(removal.structure, source, problem) from error


def _run_full(
    full: Decoder, removal: Removal, hidden: States, sequence: TokenSequence
) -> list[tuple[int, States, States]]:
    """Run a block of each kind of the full model, or each kept block, with all units and without the removed units.

    Without them consumers read zeros, and routers never choose removed experts. Returns each block's number in the
    smaller model and both outputs; if blocks are removed, in place of the first its input: the effect is all it adds.
    """
    kept_blocks, runs = removal.kept_masks.get(full.loader.blocks_name), []
    indices = full.one_of_each_kind if kept_blocks is None else kept_blocks.nonzero()[:, 0].tolist()
    for number, index in enumerate(indices):
        full.load(index, -1)
        dense = full.run(index, hidden, sequence)
        consumers = full.linears(index).keys() & removal.consumers.keys()
        masks = {linear: dimension_mask(removal.consumers[linear], removal.kept_masks) for linear in consumers}
        full.load(index, -1, WeightChange(masks, {}))
        with MaskedRouters(full.model, removal):
            masked = full.run(index, hidden, sequence)
        if kept_blocks is None:
            runs.append((index, dense, masked))
        else:
            runs.append((number, hidden, masked))
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
