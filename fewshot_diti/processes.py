"""This process among those that `accelerate launch` or `torchrun` started."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

_TIMEOUT = timedelta(days=7)  # processes meet after their whole shares, which may end hours apart


def process_state() -> PartialState:
    """Rank, number of processes and device; the same object each time.

    `PartialState()` alone takes no notice of ACCELERATE_USE_CPU, nor of `torchrun` on a machine without a GPU: two
    processes on CPUs would each be the only one.
    """
    launched_on_cpus = "LOCAL_RANK" in os.environ and not torch.accelerator.is_available()
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or launched_on_cpus, timeout=_TIMEOUT)
