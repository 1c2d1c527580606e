"""Commands that are killed at random moments: what was good stays good, and what is started again ends as if nothing
had been."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from cases import CASES, Case, Whole, fast, made, prepare  # noqa: F401, fixtures
from processes import end, start, start_together

OFTEN = ("train", "add", "score to JSON", "represent train", "eval", "a recipe", "pre-training")  # in CI too


@pytest.mark.parametrize("name", CASES)
def test_a_killed_command_loses_nothing_and_ends_well_when_started_again(
    name: str,
    made: dict[str, Case],  # noqa: F811
    tmp_path: Path,
    thorough: bool,
    record_property: Any,
) -> None:
    if name not in OFTEN and not thorough:
        pytest.skip("killed with --thorough alone")
    case, folder, draw = made[name], tmp_path / "work", random.Random(name)
    began = time.monotonic()
    whole = Whole.of(case, folder, lambda: end(start(lambda: case.run(folder))))
    seconds, kills, left = time.monotonic() - began, 0, []
    while kills < (50 if thorough else 2):
        prepare(case, folder)
        child, moment = start(lambda: case.run(folder)), draw.uniform(0, seconds)
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
        status = end(child)
        assert status in (0, -signal.SIGKILL)
        kills += status != 0
        again = (lambda: end(start(lambda: case.run(folder)))) if status else None
        left += whole.ends_well(again, f"a kill after {moment:.2f} of {seconds:.2f} s")
    assert not left
    record_property("kills", kills)
    record_property("lost", 0)
    record_property("left over", len(left))


def test_two_killed_processes_go_on_together_where_they_were(
    made: dict[str, Case],  # noqa: F811
    tmp_path: Path,
    thorough: bool,
    record_property: Any,
) -> None:
    case, folder, draw = made["train"], tmp_path / "work", random.Random(2)

    def launch() -> list[int]:
        return start_together(lambda: case.run(folder), 2)

    def status_of(children: list[int]) -> int:
        return next((status for status in list(map(end, children)) if status), 0)

    began = time.monotonic()
    whole = Whole.of(case, folder, lambda: status_of(launch()))
    seconds, kills, left = time.monotonic() - began, 0, []
    while kills < (50 if thorough else 1):
        prepare(case, folder)
        children, moment = launch(), draw.uniform(0, seconds)
        time.sleep(moment)
        for child in children:
            os.kill(child, signal.SIGKILL)
        killed = status_of(children) != 0
        kills += killed
        again = (lambda: status_of(launch())) if killed else None
        left += whole.ends_well(again, f"a kill of both after {moment:.2f} of {seconds:.2f} s")
    assert not left
    record_property("launches killed", kills)
    record_property("lost", 0)
    record_property("left over", len(left))
