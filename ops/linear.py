"""The matmul of a linear layer, by the faster of the two libraries that torch has for it on a CPU.

    y = x W^T + b

In float32 on a CPU `F.linear` calls BLAS (MKL in torch's own builds), though torch also carries oneDNN, which it uses
for 16-bit types and in compiled models. On a processor not made by Intel, where MKL leaves wide vectors unused, oneDNN
takes half the time (docs/performance.md). Everything else (other types, autocast, GPUs) is `F.linear`.
"""

from __future__ import annotations

import os
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

# oneDNN keeps the code it writes for each size of a product: 1,024 pieces unless told otherwise, between which batches
# of ever other widths leave holes in the heap. A step of MiniLM needs 24. oneDNN reads this when it is first used.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b with nothing applied to the result: oneDNN could append an activation."""
    return _ONEDNN(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    """dL/dx = G W,   dL/dW = G^T x,   dL/db = sum over rows of G,   with G = dL/dy; x is kept only if W is trained."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous()
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            _product(gradient, weight.t()) if needs_x else None,
            _product(gradient.t(), x.t()) if needs_weight else None,
            gradient.sum(dim=0) if needs_bias else None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b: (..., in), (out, in) and (out,) -> (..., out).

    By oneDNN there is a first derivative only; a second raises RuntimeError.
    """
    if not _by_onednn(x, weight):
        return F.linear(x, weight, bias)
    if x.dim() == 2:  # no view around the result, so that a caller may add to it in place
        return _Linear.apply(x.contiguous(), weight, bias)
    return _Linear.apply(x.flatten(0, -2).contiguous(), weight, bias).view(*x.shape[:-1], -1)


class _AddProduct(torch.autograd.Function):
    """y + x W^T, written into y:   dL/dy = G,   dL/dx = G W,   dL/dW = (x^T G)^T.

    Forward it is BLAS's own product into place, which oneDNN's operator has not; the way back is oneDNN's. The last is
    dL/dW = G^T x in the form that is thin at the left for a thin x, several times as fast for oneDNN.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.mark_dirty(y)
        return y.addmm_(x, weight.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous()
        _, needs_x, needs_weight = ctx.needs_input_grad
        return (
            gradient,
            _product(gradient, weight.t()) if needs_x else None,
            _product(x.t(), gradient.t()).t() if needs_weight else None,
        )


def add_product_(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """y + x W^T: (tokens, out), (tokens, in) and (out, in) -> y itself, whose old value is lost.

    Made for a thin x, as the update of LoRA has it. Raises RuntimeError if y is a leaf that needs a gradient, or a view
    of one, or one of several views; as with `linear` there may be a first derivative only.
    """
    if not _by_onednn(x, weight):
        return y.addmm_(x, weight.t())
    return _AddProduct.apply(y, x, weight)


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN takes part in x W^T."""
    return (
        _ONEDNN is not None
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()  # the compiler chooses for itself, and takes no such call from outside
        and x.dim() > 1
        and x.numel() > 0
        and weight.numel() > 0
    )


class Linear(nn.Linear):
    """`nn.Linear` by way of `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return linear(x, self.weight, self.bias)
