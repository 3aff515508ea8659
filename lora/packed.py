"""LoRA on a packed projection: several frozen matmuls on one input as one, and their updates together.

The method itself is `lora.linear`; here it is only arranged so that query, key and value, which read the same x, don't
read it three times. What a packed projection is: `roberta.model.PackedLinear`, or any module with `packed_blocks`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora.linear import LoRALinear
from ops.linear import in_full_precision_on_cpu, linear, product


class PackedLoRALinear(nn.Module):
    """A packed projection, some of whose blocks are `LoRALinear`: the update of all blocks together.

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
        weight = torch.cat([base.weight for base in bases])  # (sum out, in)
        bias = torch.cat([base.bias for base in bases])
        adapted = [module for module in modules if isinstance(module, LoRALinear) and not module.merged]
        if not adapted:
            return linear(x, weight, bias)
        stacked_A = torch.cat([module.lora_A for module in adapted])  # (sum r, in)
        # Block-diagonal (sum out, sum r); a block without an update contributes rows but no columns.
        stacked_B = torch.block_diag(
            *(
                module.scaling * module.lora_B if module in adapted else base.weight.new_empty(base.out_features, 0)
                for module, base in zip(modules, bases, strict=True)
            )
        )
        shape, x = x.shape[:-1], x.flatten(0, -2)  # (tokens, in)
        dropped = adapted[0].dropout(x)  # x itself without dropout
        if in_full_precision_on_cpu(x):
            y = _Adapted.apply(x, None if dropped is x else dropped, weight, bias, stacked_A, stacked_B)
        else:
            y = linear(x, weight, bias)
            y = torch.addmm(y, linear(dropped, stacked_A.to(x.dtype)).to(y.dtype), stacked_B.to(y.dtype).t())
        return y.view(*shape, y.shape[-1])


class _Adapted(torch.autograd.Function):
    """y = x W^T + b + d A^T B^T, d being x or what dropout left of it, and the scales within B.

    Shapes: x, d (tokens, in); W (out, in); b (out,); A (r, in); B (out, r); y (tokens, out), where r is the sum of the
    adapted blocks' ranks and out that of all blocks' outputs.

    Without dropout it is y = x W'^T + b with W' = W + B A: r multiply-adds for each number of W instead of each token's
    r (in + out), and W' takes no more memory than the stacked W. The way back, with G = dL/dy and U = G B, (tokens, r):

        dL/dA = U^T d,   dL/dB = G^T (d A^T),   dL/dx = G W' without dropout, else dL/dx = G W and dL/dd = U A

    G W and G B are one product with [W | B], so that G, the largest of all, is read once less.
    Source: Hu et al. 2021, section 4.1; the gradients are derived in docs/walkthrough.md, section 8.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropped: Tensor | None, weight: Tensor, bias: Tensor, A: Tensor, B: Tensor
    ) -> Tensor:
        x = x.contiguous()
        low = None
        if dropped is None:
            weight = torch.addmm(weight, B, A)
            y = product(x, weight, bias)
        else:
            low = product(dropped, A)  # (tokens, r): all that the update knows of x
            y = product(x, weight, bias).addmm_(low, B.t())
        # With dropout x itself is needed only where W is trained, as it may be in a block without an adapter.
        kept = x if dropped is None or ctx.needs_input_grad[2] else None
        ctx.save_for_backward(kept, dropped, low, weight, A, B)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, dropped, low, weight, A, B = ctx.saved_tensors
        needs_x, _, needs_weight, needs_bias, needs_A, needs_B = ctx.needs_input_grad
        gradient = gradient.contiguous()
        to_x, rank = None, len(A)
        if needs_x:
            inputs = weight.shape[1]
            unused = B.new_zeros(len(B), -rank % 16)  # whole vectors of the processor
            both = product(gradient, torch.cat([weight, B, unused], dim=1).t())
            to_x, to_low = both[:, :inputs], both[:, inputs : inputs + rank].contiguous()
        else:
            to_low = product(gradient, B.t())
        if dropped is None:
            dropped, low, to_dropped = x, product(x, A), None
        else:
            to_dropped = product(to_low, A.t()) if ctx.needs_input_grad[1] else None
        return (
            to_x,
            to_dropped,
            product(gradient.t(), x.t()) if needs_weight else None,
            gradient.sum(dim=0) if needs_bias else None,
            product(to_low.t(), dropped.t()) if needs_A else None,
            product(low.t(), gradient.t()).t() if needs_B else None,  # thin at the left: several times as fast
        )
