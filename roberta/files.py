"""Checks of untrusted checkpoint folders. A learner can skip this file.

Only JSON and safetensors are read, neither of which can run code. The remaining risks are files without an end (a link
to /dev/zero, a pipe) and sizes that exceed memory.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_JSON, MAX_TOKENIZER = 4 << 20, 64 << 20  # bytes; a vocabulary of 250,000 has some 17 MiB
_PART = re.compile(r"[\w.-]{1,200}\.safetensors", re.ASCII)
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


def read_json(path: Path, largest: int = MAX_JSON) -> dict[str, Any]:
    """A JSON object from a file of at most `largest` bytes. Raises CheckpointError."""
    try:
        check_file(path, largest)
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


def weights_path(directory: str | Path) -> Path:
    """A checkpoint folder's `model.safetensors`; the index of its parts if there is only that."""
    path, index = Path(directory) / WEIGHTS_NAME, Path(directory) / INDEX_NAME
    return index if index.exists() and not path.exists() else path


def weight_files(directory: str | Path) -> list[Path]:
    """A checkpoint folder's safetensors files: one, or the parts that an index names. Raises CheckpointError."""
    path = weights_path(directory)
    return [path.with_name(name) for name in sorted(set(_parts(path).values()))] or [path]


def _parts(path: Path) -> dict[str, str]:
    """Key -> file name, from an index; empty for a safetensors file. Raises CheckpointError."""
    if path.name != INDEX_NAME:
        return {}
    parts = read_json(path).get("weight_map")
    if not parts or not isinstance(parts, dict) or not all(_PART.fullmatch(str(name)) for name in parts.values()):
        raise CheckpointError(f"{path}: its weight_map must name .safetensors files beside it; fetch it again")
    return parts


@contextlib.contextmanager
def open_weights(directory: str | Path) -> Iterator[dict[str, Any]]:
    """Key -> the open safetensors file that holds it, for an untrusted checkpoint folder.

    The library itself checks lengths and offsets. Raises CheckpointError if a file is missing or not a regular file, if
    its header is invalid, or if it holds a key that the index does not place there.
    """
    path = weights_path(directory)
    parts, weights = _parts(path), {}
    try:
        with contextlib.ExitStack() as stack:
            for part in weight_files(directory):
                file = stack.enter_context(_open(part))
                for key in file.keys():
                    if parts and parts.get(key) != part.name:
                        problem = f"holds {key!r}, which {INDEX_NAME} does not place there"
                        raise CheckpointError(f"{part}: {problem}; fetch the checkpoint again")
                    weights[key] = file
            part = path
            yield weights
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{part}: not a complete safetensors file ({reason}); fetch the checkpoint again"
        ) from None


def _open(path: Path) -> Any:
    """`safetensors.safe_open`, after the checks that it leaves out."""
    check_file(path, 1 << 62)
    with path.open("rb") as start:
        header = int.from_bytes(start.read(8), "little")
    if header > _MAX_HEADER:
        raise OSError(f"its header claims {header:,} bytes, more than {_MAX_HEADER:,}")
    try:
        return safe_open(str(path), framework="pt")
    except RuntimeError as error:  # torch's, for a file that does not fit into the address space
        raise SafetensorError(str(error)) from None


def non_float_tensors(weights: dict[str, Any]) -> dict[str, str]:
    """Name and type of the tensors of `open_weights` that are not floating-point numbers of 16 bits or more.

    Integers, complex and packed 4-bit numbers have a meaning that a plain copy would lose.
    """
    types = {key: file.get_slice(key).get_dtype() for key, file in weights.items()}
    return {key: kind for key, kind in types.items() if kind not in _FLOATS}
