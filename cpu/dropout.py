"""Dropout whose mask is cheap to draw and to keep on a CPU.

    y_i = m_i x_i / (1 - p),   m_i ~ Bernoulli(1 - p), independent

A CPU draws torch's own masks one number at a time. Here random bits are drawn 64 at a time and each 16 of them decide
one element, so the probability is rounded to the nearest multiple of 2^-16 (0.1 becomes 0.100006); dividing by 1 - p
with that same p keeps the mean exact. For the backward pass the mask is kept as one byte per element.
Source: Srivastava et al. 2014, "Dropout", section 4; scaled during training as has become usual.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_STEPS = 1 << 16  # probabilities are multiples of 1 / _STEPS


def rounded(p: float) -> float:
    """The probability that is really used: the multiple of 2^-16 nearest to p."""
    return round(p * _STEPS) / _STEPS


def dropout_mask(shape: torch.Size, p: float) -> Tensor:
    """1 where an element is kept and 0 where it is dropped: uint8, of any shape, on the CPU.

    `torch.manual_seed` decides it: torch's default generator gives the seed of each mask. The bits come from numpy's
    SFC64, which takes half the time of torch's Mersenne twister. Source: Doty-Humphrey 2010, PractRand, sfc64.
    """
    seed = int(torch.empty((), dtype=torch.int64).random_())
    words = np.random.SFC64(seed).random_raw(-(-shape.numel() // 4))  # 4 elements per word
    bits = torch.from_numpy(words.view(np.int16))[: shape.numel()].view(shape)  # uniform in -32768 ... 32767
    # A comparison written straight into bytes; a bool mask would take several times as long to make and to use.
    return torch.ge(bits, round(p * _STEPS) - _STEPS // 2, out=torch.empty(shape, dtype=torch.uint8))


class _Dropout(torch.autograd.Function):
    """x m / (1 - p), with nothing but the mask kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        mask = dropout_mask(x.shape, p)
        ctx.save_for_backward(mask)
        ctx.factor = 1 / (1 - rounded(p))
        return (x * mask).mul_(ctx.factor)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return (grad_y * mask).mul_(ctx.factor), None


class FastDropout(nn.Dropout):
    """`nn.Dropout` with masks from `dropout_mask`; on another device than the CPU, torch's own."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        if not self.training or self.p == 0 or rounded(self.p) == 1 or x.device.type != "cpu":
            return super().forward(x)
        return _Dropout.apply(x, self.p)


def use_fast_dropout(model: nn.Module) -> None:
    """Replace every `nn.Dropout` of `model` by a `FastDropout` of the same probability, in place."""
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, FastDropout(child.p).train(child.training))
