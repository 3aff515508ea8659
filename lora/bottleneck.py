"""Bottleneck adapters: a network of two small layers, added to what a sublayer adds to its input.

    h = dropout(x W^T + b)                                            the sublayer's output
    y = LayerNorm(residual + h + act(z W_down^T + b_down) W_up^T + b_up)

    z = h,                        act = SiLU    Houlsby: after attention and after the feed-forward network
    z = LayerNorm(residual + h),  act = ReLU    Pfeiffer: after the feed-forward network alone

W_down (m, hidden), b_down (m,), W_up (hidden, m) and b_up (hidden,) are trained, m = hidden // reduction_factor; the
sublayer's own W, b and LayerNorm are frozen. Pfeiffer's form applies the LayerNorm twice. Both weights start small, so
training starts near the pretrained model, but not exactly at it.

The equations are those of AdapterHub's `DoubleSeqBnConfig` and `SeqBnConfig`. Houlsby et al. train the LayerNorms too.
Sources: Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", section 2.1; Pfeiffer et al. 2021,
"AdapterFusion: Non-Destructive Task Composition for Transfer Learning".
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lora.adapter import Adapter
from lora.targets import plain_modules


class BottleneckAdapter(Adapter):
    """The module that closes a sublayer (`base`: dense, dropout, LayerNorm; frozen), with a bottleneck of a width.

    `pfeiffer` selects Pfeiffer's form, else it is Houlsby's. Weights are drawn from a Gaussian with a standard
    deviation of 0.02 and biases are zero, as in AdapterHub's library.
    """

    method = "bottleneck"
    peft_keys = {  # noqa: RUF012  a constant
        "W_down": "adapter_down.0.weight",
        "b_down": "adapter_down.0.bias",
        "W_up": "adapter_up.weight",
        "b_up": "adapter_up.bias",
    }

    def __init__(self, base: nn.Module, width: int, pfeiffer: bool) -> None:
        super().__init__(base)
        (hidden,) = self.base.LayerNorm.normalized_shape
        self.pfeiffer = pfeiffer
        self.W_down, self.b_down = self.parameter_like(width, hidden), self.parameter_like(width)
        self.W_up, self.b_up = self.parameter_like(hidden, width), self.parameter_like(hidden)
        for weight, bias in ((self.W_down, self.b_down), (self.W_up, self.b_up)):
            nn.init.normal_(weight, std=0.02)
            nn.init.zeros_(bias)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:  # type: ignore[override]  # as its base's
        """(batch, seq, in) and (batch, seq, hidden) -> (batch, seq, hidden)."""
        h = self.base.dropout(self.base.dense(x))
        z = self.base.LayerNorm(residual + h) if self.pfeiffer else h
        down = F.linear(z, self.W_down.to(z.dtype), self.b_down.to(z.dtype))  # (batch, seq, m)
        active = F.relu(down) if self.pfeiffer else F.silu(down)
        up = F.linear(active, self.W_up.to(active.dtype), self.b_up.to(active.dtype))
        return self.base.LayerNorm(residual + h + up)

    def settings(self) -> dict[str, float]:
        """The width m, and whether the form is Pfeiffer's."""
        return {"width": self.W_down.shape[0], "pfeiffer": self.pfeiffer}


def sublayer_ends(model: nn.Module, attention: bool = True) -> dict[str, Any]:
    """The modules that close a sublayer, by their names in the plain model, with or without those of attention.

    They are known by their parts: dense, dropout and LayerNorm.
    """
    return {
        name: module
        for name, module in plain_modules(model).items()
        if {"dense", "dropout", "LayerNorm"} <= {part for part, _ in module.named_children()}
        and (attention or not name.endswith("attention.output"))
    }
