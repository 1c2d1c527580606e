"""Files of predictions: JSON lines with everything, CSV and Parquet with a row per image."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

SUFFIXES = (".jsonl", ".csv", ".parquet")
_PLAIN = ("path", "image_id", "label", "margin", "similarity", "rejected", "decided", "evaluations", "error")


def check_suffix(path: Path) -> None:
    """Raises a ValueError where the end of a file's name is none of `SUFFIXES`."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"output={path}; pass a file that ends in one of {', '.join(SUFFIXES)}.")


def encode_predictions(records: Sequence[Mapping[str, Any]], suffix: str, top_k: int) -> bytes:
    """The content of a file with this suffix.

    Rows have path, image_id, label, margin, similarity, rejected, decided, evaluations, error, and label_1,
    probability_1 to label_K, probability_K; what an image has not is empty.
    """
    if suffix == ".jsonl":  # ASCII, because a path may be no UTF-8
        return "".join(json.dumps(record) + "\n" for record in records).encode()
    rows = [_row(record, top_k) for record in records]
    columns = [*_PLAIN, *(f"{name}_{place}" for place in range(1, top_k + 1) for name in ("label", "probability"))]
    if suffix == ".csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()
    table = pa.table({name: pa.array([row.get(name) for row in rows], _type(name, rows)) for name in columns})
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def _row(record: Mapping[str, Any], top_k: int) -> dict[str, Any]:
    row = {name: record[name] for name in _PLAIN if name in record}
    for name in ("path", "error"):
        if name in row:  # bytes that are no UTF-8 as Python writes them, \udc80 and so on
            row[name] = row[name].encode("utf-8", "backslashreplace").decode()
    best = list(record.get("probabilities", {}).items())[:top_k]
    for place, (label, probability) in enumerate(best, start=1):
        row |= {f"label_{place}": label, f"probability_{place}": probability}
    return row


def _type(name: str, rows: Sequence[Mapping[str, Any]]) -> pa.DataType:
    """Of a column, whatever the rows at hand have in it."""
    if name == "label":  # of the type that labels have in the bank
        values = [row[name] for row in rows if name in row]
        return {bool: pa.bool_(), int: pa.int64()}.get(type(values[0]) if values else str, pa.string())
    if name in ("margin", "similarity") or name.startswith("probability_"):
        return pa.float64()
    if name in ("decided", "rejected"):
        return pa.bool_()
    return pa.int64() if name == "evaluations" else pa.string()
