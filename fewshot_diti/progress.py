"""How far long work is: a bar on a terminal, elsewhere a line once a minute and one at the end."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from fewshot_diti.distributed import process_state

_SECONDS = 60.0  # between two lines
_DISABLE = "TQDM_DISABLE"

# called with what is done, units that are done, and units in all, where their number is known
Listener = Callable[[str, int, int], None]
_LISTENER: ContextVar[Listener | None] = ContextVar("listener", default=None)


class Progress:
    """Progress of `total` units of work, shown by the main process on the standard error output.

    TQDM_DISABLE=1 in the environment silences it. Inside `reported_to` a function is called as well.

    Args:
        total: units of work; 0 shows nothing, None stands for an unknown number.
        desc: what is done, such as "class tokens".
        unit: such as "step".
        minor: work that is seldom long: what takes less than a minute leaves no trace.
        initial: units that an earlier run has done.
    """

    def __init__(self, total: int | None, desc: str, unit: str, *, minor: bool = False, initial: int = 0) -> None:
        self.total, self.desc, self.unit, self.done, self.initial = total, desc, unit, initial, initial
        shown = total != 0 and process_state().is_main_process and not _disabled()
        terminal = sys.stderr is not None and sys.stderr.isatty()
        bar = {"total": total, "initial": initial, "desc": desc, "unit": unit, "leave": not minor}
        self._bar = tqdm(**bar) if shown and terminal else None
        self._lines = shown and not terminal and sys.stderr is not None
        self._minor = minor
        self._began = self._said = time.monotonic()
        self._listener = _LISTENER.get()

    def update(self, count: int = 1, **figures: Any) -> None:
        """Counts units that are done; `figures`, such as a loss, stand beside them."""
        self.done += count
        if self._listener is not None and self.total is not None:
            self._listener(self.desc, self.done, self.total)
        if self._bar is not None:
            if figures:
                self._bar.set_postfix(figures, refresh=False)
            self._bar.update(count)
        elif self._lines and time.monotonic() - self._said > _SECONDS:
            self._said = time.monotonic()
            if self.total is None:
                self._say(f"{counted(self.done, self.unit)} so far")
                return
            each = (self._said - self._began) / (self.done - self.initial)
            left = round(each * (self.total - self.done) / 60)
            when = f"about {counted(left, 'minute')}" if left else "less than a minute"
            self._say(f"{self.done} of {counted(self.total, self.unit)}, {when} left")

    def close(self) -> None:
        """Ends it; without a terminal the last line says how long it took."""
        if self._bar is not None:
            self._bar.close()
        elif self._lines and not (self._minor and self._said == self._began):
            self._say(f"{counted(self.done - self.initial, self.unit)} in {time.monotonic() - self._began:.0f} s")

    def _say(self, text: str) -> None:
        print(f"{self.desc}: {text}", file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.close()


def counted(number: int, unit: str) -> str:
    """A number with its unit, as in "1 image", "2 images" and "2 classes"."""
    plural = f"{unit}es" if unit.endswith("s") else f"{unit}s"
    return f"{number} {unit if number == 1 else plural}"


def say(text: str) -> None:
    """Prints a line, by the main process, where progress is not silenced."""
    if process_state().is_main_process and not _disabled():
        print(text, flush=True)


@contextmanager
def reported_to(listener: Listener) -> Iterator[None]:
    """Progress that begins inside the context, in this thread, is reported to the listener too."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


@contextmanager
def silent(on: bool = True) -> Iterator[None]:
    """No progress is shown inside the context, where it is `on`."""
    before = os.environ.get(_DISABLE)
    if on:
        os.environ[_DISABLE] = "1"  # that of tqdm: downloads show none either
    try:
        yield
    finally:
        if on and before is None:
            del os.environ[_DISABLE]
        elif on and before is not None:
            os.environ[_DISABLE] = before


def _disabled() -> bool:
    return os.environ.get(_DISABLE, "").lower() not in ("", "0", "false")
