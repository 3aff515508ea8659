"""Weights in 8 and 4 bits, and AdamW's moments in 8, against bitsandbytes.

Where its parts differ, the reference is its portable code, which computes what its GPU kernels do: its CPU kernel for
blocks looks codes up in a table of 65,536 entries, and so misses the nearest level now and then.
"""

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from lora.adapter import adapters
from lora.config import BitFitConfig, BottleneckConfig, LoRAConfig, PrefixTuningConfig
from lora.inject import inject_lora
from lora.quantized import (
    NF4,
    SIGNED,
    UNSIGNED,
    QuantizedLinear,
    dequantize,
    dequantize_blocks,
    nearest,
    quantize,
    quantize_blocks,
)
from roberta.config import RobertaConfig
from roberta.weights import load_checkpoint
from tests.parity.oracle import (
    assert_close,
    assert_same,
    our_copy,
    our_name,
    peft_config,
    ragged_batch,
    reference_model,
)
from tests.parity.test_methods import METHODS
from training.adamw8bit import AdamW8bit
from training.setup import load_base

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes has no wheel for this machine")

WEIGHTS = {
    "random": lambda: torch.randn(256, 192) / 30,
    "constant": lambda: torch.full((256, 192), -0.37),
    "zero": lambda: torch.zeros(256, 192),
    "huge": lambda: torch.randn(256, 192) * 1e30,
    "tiny": lambda: torch.randn(256, 192) * 1e-37,
    "of all sizes": lambda: torch.randn(256, 192) * 10.0 ** torch.randint(-9, 9, (256, 192)),
}


def portable(x: torch.Tensor, levels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """bitsandbytes' `quantize_blockwise` as written in PyTorch, in blocks of 256."""
    kernel = torch.library.get_kernel("bitsandbytes::quantize_blockwise", "XLA")  # one that has no kernel of its own
    return kernel.call_boxed(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), x, levels, 256)


def layer(weight: torch.Tensor, bits: int) -> QuantizedLinear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight
    return QuantizedLinear(linear, bits)


@pytest.mark.parametrize("levels", [NF4, SIGNED, UNSIGNED], ids=["NF4", "signed", "unsigned"])
def test_the_nearest_level_of_any_float(levels):
    """Of random bits and of the floats around each threshold, by the table as by a search."""
    middles = (levels[:-1] + levels[1:]) / 2
    bits = middles.view(torch.int32)
    assert len((bits >> 16).unique()) == len(bits), "two thresholds share their upper bits"
    near = torch.cat([bits - 1, bits, bits + 1, torch.randint(-(2**31), 2**31 - 1, (100_000,), dtype=torch.int32)])
    x = near.view(torch.float32).nan_to_num()
    assert_same(nearest(x, levels).long(), torch.bucketize(x, middles), "codes")


def test_levels():
    assert_same(NF4, bnb.functional.get_4bit_type("nf4", device="cpu"), "NF4")
    assert_same(SIGNED, bnb.functional.create_dynamic_map(signed=True), "signed")
    assert_same(UNSIGNED, bnb.functional.create_dynamic_map(signed=False), "unsigned")


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_checkpoint_is_quantized_as_it_is_read(tmp_path, dtype, bits):
    """In 8 and 4 bits from 16 or 32: the values that bitsandbytes would get from the model read without quantizing."""
    reference_model().to(dtype).save_pretrained(tmp_path)
    read = load_base(tmp_path, RobertaConfig.from_file(tmp_path / "config.json"), False, bits)
    for name, module in load_checkpoint(tmp_path).named_modules():
        if isinstance(module, nn.Linear) and name.startswith("roberta"):
            assert_same(read.get_submodule(name).weight, QuantizedLinear(module, bits).weight, name)
        elif not [*module.children()]:
            mine = read.get_submodule(name).state_dict()
            assert all(torch.equal(value, mine[key]) for key, value in module.state_dict().items()), name


