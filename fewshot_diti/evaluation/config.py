"""What a few-shot table consists of: data, models, methods, shots and seeds."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from fewshot_diti.backbone import POCKET, DtypeName
from fewshot_diti.baselines.imagenet import PACKAGED
from fewshot_diti.evaluation.methods import LEARNED, METHODS, SIBLINGS

AIRLINE = "airline"  # the attribute of the bundled images that a livery is


@dataclass(frozen=True, kw_only=True)
class GridConfig:
    """Which runs a table has.

    Attributes:
        dataset: as `load_images` reads it, with splits train and test.
        backbone: "pocket", a folder, or a hub id.
        dtype: of its U-Net and text encoder; auto is bfloat16 where the hardware has it, else float32. A table that is
            begun on one processor and ended on another names one.
        clip: as `OpenClip` takes it; by default the pocket's for the pocket, else ViT-H-14.
        network: as `ImageNetwork` takes it.
        siblings: a network trained with labels of sibling classes, as `ImageNetwork` takes it; by default the pocket's
            for the pocket, else none.
        representations: folders that `represent train` wrote, for the rows `linear-pdae`, `linear-simclr` and so on.
        methods: rows, keys of `METHODS`; by default all but those of representations, `siblings` where there is such a
            network.
        shots, seeds: columns, and draws of each.
        shots_file: the shots, as `Shots.save` wrote them or as a published list of paths, instead of draws; `shots` is
            then the number per class in it, and seeds move training and scoring alone.
        concept: what all classes are, such as "bird"; by default "aircraft" for bundled and fgvc; other data name it.
        trials: of the diffusion methods, over all timesteps; by default 16 for the pocket, else what is recommended.
            The row `fewshot-diti` has its own range of timesteps, and by default what is recommended for it.
        training_share: of the steps that class tokens, finetune and clip-lora are trained for; less for a quick look.
            The network in the row `fewshot-diti` is trained in full.
        max_test_images: of each class; by default all.
        shift: "livery", the same as `group` airline; "none".
        group: an attribute of the images: the shots of a class share one value of it, as far as some value has so many
            images; test images of the class with a value that its shots show are matched, the others shifted. Which
            value that is depends on labels and values of the test images, so that some of them are matched and some
            misleading; nothing else is chosen on test images.
        output_dir: gets one JSON per run at <dataset>/<backbone>/<shift>/<method>/<shots>-<seed>.json.

    Raises:
        ValueError: an unknown method, a number below 1, nothing to run or something twice, the row `siblings` without a
            network, that of a representation without a folder, other data without a concept, or both a shift and a
            group.
    """

    dataset: str = "bundled"
    backbone: str = POCKET
    dtype: DtypeName = "auto"
    clip: str | None = None
    network: str = PACKAGED
    siblings: str | None = None
    representations: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    shots: tuple[int, ...] = (1, 2, 4, 8, 16)
    seeds: tuple[int, ...] = (1, 2, 3)
    shots_file: Path | None = None
    concept: str = ""
    trials: int | None = None
    training_share: float = 1.0
    max_test_images: int | None = None
    shift: Literal["none", "livery"] = "none"
    group: str | None = None
    output_dir: Path = Path("results")

    def __post_init__(self) -> None:
        if not self.concept:
            if self.dataset.partition(":")[0] not in ("bundled", "fgvc"):
                raise ValueError(
                    f"What are all classes of {self.dataset}? Prompts name it: pass concept, such as bird."
                )
            object.__setattr__(self, "concept", "aircraft")
        if self.group is not None and self.shift != "none":
            raise ValueError(f"shift={self.shift!r} is the group {AIRLINE!r}; pass it or group={self.group!r}.")
        if not self.methods:
            usable = (m for m in METHODS if m not in LEARNED and (self.has_siblings or m != SIBLINGS))
            object.__setattr__(self, "methods", tuple(usable))
        unknown = [m for m in self.methods if m not in METHODS]
        if unknown:
            raise ValueError(f"methods {unknown}; pass some of {', '.join(METHODS)}.")
        if not self.has_siblings and SIBLINGS in self.methods:
            raise ValueError(
                "The row siblings needs a network that was trained with labels of sibling classes; pass "
                "siblings=local-dir:FOLDER (recipes/pocket/siblings.py trains one), or other methods."
            )
        if not self.representations and (lacking := [m for m in self.methods if m in LEARNED]):
            raise ValueError(
                f"The row {lacking[0]} needs features that were learned without labels; pass representations=FOLDER "
                f"(fewshot-diti represent train --method {LEARNED[lacking[0]]} makes one), or other methods."
            )
        for name in ("methods", "shots", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name}={values}; pass at least one, and each once.")
        for name in ("shots", "trials", "max_test_images"):
            value = getattr(self, name)
            if value is not None and np.min(value) < 1:
                raise ValueError(f"{name}={value}; pass whole numbers of at least 1.")
        if self.shots_file is not None and (len(self.shots) > 1 or self.shifted):
            raise ValueError(
                f"shots_file={self.shots_file} is one draw; pass one number of shots, and no group or shift."
            )
        if not 0 < self.training_share <= 1:
            raise ValueError(f"training_share={self.training_share}; pass a number above 0, of at most 1.")

    @property
    def has_siblings(self) -> bool:
        """Whether there is a network for the row `siblings`."""
        return self.siblings is not None or self.backbone == POCKET

    @property
    def column(self) -> str:
        """The attribute that matched and shifted test images differ in."""
        return self.group or AIRLINE

    @property
    def shifted(self) -> bool:
        """Whether the shots of a class share one value of it."""
        return self.group is not None or self.shift != "none"

    @property
    def folder(self) -> Path:
        """What all runs of this data set and backbone share."""
        images = "" if self.max_test_images is None else f"@{self.max_test_images}"
        return self.output_dir / (_slug(self.dataset) + images) / _slug(self.backbone) / _slug(self.group or self.shift)


def _slug(name: str) -> str:
    return re.sub(r"[^\w.@-]+", "_", name).strip("_")
