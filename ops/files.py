"""Files: those of strangers looked at before they are read, our own written whole or not at all.

A checkpoint or an adapter is a folder that anyone may have made. What is read of it are JSON and safetensors, neither
of which can run code; what is left are files that never end (a link to /dev/zero, a pipe) or claim to be larger than
memory. They are refused by their first bytes.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

_MEBIBYTE = 1 << 20
# The header of roberta-large's weights has 0.04 MiB, its tokenizer.json 1.3, that of a vocabulary of 250,000 some 17.
LARGEST_SETTINGS = 4 * _MEBIBYTE
LARGEST_TOKENIZER = 64 * _MEBIBYTE
_LARGEST_HEADER = 4 * _MEBIBYTE
_FLOATS = ("F64", "F32", "F16", "BF16")


def size_of_plain_file(path: Path) -> int:
    """Bytes of a file. Raises OSError unless it is a regular file or a link to one: a pipe or a device has no end."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return found.st_size


def check_size(path: Path, largest: int) -> None:
    """Raise OSError as `size_of_plain_file` does, and ValueError if the file has more than `largest` bytes."""
    if (size := size_of_plain_file(path)) > largest:
        raise ValueError(f"it has {size:,} bytes, and {largest:,} would be many")


def read_settings(path: Path) -> Any:
    """What a JSON file holds. Raises OSError, or ValueError for all that is wrong inside it."""
    check_size(path, LARGEST_SETTINGS)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def open_safetensors(path: Path) -> Any:
    """`safetensors.safe_open` for a file that may claim anything; the library itself checks lengths and offsets.

    Raises OSError if it is no regular file and SafetensorError for whatever is wrong with its header.
    """
    size_of_plain_file(path)
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if header > _LARGEST_HEADER:
        raise SafetensorError(f"its header claims {header:,} bytes, and {_LARGEST_HEADER:,} would be many")
    try:
        return safe_open(str(path), framework="pt")
    except RuntimeError as error:  # torch's, for a file that does not fit into the address space
        raise SafetensorError(" ".join(str(error).split())) from None


def not_floats(file: Any) -> list[str]:
    """The tensors of an open safetensors file that hold no floating-point numbers of 16 bits or more, with their type.

    Anything else (whole numbers, complex ones, packed 4-bit ones) means something that a plain copy would lose.
    """
    types = {key: file.get_slice(key).get_dtype() for key in file.keys()}
    return [f"{key} ({kind})" for key, kind in types.items() if kind not in _FLOATS]


def flush(path: Path) -> None:
    """Wait until what a file holds, or the names in a folder, are on the disk and outlast a power cut.

    A rename is in the folder, not in the file (Linux man-pages, fsync(2)). Raises OSError, but not where the file
    system has no such thing as a flush (some network folders).
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
def written_whole(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; at the end of the block it takes the place of `path`, in one step and for good.

    If the block raises, `path` is what it was, and any OSError in it names `path`. What a killed process left is
    written over.
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
