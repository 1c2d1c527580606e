"""The command `fewshot-diti`: demo, train, score, eval."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from io import TextIOWrapper
from typing import Annotated

import torch
import tyro
from rich.console import Console
from transformers.utils.logging import disable_progress_bar
from tyro.conf import subcommand

from fewshot_diti.commands.demo import DemoConfig, run_demo
from fewshot_diti.commands.evaluate import EvalConfig, evaluate
from fewshot_diti.commands.score import ScoreConfig, score
from fewshot_diti.commands.train import TrainConfig, train
from fewshot_diti.distributed import process_state
from fewshot_diti.reports import printable_lines
from fewshot_diti.training import TrainingError

Command = (
    Annotated[DemoConfig, subcommand("demo")]
    | Annotated[TrainConfig, subcommand("train")]
    | Annotated[ScoreConfig, subcommand("score")]
    | Annotated[EvalConfig, subcommand("eval")]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 0, 1 (some images could not be scored), 2 (the user's error) or
    130 (interrupted).

    Args:
        arguments: by default those of the process.
    """
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
        console = Console(quiet=not process_state().is_main_process, markup=False, emoji=False, highlight=False)
        if isinstance(command, DemoConfig):
            run_demo(command, console)
            return 0
        if isinstance(command, TrainConfig):
            train(command, console)
            return 0
        if isinstance(command, EvalConfig):
            return evaluate(command, console)
        return score(command, console)
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
    except (ValueError, OSError, TrainingError) as error:
        print("error:", printable_lines(str(error)), file=sys.stderr)
        return 2
    except torch._dynamo.exc.TorchDynamoException as error:
        print(
            "error: torch could not compile the U-Net; install a C++ compiler, or leave --compile out.",
            str(error).strip().split("\n")[0],
            file=sys.stderr,
        )
        return 2
