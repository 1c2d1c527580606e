"""Is the autoencoder the limit? How well a network tells variants apart that sees images, restored images, or latents.

    python -m eval.information --data DIR --dtype float32 --output_dir runs/information

Trains the network of `recipes/pocket/siblings.py`, with the variant labels of the pre-training images, once for each
view, and prints how well its features separate variants that it was not trained on: the four that pre-training leaves
out, and the 12 few-shot variants, on images of the val split. Class tokens cannot use detail that the latents lack.
`DIR` holds Parquet shards with columns image, variant, manufacturer, airline.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.table import Table
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import normalize
from torch import Tensor, nn

from fewshot_diti.backbone import Backbone, load_backbone
from fewshot_diti.data import ImageSet, check_disjoint, load_images, sample_shots
from fewshot_diti.data.images import ImageGeometry
from recipes.pocket.renders import as_batch, few_shot_accuracy, load_renders, split_held_out
from recipes.pocket.siblings import PIXELS, View, pocket_siblings, train_siblings


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is trained, and on which images.

    Attributes:
        data: folder of Parquet shards.
        few_shot: images of the variants to tell apart, with splits train and val, as `load_images` reads them.
        backbone: whose autoencoder it is.
        views: what the networks see.
        steps, false_copies, network: as of the recipe, fewer for a quick answer; the same for every view.
        shots, seeds: of the few-shot variants.
    """

    data: Path
    few_shot: str
    backbone: str = "pocket"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    views: tuple[Literal["images", "restored", "latents"], ...] = ("images", "latents", "restored")
    steps: int = 1_000
    false_copies: int = 1
    network: str = "cs3darknet_s"
    shots: tuple[int, ...] = (1, 4, 16)
    seeds: tuple[int, ...] = (1, 2, 3)
    output_dir: Path = Path("runs/information")


def view_of(name: str, backbone: Backbone) -> View:
    """A view by its name."""

    def latents(pixels_NCHW: Tensor) -> Tensor:
        batches = [as_batch(b, torch.device("cpu")) for b in pixels_NCHW.split(64)]
        return torch.cat([backbone.encode_images(b)[0].half() for b in batches])

    def restored(pixels_NCHW: Tensor) -> Tensor:
        pictures = [x for batch in latents(pixels_NCHW).split(64) for x in backbone.decode_latents(batch.float())]
        return torch.stack([torch.from_numpy(np.array(x)) for x in pictures]).permute(0, 3, 1, 2).contiguous()

    def enlarged(latents_Bchw: Tensor, device: torch.device) -> Tensor:
        """At the size of the images, so that the same network can read them."""
        found = F.interpolate(latents_Bchw.to(device).float(), scale_factor=backbone.vae_scale_factor, mode="nearest")
        return found.contiguous(memory_format=torch.channels_last)

    views = {
        "images": PIXELS,
        "restored": PIXELS._replace(keep=restored),
        "latents": View(channels=backbone.vae.config.latent_channels, keep=latents, batch=enlarged),
    }
    return views[name]


@torch.no_grad()
def features(network: nn.Module, view: View, pixels_NCHW: Tensor) -> np.ndarray:
    """Features [N, D] of uint8 images."""
    device = next(network.parameters()).device
    batches = [view.batch(kept, device) for kept in view.keep(pixels_NCHW).split(64)]
    found = [network.forward_head(network.forward_features(b), pre_logits=True) for b in batches]  # type: ignore[operator]
    return torch.cat(found).cpu().numpy()


def few_shot(network: nn.Module, view: View, pool: ImageSet, val: ImageSet, config: Config) -> list[float]:
    """Accuracy on the val images at each number of shots, mean over the draws."""
    geometry = ImageGeometry(size=pocket_siblings().size)

    def of(images: ImageSet) -> np.ndarray:
        pixels = torch.stack([geometry.pixels(images.image(row)) for row in range(len(images))])
        return normalize(features(network, view, ((pixels + 1) * 127.5).round().byte()))

    check_disjoint(pool, val)
    pool_ND, val_ND, found = of(pool), of(val), []
    for num_shots in config.shots:
        right = []
        for seed in config.seeds:
            rows = sample_shots(pool, num_shots, seed).rows(pool)
            model = LogisticRegression(C=10.0, max_iter=1000).fit(pool_ND[rows], pool.labels[rows])
            right.append(model.score(val_ND, val.labels))
        found.append(float(np.mean(right)))
    return found


def main(config: Config) -> None:
    """Trains what is missing and prints one table."""
    backbone = load_backbone(config.backbone, config.dtype)
    recipe = replace(
        pocket_siblings(),
        data=config.data,
        steps=config.steps,
        network=config.network,
        false_copies=config.false_copies,
        validate_every=config.steps,
        mixed_precision="no" if backbone.dtype == torch.float32 else "bf16",
    )
    pool, val = (load_images(config.few_shot, split) for split in ("train", "val"))
    _, unseen = split_held_out(load_renders(recipe.data, recipe.size), recipe.held_out)
    table = Table("the network sees", "left-out variants", *(f"{k} shots" for k in config.shots), title="accuracy in %")
    made_of = f"{backbone.hash[:8]}-{config.network}-{config.false_copies}"
    for name in config.views:
        view = view_of(name, backbone)
        network = train_siblings(replace(recipe, output_dir=config.output_dir / made_of / name), view)
        left_out = few_shot_accuracy(features(network, view, unseen.pixels_NCHW), unseen.variants)
        cells = (left_out, *few_shot(network, view, pool, val, config))
        print(name, *(f"{100 * x:.1f}" for x in cells), flush=True)
        table.add_row(name, *(f"{100 * x:.1f}" for x in cells))
    Console().print(table)


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
