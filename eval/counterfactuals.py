"""What do the dimensions of each stage of timesteps hold? Images made with some features of another image.

    python -m eval.counterfactuals runs/representation-diti/representation runs/representation-pdae/representation

For each representation a picture: a row for each pair of bundled test images a and b, with a and b themselves, and
images made by DDIM from the features of a, from those of a with the dimensions of one stage taken from b, and from the
features of b. All images of a row start from the same noise, or with `--start inferred` from the noise that the
inversion of a ends in. Features of methods without stages are exchanged at the same places.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from fewshot_diti import plots
from fewshot_diti.data import load_images
from fewshot_diti.data.images import as_picture
from fewshot_diti.encoding import Encoder
from fewshot_diti.files import write_atomically
from fewshot_diti.progress import Progress
from fewshot_diti.representation import Representation
from fewshot_diti.representation.sampling import exchanged, invert, sample
from fewshot_diti.representation.subsets import PUBLISHED_DIMS, ends_of_equal_snr


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is drawn.

    Attributes:
        representations: folders.
        output_dir: gets a picture for each.
        pairs: of images, drawn at random.
        steps: of DDIM.
        start: the noise that images start from: the same at random for a row, or inferred from a.
    """

    representations: Annotated[tuple[Path, ...], tyro.conf.Positional]
    output_dir: Path = Path("results/representation")
    pairs: int = 4
    steps: int = 25
    start: Literal["random", "inferred"] = "random"
    seed: int = 0


def stage_bands(representation: Representation) -> dict[str, slice]:
    """The dimensions of the published stages, by the timesteps that they belong to.

    The ends of the stages are those at which the backbone's schedule has the published signal-to-noise ratios. For a
    method without stages the places are those of the published sizes.

    Raises:
        ValueError: it has another number of dimensions than these.
    """
    if representation.method.subsets(representation.backbone) is not None:
        return representation.stages()
    dims = np.cumsum([0, *PUBLISHED_DIMS]).tolist()
    if representation.method.dims != dims[-1]:
        raise ValueError(
            f"{representation.method.name} with {representation.method.dims} dimensions; pass one with {dims[-1]}."
        )
    ends = (0, *ends_of_equal_snr(representation.backbone.alphas_cumprod))
    return {f"t {t} to {u - 1}": slice(i, j) for (t, u), (i, j) in zip(pairwise(ends), pairwise(dims), strict=True)}


def counterfactuals(
    representation: Representation, latents_a: Tensor, latents_b: Tensor, config: Config
) -> dict[str, list[Image.Image]]:
    """Pictures made for each pair of latents [pairs, c, h, w], by what their features are."""
    z_a, z_b = representation.encode(latents_a), representation.encode(latents_b)
    if config.start == "random":
        start = torch.randn(latents_a.shape, generator=torch.Generator().manual_seed(config.seed))
    else:
        start = invert(representation, latents_a, z_a, config.steps)
    features = {"made from a": z_a}
    features |= {f"{name} of b": exchanged(z_a, z_b, band) for name, band in stage_bands(representation).items()}
    features["made from b"] = z_b
    made = {}
    with Progress(len(features), "pictures", "column") as bar:
        for name, z in features.items():
            latents = sample(representation, start, z, config.steps)
            made[name] = representation.backbone.decode_latents(latents)
            bar.update()
    return made


def plot(columns: Mapping[str, Sequence[Image.Image]], title: str) -> bytes:
    """PNG: a column of pictures for each name."""
    rows = len(next(iter(columns.values())))
    width, height = next(iter(columns.values()))[0].size
    figure = Figure(figsize=(1.6 * len(columns), 1.6 * rows * height / width + 0.6), dpi=130, layout="constrained")
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for column, (name, pictures) in enumerate(columns.items()):
        axes[0, column].set_title(name, fontsize=8)
        for row, picture in enumerate(pictures):
            axes[row, column].imshow(picture)
            axes[row, column].set_axis_off()
    figure.suptitle(title, fontsize=9)
    return plots.png(figure)


def main(config: Config) -> None:
    """Writes the pictures.

    Raises:
        OSError, ValueError: a representation cannot be loaded.
    """
    images = load_images("bundled", "test")
    rows = np.random.default_rng(config.seed).choice(len(images), 2 * config.pairs, replace=False)
    for folder in config.representations:
        representation = Representation.from_pretrained(folder)
        encoder = Encoder(representation.backbone, representation.geometry, representation.prompt)
        prepared = [encoder.prepare(images.decode(int(row))) for row in rows]
        latents = encoder.latents(prepared)
        pictures = [as_picture(x.pixels_CHW) for x in prepared]
        columns = {"a": pictures[: config.pairs], "b": pictures[config.pairs :]}
        latents_a, latents_b = latents.chunk(2)
        columns |= counterfactuals(representation, latents_a, latents_b, config)
        name = folder.parent.name.removeprefix("representation-")
        path = config.output_dir / f"exchanged-{name}-{config.start}.png"
        write_atomically(path, plot(columns, f"{name}, {representation.history['Training']}"))
        print(f"wrote {path}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
