"""Denoising errors of a draw, kept on disk: what takes hours is computed once, and weighted in many ways."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fewshot_diti.distributed import process_state
from fewshot_diti.kept_tensors import keep_tensors


@dataclass(frozen=True, kw_only=True, eq=False)
class DitiErrors:
    """Errors of one bank: all that any weighting needs. Classes in the order of the task.

    Attributes:
        timesteps: [S].
        test: [N, C, S].
        held_out, held_out_labels: [n, C, S] and [n], of shots under class tokens trained without them, by fold; with
            one shot per class, of all shots under class tokens trained with them, which only weights may use.
        out_of_fold: whether the shots were held out.
        training_seconds: of the bank, with what was scored and trained for `held_out`.
        scoring_seconds: of the test images.
    """

    timesteps: Tensor
    test: Tensor
    held_out: Tensor
    held_out_labels: Tensor
    out_of_fold: bool
    training_seconds: float
    scoring_seconds: float


def save_errors(path: Path, tensors: dict[str, Tensor], made_by: dict[str, str]) -> None:
    """Written by the main process, seen by all."""
    if process_state().is_main_process:
        keep_tensors(path, tensors, made_by)
    process_state().wait_for_everyone()
