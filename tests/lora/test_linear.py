"""The layer against the formula, on numbers small enough to work out by hand."""

import math

import pytest
import torch
from torch import nn

from lora.linear import LoRALinear


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


def test_dropout_is_on_the_input_of_the_update_alone():
    layer = filled(LoRALinear(nn.Linear(6, 4).double(), 2, 8, dropout=0.5))
    x = torch.randn(4, 6, dtype=torch.float64)
    torch.manual_seed(5)
    y = layer.train()(x)
    torch.manual_seed(5)
    expected = layer.base(x) + layer.scaling * nn.Dropout(0.5)(x) @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


def test_merged_layer_ignores_dropout():
    layer = filled(LoRALinear(nn.Linear(6, 4).double(), 2, 8, dropout=0.5)).train()
    x = torch.randn(4, 6, dtype=torch.float64)
    expected = x @ (layer.base.weight + layer.scaling * layer.lora_B @ layer.lora_A).T + layer.base.bias
    layer.merge()
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
