"""AdamW whose two moments are stored in 8 bits per number.

    m <- beta1 m + (1 - beta1) g,   v <- beta2 v + (1 - beta2) g^2
    W <- W (1 - lr decay) - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)

Between steps m and v are codes of 256 levels, with one scale for each 256 numbers: 2.03 bytes per parameter instead of
8. Tensors of fewer than 4,096 numbers (biases, small adapters) keep theirs in float32. As in bitsandbytes on a CPU,
weights decay before the update; its GPU kernel decays after it. Sources: Loshchilov & Hutter 2017, algorithm 2;
Dettmers et al. 2021, "8-bit Optimizers via Block-wise Quantization", section 2.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lora.quantized import SIGNED, UNSIGNED, dequantize_blocks, quantize_blocks

_BLOCK = 256  # numbers that share a scale
_SMALLEST = 4096  # numbers in a tensor whose moments are quantized
_LEVELS = {"exp_avg": SIGNED, "exp_avg_sq": UNSIGNED}  # m and v, by torch's names


class AdamW8bit(torch.optim.Optimizer):
    """See the formula of this module; each group of parameters states its `lr` and `weight_decay`."""

    def __init__(self, groups: Iterable[Any], betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        super().__init__(groups, {"betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update each parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad.float(), group)

    def _update(self, parameter: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2), lr = self.state[parameter], group["betas"], group["lr"]
        state["step"] = state.get("step", torch.zeros(())) + 1
        t = state["step"].item()
        m, v = (_moment(state, name, g) for name in _LEVELS)
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        divisor = (v.sqrt() / math.sqrt(1 - beta2**t)).add_(group["eps"])
        decayed = parameter.float().mul_(1 - lr * group["weight_decay"])
        parameter.copy_(decayed.addcdiv_(m, divisor, value=-lr / (1 - beta1**t)))
        for (name, levels), moment in zip(_LEVELS.items(), (m, v), strict=True):
            state[name] = moment
            if g.numel() >= _SMALLEST:
                state[name], state[f"{name}_absmax"] = quantize_blocks(moment, levels, _BLOCK)


def _moment(state: dict[str, Tensor], name: str, g: Tensor) -> Tensor:
    """The moment in float32, in the shape of the gradient g; zeros before the first step."""
    if name in state and state[name].dtype == torch.uint8:
        return dequantize_blocks(state[name], state[f"{name}_absmax"], _LEVELS[name], _BLOCK).view_as(g)
    return state.get(name, torch.zeros_like(g))
