"""The classifier: fit on a few images a class, predict, extend, save."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import NotFittedError
from sklearn.metrics import accuracy_score
from torch import Tensor

from fewshot_diti.backbone import POCKET, Backbone, load_backbone
from fewshot_diti.bank import Bank, plain_labels
from fewshot_diti.calibration import Calibration, calibrate, fixed_weights, uncalibrated
from fewshot_diti.cost import announce_time, training_evaluations
from fewshot_diti.data.arguments import as_images, as_list, group_shots
from fewshot_diti.data.images import ImageGeometry, ImageSource, image_id
from fewshot_diti.elimination import Elimination
from fewshot_diti.features import Discriminant, fit_discriminant, score_offsets
from fewshot_diti.learning import Learner, raise_failed
from fewshot_diti.processes import process_state
from fewshot_diti.prompts import with_article
from fewshot_diti.recommended import ScoringConfig, recommended_scoring
from fewshot_diti.saved import FEATURES_FILE, SETTINGS_FILE, features_file, read_features, read_settings, settings_file
from fewshot_diti.scoring import Scorer, decide, error_tensor
from fewshot_diti.training import Label, TrainingConfig

_FEATURES_AT_ONCE = 64  # images whose features are held in memory


class DiTiClassifier:
    """A few-shot classifier on the denoising errors of a Stable Diffusion.

    Where `scoring` asks for it (as is recommended for small backbones), the frozen U-Net's own features of an image
    have a say beside the class tokens; those of the shots and of three copies in other colours are then kept with the
    bank (8 x 16 values a channel: 655 KB a shot with Stable Diffusion 2.0 at 512 pixels).

    Args:
        backbone: "pocket", a folder, a hub id, or a loaded `Backbone`.
        concept: what all classes are, in the singular; it enters the prompts.
        prompt_template: prompt of a class token, `{}` standing for the class; without `{}` all classes share one prompt
            and differ in their LoRA alone. By default with the rare word before the class (TiF, section 4.1).
        generic_prompt: prompt of the prior images.
        training, scoring: by default what the package recommends for this backbone and number of shots. That takes a
            fixed temperature; a scoring with folds and temperature=None fits one on held-out shots, so that
            probabilities suit the classes at hand, for one more training a fold.
        geometry: size and resize rule; by default the backbone's size, cropped.

    Attributes:
        classes_: the labels, sorted, after `fit`.
        bank_: the class tokens, in the order of `classes_`, after `fit`.
        calibration_: weights and temperature, after `fit`.
    """

    def __init__(
        self,
        backbone: str | Path | Backbone = POCKET,
        *,
        concept: str = "aircraft",
        prompt_template: str | None = None,
        generic_prompt: str | None = None,
        training: TrainingConfig | None = None,
        scoring: ScoringConfig | None = None,
        geometry: ImageGeometry | None = None,
    ) -> None:
        self.backbone = backbone if isinstance(backbone, Backbone) else Backbone.from_pretrained(backbone)
        self.concept, self.training = concept, training
        self.prompt_template = prompt_template or f"a photo of a hta {{}}, a type of {concept}."
        self.generic_prompt = generic_prompt or f"a photo of {with_article(concept)}"
        self.scoring = scoring or recommended_scoring(small=self.backbone.small)
        self.geometry = geometry or ImageGeometry(size=self.backbone.image_size)
        self.backbone.check_image_size(self.geometry.size)
        if self.scoring.timesteps[1] > self.backbone.num_train_timesteps:
            raise ValueError(
                f"Scoring at timesteps={self.scoring.timesteps} exceeds the {self.backbone.num_train_timesteps} "
                f"time-steps of backbone {self.backbone.name!r}; pass (lo, hi) inside its schedule."
            )
        fixed_weights(self.scoring.weighting, self.backbone.alphas_cumprod)  # refuses a window beyond the schedule
        self._shot_features: dict[Label, Tensor] = {}  # of each class, where the scoring asks for them
        self._decisions: dict[tuple[str, ScoringConfig, Calibration], Elimination] = {}
        self._scorer: Scorer | None = None
        self._discriminant: Discriminant | None = None

    @property
    def learner(self) -> Learner:
        """What trains banks with this classifier's settings."""
        return Learner(
            backbone=self.backbone,
            geometry=self.geometry,
            prompt_template=self.prompt_template,
            generic_prompt=self.generic_prompt,
            training=self.training,
            scoring=self.scoring,
        )

    def fit(self, images: Sequence[ImageSource], labels: Sequence[Label]) -> DiTiClassifier:
        """Learns one class token a label from the shots.

        Args:
            images: paths, PIL images or uint8 arrays.
            labels: one str, int or bool an image, at least two different ones.

        Raises:
            ValueError: lengths differ, labels of mixed type, fewer than two classes, or one image under two labels.
            TrainingError: a class's loss was not finite; the classifier holds the other classes. Or it was so in
                cross-validation; the classifier holds all classes, uncalibrated.

        Where a class has one shot nothing can be held out, so `auto` and a temperature of None fall back to what the
        package recommends for the backbone, with a warning. With a large backbone on a CPU it first says how long it
        will take.
        """
        groups = group_shots(images, labels)
        if len(groups) < 2:
            raise ValueError(f"A classifier needs images of two classes or more, got {list(groups)}.")
        self._set_bank(None)
        learner = self.learner
        shots = sum(len(x) for x in groups.values())
        evaluations = training_evaluations(learner.config(groups), self.scoring, shots, len(groups))
        announce_time(self.backbone, self.geometry.size, evaluations, "training")
        failed = self._learn(groups, learner)
        learned = {x: g for x, g in groups.items() if x not in failed}
        self.calibration_ = uncalibrated(learner)  # whatever happens from here on, the class tokens can be used
        try:
            if learned:
                self.calibration_ = calibrate(learner, self._fitted(), learned, self._shot_features)
        finally:  # whatever else went wrong, the classes that failed are named
            raise_failed(failed)
        return self

    def partial_fit(self, images: Sequence[ImageSource], labels: Sequence[Label]) -> DiTiClassifier:
        """Adds classes; the class tokens that are there already, and the calibration, stay as they are to the bit.

        What the U-Net's own features say, where the scoring asks for them, is always relative to all classes.

        Raises:
            ValueError: as `fit`, a class that the bank has already, or the scoring asks for features and the bank was
                learned without.
        """
        if self.bank_ is None:
            return self.fit(images, labels)
        groups = group_shots(images, labels)
        if len(self.bank_) and type(next(iter(groups))) is not type(self.bank_.labels[0]):
            raise ValueError(f"Labels are {type(self.bank_.labels[0]).__name__} in the bank, got {list(groups)}.")
        known = [x for x in groups if x in self.bank_.labels]
        if known:
            raise ValueError(f"Classes {known} are in the bank already; call remove first, or leave them out.")
        self._check_features()
        raise_failed(self._learn(groups, self.learner))
        return self

    def remove(self, labels: Sequence[Label]) -> DiTiClassifier:
        """Takes classes out of the bank; the others, and the calibration, stay as they are to the bit.

        Raises:
            ValueError: a class is not in the bank.
        """
        self._set_bank(self._fitted().remove(labels), self._shot_features)
        return self

    bank_: Bank | None = None
    calibration_: Calibration

    @property
    def classes_(self) -> np.ndarray:
        """The labels in the order of `predict_proba`'s columns."""
        return np.array(self._fitted().labels)

    def predict(self, images: ImageSource | Sequence[ImageSource]) -> Any:
        """The label of one image, or an array of labels of many."""
        one, many = as_list(images)
        labels = self.classes_[[decision.label for decision in self.decide(many)]]
        return labels[0].item() if one else labels

    def predict_proba(self, images: ImageSource | Sequence[ImageSource]) -> np.ndarray:
        """Probabilities [N, C], or [C] for one image: softmax of -score / temperature."""
        one, many = as_list(images)
        p = self.probabilities(self.scores(many))
        return p[0] if one else p

    def probabilities(self, scores_NC: Tensor) -> np.ndarray:
        """Probabilities [N, C] of scores [N, C]."""
        return (-scores_NC / self.calibration_.temperature).softmax(1).numpy()

    def score(self, images: Sequence[ImageSource], labels: Sequence[Label]) -> float:
        """Accuracy, 0 to 1.

        Raises:
            ValueError: not one label an image, or labels of another type than the classes.
        """
        images, values = as_images(images), plain_labels(labels)
        if len(values) != len(images):
            raise ValueError(f"{len(images)} images but {len(values)} labels; pass one label an image.")
        known = {type(x).__name__ for x in self._fitted().labels}
        if others := {type(x).__name__ for x in values} - known:
            raise ValueError(f"Labels are {', '.join(known)} in the bank, got {', '.join(sorted(others))}.")
        return float(accuracy_score(values, self.predict(images)))

    def scores(self, images: Sequence[ImageSource]) -> Tensor:
        """Scores [N, C], float64; the smallest wins. Infinite for a class off the shortlist."""
        return torch.stack([decision.scores for decision in self.decide(images)])

    def decide(self, images: Sequence[ImageSource]) -> list[Elimination]:
        """Winner (a position in `classes_`), scores and cost of each image, in the way that `scoring.decide` names.

        An image decided before is not scored again.
        """
        scorer, calibration = self._ready(), self.calibration_
        keys = [(image_id(x), self.scoring, calibration) for x in images]
        new = {key: x for key, x in zip(keys, images, strict=True) if key not in self._decisions}
        if new:
            latents = self.learner.encode(list(new.values()))
            weights = torch.tensor(calibration.weights, dtype=torch.float64)
            stages, offsets = self.scoring.schedule(len(scorer.bank)), self.offsets(latents)
            decisions = decide(scorer, latents, [i for i, *_ in new], calibration.timesteps, weights, stages, offsets)
            if offsets is not None:  # one evaluation gave the features
                decisions = [x._replace(evaluations=x.evaluations + 1) for x in decisions]
            self._decisions |= dict(zip(new, decisions, strict=True))
        return [self._decisions[key] for key in keys]

    def offsets(self, latents_Nchw: Tensor) -> Tensor | None:
        """What the U-Net's own features add to the scores [N, C]; None where the scoring does not ask for them."""
        if not self.scoring.asks_features or len(self._fitted()) < 2:
            return None
        self._check_features()
        if self._discriminant is None:
            self._discriminant = fit_discriminant(self._shot_features)
        learner, discriminant = self.learner, self._discriminant
        log_p = [
            discriminant.log_probabilities(learner.features(part)) for part in latents_Nchw.split(_FEATURES_AT_ONCE)
        ]
        return score_offsets(torch.cat(log_p), self.scoring.features_weight, self.scoring.shortlist)

    def _check_features(self) -> None:
        if self.scoring.asks_features and set(self._shot_features) != set(self._fitted().labels):
            raise ValueError(
                f"features_weight={self.scoring.features_weight} and shortlist={self.scoring.shortlist} ask for "
                "features of the shots, and this bank has not those of every class: it was learned without. Set "
                "features_weight=0 and shortlist=None in the scoring, or fit again."
            )

    def errors(self, images: Sequence[ImageSource]) -> Tensor:
        """The error tensor [N, C, S] at the calibrated trials, of every class."""
        ids = [image_id(x) for x in images]
        return error_tensor(self._ready(), self.learner.encode(images), ids, self.calibration_.timesteps)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the bank with the classifier's settings beside it; of several processes the main one does, and none
        waits for it: after a failure the others may be anywhere."""
        bank = self._fitted()
        names = ("concept", "prompt_template", "generic_prompt", "scoring", "training")
        if process_state().is_main_process:
            extra = {SETTINGS_FILE: settings_file({x: getattr(self, x) for x in names}, self.calibration_)}
            if self._shot_features.keys() == set(bank.labels):
                extra[FEATURES_FILE] = features_file(self._shot_features, bank.labels)
            bank.save(folder, extra=extra)

    @classmethod
    def from_pretrained(cls, folder: str | Path, backbone: str | Path | Backbone | None = None) -> DiTiClassifier:
        """Loads what `save_pretrained` wrote; without `backbone` the one that the bank names.

        A bank that `Bank.save` wrote, such as a merged one, has no settings: with a warning it gets the recommended
        scoring, uncalibrated and without features, and the default prompts for classes that are added later.

        Raises:
            FileNotFoundError: no complete classifier in the folder, or the backbone that it names is not there.
            ValueError: a file was changed or cut short, or the backbone is not the bank's.
        """
        bank = Bank.load(folder)
        arguments, calibration = read_settings(folder)
        shot_features = read_features(folder, bank.labels)
        try:
            found = load_backbone(bank.backbone_name) if backbone is None else backbone
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"The backbone of the bank in {folder} is not there; pass backbone= with its folder or hub id. {error}"
            ) from error
        classifier = cls(found, geometry=bank.geometry, **arguments)
        bank.check_backbone(classifier.backbone)
        if calibration is None:  # what is recommended asks for features
            classifier.scoring = replace(classifier.scoring, features_weight=0.0, shortlist=None)
        classifier.calibration_ = calibration or uncalibrated(classifier.learner)
        classifier._set_bank(bank, shot_features)
        return classifier

    def _fitted(self) -> Bank:
        if self.bank_ is None:
            raise NotFittedError("This classifier has no class tokens yet; call fit, or load one with from_pretrained.")
        return self.bank_

    def _set_bank(self, bank: Bank | None, shot_features: Mapping[Label, Tensor] | None = None) -> None:
        known = shot_features or {}
        self.bank_, self._shot_features = bank, {x: known[x] for x in (bank.labels if bank else ()) if x in known}
        self._scorer, self._discriminant, self._decisions = None, None, {}

    def _ready(self) -> Scorer:
        if not len(self._fitted()):
            raise NotFittedError("All class tokens were removed; add some with partial_fit.")
        made_for = None if self._scorer is None else (self._scorer.seed, self._scorer.batch_size)
        if self._scorer is None or made_for != (self.scoring.seed, self.scoring.batch_size):
            self._scorer = self.learner.scorer(self._fitted())
        return self._scorer

    def _learn(self, groups: dict[Label, list[ImageSource]], learner: Learner) -> dict[Label, int]:
        """Trains class tokens and puts them into the bank; returns the classes that failed."""
        features = self._shot_features | learner.shot_features(groups)  # first: a failure loses no training
        new, failed = learner.train(groups)
        if not len(new):
            raise_failed(failed)
        bank = new if self.bank_ is None else self.bank_.merge(new)
        self._set_bank(bank.select(sorted(bank.labels)), features)
        return failed
