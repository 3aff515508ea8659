"""LoRA on a packed projection: several frozen matmuls on one input as one, and their updates as two thin ones.

The method itself is `lora.linear`; here it is only arranged so that query, key and value, which read the same x, don't
read it three times. What a packed projection is: `roberta.model.PackedLinear`, or any module with `packed_blocks`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lora.linear import LoRALinear
from ops.linear import add_product_, linear


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
        self.packed_blocks: tuple[str, ...] = packed.packed_blocks  # names of its children, in the order of columns
        for name in self.packed_blocks:
            self.add_module(name, packed.get_submodule(name))

    def forward(self, x: Tensor, blocks: tuple[str, ...] | None = None) -> Tensor:
        """(batch, ..., in) -> (batch, ..., sum of the blocks' out): the named blocks in the order given, or all."""
        modules = [self.get_submodule(name) for name in blocks or self.packed_blocks]
        bases = [module.base if isinstance(module, LoRALinear) else module for module in modules]
        shape, x = x.shape[:-1], x.flatten(0, -2)  # (tokens, in): of 2-D input y is no view, and can be added to
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
        low = linear(adapted[0].dropout(x), stacked_A.to(x.dtype))  # (tokens, sum r)
        # Into y itself, whose old value no gradient needs: one pass over memory less than a sum.
        return add_product_(y, low.to(y.dtype), stacked_B.to(y.dtype)).view(*shape, y.shape[-1])
