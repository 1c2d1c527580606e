"""How good the features of a Stable Diffusion's U-Net are, on images of the val split.

    python -m eval.pilots --backbones pocket runs/pocket-sd-third/pipeline --dataset fgvc:DIR

What runs of pre-training are chosen by, in minutes; how good class tokens are on it, in minutes for each draw, says

    python -m eval.witness_weights --dataset fgvc:DIR --output FILE --backbone FOLDER --witnesses features --shots 2 16
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from eval.val import draw, judged
from fewshot_diti.backbone import Backbone, load_backbone
from fewshot_diti.data import ImageGeometry, ImageSet, load_images
from fewshot_diti.data.arguments import group_shots
from fewshot_diti.encoding import Encoder
from fewshot_diti.presets import recommended
from fewshot_diti.prompts import Prompts
from fewshot_diti.witnesses import FittedWitness, UnetWitness, read_groups


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is compared.

    Attributes:
        backbones: names or folders.
        dataset: as `load_images` reads it; the shots come from its split train, the images from val.
        shots, seeds: of the draws; the figures are means over seeds.
    """

    backbones: tuple[str, ...]
    dataset: str
    concept: str = "aircraft"
    shots: tuple[int, ...] = (1, 2, 4, 8, 16)
    seeds: tuple[int, ...] = (1, 2, 3)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"


class Reader:
    """A backbone on the val images, which are read once."""

    def __init__(self, backbone: Backbone, concept: str, val: ImageSet) -> None:
        generic = Prompts.complete(None, None, concept).generic
        self.encoder = Encoder(backbone, ImageGeometry(size=backbone.image_size), generic)
        self.witness = UnetWitness()
        images = [self.encoder.prepare(image) for image in val.decoded()]
        self.read = self.witness.read(self.encoder, images, self.encoder.latents(images))

    def log_probabilities(self, shots: ImageSet, seed: int) -> Tensor:
        """Of the val images [N, C] by the features."""
        kind, num_shots = self.encoder.backbone.kind, int(np.bincount(shots.labels).max())
        training = replace(recommended(num_shots, kind).training, seed=seed)
        groups = group_shots(shots.decoded(), shots.label_names, self.encoder.prepare)
        read = read_groups(self.witness, self.encoder, groups, training)
        return FittedWitness.fit("features", self.witness, read, training).judge.log_probabilities(self.read)


def main(config: Config) -> None:
    """Prints one table."""
    pool, val = (load_images(config.dataset, split) for split in ("train", "val"))
    truth = torch.from_numpy(np.unique(val.label_names, return_inverse=True)[1])  # labels are sorted in a witness
    table = Table("backbone", *(f"{k} shots" for k in config.shots))
    table.title = f"Accuracy in % (nats at the best temperature) on {len(val)} images, mean of seeds {config.seeds}"
    for name in config.backbones:
        reader, cells = Reader(load_backbone(name, config.dtype), config.concept, val), []
        for k in config.shots:
            found = []
            for seed in config.seeds:
                verdict = judged(-reader.log_probabilities(draw(pool, val, k, seed), seed), truth)
                found.append((100 * verdict.accuracy, verdict.nats))
            cells.append("{:.1f} ({:.2f})".format(*np.mean(found, axis=0)))
        table.add_row(name, *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
