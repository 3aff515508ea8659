"""A base in 8 or 4 bits: what is stored, counted, merged, refused. The numbers are proven in tests/parity."""

import dataclasses

import pytest
import torch
from torch import nn

from lora import LoRAConfig, LoRAError, count_parameters, inject_lora, merge_lora, unload_lora
from lora.config import BitFitConfig, FullConfig
from lora.quantized import QuantizedLinear, dequantize, quantize
from training.adamw8bit import AdamW8bit

CONFIG = LoRAConfig(rank=2, target_modules=("0",), modules_to_save=("2",))


def network(bits: int | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 4))
    if bits:
        model[0] = QuantizedLinear(model[0], bits)
    return model


@pytest.mark.parametrize(("bits", "stored"), [(8, 32 * 64 + 4 * 64), (4, 32 * 64 / 2 + 32 * 64 / 64 + 4 + 4)])
def test_fewer_bytes_but_as_many_parameters(bits, stored):
    model = network(bits)
    assert isinstance(model[0], QuantizedLinear) and type(model[2]) is nn.Linear
    assert sum(p.nbytes for name, p in model[0].named_parameters() if name != "bias") == stored
    count = count_parameters(
        inject_lora(model, dataclasses.replace(CONFIG, target_modules="0.*"))
    )  # no part of layer 0
    assert count == count_parameters(inject_lora(network(), CONFIG))
    assert count.total == 32 * 64 + 64 + 2 * (32 + 64) + 64 * 4 + 4


@pytest.mark.parametrize("bits", [8, 4])
def test_casting_the_model_keeps_the_statistics(bits):
    layer = network(bits)[0]
    weight = layer.weight
    assert torch.equal(layer.to(torch.bfloat16).weight, weight.bfloat16())
    assert torch.equal(layer.double().float().weight, weight)


@pytest.mark.parametrize("use_dora", [False, True])
def test_the_dequantized_weight_is_not_kept_for_the_backward_pass(use_dora):
    model, kept = inject_lora(network(4), dataclasses.replace(CONFIG, use_dora=use_dora)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        model(torch.randn(5, 32, requires_grad=True))  # as from a layer below with adapters
    assert kept and not {(64, 32), (32, 64)} & set(kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_formats_of_inputs(dtype):
    """Without a bias, cast as a whole; and float32 under autocast, where the gradient of x keeps its format."""
    layer, x = QuantizedLinear(nn.Linear(32, 64, bias=False), 4), torch.randn(5, 32, requires_grad=True)
    assert layer.to(dtype)(x.to(dtype)).dtype == dtype
    layer = network(4)[0]
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), layer(x), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("bits", [8, 4])
def test_merging_dequantizes_and_unmerging_restores_the_function(bits):
    model = inject_lora(network(bits), CONFIG).double()
    nn.init.normal_(model[0].lora_B)
    x = torch.randn(7, 32, dtype=torch.float64)
    expected, before = model(x), model[0].base(x)
    merge_lora(model)
    assert type(model[0].base) is nn.Linear and not model[0].base.weight.requires_grad
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    model[0].unmerge()
    torch.testing.assert_close(model[0].base(x), before, rtol=1e-12, atol=1e-12)
    merge_lora(model)
    torch.testing.assert_close(unload_lora(model)(x), expected, rtol=1e-12, atol=1e-12)


def test_dequantizing_gives_the_stored_weights():
    model, again = network(4).eval(), network(4)
    assert dequantize(model) == 1 and type(model[0]) is nn.Linear and not model[0].training
    assert torch.equal(model[0].weight, again[0].weight) and torch.equal(model[0].bias, network()[0].bias)
    assert dequantize(model) == 0


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda: quantize(network(), 3), "a base in 3 bits: choose 8, 4, or 16"),
        (lambda: quantize(nn.Sequential(nn.Tanh()), 4), "no linear layer to quantize"),
        (lambda: QuantizedLinear(nn.Embedding(9, 8), 4), "Embedding can't be quantized, only nn.Linear"),
        (lambda: quantize(nn.Sequential(nn.Linear(9, 5)), 4), "a weight of 5 x 9 in 4 bits: blocks of 64"),
        (
            lambda: quantize(nn.Sequential(inject_lora(network(), CONFIG)[0]), 4),
            "the model carries adapters; quantize it first",
        ),
        (lambda: inject_lora(network(4), FullConfig(modules_to_save=("0",))), "full: 0 is quantized"),
        (lambda: inject_lora(network(8), BitFitConfig(modules_to_save=("0",))), "bitfit: 0 is quantized"),
    ],
)
def test_what_can_not_be_quantized_or_trained_is_named(action, message):
    with pytest.raises(LoRAError, match=message):
        action()


def test_the_codes_of_adamw_are_not_cast():
    optimizer = AdamW8bit([{"params": [nn.Parameter(torch.zeros(4096))]}])
    with pytest.raises(NotImplementedError, match="optimizer.state"):
        optimizer.load_state_dict(optimizer.state_dict())
