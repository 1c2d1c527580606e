"""What the recipes of representation learning share: the pocket's pre-training images as latents, and the run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import tyro
from torch import Tensor

from fewshot_diti.backbone import Backbone
from fewshot_diti.backbone_files import POCKET
from fewshot_diti.hashes import hash_weights
from fewshot_diti.representation import Latents, Representation, RepresentationTraining, train
from fewshot_diti.representation.latents import kept_latents
from fewshot_diti.representation.methods import MethodConfig
from fewshot_diti.representation.simclr import MADE, encode_views
from recipes.pocket.captions import GENERIC_CAPTION
from recipes.pocket.renders import HELD_OUT, Renders, as_batch, load_renders, split_held_out


@dataclass(frozen=True, kw_only=True)
class PocketImages:
    """The pocket's pre-training images.

    Attributes:
        data: folder of Parquet shards (see `load_renders`).
        held_out: JSON list of variants that are never trained on.
        latents: folder that keeps the latents of the images for the next run.
    """

    data: Path = Path("pocket-train")
    held_out: Path = HELD_OUT
    latents: Path = Path("runs/representation")

    def load(self, size: tuple[int, int]) -> tuple[Renders, Renders]:
        """Images that are trained on, and images of the variants that are not, of (height, width); errors as
        `load_renders` and `split_held_out`."""
        return split_held_out(load_renders(self.data, size), self.held_out)

    def load_held_out(self, size: tuple[int, int]) -> Renders:
        """The second of what `load` gives, without reading the first."""
        return load_renders(self.data, size, json.loads(self.held_out.read_text()))

    def encode(self, backbone: Backbone, renders: Renders, name: str, *, views: bool = False) -> Latents:
        """Latents of some of the images, with views of each or without, encoded once and kept under that name."""
        made_from = {"autoencoder": hash_weights(backbone.vae), "images": renders.fingerprint}
        if views:
            name, made_from["views"] = f"{name}-views", MADE

        def encode() -> dict[str, Tensor]:
            found = [backbone.encode_images(as_batch(p, backbone.device)) for p in renders.pixels_NCHW.split(64)]
            mean, std = (torch.cat(x) for x in zip(*found, strict=True))
            if not views:
                return {"mean": mean, "std": std}
            images = (as_batch(pixels[None], torch.device("cpu"))[0] for pixels in renders.pixels_NCHW)
            copies = [encode_views(backbone, image, f"render {row}") for row, image in enumerate(images)]
            return {"mean": mean, "std": std, "views": torch.stack(copies)}

        return kept_latents(self.latents / f"latents-{name}.safetensors", made_from, encode)


@dataclass(frozen=True, kw_only=True)
class PocketTraining(RepresentationTraining, PocketImages):
    """Settings of a run on the pocket's pre-training images.

    Attributes:
        backbone: "pocket", or the folder of a Stable Diffusion that was trained on these images.
        views: whether the method compares versions of each image.
    """

    backbone: str = POCKET
    views: bool = False
    prompt: str = GENERIC_CAPTION


Config = TypeVar("Config", bound=PocketTraining)


def run(config: Config, method_of: Callable[[Config, Backbone, Latents], MethodConfig]) -> Representation:
    """Trains the method that `method_of` makes of the settings, the backbone and the training images."""
    dtype = "float32" if config.mixed_precision == "no" else "bfloat16"
    backbone = Backbone.from_pretrained(config.backbone, dtype=dtype)
    images = zip(config.load(backbone.image_size), ("train", "held-out"), strict=True)
    seen, unseen = (config.encode(backbone, renders, name, views=config.views) for renders, name in images)
    return train(backbone, method_of(config, backbone, seen), seen, unseen, config)


def main(default: Config, method_of: Callable[[Config, Backbone, Latents], MethodConfig]) -> None:
    """Runs with the flags of the command line; a user's error in one line."""
    try:
        config: Any = tyro.cli(type(default), default=default)
        run(config, method_of)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
