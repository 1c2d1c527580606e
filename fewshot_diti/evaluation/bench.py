"""What the methods of a table share: data of one draw, models loaded when first asked for, features and errors kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from importlib import metadata
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from fewshot_diti.backbone import Backbone, DtypeName, load_backbone
from fewshot_diti.baselines.base import KeptFeatures
from fewshot_diti.baselines.clip import OpenClip, prompt_templates
from fewshot_diti.baselines.imagenet import ImageNetwork, size_for
from fewshot_diti.baselines.presets import Preset, preset_of
from fewshot_diti.baselines.probe import Features
from fewshot_diti.baselines.unet_features import UnetFeatures
from fewshot_diti.baselines.views import ColourJitter
from fewshot_diti.baselines.zero_shot import zero_shot_bank
from fewshot_diti.classifier import DiTiClassifier
from fewshot_diti.config import Label, PredictionConfig, ScoringConfig, Settings, TrainingConfig
from fewshot_diti.cost import seconds_of_an_evaluation, training_evaluations
from fewshot_diti.data import ImageGeometry, ImageSet
from fewshot_diti.data.arguments import group_shots
from fewshot_diti.data.images import ImageSource
from fewshot_diti.encoding import Encoder
from fewshot_diti.evaluation.kept_errors import DitiErrors, save_errors
from fewshot_diti.evaluation.task import Task, fingerprint
from fewshot_diti.folds import Fit, judge_held_out, shared_errors
from fewshot_diti.hashes import hash_weights
from fewshot_diti.kept_tensors import kept_tensors
from fewshot_diti.presets import recommended
from fewshot_diti.prompts import Prompts, generic_prompt
from fewshot_diti.representation import Representation
from fewshot_diti.trials import even_grid
from fewshot_diti.witnesses import Witness, make_witness

FOLDS = 2  # of cross-validation on the shots
DECIDES_ERRORS = ("trials", "timesteps", "unet_scale", "text_encoder_scale", "seed")  # fields of ScoringConfig
POCKET_TRIALS = 16  # a table of three seeds takes hours


class Bench:
    """Models and what they have computed.

    Args:
        backbone, clip, network, siblings: names, as `Backbone`, `OpenClip` and, twice, `ImageNetwork` take them.
        dtype: of the backbone, as `load_backbone` takes it.
        concept: what all classes are.
        trials: S of the diffusion methods, over all timesteps; None: 16 for the pocket, else what is recommended.
        training_share: of the steps that class tokens and networks are trained for.
        folder: where errors are kept.
        representations: folders of learned representations, of each method one.
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
        representations: Sequence[str] = (),
    ) -> None:
        self._representations = representations
        self._names = {"backbone": backbone, "clip": clip, "network": network, "siblings": siblings}
        self._dtype: DtypeName = dtype
        self.concept, self.trials, self.folder = concept, trials, folder
        self._training_share = training_share
        self._shot_features: dict[tuple[int, int], dict[Label, Tensor]] = {}
        self._witnesses: dict[str, Witness] = {}

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
        """The ImageNet network."""
        return ImageNetwork(self._names["network"], size=size_for(self.backbone.image_size))

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
        """The ImageNet network at the size that it is fine-tuned at."""
        return self.network.at(size_for(self.backbone.image_size, self.network_preset.tuning_scale))

    @cached_property
    def network_features(self) -> KeptFeatures:
        """Its features."""
        return KeptFeatures(self.network.features)

    @cached_property
    def siblings(self) -> ImageNetwork:
        """The network that was trained with labels of sibling classes."""
        return ImageNetwork(self._names["siblings"])

    @cached_property
    def siblings_features(self) -> KeptFeatures:
        """Its features."""
        return KeptFeatures(self.siblings.features)

    @cached_property
    def unet_features(self) -> UnetFeatures:
        """Features of the backbone's U-Net."""
        return UnetFeatures(self.backbone, self.geometry, generic_prompt(self.concept))

    @cached_property
    def _learned(self) -> dict[str, Representation]:
        """The representations by the methods that learned them."""
        loaded = [Representation.from_pretrained(folder, self.backbone) for folder in self._representations]
        names = [x.method.name for x in loaded]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"Two representations were learned by {twice.pop()!r}; pass one of each method.")
        return dict(zip(names, loaded, strict=True))

    @cached_property
    def _learned_features(self) -> dict[str, KeptFeatures]:
        return {name: KeptFeatures(x.features) for name, x in self._learned.items()}

    @cached_property
    def _learned_hashes(self) -> dict[str, str]:
        return {name: hash_weights(x.network) for name, x in self._learned.items()}

    def representation(self, method: str) -> Representation:
        """The one that was learned by this method.

        Raises:
            OSError, ValueError: one of the folders cannot be loaded, or none was learned so.
        """
        if method not in self._learned:
            known = ", ".join(self._learned) or "none"
            raise ValueError(f"No representation learned by {method!r}, only {known}; pass its folder too.")
        return self._learned[method]

    def representation_hash(self, method: str) -> str:
        """Of the weights of that representation; errors the same."""
        self.representation(method)
        return self._learned_hashes[method]

    def learned_features(self, method: str) -> dict[str, Features]:
        """Its features: all dimensions, and where these are tied to timesteps, those of each stage; errors the same."""
        representation = self.representation(method)
        kept = self._learned_features[method]
        tied = representation.method.subsets(self.backbone) is not None
        stages = representation.stages() if tied else {}
        return {"all": kept} | {name: partial(_columns, kept, dims) for name, dims in stages.items()}

    def shot_features(self, task: Task) -> dict[Label, Tensor]:
        """The U-Net's features of the shots and of copies of them, as the classifier keeps them."""
        draw = task.num_shots, task.seed
        if draw not in self._shot_features:  # of one draw at a time: they are large
            encoder, training = self._encoder, self.training(task.num_shots, task.seed)
            groups = group_shots(task.shot_images(), task.shot_labels(), encoder.prepare)
            self._shot_features = {draw: {x: encoder.shot_features(groups[x], training) for x in sorted(groups)}}
            encoder.forget()
        return self._shot_features[draw]

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self.backbone, self.geometry, generic_prompt(self.concept))

    @cached_property
    def latents(self) -> KeptFeatures:
        """The backbone's latents, flattened."""
        return KeptFeatures(self._encoder.flat_latents)

    def shot_latents(self, task: Task) -> Tensor:
        """Latents of the shots, [n, c, h, w]."""
        height, width = (n // self.backbone.vae_scale_factor for n in self.geometry.size)
        return torch.from_numpy(self.latents(task.shot_images())).unflatten(1, (-1, height, width))

    def training(self, num_shots: int, seed: int) -> TrainingConfig:
        """How class tokens are trained."""
        training = recommended(num_shots, self.backbone.kind).training
        return replace(training, steps=self.steps(training.steps), seed=seed)

    def witness(self, name: str) -> Witness:
        """A witness of the classifier as it ships, by its name."""
        if name not in self._witnesses:
            self._witnesses[name] = make_witness(name, self.geometry, self.concept, self.backbone.kind)
        return self._witnesses[name]

    @property
    def recommended(self) -> ScoringConfig:
        """How images would be scored if the table did not compare ways of it."""
        return recommended(1, self.backbone.kind).scoring

    @property
    def recolour(self) -> ColourJitter:
        """The colour jitter of class tokens, for baselines that train on views."""
        return ColourJitter.of(self.training(num_shots=1, seed=0))

    def steps(self, whole: int) -> int:
        """How many steps are done of a training that has `whole` steps."""
        return max(1, round(self._training_share * whole))

    def scoring(self, seed: int) -> ScoringConfig:
        """How the rows that weight errors in different ways score: even trials over all timesteps."""
        return replace(
            self.recommended,
            trials=self.trials or (POCKET_TRIALS if self.backbone.kind == "pocket" else self.recommended.trials),
            timesteps=(0, self.backbone.num_train_timesteps),
            density="even",
            weighting="uniform",
            witnesses=(),
            witness_weights=(),
            seed=seed,
        )

    def evaluation_seconds(self) -> float:
        """Seconds per evaluation, measured."""
        seconds_of_an_evaluation(self.backbone, self.geometry.size)  # the first is slower
        return seconds_of_an_evaluation(self.backbone, self.geometry.size, batch_size=4)

    def evaluations(self, num_shots: int, num_classes: int, num_test: int) -> int:
        """What `prepare` costs."""
        scoring, shots = replace(self.scoring(0), folds=FOLDS if num_shots > 1 else 0), num_shots * num_classes
        training = training_evaluations(self.training(num_shots, 0), scoring, shots, num_classes)
        return training + num_test * num_classes * scoring.trials

    def error_settings(self, seed: int) -> str:
        """All of the scoring that an error depends on; how rows weight errors is their own."""
        scoring = self.scoring(seed)
        return str({name: getattr(scoring, name) for name in DECIDES_ERRORS})

    def prepare(self, task: Task) -> None:
        """Trains and scores the task's class tokens, unless their errors are on disk; the processes share the work.

        Raises:
            TrainingError: a class's loss was not finite.
        """
        path, made_by = self._diti_file(task)
        if kept_tensors(path, made_by) is not None:
            return
        classifier = DiTiClassifier(
            self.backbone,
            concept=self.concept,
            training=self.training(task.num_shots, task.seed),
            scoring=self.scoring(task.seed),
            prediction=PredictionConfig(schedule="exhaustive"),
            geometry=self.geometry,
        )
        start = perf_counter()
        classifier.fit(task.shot_images(), task.shot_labels())
        trained = perf_counter()
        encoder, bank, times = classifier.encoder_, classifier.bank_, torch.tensor(classifier.calibration_.timesteps)
        assert bank is not None, "fit raises where no class was learned"
        groups = group_shots(task.shot_images(), task.shot_labels(), encoder.prepare)
        settings = classifier.settings_._replace(scoring=replace(classifier.settings_.scoring, folds=FOLDS))
        fit = Fit(encoder=encoder, prompts=classifier.prompts_, settings=settings, groups=groups)
        test = shared_errors(fit, bank, task.test_images(), times)
        scored = perf_counter()
        out_of_fold = min(len(shots) for shots in groups.values()) > 1
        if out_of_fold:
            held_out, labels = judge_held_out(fit, partial(shared_errors, fit, grid=times))
        else:
            held_out = shared_errors(fit, bank, task.shot_images(), times)
            labels = torch.tensor([bank.labels.index(name) for name in task.shot_labels()])
        encoder.forget()
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

    def prepare_zero_shot(self, test: ImageSet) -> None:
        """Scores bare prompts, unless their errors are on disk; neither shots nor seed matter."""
        path, made_by = self._zero_shot_file(test)
        if kept_tensors(path, made_by) is not None:
            return
        bank = zero_shot_bank(self.backbone, test.class_names, self.geometry, self.concept)
        settings = Settings(self.training(1, 0), self.scoring(0), recommended(1, self.backbone.kind).prediction)
        generic = self._encoder.generic_prompt
        fit = Fit(encoder=self._encoder, prompts=Prompts(template="", generic=generic), settings=settings, groups={})
        times = even_grid(settings.scoring.trials, *settings.scoring.timesteps)
        start = perf_counter()
        errors = shared_errors(fit, bank, test.decoded(), times)
        save_errors(path, {"errors": errors, "seconds": torch.tensor(perf_counter() - start)}, made_by)

    def diti(self, task: Task) -> DitiErrors:
        """What `prepare` left; raises FileNotFoundError where it failed."""
        path, made_by = self._diti_file(task)
        kept = kept_tensors(path, made_by)
        if kept is None:
            raise FileNotFoundError(f"{path} is missing: the class tokens could not be trained or scored.")
        seconds = kept.pop("seconds").tolist()
        out_of_fold = bool(kept.pop("out_of_fold"))
        return DitiErrors(**kept, out_of_fold=out_of_fold, training_seconds=seconds[0], scoring_seconds=seconds[1])

    def zero_shot(self, test: ImageSet) -> tuple[Tensor, float]:
        """Errors [N, C, S] that `prepare_zero_shot` left, and the seconds that they took."""
        path, made_by = self._zero_shot_file(test)
        kept = kept_tensors(path, made_by)
        if kept is None:
            raise FileNotFoundError(f"{path} is missing: the bare prompts could not be scored.")
        return kept["errors"], float(kept["seconds"])

    def _diti_file(self, task: Task) -> tuple[Path, dict[str, str]]:
        settings = f"{self.training(task.num_shots, task.seed)} {self.error_settings(task.seed)} {FOLDS} {self.concept}"
        path = self.folder / f"diti-{task.num_shots}-{task.seed}.safetensors"
        return path, self.made_by(settings, fingerprint(task.shots), fingerprint(task.test))

    def _zero_shot_file(self, test: ImageSet) -> tuple[Path, dict[str, str]]:
        return self.folder / "zero-shot.safetensors", self.made_by(
            f"{self.error_settings(0)} {self.concept}", fingerprint(test)
        )

    def made_by(self, settings: str, *images: str) -> dict[str, str]:
        """What decides a file of kept errors."""
        version = metadata.version("fewshot-diti")
        backbone = f"{self.backbone.hash} in {self.backbone.dtype}"
        return {"fewshot_diti": version, "backbone": backbone, "settings": settings, "images": " ".join(images)}


def _columns(features: Features, dims: slice, images: Sequence[ImageSource], *, keep: bool = True) -> np.ndarray:
    return features(images, keep=keep)[:, dims]
