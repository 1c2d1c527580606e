"""Every source gives images, labels, class names and attributes in one shape."""

import csv
import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from fewshot_diti.data import ImageSet, image_id, load_bundled, load_images, normalize_airline, seen_attribute
from fewshot_diti.data.images import open_image
from fewshot_diti.data.sources import training_splits

CLASSES = ("707-320", "Boeing 717", "A310")


def picture(number):
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (6, 8, 3), np.uint8))


def save(path, number):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(number).save(path, "PNG")  # lossless, so that every source gives the same ids


@pytest.fixture
def sources(tmp_path):
    """The same six images in each layout: image n is of class CLASSES[n % 3]; 0..3 are train, 4 and 5 test."""
    fgvc, pool, split_folder = tmp_path / "fgvc-aircraft-2013b", tmp_path / "pool", tmp_path / "folder"
    rows = [(n, CLASSES[n % 3], "train" if n < 4 else "test") for n in range(6)]
    for n, name, split in rows:
        save(fgvc / "data" / "images" / f"{n:07}.jpg", n)
        save(pool / name / f"{n}.png", n)
        save(split_folder / split / name / f"{n}.png", n)
        save(tmp_path / "table" / "files" / f"{n}.png", n)
    for level, plural in (("variant", "variants"), ("family", "families"), ("manufacturer", "manufacturers")):
        (fgvc / "data" / f"{plural}.txt").write_text("\n".join(CLASSES) + "\n")
        for split in ("train", "test"):
            lines = [f"{n:07} {name}\n" for n, name, s in rows if s == split]
            (fgvc / "data" / f"images_{level}_{split}.txt").write_text("".join(lines))
    airlines = ["Hop", "Default", "KLM", "Hop!", "", "KLM"]
    with open(fgvc / "data" / "attributes.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image", "airline"), *((f"{n:07}", airlines[n]) for n in range(6))])
    records = [{"path": f"files/{n}.png", "label": name, "split": s, "sky": f"sky {n}, grey"} for n, name, s in rows]
    with open(tmp_path / "table" / "all.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    (tmp_path / "table" / "all.json").write_text(json.dumps(records))
    (tmp_path / "table" / "all.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    features = datasets.Features(
        picture=datasets.Image(), kind=datasets.ClassLabel(names=list(CLASSES)), sky=datasets.Value("string")
    )
    parts = {
        split: datasets.Dataset.from_dict(
            {
                "picture": [str(pool / name / f"{n}.png") for n, name, s in rows if s == split],
                "kind": [name for _, name, s in rows if s == split],
                "sky": [f"sky {n}, grey" for n, _, s in rows if s == split],
            },
            features=features,
        )
        for split in ("train", "test")
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "hub")
    return tmp_path


SPECS = [
    "fgvc:{}/fgvc-aircraft-2013b",
    "fgvc:{}/fgvc-aircraft-2013b/data@family",
    "folder:{}/folder",
    "manifest:{}/table/all.csv",
    "manifest:{}/table/all.json",
    "manifest:{}/table/all.jsonl",
    "hub:{}/hub@picture,kind",
]


@pytest.mark.parametrize("spec", SPECS)
def test_every_source_gives_the_same_images_under_the_same_classes(sources, spec):
    for split, numbers in (("train", range(4)), ("test", (4, 5))):
        data = load_images(spec.format(sources), split)
        assert isinstance(data, ImageSet)
        assert data.labels.dtype == np.int64
        assert sorted(data.class_names) == sorted(CLASSES)
        found = dict(zip(data.ids, (data.class_names[label] for label in data.labels), strict=True))
        assert found == {image_id(picture(n)): CLASSES[n % 3] for n in numbers}
        assert all(len(values) == len(data) for values in data.attributes.values())


@pytest.mark.parametrize("spec", SPECS)
def test_an_unknown_split_or_none_is_an_error_that_lists_the_splits(sources, spec):
    for split in ("middle", None):
        with pytest.raises(ValueError, match="train"):
            load_images(spec.format(sources), split)


@pytest.mark.parametrize("spec", SPECS[3:])
def test_further_columns_become_attributes(sources, spec):
    assert load_images(spec.format(sources), "test").attributes["sky"] == ("sky 4, grey", "sky 5, grey")


def test_a_pool_of_class_folders_has_no_splits_and_skips_hidden_and_other_files(sources):
    (sources / "pool" / "A310" / "notes.txt").write_text("no image")
    (sources / "pool" / "A310" / "._9.png").write_text("no image")
    (sources / "pool" / ".cache").mkdir()
    with pytest.warns(UserWarning, match=r"1 file is passed over \(1 \.txt\)"):
        assert len(load_images(f"folder:{sources}/pool")) == 6
    with pytest.raises(ValueError, match="no splits"):
        load_images(f"folder:{sources}/pool", "train")


def test_an_unreadable_image_is_an_error_that_names_it(sources):
    (sources / "pool" / "A310" / "bad.png").write_bytes(b"no image")
    data = load_images(f"folder:{sources}/pool")
    with pytest.raises(ValueError, match=r"A310.bad\.png"):
        _ = data.ids


def test_hub_rows_are_decoded_only_when_asked_for_and_errors_name_the_row(tmp_path):
    column = [{"bytes": b"no image", "path": None}] * 2
    data = datasets.Dataset.from_dict({"image": column, "label": [10, 9]})  # a struct, not yet an Image feature
    data.save_to_disk(tmp_path / "hub")
    images = load_images(f"hub:{tmp_path}/hub")
    assert images.class_names == ("9", "10")
    assert images.labels.tolist() == [1, 0]
    with pytest.raises(ValueError, match="hub row 1"):
        images.image(1)


@pytest.mark.parametrize(
    ("spec", "error", "text"),
    [
        ("fgvc:{}/pool", FileNotFoundError, "robots.ox.ac.uk"),
        ("folder:{}/nowhere", FileNotFoundError, "There is no folder .*nowhere; check the path"),
        ("folder:{}/pool/A310", FileNotFoundError, "make one sub-folder of images per class"),
        ("manifest:{}/table/files/0.png", ValueError, r"\.csv, \.json, \.jsonl"),
        ("hub:{}/hub@image,kind", ValueError, "picture, kind, sky"),
        ("zip:{}", ValueError, "manifest:FILE"),
    ],
)
def test_a_source_that_is_not_there_is_an_error_with_the_way_out(sources, spec, error, text):
    split = None if spec.startswith("folder") else "train"
    with pytest.raises(error, match=text):
        load_images(spec.format(sources), split)


@pytest.mark.parametrize("row", ["files/9.png,A310", "files/0.png,", "files/0.png,A310,more"])
def test_a_manifest_row_without_image_or_label_is_an_error_that_names_it(sources, row):
    (sources / "table" / "bad.csv").write_text(f"path,label\n{row}\n")
    with pytest.raises((ValueError, FileNotFoundError), match=r"bad\.csv"):
        load_images(f"manifest:{sources}/table/bad.csv")


def test_fgvc_levels_are_attributes_and_airlines_are_normalised(sources):
    data = load_images(f"fgvc:{sources}/fgvc-aircraft-2013b", "train")
    assert data.attributes["airline"] == ("Hop", "", "KLM", "Hop")
    assert data.attributes["manufacturer"] == tuple(CLASSES[n % 3] for n in range(4))


def test_a_subset_keeps_order_names_and_known_ids_without_decoding_again(sources):
    data = load_images(f"folder:{sources}/pool")
    ids = data.ids
    part = data.subset([3, 1])
    for path in map(str, part.images):
        open(path, "wb").close()
    assert part.ids == (ids[3], ids[1])
    assert part.names == (data.names[3], data.names[1])
    assert part.class_names == data.class_names


def test_columns_of_other_lengths_and_labels_without_a_class_are_refused():
    with pytest.raises(ValueError, match="other lengths"):
        ImageSet(images=[picture(0)], labels=np.array([0]), class_names=("a",), names=())
    with pytest.raises(ValueError, match=r"0\.\.0"):
        ImageSet(images=[picture(0)], labels=np.array([1]), class_names=("a",), names=("x",))


@pytest.mark.parametrize(
    ("raw", "name"),
    [("Hop!", "Hop"), ("American Airlines", "American"), ("Default", ""), ("default", ""), ("KLM", "KLM")],
)
def test_airline_names_are_one_a_company(raw, name):
    assert normalize_airline(raw) == name
    assert normalize_airline(name) == name


def test_the_bundled_images_are_twelve_variants_half_of_the_test_in_seen_liveries():
    train, test = load_bundled("train"), load_images("bundled", "test")
    assert train.class_names == test.class_names
    assert np.bincount(train.labels).tolist() == [24] * 12
    assert np.bincount(test.labels).tolist() == [20] * 12
    assert np.bincount(test.labels[seen_attribute(train, test)]).tolist() == [10] * 12
    assert list(train.attributes) == ["variant", "manufacturer", "family", "airline", "split"]
    assert open_image(train.images[0]).size == (256, 128)
    assert len(set(train.ids) | set(test.ids)) == 12 * 44


def test_manifests_and_lists_that_cannot_be_read_name_the_file_and_what_is_wrong(tmp_path, sources):
    manifest = tmp_path / "m.json"
    manifest.write_text('{"images": []}')
    with pytest.raises(ValueError, match=r"m\.json must hold a list of objects"):
        load_images(f"manifest:{manifest}")
    manifest = tmp_path / "m.jsonl"
    manifest.write_text('{"path": "a.png", "label": "x"}\n{"path": \n')
    with pytest.raises(ValueError, match=r"Line 2 of .*m\.jsonl is no JSON .*path"):
        load_images(f"manifest:{manifest}")
    tree = tmp_path / "fgvc"
    shutil.copytree(sources / "fgvc-aircraft-2013b", tree)
    file = next(tree.rglob("images_variant_train.txt"))
    lines = file.read_text()
    file.write_text(lines + "0000009 no such variant\n")
    with pytest.raises(ValueError, match=r"names \['no such variant'\], which variants\.txt does not list"):
        load_images(f"fgvc:{tree}", "train")
    file.write_text(lines + lines.splitlines()[0].split()[0] + " another\n")
    with pytest.raises(ValueError, match=r"gives image \d+ the class 'another', an earlier line"):
        load_images(f"fgvc:{tree}", "train")
    file.write_text("")
    with pytest.raises(ValueError, match=r"images_variant_train\.txt lists no images"):
        load_images(f"fgvc:{tree}", "train")
    file.write_text(lines + "0000009\n")
    with pytest.raises(ValueError, match=r"Line \d+ of .*images_variant_train\.txt is '0000009'"):
        load_images(f"fgvc:{tree}", "train")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.csv", b"path,label\n", "lists no images"),
        ("empty.json", b"[]", "lists no images"),
        ("latin.csv", "path,label\n1.png,caf\xe9\n".encode("latin-1"), r"latin\.csv is no UTF-8"),
        ("quote.csv", b'path,label\n1.png,a\n2.png,"b\n3.png,c\n', r"quote\.csv is no CSV after line 2"),
        ("twice.csv", b"path,label,label\n1.png,a,b\n", "name label once"),
        ("nan.json", b'[{"path": "1.png", "label": NaN}]', "Row 1 of .* has the label nan"),
        ("split.csv", b"path,label,split\n1.png,a,train\n2.png,b,\n", "1 rows of .* have no split, row 2 first"),
    ],
)
def test_a_manifest_that_would_lose_rows_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_images(f"manifest:{tmp_path / name}", "train" if name == "split.csv" else None)


