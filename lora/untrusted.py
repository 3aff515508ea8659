"""Checks of untrusted adapter folders. A learner can skip this file.

Only JSON and safetensors are read, neither of which can run code. The remaining risks are files without an end (a link
to /dev/zero, a pipe), sizes that exceed memory, settings of wrong types, and regular expressions that never finish.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lora.config import LoRAConfig, LoRAError

_MAX_JSON = _MAX_HEADER = 4 << 20  # bytes; the header of roberta-large's weights has 0.04 MiB
# More names than any encoder has layers; as many patterns as `re` caches.
_MAX_NAMES, _MAX_PATTERNS = 1000, 250
_FLOATS = ("F64", "F32", "F16", "BF16")


def _check_file(path: Path, largest: int) -> None:
    """Raise LoRAError unless `path` is a regular file of at most `largest` bytes."""
    if not path.is_file():
        what = "not a regular file" if path.exists() else "no such file"
        raise LoRAError(f"{path}: {what}; an adapter folder needs its settings and its weights as safetensors")
    if (size := path.stat().st_size) > largest:
        raise LoRAError(f"{path}: has {size:,} bytes, more than the limit of {largest:,}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a regular file of at most 4 MiB. Raises LoRAError that names the file."""
    try:
        _check_file(path, _MAX_JSON)
        raw = json.loads(path.read_text(encoding="utf-8"))
    except LoRAError:
        raise
    except OSError as error:
        raise LoRAError(f"{path}: can't be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, too many digits, nested too deeply
        raise LoRAError(f"{path}: not valid JSON ({error}); fetch the adapter again") from None
    if not isinstance(raw, dict):
        raise LoRAError(f"{path}: does not hold a JSON object; fetch the adapter again")
    return raw


@contextlib.contextmanager
def open_weights(path: Path) -> Iterator[Any]:
    """`safetensors.safe_open` for an untrusted file; the library itself checks lengths and offsets.

    Raises LoRAError if the file is missing or not a regular file, or if its header is invalid.
    """
    try:
        _check_file(path, 1 << 62)
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
        raise LoRAError(f"{path}: not a complete safetensors file ({reason}); fetch the adapter again") from None


def non_float_tensors(file: Any) -> dict[str, str]:
    """Name and type of the tensors of an open safetensors file that are not floating-point numbers of 16 bits or more.

    Integers, complex and packed 4-bit numbers have a meaning that a plain copy would lose.
    """
    types = {key: file.get_slice(key).get_dtype() for key in file.keys()}
    return {key: kind for key, kind in types.items() if kind not in _FLOATS}


def check_settings(path: Path, raw: dict[str, Any]) -> None:
    """Raise LoRAError unless each known field of an adapter_config.json has its type, a plausible size, and regular
    expressions that can be matched in finite time."""

    def number(value: object) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool)

    def names(value: object) -> bool:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)

    def numbers_by_name(value: object) -> bool:
        return isinstance(value, dict) and all(map(number, value.values()))

    def layers(value: object) -> bool:
        numbers = value if isinstance(value, list) else [value]
        return all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in numbers)

    switches = [field.name for field in dataclasses.fields(LoRAConfig) if field.type == "bool"]
    expected = {
        **dict.fromkeys(("r", "lora_alpha", "lora_dropout"), (number, "a number")),
        "target_modules": (lambda value: isinstance(value, str) or names(value), "a list of names"),
        "modules_to_save": (names, "a list of names"),
        "layers_to_transform": (layers, "a list of layer numbers"),
        **dict.fromkeys(("rank_pattern", "alpha_pattern"), (numbers_by_name, "numbers by name")),
        "bias": (lambda value: isinstance(value, str), "none, lora_only or all"),
        **dict.fromkeys(switches, (lambda value: isinstance(value, bool), "true or false")),
    }
    for name, (fits, what) in expected.items():
        value = raw.get(name)
        if value is None:
            continue
        if not fits(value):
            raise LoRAError(f"{path}: {name} is {str(value)[:80]!r}; it must be {what}")
        limit = _MAX_PATTERNS if isinstance(value, dict) else _MAX_NAMES
        if isinstance(value, dict | list) and len(value) > limit:
            raise LoRAError(f"{path}: {name} has {len(value):,} entries, more than the limit of {limit:,}")
        for expression in value if isinstance(value, dict) else [value] if name == "target_modules" else []:
            if isinstance(expression, str) and could_hang(expression):
                raise LoRAError(
                    f"{path}: the regular expression {expression!r} may not finish matching; name the layers instead"
                )


def could_hang(expression: str) -> bool:
    """Whether matching a regular expression against a module's name may practically never finish.

    Python's matcher backtracks through every way to divide a text among repeats. A repeated group that holds a repeat,
    an option or a choice, like (a+)+, has exponentially many (Cox 2007, "Regular Expression Matching Can Be Simple And
    Fast"); d consecutive repeats have about n^d / d! for n characters, so three are allowed. Conservative: also true
    for some harmless expressions. The expression is neither compiled nor run.
    """
    # Of each open group: most repeats in a row in earlier alternatives, repeats in the current one, can it backtrack.
    groups: list[list[Any]] = [[0, 0, False]]
    closed: list[Any] | None = None  # the group that ended just before this character
    at = 0
    while at < len(expression):
        character, inner, closed = expression[at], closed, None
        at += 1
        group = groups[-1]
        if character == "\\":
            at += 1
        elif character == "[":
            at += 1 + (expression[at : at + 1] == "^")  # a "]" that comes first is literal
            while at < len(expression) and expression[at] != "]":
                at += 2 if expression[at] == "\\" else 1
            at += 1
        elif character == "(":
            groups.append([0, 0, False])
            at += expression[at : at + 1] == "?"  # of (?: and the like: not an option
        elif character == ")" and len(groups) > 1:
            closed = groups.pop()
            groups[-1][1] += max(closed[0], closed[1])
            groups[-1][2] |= closed[2]
        elif character == "|":
            group[0], group[1], group[2] = max(group[0], group[1]), 0, True
        elif character in "*+{":
            if inner is not None and inner[2]:
                return True
            group[1], group[2] = group[1] + 1, True
            at += expression[at : at + 1] in ("?", "+")  # lazy or possessive: still one repeat
        elif character == "?":
            group[2] = True
    return any(max(group[0], group[1]) > 3 for group in groups)
