"""VeRA: one random pair A, B, frozen and shared by all layers; each layer trains two vectors that scale it.

    y = x W^T + b + l_b * ((l_d * (dropout(x) A^T)) B^T),     A (r, in), B (out, r), l_d (r,), l_b (out,)

A and B have the size of the largest layer; a smaller one uses their first columns and rows. l_b starts at zero, so
training starts exactly at the pretrained model.
Source: Kopiczko et al. 2023, "VeRA: Vector-based Random Matrix Adaptation", section 3.1, equation 2.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.adapter import Adapter


class Projections(nn.Module):
    """The shared A (rank, inputs) and B (outputs, rank), drawn as peft draws them.

    Uniform in +-sqrt(6 / columns), A before B, by a generator that starts at `seed`: the same on every machine.
    """

    A: Tensor
    B: Tensor

    def __init__(self, rank: int, inputs: int, outputs: int, seed: int, like: Tensor) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
            bound = math.sqrt(6 / shape[1])
            if like.is_meta:  # shapes alone, whatever rank a file claims
                drawn = torch.empty(shape, device="meta")
            else:
                drawn = torch.empty(shape, device="cpu").uniform_(-bound, bound, generator=generator)
            self.register_buffer(name, drawn.to(like), persistent=False)


class VeRALinear(Adapter):
    """An `nn.Linear` (`base`, frozen) with trained vectors `lambda_d` and `lambda_b` around shared projections."""

    method = "VeRA"
    peft_keys = {"lambda_d": "vera_lambda_d", "lambda_b": "vera_lambda_b"}  # noqa: RUF012  a constant

    def __init__(self, base: nn.Linear, projections: Projections, dropout: float, d_initial: float) -> None:
        super().__init__(base)
        self.projections = projections
        self.dropout = nn.Dropout(dropout)
        self.lambda_d = self.parameter_like(len(projections.A))
        self.lambda_b = self.parameter_like(base.out_features)
        nn.init.constant_(self.lambda_d, d_initial), nn.init.zeros_(self.lambda_b)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        y = self.base(x)  # x W^T + b
        if self.is_merged:
            return y
        A, B = (matrix.to(x.dtype) for matrix in self.slices())
        x_A = self.lambda_d.to(x.dtype) * F.linear(self.dropout(x), A)  # (..., r)
        return y + self.lambda_b.to(x.dtype) * F.linear(x_A, B)

    def slices(self) -> tuple[Tensor, Tensor]:
        """This layer's part of A, (r, in), and of B, (out, r)."""
        return self.projections.A[:, : self.base.in_features], self.projections.B[: self.base.out_features]

    def merged(self) -> tuple[Tensor, Tensor | None]:
        """W' = W + diag(l_b) B diag(l_d) A, (out, in); b' = b."""
        A, B = self.slices()
        update = (self.lambda_b[:, None] * B) @ (self.lambda_d[:, None] * A)
        return self.base.weight + update.to(self.base.weight.dtype), self.base.bias

    def settings(self) -> dict[str, float]:
        """The rank."""
        return {"rank": len(self.lambda_d)}
