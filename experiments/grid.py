"""TOML files to runs: every file is one configuration, or a grid of them.

A field that is given a list is tried with each of its values, every combination once. A field that is a list anyway
(lora.target_modules) is tried with each of several lists.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import tomllib
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.config import RunConfig, parse_config, read_toml
from training.errors import ConfigError


@dataclass(frozen=True)
class Planned:
    """One run of a table."""

    name: str
    """Its configuration: the file's name, and the values of a grid's fields."""
    config: RunConfig

    @property
    def folder(self) -> str:
        """Name of its run folder: one for each configuration and seed."""
        return f"{self.name}-s{self.config.train.seed}"


def plan(paths: list[Path], overrides: dict[str, Any], seeds: int) -> list[Planned]:
    """All runs of the given files and folders (their own *.toml), each with `seeds` seeds, in a stable order.

    `overrides` are fields by dotted name, set in every file. Raises ConfigError that names file and field.
    """
    files: list[Path] = []
    for path in paths:
        found = sorted(path.glob("*.toml")) if path.is_dir() else [path]
        if not found:
            raise ConfigError(f"{path}: holds no *.toml; name a folder that does, or files")
        files += found
    runs: dict[str, Planned] = {}
    for file in files:
        for name, config in expand(file, overrides, seeds).items():
            for i in range(seeds):
                train = dataclasses.replace(config.train, seed=config.train.seed + i)
                run = Planned(name, dataclasses.replace(config, train=train))
                if run.folder in runs:
                    raise ConfigError(f"{file}: a second configuration called {name}; rename the file")
                runs[run.folder] = run
    return list(runs.values())


def expand(path: Path, overrides: dict[str, Any], seeds: int = 1) -> dict[str, RunConfig]:
    """The configurations of one file by name. Raises ConfigError that names file and field."""
    raw = read_toml(path)
    for name, value in overrides.items():
        _set(raw, name, value, path)
    axes = dict(_axes(raw, RunConfig, ()))
    for field, values in axes.items():
        shown = ".".join(field)
        if not values:
            raise ConfigError(f"{path}: {shown} is an empty list; give it at least one value")
        if field[0] in ("output", "overwrite"):
            raise ConfigError(f"{path}: {shown} can't be a grid; the table names the run folders itself")
        if field == ("train", "seed") and seeds > 1:
            raise ConfigError(f"{path}: {shown} is a grid and --seeds is {seeds}; use one of the two")
        twice = [value for i, value in enumerate(values) if value in values[:i]]
        if twice:
            raise ConfigError(f"{path}: {shown} has the value {twice[0]!r} twice; remove one")
    configs = {}
    for combination in itertools.product(*axes.values()):
        chosen = copy.deepcopy(raw)
        for field, value in zip(axes, combination, strict=True):
            _set(chosen, ".".join(field), value, path)
        parts = (f"{field[-1]}={_label(value)}" for field, value in zip(axes, combination, strict=True))
        configs["+".join([path.stem, *parts])] = parse_config(chosen, path)
    return configs


def parse_override(text: str) -> tuple[str, Any]:
    """ "lora.rank=8" as a field and its value, written as in TOML; what is no TOML value is taken as text.

    Raises ConfigError without a field or an "=".
    """
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise ConfigError(f"--set {text}: write it as field=value, for example train.epochs=2")
    try:
        return name.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name.strip(), value


def _set(raw: dict[str, Any], name: str, value: Any, path: Path) -> None:
    *sections, last = name.split(".")
    for section in sections:
        raw = raw.setdefault(section, {})
        if not isinstance(raw, dict):
            raise ConfigError(f"{path}: {section} is a value, so there is no {name}")
    raw[last] = value


def _axes(raw: dict[str, Any], kind: Any, above: tuple[str, ...]) -> typing.Iterator[tuple[tuple[str, ...], list[Any]]]:
    """Fields that are given several values, and the values. Unknown fields are left for `parse_config` to refuse."""
    hints = typing.get_type_hints(kind)
    for name, value in raw.items():
        hint = hints.get(name)
        if isinstance(value, dict) and dataclasses.is_dataclass(hint):
            yield from _axes(value, hint, (*above, name))
        elif isinstance(value, list) and hint is not None:
            takes_list = any(typing.get_origin(part) is tuple for part in (hint, *typing.get_args(hint)))
            if not takes_list or any(isinstance(item, list) for item in value):
                yield (*above, name), value


def _label(value: Any) -> str:
    """A value as a part of a folder's name."""
    if isinstance(value, list):
        return "-".join(map(_label, value)) or "none"
    return str(value).replace("/", "-").replace("True", "yes").replace("False", "no")
