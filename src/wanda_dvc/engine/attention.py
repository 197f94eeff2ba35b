"""The engine's own attention, registered with transformers for three cases.

1. Rows that hold several questions: each question has a mask of its own.
2. bfloat16 on a CPU with native bf16 but no AMX: there, bfloat16 speeds up matrix multiplications but not torch's
   attention. With AMX, torch's attention is twice as fast as ours.
3. float32 of a model whose products go through oneDNN (`pruning.products`): torch's attention does not use oneDNN.

All other rows (other windows in float32, all rows on a GPU) go through the model's own attention.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from wanda_dvc import kernels
from wanda_dvc.engine.sequences import PackedQuestions

NAME = "wanda_dvc"
PLACES = ("position_ids", "cache_position")  # tensor arguments that attention ignores
QUERIES_AT_A_TIME = 128  # positions of a window: large multiplications, and few products above the diagonal

_layout: ContextVar[PackedQuestions | None] = ContextVar("layout", default=None)


@contextlib.contextmanager
def laid_out(layout: PackedQuestions | None) -> Iterator[None]:
    """Sets the layout of the row that runs inside; None for a row that is one text."""
    token = _layout.set(layout)
    try:
        yield
    finally:
        _layout.reset(token)


def visible(
    batch_size: int, q_length: int, kv_length: int, mask_function: Callable[..., Any], device: Any, **words: Any
) -> Tensor | None:
    """Makes the mask of one kind of block (causal, sliding, chunked) for `attend`.

    Bool [1, 1, length, length], True where a token attends; None: to all before it. For a row with a layout,
    bool [1, 1, 1, pairs]: `Layout.hidden` of the mask by position.
    """
    layout = _layout.get()
    if layout is None:
        return sdpa_mask(batch_size, q_length, kv_length, mask_function=mask_function, device=device, **words)
    size = int(layout.positions.max()) + 1
    skips = dict.fromkeys(("allow_is_causal_skip", "allow_is_bidirectional_skip"), False)
    words |= {"attention_mask": None, "q_offset": 0, "kv_offset": 0} | skips
    sees = sdpa_mask(1, size, size, mask_function=mask_function, device=device, **words)
    assert sees is not None
    return layout.hidden(sees[0, 0].cpu()).to(device)[None, None, None]


def attend(
    module: nn.Module,
    query: Float[Tensor, "1 heads length size"],
    key: Float[Tensor, "1 kv_heads length size"],
    value: Float[Tensor, "1 kv_heads length value_size"],
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    **words: Any,
) -> tuple[Float[Tensor, "1 length heads value_size"], None]:
    """Computes attention by matrix multiplications over the visible parts of a row.

    ValueError for unsupported arguments, such as sinks, the keys to attend to, or a bias for each position.
    """
    if more := [name for name, value in words.items() if isinstance(value, Tensor) and name not in PLACES]:
        raise ValueError(f"attention with {', '.join(more)}")
    heads, groups, windows = query.shape[1], key.shape[1], _layout.get() is None
    # The heads that share a key are stacked, position by position: fewer and larger multiplications, of views.
    q = (query[0] * (query.shape[-1] ** -0.5 if scaling is None else scaling)).unflatten(0, (groups, heads // groups))
    q, k, v = q.transpose(1, 2).contiguous(), key[0].contiguous(), value[0].contiguous()
    out = query.new_empty(query.shape[2], groups, heads // groups, value.shape[-1])
    multiply = kernels.onednn if windows and kernels.takes(q, k) else torch.matmul
    for queries, keys, hidden in _parts(query.shape[2], attention_mask, query.device):
        never = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill_(hidden, -torch.inf)[:, None]
        for some in range(groups) if windows else (slice(None),):
            part = q[some, ..., queries, :, :]
            scores = multiply(part.flatten(-3, -2), k[some, keys].mT)
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            scores.unflatten(-2, part.shape[-3:-1])[..., -hidden.shape[1] :].add_(never)
            weights = torch.softmax(scores, dim=-1)  # sums in float32 for any dtype
            made = multiply(weights, v[some, keys]).unflatten(-2, part.shape[-3:-1])
            out[queries, some] = made if windows else made.transpose(0, 1)
    return out.flatten(1, 2)[None], None


def _parts(
    length: int, mask: Tensor | None, device: torch.device
) -> Iterator[tuple[slice, slice, Bool[Tensor, "queries last_keys"]]]:
    """Some queries, their visible keys, and a mask of the last keys, True where hidden from a query."""
    layout = _layout.get()
    if layout is not None:
        assert mask is not None
        sizes = [place.stop - place.start for place in layout.places]
        for place, size, hidden in zip(layout.places, sizes, mask.flatten().split([n**2 for n in sizes]), strict=True):
            yield place, place, hidden.view(size, size)
        return
    later = torch.ones(QUERIES_AT_A_TIME, QUERIES_AT_A_TIME, dtype=torch.bool, device=device).triu_(1)
    for start in range(0, length, QUERIES_AT_A_TIME):
        end = min(start + QUERIES_AT_A_TIME, length)
        hidden = later[: end - start, : end - start] if mask is None else ~mask[0, 0, start:end, :end]
        yield slice(start, end), slice(0, end), hidden


def has_units(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of the dtype natively; emulation is many times slower."""
    asked = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    if dtype not in asked:
        return True
    return torch.backends.mkldnn.is_available() and bool(getattr(torch.ops.mkldnn, asked[dtype])())


def is_faster(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether our attention is faster than the model's own for windows of this dtype on this device."""
    amx = torch.cpu._is_amx_tile_supported()
    return device.type == "cpu" and dtype is torch.bfloat16 and has_units(dtype) and not amx


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, visible)