@pytest.mark.parametrize("name", WEIGHTS)
def test_rows_in_8_bits(name):
    weight = WEIGHTS[name]()
    ours = layer(weight, 8)
    codes, absmax, _ = torch.ops.bitsandbytes.int8_vectorwise_quant(weight)
    assert_same(ours.codes, codes, "codes")
    assert_same(ours.absmax.view(torch.float32), absmax, "absmax")
    assert_same(ours.weight, torch.ops.bitsandbytes.int8_vectorwise_dequant(codes, absmax), "dequantized")


@pytest.mark.parametrize("name", WEIGHTS)
def test_nf4_with_double_quantization(name):
    weight = WEIGHTS[name]()
    ours = layer(weight, 4)
    codes, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    offset = state.absmax.mean()
    absmax_codes, absmax = portable(state.absmax - offset, SIGNED)
    assert_same(ours.codes, codes.flatten(), "codes")
    assert_same(ours.offset.view(torch.float32), offset, "mean of absmax")
    assert_same(ours.absmax_codes, absmax_codes, "codes of absmax")
    assert_same(ours.absmax.view(torch.float32), absmax, "absmax of absmax")
    state.absmax, state.offset, state.nested = absmax_codes, offset, True
    state.state2 = bnb.functional.QuantState(absmax=absmax, code=SIGNED, blocksize=256, dtype=torch.float32)
    assert_same(ours.weight, bnb.functional.dequantize_4bit(codes, state), "dequantized")


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("levels", [SIGNED, UNSIGNED], ids=["signed", "unsigned"])
def test_blocks_in_8_bits(name, levels):
    x = WEIGHTS[name]().flatten()[:-56]  # the last block is shorter
    x = x if levels is SIGNED else x.abs()
    codes, absmax = portable(x, levels)
    ours = quantize_blocks(x, levels, 256)
    assert_same(ours[0], codes, "codes")
    if name != "zero":  # of a last block of zeros, bitsandbytes stores 1e-38
        assert_same(ours[1], absmax, "absmax")
    expected = bnb.functional.dequantize_blockwise(codes, absmax=absmax, code=levels, blocksize=256)
    assert_same(dequantize_blocks(*ours, levels, 256), expected, "dequantized")


def test_its_table_on_a_cpu_is_at_most_its_step_away():
    x = torch.randn(1 << 16)
    theirs = bnb.functional.quantize_blockwise(x, code=SIGNED, blocksize=256)[0]
    ours, absmax = quantize_blocks(x, SIGNED, 256)
    error, of_theirs = ((dequantize_blocks(codes, absmax, SIGNED, 256) - x).abs() for codes in (ours, theirs))
    assert 0 < (ours != theirs).float().mean() < 0.01
    assert bool((error <= of_theirs).all()) and bool((of_theirs - error <= absmax.max() * 2**-15).all())


