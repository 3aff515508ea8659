"""Texts of another source than the adapter's, with its classes mapped to the adapter's by name.

A map is a TOML file of lines `"class of the source" = "class of the adapter"`; of a list of the adapter's classes, each
counts as right. Texts of a class that is not mapped are left out.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import torch

from data.files import listed, saved_splits
from data.sources import LABELS_OF_NAMED_SOURCES, DataConfig, LabelledText, Split, load_source
from training.config import parse_config, read_toml
from training.errors import ConfigError
from training.progress import say

ClassMap = dict[str, tuple[str, ...]]
"""Class of the source -> the adapter's classes that are right for it."""


@dataclasses.dataclass(frozen=True)
class MappedTexts:
    """The texts of mapped classes, labelled with numbers of groups of the adapter's classes."""

    split: Split
    groups: dict[str, list[int]]
    """Name -> numbers of the adapter's classes, each in one group; in the adapter's order."""

    def group_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """(texts, classes) -> (texts, groups): the highest of each group, so that the most likely class decides."""
        return torch.stack([logits[:, numbers].amax(dim=1) for numbers in self.groups.values()], dim=1)


def load_other(source: str, applied: DataConfig) -> LabelledText:
    """The data set that `source` names: a value of data.source, or a TOML file whose [data] has its settings.

    Of a file without splits, all rows are test texts, unless the TOML file names a test_file. Raises ConfigError or
    DataError, also if a TOML file sets another cleaning, maximum length or windows than `applied`, whose are used.
    """
    if source.endswith(".toml"):
        raw = read_toml(source)
        config = parse_config(raw, source)
        for name in ("cleaning", "max_length", "windows", "window_overlap"):
            if name in raw.get("data", {}) and getattr(config.data, name) != getattr(applied, name):
                raise ConfigError(
                    f"{source}: data.{name} has no effect with --on: that of the run or of --config applies; remove it"
                )
        data, seed = config.data, config.train.seed
    else:
        data, seed = DataConfig(source=source), 0
    has_splits = data.source in LABELS_OF_NAMED_SOURCES or saved_splits(Path(data.source))
    if not has_splits and data.test_file is None:
        data = dataclasses.replace(data, test_file=data.source, validation_file=data.validation_file or data.source)
    return load_source(data, seed)


def read_map(path: Path, sources: tuple[str, ...], names: tuple[str, ...]) -> ClassMap:
    """The map in a TOML file, from classes of `sources` to classes of `names`. Raises ConfigError."""
    class_map: ClassMap = {}
    for source, targets in read_toml(path).items():
        targets = [targets] if isinstance(targets, str) else targets
        if not isinstance(targets, list) or not targets or not all(isinstance(name, str) for name in targets):
            raise ConfigError(f"{path}: {source!r} has no class or list of classes; write both sides in quotes")
        if source not in sources:
            raise ConfigError(f"{path}: {source!r} is not a class of the source, which has {listed(sources)}")
        if unknown := [name for name in targets if name not in names]:
            raise ConfigError(f"{path}: {unknown[0]!r} is not a class of the adapter, which has {listed(names)}")
        class_map[source] = tuple(sorted({*targets}, key=names.index))
    if not class_map:
        raise ConfigError(f'{path}: is empty; write lines "class of the source" = "class of the adapter"')
    return class_map


def map_texts(text: LabelledText, names: tuple[str, ...], path: Path | None) -> MappedTexts:
    """The test texts of `text` for an adapter whose classes are `names`; without a map's `path`, by equal names.

    Says what is mapped and how many texts are left out. Raises ConfigError if nothing can be mapped, or if two classes
    of the source share some of the adapter's classes but not all.
    """
    if text.multi_label:
        raise ConfigError(f"{text.origin}: has any number of labels per text; --on needs one class per text")
    names = tuple(name.strip() for name in names)
    class_map = read_map(path, text.label_names, names) if path else {n: (n,) for n in text.label_names if n in names}
    if not class_map:
        raise ConfigError(
            f"{text.origin} has {listed(text.label_names)}; the adapter has {listed(names)}: no name is equal; "
            "map them by --map FILE"
        )
    sources: dict[tuple[str, ...], list[str]] = {}  # of each group of the adapter's classes
    for source, targets in class_map.items():
        if shared := [other for other in sources if other != targets and {*other} & {*targets}]:
            raise ConfigError(f"{path}: {source!r} and {sources[shared[0]][0]!r} share classes; give both the same")
        sources.setdefault(targets, []).append(source)
    say(f"data        {text.origin}, {len(text.test.texts):,} test texts")
    if equal := [targets[0] for targets, mapped in sources.items() if [*targets] == mapped]:
        say(f"classes     {listed(equal)}: as in the adapter")
    for targets, mapped in sources.items():
        if [*targets] != mapped:
            say(f"classes     {listed(mapped)} -> {' or '.join(targets)}")

    if {*sources} == {names}:
        raise ConfigError(f"{path}: every class of the adapter counts as right; map to some of them")
    rest = [(name,) for name in names if not any(name in targets for targets in sources)]
    groups = sorted([*sources, *rest], key=lambda targets: names.index(targets[0]))
    labels = [text.label_names[label] for label in text.test.labels]
    pairs = [(row, label) for row, label in zip(text.test.texts, labels, strict=True) if label in class_map]
    left_out = Counter(label for label in labels if label not in class_map)
    if left_out:
        counts = listed(f"{label} {count:,}" for label, count in left_out.most_common())
        say(f"left out    {left_out.total():,} texts of classes that are not mapped: {counts}")
    if not pairs:
        raise ConfigError(f"{text.origin}: no test text has a class that is mapped; map others by --map FILE")
    split = Split([row for row, _ in pairs], [groups.index(class_map[label]) for _, label in pairs])
    shown = [targets[0] if len(targets) == 1 else " or ".join(sources[targets]) for targets in groups]
    if repeated := [name for name in shown if shown.count(name) > 1]:
        raise ConfigError(f"{path}: {repeated[0]!r} is a class of both sides; map it to that of the adapter, too")
    return MappedTexts(split, {name: [*map(names.index, group)] for name, group in zip(shown, groups, strict=True)})
