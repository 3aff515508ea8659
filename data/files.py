"""The rows of a file: CSV, TSV, JSON, Parquet, and folders that `datasets` saved.

No row is skipped: one that can't be read raises DataError, which names the file, the row and the fix. Delimited text is
parsed by Python's `csv`, because the faster parsers change rows in silence: pandas fills up short rows, and pandas and
pyarrow accept broken quotes.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import functools
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.errors import DataError

# Limit on a line or a field of a file, in characters; at most 512 tokens of a text are read.
_LONGEST_ROW = 10_000_000
# A JSON array is parsed as one piece.
_LARGEST_ARRAY = 1 << 28
# A Parquet or gzip file of n bytes may unpack to 1000 n + 64 MiB; that of news text unpacks to 3 n to 10 n.
_UNPACKED_RATIO, _UNPACKED_MINIMUM = 1000, 1 << 26
# A row costs Python objects, however few bytes the file needs for it.
_BYTES_PER_ROW = 500
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_ENCODING_HINT = (
    "save the file as UTF-8, or set data.encoding (with --predict: --encoding) to its encoding, "
    'for example "cp1252", that of Windows in Western Europe'
)
# Quotes that do not enclose the field, because they don't begin it.
_BLANK_BEFORE_QUOTE = re.compile(r'\s+".*"\s*', re.DOTALL)
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}

ID_COLUMNS = ("id", "ID")
"""Columns that are read besides those asked for."""

Rows = Iterator[tuple[str, dict[str, Any]]]


@dataclass
class Found:
    """What reading a file found besides its rows; complete once all rows are read."""

    notes: list[str] = field(default_factory=list)
    """What the reader had to decide or noticed, one line each."""
    class_names: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """By column: the names that the file gives to its numbers (ClassLabel of `datasets`)."""


def read_rows(path: Path, wanted: tuple[str, ...], encoding: str = "utf-8", found: Found | None = None) -> Rows:
    """Place ("FILE, row N") and columns of each row; every row has the columns `wanted`.

    Text is read in `encoding` unless a byte-order mark says UTF-8 or UTF-16. Raises DataError, also if there are no
    rows.
    """
    reader = _reader(path)
    if reader is None:
        raise DataError(f"{path}: unknown file format; use {FORMATS}")
    try:
        "".encode(encoding)
    except (LookupError, ValueError):
        raise DataError(f"{path}: Python knows no encoding {encoding!r}; examples: utf-8, cp1252") from None
    where = None
    for where, row in reader(path, wanted, encoding, Found() if found is None else found):
        yield where, row
    if where is None:
        raise DataError(f"{path}: no rows; give a file that has some")


def is_readable(path: Path) -> bool:
    """Whether the name is that of a file in a known format, or of a folder."""
    return _reader(path) is not None


def is_text(path: Path) -> bool:
    """Whether the file is text, so that its encoding matters."""
    return _reader(path) in (_delimited, _json)


def saved_splits(path: Path) -> tuple[str, ...]:
    """The splits of a DatasetDict that `datasets` saved, each of which is read as `path / split`; () for any other."""
    index = path / "dataset_dict.json"
    if not index.is_file():
        return ()
    splits = _parse_json("".join(read_lines(index, "utf-8")), str(index))
    splits = splits.get("splits") if isinstance(splits, dict) else None
    if not isinstance(splits, list) or not all(isinstance(name, str) and name.isprintable() for name in splits):
        raise DataError(f"{index}: no list of splits; write the folder again with save_to_disk")
    return tuple(splits)


def listed(names: Iterable[Any]) -> str:
    """Up to a dozen names from a file, for one line."""
    shown = [" ".join(str(name).encode(errors="backslashreplace").decode().split())[:80] for name in names]
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


# --- delimited text -----------------------------------------------------------------------------------------------


def _delimited(path: Path, wanted: tuple[str, ...], encoding: str, found: Found) -> Rows:
    """CSV or TSV with a header line, with the separator that finds the wanted columns in it.

    In tab-separated text a quote is a character, unless only reading it as quoted fits. Excel's export in UTF-16 is
    quoted.
    """
    with _opened(path) as file:
        from_excel = file.peek(2)[:2] in _UTF16_MARKS  # "Unicode text"
    usual = "," if _suffix(path) == ".csv" else "\t"
    headers = {mark: _header(path, encoding, mark) for mark in dict.fromkeys((usual, *_SEPARATORS))}
    separator = max(headers, key=lambda mark: (set(wanted) <= set(headers[mark]), len(headers[mark])))
    if separator != usual:
        found.notes.append(f"{path}: separated by {_SEPARATORS[separator]}")
    table = functools.partial(_table, path, wanted, encoding, separator)

    def fits(quoted: bool) -> bool:
        try:
            return not any(not quoted and _has_doubled_quotes(row) for _, row in table(quoted, Found()))
        except DataError:
            return False

    quoted = separator != "\t" or (fits(True) if from_excel else not fits(False) and fits(True))
    if quoted and separator == "\t":
        found.notes.append(f"{path}: quotes enclose fields, as in CSV")
    yield from table(quoted, found)


def _header(path: Path, encoding: str, separator: str) -> list[str]:
    try:
        _, header = next(csv_records(path, encoding, separator), (0, []))
    except DataError:  # raised again where the rows are read
        return []
    return [name.strip() for name in header]


def _has_doubled_quotes(row: dict[str, str]) -> bool:
    """Whether a field is written as by a CSV writer: "said ""no"" again"."""
    return any('""' in value[1:-1] and value[0] == value[-1] == '"' for value in row.values())


def _table(path: Path, wanted: tuple[str, ...], encoding: str, separator: str, quoted: bool, found: Found) -> Rows:
    records = csv_records(path, encoding, separator, quoted, found)
    _, header = next(records, (0, []))
    header = [name.strip() for name in header]
    _check_columns(wanted, header, f"{path}, header")
    for number, fields in records:
        where = f"{path}, row {number}"
        if len(fields) != len(header):
            raise DataError(f"{where}: {len(fields)} fields, but the header has {len(header)}; fix the row")
        if len(header) > 1 and [name.strip() for name in fields] == header:  # of a second file, appended to the first
            raise DataError(f"{where}: is the header again; remove the row")
        if quoted and any(map(_BLANK_BEFORE_QUOTE.fullmatch, fields)):
            raise DataError(f"{where}: a blank before a quote, which then encloses no field; remove the blank")
        yield where, dict(zip(header, fields, strict=True))


def csv_records(
    path: Path, encoding: str = "utf-8", separator: str = ",", quoted: bool = True, found: Found | None = None
) -> Iterator[tuple[int, list[str]]]:
    """Number, from 1, and fields of each record that is not a blank line. Counts those that span lines."""
    csv.field_size_limit(_LONGEST_ROW)  # a field in quotes may span any number of lines
    quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    records = csv.reader(read_lines(path, encoding), delimiter=separator, quoting=quoting, strict=True)
    number = lines = 0
    spanning = []
    try:
        for number, fields in enumerate(records, start=1):
            if records.line_num > lines + 1:
                spanning.append(number)
            lines = records.line_num
            if fields:
                yield number, fields
    except csv.Error as error:
        raise DataError(f"{path}, row {number + 1}: {error}; fix the row's quotes or line ends") from None
    if spanning and found is not None:
        found.notes.append(f"{path}: rows with a field that spans lines: {len(spanning):,}, the first is {spanning[0]}")


# --- JSON ---------------------------------------------------------------------------------------------------------


def _json(path: Path, wanted: tuple[str, ...], encoding: str, found: Found) -> Rows:
    """One JSON object per line, or an array of objects."""
    with _opened(path) as file:
        is_array = file.peek(64).lstrip(b"\xef\xbb\xbf\xff\xfe\0 \t\r\n").startswith(b"[")
    if is_array:
        if _file_size(path) > _LARGEST_ARRAY:
            raise DataError(f"{path}: an array of more than {_LARGEST_ARRAY:,} bytes; write one object per line")
        values = _parse_json("".join(read_lines(path, encoding, _LARGEST_ARRAY)), str(path))
        rows = ((f"{path}, row {number}", value) for number, value in enumerate(values, start=1))
    else:
        lines = ((f"{path}, row {number}", line) for number, line in enumerate(read_lines(path, encoding), start=1))
        rows = ((where, _parse_json(line, where)) for where, line in lines if line.strip())
    for where, row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{where}: not a JSON object; fix the row")
        _check_columns(wanted, row, where)
        yield where, row


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:  # also an integer of thousands of digits
        raise DataError(f"{where}: not JSON ({error}); fix it") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, of which `json` keeps the last of several values. Raises ValueError."""
    if len(found := dict(pairs)) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{listed([twice])!r} has two values")
    return found


