"""AdamW whose two moments are stored in 8 bits per number.

    m <- beta1 m + (1 - beta1) g,   v <- beta2 v + (1 - beta2) g^2
    W <- W (1 - lr decay) - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)

Between steps m and v are codes of 256 levels, with one scale for each 256 numbers: 2.03 bytes per parameter instead of
8. Tensors of fewer than 4,096 numbers (biases, small adapters) keep theirs in float32. As in bitsandbytes on a CPU,
weights decay before the update; its GPU kernel decays after it. Codes are the nearest, which its CPU kernel misses at
times. Sources: Loshchilov & Hutter 2017, algorithm 2; Dettmers et al. 2021, "8-bit Optimizers via Block-wise
Quantization", section 2.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lora.quantized import SIGNED, UNSIGNED, dequantize_blocks, quantize_blocks

_BLOCK = 256  # numbers that share a scale
_CHUNK = 2**18  # numbers that are updated at a time, as their moments in float32 would take as much as AdamW's
_SMALLEST = 4096  # numbers in a tensor whose moments are quantized
_LEVELS = {"exp_avg": SIGNED, "exp_avg_sq": UNSIGNED}  # m and v, by torch's names


class AdamW8bit(torch.optim.Optimizer):
    """See the formula of this module; options as those of torch.optim.AdamW, computed in float32."""

    def __init__(self, groups: Iterable[Any], betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        super().__init__(groups, {"lr": 1e-3, "betas": betas, "eps": eps, "weight_decay": 0.01})

    def load_state_dict(self, state_dict: Any) -> None:
        """Not supported: torch would cast the codes to the parameter's type. `training.checkpoint` restores `state`."""
        raise NotImplementedError("set optimizer.state, as training.checkpoint.restore does")

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update each parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    _update(parameter.view(-1), parameter.grad.reshape(-1), self.state[parameter], group)


def _update(W: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
    """W (n,) <- the formula, one chunk after the other; gradient (n,), codes (n,), scales (ceil(n / 256),)."""
    n, quantized, (beta1, beta2), lr = len(W), len(W) >= _SMALLEST, group["betas"], group["lr"]
    if not state:
        state["step"] = torch.zeros(())
        for name in _LEVELS:
            state[name] = torch.zeros_like(W, dtype=torch.uint8 if quantized else torch.float32)
            state[f"{name}_absmax"] = torch.zeros(-(-n // _BLOCK), device=W.device)  # not used if not quantized
    state["step"] += 1
    t = state["step"].item()
    for start in range(0, n, _CHUNK):
        part, blocks = slice(start, start + _CHUNK), slice(start // _BLOCK, (start + _CHUNK) // _BLOCK)
        stored = [(state[name][part], state[f"{name}_absmax"][blocks], levels) for name, levels in _LEVELS.items()]
        m, v = (dequantize_blocks(*one, _BLOCK) if quantized else one[0] for one in stored)
        g = gradient[part].float()
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        divisor = (v.sqrt() / math.sqrt(1 - beta2**t)).add_(group["eps"])
        decayed = W[part].float().mul_(1 - lr * group["weight_decay"])
        W[part] = decayed.addcdiv_(m, divisor, value=-lr / (1 - beta1**t))
        if quantized:
            for (codes, absmax, levels), moment in zip(stored, (m, v), strict=True):
                codes[:], absmax[:] = quantize_blocks(moment, levels, _BLOCK)
