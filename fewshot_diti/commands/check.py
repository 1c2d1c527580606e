"""`fewshot-diti check`: what may be wrong with a folder of labelled images, before training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from rich.console import Console
from torch import Tensor
from tyro.conf import Positional, arg

from fewshot_diti.backbone import POCKET, DtypeName, load_backbone
from fewshot_diti.checking import SURE, TIMES, Findings, check_images
from fewshot_diti.data import ImageGeometry, ImageSet, ResizeRule, load_images
from fewshot_diti.data.sources import training_splits
from fewshot_diti.data.unlabelled import list_images
from fewshot_diti.encoding import Encoder
from fewshot_diti.presets import PRESETS, complete
from fewshot_diti.progress import Progress, counted
from fewshot_diti.prompts import Prompts
from fewshot_diti.reports import printable

_SHOWN = 20  # lines of each kind


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """Looks for wrong labels, copies, and classes that look alike in your images, by the features of the frozen
    backbone: nothing is trained.

    Attributes:
        data: the images, as `train` takes them.
        unlabelled: folder of images without labels, of which those are named that would help most if they had one.
        wanted: how many of these to name.
        concept: what all classes are, in the singular; for the pocket "aircraft" where it is not given.
        backbone: "pocket" (aircraft only), a Stable Diffusion 1.x or 2.x in diffusers' layout, or a hub id.
        folds: in which images are held out.
        resize: how images come to the backbone's size.
        banner_rows: pixel rows cut from the bottom of each image (20 in FGVC-Aircraft's official images).
        split: which of the data's splits is looked at; by default train, where there is one.
        dtype: of U-Net and text encoder; auto is bfloat16 where the hardware has it, else float32.
        quiet: prints nothing but errors and warnings.

    Raises:
        ValueError: a value is out of its range.
    """

    data: Annotated[Positional[str], arg(metavar="DIR")]
    unlabelled: Path | None = None
    wanted: int = 10
    concept: str | None = None
    backbone: str = POCKET
    folds: int = 5
    resize: ResizeRule = "crop"
    banner_rows: int = 0
    split: str | None = None
    dtype: DtypeName = "auto"
    quiet: bool = False

    def __post_init__(self) -> None:
        if self.folds < 2:
            raise ValueError(f"folds={self.folds}; pass 2 or more.")
        if self.wanted < 1:
            raise ValueError(f"wanted={self.wanted}; pass a whole number of at least 1.")
        if self.concept is not None and not self.concept.strip():
            raise ValueError('concept is empty; pass what all classes are, such as "machine part", or leave it out.')


def check(config: CheckConfig, console: Console) -> int:
    """Prints what was found; returns 1 where a label is in doubt, one picture has two labels, or an unlabelled image
    cannot be read.

    Raises:
        OSError, ValueError: images or backbone cannot be loaded, or there are fewer than two classes.
    """
    images = load_images(config.data, config.split or training_splits(config.data)[0]).without_empty_classes()
    if len(images.class_names) < 2:
        raise ValueError(f"{config.data} holds the classes {list(images.class_names)}; two or more can be compared.")
    more = None if config.unlabelled is None else list_images([str(config.unlabelled)])[0]
    backbone = load_backbone(config.backbone, config.dtype)
    geometry = ImageGeometry(size=backbone.image_size, resize=config.resize, banner_rows=config.banner_rows)
    concept = config.concept or PRESETS[backbone.kind].concept or "object"
    encoder = Encoder(backbone, geometry, Prompts.complete(None, None, concept).generic)
    training = complete(backbone.kind, 1).training
    unread: list[str] = []
    with Progress(len(images) + (len(more) if more else 0), "images", "image") as bar:

        def shot_features(rows: Sequence[int]) -> Tensor:
            found = []
            for row in rows:
                found.append(encoder.shot_features([encoder.prepare(images.decode(row))], training))
                encoder.forget()
                bar.update()
            return torch.cat(found)

        def unlabelled_features(others: ImageSet) -> tuple[ImageSet, Tensor] | None:
            found = {}
            for row in range(len(others)):
                try:
                    found[row] = encoder.features(encoder.latents([encoder.prepare(others.decode(row))]))
                except (OSError, ValueError) as error:
                    unread.append(str(error))
                bar.update()
            return (others.subset(found), torch.cat(list(found.values()))) if found else None

        findings = check_images(
            images,
            shot_features,
            folds=config.folds,
            unlabelled=None if more is None else unlabelled_features(more),
            wanted=config.wanted,
        )
    _report(findings, console)
    for error in unread:
        console.out(f"not looked at: {printable(error)}")
    return 1 if findings.doubts or findings.copies_between or unread else 0


def _report(found: Findings, console: Console) -> None:
    def section(title: str, lines: list[str]) -> None:
        if lines:
            console.out(f"{title}:")
            for line in lines[:_SHOWN]:
                console.out(f"  {printable(line)}")
            if len(lines) > _SHOWN:
                console.out(f"  and {len(lines) - _SHOWN} more")

    section(
        "One picture under two classes; only one can be right, remove the other",
        [f"{a} and {b}" for a, b in found.copies_between],
    )
    section(
        f"Labels in doubt: by the other images another class is {100 * SURE:.0f} % probable, or {TIMES} times as "
        "probable as the label; look at them",
        [
            f"{x.name}: {x.label} ({100 * x.own:.1f} %), looks like {x.looks_like} ({100 * x.probability:.0f} %)"
            for x in found.doubts
        ],
    )
    section(
        "Copies of one picture within a class; keep one of each, or cross-validation is too optimistic",
        [f"{a} and {b}" for a, b in found.copies],
    )
    section(
        "Classes that cannot be told apart yet; more images of them help most",
        [f"{x.first} and {x.second}: {x.mistaken} of {x.images} images mistaken" for x in found.confusions],
    )
    section(
        "Label these next; they lie between two classes and are unlike each other (margin: by how many points of "
        "probability the first is ahead)",
        [f"{x.name}: {x.first} or {x.second} (margin {100 * x.margin:.0f})" for x in found.wanted],
    )
    if found.accuracy is None:
        console.out("Every class has one image, so none can be judged by the others.")
    else:
        console.out(
            f"{100 * found.accuracy:.1f} % of {counted(found.judged, 'image')} look like their own class to the frozen "
            "backbone's features; what is trained is usually more accurate."
        )
