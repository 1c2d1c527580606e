"""Pre-training images and the captions that go with them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Image, load_dataset
from PIL import Image as PILImage
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import normalize
from torch import Tensor
from torchvision.transforms import v2

from fewshot_diti.loop import LoopConfig

HELD_OUT = Path(__file__).with_name("held_out_variants.json")  # never trained on
KINDS = Path(__file__).with_name("aircraft_kinds.json")
_NO_LIVERY = {"default"}


@dataclass(frozen=True, kw_only=True)
class Renders:
    """Images with the three words a caption may use.

    Attributes:
        pixels_NCHW: uint8 RGB, [images, 3, height, width].
        variants, manufacturers, airlines: one string per image; "" where the image wears no airline's livery.
    """

    pixels_NCHW: Tensor
    variants: tuple[str, ...]
    manufacturers: tuple[str, ...]
    airlines: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.variants)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all pixels and words, 16 hex characters."""
        digest = hashlib.sha256(self.pixels_NCHW.numpy().data)
        digest.update(repr((self.variants, self.manufacturers, self.airlines)).encode())
        return digest.hexdigest()[:16]

    def subset(self, rows: Sequence[int]) -> Renders:
        """The images at the given positions, in that order."""
        return Renders(
            pixels_NCHW=self.pixels_NCHW[list(rows)],
            variants=tuple(self.variants[i] for i in rows),
            manufacturers=tuple(self.manufacturers[i] for i in rows),
            airlines=tuple(self.airlines[i] for i in rows),
        )


@dataclass(frozen=True, kw_only=True)
class FalseColourConfig(LoopConfig):
    """Settings of a run on renders, as they are and with shuffled colours: shape without livery.

    Attributes:
        data: folder of Parquet shards (see `load_renders`).
        held_out: JSON list of variants that are never trained on.
        false_colours: share of samples with shuffled colours.
        false_copies: versions of each image in shuffled colours, to draw these samples from.

    Raises:
        ValueError: no false copies.
    """

    data: Path
    held_out: Path
    false_colours: float = 0.5
    false_copies: int = 3

    def __post_init__(self) -> None:
        if self.false_copies < 1:
            raise ValueError(f"false_copies={self.false_copies}; pass at least 1 (--false_colours 0 draws none).")


def airline_name(raw: str) -> str:
    """An airline's name as captions write it; "" for a registration number or no livery.

    FlightGear names some liveries by registration ("N815PA", "200-d-icwd") or with the model in front
    ("2000-Loganair"): neither would be in a caption on the web.
    """
    name = raw.split("-", 1)[1] if raw.startswith(("200-", "2000-")) else raw
    registration = (
        raw.startswith("200-")
        or sum(c.isdigit() for c in name) > 1
        or re.fullmatch(r"[A-Z0-9]{1,2}-[A-Z0-9]{3,4}", name) is not None
    )
    return "" if registration or name.lower() in _NO_LIVERY else name.replace("-", " ").strip()


def load_renders(folder: Path, size: tuple[int, int], variants: Collection[str] | None = None) -> Renders:
    """Reads all Parquet shards of `folder` (image, variant, manufacturer, airline), resized to (height, width).

    Args:
        variants: whose images are read; by default all.

    Raises:
        FileNotFoundError: the folder holds no Parquet file.
    """
    shards = sorted(str(p) for p in Path(folder).glob("*.parquet"))
    if not shards:
        raise FileNotFoundError(f"No .parquet file in {folder}; pass --data with the folder of pre-training images.")
    table = load_dataset("parquet", data_files=shards, split="train").cast_column("image", Image())
    if variants is not None:
        table = table.select([row for row, variant in enumerate(table["variant"]) if variant in variants])
    height, width = size
    pixels = np.stack(
        [np.asarray(i.convert("RGB").resize((width, height), PILImage.Resampling.BICUBIC)) for i in table["image"]]
    )
    return Renders(
        pixels_NCHW=torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(),
        variants=tuple(table["variant"]),
        manufacturers=tuple(table["manufacturer"]),
        airlines=tuple(airline_name(a) for a in table["airline"]),
    )


def split_held_out(renders: Renders, held_out_file: Path) -> tuple[Renders, Renders]:
    """(pre-training images, images of the variants that pre-training never sees).

    Raises:
        ValueError: the JSON list names a variant that the images do not have.
    """
    held_out = json.loads(Path(held_out_file).read_text())
    unknown = sorted(set(held_out) - set(renders.variants))
    if unknown:
        raise ValueError(f"{held_out_file} names {unknown}, which are not among {sorted(set(renders.variants))}.")
    inside = [i for i, v in enumerate(renders.variants) if v not in held_out]
    outside = [i for i, v in enumerate(renders.variants) if v in held_out]
    return renders.subset(inside), renders.subset(outside)


def as_batch(pixels_NCHW: Tensor, device: torch.device) -> Tensor:
    """uint8 images as float32 in [-1, 1], channels last."""
    return (pixels_NCHW.to(device).float() / 127.5 - 1).to(memory_format=torch.channels_last)


def shuffle_colours(pixels_CHW: Tensor, seed: int) -> Tensor:
    """A uint8 image with its channels permuted (never the identity) and its hue turned, by `seed` alone."""
    g = torch.Generator().manual_seed(seed)
    orders = ((0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
    order = orders[int(torch.randint(len(orders), (), generator=g))]
    hue = float(torch.rand((), generator=g)) * 0.3 - 0.15
    return v2.functional.adjust_hue(pixels_CHW[list(order)], hue)


def false_colour_copies(renders: Renders, copies: int) -> list[Tensor]:
    """`copies` versions of all images in shuffled colours, uint8 [images, 3, height, width] each."""
    return [false_colour_copy(renders, number) for number in range(copies)]


def false_colour_copy(renders: Renders, number: int) -> Tensor:
    """One of `false_colour_copies`."""
    start = number * len(renders)
    return torch.stack([shuffle_colours(p, start + i) for i, p in enumerate(renders.pixels_NCHW)])


def random_crops(images_BCHW: Tensor, zoom: float, shift: float, g: torch.Generator) -> Tensor:
    """Each image enlarged by 1 to 1 + zoom and moved by up to `shift` of its sides; borders are repeated."""
    n = len(images_BCHW)
    scale = 1 / (1 + zoom * torch.rand(n, generator=g))
    move = shift * (4 * torch.rand(n, 2, generator=g) - 2)
    zooms = torch.diag_embed(torch.stack([scale, scale], 1))
    theta = torch.cat([zooms, move[:, :, None]], 2).to(images_BCHW)
    grid = F.affine_grid(theta, list(images_BCHW.shape), align_corners=False)
    return F.grid_sample(images_BCHW, grid, padding_mode="border", align_corners=False)


def few_shot_accuracy(features_ND: np.ndarray, variants: tuple[str, ...]) -> float:
    """Accuracy of logistic regression on 16 images per variant (half of them where there are fewer), on the rest."""
    rng, labels = np.random.default_rng(0), np.array(variants)
    of_variant = [rng.permutation(np.flatnonzero(labels == v)) for v in sorted(set(variants))]
    shots = np.concatenate([rows[: min(16, len(rows) // 2)] for rows in of_variant])
    rest = np.setdiff1d(np.arange(len(labels)), shots)
    features = normalize(features_ND)
    model = LogisticRegression(C=10.0, max_iter=1000).fit(features[shots], labels[shots])
    return float(model.score(features[rest], labels[rest]))
