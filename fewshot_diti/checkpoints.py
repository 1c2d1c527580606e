"""Checkpoints of work in progress: a run that was killed goes on where it was, and ends with the same numbers."""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fewshot_diti.distributed import main_alone_in, process_state
from fewshot_diti.files import LOCK, write_atomically

_FOLDER = ".checkpoints"  # in the folder that gets the result
_SHARE = 0.02  # of the time that may go into writing checkpoints
_LONGEST = 300.0  # seconds between two of them, whatever one costs
_HEX = 16


class Checkpoint:
    """The last state of one computation. Files are named by all that decides the computation, so that a checkpoint of
    other shots or settings is never taken for its own, and by a hash of their content.

    Args:
        folder: made where it is missing.
        decides: all that decides the computation, as JSON takes it.
    """

    def __init__(self, folder: Path, *decides: Any) -> None:
        text = json.dumps(decides, sort_keys=True, default=str)
        self._folder, self._stem = folder, _digest(text.encode())
        self._last, self._cost = float("-inf"), 0.0

    @property
    def due(self) -> bool:
        """Whether it is time to save: after the first step, then so that saving costs 2 % of the time, and every five
        minutes at the least."""
        return time.monotonic() - self._last >= min(self._cost / _SHARE, _LONGEST)

    def save(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Keeps the state after `step` steps; the one before goes once this one is on disk. Where the disk is full, a
        warning says so and the one before stays."""
        began = time.monotonic()
        before = self._files()
        content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        path = self._folder / f"{self._stem}-{step}-{_digest(content)}.safetensors"
        try:
            write_atomically(path, content)
            for file in before:
                if file != path:
                    file.unlink(missing_ok=True)
        except OSError as error:
            warnings.warn(f"No checkpoint of step {step} ({error}); the work goes on without.", stacklevel=2)
        self._last = time.monotonic()
        self._cost = self._last - began

    def load(self) -> tuple[int, dict[str, Tensor]] | None:
        """Step and tensors of the newest whole state, or None. A damaged file is named in a warning."""
        for path in sorted(self._files(), key=_step_of, reverse=True):
            if _digest(path.read_bytes()) == path.stem.rpartition("-")[2]:
                try:
                    with safe_open(path, "pt") as file:
                        return _step_of(path), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                except SafetensorError:
                    pass
            warnings.warn(f"The checkpoint {path} is damaged and is not used.", stacklevel=2)
        return None

    def discard(self) -> None:
        """Removes what is kept."""
        for path in self._files():
            path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        return [path for path in self._folder.glob(f"{self._stem}-*-*.safetensors") if _step_of(path) >= 0]


class Checkpoints:
    """The checkpoints of all computations of one run, in one folder.

    Args:
        folder: nothing else may be in it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def of(self, *decides: Any) -> Checkpoint:
        """The checkpoint of the computation that all this decides, as JSON takes it."""
        return Checkpoint(self.folder, *decides)

    def computed(self, compute: Callable[[], dict[str, Tensor]], *decides: Any) -> dict[str, Tensor]:
        """What `compute` gives, or gave in a run that was cut short later."""
        checkpoint = self.of(*decides)
        if (found := checkpoint.load()) is None:
            found = 1, compute()
            if found[1]:  # nothing is learned where all is done in a moment
                checkpoint.save(*found)
        return found[1]


@contextmanager
def checkpoints_for(output: Path) -> Iterator[Checkpoints]:
    """The checkpoints of what is saved to a folder inside the context: removed when that is done, kept when it is cut
    short. Of several processes of one run the main one does both.

    Raises:
        ValueError: another run is at work in the folder.
    """
    folder, main = output / _FOLDER, process_state().is_main_process
    try:
        with main_alone_in(folder, output):
            yield Checkpoints(folder)
            for path in folder.iterdir() if main else ():
                if path.name != LOCK:
                    with suppress(OSError):  # what was learned is saved; the next run removes it
                        path.unlink()
    finally:
        if main:
            with suppress(OSError):  # not empty: the checkpoints of work that was cut short, or another program's
                folder.rmdir()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:_HEX]


def _step_of(path: Path) -> int:
    """The step in a checkpoint's name, -1 where it is none."""
    step = path.stem.split("-")[1]
    return int(step) if step.isdecimal() else -1
