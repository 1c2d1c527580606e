"""This process among those that `accelerate launch` or `torchrun` started."""

from __future__ import annotations

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def process_state() -> PartialState:
    """Rank, number of processes and device; the same object each time.

    `PartialState()` alone takes no notice of ACCELERATE_USE_CPU: two processes on CPUs would each be the only one.
    """
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
