"""Names of classes, files and folders are data: told apart and kept as they are, or refused; never a path."""

from __future__ import annotations

import json
import os
import time
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hostile_images import encoded
from small_commands import read_lines, save_image, train_command

from fewshot_diti import Bank, cli
from fewshot_diti.data import import_path_list, load_images

Record = Callable[[str, object], None]
ESCAPE = "\x1b]0;owned\x07"
NAMES = {
    "quotes": ["a'b\"c`", "$(touch x)", "plain"],
    "dashes": ["-rf", "--bank"],
    "dots": ["..x", "x..", "..."],
    "case twins": ["A320", "a320"],
    "numbers": ["1", "01", "1.0"],
    "two forms of one name": [unicodedata.normalize("NFC", "über"), unicodedata.normalize("NFD", "über"), "x"],
    "emoji": ["✈️", "🚗"],
    "300 letters": ["n" * 300, "x"],
    "markup": ["[red]x", "[bold]", "<b>x</b>"],
    "braces": ["{}", "{0}", "%s"],
    "Windows": ["CON", "nul.png", "a\\b", "c:d"],
    "slashes": ["a/b", "../../x", "/etc"],
    "spaces": ["gear ", "gear"],
    "words of JSON": ["None", "nan", "null", "true"],
    "splits": ["train", "test"],
    "pipe and newline": ["a|b", "a\nb"],
    "escapes": [ESCAPE, "x"],
    "reversed": ["\u202egnp", "x"],
    "NUL": ["gear\0", "gear"],
    "bytes": ["\udcff", "x"],
    "empty": ["", "x"],
}


@pytest.mark.parametrize("kind", NAMES)
def test_class_names_are_told_apart_or_refused(
    kind: str,
    quick_train: None,
    backbone_folder: Path,
    tmp_path: Path,
    thorough: bool,
    capsys: pytest.CaptureFixture[str],
    record_property: Record,
) -> None:
    """As a manifest; with `--thorough` trained and scored, otherwise read, which refuses what it refuses."""
    names, home = NAMES[kind], tmp_path / "home"
    rows = []
    for c, name in enumerate(names):
        for i in range(2):
            save_image(home / f"{c}-{i}.png", 10 * c + i)
            rows.append({"path": f"{c}-{i}.png", "label": name})
    (home / "m.json").write_text(json.dumps(rows))
    data = f"manifest:{home / 'm.json'}"
    distinct = {unicodedata.normalize("NFC", name.strip()) for name in names}
    if not thorough and kind not in ("slashes", "escapes"):
        try:
            assert set(load_images(data).class_names) == distinct
        except ValueError as error:
            assert str(home) in str(error) or "class name" in str(error)
        return
    status = cli.main([*train_command(Path(data), backbone_folder, tmp_path / "bank"), "--folds", "0"])
    said = capsys.readouterr()
    assert ESCAPE not in said.out + said.err
    record_property("classes", len(names))
    record_property("refused", status == 2)
    if status == 2:
        assert len([x for x in said.err.splitlines() if x.startswith("error")]) == 1
        return
    assert status == 0, said.err
    output = tmp_path / "o.jsonl"
    images = [str(home / f"{c}-0.png") for c in range(len(names))]
    assert cli.main(["score", "--bank", str(tmp_path / "bank"), "--output", str(output), *images]) == 0
    assert set(read_lines(output)[0]["scores"]) == distinct
    assert ESCAPE not in capsys.readouterr().out + (tmp_path / "bank" / "README.md").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bank", "home", "o.jsonl", "o.jsonl.parts"]


def test_an_exported_class_lies_in_the_folder_whatever_it_is_called(
    bank: Path, tmp_path: Path, record_property: Record
) -> None:
    whole, tried = Bank.from_pretrained(bank), 0
    for name in ("../../x", "/etc/x", "a/b", "-rf", "n" * 300, "CON", "a\\b", "..", ".", "\0", ESCAPE, "[x]", "ü", ""):
        renamed = replace(whole, tokens=(replace(whole.tokens[0], label=name), *whole.tokens[1:]))
        for format in ("diffusers", "kohya", "peft"):
            place = tmp_path / "home" / "out"
            try:
                renamed.export(name, place, format)
            except (ValueError, OSError) as error:
                assert str(error)
            tried += 1
    outside = [p for p in tmp_path.rglob("*") if p.is_file() and not p.is_relative_to(tmp_path / "home" / "out")]
    record_property("exports", tried)
    record_property("files outside", len(outside))
    assert not outside and not Path("/etc/x").exists()


