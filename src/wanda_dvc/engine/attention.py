"""The engine's own attention, registered with transformers for three cases.

1. Sequences of several questions: each question has a mask of its own.
2. bfloat16 on a CPU with native bf16 but no AMX: there, bfloat16 speeds up matrix multiplications but not torch's
   attention. With AMX, torch's attention is twice as fast as ours.
3. float32 of a model whose products run through oneDNN (`wanda_dvc.kernels`): torch's attention does not use oneDNN.

All other sequences (other windows in float32, all windows on a GPU) run through the model's own attention.
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
IGNORED = ("position_ids", "cache_position")  # tensor arguments without an effect on attention
QUERIES_AT_A_TIME = 128  # positions of a window: large multiplications, and few products above the diagonal

_questions: ContextVar[PackedQuestions | None] = ContextVar("questions", default=None)

# The heads that share a key are next to each other, position by position: fewer and larger multiplications, of views.
Queries = Float[Tensor, "kv_heads length heads_per_key size"]
Keys = Float[Tensor, "kv_heads length size"]
Values = Float[Tensor, "kv_heads length value_size"]
Outputs = Float[Tensor, "length kv_heads heads_per_key value_size"]


@contextlib.contextmanager
def attending_within(questions: PackedQuestions | None) -> Iterator[None]:
    """Set the questions of the sequence that runs inside; None for a sequence that is one text."""
    token = _questions.set(questions)
    try:
        yield
    finally:
        _questions.reset(token)


def visible(
    batch_size: int, q_length: int, kv_length: int, mask_function: Callable[..., Any], device: Any, **kwargs: Any
) -> Tensor | None:
    """Return the mask of one kind of block (causal, sliding, chunked) for `attend`.

    Bool [1, 1, length, length], True where a token attends; None: to all before it. For packed questions,
    bool [1, 1, 1, pairs]: `PackedQuestions.masked_pairs` of the mask by position.
    """
    questions = _questions.get()
    if questions is None:
        return sdpa_mask(batch_size, q_length, kv_length, mask_function=mask_function, device=device, **kwargs)
    positions = int(questions.positions.max()) + 1
    kwargs |= {"attention_mask": None, "q_offset": 0, "kv_offset": 0}
    kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    by_position = sdpa_mask(1, positions, positions, mask_function=mask_function, device=device, **kwargs)
    assert by_position is not None
    return questions.masked_pairs(by_position[0, 0].cpu()).to(device)[None, None, None]


def attend(
    module: nn.Module,
    query: Float[Tensor, "1 heads length size"],
    key: Float[Tensor, "1 kv_heads length size"],
    value: Float[Tensor, "1 kv_heads length value_size"],
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "1 length heads value_size"], None]:
    """Compute attention by matrix multiplications over the visible parts of a sequence.

    ValueError for unsupported arguments, such as sinks, the keys to attend to, or a bias for each position.
    """
    refused = [name for name, argument in kwargs.items() if isinstance(argument, Tensor) and name not in IGNORED]
    if refused:
        raise ValueError(f"attention with {', '.join(refused)}")
    kv_heads = key.shape[1]
    q = query[0] * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    q = q.unflatten(0, (kv_heads, query.shape[1] // kv_heads)).transpose(1, 2).contiguous()
    k, v = key[0].contiguous(), value[0].contiguous()
    questions = _questions.get()
    if questions is None:
        outputs = attend_to_text(q, k, v, attention_mask, softcap)
    else:
        assert attention_mask is not None
        outputs = attend_to_questions(q, k, v, attention_mask.flatten(), questions.slices, softcap)
    return outputs.flatten(1, 2)[None], None


def attend_to_text(q: Queries, k: Keys, v: Values, mask: Tensor | None, softcap: float | None) -> Outputs:
    """Return attention over one text, by tiles of queries and by key; `mask` as from `visible`."""
    kv_heads, length, heads, _ = q.shape
    outputs = q.new_empty(length, kv_heads, heads, v.shape[-1])
    multiply = kernels.onednn if kernels.takes(q, k) else torch.matmul
    later = torch.ones(QUERIES_AT_A_TIME, QUERIES_AT_A_TIME, dtype=torch.bool, device=q.device).triu_(1)
    for start in range(0, length, QUERIES_AT_A_TIME):
        end = min(start + QUERIES_AT_A_TIME, length)
        masked = later[: end - start, : end - start] if mask is None else ~mask[0, 0, start:end, :end]
        bias = minus_infinity(masked, q.dtype)
        for head in range(kv_heads):
            scores = multiply(q[head, start:end].flatten(0, 1), k[head, :end].mT)
            weights = attention_weights(scores, bias, softcap)
            outputs[start:end, head] = multiply(weights, v[head, :end]).unflatten(0, (-1, heads))
    return outputs


def attend_to_questions(
    q: Queries, k: Keys, v: Values, masked: Bool[Tensor, " pairs"], questions: list[slice], softcap: float | None
) -> Outputs:
    """Return attention within each question, by the tokens of each; `masked` as from `masked_pairs`."""
    kv_heads, length, heads, _ = q.shape
    outputs = q.new_empty(length, kv_heads, heads, v.shape[-1])
    sizes = [tokens.stop - tokens.start for tokens in questions]
    masks = masked.split([size**2 for size in sizes])
    for tokens, size, mask in zip(questions, sizes, masks, strict=True):
        scores = q[:, tokens].flatten(1, 2) @ k[:, tokens].mT
        weights = attention_weights(scores, minus_infinity(mask.view(size, size), q.dtype), softcap)
        outputs[tokens] = (weights @ v[:, tokens]).unflatten(1, (-1, heads)).transpose(0, 1)
    return outputs


def minus_infinity(masked: Bool[Tensor, "queries keys"], dtype: torch.dtype) -> Float[Tensor, "queries 1 keys"]:
    """Return −∞ where a key is masked from a query, and 0 elsewhere."""
    return torch.zeros(masked.shape, dtype=dtype, device=masked.device).masked_fill_(masked, -torch.inf)[:, None]


def attention_weights(
    scores: Float[Tensor, "*kv_heads queries_and_heads keys"],
    bias: Float[Tensor, "queries 1 last_keys"],
    softcap: float | None,
) -> Float[Tensor, "*kv_heads queries_and_heads keys"]:
    """Return the softmax of scores, with the bias added for the last keys. It sums in float32 for any dtype."""
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores.unflatten(-2, (len(bias), -1))[..., -bias.shape[-1] :].add_(bias)
    return torch.softmax(scores, dim=-1)


def has_units(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of the dtype natively; emulation is many times slower."""
    checks = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    if dtype not in checks:
        return True
    return torch.backends.mkldnn.is_available() and bool(getattr(torch.ops.mkldnn, checks[dtype])())


def is_faster(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether our attention is faster than the model's own for windows of this dtype on this device."""
    amx = torch.cpu._is_amx_tile_supported()
    return device.type == "cpu" and dtype is torch.bfloat16 and has_units(dtype) and not amx


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, visible)
