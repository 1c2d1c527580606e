"""Work in forks of this process, alone or as the processes of one launch; a fork has all modules already.

The parent computes in one thread (`conftest.py`), so that no pool of threads is lost in the fork.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress

import accelerate
import torch

PATIENCE = 600  # seconds

Job = Callable[[], object]


def start(job: Job, rank: int = 0, processes: int = 1, port: int = 0) -> int:
    """Does the job in a fork of this process, as one of several processes; its id.

    The fork ends with the job's integer, else with 0, and with 99 where the job raised.
    """
    if child := os.fork():
        return child
    status = 99
    try:
        torch.set_num_threads(1)
        if processes > 1:
            accelerate.PartialState._reset_state()
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            os.environ |= {name: str(value) for name, value in names.items()} | {"ACCELERATE_USE_CPU": "true"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        found = job()
        status = found if isinstance(found, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        if sys.stdout is not None:
            with suppress(OSError):
                sys.stdout.flush()
        os._exit(status)


def end(child: int) -> int:
    """Waits for a fork. Its exit status, or minus the signal that ended it."""
    for _ in range(PATIENCE * 50):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError("it hangs")


def start_together(job: Job, processes: int) -> list[int]:
    """Does the job in the processes of one launch; their ids, by rank."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = int(found.getsockname()[1])
    return [start(job, rank, processes, port) for rank in range(processes)]


def run_together(job: Job, processes: int = 2) -> None:
    """Does the job in the processes of one launch, and waits for their good end."""
    assert [end(child) for child in start_together(job, processes)] == [0] * processes
