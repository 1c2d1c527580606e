"""How much of the detail that separates the classes is left at the backbone's size, and after its autoencoder.

    python -m eval.detail --shots 1 4 16 --seeds 1

Logistic regression on an ImageNet network's features, fitted on the shots and on copies in other colours, classifies
the test images three times: as they are, shrunk to the backbone's size, and restored from its latents. The accuracy
lost at the last step is detail that class tokens never see.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import tyro
from PIL import Image
from rich.console import Console

from eval.val import draw
from fewshot_diti.backbone import POCKET, Backbone, load_backbone
from fewshot_diti.baselines import LogisticProbe
from fewshot_diti.baselines.base import KeptFeatures
from fewshot_diti.baselines.imagenet import PACKAGED, ImageNetwork
from fewshot_diti.baselines.views import ColourJitter
from fewshot_diti.data import ImageGeometry, load_images, seen_attribute
from fewshot_diti.evaluation.table import rich_lines
from fewshot_diti.presets import recommended


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which images, backbone and network, as `python -m eval.fewshot` takes them."""

    dataset: str = "bundled"
    backbone: str = POCKET
    network: str = PACKAGED
    shots: tuple[int, ...] = (1, 4, 16)
    seeds: tuple[int, ...] = (1,)
    column: str = "airline"
    """Attribute by which test images are like the shots of their class, or unlike."""


def versions(backbone: Backbone) -> dict[str, Callable[[Image.Image], Image.Image]]:
    """Ways to show an image to the network, by name."""
    geometry = ImageGeometry(size=backbone.image_size)
    height, width = geometry.size

    def shrunk(image: Image.Image) -> Image.Image:
        pixels = (geometry.pixels(image) + 1) * 127.5
        return Image.fromarray(pixels.round().byte().permute(1, 2, 0).numpy())

    def restored(image: Image.Image) -> Image.Image:
        return backbone.decode_latents(backbone.encode_images(geometry.pixels(image)[None])[0])[0]

    return {"as they are": lambda image: image, f"at {width} x {height} pixels": shrunk, "restored": restored}


def main(config: Config) -> None:
    """Prints one table."""
    backbone, network = load_backbone(config.backbone), ImageNetwork(config.network)
    pool, test = (load_images(config.dataset, split) for split in ("train", "test"))
    recolour = ColourJitter.of(recommended(1, backbone.kind).training)
    truth = np.array(test.label_names)
    lines = []
    for name, way in versions(backbone).items():

        def features(images: Sequence[Image.Image], way: Callable[[Image.Image], Image.Image] = way) -> np.ndarray:
            return network.features([way(image) for image in images])

        kept = KeptFeatures(features)
        for num_shots in config.shots:
            cells = []
            for seed in config.seeds:
                shots = draw(pool, test, num_shots, seed)
                probe = LogisticProbe({name: kept}, recolour=recolour, seed=seed)
                probe.fit(shots.decoded(), shots.label_names)
                right = probe.predict(test.decoded()) == truth
                seen = seen_attribute(shots, test, config.column)
                known = np.array([bool(value) for value in test.attributes[config.column]])
                cells.append([100 * right[kind].mean() for kind in (seen | ~seen, seen & known, ~seen & known)])
            lines.append([name, str(num_shots), *(f"{x:.1f}" for x in np.mean(cells, axis=0))])
    caption = (
        f"accuracy in %, mean over seeds {', '.join(map(str, config.seeds))}; "
        f"seen: {config.column} among the class's shots"
    )
    Console().print(rich_lines(["images", "shots", "all", "seen", "unseen"], lines, caption))


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except (ImportError, OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
