"""Drawing, saving and importing shots."""

import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fewshot_diti.data import (
    ImageSet,
    Shots,
    check_disjoint,
    import_path_list,
    load_shots_file,
    sample_shots,
    sample_shots_of_one_value,
    seen_attribute,
    shown_attribute,
)


def image_set(pairs, **attributes):
    """Images of (class name, picture number) pairs; equal numbers are equal pictures."""
    class_names = tuple(dict.fromkeys(name for name, _ in pairs))
    return ImageSet(
        images=[np.full((1, 1, 3), (number, number // 256, 7), np.uint8) for _, number in pairs],
        labels=np.array([class_names.index(name) for name, _ in pairs]),
        class_names=class_names,
        names=tuple(f"{name} {number} at {row}" for row, (name, number) in enumerate(pairs)),
        attributes=attributes,
    )


PAIRS = [(name, 10 * place + n) for place, name in enumerate(("A", "B", "C")) for n in range(8)]


@given(st.permutations(PAIRS), st.integers(0, 2**40), st.integers(1, 8), st.integers(1, 8))
@settings(max_examples=40, deadline=None)
def test_draws_are_nested_balanced_and_independent_of_file_order(pairs, seed, first, second):
    few, many = sorted((first, second))
    drawn = sample_shots(image_set(pairs), many, seed)
    fewer = sample_shots(image_set(PAIRS), few, seed)
    assert drawn.image_ids.keys() == fewer.image_ids.keys()
    for name, ids in drawn.image_ids.items():
        assert len(set(ids)) == many
        assert ids[:few] == fewer.image_ids[name]


def test_the_draw_is_the_same_on_every_machine():
    drawn = sample_shots(image_set(PAIRS), 2, seed=1).rows(image_set(PAIRS))
    assert [PAIRS[row] for row in drawn] == [("A", 2), ("A", 0), ("B", 17), ("B", 13), ("C", 23), ("C", 20)]


def test_seeds_draw_differently():
    assert len({sample_shots(image_set(PAIRS), 2, seed).image_ids["A"] for seed in range(20)}) > 10


def test_adding_a_class_leaves_the_shots_of_the_others():
    both = sample_shots(image_set(PAIRS), 3, seed=0).image_ids
    alone = sample_shots(image_set([pair for pair in PAIRS if pair[0] == "B"]), 3, seed=0).image_ids
    assert alone["B"] == both["B"]


def test_duplicates_within_a_class_count_once():
    data = image_set([("A", 1), ("A", 1), ("A", 2), ("B", 3), ("B", 4)])
    assert len(set(sample_shots(data, 2, seed=0).image_ids["A"])) == 2
    with pytest.raises(ValueError, match=r"3 different images.*'A' has 2, 'B' has 2.*ask for 2"):
        sample_shots(data, 3, seed=0)


def test_a_class_without_images_is_an_error_even_for_all():
    data = image_set([*PAIRS, ("D", 99)])
    with pytest.raises(ValueError, match=r"'D' has 0; add images or drop the class\."):
        sample_shots(data.subset(range(len(PAIRS))), "all", seed=0)


def test_all_takes_every_image_of_unbalanced_classes():
    data = image_set([("A", 1), ("A", 2), ("A", 3), ("B", 4)])
    shots = sample_shots(data, "all", seed=0)
    assert sorted(shots.rows(data)) == [0, 1, 2, 3]


@pytest.mark.parametrize("k", [0, -1, 1.0, True, "every"])
def test_other_values_of_k_are_refused(k):
    with pytest.raises(ValueError, match="at least 1"):
        sample_shots(image_set(PAIRS), k, seed=0)


@pytest.mark.parametrize("k", [3, "all"])
def test_saved_shots_come_back_and_find_their_images(tmp_path, k):
    data = image_set(PAIRS)
    shots = sample_shots(data, k, seed=5)
    shots.save(tmp_path / "shots.json")
    loaded = Shots.load(tmp_path / "shots.json")
    assert loaded == shots
    rows = loaded.rows(data)
    assert [(data.class_names[data.labels[r]], data.ids[r]) for r in rows] == [
        (name, image) for name, ids in shots.image_ids.items() for image in ids
    ]


def test_shots_that_are_not_among_the_images_are_an_error():
    shots = sample_shots(image_set(PAIRS), 8, seed=0)
    with pytest.raises(ValueError, match=r"1 of 24 shots.*class 'A'"):
        shots.rows(image_set(PAIRS[1:]))


def test_a_file_of_something_else_is_no_file_of_shots(tmp_path):
    (tmp_path / "x.json").write_text('{"k": 1}')
    with pytest.raises(ValueError, match=r"Shots\.save"):
        Shots.load(tmp_path / "x.json")


def test_a_picture_in_shots_and_test_is_an_error_that_names_both():
    check_disjoint(image_set(PAIRS[:4]), image_set(PAIRS[4:]))
    with pytest.raises(ValueError, match=r"B 3 at 1.*A 3 at 3"):
        check_disjoint(image_set(PAIRS[:4]), image_set([("A", 90), ("B", 3)]))


def test_an_attribute_is_seen_only_among_the_shots_of_its_own_class():
    shots = image_set([("A", 1), ("B", 2)], airline=("KLM", ""))
    test = image_set([("B", 3), ("A", 4), ("B", 5), ("A", 6)], airline=("KLM", "KLM", "", ""))
    assert seen_attribute(shots, test).tolist() == [False, True, True, False]
    shown = shown_attribute(shots, test, "airline")[:, test.class_names.index("A")]
    assert shown.tolist() == [True, True, False, False]  # "" is no value that shots could show
    assert not shown_attribute(shots, test, "airline")[:, test.class_names.index("B")].any()
    for function in (seen_attribute, shown_attribute):
        with pytest.raises(ValueError, match="livery"):
            function(shots, test, "livery")


def test_shots_of_one_value_wear_what_other_classes_wear_in_the_test():
    pool = image_set([(c, 10 * p + n) for p, c in enumerate("AB") for n in range(6)], airline=("KLM", "SAS", "") * 4)
    test = image_set([("A", 50), ("B", 51)], airline=("KLM", "SAS"))
    for seed in range(5):
        drawn = sample_shots_of_one_value(pool, test, 2, seed, "airline")
        shots = pool.subset(drawn.rows(pool))
        assert (
            list(zip(shots.labels.tolist(), shots.attributes["airline"], strict=True))
            == [(0, "SAS")] * 2 + [(1, "KLM")] * 2
        )
    with pytest.raises(ValueError, match="Class 'A' has no airline that 3 of its images wear"):
        sample_shots_of_one_value(pool, test, 3, 0, "airline")
    with pytest.raises(ValueError, match="No attribute 'sky'"):
        sample_shots_of_one_value(pool, test, 1, 0, "sky")


@pytest.fixture
def root(tmp_path):
    for n, name in enumerate(("cat", "cat", "guinea pig", "dog")):
        (tmp_path / "root" / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2), (n, 0, 0)).save(tmp_path / "root" / name / f"{n} x.png")
    return tmp_path / "root"


def tif_records():
    paths = ["cat/0 x.png", "cat/1 x.png", "guinea pig/2 x.png", "dog/3 x.png"]
    names = ["cat", "cat", "guinea pig", "dog"]
    labels = [70000, 70000, 300, 2]
    return [{"classname": names[i], "impath": f"./data/pets/{paths[i]}", "label": labels[i]} for i in range(len(paths))]


def write_list(file, kind):
    records = tif_records()
    if kind == "tif":
        torch.save(records, file)
    elif kind == "coop":
        rows = [[r["impath"].removeprefix("./data/pets/"), r["label"], r["classname"]] for r in records]
        file.write_text(json.dumps({"train": rows, "val": [], "test": rows[:1]}))
    elif kind == "path label":
        file.write_text("".join(f"{r['impath']} {r['classname']}\n" for r in records))
    else:
        file.write_text("".join(f"{r['impath']}\n\n" for r in records))


@pytest.mark.parametrize(
    ("kind", "name", "order"),
    [
        ("tif", "train_16_1.data", ("dog", "guinea pig", "cat")),
        ("coop", "split_zhou_Pets.json", ("dog", "guinea pig", "cat")),
        ("path label", "train.txt", ("cat", "dog", "guinea pig")),
        ("path", "train.txt", ("cat", "dog", "guinea pig")),
    ],
)
def test_published_lists_give_the_listed_images_under_their_classes(tmp_path, root, kind, name, order):
    write_list(tmp_path / name, kind)
    data = import_path_list(tmp_path / name, root)
    assert data.class_names == order
    assert [data.class_names[label] for label in data.labels] == ["cat", "cat", "guinea pig", "dog"]
    assert [data.image(row).getpixel((0, 0))[0] for row in range(4)] == [0, 1, 2, 3]
    assert sorted(sample_shots(data, "all", seed=0).rows(data)) == [0, 1, 2, 3]


def test_every_list_of_a_coop_file_has_the_same_labels(tmp_path, root):
    write_list(tmp_path / "split_zhou_Pets.json", "coop")
    test = import_path_list(tmp_path / "split_zhou_Pets.json", root, "test")
    assert test.class_names[test.labels[0]] == "cat"
    assert len(test.class_names) == 3
    with pytest.raises(ValueError, match=r"'middle'.*train"):
        import_path_list(tmp_path / "split_zhou_Pets.json", root, "middle")


def test_a_list_two_of_whose_images_lead_to_one_file_is_refused(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "1.png")
    (tmp_path / "list.txt").write_text("a/1.png\nb/1.png\n")
    with pytest.raises(ValueError, match=r"lists a/1\.png and b/1\.png, and both lead to .*check image_root"):
        import_path_list(tmp_path / "list.txt", tmp_path)
    (tmp_path / "list.txt").write_text("1.png\n")
    with pytest.raises(ValueError, match=r"Line 1 of .*list\.txt is '1\.png'"):
        import_path_list(tmp_path / "list.txt", tmp_path)


class Trap:
    """What a hostile pickle does: it calls something as soon as it is loaded."""

    def __reduce__(self):
        return pytest.fail, ("a pickle was loaded",)


def test_pickles_are_refused_and_never_loaded(tmp_path, root):
    (tmp_path / "shot_16-seed_1.pkl").write_bytes(pickle.dumps({"train": Trap()}))
    torch.save([{"classname": Trap(), "impath": "a.png", "label": 0}], tmp_path / "train.data")
    torch.save([Trap()], tmp_path / "legacy.data", _use_new_zipfile_serialization=False)
    for name in ("shot_16-seed_1.pkl", "train.data", "legacy.data"):
        with pytest.raises(ValueError, match=r"never read.*'path label'"):
            import_path_list(tmp_path / name, root)


@pytest.mark.parametrize(
    ("text", "error", "match"),
    [
        ("cat/9.png\n", FileNotFoundError, r"cat/9\.png"),
        ("cat/0 x.png\nnothing\n", ValueError, "Line 2"),
        ("\n", ValueError, "no images"),
    ],
)
def test_a_list_that_cannot_be_followed_is_an_error(tmp_path, root, text, error, match):
    (tmp_path / "train.txt").write_text(text)
    with pytest.raises(error, match=match):
        import_path_list(tmp_path / "train.txt", root)


def test_one_label_with_two_class_names_is_refused(tmp_path, root):
    (tmp_path / "split.json").write_text(json.dumps({"train": [["cat/0 x.png", 0, "cat"], ["cat/1 x.png", 0, "dog"]]}))
    with pytest.raises(ValueError, match="two class names"):
        import_path_list(tmp_path / "split.json", root)


@pytest.fixture
def pets(tmp_path, root):
    """The pictures of `root` under other file names, in another order, with two more."""
    numbers = (5, 3, 2, 1, 0, 4)
    class_names = ("the cat", "the dog", "the guinea pig")
    for n in numbers:
        Image.new("RGB", (2, 2), (n, 0, 0)).save(tmp_path / f"renamed{n}.png")
    return ImageSet(
        images=[tmp_path / f"renamed{n}.png" for n in numbers],
        labels=np.array([0, 1, 2, 0, 0, 1]),
        class_names=class_names,
        names=tuple(f"renamed{n}" for n in numbers),
    )


@pytest.mark.parametrize(
    ("kind", "name"), [("tif", "train.data"), ("coop", "split.json"), ("path label", "a.txt"), ("path", "b.txt")]
)
def test_a_published_list_gives_shots_of_a_pool_by_the_pictures(tmp_path, root, pets, kind, name):
    write_list(tmp_path / name, kind)
    shots = load_shots_file(tmp_path / name, pets, root)
    assert shots.k == "all"
    assert {c: len(ids) for c, ids in shots.image_ids.items()} == {"the cat": 2, "the dog": 1, "the guinea pig": 1}
    assert [pets.names[row] for row in shots.rows(pets)] == ["renamed0", "renamed1", "renamed3", "renamed2"]


def test_a_list_of_equally_many_shots_has_that_k_and_the_folder_is_the_pools_by_default(tmp_path, root):
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "one.txt").write_text("cat/0 x.png\ndog/3 x.png\n")
    paths = sorted(root.rglob("*.png"))
    pool = ImageSet(
        images=paths, labels=[0, 0, 1, 2], class_names=("cat", "dog", "guinea pig"), names=tuple(map(str, paths))
    )
    shots = load_shots_file(tmp_path / "lists" / "one.txt", pool)
    assert shots.k == 1 and [pool.images[row].name for row in shots.rows(pool)] == ["0 x.png", "3 x.png"]


def test_saved_shots_are_read_as_a_shots_file_and_must_be_in_the_pool(tmp_path):
    data = image_set(PAIRS)
    sample_shots(data, 2, seed=3).save(tmp_path / "shots.json")
    assert load_shots_file(tmp_path / "shots.json", data) == sample_shots(data, 2, seed=3)
    with pytest.raises(ValueError, match="are not among the 1 images"):
        load_shots_file(tmp_path / "shots.json", data.subset([0]))


def test_a_listed_image_that_the_pool_lacks_is_named(tmp_path, root, pets):
    write_list(tmp_path / "a.txt", "path")
    with pytest.raises(ValueError, match=r"a\.txt lists 3 images .* among the 1 of the pool \(renamed2.*0 x\.png"):
        load_shots_file(tmp_path / "a.txt", pets.subset([2]), root)


def test_a_list_that_divides_the_images_otherwise_is_refused(tmp_path, root, pets):
    (tmp_path / "a.txt").write_text("cat/0 x.png pet\ndog/3 x.png pet\n")
    with pytest.raises(ValueError, match="in one class, 'pet', and the pool in two, 'the cat' and 'the dog'"):
        load_shots_file(tmp_path / "a.txt", pets, root)
    (tmp_path / "a.txt").write_text("cat/0 x.png tom\ncat/1 x.png tabby\n")
    with pytest.raises(ValueError, match="2 classes of images that are 1 classes of the pool"):
        load_shots_file(tmp_path / "a.txt", pets, root)


def test_lists_never_lead_out_of_their_folder(tmp_path, root):
    Image.new("RGB", (2, 2)).save(tmp_path / "outside.png")
    for path in ("../outside.png", str(tmp_path / "outside.png")):
        (tmp_path / "list.txt").write_text(f"{path} a\n")
        with pytest.raises(FileNotFoundError, match="not below"):
            import_path_list(tmp_path / "list.txt", root)


def test_a_file_nested_too_deep_is_an_error_that_names_it(tmp_path, root):
    (tmp_path / "deep.json").write_text('{"k":1,"seed":0,"image_ids":' + "[" * 100_000)
    for read in (Shots.load, lambda file: import_path_list(file, root)):
        with pytest.raises(ValueError, match=r"deep\.json"):
            read(tmp_path / "deep.json")
