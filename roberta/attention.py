"""Attention: what each token takes over from the others.

    Y_h = dropout(softmax(Q_h K_h^T / sqrt(head) + M)) V_h       for each head h

M is 0 where the key is a real token and -inf where it is padding. On a GPU, and in 16 bits, PyTorch's
`scaled_dot_product_attention` computes it by a fused kernel. In float32 and float64 on a CPU it is written out here,
with its way back: oneDNN's products (`ops.batched`) and cheap masks (`ops.dropout`) make that faster than the fused
kernel, which has neither (docs/performance.md).

Shapes: `batch` sequences of `seq` tokens, of which `queries` ask (all, or the first few); `heads` heads of `head`
numbers each, `hidden` together.
Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.2.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ops.batched import batched_product
from ops.dropout import dropout_mask, rounded
from ops.linear import in_full_precision_on_cpu

_SCORES_AT_A_TIME = 3 << 18  # 3 MiB of float32


def attention(projections: tuple[Tensor, ...], num_heads: int, key_mask: Tensor, dropout_prob: float = 0.0) -> Tensor:
    """Query, key and value -> what each token takes over, (batch, queries, hidden), head beside head.

    `projections` hold the three in this order, side by side: in one tensor of (batch, seq, 3 hidden), or in two, of
    (batch, queries, hidden) and (batch, seq, 2 hidden). `key_mask` is boolean, (batch, 1, 1, seq), true at real tokens;
    each sequence has one at least. `dropout_prob` is each probability's chance to be dropped.
    Written out there is a first derivative only; a second raises RuntimeError.
    """
    # With a probability that rounds to 1 nothing is kept, and 1 / (1 - p) has no value.
    if in_full_precision_on_cpu(projections[0]) and rounded(dropout_prob) < 1:
        return _Attention.apply(num_heads, key_mask, rounded(dropout_prob), *projections)
    query, key, value = _split_heads(projections, num_heads)
    context = F.scaled_dot_product_attention(query, key, value, attn_mask=key_mask, dropout_p=dropout_prob)
    return context.transpose(1, 2).flatten(2)


def _split_heads(projections: tuple[Tensor, ...], num_heads: int) -> list[Tensor]:
    """Query, key and value as (batch, heads, queries or seq, head), each of them a view."""
    head = sum(projection.shape[-1] for projection in projections) // (3 * num_heads)
    blocks = (projection.unflatten(-1, (-1, num_heads, head)).permute(2, 0, 3, 1, 4) for projection in projections)
    return [block for several in blocks for block in several]


class _Attention(torch.autograd.Function):
    """S = Q K^T / sqrt(head) + M,   P = softmax(S),   D = m * P / (1 - p),   Y = D V.

    m is dropout's mask of 0 and 1, and * goes element by element. With G = dL/dY:

        dL/dV = D^T G                    dL/dP = m * (G V^T) / (1 - p)
        dL/dQ = dL/dS K / sqrt(head)     dL/dS = P * (dL/dP - (sum over each row of P * dL/dP))
        dL/dK = (dL/dS)^T Q / sqrt(head)

    P is kept for the way back, and m as bytes; D is computed again, as it is cheaper to compute than to keep. A few
    sequences are worked on at a time, so that their scores stay in the cache from one pass over them to the next.
    """

    @staticmethod
    def forward(ctx: Any, num_heads: int, key_mask: Tensor, p: float, *projections: Tensor) -> Tensor:
        blocks = _split_heads(projections, num_heads)
        batch, _, queries, head = blocks[0].shape
        context = blocks[0].new_empty(batch, queries, num_heads, head)
        bias = torch.zeros(key_mask.shape, dtype=context.dtype).masked_fill_(~key_mask, -math.inf)
        kept_for_backward: list[Tensor | None] = []
        ctx.slices = _slices(batch, num_heads * queries * key_mask.shape[-1])
        for few in ctx.slices:
            # Each head's rows together, as the products read them: (few * heads, queries or seq, head).
            query, key, value = (block[few].flatten(0, 1).contiguous() for block in blocks)
            scores = batched_product(query, key.transpose(1, 2), 1 / math.sqrt(head))
            scores.unflatten(0, (-1, num_heads)).add_(bias[few])
            probabilities = torch.softmax(scores, dim=-1, out=scores)  # (few * heads, queries, seq), in their place
            mask = dropout_mask(probabilities.shape, p) if p > 0 else None
            kept = probabilities if mask is None else probabilities * mask
            part = batched_product(kept, value, 1 / (1 - p))
            context[few] = part.unflatten(0, (-1, num_heads)).transpose(1, 2)
            if any(ctx.needs_input_grad):
                kept_for_backward += query, key, value, probabilities, mask
        ctx.save_for_backward(*kept_for_backward)
        ctx.p, ctx.num_heads, ctx.shapes = p, num_heads, [projection.shape for projection in projections]
        return context.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        num_heads, of_kept = ctx.num_heads, 1 / (1 - ctx.p)
        to_projections = tuple(gradient.new_empty(shape) for shape in ctx.shapes)
        to_query, to_key, to_value = _split_heads(to_projections, num_heads)  # views: what is written there is there
        gradient = gradient.unflatten(-1, (num_heads, -1)).transpose(1, 2)
        for few in ctx.slices:
            query, key, value, probabilities, mask = (next(saved) for _ in range(5))
            scale = 1 / math.sqrt(query.shape[-1])
            to_context = gradient[few].flatten(0, 1).contiguous()
            kept = probabilities if mask is None else probabilities * mask
            to_value[few] = batched_product(kept.transpose(1, 2), to_context, of_kept).unflatten(0, (-1, num_heads))
            to_scores = batched_product(to_context, value.transpose(1, 2), of_kept)  # to the probabilities, until ...
            if mask is not None:
                to_scores.mul_(mask)
            torch.ops.aten._softmax_backward_data.out(  # ... here
                to_scores, probabilities, -1, probabilities.dtype, grad_input=to_scores
            )
            to_query[few] = batched_product(to_scores, key, scale).unflatten(0, (-1, num_heads))
            to_key[few] = batched_product(to_scores.transpose(1, 2), query, scale).unflatten(0, (-1, num_heads))
        return None, None, None, *to_projections


def _slices(batch: int, scores: int) -> list[slice]:
    """The sequences of a batch, a few at a time; `scores` is how many numbers each has."""
    few = max(1, _SCORES_AT_A_TIME // max(1, scores))
    return [slice(start, start + few) for start in range(0, batch, few)]
