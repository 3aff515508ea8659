"""The layers against the formula, on numbers small enough to work out by hand."""

import math

import pytest
import torch
from torch import nn

from lora.linear import LoRALinear
from lora.packed import PackedLoRALinear
from ops.dropout import Dropout
from roberta.model import PackedLinear


def test_forward_is_the_formula_worked_out_by_hand():
    base = nn.Linear(2, 2)
    layer = LoRALinear(base, rank=1, alpha=3.0)
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        base.bias.copy_(torch.tensor([10.0, 20.0]))
        layer.lora_A.copy_(torch.tensor([[1.0, -1.0]]))
        layer.lora_B.copy_(torch.tensor([[2.0], [5.0]]))
    # x = (4, 1): W x + b = (16, 36); A x = 3; s = 3 / 1; s B A x = (18, 45)
    assert layer(torch.tensor([4.0, 1.0])).tolist() == [34.0, 81.0]


@pytest.mark.parametrize(("use_rslora", "scaling"), [(False, 14 / 6), (True, 14 / math.sqrt(6))])
def test_scaling(use_rslora, scaling):
    assert LoRALinear(nn.Linear(3, 3), 6, 14, use_rslora=use_rslora).scaling == pytest.approx(scaling)


def test_initial_values_are_those_of_peft_and_of_the_paper():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(400, 30), rank=50, alpha=1)
    bound = 1 / math.sqrt(400)
    assert layer.lora_A.abs().max() <= bound
    assert layer.lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)  # of a uniform distribution
    assert torch.equal(layer.lora_B, torch.zeros(30, 50))
    torch.manual_seed(1)
    layer.reset_parameters()
    torch.manual_seed(1)
    assert torch.equal(layer.lora_A, nn.init.kaiming_uniform_(torch.empty(50, 400), a=math.sqrt(5)))


def test_training_starts_at_the_pretrained_layer():
    base = nn.Linear(5, 4)
    x = torch.randn(3, 5)
    expected = base(x)
    assert torch.equal(LoRALinear(base, 2, 8)(x), expected)


def test_only_the_update_is_trained():
    layer = LoRALinear(nn.Linear(5, 4), 2, 8)
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


def test_matrices_are_float32_over_a_half_precision_base():
    layer = LoRALinear(nn.Linear(5, 4).bfloat16(), 2, 8)
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    assert layer(torch.randn(3, 5).bfloat16()).dtype == torch.bfloat16
    assert LoRALinear(nn.Linear(5, 4).double(), 2, 8).lora_A.dtype == torch.float64


