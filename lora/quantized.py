"""Frozen weights in fewer bits: each block of numbers becomes codes of a few levels, and the block's largest number.

    8 bits   rows:  a_i = max_j |W_ij|,  q_ij = round(127 W_ij / a_i),  W'_ij = a_i q_ij / 127
    4 bits   blocks of 64 numbers:  a_k = max |w|,  q = the nearest of 16 levels to w / a_k,  w' = a'_k NF4[q]

In 4 bits the a_k are quantized too ("double quantization"), in blocks of 256 of them, to codes p of 8 bits: a'_k =
mean(a) + c_m SIGNED[p_k], c_m being the largest |a_k - mean(a)| of block m. That makes 4.127 bits per weight, and 8 +
32 / in_features in 8. Adapters beside them stay in float32.
Sources: Dettmers et al. 2022, "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", section 2.1 (of
weights alone: inputs are not quantized here); Dettmers et al. 2023, "QLoRA", section 3.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.errors import LoRAError

_BLOCK, _STATISTICS_BLOCK = 64, 256  # weights that share one a_k; a_k that share one scale


@functools.cache
def _tables(levels: Tensor) -> tuple[Tensor, Tensor]:
    """The middle between each level and the next (the last is infinite), and (65536,) the code of the smallest of all
    floats with the same upper 16 bits. At most one middle is among those, so one comparison replaces a search."""
    middles = torch.cat([(levels[:-1] + levels[1:]) / 2, levels.new_tensor([math.inf])])
    upper = torch.arange(2**16, dtype=torch.int32, device=levels.device) << 16
    smallest = (upper | (upper < 0).int() * 0xFFFF).view(torch.float32).nan_to_num()
    return middles, torch.bucketize(smallest, middles).to(torch.uint8)


def nearest(x: Tensor, levels: Tensor) -> Tensor:
    """The index of the level nearest to each number of x: uint8, in the shape of x.

    At most 256 sorted levels, no two of whose middles have the same upper 16 bits: the tables above rely on that. It
    takes 6 ns per number where `torch.bucketize` takes 82 for 256 levels.
    """
    middles, first = (table.to(x.device) for table in _tables(levels))
    codes = first.index_select(0, (x.view(torch.int32) >> 16 & 0xFFFF).flatten()).view_as(x)
    return codes + (x > middles.index_select(0, codes.flatten().int()).view_as(x))


def dynamic_levels(signed: bool) -> Tensor:
    """256 levels in [-1, 1] or [0, 1], sparse near 1 and dense near 0.

    For each exponent e = 0 ... 6: 10^(e - 6) times the middles of an even division of [0.1, 1] into 2^e parts, with
    both signs, or into 2^(e + 1) parts; and 0 and 1.
    Source: Dettmers et al. 2021, "8-bit Optimizers via Block-wise Quantization", section 1.3.
    """
    values = [0.0, 1.0]
    for e in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (e if signed else e + 1) + 1)
        middles = 10 ** (e - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [*middles.tolist(), *(-middles if signed else middles[:0]).tolist()]
    return torch.tensor(sorted(values))


SIGNED, UNSIGNED = dynamic_levels(signed=True), dynamic_levels(signed=False)
# NormalFloat: quantiles of N(0, 1), scaled to [-1, 1], one of them zero. Source: Dettmers et al. 2023, appendix E.
# fmt: off
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])
# fmt: on
_NF4_PAIRS = torch.complex(NF4.repeat_interleave(16), NF4.repeat(16))  # (256,): what a byte stands for


def quantize_blocks(x: Tensor, levels: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Codes (n,) uint8 of the n numbers of x, and the largest |x| of each block, (ceil(n / block),), in float32.

    A code is the index of the level nearest to x / absmax. The last block may be shorter.
    """
    n = x.numel()
    blocks = F.pad(x.flatten().float(), (0, -n % block)).view(-1, block)
    absmax = blocks.abs().amax(dim=1)
    scaled = blocks * (1 / absmax.clamp(min=1e-38))[:, None]
    return nearest(scaled, levels).flatten()[:n], absmax


def dequantize_blocks(codes: Tensor, absmax: Tensor, levels: Tensor, block: int) -> Tensor:
    """levels[codes] * absmax of their block: (n,) in float32."""
    n = codes.numel()
    values = F.pad(levels.to(codes.device).index_select(0, codes.int()), (0, -n % block)).view(-1, block)
    return (values * absmax[:, None]).flatten()[:n]


