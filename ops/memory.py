"""Memory of a CPU, kept between steps instead of given back and asked for again."""

from __future__ import annotations

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # numbers of glibc's malloc.h
_NEVER = -1
_SETTINGS = ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> None:
    """Let glibc's malloc keep what this process frees, for its own next tensors; elsewhere nothing is changed.

    A tensor of more than 32 MiB is otherwise mapped anew each time, and the kernel clears it page by page when it is
    first written: 10 ms for the 48 MiB between the two matmuls of RoBERTa-base's feed-forward, several times what GELU
    takes to fill it (docs/performance.md). The price is a larger peak. Where the environment has a setting of malloc
    already, that one holds: `MALLOC_TRIM_THRESHOLD_=131072` gives memory back. A GPU's memory torch keeps by itself.
    Source: Linux man-pages, mallopt(3): M_MMAP_MAX 0 maps nothing, M_TRIM_THRESHOLD -1 gives nothing back.
    """
    if sys.platform != "linux" or any(name in os.environ for name in _SETTINGS):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):  # others (musl) have no such settings
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, _NEVER)
