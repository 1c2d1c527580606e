"""`fewshot-diti represent`: learns features of images without labels, and takes them of images."""

from __future__ import annotations

import io
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from tyro.conf import Positional, arg

from fewshot_diti.backbone import Backbone, DtypeName, load_backbone
from fewshot_diti.backbone_files import POCKET
from fewshot_diti.commands.loading import check_counts
from fewshot_diti.data import ImageSet
from fewshot_diti.data.images import ImageGeometry, ResizeRule
from fewshot_diti.data.unlabelled import list_images
from fewshot_diti.devices import TrainingDtype
from fewshot_diti.encoding import Encoder
from fewshot_diti.files import check_writable, write_atomically
from fewshot_diti.presets import PRESETS
from fewshot_diti.progress import Progress, counted
from fewshot_diti.prompts import generic_prompt
from fewshot_diti.reports import printable
from fewshot_diti.representation import (
    DitiConfig,
    Latents,
    Representation,
    RepresentationTraining,
    SimclrConfig,
    TcvaeConfig,
    train,
)
from fewshot_diti.representation.latents import kept_latents
from fewshot_diti.representation.methods import METHODS, MethodConfig
from fewshot_diti.representation.pdae import Mode
from fewshot_diti.representation.simclr import MADE, encode_views
from fewshot_diti.representation.subsets import PUBLISHED_DIMS, Stages
from fewshot_diti.representation.training import FOLDER, choose_sizes

LATENTS = "latents.safetensors"  # in output_dir
_UNSEEN = 20  # one image of so many is not trained on


@dataclass(frozen=True, kw_only=True)
class RepresentTrainConfig:
    """Learns a representation of images, without labels. One image of 20 is left out, for the log.

    Attributes:
        images: as `score` takes them.
        output_dir: gets the checkpoint, the log, and the folder representation. Started again, the run goes on.
        method: pdae; diti, which ties dimensions to timesteps; simclr, which compares versions of an image; or tcvae,
            a variational autoencoder.
        concept: what all images show, such as bird; by default the backbone's, if it has one.
        dims: width of the feature; by default 512, and 64 of tcvae.
        stages: of diti, how many dimensions the timesteps get: snr as published, by the signal-to-noise ratio;
            published by the timesteps themselves; loss in proportion to the backbone's weighted error; even.
        mode: of diti: base, or stop_grad, in which a timestep teaches the encoder its own dimensions alone.
        beta: of tcvae, the weight of the total correlation.
        steps: of training.
        batch_size: images per step; by default 32, and 256 of simclr and tcvae.
        lr: learning rate.
        resize: how images get the backbone's size.
        backbone: pocket, folder or hub id.
        dtype: of the U-Net; auto is bfloat16 where the hardware has it, else float32.
        quiet: prints nothing but errors and warnings.

    Raises:
        ValueError: a value is out of its range.
    """

    images: Annotated[Positional[tuple[str, ...]], arg(metavar="IMAGE_OR_DIR...")]
    output_dir: Path
    method: str = "diti"
    concept: str | None = None
    dims: int | None = None
    stages: Stages = "snr"
    mode: Mode = "base"
    beta: float = 6.0
    steps: int = 3_000
    batch_size: int | None = None
    lr: float = 5e-4
    resize: ResizeRule = "crop"
    backbone: str = POCKET
    dtype: TrainingDtype = "auto"
    seed: int = 0
    quiet: bool = False

    def __post_init__(self) -> None:
        check_counts(self, "dims", "steps", "batch_size")
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r}; pass one of {tuple(METHODS)}.")
        TcvaeConfig(beta=self.beta)


@dataclass(frozen=True, kw_only=True)
class RepresentFeaturesConfig:
    """Takes features of images into one file, which numpy.load opens: features, float32 [images, dims], and paths.

    Attributes:
        images: as `score` takes them.
        representation: folder that `represent train` wrote, or user/repo on the Hugging Face hub.
        output: the file, which ends in .npz.
        backbone: folder or hub id of the backbone, where it has moved since.
        dtype: as of `represent train`.
        quiet: prints nothing but errors and warnings.

    Raises:
        ValueError: the file has another ending.
    """

    images: Annotated[Positional[tuple[str, ...]], arg(metavar="IMAGE_OR_DIR...")]
    representation: str
    output: Path = Path("features.npz")
    backbone: str | None = None
    dtype: DtypeName = "auto"
    quiet: bool = False

    def __post_init__(self) -> None:
        if self.output.suffix != ".npz":
            raise ValueError(f"output={str(self.output)!r}; pass a file that ends in .npz.")


