"""Folders as people have them: thumbnails of network drives, banks, dead links, circles, odd names."""

import os
import unicodedata
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from fewshot_diti.data import load_folder, load_images, load_manifest
from fewshot_diti.data.folders import is_image, visible_files


def save(path, number=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (6, 8, 3), np.uint8)).save(path, "PNG")
    return path


@pytest.fixture
def pool(tmp_path):
    for n in range(4):
        save(tmp_path / "pool" / ("a", "b")[n % 2] / f"{n}.png", n)
    return tmp_path / "pool"


SYSTEM = ["@eaDir", "__MACOSX", ".cache", "$RECYCLE.BIN", "System Volume Information", "lost+found"]


@pytest.mark.parametrize("name", SYSTEM)
def test_what_systems_leave_is_no_shot_and_no_class_at_any_depth(pool, name, recwarn):
    for place in (pool, pool / "a", pool / "b" / "deeper"):
        save(place / name / "x" / "thumb.png", 9)
    for place in (pool, pool / "a"):
        for file in ("Thumbs.db", ".DS_Store", "desktop.ini"):
            (place / file).write_text("")
    data = load_folder(pool)
    assert len(data) == 4 and data.class_names == ("a", "b")
    assert not recwarn.list


def test_a_bank_inside_the_data_is_no_class(pool):
    for place in (pool / "bank", pool / "a" / "bank"):
        place.mkdir()
        (place / "manifest.json").write_text("{}")
        (place / "bank.json").write_text("{}")
        save(place / "sample.png", 5)
    data = load_folder(pool)
    assert len(data) == 4 and data.class_names == ("a", "b")


def test_an_empty_folder_is_a_known_class_that_can_be_left_out(pool):
    (pool / "empty").mkdir()
    data = load_folder(pool)
    assert data.class_names == ("a", "b", "empty")
    with pytest.warns(UserWarning, match="left out: empty"):
        assert data.without_empty_classes().class_names == ("a", "b")


def test_a_filtered_data_set_still_names_all_its_classes(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list("abcde"))})
    rows = {"image": [Image.new("RGB", (4, 4), (k, 0, 0)) for k in range(5)], "label": list(range(5))}
    stored = datasets.Dataset.from_dict(rows, features=features).filter(lambda row: row["label"] in (1, 3))
    stored.save_to_disk(tmp_path / "two")
    data = load_images(f"hub:{tmp_path / 'two'}")
    assert data.class_names == tuple("abcde")
    with pytest.warns(UserWarning, match="left out: a, c, e"):
        assert data.without_empty_classes().class_names == ("b", "d")
    assert data.image(1).getpixel((0, 0)) == (3, 0, 0)


def test_files_that_cannot_be_used_are_listed_with_the_good_ones(pool):
    (pool / "a" / "dead.png").symlink_to("nowhere.png")
    (pool / "a" / "null.png").symlink_to("/dev/null")
    os.mkfifo(pool / "a" / "pipe.png")
    data = load_folder(pool)
    assert len(data) == 7
    (pool / "b" / "1.png").write_bytes((pool / "b" / "1.png").read_bytes()[:50])
    (pool / "b" / "3.png").unlink()
    with pytest.raises(ValueError) as caught:
        _ = data.ids
    for name, reason in {
        "dead.png": "is a link to nowhere.png",
        "null.png": "is a device",
        "pipe.png": "is a named pipe",
        "1.png": "Cannot decode",
        "3.png": "There is no image file",
    }.items():
        assert any(name in line and reason in line for line in str(caught.value).splitlines())


def test_a_class_folder_that_cannot_be_listed_is_listed_itself_with_the_reason(pool, monkeypatch):
    (pool / "locked").mkdir()
    original, access = os.scandir, os.access

    def scandir(path):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked" and access(path, mode))
    data = load_folder(pool)
    assert len(data) == 5 and data.class_names == ("a", "b", "locked")
    assert any(is_image(path) for path in visible_files(pool) if path.name == "locked")
    with pytest.raises(ValueError, match="locked is a folder that cannot be listed"):
        data.decode(4)
    with pytest.raises(PermissionError):
        visible_files(pool / "locked")


def test_links_in_circles_end_and_a_folder_with_many_links_is_listed_once(tmp_path):
    save(tmp_path / "elsewhere" / "x.png", 1)
    folder = tmp_path / "root"
    save(folder / "z" / "real.png", 2)
    for depth in range(12):  # 2 ** 12 ways to the last one
        (folder / "z").mkdir(exist_ok=True)
        for name in ("l", "r"):
            (folder / f"{name}{depth}").symlink_to(tmp_path / "elsewhere")
    for name, target in {"first": "z", "again": "z", "up": ".", "above": ".."}.items():
        (folder / name).symlink_to(target)
    (tmp_path / "elsewhere" / "back").symlink_to(folder)
    found = visible_files(folder)
    assert sorted(path.name for path in found) == ["real.png", "x.png"]
    assert folder / "z" / "real.png" in found  # at its own place, not at a link's


