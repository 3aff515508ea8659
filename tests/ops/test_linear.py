"""The linear layer by way of oneDNN: the values and gradients of `F.linear`, and nothing kept that is frozen."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ops import linear as module
from ops.linear import Linear, linear, product

needs_onednn = pytest.mark.skipif(module._ONEDNN is None, reason="this build of torch has no oneDNN")


def close(ours, expected):
    """float32 sums in another order: to a few roundings of the largest value."""
    torch.testing.assert_close(ours, expected.float(), rtol=1e-5, atol=4e-6 * max(1.0, expected.abs().max().item()))


@settings(max_examples=60)
@given(
    rows=st.sampled_from([(), (1,), (7,), (2, 3), (4, 16), (2, 2, 5), (300,)]),
    inputs=st.integers(1, 70),
    outputs=st.integers(1, 70),
    bias=st.booleans(),
    trained=st.booleans(),
    strided=st.booleans(),
)
def test_values_and_gradients_are_those_of_the_formula(rows, inputs, outputs, bias, trained, strided):
    torch.manual_seed(0)
    x = torch.randn(*rows, 2 * inputs)[..., ::2] if strided else torch.randn(*rows, inputs)
    x = x.requires_grad_()
    weight = torch.randn(outputs, inputs).requires_grad_(trained)
    b = torch.randn(outputs).requires_grad_(trained) if bias else None
    y = linear(x, weight, b)
    upstream = torch.randn(*rows, outputs)
    y.backward(upstream)

    exact_x, exact_w = x.detach().double(), weight.detach().double()
    expected = exact_x @ exact_w.T + (b.detach().double() if bias else 0)
    assert y.shape == (*rows, outputs) and y.dtype == torch.float32
    close(y, expected)
    close(x.grad, upstream.double() @ exact_w)
    if trained:
        flat = upstream.double().reshape(-1, outputs)
        close(weight.grad, flat.T @ exact_x.reshape(-1, inputs))
        if bias:
            close(b.grad, flat.sum(dim=0))
    else:
        assert weight.grad is None


@needs_onednn
@pytest.mark.parametrize("rows_apart", [1 << 8, 257])
@pytest.mark.parametrize("tall", [True, False])
def test_columns_that_crowd_a_cache_are_copied_before_they_are_read(monkeypatch, rows_apart, tall):
    seen = []
    monkeypatch.setattr(module, "product", lambda x, weight, bias=None: seen.append(weight) or product(x, weight, bias))
    x, weight = torch.randn(5, rows_apart, requires_grad=True), torch.randn(1025 if tall else 8, rows_apart)
    linear(x, weight).square().sum().backward()
    assert seen[1].is_contiguous() == (tall and rows_apart == 1 << 8)
    exact = x.detach().double()
    close(x.grad, 2 * exact @ weight.double().T @ weight.double())


@needs_onednn
def test_float32_on_a_cpu_goes_by_onednn_and_the_rest_does_not(monkeypatch):
    calls = []
    onednn = module._ONEDNN
    monkeypatch.setattr(module, "_ONEDNN", lambda *arguments: calls.append(1) or onednn(*arguments))
    x, layer = torch.randn(3, 4), Linear(4, 5)
    layer(x)
    assert len(calls) == 1
    layer.double()(x.double())
    layer.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert layer(torch.empty(0, 4)).shape == (0, 5)
    torch.compile(layer, backend="eager")(x)
    assert layer(x[0]).shape == (5,)  # a vector
    layer.to("meta")(x.to("meta"))
    assert len(calls) == 1


def test_a_build_without_onednn_computes_the_same(monkeypatch):
    x, layer = torch.randn(6, 30), Linear(30, 20)
    expected = layer(x)
    monkeypatch.setattr(module, "_ONEDNN", None)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


@needs_onednn
def test_the_input_of_a_frozen_weight_is_not_kept():
    def kept(trained):
        saved = []
        x, layer = torch.randn(100, 40, requires_grad=True), Linear(40, 30).requires_grad_(trained)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
            layer(x)
        return saved

    assert kept(False) == [(30, 40)] and sorted(kept(True)) == [(30, 40), (100, 40)]


def test_the_result_can_be_added_to_in_place():
    x, layer = torch.randn(6, 4, requires_grad=True), Linear(4, 5)
    linear(x, layer.weight, layer.bias).add_(1.0).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(dim=0).expand(6, 4))
