"""DoRA: the length and the direction of each row of a weight are trained apart.

    y = x W'^T + b,     W' = m * (W + s B A) / |W + s B A|

|.| is the Euclidean norm of each row, (out,). m, the length, is trained and starts at |W|; A, B, s are those of LoRA.
Source: Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", section 4.1, equation 5.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.linear import LoRALinear
from lora.quantized import matmul


class DoRALinear(LoRALinear):
    """An `nn.Linear` (`base`, frozen) with LoRA's update of the direction and a trained `magnitude` m of each row.

        y = x W^T + b + (c - 1) * d W^T + c * s d A^T B^T,     c = m / |W + s B A|,  d = dropout(x)

    Without dropout this is x W'^T + b. With it, d takes the place of x in both terms of the update, while the base's
    own output uses x itself, as in peft. The norm is a constant for the gradient (section 4.3).
    """

    method = "DoRA"
    peft_keys = LoRALinear.peft_keys | {"magnitude": "lora_magnitude_vector"}

    def __init__(self, base: nn.Linear, *args: Any, **settings: Any) -> None:
        super().__init__(base, *args, **settings)
        self.magnitude = self.parameter_like(base.out_features)
        with torch.no_grad():
            self.magnitude.copy_(self.adapted_weight().norm(dim=1))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        y = self.base(x)  # x W^T + b
        if self.is_merged:
            return y
        d = self.dropout(x)
        c = self.row_scale().to(y.dtype)  # (out,)
        d_A = F.linear(d, self.lora_A.to(x.dtype))  # (..., r)
        return y + (c - 1) * matmul(d, self.base) + c * F.linear(self.scaling * d_A, self.lora_B.to(x.dtype))

    def adapted_weight(self) -> Tensor:
        """W + s B A, (out, in)."""
        return self.base.weight + self.delta_weight()

    def row_scale(self) -> Tensor:
        """c = m / |W + s B A|, (out,)."""
        return self.magnitude / self.adapted_weight().detach().norm(dim=1)

    def merged(self) -> tuple[Tensor, Tensor | None]:
        """W' = c * (W + s B A), (out, in); b' = b."""
        return (self.row_scale()[:, None] * self.adapted_weight()).to(self.base.weight.dtype), self.base.bias
