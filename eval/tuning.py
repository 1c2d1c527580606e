"""How a network is best fine-tuned on the shots: steps, frozen layers, size of network and images, on the val split.

    python -m eval.tuning --dataset fgvc:DIR --shots 4 16 --frozen 0 0.3

What the witness "network" was chosen by. "Nats" is the mean negative logarithm of the probability of the true class at
the best temperature, which is the last figure. Three ways to use the network: on the image as it is, and by the mean of
its log-probabilities over the image and copies, in other colours or as they are trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from time import perf_counter

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor

from eval.val import draw, judged
from fewshot_diti.baselines.imagenet import PACKAGED, FineTuned, ImageNetwork, size_for
from fewshot_diti.baselines.presets import preset_of
from fewshot_diti.baselines.views import ColourJitter, random_view
from fewshot_diti.data import load_images
from fewshot_diti.data.images import open_image
from fewshot_diti.presets import recommended


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is compared: every combination.

    Attributes:
        dataset: as `load_images` reads it; the shots come from its split train, the images from val.
        networks: as `ImageNetwork` takes them.
        size: (height, width) of the backbone; the network reads images of the same aspect.
        scales: height and width of the network's images, as a share of those that features are read at.
        steps, lrs, frozen: of `TuningSettings`.
        copies: of a test image.
    """

    dataset: str
    networks: tuple[str, ...] = (PACKAGED,)
    size: tuple[int, int] = (64, 128)
    scales: tuple[float, ...] = (0.5,)
    steps: tuple[int, ...] = (200,)
    lrs: tuple[float, ...] = (3e-4,)
    frozen: tuple[float, ...] = (0.0, 0.3)
    shots: tuple[int, ...] = (1, 4, 16)
    seeds: tuple[int, ...] = (1,)
    copies: int = 4


def main(config: Config) -> None:
    """Prints a line for each training."""
    pool, val = (load_images(config.dataset, split) for split in ("train", "val"))
    images, truth = [open_image(x) for x in val.decoded()], torch.from_numpy(val.labels)
    for name in config.networks:
        network = ImageNetwork(name)
        tuning = preset_of(network.module).tuning
        for k, seed, scale, steps, lr, frozen in product(
            config.shots, config.seeds, config.scales, config.steps, config.lrs, config.frozen
        ):
            shots = draw(pool, val, k, seed)
            settings = replace(tuning, steps=steps, lr=lr, frozen=frozen)
            recolour = ColourJitter.of(recommended(k).training)
            tuned = FineTuned(network.at(size_for(config.size, scale)), settings, recolour=recolour, seed=seed)
            start = perf_counter()
            tuned.fit(shots.decoded(), shots.labels.tolist())
            seconds = perf_counter() - start
            own = log_probabilities(tuned, images)
            torch.manual_seed(seed)
            print(
                f"{name} at scale {scale}, {steps} steps, lr {lr}, {frozen} frozen, {k} shots, seed {seed}, "
                f"{seconds:.0f} s: as it is {said(own, truth)}",
                end="",
            )
            for way, change in (("in other colours", recolour), ("views", partial(random_view, recolour=recolour))):
                more = [log_probabilities(tuned, [change(x) for x in images]) for _ in range(config.copies)]
                print(f"; {way} {said((own + sum(more)) / (1 + config.copies), truth)}", end="")
            print(flush=True)


def log_probabilities(tuned: FineTuned, images: Sequence[Image.Image]) -> Tensor:
    """Of images [N, C]."""
    return torch.from_numpy(np.log(tuned.predict_proba(images)))


def said(logits_NC: Tensor, truth_N: Tensor) -> str:
    """Accuracy, nats and temperature."""
    accuracy, nats, temperature = judged(-logits_NC, truth_N)
    return f"{100 * accuracy:.1f} % ({nats:.2f} nats, {temperature:.2f})"


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
