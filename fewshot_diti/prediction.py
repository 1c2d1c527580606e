"""How a fitted classifier answers: labels, probabilities, sets of classes, what is unknown, and why.

Shapes in names: N images, C classes, S trials.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.metrics import accuracy_score
from torch import Tensor

from fewshot_diti.backbone import Backbone
from fewshot_diti.calibration import Calibration
from fewshot_diti.config import Label, PredictionConfig
from fewshot_diti.conformal import prediction_sets
from fewshot_diti.data.arguments import as_images, as_list, check_one_each, true_labels
from fewshot_diti.data.images import ImageSource
from fewshot_diti.decider import Decider
from fewshot_diti.elimination import Decision
from fewshot_diti.encoding import Encoder, PreparedImage
from fewshot_diti.explain import Explanation, explain
from fewshot_diti.pipeline import ImageClassificationPipeline
from fewshot_diti.presets import PRESETS


class PredictionMixin:
    """What `DiTiClassifier` does with images once it is fitted."""

    calibration_: Calibration
    backbone_: Backbone
    encoder_: Encoder
    _warned = False

    @abstractmethod
    def decider(self) -> Decider:
        """The bank ready to decide."""

    @abstractmethod
    def current_prediction(self) -> PredictionConfig:
        """How an image is decided now."""

    @property
    @abstractmethod
    def classes_(self) -> np.ndarray:
        """The labels in the order of `predict_proba`'s columns."""

    def predict(self, images: ImageSource | Iterable[ImageSource]) -> Any:
        """The label of one image, or an array of labels of many."""
        one, many = as_list(images)
        decider = self.decider()  # of one bank, whatever classes another thread adds meanwhile
        decisions = decider.decide(as_images(many), self.current_prediction())
        labels = np.array(decider.bank.labels)[[decision.position for decision in decisions]]
        return labels[0].item() if one else labels

    def predict_proba(self, images: ImageSource | Iterable[ImageSource]) -> np.ndarray:
        """Probabilities [N, C], or [C] for one image: softmax of -score / temperature."""
        one, many = as_list(images)
        _, p = self.labelled_probabilities(many)
        return p[0] if one else p

    def labelled_probabilities(self, images: Iterable[ImageSource]) -> tuple[list[Label], np.ndarray]:
        """Labels [C], and probabilities [N, C] in their order, whatever classes another thread adds meanwhile."""
        decider = self.decider()
        decisions = decider.decide(as_images(images), self.current_prediction())
        return list(decider.bank.labels), self.probabilities(torch.stack([decision.scores for decision in decisions]))

    def predict_set(self, images: ImageSource | Iterable[ImageSource], coverage: float = 0.9) -> Any:
        """The classes that an image may belong to, the most probable first: a list for one image, a list of lists for
        many (split conformal prediction, `conformal.prediction_sets`).

        Of images like the shots a share `coverage` have their class in the set, about: the threshold comes from shots
        that class tokens trained without them judged, on fewer shots than those of this bank.

        Raises:
            ValueError: no held-out shots, which `fit` has with `ScoringConfig(folds=...)`, or `coverage` is no share.
        """
        one, many = as_list(images)
        labels, p = self.labelled_probabilities(many)
        sets = prediction_sets(torch.from_numpy(p), self.calibration_.held_out, coverage)
        found = [[labels[c] for c in places] for places in sets]
        return found[0] if one else found

    def probabilities(self, scores_NC: Tensor) -> np.ndarray:
        """Probabilities [N, C] of scores [N, C]."""
        if self.calibration_.temperature_from == "preset" and not PRESETS[self.backbone_.kind].measured:
            if not self._warned:
                warnings.warn(
                    f"The temperature {self.calibration_.temperature} is a guess, not measured on backbones like "
                    f"{self.backbone_.name!r}: labels do not depend on it, probabilities do. Fit it on the shots with "
                    "ScoringConfig(folds=3, temperature='fit').",
                    stacklevel=3,
                )
            self._warned = True
        temperature = self.decider().temperature(self.current_prediction())
        return (-scores_NC / temperature).softmax(1).numpy()

    def score(self, images: Iterable[ImageSource], labels: Sequence[Label], sample_weight: Any = None) -> float:
        """Accuracy, 0 to 1.

        Raises:
            ValueError: not one label per image, or labels of another type than the classes.
        """
        images, values = true_labels(images, labels, self.classes_.tolist())
        predicted = self.predict(images)
        check_one_each(len(predicted), len(values))
        return float(accuracy_score(values, predicted, sample_weight=sample_weight))

    def scores(self, images: Iterable[ImageSource]) -> Tensor:
        """Scores [N, C], float64; the smallest wins. Infinite for a class off the shortlist."""
        return torch.stack([decision.scores for decision in self.decide(images)])

    def decide(self, images: Iterable[ImageSource | PreparedImage]) -> list[Decision]:
        """Winner (a position in `classes_`), scores and cost of each image, by the schedule of `prediction`.

        Images are decoded and decided some at a time. The last 128 decisions are remembered. Threads may call it at the
        same time: one after the other uses the backbone.

        Raises:
            NotFittedError: no class tokens.
            ValueError: the scoring was changed after `fit`, or the prediction asks for what the bank lacks.
        """
        decider = self.decider()
        return decider.decide(as_images(images), self.current_prediction())

    def errors(self, images: Iterable[ImageSource | PreparedImage]) -> Tensor:
        """The error tensor [N, C, S] at the calibrated trials, of every class."""
        return self.decider().errors(as_images(images), self.current_prediction())

    def evidence(self, images: Iterable[ImageSource | PreparedImage]) -> dict[str, Tensor]:
        """Log-probabilities [N, C] of each witness alone, by its name, and of the class tokens alone ("class tokens").

        Those of the class tokens have the precision of the schedule: under "racing" they are coarse for classes that
        were dropped early.
        """
        return self.decider().evidence(as_images(images), self.current_prediction())

    def is_unknown(self, images: ImageSource | Iterable[ImageSource], reject: float = 0.01) -> Any:
        """Whether an image is like none of the shots, so that its label means nothing: a bool, or bool [N] of many.

        That is so where its most similar shot, by the U-Net's features, is less similar than the most similar other
        shot is for all but a share `reject` of the shots. It finds pictures of something else; for a class that
        resembles the known ones, low probabilities are the better sign.

        Raises:
            ValueError: the bank has no witness "features", or `reject` is no share.
        """
        one, many = as_list(images)
        decider = self.decider()
        unknown = decider.similarities(many, self.current_prediction()) < decider.familiarity.least(reject)
        return bool(unknown[0]) if one else unknown

    def as_pipeline(self, *, allow_urls: bool = False) -> ImageClassificationPipeline:
        """What answers as `transformers.pipeline("image-classification")` does."""
        return ImageClassificationPipeline(self, allow_urls=allow_urls)

    def generate(self, label: Label, num_images: int = 4, **options: Any) -> list[Image.Image]:
        """Images of a class, as its class token makes them: `Bank.generate` on the classifier's backbone.

        Args:
            options: num_inference_steps, guidance_scale, negative_prompt, seed, batch_size.
        """
        return self.decider().bank.generate(label, self.backbone_, num_images, **options)

    def explain(self, image: ImageSource | PreparedImage, top: int = 3) -> Explanation:
        """Why the image gets its label: nearest shots of the `top` most probable classes, what each source of evidence
        gives, where on the image and at which timesteps the class tokens differ. `Explanation.figure()` is a PNG.

        Raises:
            ValueError: fewer than two classes, or `top` below 2.
        """
        return explain(self.decider(), self.encoder_.prepare(image), self.current_prediction(), top)
