"""Which modules of a model a configuration selects, by peft's rules.

Names are dotted paths as from `model.named_modules()`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

from torch import nn

from lora.adapter import adapters, plain_name
from lora.errors import LoRAError
from lora.quantized import QuantizedLinear

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


def plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of the plain model by their names in it: not adapters, nor what these add, but what they wrap."""
    wrapped = adapters(model)
    parts = [child for one in wrapped.values() for name, child in one.named_children() if name != "base"]
    added = {module for part in parts for module in part.modules()}
    # An adapter and what it wraps have one plain name; the adapter comes first, so the other replaces it.
    return {plain_name(name, wrapped): module for name, module in model.named_modules() if module not in added}


def targeted_layers(model: nn.Module, config: Any) -> dict[str, nn.Module]:
    """The layers that `config` selects, by their names in the plain model, also if they are wrapped already.

    The layers of a fully trained module need no update, so they are never targets (peft's rule).
    """
    fully_trained = fully_trained_modules(model, config)
    return {
        name: module
        for name, module in plain_modules(model).items()
        if isinstance(module, config.kind) and config.selects(name) and not inside(name, fully_trained)
    }


def check_names(model: nn.Module, config: Any) -> None:
    """Raise LoRAError for a setting that names what `model` does not have, or not as a layer of `config.kind`."""
    possible = {name: module for name, module in model.named_modules() if isinstance(module, config.kind)}
    layers = config.layers_to_transform
    present = {index for name in possible if (index := layer_index(name, config.layers_pattern)) is not None}
    absent = sorted(set(layers or ()) - present)
    if absent:
        have = f"layers {min(present)} to {max(present)}" if present else "no numbered layers"
        raise LoRAError(
            f"{config.table}: layers_to_transform: no layer {', '.join(map(str, absent))}; the model has {have}"
        )

    fully_trained = fully_trained_modules(model, config)
    candidates = {name: module for name, module in model.named_modules() if name and not inside(name, fully_trained)}
    for shown, one in _each(config.exclude_modules or ()):
        if not (hits := [name for name in candidates if matches(one, name)]):
            raise LoRAError(
                f"{config.table}: exclude_modules: {shown} matches no module; there are {_endings(possible)}"
            )
        candidates = {name: module for name, module in candidates.items() if name not in hits}
    for shown, one in () if config.target_modules == ALL_LINEAR else _each(config.target_modules):
        if not (hits := [name for name in candidates if matches(one, name, layers, config.layers_pattern)]):
            raise LoRAError(
                f"{config.table}: target_modules: {shown} matches no {config.kind_name}; there are {_endings(possible)}"
            )
        for name in hits:
            if name not in possible:
                raise LoRAError(
                    f"{config.table}: target_modules: {shown} matches {name}, a {type(candidates[name]).__name__}; "
                    f"{config.table} adapts nn.{config.kind.__name__}: {_endings(possible)}"
                )
    adapted = targeted_layers(model, config)
    if not adapted:
        raise LoRAError(
            f"{config.table}: target_modules: {config.target_modules!r} matches no {config.kind_name} to be adapted"
        )
    for pattern in config.unmatched_patterns(adapted):
        raise LoRAError(f"{config.table}: {pattern} matches no adapted layer; there are {_endings(adapted)}")


def _each(names: str | Iterable[str]) -> list[tuple[str, str | tuple[str]]]:
    """A regular expression, or each of several names, as shown in a message and as `matches` takes it."""
    return [(repr(names), names)] if isinstance(names, str) else [(repr(name), (name,)) for name in names]


def inside(name: str, modules: Iterable[str]) -> bool:
    """Whether a module or parameter is one of `modules` or in one of them, by their names."""
    return any(f"{name}.".startswith(f"{module}.") for module in modules)


def fully_trained_modules(model: nn.Module, config: Any) -> set[str]:
    """Names of the modules whose name ends in an entry of `config.modules_to_save`, as in peft."""
    chosen: set[str] = set()
    for wanted in config.modules_to_save:
        hits = {name for name, _ in model.named_modules() if matches([wanted], name)}
        if not hits:
            children = ", ".join(name for name, _ in model.named_children())
            raise LoRAError(
                f"{config.table}: modules_to_save: {wanted!r} matches no module; the model's parts are {children}"
            )
        chosen |= hits
    for name in chosen:
        if any(isinstance(part, QuantizedLinear) for part in model.get_submodule(name).modules()):
            raise LoRAError(f"{config.table}: {name} is quantized, so it can't be trained; use a base in 16 bits")
    return chosen


def _endings(names: Iterable[str]) -> str:
    """The distinct names without the path up to the layer number, for error messages."""
    return ", ".join(dict.fromkeys(within_layer(name) for name in names))


def within_layer(name: str) -> str:
    """A module's name after the last number in its path: "encoder.layer.3.output.dense" -> "output.dense"."""
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts[:-1]) if part.isdigit()]
    return ".".join(parts[numbers[-1] + 1 :]) if numbers else name
