"""LoRA's layer: a frozen matmul and its trainable low-rank update.

    y = x W^T + b + s * dropout(x) A^T B^T,     s = alpha / r    (alpha / sqrt(r) with rank-stabilised LoRA)

W (out, in) and b (out,) are pretrained and frozen; A (r, in) and B (out, r) are trained, and r is small: instead of
out * in numbers, r * (in + out) learn. B starts at zero, so training starts exactly at the pretrained model.

Which layers of a model are wrapped, and what else is trained, is `lora.inject`'s decision; three such layers on one
input are computed together by `lora.packed`.
Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.dropout import Dropout


class LoRALinear(nn.Module):
    """An `nn.Linear` (`base`, frozen here) with a trainable update of rank `rank`.

        y = base(x) + scaling * dropout(x) A^T B^T

    A is drawn Kaiming-uniform with a = sqrt(5), that is uniform in +-1/sqrt(in), and B is zero, as in the authors' code
    and in peft (the paper draws A from a Gaussian). Both are float32 at least, also over a half-precision base: an
    update of 1e-4 would be lost in bfloat16's eight bits.

    `use_rslora` scales by alpha / sqrt(rank), which keeps the size of the update independent of the rank.
    Source: Hu et al. 2021, section 4.1; Kalajdzievski 2023, "A Rank Stabilization Scaling Factor", theorem 3.2.
    """

    def __init__(
        self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0, *, use_rslora: bool = False
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.rank = rank
        self.alpha = alpha
        self.scaling = self.scaling_of(rank, alpha, use_rslora)
        self.dropout = Dropout(dropout)
        like = {"device": base.weight.device, "dtype": torch.promote_types(base.weight.dtype, torch.float32)}
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, **like))
        self.lora_B = nn.Parameter(torch.empty(base.out_features, rank, **like))
        self._unmerged_weight: Tensor | None = None  # the frozen W, kept while the layer is merged
        self.reset_parameters()

    @staticmethod
    def scaling_of(rank: int, alpha: float, use_rslora: bool) -> float:
        """The factor on the update: alpha / rank, or alpha / sqrt(rank) with rank-stabilised LoRA."""
        return alpha / math.sqrt(rank) if use_rslora else alpha / rank

    def reset_parameters(self) -> None:
        """A uniform in +-1/sqrt(in), B zero: the update starts at exactly nothing."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # bound: sqrt(6 / ((1 + a^2) in)) = 1 / sqrt(in)
        nn.init.zeros_(self.lora_B)

    @property
    def merged(self) -> bool:
        """Whether the update currently lives inside `base.weight`."""
        return self._unmerged_weight is not None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        y = self.base(x)
        if self.merged:
            return y
        low = F.linear(self.dropout(x), self.lora_A.to(x.dtype))  # (..., r): everything the update knows of x
        return y + F.linear(low * self.scaling, self.lora_B.to(x.dtype))  # s on the thin product: r numbers a token

    def delta_weight(self) -> Tensor:
        """The update as a matrix: scaling * B A, (out, in)."""
        return self.scaling * (self.lora_B @ self.lora_A)

    @torch.no_grad()
    def merge(self) -> None:
        """Fold the update into the frozen weight: W <- W + scaling * B A.

        After this the layer costs exactly one matmul. Exact in real arithmetic; in float32 the outputs differ from
        the unmerged ones by rounding only. Keeps W, as subtracting the update again would not restore its bits.
        Raises RuntimeError if already merged.
        Source: Hu et al. 2021, section 4.1, "No Additional Inference Latency".
        """
        if self.merged:
            raise RuntimeError("this layer is merged already; a second merge would add the update twice")
        self._unmerged_weight = self.base.weight.data.clone()
        self.base.weight += self.delta_weight().to(self.base.weight.dtype)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the frozen weight back: the bits of W are those before `merge`. Raises RuntimeError if not merged."""
        if self._unmerged_weight is None:
            raise RuntimeError("this layer is not merged; there is nothing to take out")
        self.base.weight.copy_(self._unmerged_weight)
        self._unmerged_weight = None

    def extra_repr(self) -> str:
        """What `print(model)` shows of the layer."""
        return f"rank={self.rank}, alpha={self.alpha}, scaling={self.scaling:.4g}, merged={self.merged}"
