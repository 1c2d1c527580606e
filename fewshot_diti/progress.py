"""How far long work is: a bar on a terminal, elsewhere a line once a minute and one at the end."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from fewshot_diti.distributed import process_state

_SECONDS = 60.0  # between two lines
_DISABLE = "TQDM_DISABLE"


class Progress:
    """Progress of `total` units of work, shown by the main process on the standard error output.

    TQDM_DISABLE=1 in the environment silences it.

    Args:
        total: units of work; 0 shows nothing.
        desc: what is done, such as "class tokens".
        unit: such as "step".
    """

    def __init__(self, total: int, desc: str, unit: str) -> None:
        self.total, self.desc, self.unit, self.done = total, desc, unit, 0
        shown = total > 0 and process_state().is_main_process and not _disabled()
        terminal = sys.stderr is not None and sys.stderr.isatty()
        self._bar = tqdm(total=total, desc=desc, unit=unit) if shown and terminal else None
        self._lines = shown and not terminal and sys.stderr is not None
        self._began = self._said = time.monotonic()

    def update(self, count: int = 1, **figures: Any) -> None:
        """Counts units that are done; `figures`, such as a loss, stand beside them."""
        self.done += count
        if self._bar is not None:
            if figures:
                self._bar.set_postfix(figures, refresh=False)
            self._bar.update(count)
        elif self._lines and time.monotonic() - self._said > _SECONDS:
            self._said = time.monotonic()
            left = round((self._said - self._began) * (self.total - self.done) / self.done / 60)
            when = f"about {counted(left, 'minute')}" if left else "less than a minute"
            self._say(f"{self.done} of {counted(self.total, self.unit)}, {when} left")

    def close(self) -> None:
        """Ends it; without a terminal the last line says how long it took."""
        if self._bar is not None:
            self._bar.close()
        elif self._lines:
            self._say(f"{counted(self.done, self.unit)} in {time.monotonic() - self._began:.0f} s")

    def _say(self, text: str) -> None:
        print(f"{self.desc}: {text}", file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.close()


def counted(number: int, unit: str) -> str:
    """A number with its unit, as in "1 image" and "2 images"."""
    return f"{number} {unit}" if number == 1 else f"{number} {unit}s"


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
