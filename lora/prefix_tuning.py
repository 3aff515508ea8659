"""Prefix tuning: in every layer, trained keys and values that the tokens attend to beside those of the text.

    K = [P_k; x W_k^T + b_k],   V = [P_v; x W_v^T + b_v]        K, V (p + seq, hidden), x (seq, hidden)

Each layer has its own P_k and P_v (p, hidden). The prefix has no queries, so the sequence stays as long as it was, and
the head reads <s>. It takes the first p positions, and the text those after it, as in peft (with transformers 4.51;
with later ones it can't run RoBERTa so). With a projection, every P is computed:

    P = M U^T + c           U (hidden, width), c (hidden,), each P has its own
    M = tanh(T W^T + b)     M (p, width), T (p, hidden), W (width, hidden), b (width,), shared by all

All of these are trained; once they are, the P are all that is needed, and a file holds nothing else.
Source: Li & Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", sections 4.2 and 4.3.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lora.adapter import Adapter


class Projection(nn.Module):
    """M = tanh(T W^T + b), (p, width): T is `tokens`; W and b are those of `dense`."""

    def __init__(self, num_virtual_tokens: int, hidden: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(num_virtual_tokens, hidden))
        self.dense = nn.Linear(hidden, width)

    def forward(self) -> Tensor:
        """-> (p, width)."""
        return torch.tanh(self.dense(self.tokens))


class PrefixTuning(Adapter):
    """The `nn.Linear` of an attention's keys or values (`base`, frozen), with p = `num_virtual_tokens` more rows.

    The rows are `prefix`, or those that `out` computes from `projection` if there is one. They start as standard normal
    numbers, or as what a new `out` computes; at zero with `zero`.
    """

    method = "Prefix tuning"
    peft_keys = {"prefix": "prompt_embeddings"}  # noqa: RUF012  a constant

    def __init__(self, base: nn.Linear, num_virtual_tokens: int, projection: Projection | None, zero: bool) -> None:
        super().__init__(base)
        self.num_virtual_tokens, self.projection = num_virtual_tokens, projection
        if projection is None:
            self.prefix = self.parameter_like(num_virtual_tokens, base.out_features)
            nn.init.zeros_(self.prefix) if zero else nn.init.normal_(self.prefix)
        else:
            self.out = nn.Linear(projection.dense.out_features, base.out_features).to(projection.tokens)
            if zero:
                nn.init.zeros_(self.out.weight), nn.init.zeros_(self.out.bias)

    def rows(self) -> Tensor:
        """P_k or P_v, (p, hidden)."""
        return self.prefix if self.projection is None else self.out(self.projection())

    def forward(self, x: Tensor) -> Tensor:
        """(batch, seq, in) -> (batch, p + seq, out)."""
        y = self.base(x)
        return torch.cat((self.rows().to(y.dtype).expand(len(y), -1, -1), y), dim=1)

    def settings(self) -> dict[str, float]:
        """The number of virtual tokens."""
        return {"num_virtual_tokens": self.num_virtual_tokens}

    def in_file(self) -> dict[str, Tensor]:
        """The rows."""
        return {"prefix": self.rows()}

    @torch.no_grad()
    def drop_encoder(self) -> None:
        """Replace the projection by the rows that it computes."""
        if self.projection is not None:
            self.prefix = nn.Parameter(self.rows())
            self.projection = None
            del self.out

    def load(self, tensors: Mapping[str, Tensor], planned: Adapter) -> None:
        """Copy a file's rows."""
        self.drop_encoder()
        self.prefix.copy_(tensors["prefix"])


class LaterPositions(Adapter):
    """An `nn.Embedding` of positions (`base`, frozen) that gives a real token the row `shift` further down."""

    method = PrefixTuning.method
    peft_keys = {}  # noqa: RUF012  a constant

    def __init__(self, base: nn.Embedding, shift: int) -> None:
        super().__init__(base)
        self.shift = shift

    def forward(self, position_ids: Tensor) -> Tensor:
        """(batch, seq) -> (batch, seq, hidden)."""
        return self.base(position_ids + self.shift * (position_ids != self.base.padding_idx))

    def settings(self) -> dict[str, float]:
        """The shift."""
        return {"shift": self.shift}
