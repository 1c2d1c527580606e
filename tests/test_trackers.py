"""What the trackers get of a training, read back from their files; and that they change nothing."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from processes import run_together
from small_classifier import bank_of
from small_commands import CLASSES, TRAINING, save_classes, train_command
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fewshot_diti import Bank, DiTiClassifier, cli
from fewshot_diti.data import load_folder
from fewshot_diti.trackers import Trackers
from fewshot_diti.validation import validation_losses

pytestmark = pytest.mark.usefixtures("quick_train")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shots and one validation image of each class."""
    folder = tmp_path_factory.mktemp("data")
    save_classes(folder / "train", 2)
    save_classes(folder / "val", 1, seed=50)
    return folder


def events_of(logs: Path) -> EventAccumulator:
    (file,) = logs.glob("**/fewshot-diti/events*")
    events = EventAccumulator(str(file), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    return events


def scalars(events: EventAccumulator, tag: str) -> dict[int, float]:
    return {event.step: event.value for event in events.Scalars(tag)}


def test_tensorboard_gets_losses_validation_losses_and_sample_images(
    data: Path, backbone_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, steps = tmp_path / "bank", TRAINING.steps
    command = train_command(data, backbone_folder, output, "--folds", "0", "--validation_steps", "2")
    assert cli.main([*command, "--report_to", "tensorboard"]) == 0
    assert f"in {output}_logs" in capsys.readouterr().out
    events = events_of(tmp_path / "bank_logs")
    losses = [scalars(events, f"loss/{name}") for name in CLASSES]
    assert all(list(loss) == list(range(1, steps + 1)) for loss in losses)
    assert scalars(events, "loss") == pytest.approx({s: np.mean([x[s] for x in losses]) for s in losses[0]})
    classifier = DiTiClassifier.from_pretrained(output)
    expected = validation_losses(classifier, load_folder(data, "val"))
    for name in CLASSES:
        found = scalars(events, f"validation/{name}")
        assert list(found) == [2, steps] and found[2] != found[steps]
        assert found[steps] == pytest.approx(expected[name][0])
        images = events.Images(f"samples/{name}")
        assert [image.step for image in images] == [2, steps]
        assert images[0].encoded_image_string != images[1].encoded_image_string
        assert (images[1].width, images[1].height) == (64, 16)  # two of 32 x 16 side by side


@pytest.fixture(scope="module")
def without(data: Path, backbone_folder: Path, tmp_path_factory: pytest.TempPathFactory, quick_train: None) -> Bank:
    folder = tmp_path_factory.mktemp("without") / "bank"
    assert cli.main(train_command(data, backbone_folder, folder, "--folds", "0")) == 0
    assert not folder.with_name("bank_logs").exists()
    return Bank.from_pretrained(folder)


@pytest.mark.parametrize("more", [(), ("--validation_steps", "1")], ids=["at the end", "at each step"])
def test_class_tokens_are_the_same_to_the_bit_with_a_tracker(
    data: Path, backbone_folder: Path, tmp_path: Path, without: Bank, more: tuple[str, ...]
) -> None:
    command = train_command(data, backbone_folder, tmp_path / "bank", "--folds", "0", *more)
    assert cli.main([*command, "--report_to", "tensorboard"]) == 0
    assert Bank.from_pretrained(tmp_path / "bank") == without


def quick_script(folder: Path) -> str:
    """The command line with the settings of `quick_train`, for processes of their own."""
    script = folder / "train.py"
    script.write_text(
        f"""import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import small_commands
from fewshot_diti import cli
from fewshot_diti.presets import PRESETS
PRESETS["pocket"] = small_commands.PRESET
sys.exit(cli.main(sys.argv[1:]))
"""
    )
    return str(script)


def test_two_processes_write_one_log_with_images_of_all_classes(
    data: Path, backbone_folder: Path, tmp_path: Path, without: Bank
) -> None:
    command = train_command(data, backbone_folder, tmp_path / "bank", "--folds", "0", "--report_to", "tensorboard")
    run_together(lambda: cli.main([*command, "--validation_steps", "2"]))
    assert Bank.from_pretrained(tmp_path / "bank").labels == without.labels
    events = events_of(tmp_path / "bank_logs")
    steps = {name: [image.step for image in events.Images(f"samples/{name}")] for name in CLASSES}
    assert steps == {"bolt": [2, TRAINING.steps], "gear": [2, TRAINING.steps], "nut": [TRAINING.steps]}


def test_a_class_whose_loss_is_not_finite_is_not_looked_at(fitted: DiTiClassifier, tmp_path: Path) -> None:
    losses = {"a320": 0.1, "dc-9": math.nan, "tu-154": 0.2}
    with Trackers(["tensorboard"], tmp_path, fitted, {}, every=1) as watch:
        watch.on_step(1, losses, lambda: bank_of(fitted))
        watch.on_step(2, {"a320": math.inf}, lambda: bank_of(fitted))
    assert events_of(tmp_path).Tags()["images"] == ["samples/a320", "samples/tu-154"]


def test_a_tracker_that_is_not_installed_is_one_line_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = next((name for name in ("wandb", "trackio") if importlib.util.find_spec(name) is None), None)
    if missing is None:
        pytest.skip("all trackers are installed")
    command = train_command(tmp_path / "nowhere", tmp_path / "no backbone", tmp_path / "bank")
    assert cli.main([*command, "--report_to", "tensorboard", missing]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"the package {missing} is not installed; run pip install {missing}" in error


def test_settings_of_trackers_that_do_not_go_together_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    part = ["train", "DIR", "--output_dir", "B", "--concept", "part"]
    for text, more in (
        ("report_to=none tensorboard", ["--report_to", "none", "tensorboard"]),
        ("validation_steps=5 has no effect", ["--validation_steps", "5"]),
        ("validation_steps=0", ["--validation_steps", "0", "--report_to", "tensorboard"]),
    ):
        with pytest.raises(SystemExit) as exit_:
            cli.main([*part, *more])
        assert exit_.value.code == 2 and text in capsys.readouterr().err


def test_wandb_must_be_logged_in_or_offline(
    data: Path,
    backbone_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    command = train_command(data, backbone_folder, tmp_path / "bank", "--folds", "0", "--report_to", "wandb")
    wandb.teardown()
    assert cli.main(command) == 2
    assert "wandb is not logged in; run wandb login, or set" in capsys.readouterr().err
    assert not (tmp_path / "bank").exists()
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()
    assert cli.main([*command, "--validation_steps", "2"]) == 0
    (run,) = (tmp_path / "bank_logs").glob("*/wandb/offline-run-*")
    assert len([*run.glob("files/media/images/samples/*.png")]) == 2 * len(CLASSES)


def test_trackio_gets_losses_and_images(data: Path, backbone_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    command = train_command(data, backbone_folder, tmp_path / "bank", "--folds", "0", "--report_to", "trackio")
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio")}  # read when trackio is imported
    done = subprocess.run(
        [sys.executable, quick_script(tmp_path), *command], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert len([*(tmp_path / "trackio").rglob("*.png")]) == len(CLASSES)
