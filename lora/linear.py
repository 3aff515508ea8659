"""LoRA: a frozen matmul and a trainable update of low rank.

    y = x W^T + b + s * dropout(x) A^T B^T,     s = alpha / r    (alpha / sqrt(r) with rank-stabilised LoRA)

W (out, in) and b (out,) are pretrained and frozen; A (r, in) and B (out, r) are trained, and r is small: instead of
out * in numbers, r * (in + out) are learned. B starts at zero, so training starts exactly at the pretrained model.

Which layers of a model are wrapped, and what else is trained, is decided in `lora.inject`.
Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from lora.adapter import Adapter


class LoRALinear(Adapter):
    """An `nn.Linear` (`base`, frozen) with a trainable update of rank `rank`.

    A and B start as in the authors' code and in peft (the paper draws A from a Gaussian).
    `use_rslora` scales by alpha / sqrt(rank), which keeps the size of the update independent of the rank.
    Source: Kalajdzievski 2023, "A Rank Stabilization Scaling Factor", theorem 3.2.
    """

    method = "LoRA"
    peft_keys = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}  # noqa: RUF012  a constant

    def __init__(
        self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0, *, use_rslora: bool = False
    ) -> None:
        super().__init__(base)
        self.rank = rank
        self.scaling = alpha / math.sqrt(rank) if use_rslora else alpha / rank
        self.dropout = nn.Dropout(dropout)
        self.lora_A = self.parameter_like(rank, base.in_features)
        self.lora_B = self.parameter_like(base.out_features, rank)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A uniform in +-1/sqrt(in), B zero: the update starts at exactly zero."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # bound: sqrt(6 / ((1 + a^2) in)) = 1 / sqrt(in)
        nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        y = self.base(x)  # x W^T + b
        if self.is_merged:
            return y
        x_A = F.linear(self.dropout(x), self.lora_A.to(x.dtype))  # (..., r)
        return y + F.linear(self.scaling * x_A, self.lora_B.to(x.dtype))  # scaling (..., r) is cheapest

    def delta_weight(self) -> Tensor:
        """The update as a matrix: scaling * B A, (out, in)."""
        return self.scaling * (self.lora_B @ self.lora_A)

    def merged(self) -> tuple[Tensor, Tensor | None]:
        """W' = W + scaling * B A, (out, in); b' = b."""
        return self.base.weight + self.delta_weight().to(self.base.weight.dtype), self.base.bias

    def settings(self) -> dict[str, float]:
        """Rank and scaling; alpha is part of the latter."""
        return {"rank": self.rank, "scaling": self.scaling}
