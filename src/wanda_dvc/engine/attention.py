"""Attention of our own, put into models through transformers' registry, for what the stock one lacks.

Rows that hold many questions need a mask of their own in every question; and in half precision torch's
attention on a CPU is no faster than in float32, where matrix multiplications are four times as fast.
A model's other attention (windows in float32, everything that fits a GPU's kernels) stays the stock one.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

NAME = "wanda_dvc"
QUERIES_AT_A_TIME = 128  # of a window: enough for a matrix unit, and little above the diagonal is computed


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the tokens of a row belong that holds several questions, one after another.

    A token attends to those before it in its question's context and in its own choice.
    """

    positions: Int[Tensor, " length"]  # within its question: every choice goes on where the context ends
    question: Int[Tensor, " length"]  # ascending
    choice: Int[Tensor, " length"]  # 0: the context; k: the k-th choice

    # By the mask that they follow from, which is kept, so that no other takes its number.
    _hidden: dict[int, tuple[Tensor, list[tuple[slice, Tensor]]]] = field(default_factory=dict, init=False, repr=False)

    def questions(self, mask: Bool[Tensor, "1 1 positions positions"]) -> list[tuple[slice, Tensor]]:
        """Each question's place, and which tokens are hidden from which, bool [tokens, tokens]; found once for all
        blocks of one kind. `mask` says which positions the kind of block lets a position see."""
        if id(mask) not in self._hidden:
            _, counts = torch.unique_consecutive(self.question, return_counts=True)
            sees, found = mask[0, 0].cpu(), []
            for start, end in pairwise([0, *counts.cumsum(0).tolist()]):
                choice, at = self.choice[start:end], self.positions[start:end]
                related = (choice == 0) | (choice == choice[:, None])
                found.append((slice(start, end), ~(sees[at[:, None], at] & related)))
            self._hidden[id(mask)] = mask, found
        return self._hidden[id(mask)][1]


_layout: ContextVar[Layout | None] = ContextVar("layout", default=None)


@contextlib.contextmanager
def laid_out(layout: Layout | None) -> Iterator[None]:
    """What runs inside has its row's layout: None for one text."""
    token = _layout.set(layout)
    try:
        yield
    finally:
        _layout.reset(token)


def visible(
    batch_size: int, q_length: int, kv_length: int, mask_function: Callable[..., Any], device: Any, **words: Any
) -> Tensor | None:
    """What the model's own kind of layer (causal, sliding, chunked) lets a token see, bool: [1, 1, length, length], or
    None for all before it; of a row with a layout, by position: [1, 1, positions, positions]."""
    layout = _layout.get()
    if layout is not None:
        size = int(layout.positions.max()) + 1
        words |= {"allow_is_causal_skip": False, "attention_mask": None, "q_offset": 0, "kv_offset": 0}
        return sdpa_mask(1, size, size, mask_function=mask_function, device=device, **words)
    return sdpa_mask(batch_size, q_length, kv_length, mask_function=mask_function, device=device, **words)


def attend(
    module: nn.Module,
    query: Float[Tensor, "1 heads length size"],
    key: Float[Tensor, "1 kv_heads length size"],
    value: Float[Tensor, "1 kv_heads length value_size"],
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "1 length heads value_size"], None]:
    """Attention by matrix multiplications over the parts of a row that see each other."""
    heads, groups = query.shape[1], key.shape[1]
    # The heads that share a key stand below one another: fewer and larger multiplications.
    q = (query[0] * (query.shape[-1] ** -0.5 if scaling is None else scaling)).unflatten(0, (groups, heads // groups))
    k, v = key[0].contiguous(), value[0].contiguous()  # once, and not in every part
    out = query.new_empty(groups, heads // groups, query.shape[2], value.shape[-1])
    for queries, keys, hidden in _parts(query.shape[2], attention_mask, query.device):
        part = q[:, :, queries]
        scores = part.flatten(1, 2) @ k[:, keys].mT
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        scores.unflatten(1, part.shape[1:3])[..., -hidden.shape[1] :].masked_fill_(hidden, -torch.inf)
        weights = torch.softmax(scores, dim=-1)  # sums in float32 whatever the dtype
        out[:, :, queries] = (weights @ v[:, keys]).unflatten(1, part.shape[1:3])
    return out.flatten(0, 1).transpose(0, 1)[None].contiguous(), None


def _parts(
    length: int, mask: Tensor | None, device: torch.device
) -> Iterator[tuple[slice, slice, Bool[Tensor, "queries last_keys"]]]:
    """Queries, the keys among which are all that they see, and which of the last of those are hidden from each."""
    layout = _layout.get()
    if layout is not None:
        assert mask is not None
        for place, hidden in layout.questions(mask):
            yield place, place, hidden.to(device)
        return
    later = torch.ones(QUERIES_AT_A_TIME, QUERIES_AT_A_TIME, dtype=torch.bool, device=device).triu_(1)
    for start in range(0, length, QUERIES_AT_A_TIME):
        end = min(start + QUERIES_AT_A_TIME, length)
        hidden = later[: end - start, : end - start] if mask is None else ~mask[0, 0, start:end, :end]
        yield slice(start, end), slice(0, end), hidden


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, visible)
