"""Dropout whose mask is cheap to draw on a CPU.

    y_i = m_i x_i / (1 - p),   m_i ~ Bernoulli(1 - p), independent

A CPU draws torch's own masks one number at a time. Here random bits are drawn 64 at a time and each 16 of them decide
one element, so the probability is rounded to the nearest multiple of 2^-16 (0.1 becomes 0.100006); dividing by 1 - p
with that same p keeps the mean exact. On any other device torch's own dropout is used.
Source: Srivastava et al. 2014, "Dropout", section 4; scaled during training as has become usual.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_STEPS = 1 << 16  # probabilities are multiples of 1 / _STEPS


def rounded(p: float) -> float:
    """The probability that is really used on a CPU: the multiple of 2^-16 nearest to p."""
    return round(p * _STEPS) / _STEPS


def dropout_mask(like: Tensor, p: float) -> Tensor:
    """1 where an element is kept and 0 where it is dropped, in the shape and type of `like`; drawn on the CPU.

    Draws from torch's default generator, so `torch.manual_seed` decides it.
    """
    words = torch.empty(-(-like.numel() // 4), dtype=torch.int64).random_(-(1 << 63), None)  # 4 elements a word
    bits = words.view(torch.int16)[: like.numel()].view(like.shape)  # uniform in -32768 ... 32767
    mask = torch.empty_like(like, memory_format=torch.contiguous_format, requires_grad=False)
    return torch.ge(bits, round(p * _STEPS) - _STEPS // 2, out=mask)  # straight into floats, one pass


class Dropout(nn.Dropout):
    """`nn.Dropout` with masks from `dropout_mask` on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        if not self.training or self.p == 0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.p)
        return x * dropout_mask(x, self.p).mul_(1 / (1 - rounded(self.p)))

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + dropout(x), in one pass over the two."""
        if not self.training or self.p == 0:
            return residual + x
        if x.device.type != "cpu" or x.dtype != residual.dtype:
            return residual + self(x)
        return torch.addcmul(residual, x, dropout_mask(x, self.p), value=1 / (1 - rounded(self.p)))