class QuantizedLinear(nn.Linear):
    """A frozen `nn.Linear` that stores W (out, in) in 8 or 4 bits: y = x W'^T + b, W' dequantized when it is read.

    The bias keeps its format. Statistics are the bits of float32 in tensors of integers: casting the model does not
    round them. (The last bit of a mean depends on the number of threads, as in bitsandbytes.) Raises LoRAError for
    another layer, for other bits, and in 4 bits, if 64 does not divide out * in.
    """

    codes: Tensor  # 8 bits: (out, in); 4 bits: (out * in / 2,), two weights per byte
    absmax: Tensor  # 8 bits: a, (out,); 4 bits: c, (ceil(out * in / 64 / 256),)
    absmax_codes: Tensor  # 4 bits: p, (out * in / 64,)
    offset: Tensor  # 4 bits: mean(a), ()

    def __init__(self, layer: nn.Linear, bits: int) -> None:
        nn.Module.__init__(self)
        if not isinstance(layer, nn.Linear):
            raise LoRAError(f"{type(layer).__name__} can't be quantized, only nn.Linear can")
        if bits not in (8, 4):
            raise LoRAError(f"a base in {bits} bits: choose 8, 4, or 16 for weights that are not quantized")
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bits, self.bias = bits, layer.bias
        if bits == 4 and layer.weight.numel() % _BLOCK:
            shape = f"{self.out_features} x {self.in_features}"
            raise LoRAError(f"a weight of {shape} in 4 bits: blocks of {_BLOCK} do not divide it; choose 8 bits")
        for name, tensor in self._encode(layer.weight.detach()).items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def _encode(self, weight: Tensor) -> dict[str, Tensor]:
        """What is stored of W, by name."""
        if self.bits == 8:
            absmax = weight.float().abs().amax(dim=1)  # (out,)
            codes = (weight * (127 / absmax)[:, None]).round().nan_to_num(0, 0, 0)  # (out, in); absmax may be 0
            codes = codes.to(torch.int8)
            return {"codes": codes, "absmax": absmax.view(torch.int32)}
        codes, absmax = quantize_blocks(weight, NF4, _BLOCK)
        offset = absmax.mean()
        absmax_codes, absmax = quantize_blocks(absmax - offset, SIGNED, _STATISTICS_BLOCK)
        stored = {"codes": codes[0::2] << 4 | codes[1::2], "absmax_codes": absmax_codes}  # two weights per byte
        return stored | {"absmax": absmax.view(torch.int32), "offset": offset.view(torch.int32)}

    @torch.no_grad()
    def store(self, weight: Tensor) -> None:
        """Quantize W (out, in)."""
        for name, tensor in self._encode(weight).items():
            getattr(self, name).copy_(tensor)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """W' (out, in), in the format of the bias, or float32: a copy, so `store` changes it and nothing else does."""
        codes, absmax = self.codes, self.absmax.view(torch.float32)
        if self.bits == 8:
            values = codes * absmax[:, None] * (1 / 127)
        else:
            absmax = dequantize_blocks(self.absmax_codes, absmax, SIGNED, _STATISTICS_BLOCK)
            absmax = absmax + self.offset.view(torch.float32)
            pairs = _NF4_PAIRS.to(codes.device).index_select(0, codes.int())  # (out * in / 2,)
            values = torch.view_as_real(pairs).view(-1, _BLOCK) * absmax[:, None]
        return values.view(self.out_features, -1).to(torch.float32 if self.bias is None else self.bias.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        y = matmul(x, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _Matmul(torch.autograd.Function):
    """x W'^T, (..., in) -> (..., out); W' is dequantized again for the backward pass, not kept until then."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.weight.to(x.dtype) if layer.bias is None else layer.weight)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None]:
        return grad_y @ ctx.layer.weight.to(grad_y.dtype), None


def matmul(x: Tensor, layer: nn.Linear) -> Tensor:
    """x W^T without the bias, (..., in) -> (..., out), of a quantized layer or a plain one."""
    return _Matmul.apply(x, layer) if isinstance(layer, QuantizedLinear) else F.linear(x, layer.weight)


def quantize(model: nn.Module, bits: int) -> None:
    """Replace every `nn.Linear` inside `model` by a `QuantizedLinear`, in place; also on the meta device.

    Raises LoRAError as that does, or if the model carries adapters or has no such layer.
    """
    from lora.adapter import adapters  # that module imports this one

    layers = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    if adapters(model):
        raise LoRAError("the model carries adapters; quantize it first")
    if not layers:
        raise LoRAError("no linear layer to quantize")
    for name, layer in layers.items():
        model.set_submodule(name, QuantizedLinear(layer, bits).train(layer.training))


def dequantize(model: nn.Module) -> int:
    """Replace every `QuantizedLinear` by a plain `nn.Linear` with W', in place. Returns how many there were."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    for name, layer in layers.items():
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta").train(layer.training)
        plain.weight, plain.bias = nn.Parameter(layer.weight, requires_grad=False), layer.bias
        model.set_submodule(name, plain)
    return len(layers)


def weight_counts(model: nn.Module) -> dict[int, int]:
    """How many weights a stored tensor of a quantized layer, by its id, stands for: the codes for all of W."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    stored = [(layer, tensor) for layer in layers for tensor in layer.parameters() if tensor is not layer.bias]
    return {id(tensor): layer.in_features * layer.out_features * (tensor is layer.codes) for layer, tensor in stored}
