"""A training that was cut short goes on from its checkpoint, and ends with the same numbers."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_classifier import make, shots_of
from small_commands import train_command
from test_training import CONFIG, random_shots

from fewshot_diti import checkpoints, cli
from fewshot_diti.backbone import Backbone
from fewshot_diti.checkpoints import Checkpoint, Checkpoints, checkpoints_for
from fewshot_diti.config import ScoringConfig
from fewshot_diti.row_adamw import RowAdamW
from fewshot_diti.training import Trained, train_class_tokens

STEPS = 6


class _Killed(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves a checkpoint after each step, whatever it costs."""
    monkeypatch.setattr(checkpoints, "_SHARE", float("inf"))


@pytest.fixture
def cut_short(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets after how many calls of the optimizer the process ends; returns the list of the classes of each call."""
    whole, calls = RowAdamW.step, []

    def after(number: float) -> list[Any]:
        calls.clear()

        def step(self: RowAdamW, classes: Any, *rest: Any) -> None:
            if len(calls) >= number:
                raise _Killed
            calls.append(classes)
            whole(self, classes, *rest)

        monkeypatch.setattr(RowAdamW, "step", step)
        return calls

    return after


def train(backbone: Backbone, checkpoint: Checkpoint | None = None) -> Trained:
    shots = [random_shots(backbone, x, dtype=torch.float32) for x in ("A320", "broken", "DC-9")]
    shots[1].mean[:] = float("inf")
    config = replace(CONFIG, steps=STEPS, prior_weight=0.0, lr_schedule="cosine", samples_per_batch=3)
    return train_class_tokens(backbone, shots, config, checkpoint=checkpoint)


@pytest.mark.parametrize("killed_after", range(1, STEPS))
def test_a_training_killed_in_any_step_ends_with_the_same_rows_and_failures(
    backbone: Backbone, killed_after: int, every_step: None, cut_short: Any, tmp_path: Path
) -> None:
    whole = train(backbone)
    cut_short(killed_after)
    with pytest.raises(_Killed):
        train(backbone, Checkpoint(tmp_path, "this one"))
    again = cut_short(float("inf"))
    resumed = train(backbone, Checkpoint(tmp_path, "this one"))
    assert torch.equal(resumed.rows[[0, 2]], whole.rows[[0, 2]])
    assert resumed.failed == whole.failed == {"broken": 1}
    assert len(again) == STEPS - killed_after
    assert not list(tmp_path.iterdir()), "a training that failed is not gone on with"


def test_a_training_goes_on_with_fewer_samples_at_once_where_it_is_asked_to(
    backbone: Backbone, every_step: None, cut_short: Any, tmp_path: Path
) -> None:
    shots = [random_shots(backbone, x, dtype=torch.float32) for x in ("A320", "DC-9")]
    config = replace(CONFIG, steps=2, prior_weight=0.0, samples_per_batch=2)
    cut_short(1)
    with pytest.raises(_Killed):
        train_class_tokens(backbone, shots, config, checkpoint=Checkpoint(tmp_path, "work"))
    calls = cut_short(float("inf"))
    smaller = replace(config, samples_per_batch=1)
    train_class_tokens(backbone, shots, smaller, checkpoint=Checkpoint(tmp_path, "work"))
    assert calls == [[0], [1]]


def test_the_checkpoint_of_another_training_is_not_taken(backbone: Backbone, every_step: None, tmp_path: Path) -> None:
    train(backbone, Checkpoint(tmp_path, "other shots"))
    assert Checkpoint(tmp_path, "these shots").load() is None


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_checkpoint_is_named_and_not_used(damage: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path, "work")
    checkpoint.save(3, {"rows": torch.arange(5.0)})
    assert torch.equal(checkpoint.load()[1]["rows"], torch.arange(5.0))
    [path] = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes({"flip": bytes(content), "cut": bytes(content[:-4]), "empty": b""}[damage])
    with pytest.warns(UserWarning, match=path.name):
        assert checkpoint.load() is None


def test_work_goes_on_where_a_checkpoint_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(tmp_path, "work")
    checkpoint.save(1, {"rows": torch.ones(2)})

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "write_atomically", full)
    with pytest.warns(UserWarning, match="step 2 .*No space left"):
        checkpoint.save(2, {"rows": torch.zeros(2)})
    assert checkpoint.load()[0] == 1, "the one before is kept"


def test_checkpoints_take_a_small_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    whole = checkpoints.write_atomically
    monkeypatch.setattr(checkpoints, "write_atomically", lambda *x: (whole(*x), now.__setitem__(0, now[0] + 1)))
    checkpoint = Checkpoint(tmp_path, "work")
    assert checkpoint.due
    checkpoint.save(1, {"rows": torch.ones(1)})
    for seconds, due in ((0, False), (49, False), (50, True)):
        assert (now.append(now[0]), now.__setitem__(0, 1001.0 + seconds), checkpoint.due)[2] is due


def test_what_was_computed_is_not_computed_again(tmp_path: Path) -> None:
    calls = []

    def compute() -> dict[str, torch.Tensor]:
        calls.append(1)
        return {"weights": torch.ones(3)}

    for _ in range(2):
        assert torch.equal(Checkpoints(tmp_path).computed(compute, "network", 1)["weights"], torch.ones(3))
    Checkpoints(tmp_path).computed(compute, "network", 2)
    assert len(calls) == 2


def test_a_fit_with_folds_goes_on_in_the_fold_where_it_was_cut_short(
    backbone: Backbone, pictures: dict[str, list[Path]], every_step: None, cut_short: Any, tmp_path: Path
) -> None:
    given = shots_of(pictures, ["tu-154", "a320", "dc-9"])
    scoring = ScoringConfig(trials=4, folds=3, temperature="fit", witnesses=())
    whole, calls = _fit(backbone, scoring, given, None, cut_short)
    cut_short(0.6 * len(calls))
    with pytest.raises(_Killed):
        make(backbone, scoring=scoring).fit(*given, checkpoints=Checkpoints(tmp_path))
    resumed, again = _fit(backbone, scoring, given, Checkpoints(tmp_path), cut_short)
    assert torch.equal(resumed.bank_.rows, whole.bank_.rows)
    assert resumed.calibration_ == whole.calibration_
    assert len(again) < 0.5 * len(calls)


def _fit(backbone: Backbone, scoring: ScoringConfig, given: Any, where: Checkpoints | None, counted: Any) -> Any:
    calls = counted(float("inf"))
    return make(backbone, scoring=scoring).fit(*given, checkpoints=where), list(calls)


def test_a_train_command_that_was_killed_goes_on_and_leaves_no_checkpoints(
    quick_train: None, shots: Path, backbone_folder: Path, tmp_path: Path, every_step: None, cut_short: Any
) -> None:
    def run(name: str) -> list[str]:
        return train_command(shots, backbone_folder, tmp_path / name)

    calls = cut_short(float("inf"))
    assert cli.main(run("whole")) == 0
    steps = len(calls)
    process = multiprocessing.get_context("fork").Process(target=lambda: os._exit(cli.main(run("killed"))))
    process.start()
    folder = tmp_path / "killed" / ".checkpoints"
    while not list(folder.glob("*.safetensors")):
        assert process.is_alive() or list(folder.glob("*.safetensors")), "it ended without a checkpoint"
        time.sleep(0.01)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    calls.clear()
    assert cli.main(run("killed")) == 0
    assert len(calls) < steps
    kept = {p.name: p.read_bytes() for p in (tmp_path / "killed").iterdir()}
    assert kept == {p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()}


def test_a_second_program_is_refused_while_the_first_learns_into_the_folder(tmp_path: Path) -> None:
    def second() -> None:
        with pytest.raises(ValueError, match=f"Another program is at work in {tmp_path}"), checkpoints_for(tmp_path):
            pass

    with checkpoints_for(tmp_path):
        process = multiprocessing.get_context("fork").Process(target=second)
        process.start()
        process.join()
        assert process.exitcode == 0
    assert not list(tmp_path.iterdir())


def test_checkpoints_stay_where_work_is_cut_short(tmp_path: Path) -> None:
    with pytest.raises(_Killed), checkpoints_for(tmp_path) as found:
        found.of("work").save(1, {"rows": torch.ones(2)})
        raise _Killed
    assert Checkpoints(tmp_path / ".checkpoints").of("work").load() is not None
