"""Atomic replacement of files, flushed to the disk."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path


def flush(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk, so that they survive a power cut.

    A rename is stored in the folder, not in the file (Linux man-pages, fsync(2)). Raises OSError, except where the file
    system does not support flushing (some network folders).
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder; at the end of the block it replaces `path` atomically.

    If the block raises, `path` is unchanged, and an OSError names `path`. A leftover file is overwritten.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        yield part
        flush(part)
        part.replace(path)
        flush(path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
