"""The command line of a recipe: a preset of a few-shot run, every value a flag."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping

import torch
import tyro

from fewshot_diti.distributed import process_state
from fewshot_diti.evaluation.run import RESULTS, FewShotRun, execute
from fewshot_diti.training import TrainingError


def main(configs: Mapping[str, Callable[[int], FewShotRun]], num_shots: int) -> None:
    """Runs a recipe: `--config` picks one of `configs` (the first by default), flags change its values.

    `--num_shots` picks the configuration of that many shots, which decides more than the number alone. Errors that a
    user can cure end the program with one line.
    """
    chooser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chooser.add_argument("--config", choices=list(configs), default=next(iter(configs)))
    chooser.add_argument("--num_shots", "--num-shots", type=int, default=num_shots)
    choice, flags = chooser.parse_known_args()
    try:
        default = configs[choice.config](choice.num_shots)
        names = ", ".join(configs)
        description = (
            f"Values below are those of --config {choice.config} (one of {names}; {next(iter(configs))} by default)."
        )
        run = tyro.cli(FewShotRun, default=default, args=flags, use_underscores=True, description=description)
        result = execute(run)
    except torch.OutOfMemoryError as error:
        raise SystemExit(
            "error: out of GPU memory, even with the smallest batches; pass --training.gradient_checkpointing or "
            f"fewer --training.shots_per_step. {str(error).split('.')[0]}"
        ) from error
    except (OSError, ValueError, TrainingError) as error:
        raise SystemExit(f"error: {error}") from error
    if process_state().is_main_process:
        print(
            f"accuracy {100 * result.accuracy:.1f} %, macro-F1 {100 * result.macro_f1:.1f} %: {result.images} images, "
            f"{result.classes} classes, {run.num_shots} shots per class; {run.output_dir / RESULTS}"
        )
