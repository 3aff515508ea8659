"""Where LoRA's A (r, in) and B (out, r) start, by `lora.init`.

    default         A uniform in +-1/sqrt(in), B = 0
    gaussian        A normal with standard deviation 1/r, B = 0
    orthogonal      A^T = M Q_1 / 10, B = N Q_2 / 10: M, N normal, Q_1, Q_2 alternate rows of an orthogonal matrix
    pissa           W = U S V^T:  B = U_r sqrt(S_r / s), A = sqrt(S_r / s) V_r^T, of the r largest singular values
    pissa_niter_N   the same by a randomized decomposition with N iterations, which is faster
    olora           W = Q R:  B = the first r columns of Q, A = the first r rows of R
    eva             A from the layer's inputs, which need the model and batches: `lora.eva`, B = 0

With the first three and eva B A = 0, so training starts at the pretrained model. The others start at an update of
s B0 A0, which is a part of W. It is subtracted from W, so training starts at the pretrained model too:

    y = x (W - s B0 A0)^T + b + s dropout(x) A^T B^T

peft writes W - s B0 A0 into the base. Here the base keeps W, and the file holds an ordinary LoRA over it, of rank 2r:
W - s B0 A0 + s B A = W + s [B, -B0] [A; A0]. peft writes the same file if it is asked to convert.

Sources: Hu et al. 2021, section 4.1 (gaussian; default is their code's); datta0.github.io/posts/rethink-lora-init
(orthogonal); Meng et al. 2024, "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language
Models", section 3; Buyukakyuz 2024, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.adapter import Adapter
from lora.linear import LoRALinear

INITS = re.compile("default|gaussian|orthogonal|pissa|pissa_niter_[0-9]+|olora|eva")


def takes_from_base(init: str) -> bool:
    """Whether the initial update is a part of W."""
    return init == "olora" or init.startswith("pissa")


@torch.no_grad()
def initialize(layer: LoRALinear, init: str) -> None:
    """Set A and B of a new layer to peft's values: the same draws from torch's generator, the same decompositions."""
    weight, rank = layer.base.weight.to(layer.lora_A.dtype), layer.rank
    if init == "gaussian":
        layer.lora_A.normal_(std=1 / rank)
    elif init == "orthogonal":
        Q, _ = torch.linalg.qr(torch.randn(rank, rank))
        layer.lora_A.copy_((torch.randn(layer.base.in_features, rank // 2) @ Q[0::2]).T / 10)
        layer.lora_B.copy_(torch.randn(rank // 2, layer.base.out_features).T @ Q[1::2] / 10)
    elif init == "olora":
        Q, R = torch.linalg.qr(weight)
        layer.lora_A.copy_(R[:rank]), layer.lora_B.copy_(Q[:, :rank])
    elif init.startswith("pissa"):
        if init == "pissa":
            U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        else:
            U, S, V = torch.svd_lowrank(weight, rank, niter=int(init.rpartition("_")[2]))
            Vh = V.T
        root = (S[:rank] / layer.scaling).sqrt().diag()
        layer.lora_A.copy_(root @ Vh[:rank]), layer.lora_B.copy_(U[:, :rank] @ root)
    if isinstance(layer, ResidualLoRALinear):
        layer.initial_A.copy_(layer.lora_A), layer.initial_B.copy_(layer.lora_B)


class ResidualLoRALinear(LoRALinear):
    """A `LoRALinear` whose initial update s B0 A0 is a part of W: y = x (W - s B0 A0)^T + b + s dropout(x) A^T B^T."""

    initial_A: Tensor
    initial_B: Tensor

    def __init__(self, base: nn.Linear, *args: Any, **settings: Any) -> None:
        super().__init__(base, *args, **settings)
        self.register_buffer("initial_A", self.lora_A.detach().clone(), persistent=False)
        self.register_buffer("initial_B", self.lora_B.detach().clone(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        y = super().forward(x)
        if self.is_merged:
            return y
        x_A0 = F.linear(x, self.initial_A.to(x.dtype))  # (..., r)
        return y - F.linear(self.scaling * x_A0, self.initial_B.to(x.dtype))

    def delta_weight(self) -> Tensor:
        """The update of W: s (B A - B0 A0), (out, in)."""
        return super().delta_weight() - self.scaling * (self.initial_B @ self.initial_A)

    def settings(self) -> dict[str, float]:
        """Rank of the update of W, and scaling: those of the file."""
        return {"rank": 2 * self.rank, "scaling": self.scaling}

    def in_file(self) -> dict[str, Tensor]:
        """[A; A0] and [B, -B0]."""
        return {
            "lora_A": torch.cat([self.lora_A, self.initial_A]),
            "lora_B": torch.cat([self.lora_B, -self.initial_B], dim=1),
        }

    def load(self, tensors: Mapping[str, Tensor], planned: Adapter) -> None:
        """Copy A and B, and where they started."""
        A, B = tensors["lora_A"], tensors["lora_B"]
        self.lora_A.copy_(A[: self.rank]), self.initial_A.copy_(A[self.rank :])
        self.lora_B.copy_(B[:, : self.rank]), self.initial_B.copy_(-B[:, self.rank :])
