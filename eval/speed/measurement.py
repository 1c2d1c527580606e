"""What the sections of the speed benchmark share: data, class tokens, and the errors of all test images, kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from fewshot_diti.backbone import POCKET, Backbone, CompileMode
from fewshot_diti.bank import Bank, bank_fingerprint
from fewshot_diti.classifier import DiTiClassifier
from fewshot_diti.data import check_disjoint, load_images, sample_shots
from fewshot_diti.data.images import ImageSource
from fewshot_diti.elimination import Look, Stage
from fewshot_diti.files import write_atomically
from fewshot_diti.learning import Groups, Learner
from fewshot_diti.recommended import recommended_scoring, recommended_training
from fewshot_diti.scoring import Scorer

CHUNK = 24  # images between two saves


@dataclass(frozen=True, kw_only=True)
class SpeedConfig:
    """What is measured, on what.

    Attributes:
        backbone, dataset, concept: as `fewshot-diti eval` takes them.
        num_shots, seed: of the class tokens.
        max_images: test images that are scored exhaustively, drawn at random; all where it is None.
        pipeline_images: of these, how many this package's pipeline is timed on, from files to labels, and the published
            schedule is asked about.
        published_images: of these, how many the published procedure is timed on.
        training_steps: of both ways of training; `training_classes` are trained one after another.
        growth: numbers of classes, perturbed copies of the real class tokens beyond those; `growth_images` are scored.
        growth_strengths: of the perturbation. On the pocket a copy by 0.3 nearly ties with its original, and one by 0.8
            differs from it in score about as much as real classes differ from each other.
        full_size: whether a race runs on Stable Diffusion 2.0's U-Net at 256 px, on random weights.
        compile: mode of `torch.compile` in which a stacked evaluation is timed as well; None times none.

    Raises:
        ValueError: more published images than images.
    """

    backbone: str = POCKET
    dataset: str = "bundled"
    concept: str = "aircraft"
    num_shots: int = 16
    seed: int = 1
    max_images: int | None = None
    pipeline_images: int = 24
    published_images: int = 2
    training_steps: int = 160
    training_classes: int = 2
    growth: tuple[int, ...] = (10, 30, 100, 300, 1000)
    growth_images: int = 2
    growth_strengths: tuple[float, ...] = (0.3, 0.8)
    full_size: bool = False
    compile: CompileMode | None = None
    output_dir: Path = Path("results/speed")

    def __post_init__(self) -> None:
        if not 1 <= self.published_images <= self.pipeline_images:
            raise ValueError(
                f"published_images={self.published_images}; pass 1 to pipeline_images={self.pipeline_images}."
            )


class Measurement:
    """Everything that the sections share, made when first asked for."""

    def __init__(self, config: SpeedConfig) -> None:
        self.config = config
        self.pool, self.test = (load_images(config.dataset, split) for split in ("train", "test"))
        self.shots = self.pool.subset(sample_shots(self.pool, config.num_shots, config.seed).rows(self.pool))
        check_disjoint(self.shots, self.test)
        order = np.random.default_rng(config.seed).permutation(len(self.test))[: config.max_images]
        self.test = self.test.subset(order.tolist())

    @cached_property
    def backbone(self) -> Backbone:
        return Backbone.from_pretrained(self.config.backbone)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Training and scoring: what the package recommends."""
        small, seed = self.backbone.small, self.config.seed
        return {
            "training": replace(recommended_training(self.config.num_shots, small=small), seed=seed),
            "scoring": replace(recommended_scoring(small=small), seed=seed),
        }

    @cached_property
    def made_by(self) -> dict[str, str]:
        """What must be the same for kept sections to be taken."""
        config = {k: str(v) for k, v in asdict(self.config).items() if k not in ("full_size", "compile", "output_dir")}
        backbone = {"hash": self.backbone.hash, "dtype": str(self.backbone.dtype)}
        return config | backbone | {k: str(v) for k, v in self.settings.items()}

    @cached_property
    def bank_folder(self) -> Path:
        """Named after all that decides the class tokens: others are never taken for them."""
        decides = [self.shots.ids, self.config.concept, self.backbone.hash, *map(str, self.settings.values())]
        return self.config.output_dir / f"bank-{hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:8]}"

    @cached_property
    def classifier(self) -> DiTiClassifier:
        """Trained once, and kept."""
        if (self.bank_folder / "manifest.json").is_file():
            return DiTiClassifier.from_pretrained(self.bank_folder, self.backbone)
        classifier = DiTiClassifier(self.backbone, concept=self.config.concept, **self.settings)
        shots = self.shots
        classifier.fit([shots.image(i) for i in range(len(shots))], [shots.class_names[c] for c in shots.labels])
        classifier.save_pretrained(self.bank_folder)
        return classifier

    @property
    def learner(self) -> Learner:
        return self.classifier.learner

    @property
    def bank(self) -> Bank:
        assert self.classifier.bank_ is not None, "trained above"
        return self.classifier.bank_

    @cached_property
    def scorer(self) -> Scorer:
        return self.learner.scorer(self.bank)

    @cached_property
    def weights(self) -> Tensor:
        return torch.tensor(self.classifier.calibration_.weights, dtype=torch.float64)

    @property
    def stages(self) -> Sequence[Stage | Look]:
        """What an image goes through among the bank's classes."""
        return self.classifier.scoring.schedule(len(self.bank))

    @property
    def groups(self) -> Groups:
        """The shots of each class."""
        shots = self.shots
        return {
            x: [shots.image(i) for i, c in enumerate(shots.labels) if shots.class_names[c] == x]
            for x in self.bank.labels
        }

    def test_file(self, row: int) -> ImageSource:
        """A test image as a path, where it is one."""
        image = self.test.images[row]
        return image if isinstance(image, str | Path) else self.test.image(row)

    @cached_property
    def labels(self) -> np.ndarray:
        """Of the test images, positions in the bank."""
        return np.array([self.bank.labels.index(self.test.class_names[c]) for c in self.test.labels])

    @cached_property
    def offsets(self) -> Tensor | None:
        """What the U-Net's own features add to the scores of the test images [N, C]."""
        rows = range(len(self.test))
        return self.classifier.offsets(self.learner.encode([self.test.image(row) for row in rows]))

    @cached_property
    def errors(self) -> Tensor:
        """The error tensor of all test images at the calibrated trials, scored once and kept."""
        path = self.config.output_dir / "errors.safetensors"
        made_by = {
            "bank": bank_fingerprint(self.bank_folder),
            "timesteps": list(self.classifier.calibration_.timesteps),
            "weights": list(self.classifier.calibration_.weights),
            "classes": [str(x) for x in self.bank.labels],
            "image_ids": list(self.test.ids),
            "labels": self.labels.tolist(),
            "dtype": str(self.backbone.dtype),
        }
        beside = path.with_suffix(".json")
        kept = torch.empty(0, len(self.bank), len(self.weights))
        if path.is_file() and beside.is_file() and json.loads(beside.read_text()) == made_by:
            kept = load_file(path)["errors"]
        if not len(kept):
            path.unlink(missing_ok=True)  # what something else made must not pass for this
        write_atomically(beside, (json.dumps(made_by) + "\n").encode())
        while len(kept) < len(self.test):
            rows = range(len(kept), min(len(kept) + CHUNK, len(self.test)))
            kept = torch.cat([kept, self.classifier.errors([self.test.image(row) for row in rows])])
            write_atomically(path, save({"errors": kept}))
            print(f"errors of {len(kept)} of {len(self.test)} images", flush=True)
        return kept
