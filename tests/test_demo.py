"""The demo, run in-process on a tiny backbone and the bundled images."""

from pathlib import Path

import numpy as np
import pytest
from fewshot_diti.recommended import ScoringConfig
from PIL import Image

from fewshot_diti import Bank, cli
from fewshot_diti.commands import demo
from fewshot_diti.training import TrainingConfig

TRAINING = TrainingConfig(steps=4, rank=2, lr_unet=0.05, lr_text_encoder=0.05, prior_weight=0.0, colour_variants=2)
SCORING = ScoringConfig(trials=3, weighting="uniform", calibration_images=3)


def test_demo_compares_three_methods_and_writes_bank_and_picture(
    backbone_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "recommended_training", lambda num_shots, small: TRAINING)
    monkeypatch.setattr(demo, "recommended_scoring", lambda small: SCORING)
    command = ["demo", "--output_dir", str(tmp_path), "--shots", "2", "--test_images", "24", "--trials", "2"]
    assert cli.main([*command, "--zero_shot_trials", "1", "--backbone", str(backbone_folder)]) == 0
    out = capsys.readouterr().out
    for text in (
        "12 classes, 2 shots each; 24 test images",
        "fewshot-diti  ",
        "zero-shot backbone",
        "nearest neighbour",
    ):
        assert text in out
    assert len(Bank.load(tmp_path / "bank")) == 12 and str(tmp_path / "bank") in out
    picture = Image.open(tmp_path / "predictions.png")
    assert min(picture.size) > 500 and str(tmp_path / "predictions.png") in out


def test_balanced_rows_are_equal_over_classes_and_liveries_and_depend_on_the_seed_alone() -> None:
    labels = np.repeat(np.arange(4), 10)
    seen = np.arange(40) % 10 < 3
    for count in (4, 8, 20, 24, 40):
        rows = demo.balanced_rows(labels, seen, count, seed=1)
        assert rows == demo.balanced_rows(labels, seen, count, seed=1)
        assert len(set(rows)) == count and set(np.bincount(labels[rows])) == {count // 4}
        if count <= 24:
            assert seen[rows].sum() == count // 2
    assert demo.balanced_rows(labels, seen, 20, seed=1) != demo.balanced_rows(labels, seen, 20, seed=2)
    with pytest.raises(ValueError, match="there are 40"):
        demo.balanced_rows(labels, seen, 41, seed=0)
