"""Names of the classes: stored beside the weights, compared wherever labels meet a head. Names decide, not numbers."""

from __future__ import annotations

import json
from pathlib import Path

from data.files import listed
from data.sources import LabelledText, folded
from training.errors import ConfigError
from training.pages import write_text_atomic
from training.progress import say

_LARGEST = 4 << 20  # bytes of a file of names; a sparse file of terabytes is not read completely


def numbered(count: int) -> tuple[str, ...]:
    """transformers' names of classes that nobody has named."""
    return tuple(f"LABEL_{number}" for number in range(count))


def write_names(path: Path, names: tuple[str, ...]) -> None:
    """Write the names, in the order of the logits, atomically."""
    write_text_atomic(path, json.dumps(names, ensure_ascii=False) + "\n")


def read_names(path: Path) -> tuple[str, ...]:
    """The names in a file. Raises ConfigError if it is missing or broken."""
    try:
        if not path.is_file():  # a pipe would block
            raise ValueError("not a regular file" if path.exists() else "no such file")
        with path.open("rb") as file:
            names = json.loads(file.read(_LARGEST))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: can't be read ({error}); it must list the names of the classes") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len({*names}) < len(names):
        raise ConfigError(f"{path}: must be a list of different names, in the order of the logits")
    return tuple(names)


def match_classes(
    text: LabelledText,
    names: tuple[str, ...],
    owner: str,
    *,
    certain: bool = True,
    fix: str = "rename the labels, or give data with the same classes",
) -> LabelledText:
    """`text` with its classes in the order of the logits of a head whose classes `owner` calls `names`.

    The same names in another order are aligned. If the names are numbers (LABEL_0, ...), or not `certain` to be those
    of this head, other names are taken as they are, in the order of the data. Says which it is. Raises ConfigError that
    lists both and gives the `fix` for other names.
    """
    ours, names = text.label_names, tuple(name.strip() for name in names)
    if sorted(ours) == sorted(names):
        say(f"classes     {listed(names)}: {'as in' if ours == names else 'in the order of'} {owner}")
        return text.relabelled(names)
    if len(ours) == len(names) and (not certain or names == numbered(len(names))):
        say(f"classes     {listed(ours)}: named by {text.origin}, in this order; {owner} has {listed(names)}")
        return text
    hint = " (case, blanks or invisible characters differ)" if {*map(folded, ours)} == {*map(folded, names)} else ""
    # Those that only one of the two has come first: the lists may be cut.
    only_ours, only_theirs = sorted(ours, key=lambda name: name in names), sorted(names, key=lambda name: name in ours)
    raise ConfigError(
        f"{text.origin} has {len(ours)} classes: {listed(only_ours)}; "
        f"{owner} has {len(names)}: {listed(only_theirs)}{hint}; {fix}"
    )