# --- Parquet and Arrow --------------------------------------------------------------------------------------------


def _parquet(path: Path, wanted: tuple[str, ...], encoding: str, found: Found) -> Rows:
    """A Parquet file: the wanted columns and those of IDs."""
    import pyarrow
    import pyarrow.parquet

    try:
        size = _file_size(path)
        file = pyarrow.parquet.ParquetFile(path)
        schema = file.schema_arrow
        _check_columns(wanted, schema.names, str(path))
        if b"huggingface" in (schema.metadata or {}):
            _find_class_names(path, schema, found)
        groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
        unpacked = sum(group.total_byte_size for group in groups) + _BYTES_PER_ROW * file.metadata.num_rows
        _check_unpacked(path, size, unpacked)
        batches = file.iter_batches(batch_size=100, columns=_columns(wanted, schema.names))
        yield from _arrow_rows(path, size, batches)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
        # Also names and texts that are not UTF-8, and dates out of range.
        raise DataError(f"{path}: not a Parquet file ({str(error).splitlines()[0]}); write it again") from None


def _saved(path: Path, wanted: tuple[str, ...], encoding: str, found: Found) -> Rows:
    """A folder that `Dataset.save_to_disk` wrote: the wanted columns and those of IDs."""
    if splits := saved_splits(path):
        raise DataError(f"{path}: has the splits {listed(splits)}; name the folder of one, as {path / splits[0]}")
    import datasets  # takes a second to import

    try:
        data = datasets.load_from_disk(str(path))
        _check_columns(wanted, data.column_names, str(path))
        _find_class_names(path, data.data.schema, found)
        size = sum(file.stat().st_size for file in path.iterdir())
        batches = data.select_columns(_columns(wanted, data.column_names)).with_format("arrow").iter(100)
        yield from _arrow_rows(path, size, batches)
    except DataError:
        raise
    except Exception as error:  # the library's errors have no common class
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DataError(f"{path}: not a folder that `datasets` saved ({reason}); write it with save_to_disk") from None


