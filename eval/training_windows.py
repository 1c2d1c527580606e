"""Is a class token trained on a window of timesteps more accurate there? Accuracy by window, with equal trials.

    python -m eval.training_windows --dataset fgvc:DIR --split val --shots 16 --seed 1

Trains the class tokens once on all timesteps and once on each window, and classifies the images by trials inside the
windows alone, the same number in each. Weights: `relative`, from the errors of all images, which need no labels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from eval.val import draw
from fewshot_diti import Backbone, DiTiClassifier, ScoringConfig, TrainingConfig
from fewshot_diti.backbone_files import POCKET
from fewshot_diti.data import load_images
from fewshot_diti.folds import Fit, shared_errors
from fewshot_diti.reports import wilson_interval
from fewshot_diti.timesteps import weighted_mean
from fewshot_diti.trials import even_grid


@dataclass(frozen=True, kw_only=True)
class WindowsConfig:
    """What is compared.

    Attributes:
        dataset: as `load_images` reads it; the shots come from its split train.
        split: whose images are classified.
        bounds: of the windows, in timesteps of the schedule.
        trials: in each window.
    """

    dataset: str = "bundled"
    split: str = "test"
    backbone: str = POCKET
    shots: int = 16
    seed: int = 1
    bounds: tuple[int, ...] = (0, 300, 1000)
    trials: int = 6


def main(config: WindowsConfig) -> None:
    """Prints the table."""
    backbone = Backbone.from_pretrained(config.backbone, dtype=torch.float32)
    pool, judged = load_images(config.dataset, "train"), load_images(config.dataset, config.split)
    shots = draw(pool, judged, config.shots, config.seed)
    everything = (config.bounds[0], config.bounds[-1])
    windows = [everything, *zip(config.bounds, config.bounds[1:], strict=False)]
    labels = [shots.class_names[label] for label in shots.labels]
    table = Table("trained on t", *(f"judged on {lo} to {hi}" for lo, hi in windows))
    for trained_on in windows:
        classifier = DiTiClassifier(
            backbone,
            training=TrainingConfig(seed=config.seed, timesteps=trained_on),
            # nothing to calibrate: the errors are weighted below
            scoring=ScoringConfig(weighting="uniform", density="even", witnesses=(), seed=config.seed),
        ).fit(shots.decoded(), labels)
        assert classifier.bank_ is not None, "fit raises where no class was learned"
        truth = torch.tensor([classifier.bank_.labels.index(judged.class_names[label]) for label in judged.labels])
        cells = []
        for lo, hi in windows:
            if trained_on not in (everything, (lo, hi)):
                cells.append("")  # class tokens were not trained there
                continue
            grid = even_grid(config.trials, lo, hi)
            fit = Fit(
                encoder=classifier.encoder_,
                prompts=classifier.prompts_,
                settings=classifier.settings_,
                groups={},
            )
            errors = shared_errors(fit, classifier.bank_, judged.decoded(), grid).double()
            correct = (weighted_mean(errors, 1 / errors.mean((0, 1))).argmin(1) == truth).numpy()
            low, high = wilson_interval(int(correct.sum()), len(correct))
            cells.append(f"{100 * np.mean(correct):.1f} [{100 * low:.0f}, {100 * high:.0f}]")
            print(f"trained on {trained_on}, judged on {(lo, hi)}: {cells[-1]}", flush=True)
        table.add_row(f"{trained_on[0]} to {trained_on[1]}", *cells)
    table.title = f"{len(judged)} images, {config.shots} shots, {config.trials} trials: accuracy in %"
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(WindowsConfig))
