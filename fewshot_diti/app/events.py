"""How the tabs' handlers hang on the page: one queue for what uses the backbone, and errors as one sentence."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch

from fewshot_diti.app.banks import Banks
from fewshot_diti.app.guard import sentence
from fewshot_diti.training import TrainingError

Report = Callable[[float, str], None]  # called with the share that is done, 0 to 1, and what comes next

# events that use the backbone, one at a time and in the order in which they came
QUEUED: dict[str, Any] = {"concurrency_id": "backbone", "concurrency_limit": 1, "api_visibility": "private"}
# events that take milliseconds, whatever the queue does
QUICK: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


@dataclass(frozen=True, kw_only=True)
class Context:
    """What the tabs share.

    Attributes:
        banks: that are served.
        chosen: the component that holds the name of the bank in use.
        uploads: folder of the page's uploads.
        made: folder that gets new banks.
    """

    banks: Banks
    chosen: Any
    uploads: Path
    made: Path

    def answering(self, handler: Callable[..., Any]) -> Callable[..., Any]:
        """The handler, its errors shown to the user instead of written to the log."""
        import gradio as gr

        @functools.wraps(handler)
        def answered(*values: Any) -> Any:
            try:
                return handler(*values)
            except (ValueError, OSError, TrainingError) as error:
                raise gr.Error(escape(sentence(error, self.uploads)), title="", print_exception=False) from error
            except torch.OutOfMemoryError as error:
                text = "The GPU has no memory left; end other programs on it, and try again."
                raise gr.Error(text, title="", print_exception=False) from error

        return answered

    def upload(self, file: Any) -> Path | None:
        """The path of a file as gradio gives it; raises ValueError for anything but an upload, which a request made by
        hand may name."""
        if file is None:
            return None
        path = file.get("path") if isinstance(file, dict) else file
        # Python versions differ in their error for a NUL
        if not isinstance(path, str) or "\0" in path or not Path(path).resolve().is_relative_to(self.uploads.resolve()):
            raise ValueError("This file was not uploaded here; drop it on the page.")
        return Path(path)


def report_to(progress: Any) -> Report:
    """A `gr.Progress` as handlers report to it."""
    return lambda share, text: progress(share, desc=text)
