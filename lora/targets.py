"""Which module names a LoRA configuration means: peft's rules, on plain strings.

No torch here, so that the parameter arithmetic in `lora.budget` starts instantly; `lora.inject` applies the same
rules to a model. Names are dotted paths as `model.named_modules()` gives them.
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
    `layer.0.attention.output.dense`, while `attention.output.dense` means the second only. `layers` narrow the ends
    of names down; a regular expression or a whole name says by itself which layer it means.
    """
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    if name in targets:
        return True
    return any(name.endswith(f".{target}") for target in targets) and (layers is None or layer_index(name) in layers)


def layer_index(name: str) -> int | None:
    """The number of the layer that `name` lies in: the first number in the path that follows a word ("layer.3.")."""
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
