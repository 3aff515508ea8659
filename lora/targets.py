"""Which module names a LoRA configuration means: peft's rules, on plain strings.

No torch here, so that the parameter arithmetic in `lora.budget` starts instantly; `lora.inject` applies the same
rules to a model. Names are dotted paths as `model.named_modules()` gives them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

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


def could_hang(expression: str) -> bool:
    """Whether matching a regular expression against a module's name could take longer than anyone waits.

    Python's matcher goes back to try every way to divide a text among repeats. A repeated group that holds a repeat,
    an option or a choice, like (a+)+, has exponentially many ways (Cox 2007, "Regular Expression Matching Can Be Simple
    And Fast"); d repeats in a row have some n^d / d! for n characters, so three are allowed. On the safe side: some
    harmless expressions are named too. No regular expression is compiled or run here.
    """
    # Of each open group: repeats in a row of the alternatives before and in this one; anything in it to try again.
    groups: list[list[Any]] = [[0, 0, False]]
    closed: list[Any] | None = None  # the group that ended right before this character
    at = 0
    while at < len(expression):
        character, inner, closed = expression[at], closed, None
        at += 1
        group = groups[-1]
        if character == "\\":
            at += 1
        elif character == "[":
            at += 1 + (expression[at : at + 1] == "^")  # a "]" that comes first stands for itself
            while at < len(expression) and expression[at] != "]":
                at += 2 if expression[at] == "\\" else 1
            at += 1
        elif character == "(":
            groups.append([0, 0, False])
            at += expression[at : at + 1] == "?"  # (?: and the like: no option
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
