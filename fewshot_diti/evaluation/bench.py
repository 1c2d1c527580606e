"""What the methods of a table share: data of one draw, models loaded when first asked for, features and errors kept."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fewshot_diti.backbone import Backbone, DtypeName, load_backbone
from fewshot_diti.baselines.base import KeptFeatures, LazyImages
from fewshot_diti.baselines.clip import OpenClip, prompt_templates
from fewshot_diti.baselines.imagenet import ImageNetwork
from fewshot_diti.baselines.presets import Preset, preset_of
from fewshot_diti.baselines.unet_features import UnetFeatures
from fewshot_diti.baselines.views import ColourJitter
from fewshot_diti.baselines.zero_shot import zero_shot_bank
from fewshot_diti.classifier import DiTiClassifier
from fewshot_diti.cost import seconds_of_an_evaluation, training_evaluations
from fewshot_diti.data import ImageGeometry, ImageSet
from fewshot_diti.evaluation.kept_errors import DitiErrors, load_errors, save_errors
from fewshot_diti.evaluation.task import Task, fingerprint
from fewshot_diti.prompts import with_article
from fewshot_diti.recommended import ScoringConfig, recommended_scoring, recommended_training
from fewshot_diti.training import Label, TrainingConfig
from fewshot_diti.trials import even_grid

FOLDS = 2  # of cross-validation on the shots
DECIDES_ERRORS = ("trials", "timesteps", "unet_scale", "text_encoder_scale", "seed")  # fields of ScoringConfig
POCKET_TRIALS = 16  # a table of three seeds takes hours
PIXELS = 224 * 448  # of an image for the ImageNet network


class Bench:
    """Models and what they have computed.

    Args:
        backbone, clip, network, siblings: names, as `Backbone`, `OpenClip` and, twice, `ImageNetwork` take them.
        dtype: of the backbone, as `load_backbone` takes it.
        concept: what all classes are.
        trials: S of the diffusion methods, over all timesteps; None: 16 for the pocket, else what is recommended.
        training_share: of the steps that class tokens and networks are trained for.
        folder: where errors are kept.
    """

    def __init__(
        self,
        *,
        backbone: str,
        clip: str,
        network: str,
        siblings: str,
        concept: str,
        trials: int | None,
        folder: Path,
        dtype: DtypeName = "auto",
        training_share: float = 1.0,
    ) -> None:
        self._names = {"backbone": backbone, "clip": clip, "network": network, "siblings": siblings}
        self._dtype: DtypeName = dtype
        self.concept, self.trials, self.folder = concept, trials, folder
        self._training_share = training_share
        self._shot_features: dict[tuple[int, int], dict[Label, Tensor]] = {}

    @cached_property
    def backbone(self) -> Backbone:
        """The Stable Diffusion."""
        return load_backbone(self._names["backbone"], self._dtype)

    @cached_property
    def geometry(self) -> ImageGeometry:
        """The shape that images have for the backbone."""
        return ImageGeometry(size=self.backbone.image_size)

    @cached_property
    def clip(self) -> OpenClip:
        """The OpenCLIP model."""
        return OpenClip(self._names["clip"])

    @property
    def templates(self) -> tuple[str, ...]:
        """Prompts of a class for CLIP."""
        return prompt_templates(self.concept)

    @cached_property
    def network(self) -> ImageNetwork:
        """The ImageNet network, for images in the backbone's aspect with about `PIXELS` pixels."""
        height, width = self.backbone.image_size
        side = math.sqrt(PIXELS / (height * width))
        size = round(side * height / 32) * 32, round(side * width / 32) * 32
        return ImageNetwork(self._names["network"], size=size)

    @cached_property
    def clip_preset(self) -> Preset:
        """Settings of what is trained on the OpenCLIP model."""
        return preset_of(self.clip.model)

    @cached_property
    def network_preset(self) -> Preset:
        """Settings of what is trained on the ImageNet network."""
        return preset_of(self.network.module)

    @cached_property
    def network_to_tune(self) -> ImageNetwork:
        """The ImageNet network at the size that it is fine-tuned at: that of its preset, if it still shows the network
        more pixels than the backbone sees."""
        height, width = (round(self.network_preset.tuning_scale * n) for n in self.network.geometry.size)
        if (height, width) == self.network.geometry.size or height * width < math.prod(self.geometry.size):
            return self.network
        return ImageNetwork(self._names["network"], size=(height, width))

    @cached_property
    def network_features(self) -> KeptFeatures:
        """Its features."""
        return KeptFeatures(self.network.features)

    @cached_property
    def siblings(self) -> ImageNetwork:
        """The network that was told the labels of sibling classes."""
        return ImageNetwork(self._names["siblings"])

    @cached_property
    def siblings_features(self) -> KeptFeatures:
        """Its features."""
        return KeptFeatures(self.siblings.features)

    @cached_property
    def unet_features(self) -> UnetFeatures:
        """Features of the backbone's U-Net."""
        return UnetFeatures(self.backbone, self.geometry, f"a photo of {with_article(self.concept)}")

    def shot_features(self, task: Task) -> dict[Label, Tensor]:
        """The U-Net's features of the shots and of copies of them, as the classifier keeps them."""
        draw = task.num_shots, task.seed
        if draw not in self._shot_features:  # of one draw at a time: they are large
            scoring = replace(self.scoring(task.seed), features_weight=1.0)
            self._shot_features = {draw: self._classifier(task, scoring).learner.shot_features(task.groups())}
        return self._shot_features[draw]

    @cached_property
    def latents(self) -> KeptFeatures:
        """The backbone's latents, flattened."""

        def encode(images: list[Image.Image]) -> np.ndarray:
            pixels = (self.geometry.pixels(image)[None] for image in images)
            return torch.cat([self.backbone.encode_images(p)[0] for p in pixels]).flatten(1).numpy()

        return KeptFeatures(encode)

    def shot_latents(self, task: Task) -> Tensor:
        """Latents of the shots, [n, c, h, w]."""
        height, width = (n // self.backbone.vae_scale_factor for n in self.geometry.size)
        return torch.from_numpy(self.latents(task.shot_images())).unflatten(1, (-1, height, width))

    def training(self, num_shots: int, seed: int) -> TrainingConfig:
        """How class tokens are trained."""
        recommended = recommended_training(num_shots, small=self.backbone.small)
        return replace(recommended, steps=self.steps(recommended.steps), seed=seed)

    @property
    def recommended(self) -> ScoringConfig:
        """How images would be scored if the table did not compare ways of it."""
        return recommended_scoring(small=self.backbone.small)

    @property
    def recolour(self) -> ColourJitter:
        """The colour jitter of class tokens, for baselines that train on views."""
        return ColourJitter.of(self.training(num_shots=1, seed=0))

    def steps(self, whole: int) -> int:
        """Of a training that has `whole` steps, how many are done."""
        return max(1, round(self._training_share * whole))

    def scoring(self, seed: int) -> ScoringConfig:
        """How images are scored: all timesteps; rows weigh them each in its own way."""
        everything = (0, self.backbone.num_train_timesteps)
        scoring = self.recommended
        trials = self.trials or (POCKET_TRIALS if self.backbone.small else scoring.trials)
        return replace(
            scoring,
            trials=trials,
            timesteps=everything,
            density="even",
            decide="exhaustive",
            weighting="uniform",
            features_weight=0.0,
            shortlist=None,
            seed=seed,
        )

    def evaluation_seconds(self) -> float:
        """Of one evaluation, measured."""
        seconds_of_an_evaluation(self.backbone, self.geometry.size)  # the first is slower
        return seconds_of_an_evaluation(self.backbone, self.geometry.size, batch_size=4)

    def evaluations(self, num_shots: int, num_classes: int, num_test: int) -> int:
        """What `prepare` costs."""
        scoring, shots = replace(self.scoring(0), folds=FOLDS if num_shots > 1 else 0), num_shots * num_classes
        training = training_evaluations(self.training(num_shots, 0), scoring, shots, num_classes)
        return training + num_test * num_classes * scoring.trials

    def error_settings(self, seed: int) -> str:
        """All of the scoring that an error depends on; how rows weigh and judge errors is their own."""
        scoring = self.scoring(seed)
        return str({name: getattr(scoring, name) for name in DECIDES_ERRORS})

    def prepare(self, task: Task) -> None:
        """Trains and scores the task's class tokens, unless their errors are on disk; the processes share the work.

        Raises:
            TrainingError: a class's loss was not finite.
        """
        path, made_by = self._diti_file(task)
        if load_errors(path, made_by) is not None:
            return
        classifier = self._classifier(task, self.scoring(task.seed))
        start = perf_counter()
        classifier.fit(task.shot_images(), task.shot_labels())
        trained = perf_counter()
        learner, bank, times = classifier.learner, classifier.bank_, torch.tensor(classifier.calibration_.timesteps)
        assert bank is not None, "fit raises where no class was learned"
        test = learner.shared_errors(bank, task.test_images(), times)
        scored = perf_counter()
        groups = task.groups()
        out_of_fold = min(len(shots) for shots in groups.values()) > 1
        if out_of_fold:
            held_out, labels = learner.held_out(groups, FOLDS, partial(learner.shared_errors, grid=times))
        else:
            held_out = learner.shared_errors(bank, task.shot_images(), times)
            labels = torch.tensor([bank.labels.index(name) for name in task.shot_labels()])
        calibrated = perf_counter()
        order = [bank.labels.index(name) for name in task.class_names]  # the bank is sorted, the task may not be
        save_errors(
            path,
            {
                "timesteps": times,
                "test": test[:, order].contiguous(),
                "held_out": held_out[:, order].contiguous(),
                "held_out_labels": torch.tensor(order).argsort()[labels],
                "out_of_fold": torch.tensor(out_of_fold),
                "seconds": torch.tensor([trained - start + calibrated - scored, scored - trained]),
            },
            made_by,
        )

    def _classifier(self, task: Task, scoring: ScoringConfig) -> DiTiClassifier:
        training = self.training(task.num_shots, task.seed)
        return DiTiClassifier(
            self.backbone, concept=self.concept, training=training, scoring=scoring, geometry=self.geometry
        )

    def prepare_zero_shot(self, test: ImageSet) -> None:
        """Scores bare prompts, unless their errors are on disk; neither shots nor seed matter."""
        path, made_by = self._zero_shot_file(test)
        if load_errors(path, made_by) is not None:
            return
        scoring = self.scoring(0)
        bank = zero_shot_bank(self.backbone, test.class_names, self.geometry, self.concept)
        learner = DiTiClassifier(self.backbone, scoring=scoring, geometry=self.geometry).learner
        times = even_grid(scoring.trials, *scoring.timesteps)
        start = perf_counter()
        errors = learner.shared_errors(bank, LazyImages(test), times)
        save_errors(path, {"errors": errors, "seconds": torch.tensor(perf_counter() - start)}, made_by)

    def diti(self, task: Task) -> DitiErrors:
        """What `prepare` left; raises FileNotFoundError where it failed."""
        path, made_by = self._diti_file(task)
        kept = load_errors(path, made_by)
        if kept is None:
            raise FileNotFoundError(f"{path} is missing: the class tokens could not be trained or scored.")
        seconds = kept.pop("seconds").tolist()
        out_of_fold = bool(kept.pop("out_of_fold"))
        return DitiErrors(**kept, out_of_fold=out_of_fold, training_seconds=seconds[0], scoring_seconds=seconds[1])

    def zero_shot(self, test: ImageSet) -> tuple[Tensor, float]:
        """Errors [N, C, S] that `prepare_zero_shot` left, and the seconds that they took."""
        path, made_by = self._zero_shot_file(test)
        kept = load_errors(path, made_by)
        if kept is None:
            raise FileNotFoundError(f"{path} is missing: the bare prompts could not be scored.")
        return kept["errors"], float(kept["seconds"])

    def _diti_file(self, task: Task) -> tuple[Path, dict[str, str]]:
        settings = f"{self.training(task.num_shots, task.seed)} {self.error_settings(task.seed)} {FOLDS} {self.concept}"
        path = self.folder / f"diti-{task.num_shots}-{task.seed}.safetensors"
        return path, self._made_by(settings, fingerprint(task.shots), fingerprint(task.test))

    def _zero_shot_file(self, test: ImageSet) -> tuple[Path, dict[str, str]]:
        return self.folder / "zero-shot.safetensors", self._made_by(
            f"{self.error_settings(0)} {self.concept}", fingerprint(test)
        )

    def _made_by(self, settings: str, *images: str) -> dict[str, str]:
        backbone = f"{self.backbone.hash} in {self.backbone.dtype}"
        return {"backbone": backbone, "settings": settings, "images": " ".join(images)}
