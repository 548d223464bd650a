"""Rows from files: jsonl, json, csv, tsv (each also as .gz) and parquet."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from halfbyte.errors import DataError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
LONGEST_CSV_FIELD = 1 << 30


@dataclass(frozen=True)
class Malformed:
    """A row that could not be read; it is counted and skipped like any other bad row."""

    reason: str


def read_rows(path: str | Path) -> list[Any]:
    """Read every row of a data file.

    The extension decides: .jsonl, .ndjson, .json (a list, or one object a line), .csv, .tsv, each
    optionally followed by .gz, and .parquet, which needs pyarrow. A line that is not JSON becomes
    a `Malformed` row instead of ending the reading.

    Raises FileNotFoundError, DataError (unknown extension, not UTF-8, damaged file), ImportError.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"data file {path} {what}")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    zipped = suffixes[-1:] == [".gz"]
    kind = "".join((suffixes[:-1] if zipped else suffixes)[-1:])
    if kind not in SUFFIXES or (zipped and kind == ".parquet"):
        raise DataError(
            f"data file {path}: unknown extension; expected one of {', '.join(SUFFIXES)} "
            "(all but .parquet also as .gz)"
        )
    try:
        return _read(path, kind, zipped)
    except UnicodeDecodeError as error:
        raise DataError(f"data file {path} is not UTF-8 text: {error}") from error
    except (EOFError, gzip.BadGzipFile, zlib.error, csv.Error) as error:
        raise DataError(f"data file {path} is damaged: {error}") from error


def _read(path: Path, kind: str, zipped: bool) -> list[Any]:
    if kind == ".parquet":
        return _read_parquet(path)
    opener = gzip.open if zipped else open
    with opener(
        path, "rt", encoding="utf-8-sig", newline="" if kind in (".csv", ".tsv") else None
    ) as file:
        if kind in (".csv", ".tsv"):
            return _read_table(file, "," if kind == ".csv" else "\t")
        if kind == ".json":
            return _read_json(path, file.read())
        return list(_read_lines(file))


def _read_lines(lines: TextIO | list[str]) -> Iterator[Any]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield json.loads(line.rstrip())
        except (ValueError, RecursionError) as error:
            yield Malformed(f"line {number} {_why_not(error)}")


def _why_not(error: ValueError | RecursionError) -> str:
    """Why json cannot read a text; its own words only where they help."""
    if isinstance(error, json.JSONDecodeError):
        line = f"line {error.lineno}, " if "\n" in error.doc else ""
        return f"is not JSON ({error.msg} at {line}column {error.colno})"
    if isinstance(error, RecursionError):
        return "is nested too deeply"
    return "holds a number of too many digits"


def _read_json(path: Path, text: str) -> list[Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        lines = text.split("\n")
        if "Extra data" in str(error) or (len(lines) > 1 and _is_object(lines[0])):
            return list(_read_lines(lines))
        raise DataError(f"data file {path} {_why_not(error)}") from error
    if isinstance(value, dict):
        tables = [rows for rows in value.values() if isinstance(rows, list)]
        return tables[0] if len(value) == len(tables) == 1 else [value]
    if not isinstance(value, list):
        raise DataError(f"data file {path}: expected a list of objects, got {type(value).__name__}")
    return value


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _read_table(file: TextIO, delimiter: str) -> list[Any]:
    before = csv.field_size_limit(LONGEST_CSV_FIELD)
    try:
        reader = csv.DictReader(file, delimiter=delimiter, restkey="", strict=True)
        return [_table_row(row, reader.line_num) for row in reader]
    finally:
        csv.field_size_limit(before)


def _table_row(row: dict[str, Any], line: int) -> Any:
    if "" in row and isinstance(row[""], list):
        return Malformed(f"the row that ends at line {line} has more cells than the header")
    return {name: value for name, value in row.items() if value is not None}


def _read_parquet(path: Path) -> list[Any]:
    try:
        from pyarrow import ArrowInvalid, parquet  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise ImportError(
            f"reading {path} needs pyarrow. hint: pip install 'halfbyte[parquet]'"
        ) from error
    try:
        return parquet.read_table(path).to_pylist()
    except ArrowInvalid as error:
        raise DataError(f"data file {path} is damaged: {error}") from error
