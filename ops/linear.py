"""The matmul of a linear layer, by the faster of the two libraries that torch has for it on a CPU.

    y = x W^T + b

In float32 on a CPU `F.linear` calls BLAS (MKL in torch's own builds), though torch also carries oneDNN, which it uses
for 16-bit types and in compiled models. On a processor not made by Intel, where MKL leaves wide vectors unused, oneDNN
takes half the time (docs/performance.md). Everything else (other types, autocast, GPUs) is `F.linear`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def _find_onednn() -> Any:
    """oneDNN's linear layer, or None in a build of torch that lacks it."""
    try:
        # What torch's compiler calls; it has no public name, hence the way out.
        return torch.ops.mkldnn._linear_pointwise.default if torch.backends.mkldnn.is_available() else None
    except AttributeError:
        return None


_ONEDNN = _find_onednn()


def in_full_precision_on_cpu(x: Tensor) -> bool:
    """Whether x is float32 or float64 on a CPU, and neither autocast nor a compiler decides how it is computed with.

    Only then are gradients written out here and in what builds on it; elsewhere torch derives them.
    """
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()  # the compiler chooses for itself, and takes no such call from outside
    )


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b of (rows, in), (out, in) and (out,) -> (rows, out), where no gradient is recorded.

    Each of x and W is contiguous or the transpose of such a one: for other strides oneDNN has but slow code.
    """
    if not _by_onednn(x, weight):
        return F.linear(x, weight, bias)
    return _ONEDNN(x, weight, bias, "none", [], "")  # oneDNN could append an activation


class _Linear(torch.autograd.Function):
    """dL/dx = G W,   dL/dW = G^T x,   dL/db = sum over rows of G,   with G = dL/dy; x is kept only if W is trained."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous()
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            product(gradient, _transposed(weight)) if needs_x else None,
            product(gradient.t(), x.t()) if needs_weight else None,
            gradient.sum(dim=0) if needs_bias else None,
        )


def _transposed(weight: Tensor) -> Tensor:
    """W^T, copied where reading W column by column is slower than that.

    In a cache, columns of a matrix whose rows are a multiple of 1 KiB apart get in each other's way; the taller the
    matrix, the more.
    """
    out_features, in_features = weight.shape
    crowded = in_features % 256 == 0 and out_features > max(1024, in_features)
    return weight.t().contiguous() if crowded else weight.t()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b: (..., in), (out, in) and (out,) -> (..., out).

    By oneDNN there is a first derivative only; a second raises RuntimeError.
    """
    if x.dim() < 2 or not _by_onednn(x, weight):
        return F.linear(x, weight, bias)
    return _Linear.apply(x.flatten(0, -2).contiguous(), weight, bias).view(*x.shape[:-1], -1)


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN computes x W^T."""
    return (
        _ONEDNN is not None
        and x.dtype == weight.dtype == torch.float32
        and in_full_precision_on_cpu(x)
        and x.numel() > 0
        and weight.numel() > 0
    )


class Linear(nn.Linear):
    """`nn.Linear` by way of `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return linear(x, self.weight, self.bias)
