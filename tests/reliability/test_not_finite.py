"""NaN and Inf, and weights that are missing: the error names the file, the class or the image; all else is kept."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hostile_images import float_tiff
from safetensors.torch import load_file, save_file
from small_commands import save_classes, train_command

from fewshot_diti import Backbone, Bank, cli
from fewshot_diti.baselines.clip import OpenClip
from fewshot_diti.baselines.imagenet import ImageNetwork
from fewshot_diti.data.images import decode
from fewshot_diti.files import shipped

Record = Callable[[str, object], None]
BAD = (float("nan"), float("inf"), float("-inf"))


def weights_file(folder: Path) -> Path:
    (path,) = folder.glob("*.safetensors")
    return path


def spoilt(folder: Path, number: int, value: float | None) -> str:
    """One weight of a folder's file gets the value, or is left out; its name."""
    weights = load_file(path := weights_file(folder))
    names = sorted(x for x in weights if weights[x].is_floating_point() and "position_ids" not in x)
    name = names[number % len(names)]
    if value is None:
        del weights[name]
    else:
        weights[name].flatten()[-1] = value
    save_file(weights, path, metadata={"format": "pt"})
    return name


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_backbone_with_a_weight_that_is_not_finite_or_not_there_is_refused(
    backbone_folder: Path, tmp_path: Path, part: str, thorough: bool, record_property: Record
) -> None:
    count = 40 if thorough else 2
    for number in range(count):
        for value in (*BAD, None) if thorough else (BAD[number % 3], None):
            shutil.rmtree(tmp_path / "copy", ignore_errors=True)
            shutil.copytree(backbone_folder, tmp_path / "copy")
            name = spoilt(tmp_path / "copy" / part, number * 7, value)
            with pytest.raises((ValueError, OSError), match=part) as raised:
                Backbone.from_pretrained(tmp_path / "copy", device="cpu")
            assert name in str(raised.value), (name, raised.value)
    record_property("weights spoilt", count * (4 if thorough else 2))
    record_property("backbones loaded all the same", 0)


@pytest.mark.parametrize("value", [float("nan"), None])
def test_a_clip_and_a_network_with_such_a_weight_are_refused(tmp_path: Path, value: float | None) -> None:
    for name, read in (("pocket-clip", OpenClip), ("pocket-siblings", ImageNetwork)):
        shutil.copytree(shipped(name), tmp_path / name)
        spoilt(tmp_path / name, 3, value)
        with pytest.raises(ValueError, match=name):
            read(f"local-dir:{tmp_path / name}")


def test_a_bank_with_one_class_token_that_is_not_finite_names_the_class_and_the_folder(
    bank: Path, tmp_path: Path, thorough: bool, record_property: Record
) -> None:
    whole = Bank.from_pretrained(bank)
    tried = 0
    for c, label in enumerate(whole.labels):
        for value in BAD:
            for place in range(0, whole.rows.shape[1], 997 if thorough else 50_000):
                rows = whole.rows.clone()
                rows[c, place] = value
                Bank(**{name: getattr(whole, name) for name in vars(whole)} | {"rows": rows}).save_pretrained(tmp_path)
                with pytest.raises(ValueError, match=rf"\['{label}'\] are not finite") as raised:
                    Bank.from_pretrained(tmp_path)
                assert str(tmp_path) in str(raised.value)
                tried += 1
    record_property("values spoilt", tried)
    record_property("banks loaded all the same", 0)


@pytest.mark.parametrize("value", [0.5, *BAD])
def test_a_float_image_is_refused_by_name(tmp_path: Path, value: float) -> None:
    (tmp_path / "x.tif").write_bytes(float_tiff(value))
    with pytest.raises(ValueError, match=r"x\.tif.*no fixed range"):
        decode(tmp_path / "x.tif")


def test_a_shot_whose_latents_are_not_finite_names_its_class_and_the_others_are_kept(
    quick_train: None,
    backbone_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shots = save_classes(tmp_path / "shots", 2)
    encode, count = Backbone.encode_images, []

    def third_is_not_finite(self: Backbone, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, std = encode(self, images)
        count.append(len(images))
        return (mean * torch.nan if len(count) == 3 else mean), std

    monkeypatch.setattr(Backbone, "encode_images", third_is_not_finite)
    assert cli.main([*train_command(shots, backbone_folder, tmp_path / "bank"), "--folds", "0"]) != 0
    said = capsys.readouterr().err
    assert "gear" in said and "Traceback" not in said
    assert not (tmp_path / "bank" / "manifest.json").exists()
