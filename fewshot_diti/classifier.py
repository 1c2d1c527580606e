"""The classifier: fit on a few images per class, predict, extend, save."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import NotFittedError

from fewshot_diti.backbone import Backbone, CompileMode
from fewshot_diti.backbone_files import POCKET
from fewshot_diti.backbone_search import find_backbone, remember_folder
from fewshot_diti.bank import Bank
from fewshot_diti.bank_files import written_here
from fewshot_diti.calibration import Calibration, calibrate, uncalibrated
from fewshot_diti.checkpoints import Checkpoints
from fewshot_diti.classifier_files import Saved, load_classifier, load_witnesses, save_classifier
from fewshot_diti.config import Label, PredictionConfig, ScoringConfig, Settings, TrainingConfig
from fewshot_diti.cost import announce_time, training_evaluations
from fewshot_diti.data.arguments import group_shots
from fewshot_diti.data.images import ImageGeometry, ImageSource
from fewshot_diti.decider import Decider
from fewshot_diti.distributed import process_state
from fewshot_diti.encoding import Encoder
from fewshot_diti.folds import Fit
from fewshot_diti.hub import saved_folder, upload
from fewshot_diti.prediction import PredictionMixin
from fewshot_diti.presets import PRESETS, complete
from fewshot_diti.prompts import Prompts
from fewshot_diti.training import Groups, OnStep, most_shots, raise_failed
from fewshot_diti.weighting import fixed_weights
from fewshot_diti.witnesses import FittedWitness, Witness, fit_witnesses, make_witness


class DiTiClassifier(PredictionMixin, ClassifierMixin, BaseEstimator):
    """A few-shot classifier on the denoising errors of a Stable Diffusion, with the API of scikit-learn.

    Witnesses, where they have a weight, decide together with the class tokens: the frozen U-Net's own features of an
    image, a network that was trained on ImageNet and is fine-tuned on the shots (both are recommended for small
    backbones), CLIP. What they have read of the shots and what they have learned is kept with the bank.

    Args:
        backbone: "pocket", a folder, a hub id, or a loaded `Backbone`.
        concept: what all classes are, in the singular, such as "bird"; it enters the prompts. The pocket knows aircraft
            alone; with other backbones it has to be given, or the prompts; the witnesses clip and tip-adapter need it.
        prompt_template: prompt of a class token, `{}` standing for the class; without `{}` all classes share one prompt
            and differ in their LoRA alone. By default with the rare word before the class (TiF, section 4.1).
        generic_prompt: prompt of the prior images.
        training: how class tokens are trained; what is not given is recommended for the backbone and number of shots.
        scoring: what a score is, fixed by `fit`. The recommended one has a fixed temperature; with folds and
            temperature="fit" it is fitted on held-out shots, so that probabilities suit the classes at hand, for one
            more training per fold.
        prediction: how an image is decided; may be changed between predictions.
        geometry: size and resize rule; by default the backbone's size, cropped.
        witnesses: a short way to say `ScoringConfig(witnesses=...)`.

    As in scikit-learn, what is set after `fit` counts from the next `fit` on. Three differ: `prediction` counts at
    once, `training` when classes are added, and a prediction refuses a scoring that is not the fitted one.

    Attributes:
        classes_: the labels, sorted.
        calibration_: weights of the trials and temperature.
        settings_: the three configurations as `fit` completed them.
        witnesses_: by name.
        backbone_: loaded.
        geometry_: completed.
        prompts_: completed.
        complete_: whether all that `fit` does was done.
    """

    calibration_: Calibration
    settings_: Settings
    backbone_: Backbone
    geometry_: ImageGeometry
    prompts_: Prompts
    witnesses_: dict[str, Witness]
    complete_: bool = False
    _concept: str | None = None
    _held: tuple[Bank | None, tuple[FittedWitness, ...]] = (None, ())
    _made: Decider | None = None

    def __init__(
        self,
        backbone: str | Path | Backbone = POCKET,
        *,
        concept: str | None = None,
        prompt_template: str | None = None,
        generic_prompt: str | None = None,
        training: TrainingConfig | None = None,
        scoring: ScoringConfig | None = None,
        prediction: PredictionConfig | None = None,
        geometry: ImageGeometry | None = None,
        witnesses: Sequence[str] | None = None,
    ) -> None:
        self.backbone = backbone
        self.concept = concept
        self.prompt_template = prompt_template
        self.generic_prompt = generic_prompt
        self.training = training
        self.scoring = scoring
        self.prediction = prediction
        self.geometry = geometry
        self.witnesses = witnesses

    def fit(
        self,
        images: Sequence[ImageSource],
        labels: Sequence[Label],
        *,
        checkpoints: Checkpoints | None = None,
        on_step: OnStep | None = None,
    ) -> Self:
        """Learns one class token per label from the shots.

        Args:
            images: paths, PIL images or uint8 arrays.
            labels: one str, int or bool per image, at least two different ones.
            checkpoints: where a `fit` that is cut short leaves its work: called again with the same shots and settings,
                it goes on from there, to the same classifier. They are yours to discard once that is saved.
            on_step: called with (step, losses, bank) after each step of the class tokens, not of those of the folds:
                the step from 1, the loss of each class, and a function that gives the bank as it is then.

        Raises:
            ValueError: lengths differ, labels of mixed type, fewer than two classes, one image under two labels, or
                settings that do not go together or with the backbone.
            TrainingError: a class's loss was not finite; the classifier holds the other classes. Or it was so in
                cross-validation; the classifier holds all classes, uncalibrated.

        Where a class has one shot nothing can be held out, so `auto` and a temperature to fit fall back to those of the
        preset, with a warning. With a large backbone on a CPU it first prints how long it will take.
        """
        before = dict(self.__dict__)
        try:
            self._load()
            groups = group_shots(images, labels, self.encoder_.prepare)
            if len(groups) < 2:
                raise ValueError(f"A classifier needs images of two classes or more, got {list(groups)}.")
            self.settings_ = self.checked_settings(most_shots(groups))
        except BaseException:  # a fit that is refused leaves the classifier as it was
            self.__dict__.clear()
            self.__dict__.update(before)
            raise
        self._hold(None)
        training, scoring, _ = self.settings_
        shots = sum(len(x) for x in groups.values())
        evaluations = training_evaluations(training, scoring, shots, len(groups))
        announce_time(self.backbone_, self.geometry_.size, evaluations, "training")
        try:
            failed = self._learn(groups, checkpoints, on_step)
            learned = {x: g for x, g in groups.items() if x not in failed}
            # whatever happens from here on, the class tokens can be used
            self.calibration_ = uncalibrated(self.backbone_, self.settings_, most_shots(groups))
            try:
                if learned:
                    self.calibration_ = calibrate(self._fit(learned, checkpoints), self._fitted(), self._held[1])
                    self.complete_ = not failed
            finally:  # whatever else went wrong, the classes that failed are named
                raise_failed(failed)
        finally:
            self.encoder_.forget()
        return self

    def add_classes(
        self, images: Sequence[ImageSource], labels: Sequence[Label], *, checkpoints: Checkpoints | None = None
    ) -> Self:
        """Adds classes; the class tokens that are there already, and the calibration, stay as they are to the bit.

        Args:
            checkpoints: as in `fit`.

        Witnesses learn all classes anew, from what they have kept of the shots; a network takes as long as in `fit`.

        Raises:
            ValueError: as `fit`, a class that the bank has already, or witnesses count and the bank has none.
        """
        bank = self._fitted()
        groups = group_shots(images, labels, self.encoder_.prepare)
        if len(bank) and type(next(iter(groups))) is not type(bank.labels[0]):
            raise ValueError(f"Labels are {type(bank.labels[0]).__name__} in the bank, got {list(groups)}.")
        known = [x for x in groups if x in bank.labels]
        if known:
            raise ValueError(f"Classes {known} are in the bank already; call remove_classes first, or leave them out.")
        prediction = self.current_prediction()
        if len(bank):
            self.decider().check_witnesses(prediction)
        try:
            raise_failed(self._learn(groups, checkpoints))
        finally:
            self.encoder_.forget()
        return self

    def remove_classes(self, labels: Sequence[Label]) -> Self:
        """Takes classes out of the bank; other class tokens, and the calibration, stay as they are to the bit.

        Raises:
            ValueError: a class is not in the bank.
        """
        self.bank_ = self._fitted().remove(labels)
        return self

    @property
    def classes_(self) -> np.ndarray:
        """The labels in the order of `predict_proba`'s columns."""
        return np.array(self._fitted().labels)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the bank with the classifier's settings and witnesses beside it.

        With the witness "network" that includes the shots, in the size that the network reads, since it learns them
        again when a class is added. `bank_.save_pretrained` writes class tokens alone.

        Of several processes the main one writes, and none waits for it: after a failure the others may be anywhere.
        """
        self._fitted()
        bank, witnesses = self._held  # of one moment, whatever classes another thread adds meanwhile
        assert bank is not None
        settings = self.settings_._replace(prediction=self.current_prediction())
        saved = Saved(
            concept=self._concept,
            prompts=self.prompts_,
            given_training=self.training,
            given_scoring=self._given_scoring(),
            settings=settings,
            calibration=self.calibration_,
            complete=self.complete_,
            models={name: witness.model for name, witness in self.witnesses_.items()},
        )
        if process_state().is_main_process:
            save_classifier(bank, saved, witnesses, folder)
            remember_folder(self.backbone_)

    def push_to_hub(self, repo_id: str, *, commit_message: str = "Upload classifier", **options: Any) -> Any:
        """Uploads what `save_pretrained` writes to `user/repo`: with the witness "network" that includes the shots.

        Args:
            options: as of `hub.upload`: private, token, revision, create_pr.
        """
        return upload(self.save_pretrained, repo_id, commit_message=commit_message, **options)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        backbone: str | Path | Backbone | None = None,
        *,
        dtype: torch.dtype | str = "auto",
        compile: CompileMode | None = None,
        **hub: Any,
    ) -> Self:
        """Loads what `save_pretrained` wrote; without `backbone` the one that the bank names.

        Args:
            folder: or `user/repo` on the hub.
            dtype, compile: as of `Backbone.from_pretrained`, where `backbone` is not loaded yet.
            hub: as of `hub.saved_folder`: revision, token, cache_dir, local_files_only, force_download.

        A bank that `Bank.save_pretrained` wrote, such as a merged one, has no settings: with a warning it gets the
        recommended scoring, uncalibrated and without features, and default prompts for classes that are added later.

        Raises:
            FileNotFoundError: no complete classifier in the folder, or the backbone that it names is not there.
            ValueError: a file was changed or cut short, or the backbone is not the bank's.
        """
        folder = saved_folder(folder, **hub)
        bank, saved, contents = load_classifier(folder)
        if backbone is None:
            backbone = find_backbone(bank.backbone_name, bank.backbone_hash, dtype=dtype, compile=compile)
        elif not isinstance(backbone, Backbone):
            backbone = Backbone.from_pretrained(backbone, dtype=dtype, compile=compile)
        if saved is not None:
            with written_here(folder):
                saved.check_schedule(backbone.num_train_timesteps)
        classifier = cls(backbone, geometry=bank.geometry)
        if saved is None:
            classifier.scoring = ScoringConfig(witnesses=())
            classifier.concept = "object"  # in prompts of classes that are added
        else:
            classifier.concept, classifier.training = saved.concept, saved.given_training
            classifier.prompt_template, classifier.generic_prompt = saved.prompts.template, saved.prompts.generic
            classifier.scoring, classifier.prediction = saved.given_scoring, saved.settings.prediction
        classifier._load(saved.settings.scoring.witnesses if saved else ())
        bank.check_backbone(classifier.backbone_)
        kind, most = classifier.backbone_.kind, max([1, *(token.num_shots for token in bank.tokens)])
        classifier.settings_ = saved.settings if saved else complete(kind, most, scoring=classifier.scoring)
        calibration = saved.calibration if saved else uncalibrated(classifier.backbone_, classifier.settings_, most)
        classifier.calibration_, classifier.complete_ = calibration, saved is not None and saved.complete
        known = load_witnesses(folder, contents, bank.labels, classifier.witnesses_, saved.models) if saved else ()
        classifier._hold(bank, known)
        return classifier

    def __sklearn_is_fitted__(self) -> bool:
        return self.bank_ is not None

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False  # images, not rows of features
        tags.no_validation = True
        return tags

    def _load(self, witnesses: Sequence[str] | None = None) -> None:
        """Backbone, geometry, prompts, and witnesses by their names, or those of the scoring."""
        given = self.backbone
        self.backbone_ = given if isinstance(given, Backbone) else Backbone.from_pretrained(given)
        self.geometry_ = self.geometry or ImageGeometry(size=self.backbone_.image_size)
        self.backbone_.check_image_size(self.geometry_.size)
        self._concept = self.concept  # as it is saved, whatever is set later
        concept = self.concept or PRESETS[self.backbone_.kind].concept
        self.prompts_ = Prompts.complete(self.prompt_template, self.generic_prompt, concept)
        names = self.settings_for(1).scoring.witnesses if witnesses is None else witnesses
        kind = self.backbone_.kind
        self.witnesses_ = {name: make_witness(name, self.geometry_, concept, kind) for name in names}
        others = [witness.geometry for witness in self.witnesses_.values() if witness.geometry is not None]
        self.encoder_ = Encoder(self.backbone_, self.geometry_, self.prompts_.generic, others)
        self.complete_, self._warned = False, False

    def settings_for(self, num_shots: int) -> Settings:
        """The configurations that `fit` would use for so many shots per class; the backbone is loaded."""
        kind = (self.backbone if isinstance(self.backbone, Backbone) else self.backbone_).kind
        return complete(kind, num_shots, self.training, self._given_scoring(), self.prediction)

    def _given_scoring(self) -> ScoringConfig:
        """The scoring as it is given, with `witnesses` in it."""
        scoring = self.scoring or ScoringConfig()
        return scoring if self.witnesses is None else scoring.with_witnesses(self.witnesses)

    def checked_settings(self, num_shots: int) -> Settings:
        """As `settings_for`; raises ValueError where they do not go together or with the backbone."""
        if not hasattr(self, "backbone_"):
            self._load()
        settings = self.settings_for(num_shots)
        settings.check(self.backbone_.num_train_timesteps)
        fixed_weights(settings.scoring.weighting, self.backbone_.alphas_cumprod)  # refuses an impossible window
        return settings

    def current_prediction(self) -> PredictionConfig:
        """The prediction as it is asked for now.

        Raises:
            ValueError: a field of the scoring is given, and is another one than `fit` calibrated for.
        """
        given, fitted = self._given_scoring(), self.settings_.scoring
        given.check_unchanged(fitted)
        prediction = (self.prediction or PredictionConfig()).resolve(PRESETS[self.backbone_.kind].prediction)
        Settings(self.settings_.training, fitted, prediction).check(self.backbone_.num_train_timesteps)
        return prediction

    def _fitted(self) -> Bank:
        bank = self.bank_
        if bank is None:
            raise NotFittedError("This classifier has no class tokens yet; call fit, or load one with from_pretrained.")
        return bank

    @property
    def bank_(self) -> Bank | None:
        """The class tokens, in the order of `classes_`; None before `fit`."""
        return self._held[0]

    @bank_.setter
    def bank_(self, bank: Bank | None) -> None:
        self._hold(bank, self._held[1])

    def _hold(self, bank: Bank | None, witnesses: Sequence[FittedWitness] = ()) -> None:
        """Takes a bank, and the witnesses that know its classes, in its order; at once, for threads that predict."""
        labels = bank.labels if bank else ()
        self._held = bank, tuple(x.select(labels) for x in witnesses if set(labels) <= set(x.shots))

    def decider(self) -> Decider:
        """The bank ready to decide, made anew where the bank or the calibration is another one."""
        (bank, witnesses), known = self._held, self._made
        if bank is None or not len(bank):
            self._fitted()
            raise NotFittedError("All class tokens were removed; add some with add_classes.")
        same = known is not None and known.bank is bank and known.witnesses is witnesses
        if known is None or not same or known.calibration is not self.calibration_:
            scoring = self.settings_.scoring
            self._made = known = Decider(self.encoder_, bank, scoring, self.calibration_, witnesses)
        return known

    def _fit(self, groups: Groups, checkpoints: Checkpoints | None = None) -> Fit:
        settings = self.settings_for(most_shots(groups))._replace(scoring=self.settings_.scoring)  # fixed by `fit`
        prompts, encoder = self.prompts_, self.encoder_
        return Fit(encoder=encoder, prompts=prompts, settings=settings, groups=groups, checkpoints=checkpoints)

    def _learn(
        self, groups: Groups, checkpoints: Checkpoints | None = None, on_step: OnStep | None = None
    ) -> dict[Label, int]:
        """Trains class tokens and puts them into the bank; returns the classes that failed."""
        fit = self._fit(groups, checkpoints)
        witnesses = self._witnesses_of(fit)  # first: a failure loses no training
        new, failed = fit.train(groups, on_step=on_step)
        if not len(new):
            raise_failed(failed)
        bank = new if self.bank_ is None else self.bank_.merge(new)
        self._hold(bank.select(sorted(bank.labels)), witnesses)
        return failed

    def _witnesses_of(self, fit: Fit) -> list[FittedWitness]:
        """The witnesses, where some prediction may use them, of the bank's classes and of those of the fit."""
        bank, fitted = self._held
        later, training = replace(fit.settings.prediction, use_witnesses=True), fit.settings.training
        if not (fitted if bank is not None and len(bank) else fit.settings.scoring.uses_witnesses(later)):
            return []
        return fit_witnesses(self.witnesses_, self.encoder_, fit.groups, training, fitted, fit.checkpoints)