def test_lora_over_nf4_is_that_of_peft_over_bitsandbytes(tmp_path):
    """Logits and gradients in float32, with the statistics that bitsandbytes' CPU kernel found."""
    ours = our_copy(reference_model(), tmp_path, torch.float32)
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["classifier"],
    )
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, quantization_config=settings, device_map="cpu", dtype=torch.float32
    )
    quantize(ours.roberta, 4)
    found = {name: module for name, module in theirs.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    assert len(found) == 12
    for name, module in found.items():
        mine, state = ours.get_submodule(name), module.weight.quant_state
        assert_same(mine.codes, module.weight.flatten(), f"{name}: codes")
        mine.absmax_codes.copy_(state.absmax)
        (
            mine.absmax.copy_(state.state2.absmax.view(torch.int32)),
            mine.offset.copy_(state.offset.view(torch.int32)),
        )
    config = LoRAConfig(rank=3, alpha=8, target_modules=("query", "value", "output.dense"))
    inject_lora(ours, config)
    adapted = peft.get_peft_model(theirs, peft_config(config))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    wanted = {our_name(name): value for name, value in adapted.named_parameters() if value.requires_grad}
    mine = {name: value for name, value in ours.named_parameters() if value.requires_grad}
    assert wanted.keys() == mine.keys()
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(wanted[name])
    batch = ragged_batch([5, 9, 3])
    labels = batch.pop("labels")
    logits, expected = ours(**batch), adapted.train()(**batch).logits  # in eval mode it rounds x to bfloat16
    assert_close(logits, expected, 1e-5, "logits")
    F.cross_entropy(logits, labels).backward(), F.cross_entropy(expected, labels).backward()
    for name, parameter in mine.items():
        assert_close(parameter.grad, wanted[name].grad, 1e-4, name)


METHODS_HERE = {name: case.ours for name, case in METHODS.items()} | {
    "PiSSA": LoRAConfig(rank=2, init="pissa"),
    "BitFit": BitFitConfig(),
    "bottleneck": BottleneckConfig(form="houlsby", reduction_factor=4),
    "prefix tuning": PrefixTuningConfig(num_virtual_tokens=3),
}


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("method", METHODS_HERE)
def test_each_method_over_few_bits_is_the_method_over_the_dequantized_base(tmp_path, bits, method):
    quantized = our_copy(reference_model(), tmp_path)
    quantize(quantized.roberta, bits)
    plain = our_copy(reference_model(), tmp_path)
    quantize(plain.roberta, bits)
    assert dequantize(plain.roberta) == 12
    batch = ragged_batch([5, 9, 3])
    labels, logits = batch.pop("labels"), []
    for model in (quantized, plain):
        torch.manual_seed(3)
        inject_lora(model, METHODS_HERE[method])
        with torch.no_grad():
            for adapter in adapters(model).values():
                for value in adapter.own_parameters().values():
                    value.add_(torch.randn_like(value) * 0.2)
        logits.append(model.train()(**batch))  # with the same dropout
        F.cross_entropy(logits[-1], labels).backward()
    assert_close(*logits, what="logits")
    theirs = {name: value for name, value in plain.named_parameters() if value.requires_grad}
    for name, parameter in quantized.named_parameters():
        if parameter.requires_grad:
            expected = theirs.pop(name).grad
            if not name.endswith("key.bias"):  # a softmax does not see it: its gradient is rounding alone
                assert_close(parameter.grad, expected, what=name)
    assert not theirs


@pytest.mark.parametrize("chunk", [2**18, 1024])
def test_fifty_steps_of_adamw_in_8_bits(monkeypatch, chunk):
    """On a matrix whose moments are quantized, at once or in chunks, and on one that is too small for it."""
    monkeypatch.setattr("training.adamw8bit._CHUNK", chunk)

    def requantize(x, code, absmax_out, out, blocksize):
        codes, absmax = portable(x, SIGNED if code[0] < 0 else UNSIGNED)
        out.copy_(codes), absmax_out.copy_(absmax)

    monkeypatch.setattr("bitsandbytes.backends.cpu.ops._quant_blockwise_fp32_direct", requantize)
    ours, theirs = ([nn.Parameter(torch.linspace(-1, 1, n).reshape(-1, 50)) for n in (20_000, 4050)] for _ in range(2))
    groups = [{"params": [p], "lr": 3e-2, "weight_decay": decay} for p, decay in zip(ours, (0.1, 0.0), strict=True)]
    optimizer = AdamW8bit(groups)
    reference = bnb.optim.AdamW8bit([{**group, "params": [p]} for group, p in zip(groups, theirs, strict=True)])
    for step in range(50):
        for one, other in zip(ours, theirs, strict=True):
            gradient = torch.randn(one.shape) * 10.0 ** (step % 5 - 4) + one.detach()
            one.grad, other.grad = gradient, gradient.clone()
        optimizer.step(), reference.step()
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other, 1e-6, "parameters")
        for name, of_theirs in (("exp_avg", "state1"), ("exp_avg_sq", "state2")):
            mine, its = optimizer.state[one][name], reference.state[other][of_theirs]
            assert mine.dtype == its.dtype
            assert_close(mine.float().flatten(), its.float().flatten(), 1e-6, f"{name} as stored")
