"""Which module names a configuration selects: peft's rules, on strings.

Names are dotted paths as from `model.named_modules()`; `lora.inject` applies these rules to a model.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import TypeVar

Value = TypeVar("Value")


def matches(targets: str | Collection[str], name: str, layers: Collection[int] | None = None) -> bool:
    """Whether `targets` select `name`, in one of `layers` (None: in any).

    A string is a regular expression that must match the full name. A collection selects names that are one of its
    items, or end in "." and one of them: `output.dense` selects both `layer.0.output.dense` and
    `layer.0.attention.output.dense`, `attention.output.dense` only the second. `layers` restricts items that are ends
    of names; a regular expression or a full name determines its layer itself.
    """
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    if name in targets:
        return True
    return any(name.endswith(f".{target}") for target in targets) and (layers is None or layer_index(name) in layers)


def layer_index(name: str) -> int | None:
    """The number of the layer that contains `name`: the first with two names before it and one after it, as in
    "encoder.layer.3.output"; None without such a number, also for "layer.3.output" (peft's rule).
    """
    found = re.match(r".*?\.[^.]*\.(\d+)\.", name)
    return int(found.group(1)) if found else None


def pattern_value(patterns: Mapping[str, Value], name: str, default: Value) -> Value:
    """The value of the first pattern that matches the end of `name`: peft's rule for `rank_pattern`, `alpha_pattern`.

    A pattern is a regular expression that must match the full name, or all of it after some ".".
    """
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default
