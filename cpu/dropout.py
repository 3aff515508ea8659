"""Dropout with a mask that is cheap to draw and to store on a CPU.

    y_i = m_i x_i / (1 - p),   m_i ~ Bernoulli(1 - p), independent

On a CPU torch draws its masks one number at a time. Here 64 random bits are drawn at a time, and 16 of them decide one
element, so the probability is rounded to the nearest multiple of 2^-16 (0.1 becomes 0.100006); dividing by 1 - p with
the rounded p keeps the mean exact. For the backward pass the mask is stored as one byte per element.
Source: Srivastava et al. 2014, "Dropout", section 4; scaled during training, as is usual now.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_STEPS = 1 << 16  # probabilities are multiples of 1 / _STEPS


def rounded(p: float) -> float:
    """The probability that is used: the multiple of 2^-16 nearest to p."""
    return round(p * _STEPS) / _STEPS


def dropout_mask(shape: torch.Size, p: float) -> Tensor:
    """1 where an element is kept and 0 where it is dropped: uint8, of any shape, on the CPU.

    Determined by `torch.manual_seed`: torch's default generator seeds each mask. The bits come from numpy's
    SFC64, which takes half the time of torch's Mersenne twister. Source: Doty-Humphrey 2010, PractRand, sfc64.
    """
    seed = int(torch.empty((), dtype=torch.int64).random_())
    words = np.random.SFC64(seed).random_raw(-(-shape.numel() // 4))  # 4 elements per word
    bits = torch.from_numpy(words.view(np.int16))[: shape.numel()].view(shape)  # uniform in -32768 ... 32767
    # The comparison writes bytes directly; a bool mask would take several times as long to create and to use.
    return torch.ge(bits, round(p * _STEPS) - _STEPS // 2, out=torch.empty(shape, dtype=torch.uint8))


class _Dropout(torch.autograd.Function):
    """x m / (1 - p); only the mask is saved for the backward pass."""

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
    """`nn.Dropout` with masks from `dropout_mask` on the CPU, and torch's on other devices."""

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
