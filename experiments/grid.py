"""From TOML files to runs: each file is one configuration, or a grid of configurations.

A field whose value is a list is a dimension of the grid. For a field that takes a list anyway (lora.target_modules), a
list of lists is.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import tomllib
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.command_line import section_of
from training.config import RunConfig, parse_config, read_toml
from training.errors import ConfigError


@dataclass(frozen=True)
class Planned:
    """One run of a table."""

    name: str
    """Name of the configuration: the file's name, and the values of a grid's fields."""
    config: RunConfig

    @property
    def folder(self) -> str:
        """Name of the run folder, unique for a configuration and a seed."""
        return f"{self.name}-s{self.config.train.seed}"

    def seeded(self, i: int) -> Planned:
        """The same configuration with a seed higher by `i`."""
        train = dataclasses.replace(self.config.train, seed=self.config.train.seed + i)
        return Planned(self.name, dataclasses.replace(self.config, train=train))


def configuration_and_seed(folder: str) -> tuple[str, str]:
    """The two parts of a run folder's name as `Planned` gives it. Another name is a configuration without a seed."""
    name, _, seed = folder.rpartition("-s")
    return (name, seed) if name and seed.isdigit() else (folder, "")


def plan(paths: list[Path], overrides: dict[str, Any], seeds: int) -> list[Planned]:
    """All runs of the given files and folders (*.toml, not of subfolders), `seeds` of each configuration.

    `overrides` maps dotted field names to values that are set in every file. Raises ConfigError that names file and
    field.
    """
    if not paths:
        raise ConfigError("name at least one TOML file or folder, for example experiments/agnews")
    files: list[Path] = []
    for path in paths:
        found = sorted(path.glob("*.toml")) if path.is_dir() else [path]
        if not found:
            raise ConfigError(f"{path}: contains no *.toml; name a folder that does, or files")
        files += found
    runs: dict[str, Planned] = {}
    for file in files:
        for name, config in expand(file, overrides, seeds).items():
            for i in range(seeds):
                run = Planned(name, config).seeded(i)
                if run.folder in runs:
                    raise ConfigError(f"{file}: a second configuration named {name}; rename the file")
                runs[run.folder] = run
    return list(runs.values())


def expand(path: Path, overrides: dict[str, Any], seeds: int = 1) -> dict[str, RunConfig]:
    """The configurations of one file by name. Raises ConfigError that names file and field."""
    raw = read_toml(path)
    for field, value in overrides.items():
        _set(raw, field, value, path)
    axes = dict(_axes(raw, RunConfig))
    for field, values in axes.items():
        if not values:
            raise ConfigError(f"{path}: {field} is an empty list; give it at least one value")
        if field in ("output", "overwrite"):
            raise ConfigError(f"{path}: {field} can't be a grid; the table names the run folders itself")
        if field == "train.seed" and seeds > 1:
            raise ConfigError(f"{path}: {field} is a grid and --seeds is {seeds}; use one of the two")
        repeated = [value for i, value in enumerate(values) if value in values[:i]]
        if repeated:
            raise ConfigError(f"{path}: {field} has the value {repeated[0]!r} twice; remove one")
    configs = {}
    for combination in itertools.product(*axes.values()):
        chosen, name = copy.deepcopy(raw), path.stem
        for field, value in zip(axes, combination, strict=True):
            _set(chosen, field, value, path)
            name += f"+{field.rpartition('.')[2]}={_label(value)}"
        if name in configs:
            raise ConfigError(f"{path}: two values give the name {name}; write one of them differently")
        configs[name] = parse_config(chosen, path)
    return configs


def parse_override(text: str) -> tuple[str, Any]:
    """ "lora.rank=8" as field and value. The value is TOML, or text if it is not valid TOML.

    Raises ConfigError without a field or an "=".
    """
    field, equals, value = text.partition("=")
    if not equals or not field.strip():
        raise ConfigError(f"--set {text}: write it as field=value, for example train.epochs=2")
    try:
        return field.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return field.strip(), value


def _set(raw: dict[str, Any], field: str, value: Any, path: Path) -> None:
    *sections, last = field.split(".")
    for section in sections:
        raw = raw.setdefault(section, {})
        if not isinstance(raw, dict):
            raise ConfigError(f"{path}: {section} is a value, so there is no {field}")
    raw[last] = value


def _axes(raw: dict[str, Any], kind: Any, prefix: str = "") -> Iterator[tuple[str, list[Any]]]:
    """The grid's fields by dotted name, with their values. `parse_config` reports unknown fields later."""
    hints = typing.get_type_hints(kind)
    for name, value in raw.items():
        hint = hints.get(name)
        if isinstance(value, dict) and (section := section_of(hint)):
            yield from _axes(value, section, f"{prefix}{name}.")
        elif isinstance(value, list) and hint is not None:
            takes_list = any(typing.get_origin(part) is tuple for part in (hint, *typing.get_args(hint)))
            if not takes_list or any(isinstance(item, list) for item in value):
                yield prefix + name, value


def _label(value: Any) -> str:
    """A value as part of a folder's name."""
    if isinstance(value, list):
        return "-".join(map(_label, value)) or "none"
    return str(value).replace("/", "-").replace("True", "yes").replace("False", "no")
