"""Products of batches of matrices, by the faster of the two libraries that torch has for them on a CPU.

    scale * a_i b_i     for each i of the batch

In float32 `torch.bmm` calls BLAS, as `F.linear` does (see `ops.linear`). It hands the product to oneDNN only where
torch's setting `torch.backends.mkldnn.matmul.fp32_precision` allows bfloat16 inside. Whether that makes a difference to
the numbers hangs on the processor: oneDNN rounds to bfloat16 if there are matrix units for it (Intel's AMX), and
otherwise computes in float32, only faster. So it is tried out once, and the setting is used where it changes nothing.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor


@contextlib.contextmanager
def _onednn_allowed() -> Iterator[None]:
    """torch's matmuls may go by oneDNN, for a while."""
    matmul = torch.backends.mkldnn.matmul
    kept = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = kept


@functools.cache
def onednn_is_exact() -> bool:
    """Whether oneDNN's products of float32 are products of float32 here, found out by one that would show rounding.

    1 + 2^-12 and 1 - 2^-12 are 1 in bfloat16's eight bits; in float32 they stay what they are. 48 x 48 x 48, as very
    small products go by BLAS anyway. A processor with AMX is refused unseen: its choice may differ from size to size.
    """
    capabilities = getattr(torch.cpu, "get_capabilities", lambda: {"amx_tile": True})()  # an older torch can't tell
    if not torch.backends.mkldnn.is_available() or capabilities.get("amx_tile", False):
        return False
    a = torch.full((2, 48, 48), 1 + 2**-12)
    b = torch.eye(48).mul_(1 - 2**-12).expand(2, 48, 48)
    with _onednn_allowed():
        return torch.equal(torch.bmm(a, b), torch.full_like(a, (1 + 2**-12) * (1 - 2**-12)))


def batched_product(a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """scale * a_i b_i for each i: (batch, n, k) and (batch, k, m) -> (batch, n, m).

    No gradient is recorded: it is for code that writes its own. Raises RuntimeError for sizes that don't fit.
    """
    by_onednn = _onednn_allowed() if a.dtype == torch.float32 and onednn_is_exact() else contextlib.nullcontext()
    with torch.no_grad(), by_onednn:
        return torch.baddbmm(a.new_empty(1), a, b, beta=0, alpha=scale)  # beta = 0: the first is not read
