"""The attention of sequences of several questions, registered with transformers; texts take the model's own."""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from wanda_dvc.engine.sequences import PackedQuestions

NAME = "wanda_dvc"
IGNORED = ("position_ids", "cache_position")  # tensor arguments without an effect on attention

running_questions: ContextVar[PackedQuestions] = ContextVar("running_questions")  # of the sequence that runs


def mask_pairs(
    batch_size: int, q_length: int, kv_length: int, mask_function: Callable[..., Any], device: Any, **kwargs: Any
) -> Tensor:
    """Return the mask of one kind of block (causal, sliding, chunked) for `attend`.

    Bool [1, 1, 1, pairs], True is seen: on a CPU the pairs of tokens of each question, on a GPU those of the sequence.
    transformers' sizes are those of the sequence; the mask is made for one text of as many positions as a question has.
    """
    questions = running_questions.get()
    positions = int(questions.positions.max()) + 1
    kwargs |= {"attention_mask": None, "q_offset": 0, "kv_offset": 0}
    kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    visible = sdpa_mask(1, positions, positions, mask_function=mask_function, device=device, **kwargs)
    assert visible is not None
    parts = questions.slices if visible.device.type == "cpu" else [slice(None)]
    return torch.cat([questions.seen_pairs(visible[0, 0], tokens).flatten() for tokens in parts])[None, None, None]


def attend(
    module: nn.Module,
    query: Float[Tensor, "1 heads length size"],
    key: Float[Tensor, "1 kv_heads length size"],
    value: Float[Tensor, "1 kv_heads length value_size"],
    attention_mask: Tensor,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "1 length heads value_size"], None]:
    """Compute attention within each question, with the mask of `mask_pairs`.

    A CPU computes one question after another: a sequence has up to 50 times as many pairs of tokens as its questions. A
    GPU computes all pairs at once, because starting an operation takes longer than these pairs. ValueError for
    unsupported arguments, such as sinks, the keys to attend to, or a bias for each position.
    """
    refused = [name for name, argument in kwargs.items() if isinstance(argument, Tensor) and name not in IGNORED]
    if refused:
        raise ValueError(f"attention with {', '.join(refused)}")
    is_cpu = query.device.type == "cpu"
    if softcap is None and not is_cpu:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        mask = attention_mask.view(query.shape[2], query.shape[2])
        outputs = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
        return outputs.transpose(1, 2).contiguous(), None
    # The queries that share a key head form one matrix, position by position: fewer and larger multiplications.
    kv_heads, queries = key.shape[1], query.shape[1] // key.shape[1]
    dtype = query.dtype
    if is_cpu:  # such small products in 16 bits take twice as long as in float32
        query, key, value = query.float(), key.float(), value.float()
    q = query[0] * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    q = q.unflatten(0, (kv_heads, queries)).transpose(1, 2).contiguous()  # [kv_heads, length, queries, size]
    k, v = key[0].contiguous(), value[0].contiguous()
    outputs = q.new_empty(query.shape[2], kv_heads, queries, v.shape[-1])
    questions = running_questions.get().slices if is_cpu else [slice(0, query.shape[2])]
    lengths = [tokens.stop - tokens.start for tokens in questions]
    masks = attention_mask.flatten().split([length**2 for length in lengths])
    for tokens, length, mask in zip(questions, lengths, masks, strict=True):
        scores = q[:, tokens].flatten(1, 2) @ k[:, tokens].mT  # [kv_heads, length · queries, length]
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        bias = torch.full((length, 1, length), -torch.inf, dtype=q.dtype, device=q.device)
        bias.masked_fill_(mask.view(length, 1, length), 0)
        scores.unflatten(1, (length, queries)).add_(bias)
        weights = torch.softmax(scores, dim=-1)  # sums in float32 for any dtype
        outputs[tokens] = (weights @ v[:, tokens]).unflatten(1, (length, queries)).transpose(0, 1)
    return outputs.flatten(1, 2)[None].to(dtype), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, mask_pairs)
