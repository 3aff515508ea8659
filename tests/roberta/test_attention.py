"""Attention written out, with its way back, against the same formula left to autograd."""

import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ops.dropout import dropout_mask, rounded
from roberta import attention as module
from roberta.attention import attention


def by_autograd(projections, num_heads, key_mask, p):
    """The formula, step by step, and the mask that `attention` draws after the same seed."""
    hidden = sum(x.shape[-1] for x in projections) // 3
    query, key, value = (block for x in projections for block in x.split(hidden, dim=-1))
    query, key, value = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (query, key, value))
    scores = query @ key.transpose(-1, -2) / math.sqrt(hidden // num_heads)
    probabilities = scores.masked_fill(~key_mask, -math.inf).softmax(dim=-1)
    if rounded(p):
        probabilities = probabilities * dropout_mask(probabilities.shape, p) / (1 - rounded(p))
    return (probabilities @ value).transpose(1, 2).flatten(2)


def inputs(batch, seq, queries, num_heads, head, dtype=torch.float64):
    """One packed projection or, with fewer queries than tokens, two; and a mask with padding on either side."""
    torch.manual_seed(0)
    hidden = num_heads * head
    shapes = [(seq, 3 * hidden)] if queries is None else [(queries, hidden), (seq, 2 * hidden)]
    projections = tuple(torch.randn(batch, *shape, dtype=dtype, requires_grad=True) for shape in shapes)
    key_mask = torch.rand(batch, 1, 1, seq) < 0.7
    key_mask[..., 0] |= ~key_mask.any(dim=-1)
    return projections, key_mask


@settings(max_examples=60)
@given(
    batch=st.integers(1, 4),
    seq=st.integers(1, 20),
    first=st.sampled_from([None, 1, 2]),
    num_heads=st.integers(1, 4),
    head=st.integers(1, 9),
    p=st.sampled_from([0.0, 0.1, 0.5, 1e-9]),
)
def test_values_and_gradients_are_those_of_the_formula(batch, seq, first, num_heads, head, p):
    projections, key_mask = inputs(batch, seq, first and min(first, seq), num_heads, head)
    results = []
    for compute in (attention, by_autograd):
        torch.manual_seed(1)
        context = compute(projections, num_heads, key_mask, p)
        torch.manual_seed(2)
        upstream = torch.randn(context.shape, dtype=context.dtype)
        results.append([context, *torch.autograd.grad(context, projections, upstream)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("queries", [None, 1])
@pytest.mark.parametrize("at_a_time", [1, 2 * 3 * 36, 10**6], ids=["one by one", "a few", "all"])
def test_a_few_sequences_at_a_time_give_what_all_give(monkeypatch, at_a_time, queries):
    monkeypatch.setattr(module, "_SCORES_AT_A_TIME", at_a_time)
    products = []
    product = module.batched_product
    monkeypatch.setattr(module, "batched_product", lambda *given_: products.append(1) or product(*given_))
    projections, key_mask = inputs(5, 6, queries, 3, 4)
    results = []
    for compute in (attention, by_autograd):
        context = compute(projections, 3, key_mask, 0.0)
        results.append([context, *torch.autograd.grad(context.square().sum(), projections)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    sequences = 1 if at_a_time == 1 else min(5, at_a_time // (3 * (queries or 6) * 6))
    assert len(products) == 6 * -(-5 // sequences)  # two forward and four back, for each few


def test_every_sequence_draws_a_mask_of_its_own(monkeypatch):
    monkeypatch.setattr(module, "_SCORES_AT_A_TIME", 1)
    (packed,), key_mask = inputs(1, 12, None, 2, 4)
    torch.manual_seed(3)
    one, other = attention((packed.expand(2, -1, -1),), 2, key_mask.expand(2, -1, -1, -1), 0.5)
    assert not torch.allclose(one, other)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_float32_is_as_near_as_torchs_own(p):
    projections, key_mask = inputs(8, 64, None, 4, 32, torch.float32)
    exact = tuple(x.detach().double().requires_grad_() for x in projections)
    results = []
    for compute, given_ in ((attention, projections), (by_autograd, exact)):
        torch.manual_seed(1)
        context = compute(given_, 4, key_mask, p)
        results.append([context, *torch.autograd.grad(context.square().sum(), given_)])
    for ours, expected in zip(*results, strict=True):
        assert (ours.double() - expected).abs().max() < 3e-6 * expected.abs().max()


def test_padding_is_not_heard_of():
    projections, key_mask = inputs(3, 7, None, 2, 4)
    (packed,) = projections
    changed = packed.detach().clone()
    changed[~key_mask[:, 0, 0]] += 100.0
    real = key_mask[:, 0, 0]
    torch.testing.assert_close(
        attention((changed,), 2, key_mask)[real], attention((packed,), 2, key_mask)[real], rtol=0, atol=0
    )
    (gradient,) = torch.autograd.grad(attention((packed,), 2, key_mask)[real].sum(), packed)
    assert (gradient[~real] == 0).all() and (gradient[real] != 0).any()


def test_half_precision_autocast_and_compilers_take_torchs_kernel(monkeypatch):
    calls = []
    kernel = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *given_, **named: calls.append(1) or kernel(*given_, **named)
    )
    projections, key_mask = inputs(2, 5, None, 2, 4)
    attention(projections, 2, key_mask, 0.1)
    assert not calls
    attention(tuple(x.bfloat16() for x in projections), 2, key_mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attention(tuple(x.float() for x in projections), 2, key_mask)
    assert len(calls) == 2
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    attention(projections, 2, key_mask)
    assert len(calls) == 3


def test_a_probability_that_rounds_to_one_drops_everything():
    projections, key_mask = inputs(2, 5, None, 2, 4)
    assert (attention(projections, 2, key_mask, 1.0) == 0).all()


def test_probabilities_and_their_mask_are_kept_once():
    projections, key_mask = inputs(2, 6, None, 2, 4)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        attention(projections, 2, key_mask, 0.1)
    sizes = sorted((x.dtype.itemsize, x.numel()) for x in kept)
    assert sizes == [(1, 4 * 36), (8, 96), (8, 96), (8, 96), (8, 4 * 36)]


def test_without_gradients_nothing_outlives_its_turn(monkeypatch):
    monkeypatch.setattr(module, "_SCORES_AT_A_TIME", 1)
    made, alive, softmax = [], [], torch.softmax

    def counting(scores, **named):
        alive.append(sum(earlier() is not None for earlier in made))
        made.append(weakref.ref(scores))
        return softmax(scores, **named)

    monkeypatch.setattr(torch, "softmax", counting)
    (packed,), key_mask = inputs(5, 6, None, 2, 4)
    attention((packed.detach(),), 2, key_mask)
    assert max(alive) <= 1
    made.clear(), alive.clear()
    attention((packed,), 2, key_mask)
    assert max(alive) == 4
