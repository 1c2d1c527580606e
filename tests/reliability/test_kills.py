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

OFTEN = ("train", "add", "score to JSON", "represent train", "eval", "a recipe", "pre-training")  # in CI too


def start(case: Case, folder: Path) -> int:
    """The command in a process of its own, by its number."""
    child = os.fork()
    if not child:
        status = 99
        try:
            status = case.run(folder)
        finally:
            os._exit(status)
    return child


def status_of(child: int) -> int:
    """Waits for the end of the process. Its exit status; negative where a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


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
    whole = Whole.of(case, folder, lambda: status_of(start(case, folder)))
    seconds, kills, left = time.monotonic() - began, 0, []
    while kills < (50 if thorough else 2):
        prepare(case, folder)
        child, moment = start(case, folder), draw.uniform(0, seconds)
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
        status = status_of(child)
        assert status in (0, -signal.SIGKILL)
        kills += status != 0
        again = (lambda: status_of(start(case, folder))) if status else None
        left += whole.ends_well(again, f"a kill after {moment:.2f} of {seconds:.2f} s")
    assert not left
    record_property("kills", kills)
    record_property("lost", 0)
    record_property("left over", len(left))
