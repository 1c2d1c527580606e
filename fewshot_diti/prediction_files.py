"""Files of predictions: JSON lines with everything, CSV and Parquet with a row per image."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

_ROWS_AT_ONCE = 1000
SUFFIXES = (".jsonl", ".csv", ".parquet")
_PLAIN = ("path", "image_id", "label", "margin", "similarity", "rejected", "decided", "evaluations", "error")


def check_suffix(path: Path) -> None:
    """Raises a ValueError where the end of a file's name is none of `SUFFIXES`."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"output={path}; pass a file that ends in one of {', '.join(SUFFIXES)}.")


def encode_predictions(
    records: Iterable[Mapping[str, Any]], suffix: str, top_k: int, label_type: type
) -> Iterator[bytes]:
    """The content of a file with this suffix, in pieces, so that memory holds some records at a time.

    Rows have path, image_id, label, margin, similarity, rejected, decided, evaluations, error, and label_1,
    probability_1 to label_K, probability_K; what an image has not is empty.

    Args:
        label_type: of the bank's labels.
    """
    if suffix == ".jsonl":  # ASCII, because a path may be no UTF-8
        return ((json.dumps(record) + "\n").encode() for record in records)
    columns = [*_PLAIN, *(f"{name}_{place}" for place in range(1, top_k + 1) for name in ("label", "probability"))]
    rows = (_row(record, top_k) for record in records)
    return _csv(rows, columns) if suffix == ".csv" else _parquet(rows, columns, label_type)


def _csv(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> Iterator[bytes]:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(row)
        yield text.getvalue().encode()
        text.seek(0)
        text.truncate()
    yield text.getvalue().encode()


def _parquet(rows: Iterator[Mapping[str, Any]], columns: Sequence[str], label_type: type) -> Iterator[bytes]:
    schema = pa.schema([(name, _type(name, label_type)) for name in columns])

    def tables() -> Iterator[pa.Table]:
        while some := list(islice(rows, _ROWS_AT_ONCE)):
            yield pa.Table.from_pylist(some, schema)

    return parquet_pieces(chain([schema.empty_table()], tables()))


def parquet_pieces(tables: Iterable[pa.Table]) -> Iterator[bytes]:
    """A Parquet file of tables of one schema, the first of which may be empty, in pieces as they are written."""
    sink = _Pieces()
    tables = iter(tables)
    first = next(tables)
    with pq.ParquetWriter(sink, first.schema) as writer:
        for table in chain([first], tables):
            if len(table):
                writer.write_table(table)
            yield sink.taken()
    yield sink.taken()


class _Pieces(io.RawIOBase):
    """What is written, until it is taken."""

    def __init__(self) -> None:
        self._waiting, self._size = bytearray(), 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._size

    def write(self, content: Any) -> int:
        self._waiting += content
        self._size += len(content)
        return len(content)

    def taken(self) -> bytes:
        """What was written since the last call."""
        content = bytes(self._waiting)
        self._waiting.clear()
        return content


def _row(record: Mapping[str, Any], top_k: int) -> dict[str, Any]:
    row = {name: record[name] for name in _PLAIN if name in record}
    for name in ("path", "error"):
        if name in row:  # bytes that are no UTF-8 as Python writes them, \udc80 and so on
            row[name] = row[name].encode("utf-8", "backslashreplace").decode()
    best = list(record.get("probabilities", {}).items())[:top_k]
    for place, (label, probability) in enumerate(best, start=1):
        row |= {f"label_{place}": label, f"probability_{place}": probability}
    return row


def _type(name: str, label_type: type) -> pa.DataType:
    """Of a column, whatever the rows at hand have in it."""
    if name == "label":
        return {bool: pa.bool_(), int: pa.int64()}.get(label_type, pa.string())
    if name in ("margin", "similarity") or name.startswith("probability_"):
        return pa.float64()
    if name in ("decided", "rejected"):
        return pa.bool_()
    return pa.int64() if name == "evaluations" else pa.string()