def filled(layer, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return layer


def packed(adapted: dict[str, tuple[int, float]], dropout=0.0):
    """A packed projection of three blocks of different widths, the named ones adapted with (rank, alpha)."""
    projection = PackedLinear(6, {"query": 4, "key": 4, "value": 5}).double()
    for name, (rank, alpha) in adapted.items():
        setattr(projection, name, LoRALinear(projection.get_submodule(name), rank, alpha, dropout))
    return filled(PackedLoRALinear(projection))


SUBSETS = [
    {"query": (2, 8.0)},
    {"key": (3, 1.0)},
    {"query": (2, 8.0), "value": (5, 2.0)},
    {"query": (1, 4.0), "key": (2, 8.0), "value": (3, 16.0)},
]


@pytest.mark.parametrize("adapted", SUBSETS, ids=lambda adapted: "+".join(adapted))
def test_packed_blocks_give_what_separate_layers_give(adapted):
    layer = packed(adapted)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    separate = torch.cat([layer.get_submodule(name)(x) for name in ("query", "key", "value")], dim=-1)
    torch.testing.assert_close(layer(x), separate, rtol=1e-12, atol=1e-12)
    some = torch.cat([layer.get_submodule(name)(x) for name in ("value", "query")], dim=-1)
    torch.testing.assert_close(layer(x, ("value", "query")), some, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("adapted", SUBSETS, ids=lambda adapted: "+".join(adapted))
def test_packed_gradients_are_those_of_separate_layers(adapted):
    gradients = []
    for forward in (
        lambda layer, x: layer(x),
        lambda layer, x: torch.cat([layer.get_submodule(name)(x) for name in ("query", "key", "value")], dim=-1),
    ):
        layer = packed(adapted)
        x = torch.ones(2, 6, dtype=torch.float64, requires_grad=True)
        forward(layer, x).square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("lowest", [False, True], ids=["x has a gradient", "x has none"])
@pytest.mark.parametrize("adapted", SUBSETS, ids=lambda adapted: "+".join(adapted))
def test_packed_gradients_with_dropout_and_whatever_else_is_trained(adapted, lowest, dropout, dtype):
    results = []
    for together in (True, False):
        layer = packed(adapted, dropout).to(dtype).train()
        for name in ("query", "key", "value"):  # biases everywhere, and the matrix of a block without an adapter
            block = layer.get_submodule(name)
            getattr(block, "base", block).bias.requires_grad_(True)
        torch.manual_seed(4)
        x = torch.randn(5, 3, 6, dtype=dtype, requires_grad=not lowest)
        torch.manual_seed(5)
        if together:
            y = layer(x)
        else:  # left to autograd, block by block, with the one mask that they share
            dropped, parts = Dropout(dropout)(x), []
            for name in ("query", "key", "value"):
                block = layer.get_submodule(name)
                base = getattr(block, "base", block)
                parts.append(x @ base.weight.T + base.bias)
                if block is not base:
                    parts[-1] = parts[-1] + block.scaling * (dropped @ block.lora_A.T) @ block.lora_B.T
            y = torch.cat(parts, dim=-1)
        y.square().sum().backward()
        trained = {name: p.grad for name, p in layer.named_parameters() if p.requires_grad}
        assert any(name in trained for name in ("query.weight", "key.weight", "value.weight")) == (len(adapted) < 3)
        results.append({"y": y, **({} if lowest else {"x": x.grad}), **trained})
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for name, expected in results[1].items():
        deviation = (results[0][name] - expected).abs().max() / expected.abs().max()
        assert deviation < tolerance, f"{name}: {deviation:.1e}"


def test_what_decides_the_packed_gradients_is_all_that_is_kept():
    def kept(dropout):
        layer = PackedLoRALinear(packed({"query": (2, 8.0), "value": (3, 4.0)}, dropout)).train()
        layer.requires_grad_(False)
        layer.get_submodule("query").lora_A.requires_grad_(True)
        found = []
        x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(tuple(t.shape)) or t, lambda t: t):
            layer(x)
        return found

    assert kept(0.0).count((7, 6)) == 1 and (13, 6) in kept(0.0)  # x and W + B A
    assert kept(0.5).count((7, 6)) == 2  # what dropout left of x, and the mask; not x


@pytest.mark.parametrize("merged", [False, True])
def test_packed_layer_takes_an_empty_batch(merged):
    layer = packed({"query": (2, 8.0)})
    if merged:
        layer.get_submodule("query").merge()
    assert layer(torch.empty(0, 3, 6, dtype=torch.float64)).shape == (0, 3, 13)


def test_packed_layer_without_an_unmerged_adapter_is_the_plain_product():
    layer = packed({"query": (2, 8.0), "value": (3, 8.0)})
    x = torch.randn(2, 6, dtype=torch.float64)
    before = layer(x)
    layer.get_submodule("query").merge()
    torch.testing.assert_close(layer(x), before, rtol=1e-12, atol=1e-12)  # one merged, one not
    layer.get_submodule("value").merge()
    torch.testing.assert_close(layer(x), before, rtol=1e-12, atol=1e-12)
    layer.get_submodule("query").unmerge()
    assert not layer.get_submodule("query").merged
    torch.testing.assert_close(layer(x), before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", [lambda: packed({"query": (2, 8.0), "value": (3, 4.0)}, dropout=0.5)])
def test_packed_dropout_draws_one_mask_for_all_blocks_and_none_at_evaluation(make):
    layer = make()
    x = torch.randn(4, 6, dtype=torch.float64)
    torch.manual_seed(5)
    y = layer.train()(x)
    torch.manual_seed(5)
    dropped = Dropout(0.5)(x)
    expected = []
    for name in ("query", "key", "value"):
        block = layer.get_submodule(name)
        if isinstance(block, LoRALinear):
            expected.append(block.base(x) + block.scaling * dropped @ block.lora_A.T @ block.lora_B.T)
        else:
            expected.append(block(x))
    torch.testing.assert_close(y, torch.cat(expected, dim=-1), rtol=1e-12, atol=1e-12)

    separate = [layer.get_submodule(name).eval()(x) for name in ("query", "key", "value")]
    without = packed({"query": (2, 8.0), "value": (3, 4.0)})  # the same numbers, and no dropout at all
    torch.testing.assert_close(layer.eval()(x), without(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.cat(separate, dim=-1), without(x), rtol=1e-12, atol=1e-12)


def test_single_dropout_is_on_the_input_of_the_update_alone():
    layer = filled(LoRALinear(nn.Linear(6, 4).double(), 2, 8, dropout=0.5))
    x = torch.randn(4, 6, dtype=torch.float64)
    torch.manual_seed(5)
    y = layer.train()(x)
    torch.manual_seed(5)
    expected = layer.base(x) + layer.scaling * Dropout(0.5)(x) @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


def test_merged_layer_ignores_dropout():
    layer = filled(LoRALinear(nn.Linear(6, 4).double(), 2, 8, dropout=0.5)).train()
    x = torch.randn(4, 6, dtype=torch.float64)
    expected = x @ (layer.base.weight + layer.delta_weight()).T + layer.base.bias
    layer.merge()
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
