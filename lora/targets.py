"""Which module names a configuration means: peft's rules, on plain strings.

Names are dotted paths as `model.named_modules()` gives them; `lora.inject` applies these rules to a model.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import TypeVar

Value = TypeVar("Value")


def matches(targets: str | Collection[str], name: str, layers: Collection[int] | None = None) -> bool:
    """Whether `name` is meant by `targets`, in one of `layers` (None: in any).

    A string is a regular expression that must match the whole name. A collection means: the name is one of them, or
    ends in "." and one of them. So `output.dense` means both `layer.0.output.dense` and
    `layer.0.attention.output.dense`, while `attention.output.dense` means the second only. `layers` restricts the ends
    of names; a regular expression or a whole name says by itself which layer it means.
    """
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    if name in targets:
        return True
    return any(name.endswith(f".{target}") for target in targets) and (layers is None or layer_index(name) in layers)


def layer_index(name: str) -> int | None:
    """The number of the layer that `name` lies in: the first that has two names before it and one behind, as in
    "encoder.layer.3.output"; None without such a number, also for "layer.3.output" (peft's rule).
    """
    found = re.match(r".*?\.[^.]*\.(\d+)\.", name)
    return int(found.group(1)) if found else None


def pattern_value(patterns: Mapping[str, Value], name: str, default: Value) -> Value:
    """The value of the first pattern that is the end of `name`, as `rank_pattern` and `alpha_pattern` are read.

    A pattern is a regular expression that must match the whole name, or all of it that follows some ".".
    """
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default