def test_unicode_forms_of_a_folder_are_one_class_and_files_keep_their_paths(tmp_path):
    composed, parts = (unicodedata.normalize(form, "über") for form in ("NFC", "NFD"))
    save(tmp_path / "pool" / composed / "1.png", 1)
    save(tmp_path / "pool" / parts / "2.png", 2)
    save(tmp_path / "pool" / "x" / "3.png", 3)
    data = load_folder(tmp_path / "pool")
    assert data.class_names == ("x", composed) and data.labels.tolist().count(1) == 2 and len(set(data.ids)) == 3
    save(tmp_path / f"{parts}.png", 4)
    (tmp_path / "m.csv").write_text(f"path,label\n{composed}.png,{composed}\n{parts}.png,{parts}\n", encoding="utf-8")
    table = load_manifest(tmp_path / "m.csv")
    assert table.class_names == (composed,) and len(set(table.ids)) == 1


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31mred", "\udcff\udcfe"])
def test_a_class_folder_with_an_unprintable_name_is_refused_and_named(pool, name):
    (pool / name).mkdir()
    with pytest.raises(ValueError, match=r"A class folder in .*pool.*rename"):
        load_folder(pool)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (r"C:\Users\me\images", r"There is no folder C:\\Users\\me\\images"),
        ("C:/Users/me/images", "There is no folder C:/Users/me/images"),
        ("nowhere", "There is no folder nowhere"),
        ("fgvc:nowhere", "There is no folder nowhere; .*FGVC-Aircraft.*Unpack"),
        ("isic2019:nowhere", "There is no folder nowhere; .*ISIC 2019"),
        ("veri:nowhere", "There is no folder nowhere; .*VeRi-776"),
        ("duke:nowhere", "There is no folder nowhere; .*DukeMTMC-reID"),
        ("{}/images.zip", "images.zip is an archive, not a folder; unpack it"),
        ("duke:{}/images.zip", "images.zip is an archive, not a folder; unpack it"),
        ("{}/table.csv", "table.csv is a file, not a folder; .*manifest:"),
        ("folder:{}/a/0.png", "0.png is a file, not a folder"),
        ("{}/dead", "dead is a link to gone, which is not there"),
        ("manifest:{}/a", "a ends in ''"),
        ("manifest:{}/none.csv", "none.csv is not there"),
    ],
)
def test_messages_say_what_a_thing_is(pool, spec, message):
    (pool / "images.zip").write_bytes(b"PK\3\4")
    (pool / "table.csv").write_text("path,label\n")
    (pool / "dead").symlink_to("gone")
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        load_images(spec.format(pool), "train")


def test_a_plain_folder_and_every_benchmark_are_named_in_one_way(pool, tmp_path):
    assert load_images(str(pool)).ids == load_images(f"folder:{pool}").ids
    for n in range(20):
        save(tmp_path / "duke" / "bounding_box_test" / f"0001_c1_{n}.jpg", n)
    save(tmp_path / "duke" / "query" / "0001_c2_0.jpg", 50)
    assert len(load_images(f"duke:{tmp_path / 'duke'}", "train")) == 20
    with pytest.raises(ValueError, match="has splits; pass one"):
        load_images(f"duke:{tmp_path / 'duke'}")
    with pytest.raises(ValueError, match=r"'zip:x'; pass one of DIR .*isic2019:DIR, veri:DIR, duke:DIR"):
        load_images("zip:x")


def test_a_manifest_reads_no_file_outside_its_folder_unless_that_is_named(tmp_path):
    outside = save(tmp_path / "outside.png", 1)
    (tmp_path / "lists").mkdir()
    table = tmp_path / "lists" / "m.csv"
    for path in ("../outside.png", str(outside), "x/../../outside.png"):
        table.write_text(f"path,label\n{path},a\n")
        with pytest.raises(ValueError, match=r"names 1 images that do not lie in .*lists.*manifest:.*m\.csv@DIR"):
            load_images(f"manifest:{table}")
    for path in ("outside.png", str(outside)):
        table.write_text(f"path,label\n{path},a\n")
        assert load_images(f"manifest:{table}@{tmp_path}").images == [outside]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("deep.json", b"[" * 100_000),
        ("digits.json", b'[{"path": "a.png", "label": ' + b"1" * 10_000 + b"}]"),
        ("m.txt", b"x"),
    ],
)
def test_a_manifest_that_cannot_be_read_is_an_error_that_names_it(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        load_images(f"manifest:{tmp_path / name}")
