"""Checks of untrusted adapter folders. A learner can skip this file.

Only JSON and safetensors are read, neither of which can run code. The remaining risks are files without an end (a link
to /dev/zero, a pipe), sizes that exceed memory, settings of wrong types, and regular expressions that never finish.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lora.config import MethodConfig
from lora.errors import LoRAError

_MAX_JSON = _MAX_HEADER = 4 << 20  # bytes; the header of roberta-large's weights has 0.04 MiB
# More names than any encoder has layers; as many patterns as `re` caches.
_MAX_NAMES, _MAX_PATTERNS = 1000, 250
_FLOATS = ("F64", "F32", "F16", "BF16")

_TRIAL_SECONDS = 2.0
# Prints the number of each expression before trying it; the timer's signal ends the process.
_TRIAL = """
import json, re, resource, signal, sys
seconds, expressions, names = json.load(sys.stdin)
resource.setrlimit(resource.RLIMIT_DATA, (1 << 28, 1 << 28))
signal.setitimer(signal.ITIMER_PROF, seconds)
for number, expression in enumerate(expressions):
    print(number, flush=True)
    try:
        compiled = re.compile(expression)
    except (re.error, RecursionError, OverflowError):
        continue  # LoRAConfig says what is wrong
    for name in names:
        compiled.match(name), compiled.fullmatch(name)
"""


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
    if not path.exists() and (pickled := path.with_suffix(".bin")).is_file():
        code = f"save_file(torch.load({str(pickled)!r}, 'cpu', weights_only=True), {str(path)!r})"
        raise LoRAError(
            f"{pickled}: not read, as its format can run code; convert it once: "
            f'python -c "import torch; from safetensors.torch import save_file; {code}"'
        )
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


def check_settings(path: Path, raw: dict[str, Any], kind: type[MethodConfig]) -> None:
    """Raise LoRAError unless each field of `kind` in an adapter_config.json has its type and a plausible size."""

    def number(value: object) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool)

    def names(value: object) -> bool:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)

    def numbers_by_name(value: object) -> bool:
        return isinstance(value, dict) and all(map(number, value.values()))

    def flags_by_name(value: object) -> bool:
        return isinstance(value, dict) and all(
            isinstance(flags, list) and all(isinstance(flag, bool) for flag in flags) for flags in value.values()
        )

    def layers(value: object) -> bool:
        numbers = value if isinstance(value, list) else [value]
        return all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in numbers)

    expected: dict[str, tuple[Callable[[object], bool], str]] = {
        "int": (number, "a number"),
        "float": (number, "a number"),
        "bool": (lambda value: isinstance(value, bool), "true or false"),
        "tuple[str, ...]": (names, "a list of names"),
        "tuple[str, ...] | str": (lambda value: isinstance(value, str) or names(value), "a list of names"),
        "tuple[int, ...]": (layers, "a list of layer numbers"),
        "Mapping[str, int]": (numbers_by_name, "numbers by name"),
        "Mapping[str, float]": (numbers_by_name, "numbers by name"),
        "Mapping[str, tuple[bool, ...]]": (flags_by_name, "lists of true and false by name"),
    }
    for field in dataclasses.fields(kind):
        name = kind.peft_names.get(field.name, field.name)
        fits, what = expected.get(
            str(field.type).removesuffix(" | None"),
            (lambda value: isinstance(value, str), str(field.type).removeprefix("Literal")),
        )
        value = raw.get(name)
        if value is None or name in kind.peft_constants:
            continue
        if not fits(value):
            raise LoRAError(f"{path}: {name} is {str(value)[:80]!r}; it must be {what}")
        limit = _MAX_PATTERNS if isinstance(value, dict) else _MAX_NAMES
        if isinstance(value, dict | list) and len(value) > limit:
            raise LoRAError(f"{path}: {name} has {len(value):,} entries, more than the limit of {limit:,}")


def check_expressions(path: Path, expressions: Sequence[str], names: Iterable[str]) -> None:
    """Raise LoRAError unless compiling `expressions` and matching each with all `names` takes little time and memory.

    `re` backtracks, which can take for ever (Cox 2007, "Regular Expression Matching Can Be Simple And Fast"), and can't
    be interrupted. So a process of its own tries it first.
    """
    if not expressions:
        return
    trial = json.dumps([_TRIAL_SECONDS, expressions, list(names)])
    done = subprocess.run([sys.executable, "-I", "-c", _TRIAL], input=trial, capture_output=True, text=True)
    if done.returncode:
        slow = expressions[int((done.stdout.split() or ["0"])[-1])]
        raise LoRAError(
            f"{path}: the regular expression {slow[:200]!r} may not finish matching; name the layers instead"
        )
