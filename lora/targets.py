"""Which module names a configuration selects: peft's rules, on strings.

Names are dotted paths as from `model.named_modules()`; `lora.inject` applies these rules to a model.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

Value = TypeVar("Value")

ALL_LINEAR = "all-linear"
# peft adds both to modules_to_save for every classifier; a model has one of them.
HEAD_NAMES = ("classifier", "score")


def matches(
    targets: str | Collection[str],
    name: str,
    layers: Collection[int] | None = None,
    layers_pattern: str | Collection[str] | None = None,
) -> bool:
    """Whether `targets` select `name`, in one of `layers` (None: in any), as `layer_index` counts them.

    A string is a regular expression that must match the full name. A collection selects names that are one of its
    items, or end in "." and one of them: `output.dense` selects both `layer.0.output.dense` and
    `layer.0.attention.output.dense`, `attention.output.dense` only the second. `layers` restricts items that are ends
    of names; a regular expression or a full name determines its layer itself.
    """
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    if name in targets:
        return True
    return any(name.endswith(f".{target}") for target in targets) and (
        layers is None or layer_index(name, layers_pattern) in layers
    )


def layer_index(name: str, layers_pattern: str | Collection[str] | None = None) -> int | None:
    """The number of the layer that contains `name`, or None.

    It is the first number with two names before it and one after it, as in "encoder.layer.3.output", but not in
    "layer.3.output"; with `layers_pattern`, the number after the first of its items that is found (peft's rules).
    """
    for expression in _numbers(layers_pattern) or [r".*?\.[^.]*\.(?P<number>\d+)\."]:
        if found := re.match(expression, name):
            return int(found["number"])
    return None


def pattern_value(patterns: Mapping[str, Value], name: str, default: Value) -> Value:
    """The value of the first pattern that matches the end of `name`: peft's rule for `rank_pattern`, `alpha_pattern`.

    A pattern is a regular expression that must match the full name, or all of it after some ".".
    """
    for pattern, value in patterns.items():
        if re.match(_end(pattern), name):
            return value
    return default


def expressions(settings: Mapping[str, Any]) -> list[str]:
    """The regular expressions among the settings of a method, as they are matched here."""
    full = [settings.get("target_modules"), settings.get("exclude_modules")]
    ends = [_end(pattern) for field in ("rank_pattern", "alpha_pattern") for pattern in settings.get(field, ())]
    return [*(item for item in full if isinstance(item, str)), *ends, *_numbers(settings.get("layers_pattern"))]


def _end(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


def _numbers(layers_pattern: str | Collection[str] | None) -> list[str]:
    items = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern
    return [rf"(?:^|.*?\.){item}\.(?P<number>\d+)\." for item in items or () if item]