def represent_train(config: RepresentTrainConfig, console: Console) -> None:
    """Trains, and prints where the representation lies.

    Raises:
        OSError, ValueError: images or the backbone cannot be loaded, or the folder holds another run.
    """
    images, _ = list_images(config.images)
    check_writable(config.output_dir)
    backbone = load_backbone(config.backbone, config.dtype)
    concept = config.concept or PRESETS[backbone.kind].concept
    prompt = generic_prompt(concept) if concept else ""
    geometry = ImageGeometry(size=backbone.image_size, resize=config.resize)
    encoder, views = Encoder(backbone, geometry, prompt), config.method == SimclrConfig.name
    seen, unseen = encode_once(images, encoder, config.output_dir / LATENTS, views=views)
    training = RepresentationTraining(
        output_dir=config.output_dir,
        prompt=prompt,
        steps=config.steps,
        batch_size=config.batch_size or METHODS[config.method].batch_size,
        lr=config.lr,
        seed=config.seed,
        mixed_precision="no" if backbone.dtype == torch.float32 else "bf16",
    )
    train(backbone, _method(config, backbone, seen, prompt), seen, unseen, training, geometry)
    console.out(f"{config.output_dir / FOLDER}: {config.method} on {counted(len(seen), 'image')}")


def represent_features(config: RepresentFeaturesConfig, console: Console) -> int:
    """Writes the file, and prints its size; returns the exit status: 1 where some images could not be read.

    Raises:
        OSError, ValueError: the representation or its backbone cannot be loaded, or no image can be read.
    """
    images, _ = list_images(config.images)
    representation = Representation.from_pretrained(config.representation, config.backbone, dtype=config.dtype)
    features: dict[str, np.ndarray] = {}
    failed = []
    with Progress(len(images), "features", "image") as bar:
        for row, name in enumerate(images.names):
            try:
                features[name] = representation.features(images.decode(row))[0]
            except (ValueError, OSError) as error:
                failed.append(str(error))
            bar.update()
    if not features:
        raise ValueError(f"None of {counted(len(images), 'image')} can be read: {failed[0]}")
    for reason in failed:
        console.out(printable(reason))
    found, buffer = np.stack([*features.values()]), io.BytesIO()
    np.savez(buffer, features=found, paths=np.array([*features]))
    write_atomically(config.output, buffer.getvalue())
    console.out(f"{config.output}: {counted(len(found), 'image')}, {found.shape[1]} dimensions; {len(failed)} failed")
    return 1 if failed else 0


def encode_once(images: ImageSet, encoder: Encoder, cache: Path, *, views: bool = False) -> tuple[Latents, Latents]:
    """Latents of the images that are trained on, and of every 20th image, which is not; kept in a file.

    Args:
        views: whether versions of each image are encoded too.

    Raises:
        OSError, ValueError: an image cannot be read, or there is only one.
    """
    if len(images) < 2:
        raise ValueError(f"{counted(len(images), 'image')}; pass 2 or more, as one of 20 is not trained on.")
    made_from = {
        "backbone": encoder.backbone.hash,
        "geometry": json.dumps(encoder.geometry.to_dict()),
        "images": " ".join(images.ids),
        **({"views": MADE} if views else {}),
    }

    def encode() -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = defaultdict(list)
        with Progress(len(images), "latents", "image") as bar:
            for row in range(len(images)):
                pixels = encoder.prepare(images.decode(row)).values_CHW
                mean, std = encoder.backbone.encode_images(pixels[None])
                found["mean"].append(mean[0])
                found["std"].append(std[0])
                if views:
                    found["views"].append(encode_views(encoder.backbone, pixels, images.ids[row]))
                bar.update()
        return {name: torch.stack(parts) for name, parts in found.items()}

    latents = kept_latents(cache, made_from, encode)
    unseen = torch.arange(len(images)) % _UNSEEN == 0
    return latents.rows(~unseen), latents.rows(unseen)


def _method(config: RepresentTrainConfig, backbone: Backbone, seen: Latents, prompt: str) -> MethodConfig:
    if config.method == DitiConfig.name:
        sizes = choose_sizes(config.stages, config.dims or sum(PUBLISHED_DIMS), backbone, seen, prompt)
        return DitiConfig(sizes=sizes, mode=config.mode)
    given: dict[str, Any] = {} if config.dims is None else {"dims": config.dims}
    if config.method == TcvaeConfig.name:
        given["beta"] = config.beta
    return METHODS[config.method](**given)
