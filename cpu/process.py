"""Process-wide settings for CPUs: oneDNN for float32 matmuls, freed memory kept."""

from __future__ import annotations

import ctypes
import os
import sys

import torch

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # numbers of glibc's malloc.h
_NEVER = -1
_MALLOC_SETTINGS = ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def allow_onednn() -> None:
    """Let torch compute float32 matmuls by oneDNN instead of BLAS, if it computes them in float32.

    torch does so where bfloat16 inside a matmul is allowed. Whether that changes the numbers depends on the processor:
    oneDNN rounds to bfloat16 where there are matrix units for it (Intel's AMX), and otherwise computes in float32, on
    non-Intel processors with AVX-512 twice as fast as MKL (docs/performance.md). So the setting is kept only if a
    product that would reveal rounding is exact, and never with AMX, where it may depend on the size.
    """
    matmul = torch.backends.mkldnn.matmul
    capabilities = getattr(torch.cpu, "get_capabilities", lambda: {"amx_tile": True})()  # missing in older torch
    if not torch.backends.mkldnn.is_available() or capabilities.get("amx_tile", False):
        return
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    # 1 + 2^-12 and 1 - 2^-12 are 1 in bfloat16's eight bits. 48 x 48, as very small products use BLAS anyway.
    a, b = torch.full((48, 48), 1 + 2**-12), torch.eye(48) * (1 - 2**-12)
    if not torch.equal(a @ b, torch.full_like(a, (1 + 2**-12) * (1 - 2**-12))):
        matmul.fp32_precision = before


def keep_freed_memory() -> None:
    """Let glibc's malloc reuse freed memory for the next tensors; without glibc nothing is changed.

    A tensor of more than 32 MiB is otherwise mapped again each time, and the kernel clears it page by page on the first
    write: 10 ms for the 48 MiB between the two matmuls of RoBERTa-base's feed-forward, several times what GELU takes to
    fill it (docs/performance.md). The cost is a higher peak. A malloc setting in the environment has priority:
    `MALLOC_TRIM_THRESHOLD_=131072` returns memory to the system.
    Source: Linux man-pages, mallopt(3): M_MMAP_MAX 0 disables mapping, M_TRIM_THRESHOLD -1 disables trimming.
    """
    if sys.platform != "linux" or any(name in os.environ for name in _MALLOC_SETTINGS):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):  # others (musl) have no such settings
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, _NEVER)
