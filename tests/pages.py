"""Blocks of code in Markdown pages: which are run, which are not and why, the options of the commands in them, and
the tiny settings that they are run on."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, replace
from functools import cache
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import pytest
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

from fewshot_diti.baselines import presets as baseline_presets
from fewshot_diti.baselines.imagenet import TuningSettings
from fewshot_diti.presets import PRESETS

ROOT = Path(__file__).parents[1]
RUN = ("python", "sh", "bash")  # languages of blocks that are run
LAUNCHERS = {"accelerate": launch_command_parser, "torchrun": get_args_parser}
_BLOCK = re.compile(r"^(?:<!-- not run: ([^\n]+) -->\n+)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def train_in_seconds(patch: pytest.MonkeyPatch) -> None:
    """Training on the pocket takes seconds, and class tokens know little."""
    pocket = replace(PRESETS["pocket"], steps=(2,) * 5)
    pocket = replace(pocket, training={**pocket.training, "rank": 2}, scoring={**pocket.scoring, "trials": 4})
    small = replace(baseline_presets.PRESETS["small"], tuning=TuningSettings(steps=2, least_epochs=1))
    patch.setitem(PRESETS, "pocket", pocket)
    patch.setitem(baseline_presets.PRESETS, "small", small)


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        page: its path from the root of the checkout.
        line: of its first line of code, from 1.
        reason: why it is not run; empty where it is.
    """

    page: str
    line: int
    language: str
    code: str
    reason: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """The blocks of a page in languages that are run. `<!-- not run: REASON -->` above a block excuses it."""
    text, name = page.read_text(encoding="utf-8"), page.relative_to(ROOT).as_posix()
    found = ((m, text[: m.start(3)].count("\n") + 1) for m in _BLOCK.finditer(text))
    return [Block(name, line, m[2], m[3], m[1] or "") for m, line in found if m[2] in RUN]


def commands(code: str) -> Iterator[list[str]]:
    """The words of each command of a shell block, without what sets the environment."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"\w+=.*", words[0]):
            words.pop(0)
        if words:
            yield [words[0].removeprefix(".venv/bin/"), *words[1:]]


def unknown_options(words: Sequence[str]) -> list[str]:
    """Options of a command of ours that its `--help` does not name, and of `accelerate launch` in front of it."""
    if words[:2] == ["accelerate", "launch"] or words[0] == "torchrun":
        start = next(i for i, word in enumerate(words) if word == "-m" or word.endswith(".py"))
        known = " ".join(LAUNCHERS[words[0]]()._option_string_actions)  # its help leaves out what argv does not ask for
        return _not_in(words[:start], known) + unknown_options(["python", *words[start:]])
    if words[0] == "fewshot-diti":
        words = ["python", "-m", "fewshot_diti", *words[1:]]
    if words[0] != "python" or words[1] == "-c":
        return []
    program, *rest = words[2:] if words[1] == "-m" else words[1:]
    command = next((word for word in rest[:1] if not word.startswith("-")), "")
    return _not_in(rest, help_of(program, command))


def _not_in(words: Sequence[str], text: str) -> list[str]:
    known = text.replace("_", "-")  # the parsers take either
    return [w for w in words if w.startswith("--") and not re.search(rf"{w.replace('_', '-')}\b", known)]


@cache
def help_of(program: str, command: str) -> str:
    """What a module or a script prints for `--help`."""
    text, arguments = StringIO(), [program, *([command] if command else []), "--help"]
    with patch.object(sys, "argv", arguments), redirect_stdout(text), suppress(SystemExit):
        if program.endswith(".py"):
            runpy.run_path(str(ROOT / program), run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    return text.getvalue()
