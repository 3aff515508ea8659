"""(IA)^3: one learned number per feature, which scales it.

    y = l * (x W^T + b)        l (out,)       keys, values
    y = (l * x) W^T + b        l (in,)        the feed-forward network's second matmul: l scales its input

l starts at one, so training starts exactly at the pretrained model.
Source: Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
section 3.3.
"""

from __future__ import annotations

from torch import Tensor, nn

from lora.adapter import Adapter


class IA3Linear(Adapter):
    """An `nn.Linear` (`base`, frozen) whose output, or whose input if `feedforward`, is scaled by a trained vector."""

    method = "IA3"
    peft_keys = {"ia3_l": "ia3_l"}  # noqa: RUF012  a constant

    def __init__(self, base: nn.Linear, feedforward: bool) -> None:
        super().__init__(base)
        self.feedforward = feedforward
        # As in peft's file, l has the shape in which it scales W: a row for inputs, a column for outputs.
        self.ia3_l = (
            self.parameter_like(1, base.in_features) if feedforward else self.parameter_like(base.out_features, 1)
        )
        nn.init.ones_(self.ia3_l)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if self.is_merged:
            return self.base(x)
        scale = self.ia3_l.flatten().to(x.dtype)
        return self.base(x * scale) if self.feedforward else self.base(x) * scale

    def merged(self) -> tuple[Tensor, Tensor | None]:
        """W' = W * l, each column scaled if `feedforward`, else each row; b' = b, or l * b."""
        weight, bias = self.base.weight * self.ia3_l.to(self.base.weight.dtype), self.base.bias
        return weight, bias if self.feedforward or bias is None else bias * self.ia3_l.flatten().to(bias.dtype)

    def settings(self) -> dict[str, float]:
        """Whether the input is scaled."""
        return {"feedforward": self.feedforward}
