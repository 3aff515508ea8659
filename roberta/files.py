"""Checks of untrusted checkpoint folders. A learner can skip this file.

Only JSON and safetensors are read, neither of which can run code. The remaining risks are files without an end (a link
to /dev/zero, a pipe) and sizes that exceed memory.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

MAX_JSON, MAX_TOKENIZER = 4 << 20, 64 << 20  # bytes; a vocabulary of 250,000 has some 17 MiB
_FLOATS = ("F64", "F32", "F16", "BF16")
_MAX_HEADER = 4 << 20  # bytes; that of roberta-large's weights has 0.04 MiB


class CheckpointError(ValueError):
    """A checkpoint that can't be used: one line that names the file, what is wrong with it, and the fix."""


def check_file(path: Path, largest: int) -> None:
    """Raise CheckpointError unless `path` is a regular file of at most `largest` bytes."""
    if not path.is_file():
        what = "not a regular file" if path.exists() else "no such file"
        raise CheckpointError(f"{path}: {what}; a checkpoint folder needs config.json, weights and tokenizer")
    if (size := path.stat().st_size) > largest:
        raise CheckpointError(f"{path}: has {size:,} bytes, more than the limit of {largest:,}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError."""
    try:
        check_file(path, MAX_JSON)
        raw = json.loads(path.read_text(encoding="utf-8"))
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, too many digits, nested too deeply
        raise CheckpointError(f"{path}: not valid JSON ({error}); fetch the checkpoint again") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: does not hold a JSON object; fetch the checkpoint again")
    return raw


@contextlib.contextmanager
def open_weights(path: Path) -> Iterator[Any]:
    """`safetensors.safe_open` for an untrusted file; the library itself checks lengths and offsets.

    Raises CheckpointError if the file is missing or not a regular file, or if its header is invalid.
    """
    try:
        check_file(path, 1 << 62)
        with path.open("rb") as start:
            header = int.from_bytes(start.read(8), "little")
        if header > _MAX_HEADER:
            raise OSError(f"its header claims {header:,} bytes, more than {_MAX_HEADER:,}")
        try:
            file = safe_open(str(path), framework="pt")
        except RuntimeError as error:  # torch's, for a file that does not fit into the address space
            raise SafetensorError(str(error)) from None
        with file:
            yield file
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{path}: not a complete safetensors file ({reason}); fetch the checkpoint again"
        ) from None


def non_float_tensors(file: Any) -> dict[str, str]:
    """Name and type of the tensors of an open safetensors file that are not floating-point numbers of 16 bits or more.

    Integers, complex and packed 4-bit numbers have a meaning that a plain copy would lose.
    """
    types = {key: file.get_slice(key).get_dtype() for key in file.keys()}
    return {key: kind for key, kind in types.items() if kind not in _FLOATS}
