"""The demo, run in-process on a tiny backbone and the bundled images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_commands import PRESET

from fewshot_diti import Bank, DiTiClassifier, cli
from fewshot_diti.commands import demo
from fewshot_diti.presets import PRESETS


@pytest.fixture
def command(backbone_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setitem(PRESETS, "pocket", PRESET)
    return [
        *("demo", "--output_dir", str(tmp_path / "out"), "--shots", "2", "--test_images", "24", "--trials", "2"),
        *("--backbone", str(backbone_folder)),
    ]


def test_demo_compares_two_methods_writes_bank_and_picture_and_goes_on_where_it_was_cut_short(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(command) == 0
    out, folder = capsys.readouterr().out, tmp_path / "out"
    for text in ("12 classes, 2 shots each; 24 test images", "fewshot-diti  ", "nearest neighbour"):
        assert text in out
    assert "zero-shot" not in out
    assert len(Bank.from_pretrained(folder / "bank")) == 12 and str(folder / "bank") in out
    picture = Image.open(folder / "predictions.png")
    assert min(picture.size) > 500 and str(folder / "predictions.png") in out
    (part,) = (folder / "predictions").iterdir()
    lines = part.read_text().splitlines(keepends=True)
    assert len({json.loads(line)["image_id"] for line in lines}) == 24

    part.write_text("".join(lines[:20]))
    monkeypatch.setattr(DiTiClassifier, "fit", lambda *_: pytest.fail("trained again"))
    assert cli.main(command) == 0
    assert part.read_text().splitlines(keepends=True)[:20] == lines[:20]
    assert sorted(part.read_text().splitlines()) == sorted(line.strip() for line in lines)
    accuracy = [
        next(line for line in x.splitlines() if "fewshot-diti  " in line) for x in (out, capsys.readouterr().out)
    ]
    assert accuracy[0].split("]")[0] == accuracy[1].split("]")[0]


def test_a_demo_with_other_settings_does_not_take_the_folder_of_the_first(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text('{"seed": 7}')
    assert cli.main(command) == 2
    assert "holds another run" in capsys.readouterr().err


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
