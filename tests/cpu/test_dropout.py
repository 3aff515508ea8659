"""Dropout from bulk random bits: the distribution that it promises, and the same mask in both directions."""

import math

import pytest
import torch

from cpu.dropout import FastDropout, dropout_mask, rounded, use_fast_dropout

PROBABILITIES = [0.1, 0.25, 0.5, 0.9]


def drawn(p, *shape, seed=0):
    torch.manual_seed(seed)
    return dropout_mask(torch.Size(shape), p)


@pytest.mark.parametrize("p", PROBABILITIES)
def test_the_share_kept_is_that_of_the_rounded_probability(p):
    n = 4_000_000
    mask = drawn(p, n)
    assert mask.dtype == torch.uint8 and set(mask.unique().tolist()) == {0, 1}
    deviation = (mask.double().mean().item() - (1 - rounded(p))) / math.sqrt(p * (1 - p) / n)
    assert abs(deviation) < 4, f"{deviation:.1f} standard errors"
    assert abs(rounded(p) - p) <= 2**-17


@pytest.mark.parametrize("p", PROBABILITIES)
def test_neighbours_rows_and_the_four_elements_of_a_word_are_independent(p):
    mask = drawn(p, 2000, 1000).double() - (1 - rounded(p))
    variance = p * (1 - p)
    pairs = {f"{lag} apart": (mask[:, :-lag] * mask[:, lag:]) for lag in (1, 2, 3, 4, 5, 8, 16)}
    pairs |= {f"{lag} rows apart": mask[:-lag] * mask[lag:] for lag in (1, 2, 4)}
    for name, products in pairs.items():
        correlation = products.mean().item() / variance
        assert abs(correlation) * math.sqrt(products.numel()) < 4.5, name
    by_place = mask.flatten().view(-1, 4).mean(dim=0)  # each quarter of a word as often as the others
    assert by_place.abs().max().item() / math.sqrt(variance / (mask.numel() / 4)) < 4.5


@pytest.mark.parametrize("p", PROBABILITIES)
def test_mean_and_variance_of_the_output(p):
    torch.manual_seed(1)
    x = torch.randn(2_000_000, dtype=torch.float64)
    y = FastDropout(p)(x)
    assert (y - x).mean().item() == pytest.approx(0, abs=5 * math.sqrt(p / (1 - p) / x.numel()))
    assert y.var().item() == pytest.approx(1 / (1 - p), rel=0.02)


def test_the_backward_pass_uses_the_same_mask():
    torch.manual_seed(0)
    x = torch.randn(64, 33, requires_grad=True)
    y = FastDropout(0.3)(x)
    upstream = torch.randn(64, 33)
    y.backward(upstream)
    kept = y != 0
    assert torch.equal(x.grad == 0, ~kept)
    torch.testing.assert_close(x.grad[kept], upstream[kept] / (1 - rounded(0.3)))


def test_the_mask_is_all_that_is_kept_for_the_backward_pass():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        FastDropout(0.1)(torch.randn(100, 40, requires_grad=True))
    assert [(tensor.dtype, tensor.numel()) for tensor in kept] == [(torch.uint8, 4000)]


def test_a_seed_decides_the_mask_and_every_call_draws_anew():
    assert torch.equal(drawn(0.5, 1001, seed=3), drawn(0.5, 1001, seed=3))
    assert not torch.equal(drawn(0.5, 1001, seed=3), drawn(0.5, 1001, seed=4))
    torch.manual_seed(0)
    assert not torch.equal(dropout_mask(torch.Size((1001,)), 0.5), dropout_mask(torch.Size((1001,)), 0.5))


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_nothing_happens_at_evaluation_or_with_p_zero(p):
    x = torch.randn(5, 6)
    layer = FastDropout(p).eval() if p else FastDropout(p).train()
    assert layer(x) is x


@pytest.mark.parametrize("shape", [(), (1,), (3,), (4,), (5,), (2, 3, 5), (0,)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_any_shape_and_type(shape, dtype):
    x = torch.ones(shape, dtype=dtype)
    y = FastDropout(0.5)(x)
    assert y.shape == x.shape and y.dtype == dtype


@pytest.mark.parametrize("p", [0.999_999, 1.0])
def test_a_probability_that_rounds_to_one_drops_almost_everything(p):
    x = torch.ones(10, requires_grad=True)
    y = FastDropout(p).train()(x)
    y.sum().backward()
    assert y.isfinite().all() and (y == 0).sum() >= 9 and x.grad.isfinite().all()


def test_every_dropout_of_a_model_is_replaced_with_its_probability_and_mode():
    model = torch.nn.Sequential(
        torch.nn.Dropout(0.1), torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.2))
    )
    model.eval()
    use_fast_dropout(model)
    replaced = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    assert [(type(module), module.p, module.training) for module in replaced] == [
        (FastDropout, 0.1, False),
        (FastDropout, 0.2, False),
    ]


def test_on_another_device_masks_are_torchs():
    y = FastDropout(0.5)(torch.ones(4, device="meta"))
    assert y.device.type == "meta"