def test_spaces_around_a_label_are_no_part_of_it_and_odd_line_ends_are(tmp_path):
    save(tmp_path / "1.png", 1)
    (tmp_path / "table.csv").write_text("path, label\n1.png,a\n1.png, a \n")
    assert load_images(f"manifest:{tmp_path / 'table.csv'}").class_names == ("a",)
    (tmp_path / "table.jsonl").write_text('{"path": "1.png", "label": "a\u2028b"}\n', encoding="utf-8")
    assert load_images(f"manifest:{tmp_path / 'table.jsonl'}").class_names == ("a\u2028b",)


def test_a_class_may_be_called_train_and_an_empty_val_is_no_split(tmp_path):
    save(tmp_path / "things" / "train" / "1.png", 1)
    save(tmp_path / "things" / "bus" / "2.png", 2)
    assert load_images(f"folder:{tmp_path / 'things'}").class_names == ("bus", "train")
    save(tmp_path / "split" / "train" / "a" / "1.png", 1)
    (tmp_path / "split" / "val").mkdir()
    with pytest.raises(ValueError, match="has the splits train, not 'val'"):
        load_images(f"folder:{tmp_path / 'split'}", "val")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["train/a/1.png", "train/b/2.png", "valid/a/3.png"], "splits train and beside them images in valid"),
        (["Train/a/1.png", "Test/a/2.png"], r"sub-folders of .* \(Test, Train\) are named as splits"),
        (["train/1.png", "test/2.png"], "named as splits, not as classes"),
        (["images/1.png", "masks/1.png", "images_variant_train.txt"], "has FGVC-Aircraft's layout.*pass fgvc:"),
    ],
)
def test_a_folder_whose_sub_folders_may_be_splits_or_classes_is_refused(tmp_path, files, message):
    for number, name in enumerate(files):
        save(tmp_path / name, number) if name.endswith(".png") else (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match=message):
        load_images(f"folder:{tmp_path}", "train" if files[0].startswith("train/a") else None)