def _columns(wanted: tuple[str, ...], found: list[str]) -> list[str]:
    return [name for name in dict.fromkeys(found) if name in (*wanted, *ID_COLUMNS)]


def _find_class_names(path: Path, schema: Any, found: Found) -> None:
    """The names in the features that `datasets` stores beside a schema, of numbers and of lists of numbers."""
    import datasets

    try:
        features = datasets.Features.from_arrow_schema(schema)
        for column, feature in features.items():
            feature = getattr(feature, "feature", feature)
            if isinstance(feature, datasets.ClassLabel):
                found.class_names[column] = tuple(map(str, feature.names))
    except Exception as error:  # the library's errors have no common class
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DataError(f"{path}: its class names can't be read ({reason}); write it again") from None


def _arrow_rows(path: Path, size: int, batches: Iterable[Any]) -> Rows:
    number = unpacked = 0
    for batch in batches:
        unpacked += batch.nbytes
        _check_unpacked(path, size, unpacked)
        batch.validate(full=True)  # an offset in a damaged file could point anywhere in memory
        for row in batch.to_pylist():
            number += 1
            yield f"{path}, row {number}", row


def _check_unpacked(path: Path, size: int, unpacked: int) -> None:
    """Raise DataError if a file of `size` bytes unpacks to suspiciously many."""
    limit = _UNPACKED_MINIMUM + _UNPACKED_RATIO * size
    if unpacked > limit:
        raise DataError(f"{path}: {size:,} bytes unpack to more than {limit:,}; split it into several files")


