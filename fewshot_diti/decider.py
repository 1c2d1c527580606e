"""A bank with its calibration, ready to decide images: from pixels to a winner and scores."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fewshot_diti.bank import Bank
from fewshot_diti.calibration import Calibration
from fewshot_diti.config import Label, PredictionConfig, ScoringConfig
from fewshot_diti.data.images import ImageSource
from fewshot_diti.discriminant import Discriminant, fit_discriminant, score_offsets
from fewshot_diti.elimination import Decision
from fewshot_diti.encoding import Encoder, PreparedImage
from fewshot_diti.progress import Progress
from fewshot_diti.scoring import Scorer, decide, error_tensor, in_flight

_REMEMBERED = 128  # decisions


class Decider:
    """Decides images with one bank and one calibration; another bank needs another decider.

    Threads may use it at the same time: one after the other uses the backbone.

    Args:
        scoring: that the calibration was made for.
        shot_features: [n, V, D] of the shots of each class, where the U-Net's features may count.
    """

    def __init__(
        self,
        encoder: Encoder,
        bank: Bank,
        scoring: ScoringConfig,
        calibration: Calibration,
        shot_features: Mapping[Label, Tensor],
    ) -> None:
        self.encoder, self.bank, self.scoring, self.calibration = encoder, bank, scoring, calibration
        self._shot_features = shot_features
        self._scorer: Scorer | None = None
        self._discriminant: Discriminant | None = None
        self._decisions: OrderedDict[tuple[str, PredictionConfig], Decision] = OrderedDict()

    def decide(self, images: Sequence[ImageSource | PreparedImage], prediction: PredictionConfig) -> list[Decision]:
        """Winner, scores and cost of each image; images are decoded and decided some at a time."""
        at_once = in_flight(prediction.looks(len(self.bank), self.scoring.trials))
        found: list[Decision] = []
        with Progress(len(images) if len(images) > at_once else 0, "scoring", "image") as bar:
            for start in range(0, len(images), at_once):
                rows = range(start, min(start + at_once, len(images)))
                some = [self.encoder.prepare(images[row]) for row in rows]
                with self.encoder.backbone.lock:
                    found += self._decide(some, prediction)
                bar.update(len(some))
        return found

    def _decide(self, images: Sequence[PreparedImage], prediction: PredictionConfig) -> list[Decision]:
        keys = {image.id: (image.id, prediction) for image in images}
        new = {image.id: image for image in images if keys[image.id] not in self._decisions}
        known = {i: self._decisions[key] for i, key in keys.items() if i not in new}
        if new:
            scorer, latents = self._ready(prediction.batch_size), self.encoder.latents(list(new.values()))
            weights = torch.tensor(self.calibration.weights, dtype=torch.float64)
            looks, offsets = prediction.looks(len(self.bank), self.scoring.trials), self.offsets(latents, prediction)
            decisions = decide(scorer, latents, list(new), self.calibration.timesteps, weights, looks, offsets)
            if offsets is not None:  # one evaluation gave the features
                decisions = [x._replace(evaluations=x.evaluations + 1) for x in decisions]
            known |= dict(zip(new, decisions, strict=True))
            self._decisions.update({keys[i]: decision for i, decision in known.items()})
            while len(self._decisions) > _REMEMBERED:
                self._decisions.popitem(last=False)
        return [known[image.id] for image in images]

    def offsets(self, latents_Nchw: Tensor, prediction: PredictionConfig) -> Tensor | None:
        """What the U-Net's own features add to the scores [N, C]; None where they do not count."""
        if len(self.bank) < 2 or not self.scoring.uses_features(prediction):
            return None
        self.check_features(prediction)
        if self._discriminant is None:
            self._discriminant = fit_discriminant(self._shot_features)
        log_p = self._discriminant.log_probabilities(self.encoder.features(latents_Nchw))
        weight = self.scoring.features_weight if prediction.use_features else 0.0
        return score_offsets(log_p, weight, prediction.shortlist)

    def check_features(self, prediction: PredictionConfig) -> None:
        """Raises a ValueError where features are to count and the bank has not those of every class."""
        if self.scoring.uses_features(prediction) and set(self._shot_features) != set(self.bank.labels):
            raise ValueError(
                f"features_weight={self.scoring.features_weight} and shortlist={prediction.shortlist} need features of "
                "the shots, and this bank has not those of every class: it was learned without. Set prediction to "
                "PredictionConfig(use_features=False) without a shortlist, or fit again."
            )

    def errors(self, images: Sequence[ImageSource | PreparedImage], prediction: PredictionConfig) -> Tensor:
        """The error tensor [N, C, S] at the calibrated trials, of every class."""
        parts = []
        for row in range(len(images)):
            image = self.encoder.prepare(images[row])
            with self.encoder.backbone.lock:
                scorer, latents = self._ready(prediction.batch_size), self.encoder.latents([image])
                parts.append(error_tensor(scorer, latents, [image.id], self.calibration.timesteps))
        return torch.cat(parts)

    def _ready(self, batch_size: int) -> Scorer:
        if self._scorer is None or self._scorer.batch_size != batch_size:
            self._scorer = Scorer(self.encoder.backbone, self.bank, seed=self.scoring.seed, batch_size=batch_size)
        return self._scorer
