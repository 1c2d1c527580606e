"""Tables and lists in text files: CSV, JSON and JSON lines, with errors that name the file and the line."""

from __future__ import annotations

import csv
import io
import json
import os
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def read_utf8(file: Path) -> str:
    """A text file, with or without a byte order mark.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no UTF-8.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is {'no file' if file.exists() else 'not there'}; check the path.")
    return decode_utf8(file.read_bytes(), file)


def decode_utf8(content: bytes, file: str | Path) -> str:
    """The text of a file's bytes, with or without a byte order mark; raises ValueError where it is no UTF-8."""
    try:
        return io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig").read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no UTF-8 ({error}); save it as UTF-8, or get the file again.") from error


def parse_json(text: str, file: str | Path) -> Any:
    """What a JSON text holds; raises ValueError naming the file."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # RecursionError: nested too deep
        start = getattr(error, "doc", "")[:80]
        raise ValueError(
            f"{file} is no JSON ({error}){f': {start!r}' if start else ''}; get the file again."
        ) from error


def read_csv(file: Path) -> list[dict[str, str]]:
    """The rows of a CSV with a header, without spaces around names and cells.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a column that is there twice, a row with more or fewer cells than the header, an open quote.
    """
    reader = csv.DictReader(io.StringIO(read_utf8(file), newline=""), restval=None, strict=True)
    try:
        rows, columns = list(reader), [name.strip() for name in reader.fieldnames or ()]
    except csv.Error as error:
        raise ValueError(
            f"{file} is no CSV after line {reader.line_num} ({error}); a quote may be left open."
        ) from error
    if twice := {name for name in columns if columns.count(name) > 1}:
        raise ValueError(f"{file} has the columns {columns}; name {', '.join(sorted(twice))} once.")
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values():
            raise ValueError(
                f"Row {number} of {file} has more or fewer cells than the header; quote cells with commas."
            )
    return [{key.strip(): value.strip() for key, value in row.items()} for row in rows]


def read_manifest(file: Path, needed: tuple[str, ...] = ("path", "label")) -> list[dict[str, str]]:
    """The rows of a CSV, of a JSON list of objects, or of JSON lines, each with the columns `needed`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another file type, no row, a row without one of these columns, or path, label or split that is
            neither text nor whole number.
    """
    suffix = file.suffix.lower()
    if suffix not in (".csv", ".json", ".jsonl"):
        raise ValueError(f"{file} ends in {suffix!r}; a manifest ends in one of .csv, .json, .jsonl.")
    if suffix == ".csv":
        rows = read_csv(file)
    else:
        text = read_utf8(file)
        if suffix == ".json":
            parsed = parse_json(text, file)
        else:
            lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
            parsed = [parse_json(line, f"Line {number} of {file}") for number, line in lines]
        rows = _as_texts(parsed, file)
    if not rows:
        raise ValueError(f"{file} lists no images; it needs a row with {' and '.join(needed)} for each.")
    for number, row in enumerate(rows, start=1):
        if not all(row.get(column) for column in needed):
            raise ValueError(f"Row {number} of {file} is {row}; every row needs {' and '.join(needed)}.")
    return rows


def manifest_place(place: str) -> tuple[Path, Path]:
    """A manifest and the folder that its paths start from, of FILE@DIR, or of FILE: its own folder."""
    file, _, root = place.rpartition("@")
    return (Path(file), Path(root)) if file and not Path(place).exists() else (Path(place), Path(place).parent)


def listed_files(file: Path, root: Path, rows: Sequence[Mapping[str, str]]) -> list[Path]:
    """The files of a manifest's rows, whether they are there or not.

    Raises:
        ValueError: one does not lie in the folder, so that a table from elsewhere cannot name any file of this machine.
    """
    paths = [find_file(root / row["path"]) for row in rows]
    inside = os.path.join(os.path.abspath(root), "")
    if outside := [str(path) for path in paths if not os.path.abspath(path).startswith(inside)]:
        raise ValueError(
            f"{file} names {len(outside)} images that do not lie in {root}, {outside[0]} first; name the folder that "
            f"the images lie in: manifest:{file}@DIR."
        )
    return paths


def find_file(path: Path) -> Path:
    """The path, or where no file is there, the same path in Unicode's other form (NFC or NFD) where one is."""
    if os.path.isfile(path):
        return path
    others = (Path(unicodedata.normalize(form, str(path))) for form in ("NFC", "NFD"))
    return next((other for other in others if os.path.isfile(other)), path)


def _as_texts(parsed: Any, file: Path) -> list[dict[str, str]]:
    """JSON's objects with their values as texts; raises ValueError where they are no rows of a table."""
    if not isinstance(parsed, list) or not all(isinstance(row, dict) for row in parsed):
        raise ValueError(f"{file} must hold a list of objects, each with path and label.")
    for number, row in enumerate(parsed, start=1):
        for key in ("path", "label", "split"):
            if not isinstance(row.get(key), str | int | None):  # true and false are int
                raise ValueError(f"Row {number} of {file} has the {key} {row[key]!r}; write a text or whole number.")
    return [{key: "" if value is None else str(value).strip() for key, value in row.items()} for row in parsed]
