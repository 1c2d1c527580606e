"""`check` finds wrong labels, copies, classes that look alike, and the images that should be labelled next."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_commands import save_image

from fewshot_diti import cli
from fewshot_diti.checking import check_images
from fewshot_diti.data import ImageSet

SIDE = 24


def pictures(labels: list[int], names: tuple[str, ...], seed: int = 0) -> ImageSet:
    rng = np.random.default_rng(seed)
    return ImageSet(
        images=[rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8) for _ in labels],
        labels=np.array(labels),
        class_names=names,
        names=tuple(f"{seed}-{row}" for row in range(len(labels))),
    )


def around(centres: list[int], spread: float, seed: int = 0) -> torch.Tensor:
    """Features [n, 1, D] around the corners of a simplex."""
    g = torch.Generator().manual_seed(seed)
    return (torch.eye(8)[centres] + spread * torch.randn(len(centres), 8, generator=g))[:, None]


def test_a_wrong_label_is_doubted_and_right_ones_are_not() -> None:
    labels = [0] * 6 + [1] * 6 + [2] * 6
    images, views = pictures(labels, ("a", "b", "c")), around([*labels[:5], 2, *labels[6:]], 0.05)
    found = check_images(images, lambda rows: views[list(rows)])
    assert [(x.name, x.label, x.looks_like) for x in found.doubts] == [("0-5", "a", "c")]
    assert found.accuracy == pytest.approx(17 / 18) and found.judged == 18
    assert found.doubts[0].own < 0.1 and found.doubts[0].probability >= 0.9
    assert not found.confusions and not found.copies and not found.wanted


def test_a_label_that_is_improbable_is_doubted_though_several_classes_may_be_right() -> None:
    labels = [0] * 16 + [1] * 16 + [2] * 16
    images, views = pictures(labels, ("a", "b", "c")), around(labels, 0.05)
    views[0, 0] = (torch.eye(8)[1] + torch.eye(8)[2]) / 2  # labelled a, and between b and c
    found = check_images(images, lambda rows: views[list(rows)])
    assert [x.name for x in found.doubts] == ["0-0"] and found.doubts[0].probability < 0.9


def test_the_same_pixels_are_named_within_a_class_and_between_classes() -> None:
    labels = [0, 0, 0, 1, 1, 1]
    some = pictures(labels, ("a", "b"))
    pixels = [some.images[row] for row in (0, 1, 0, 3, 4, 1)]
    images = ImageSet(images=pixels, labels=some.labels, class_names=some.class_names, names=some.names)
    found = check_images(images, lambda rows: around(labels, 0.05)[list(rows)])
    assert found.copies == (("0-2", "0-0"),) and found.copies_between == (("0-5", "0-1"),)


def test_classes_that_look_alike_are_named() -> None:
    labels = [0] * 8 + [1] * 8 + [2] * 8
    images, views = pictures(labels, ("a", "b", "c")), around([0 if c == 1 else c for c in labels], 0.2)
    found = check_images(images, lambda rows: views[list(rows)])
    assert [(x.first, x.second, x.images) for x in found.confusions] == [("a", "b", 16)]
    assert found.confusions[0].mistaken >= 4


def test_what_lies_between_two_classes_is_wanted_and_one_of_each_kind() -> None:
    labels = [0] * 4 + [1] * 4
    images, views = pictures(labels, ("a", "b")), around(labels, 0.05)
    others = pictures([0] * 5, ("",), seed=1)
    corners = torch.eye(8)
    between = (corners[0] + corners[1]) / 2
    features = torch.stack(
        [corners[0], between + 0.01 * corners[3], between + 0.011 * corners[3], between - corners[4], corners[1]]
    )
    found = check_images(images, lambda rows: views[list(rows)], unlabelled=(others, features), wanted=2)
    assert {x.name for x in found.wanted} in ({"1-1", "1-3"}, {"1-2", "1-3"})
    assert all({x.first, x.second} == {"a", "b"} and x.margin < 0.5 for x in found.wanted)


def test_files_of_the_same_pixels_are_copies() -> None:
    images, views = pictures([0, 0, 0, 1, 1, 1], ("a", "b")), around([0, 0, 0, 1, 1, 1], 0.05)
    for copy, row in ((2, 0), (5, 1)):
        images.images[copy] = images.images[row]  # type: ignore[index]
    found = check_images(images, lambda rows: views[list(rows)])
    assert found.copies == (("0-2", "0-0"),) and found.copies_between == (("0-5", "0-1"),)


def test_single_images_are_learned_and_never_judged() -> None:
    images, views = pictures([0, 0, 1], ("a", "b")), around([0, 0, 1], 0.05)
    found = check_images(images, lambda rows: views[list(rows)])
    assert found.judged == 2 and found.accuracy == 1
    found = check_images(pictures([0, 1], ("a", "b")), lambda rows: views[[2 * row for row in rows]])
    assert found.judged == 0 and found.accuracy is None


def test_the_command_names_copies_and_what_to_label_next(
    shots: Path, backbone_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(shots, data)
    command = ["check", str(data), "--backbone", str(backbone_folder), "--concept", "part", "--folds", "3"]
    status = cli.main(command)
    out = capsys.readouterr().out
    assert "of 9 images look like their own class" in out and status == ("Labels in doubt" in out)
    for copy, original in (("bolt/again.png", "bolt/0.png"), ("nut/wrong.png", "bolt/1.png")):
        Image.open(data / original).resize((64, 32), Image.Resampling.NEAREST).save(data / copy)
    for i in range(3):
        save_image(tmp_path / "more" / f"{i}.png", 900 + i)
    assert cli.main([*command, "--unlabelled", str(tmp_path / "more"), "--wanted", "2"]) == 1
    out = capsys.readouterr().out
    assert "One picture under two classes;" in out and "wrong.png" in out
    assert "Copies of one picture within a class;" in out and "again.png" in out
    assert out.count(str(tmp_path / "more")) == 2 and "margin" in out
    assert cli.main(["check", str(tmp_path / "more"), "--backbone", str(backbone_folder)]) == 2


def test_an_unlabelled_image_that_cannot_be_read_is_named_beside_the_others(
    shots: Path, backbone_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_image(tmp_path / "0.png", 900)
    (tmp_path / "1.png").write_bytes(b"no image")
    command = ["check", str(shots), "--backbone", str(backbone_folder), "--concept", "part", "--folds", "2"]
    assert cli.main([*command, "--unlabelled", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert f"{tmp_path / '0.png'}: " in out and f"not looked at: {tmp_path / '1.png'}" in out
