"""The command `fewshot-diti`: demo, check, train, add, score, explain, eval, represent, export, import, info, app."""

from __future__ import annotations

import difflib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from typing import Annotated, NoReturn, get_args

import torch
import tyro
from rich.console import Console
from transformers.utils.logging import disable_progress_bar
from tyro.conf import subcommand

from fewshot_diti.commands.add import AddConfig, add
from fewshot_diti.commands.app import AppConfig, app
from fewshot_diti.commands.check import CheckConfig, check
from fewshot_diti.commands.demo import DemoConfig, run_demo
from fewshot_diti.commands.evaluate import EvalConfig, evaluate
from fewshot_diti.commands.explain import ExplainConfig, explain
from fewshot_diti.commands.export import ExportConfig, export
from fewshot_diti.commands.import_lora import ImportConfig, import_
from fewshot_diti.commands.info import InfoConfig, info
from fewshot_diti.commands.represent import (
    RepresentFeaturesConfig,
    RepresentTrainConfig,
    represent_features,
    represent_train,
)
from fewshot_diti.commands.score import score
from fewshot_diti.commands.score_config import ScoreConfig
from fewshot_diti.commands.train import TrainConfig, train
from fewshot_diti.distributed import process_state
from fewshot_diti.progress import silent
from fewshot_diti.reports import printable_lines
from fewshot_diti.training import TrainingError

Represent = (
    Annotated[RepresentTrainConfig, subcommand("train")] | Annotated[RepresentFeaturesConfig, subcommand("features")]
)
Command = (
    Annotated[DemoConfig, subcommand("demo")]
    | Annotated[CheckConfig, subcommand("check")]
    | Annotated[TrainConfig, subcommand("train")]
    | Annotated[AddConfig, subcommand("add")]
    | Annotated[ScoreConfig, subcommand("score")]
    | Annotated[ExplainConfig, subcommand("explain")]
    | Annotated[EvalConfig, subcommand("eval")]
    | Annotated[Represent, subcommand("represent", description="Features of images, learned without labels.")]
    | Annotated[ExportConfig, subcommand("export")]
    | Annotated[ImportConfig, subcommand("import")]
    | Annotated[InfoConfig, subcommand("info")]
    | Annotated[AppConfig, subcommand("app")]
)


class _NobodyReads(BrokenPipeError):
    """The output goes into a pipe that was closed."""


class _Console(Console):
    """Rich's own ends with status 1 where a pipe was closed, which says that images are broken."""

    def on_broken_pipe(self) -> NoReturn:
        raise _NobodyReads


class _Terminated(KeyboardInterrupt):
    """SIGTERM: the command ends as it does where the user interrupts it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 0, 1 (some images could not be scored), 2 (the user's error),
    130 (interrupted), 141 (nobody reads the output any more, as behind `| head`) or 143 (terminated).

    Args:
        arguments: by default those of the process.
    """
    try:
        if wrong := _unknown_command(sys.argv[1:] if arguments is None else arguments):
            return _tell(wrong)
        status = _main(arguments)
    except SystemExit:  # of the parser, which has printed its help or what is wrong
        if not_written := _flush():
            return not_written
        raise
    except OSError as error:  # of the parser's printing
        status = 0 if isinstance(error, BrokenPipeError) else _tell(error)
    not_written = _flush()
    return status or not_written


def _unknown_command(arguments: Sequence[str]) -> str:
    """What is wrong with the name of the command; "" where nothing is."""
    if not arguments or arguments[0].startswith("-"):
        return ""
    known = [x.name for kind in get_args(Command) for x in kind.__metadata__]
    if arguments[0] in known:
        return ""
    meant = difflib.get_close_matches(arguments[0], known, 1)
    hint = f"did you mean {meant[0]}?" if meant else f"there are {', '.join(known)}."
    return f"There is no command {arguments[0]!r}; {hint}"


def _flush() -> int:
    """Writes out what was printed; the exit status where that cannot be done, else 0."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        _drop_output()
        return 141 if isinstance(error, BrokenPipeError) else _tell(error)
    return 0


def _drop_output() -> None:
    """From here on what is printed goes nowhere: the interpreter flushes once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _tell(error: Exception | str) -> int:
    """Prints the error; the exit status."""
    print("error:", printable_lines(str(error)), file=sys.stderr)
    return 2


def _main(arguments: Sequence[str] | None) -> int:
    command = tyro.cli(
        Command,  # type: ignore[arg-type]
        prog="fewshot-diti",
        description="Few-shot fine-grained classification by a Stable Diffusion's timesteps.",
        args=arguments,
        use_underscores=True,
    )
    for stream in (sys.stdout, sys.stderr):  # class names may have characters that the console's encoding lacks
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    # a warning is for the user of the command, who has no use for the line of code that gave it
    warnings.formatwarning = lambda message, *_, **__: f"warning: {printable_lines(str(message))}\n"
    disable_progress_bar()  # of reading weights from disk, which takes a second; downloads and training keep theirs
    try:
        with _terminable(), silent(command.quiet):
            quiet = command.quiet or not process_state().is_main_process
            console = _Console(quiet=quiet, markup=False, emoji=False, highlight=False)
            return _run(command, console) or 0
    except _Terminated:
        print("terminated", file=sys.stderr)
        return 143
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except torch.OutOfMemoryError as error:
        print(
            "error: out of GPU memory; train and score take a lower --batch_size.",
            str(error).split(".")[0],
            file=sys.stderr,
        )
        return 2
    except _NobodyReads:
        _drop_output()
        return 141
    except BrokenPipeError as error:
        return _flush() or _tell(error)
    except (ValueError, OSError, TrainingError) as error:
        return _tell(error)
    except torch._dynamo.exc.TorchDynamoException as error:
        print(
            "error: torch could not compile the U-Net; install a C++ compiler, or leave --compile out.",
            str(error).strip().split("\n")[0],
            file=sys.stderr,
        )
        return 2


def _run(command: Command, console: Console) -> int | None:
    """The exit status, None for 0."""
    match command:
        case DemoConfig():
            run_demo(command, console)
        case CheckConfig():
            return check(command, console)
        case TrainConfig():
            train(command, console)
        case AddConfig():
            add(command, console)
        case ScoreConfig():
            return score(command, console)
        case ExplainConfig():
            return explain(command, console)
        case EvalConfig():
            return evaluate(command, console)
        case RepresentTrainConfig():
            represent_train(command, console)
        case RepresentFeaturesConfig():
            return represent_features(command, console)
        case ExportConfig():
            export(command, console)
        case ImportConfig():
            import_(command, console)
        case InfoConfig():
            info(command, console)
        case AppConfig():
            app(command, console)
    return None


@contextmanager
def _terminable() -> Iterator[None]:
    """Inside the context SIGTERM is an exception; Python takes signals in the main thread alone."""

    def terminate(*_: object) -> NoReturn:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
