"""Progress of long work: a bar on a terminal, lines elsewhere, and silence where it is asked for."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_classifier import make, shots_of

from fewshot_diti import Backbone, progress
from fewshot_diti.progress import Progress


class Clock:
    """Seconds that a test sets."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def _shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=found.monotonic))
    return found


def test_without_a_terminal_a_line_comes_once_a_minute_and_one_at_the_end(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress(10, "class tokens", "step") as bar:
        for second in (30, 61, 90, 122):
            clock.now = second
            bar.update(2)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "class tokens: 4 of 10 steps, about 2 minutes left",
        "class tokens: 8 of 10 steps, about 1 minute left",
        "class tokens: 8 steps in 122 s",
    ]


def test_work_of_unknown_length_says_what_is_done(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(None, "scoring", "image") as bar:
        for second in (30, 61, 90):
            clock.now = second
            bar.update(2)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["scoring: 4 images so far", "scoring: 6 images in 90 s"]


def test_minor_work_is_shown_where_it_is_long_after_all(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    for seconds in ((10, 50), (10, 61)):
        clock.now = 0.0
        with Progress(2, "reading", "class", minor=True) as bar:
            for second in seconds:
                clock.now = second
                bar.update()
    assert capsys.readouterr().err.splitlines() == [
        "reading: 2 of 2 classes, less than a minute left",
        "reading: 2 classes in 61 s",
    ]


def test_training_and_scoring_tell_how_far_they_are(
    backbone: Backbone, pictures: dict[str, list[Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    classifier = make(backbone).fit(*shots_of(pictures, ["a320", "dc-9"]))
    assert "class tokens: 3 steps in " in capsys.readouterr().err
    classifier.predict(pictures["747"])
    captured = capsys.readouterr()
    assert "scoring: 4 images in " in captured.err and not captured.out


@pytest.mark.parametrize("terminal", [False, True])
def test_tqdm_disable_silences(
    backbone: Backbone,
    pictures: dict[str, list[Path]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    terminal: bool,
) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    make(backbone).fit(*shots_of(pictures, ["a320", "dc-9"])).predict(pictures["747"])
    captured = capsys.readouterr()
    assert not captured.err and not captured.out


def test_a_terminal_gets_a_bar_with_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with Progress(2, "class tokens", "step") as bar:
        bar.update(loss="0.5")
        bar.update()
    assert "class tokens: 100%" in screen.getvalue() and "loss=0.5" in screen.getvalue()
    assert " steps in " not in screen.getvalue()


def test_no_work_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(0, "images", "image"):
        pass
    assert not capsys.readouterr().err
