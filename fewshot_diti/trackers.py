"""Trackers: how training goes, in TensorBoard, Weights & Biases or trackio, by way of accelerate; only shown."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, get_args

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from PIL import Image

from fewshot_diti.bank import Bank
from fewshot_diti.classifier import DiTiClassifier
from fewshot_diti.config import Label
from fewshot_diti.data.image_set import ImageSet
from fewshot_diti.distributed import by_main, process_state
from fewshot_diti.progress import Progress
from fewshot_diti.validation import validation_losses

TrackerName = Literal["tensorboard", "wandb", "trackio"]
_PROJECT = "fewshot-diti"
_CLASSES, _IMAGES, _SEED = 8, 2, 0  # sample images: of the first classes, and of each
_GUIDANCE = 3.0  # more gives false colours on the pocket


def check_trackers(names: Sequence[TrackerName]) -> None:
    """Raises a ValueError where a tracker is not installed, or wandb is online and not logged in."""
    for name in names:
        if LoggerType(name) not in get_available_trackers():
            raise ValueError(
                f"report_to={name}, and the package {name} is not installed; run pip install {name}, or pass another "
                f"of {', '.join(get_args(TrackerName))}, or none."
            )
    if "wandb" in names:
        by_main(_check_wandb)


def _check_wandb() -> None:
    """Raises a ValueError where wandb is neither offline nor logged in; `wandb.init` would ask for a key, and wait."""
    import wandb

    why = "is not logged in"
    try:
        if wandb.setup().settings.mode in ("offline", "disabled") or wandb.login(prompt=False):
            return
    except wandb.Error as error:
        why = f"cannot log in ({error})"
    raise ValueError(f"report_to=wandb, and wandb {why}; run wandb login, or set WANDB_API_KEY or WANDB_MODE=offline.")


class Trackers:
    """Logs the loss of each class at each step, and at some steps the validation loss and sample images.

    The main process logs. Under several processes it logs the losses of the classes that it trains itself; what
    `finish` logs is of all classes. Nothing here changes a class token by a bit.

    Args:
        names: of the trackers; `check_trackers` comes first.
        folder: gets the files of TensorBoard and wandb.
        classifier: that is being fitted.
        settings: that the run is logged under.
        val: images for the validation loss, where there are any.
        every: steps between two looks at validation loss and sample images; by default `finish` alone shows them.
    """

    def __init__(
        self,
        names: Sequence[TrackerName],
        folder: Path,
        classifier: DiTiClassifier,
        settings: Mapping[str, Any],
        val: ImageSet | None = None,
        every: int | None = None,
    ) -> None:
        self.classifier, self.val, self.every = classifier, val, every
        process_state()  # which device and processes, before accelerate decides
        self.accelerator = Accelerator(log_with=list(names), project_dir=folder)
        if self.accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)  # wandb writes elsewhere where it is not there
        plain = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in settings.items()}
        self.accelerator.init_trackers(_PROJECT, plain, {"wandb": {"dir": str(folder)}})

    def on_step(self, step: int, losses: Mapping[Label, float], bank: Callable[[], Bank]) -> None:
        """As `training.OnStep`."""
        if not self.accelerator.is_main_process:
            return
        mean = sum(losses.values()) / len(losses)
        self.accelerator.log({"loss": mean, **{f"loss/{label}": loss for label, loss in losses.items()}}, step=step)
        last = self.classifier.settings_.training.steps
        finite = [label for label, loss in losses.items() if math.isfinite(loss)]
        if self.every is not None and step % self.every == 0 and step < last and finite:  # the last is `finish`'s
            trained = bank().select(finite)
            if self.val is not None:
                self._log_validation(step, validation_losses(self.classifier, self.val, trained))
            self._log_samples(step, trained)

    def finish(self, losses: Mapping[str, Sequence[float]] | None) -> None:
        """Logs the validation losses and sample images of the fitted classifier."""
        assert self.classifier.bank_ is not None, "fit comes first"
        if self.accelerator.is_main_process:
            step = self.classifier.settings_.training.steps
            if losses is not None:
                self._log_validation(step, losses)
            self._log_samples(step, self.classifier.bank_)

    def _log_validation(self, step: int, losses: Mapping[str, Sequence[float]]) -> None:
        means = {label: sum(values) / len(values) for label, values in losses.items() if values}
        if means:
            mean = sum(means.values()) / len(means)
            values = {f"validation/{label}": loss for label, loss in means.items()}
            self.accelerator.log({"validation": mean, **values}, step=step)

    def _log_samples(self, step: int, bank: Bank) -> None:
        """Images of some classes, those of one class side by side, always from the same noise."""
        labels, backbone = bank.labels[:_CLASSES], self.classifier.backbone_
        with Progress(len(labels), "sample images", "class", minor=True) as bar:
            for label in labels:
                images = bank.generate(label, backbone, _IMAGES, guidance_scale=_GUIDANCE, seed=_SEED)
                self._log_picture(step, f"samples/{label}", np.concatenate([np.asarray(x) for x in images], axis=1))
                bar.update()

    def _log_picture(self, step: int, name: str, pixels_HWC: np.ndarray) -> None:
        for tracker in self.accelerator.trackers:
            if tracker.name == "trackio":  # accelerate logs no images there
                import trackio

                tracker.log({name: trackio.Image(Image.fromarray(pixels_HWC))}, step=step)
            else:
                options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({name: pixels_HWC[None]}, step=step, **options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        for tracker in self.accelerator.trackers:  # not `end_training`: it would end the processes' group as well
            tracker.finish()
