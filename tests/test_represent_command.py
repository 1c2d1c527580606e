"""The command `represent` at tiny size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fewshot_diti import cli
from fewshot_diti.representation import Representation


@pytest.fixture(scope="module")
def learned(pictures: dict[str, list[Path]], backbone_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("learned")
    assert cli.main(command(pictures, backbone_folder, folder)) == 0
    return folder


def command(pictures: dict[str, list[Path]], backbone_folder: Path, folder: Path, *more: str) -> list[str]:
    images = str(next(iter(pictures.values()))[0].parent)
    settings = "--steps 2 --batch_size 2 --dims 64 --stages even --mode stop_grad --concept aircraft --dtype float32"
    return [
        *("represent", "train", images, "--output_dir", str(folder), "--backbone", str(backbone_folder)),
        *settings.split(),
        *more,
    ]


def test_what_was_trained_gives_features_of_images(
    learned: Path, pictures: dict[str, list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [str(paths[0]) for paths in pictures.values()]
    output = tmp_path / "out.npz"
    folder = str(learned / "representation")
    arguments = ["--representation", folder, "--output", str(output), "--dtype", "float32"]
    assert cli.main(["represent", "features", *images, *arguments]) == 0
    assert f"{len(images)} images, 64 dimensions" in capsys.readouterr().out
    found = np.load(output)
    assert found["paths"].tolist() == images
    loaded = Representation.from_pretrained(folder, dtype="float32")
    assert loaded.prompt == "a photo of an aircraft" and loaded.method.mode == "stop_grad"
    assert np.array_equal(found["features"], loaded.features(images))


def test_latents_are_encoded_once_and_one_image_of_twenty_is_not_trained_on(
    learned: Path, pictures: dict[str, list[Path]], backbone_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (learned / "latents.safetensors").stat().st_mtime_ns
    assert cli.main(command(pictures, backbone_folder, learned)) == 0
    total = sum(map(len, pictures.values()))
    assert f"diti on {total - -(-total // 20)} images" in capsys.readouterr().out
    assert (learned / "latents.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--method", "pca"), "pass one of ('pdae', 'diti', 'simclr', 'tcvae')"),
        (("--dims", "100"), "pass a multiple of it"),
        (("--stages", "published"), "have 512 dimensions, not 64"),
        (("--steps", "0"), "steps=0; pass a whole number of at least 1"),
        (("--lr", "1"), "was made from other data or settings"),
    ],
)
def test_wrong_settings_are_one_line_and_status_2(
    learned: Path,
    pictures: dict[str, list[Path]],
    backbone_folder: Path,
    more: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    capsys.readouterr()
    try:
        status = cli.main(command(pictures, backbone_folder, learned, *more))
    except SystemExit as error:  # as tyro refuses what a config does
        status = error.code
    assert status == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", "").split())


def test_a_single_image_and_an_output_of_another_kind_are_refused(
    pictures: dict[str, list[Path]], backbone_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = str(next(iter(pictures.values()))[0])
    one = command(pictures, backbone_folder, tmp_path)
    one[2] = image
    assert cli.main(one) == 2
    assert "1 image; pass 2 or more" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["represent", "features", image, "--representation", "R", "--output", "f.csv"])
    assert "ends in .npz" in capsys.readouterr().err
