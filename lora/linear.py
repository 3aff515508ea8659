"""LoRA's layers: a frozen matmul and its trainable low-rank update.

    y = x W^T + b + s * dropout(x) A^T B^T,     s = alpha / r    (alpha / sqrt(r) with rank-stabilised LoRA)

W (out, in) and b (out,) are pretrained and frozen; A (r, in) and B (out, r) are trained, and r is small: instead of
out * in numbers, r * (in + out) learn. B starts at zero, so training starts exactly at the pretrained model.

Which layers of a model are wrapped, and what else is trained, is `lora.inject`'s decision.
Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.dropout import Dropout
from ops.linear import linear


class LoRALinear(nn.Module):
    """An `nn.Linear` (`base`, frozen here) with a trainable update of rank `rank`.

        y = base(x) + scaling * dropout(x) A^T B^T

    A is drawn Kaiming-uniform with a = sqrt(5), that is uniform in +-1/sqrt(in), and B is zero, as in the reference
    implementation and in peft. Both are float32 at least, also over a half-precision base: an update of 1e-4 would be
    lost in bfloat16's eight bits.

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
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
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
        return y + F.linear(low * self.scaling, self.lora_B.to(x.dtype))

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


class PackedLoRALinear(nn.Module):
    """A packed projection, some of whose blocks are `LoRALinear`: two products for the update of all blocks together.

    A packed projection computes several linear layers on one input as a single wide matmul (query, key and value of
    attention); `packed_blocks` names them in the order of their output columns. Any subset may be adapted, each block
    with its own rank and scale. With q and v adapted:

        [y_q | y_k | y_v] = x [W_q ; W_k ; W_v]^T + b + dropout(x) [A_q ; A_v]^T  |s_q B_q   0     |^T
                                                                                  |  0       0     |
                                                                                  |  0     s_v B_v |

    The same numbers as three separate `LoRALinear` layers give, with one difference: the blocks share one dropout
    mask on x, where separate layers would draw one each. Every single block's distribution is unchanged.
    Every block has a bias, and all adapted blocks the same dropout probability.
    """

    def __init__(self, packed: nn.Module) -> None:
        super().__init__()
        self.packed_blocks: tuple[str, ...] = packed.packed_blocks
        for name in self.packed_blocks:
            self.add_module(name, packed.get_submodule(name))

    def forward(self, x: Tensor, blocks: tuple[str, ...] | None = None) -> Tensor:
        """(batch, ..., in) -> (batch, ..., sum of the blocks' out): the named blocks in the order given, or all."""
        modules = [self.get_submodule(name) for name in blocks or self.packed_blocks]
        bases = [module.base if isinstance(module, LoRALinear) else module for module in modules]
        shape, x = x.shape[:-1], x.flatten(0, -2)  # (tokens, in): the product is then no view, and can be added to
        y = linear(x, torch.cat([base.weight for base in bases]), torch.cat([base.bias for base in bases]))
        adapted = [module for module in modules if isinstance(module, LoRALinear) and not module.merged]
        if not adapted:
            return y.view(*shape, y.shape[-1])
        stacked_A = torch.cat([module.lora_A for module in adapted])  # (sum r, in)
        # Block-diagonal (sum out, sum r); a block without an update contributes rows but no columns.
        stacked_B = torch.block_diag(
            *(
                module.scaling * module.lora_B if module in adapted else base.weight.new_empty(base.out_features, 0)
                for module, base in zip(modules, bases, strict=True)
            )
        )
        low = F.linear(adapted[0].dropout(x), stacked_A.to(x.dtype))  # (tokens, sum r)
        # Into y itself, which no gradient needs: one pass over it less than a sum.
        return y.addmm_(low.to(y.dtype), stacked_B.to(y.dtype).T).view(*shape, y.shape[-1])