def test_links_are_followed_but_not_in_circles_and_a_dead_one_is_named(tmp_path):
    save(tmp_path / "elsewhere" / "1.png", 1)
    save(tmp_path / "root" / "a" / "2.png", 2)
    (tmp_path / "root" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "a" / "circle").symlink_to(tmp_path / "root")
    data = load_images(f"folder:{tmp_path / 'root'}")
    assert data.class_names == ("a", "b") and len(data) == 2
    (tmp_path / "root" / "a" / "dead.png").symlink_to(tmp_path / "nowhere.png")
    data = load_images(f"folder:{tmp_path / 'root'}")
    with pytest.raises(FileNotFoundError, match=r"dead\.png"):
        data.image(1)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": [1, 2], "label": ["a", "b"]}, "Column 'image' of .* not images"),
        ({"image": ["a.png"], "label": [0.5]}, r"Column 'label' of .* labels are texts, whole numbers or ClassLabels"),
    ],
)
def test_columns_that_hold_no_images_or_no_labels_are_refused(tmp_path, columns, message):
    datasets.Dataset.from_dict(columns).save_to_disk(str(tmp_path / "set"))
    with pytest.raises(ValueError, match=message):
        load_images(f"hub:{tmp_path / 'set'}")


def test_an_empty_data_set_is_refused(tmp_path):
    datasets.Dataset.from_dict({"image": [], "label": []}).save_to_disk(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="holds no images"):
        load_images(f"hub:{tmp_path / 'none'}")


def test_what_is_trained_on_and_validated_on_where_nothing_is_named(tmp_path: Path) -> None:
    for name in ("whole", "pool"):
        for part in ("train/a", "val/a", "test/a") if name == "whole" else ("a", "b"):
            (tmp_path / name / part).mkdir(parents=True)
    (tmp_path / "fgvc" / "data").mkdir(parents=True)
    assert training_splits("bundled") == training_splits(f"veri:{tmp_path}") == ("train", None)
    assert training_splits(f"fgvc:{tmp_path / 'fgvc'}@family") == ("train", None)
    (tmp_path / "fgvc" / "data" / "images_family_val.txt").touch()
    assert training_splits(f"fgvc:{tmp_path / 'fgvc'}@family") == ("train", "val")
    assert training_splits(f"fgvc:{tmp_path / 'fgvc'}") == ("train", None)
    for spec in ("", "folder:"):
        assert training_splits(f"{spec}{tmp_path / 'whole'}") == ("train", "val")
        assert training_splits(f"{spec}{tmp_path / 'pool'}") == (None, None)
    assert training_splits("duke") == training_splits("fgvc") == (None, None)  # plain folders
    assert training_splits("hub:some/set") == training_splits("manifest:a.csv") == (None, None)