# --- files to lines -----------------------------------------------------------------------------------------------


_READERS = dict.fromkeys((".csv", ".tsv", ".txt"), _delimited) | dict.fromkeys((".jsonl", ".json"), _json)
FORMATS = f"{', '.join(_READERS)} (each also as .gz), .parquet, or a folder that datasets' save_to_disk wrote"
_READERS[".parquet"] = _parquet


def _suffix(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _reader(path: Path) -> Any:
    return _saved if path.is_dir() else _READERS.get(_suffix(path))


def _file_size(path: Path) -> int:
    """Bytes of a file. Raises DataError unless it is a regular file or a link to one: pipes and devices have no end."""
    if not path.is_file():
        raise DataError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}; check the path")
    return path.stat().st_size


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The bytes of a file, unpacked if it is gzip. Raises DataError if it can't be read."""
    try:
        _file_size(path)
        with path.open("rb") as file:
            yield gzip.GzipFile(fileobj=file) if file.peek(2)[:2] == b"\x1f\x8b" else file
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: can't be read ({getattr(error, 'strerror', None) or error})") from None


def read_lines(path: Path, encoding: str = "utf-8", longest: int | None = None) -> Iterator[str]:
    """The lines of a text file, each with its line end; a byte-order mark decides the encoding.

    Raises DataError if a line has more than `longest` characters, _LONGEST_ROW by default: a sparse file of gigabytes
    would fill the memory.
    """
    longest = _LONGEST_ROW if longest is None else longest
    number = offset = 0
    with _opened(path) as file:
        start = file.peek(3)
        if start[:2] in _UTF16_MARKS:
            encoding = "utf-16"
        elif start[:3] == codecs.BOM_UTF8:
            encoding = "utf-8"
        is_unicode, utf8 = codecs.lookup(encoding).name.startswith("utf-"), set()
        packed_size = _file_size(path) if isinstance(file, gzip.GzipFile) else None
        # Bytes that can't be decoded become surrogates, which can't be encoded: so they are found in their row.
        text = io.TextIOWrapper(file, encoding, "surrogateescape", newline="\n")
        try:
            for number, line in enumerate(iter(lambda: text.readline(longest + 1), ""), start=1):
                where = f"{path}, row {number}"
                if len(line) > longest:
                    raise DataError(f"{where}: longer than {longest:,} characters; shorten or remove it")
                try:
                    raw = line.encode(encoding)
                except UnicodeEncodeError as error:
                    byte = offset + len(line[: error.start].encode(encoding))
                    raise DataError(f"{where}: not {encoding.upper()} (byte {byte}); {_ENCODING_HINT}") from None
                offset += len(raw)
                if not is_unicode and not raw.isascii():
                    utf8.add(_is_utf8(raw))
                if packed_size is not None:
                    _check_unpacked(path, packed_size, offset + _BYTES_PER_ROW * number)
                yield line.removeprefix("\ufeff") if number == 1 else line
        except UnicodeDecodeError:  # UTF-16 and the like; some lines are decoded in advance
            raise DataError(f"{path}, row {number + 1} or later: not {encoding.upper()}; {_ENCODING_HINT}") from None
    if utf8 == {True}:  # every line that tells them apart
        raise DataError(f"{path}: is UTF-8, not {encoding}; remove the encoding, or save all files in the same one")


def _is_utf8(raw: bytes) -> bool:
    try:
        return bool(raw.decode())
    except UnicodeDecodeError:
        return False
