"""What the sections of the speed benchmark share: data, class tokens, and the errors of all test images, kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from fewshot_diti.backbone import Backbone, CompileMode
from fewshot_diti.backbone_files import POCKET
from fewshot_diti.bank import Bank
from fewshot_diti.bank_files import bank_fingerprint
from fewshot_diti.classifier import DiTiClassifier
from fewshot_diti.config import Settings
from fewshot_diti.data import ImageSet, check_disjoint, load_images, sample_shots
from fewshot_diti.data.arguments import group_shots
from fewshot_diti.data.images import DecodedImage, ImageSource
from fewshot_diti.elimination import Stage
from fewshot_diti.encoding import Encoder, PreparedImage
from fewshot_diti.files import write_atomically
from fewshot_diti.presets import recommended
from fewshot_diti.racing import Look
from fewshot_diti.scoring import Scorer
from fewshot_diti.training import Groups
from fewshot_diti.witnesses import score_offsets

CHUNK = 24  # images between two saves


@dataclass(frozen=True, kw_only=True)
class SpeedConfig:
    """What is measured, on what.

    Attributes:
        backbone, dataset, concept: as `fewshot-diti eval` takes them.
        num_shots, seed: of the class tokens.
        max_images: test images that are scored exhaustively, drawn at random; all where it is None.
        pipeline_images: of these, how many this package's pipeline is timed on, from files to labels, and the published
            schedule decides.
        published_images: of these, how many the published procedure is timed on.
        training_steps: of both ways of training; `training_classes` are trained one after another.
        growth: numbers of classes, perturbed copies of the real class tokens beyond those; `growth_images` are scored.
        growth_strengths: of the perturbation. On the pocket a copy by 0.3 nearly ties with its original, and one by 0.8
            differs from it in score about as much as real classes differ from each other.
        full_size: whether a race runs on Stable Diffusion 2.0's U-Net at 256 px, on random weights.
        compile: mode of `torch.compile` for an additional timing of a stacked evaluation; None leaves it out.

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
    def settings(self) -> Settings:
        """Training, scoring and prediction: what the package recommends."""
        training, scoring, prediction = recommended(self.config.num_shots, self.backbone.kind)
        return Settings(replace(training, seed=self.config.seed), replace(scoring, seed=self.config.seed), prediction)

    @cached_property
    def made_by(self) -> dict[str, str]:
        """What must be unchanged for finished sections to be reused."""
        config = {k: str(v) for k, v in asdict(self.config).items() if k not in ("full_size", "compile", "output_dir")}
        backbone = {"hash": self.backbone.hash, "dtype": str(self.backbone.dtype)}
        return config | backbone | {k: str(v) for k, v in self.settings._asdict().items()}

    @cached_property
    def bank_folder(self) -> Path:
        """Named after all that decides the class tokens, so that no others are loaded in their place."""
        decides = [self.shots.ids, self.config.concept, self.backbone.hash, *map(str, self.settings)]
        return self.config.output_dir / f"bank-{hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:8]}"

    @cached_property
    def classifier(self) -> DiTiClassifier:
        """Trained once, and kept."""
        if (self.bank_folder / "manifest.json").is_file():
            return DiTiClassifier.from_pretrained(self.bank_folder, self.backbone)
        classifier = DiTiClassifier(self.backbone, concept=self.config.concept, **self.settings._asdict())
        shots = self.shots
        classifier.fit(shots.decoded(), shots.label_names)
        classifier.save_pretrained(self.bank_folder)
        return classifier

    @property
    def encoder(self) -> Encoder:
        """Of the classifier."""
        return self.classifier.encoder_

    def latents(self, rows: Sequence[int], images: ImageSet | None = None) -> Tensor:
        """Latents [N, c, h, w] of test images, or of some of other images."""
        images = images or self.test
        return self.encoder.latents([self.encoder.prepare(images.decode(row)) for row in rows])

    @property
    def bank(self) -> Bank:
        assert self.classifier.bank_ is not None, "trained above"
        return self.classifier.bank_

    @cached_property
    def scorer(self) -> Scorer:
        return self.scorer_of(self.bank)

    def scorer_of(self, bank: Bank, backbone: Backbone | None = None) -> Scorer:
        """A bank ready to score."""
        seed, batch_size = self.settings.scoring.seed, self.settings.prediction.batch_size
        return Scorer(backbone or self.backbone, bank, seed=seed, batch_size=batch_size)

    @cached_property
    def weights(self) -> Tensor:
        return torch.tensor(self.classifier.calibration_.weights, dtype=torch.float64)

    def looks(self, num_classes: int) -> Sequence[Stage | Look]:
        """What an image goes through among so many classes."""
        return self.settings.prediction.looks(num_classes, self.settings.scoring.trials)

    @property
    def stages(self) -> Sequence[Stage | Look]:
        """What an image goes through among the bank's classes."""
        return self.looks(len(self.bank))

    @property
    def reads_features(self) -> bool:
        """Whether an evaluation per image goes to the U-Net's features."""
        scoring, prediction = self.settings.scoring, self.settings.prediction
        return scoring.uses_witnesses(prediction) and "features" in scoring.witnesses

    @cached_property
    def groups(self) -> Groups:
        """The shots of each class."""
        labels = self.shots.label_names
        return group_shots(self.shots.decoded(), labels, self.encoder.prepare)

    def shots_of(self, label: str) -> list[DecodedImage]:
        """The shots of a class as images, not yet prepared."""
        return [self.shots.decode(i) for i, c in enumerate(self.shots.labels) if self.shots.class_names[c] == label]

    def test_file(self, row: int) -> ImageSource:
        """A test image as a path, where it is one."""
        image = self.test.images[row]
        return image if isinstance(image, str | Path) else self.test.decode(row)

    @cached_property
    def labels(self) -> np.ndarray:
        """Of the test images, positions in the bank."""
        return np.array([self.bank.labels.index(self.test.class_names[c]) for c in self.test.labels])

    @cached_property
    def offsets(self) -> Tensor | None:
        """What the witnesses add to the scores of the test images [N, C]."""
        return self.offsets_of([self.encoder.prepare(self.test.decode(row)) for row in range(len(self.test))])

    def offsets_of(self, images: Sequence[PreparedImage], latents_Nchw: Tensor | None = None) -> Tensor | None:
        """What the witnesses add to the scores of images [N, C]."""
        latents = self.encoder.latents(images) if latents_Nchw is None else latents_Nchw
        prediction = self.settings.prediction
        asked = self.classifier.decider().asked(prediction)
        log_p = [x.log_probabilities(x.witness.read(self.encoder, images, latents), images) for x, _ in asked]
        return score_offsets(log_p, [weight for _, weight in asked], prediction.shortlist) if asked else None

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
            path.unlink(missing_ok=True)  # errors of other settings must not be mistaken for these
        write_atomically(beside, (json.dumps(made_by) + "\n").encode())
        while len(kept) < len(self.test):
            rows = range(len(kept), min(len(kept) + CHUNK, len(self.test)))
            kept = torch.cat([kept, self.classifier.errors([self.test.decode(row) for row in rows])])
            write_atomically(path, save({"errors": kept}))
            print(f"errors of {len(kept)} of {len(self.test)} images", flush=True)
        return kept