def test_files_of_any_name_are_scored(
    bank: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], record_property: Record
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    names = [
        *("-rf.png", "--bank.png", "with space.png", "quote'\"`.png", "semi;rm -rf.png", "$(touch x).png", "*.png"),
        *("new\nline.png", "tab\t.png", f"{ESCAPE[:4]}.png", "[red]x.png", "😀.png", "ü.png", "ü.png", "CON.png"),
        *("a" * 251 + ".png", "UPPER.PNG", "trailing .png", "a..png", "back\\slash.png", "c:d.png", "\u202egnp.png"),
        *("bytes \udcff\udcfe.png", "bytes \udcff\udcfd.png"),
    ]
    for i, name in enumerate(names):
        (folder / name).write_bytes(encoded("PNG", i))
    for suffix in (".jsonl", ".csv", ".parquet"):
        output = tmp_path / f"o{suffix}"
        assert cli.main(["score", "--bank", str(bank), "--output", str(output), str(folder)]) == 0
        said = capsys.readouterr()
        assert ESCAPE[:4] not in said.out + said.err
    found = {Path(row["path"]).name for row in read_lines(tmp_path / "o.jsonl")}
    record_property("files", len(names))
    record_property("lost", len(set(names) - found))
    assert found == set(names)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    for label in ("a", "b"):
        for i in range(3):
            save_image(folder / "in" / f"{label}{i}.png", 10 * ord(label) + i)
    save_image(tmp_path / "outside.png", 99)
    os.mkfifo(folder / "in" / "pipe.png")
    return folder


def test_a_manifest_reads_its_rows_and_no_file_outside(home: Path, record_property: Record) -> None:
    good = [{"path": f"in/{x}{i}.png", "label": x} for x in "ab" for i in range(3)]
    csv = b"path,label\n" + b"".join(f"{r['path']},{r['label']}\n".encode() for r in good)
    lines = b"\n".join(json.dumps(r).encode() for r in good)
    whole = {
        "plain.csv": csv,
        "mark.csv": b"\xef\xbb\xbf" + csv,
        "crlf.csv": csv.replace(b"\n", b"\r\n"),
        "cr.csv": csv.replace(b"\n", b"\r"),
        "plain.json": json.dumps(good).encode(),
        "plain.jsonl": lines,
        "crlf.jsonl": b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n\r\n"),
        "inside.json": json.dumps([*good[:-1], {"path": "in/../in/b2.png", "label": "b"}]).encode(),
    }
    outside = (home.parent / "outside.png").as_posix()
    paths = ("../outside.png", "in/../../outside.png", outside, f"file://{outside}", "https://example.org/x.png")
    paths = (*paths, "no.png", "in/pipe.png", "in", "/dev/zero", "in/a0.png\0", "\ud800.png", "~/x.png", "")
    refused = {f"path {i}.json": json.dumps([*good, {"path": p, "label": "a"}]).encode() for i, p in enumerate(paths)}
    refused |= {
        "utf-16.csv": csv.decode().encode("utf-16"),
        "latin.csv": csv.replace(b",b", b",\xe9"),
        "quote.csv": csv + b'"in/a0.png,a',
        "wide.csv": csv + b"in/a0.png,a,a\n",
        "large cell.csv": csv + b"in/a0.png," + b"x" * 10**6 + b"\n",
        "twice.csv": csv.replace(b"path,label", b"path,path"),
        "no header.csv": csv.partition(b"\n")[2],
        "semicolons.csv": csv.replace(b",", b";"),
        "empty.csv": b"",
        "deep.json": b"[" * 100_000,
        "object.json": b'{"path": "x"}',
        "digits.json": b'[{"path": "in/a0.png", "label": ' + b"1" * 10_000 + b"}]",
        "nan.json": b'[{"path": "in/a0.png", "label": NaN}]',
        "list.json": b'[{"path": "in/a0.png", "label": ["a"]}]',
        "number.json": b'[{"path": 5, "label": "a"}]',
        "cut.jsonl": lines[:-5],
        "deep.jsonl": lines + b"\n" + b"[" * 100_000,
    }
    for name, content in (whole | refused).items():
        (home / name).write_bytes(content)
        if name in whole:
            assert len(load_images(f"manifest:{home / name}").ids) == 6, name
            continue
        with pytest.raises((ValueError, OSError)) as raised:
            assert load_images(f"manifest:{home / name}").ids
        assert str(home) in str(raised.value) or "https://" in str(raised.value), (name, raised.value)
    record_property("manifests read", len(whole))
    record_property("refused", len(refused))
    record_property("files outside read", 0)


def test_a_list_of_a_split_reads_no_file_outside(home: Path, record_property: Record) -> None:
    outside = (home.parent / "outside.png").as_posix()
    for i, path in enumerate(("../outside.png", outside, "in/../../outside.png", "/in/../../outside.png")):
        (home / f"{i}.txt").write_text(f"{path} a\nin/b0.png b\n")
        with pytest.raises(FileNotFoundError, match=r"outside\.png is not below"):
            import_path_list(home / f"{i}.txt", home)
    record_property("lists refused", 4)


def test_a_manifest_of_many_rows_is_read_in_bounded_time(home: Path, thorough: bool, record_property: Record) -> None:
    rows = 1_000_000 if thorough else 20_000
    with (home / "big.csv").open("w") as file:
        file.write("path,label\n")
        file.writelines(f"in/{'ab'[i % 2]}{i % 3}.png,{'ab'[i % 2]}\n" for i in range(rows))
    began = time.monotonic()
    assert len(load_images(f"manifest:{home / 'big.csv'}")) == rows
    record_property("rows", rows)
    record_property("seconds", round(time.monotonic() - began, 1))
    assert time.monotonic() - began < 600
