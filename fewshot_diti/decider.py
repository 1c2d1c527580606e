"""A bank with its calibration, ready to decide images: from pixels to a winner and scores."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fewshot_diti.bank import Bank
from fewshot_diti.calibration import Calibration
from fewshot_diti.config import PredictionConfig, ScoringConfig
from fewshot_diti.data.arguments import batched, one_by_one
from fewshot_diti.data.images import ImageSource
from fewshot_diti.elimination import Decision
from fewshot_diti.encoding import Encoder, PreparedImage
from fewshot_diti.familiarity import Familiarity, features_of
from fewshot_diti.progress import Progress
from fewshot_diti.reading import Reader
from fewshot_diti.scoring import Scorer, decide, error_tensor, in_flight
from fewshot_diti.witnesses import FittedWitness, score_offsets

_REMEMBERED = 128  # decisions


class Decider:
    """Decides images with one bank and one calibration; another bank needs another decider.

    Threads may use it at the same time: one after the other uses the backbone.

    Args:
        scoring: that the calibration was made for.
        witnesses: that have learned the bank's classes, in their order.
    """

    def __init__(
        self,
        encoder: Encoder,
        bank: Bank,
        scoring: ScoringConfig,
        calibration: Calibration,
        witnesses: Sequence[FittedWitness] = (),
    ) -> None:
        self.encoder, self.bank, self.scoring, self.calibration = encoder, bank, scoring, calibration
        self.witnesses, self.reader = witnesses, Reader(encoder)
        self._scorer: Scorer | None = None
        self._decisions: OrderedDict[tuple[str, PredictionConfig], Decision] = OrderedDict()

    def encode(self, image: PreparedImage) -> None:
        """Encodes an image that is decided next; raises a ValueError where that cannot be done."""
        with self.encoder.backbone.lock:
            self.reader.latents([image])

    def decide(self, images: Iterable[ImageSource | PreparedImage], prediction: PredictionConfig) -> list[Decision]:
        """Winner, scores and cost of each image; images are decoded and decided some at a time."""
        found: list[Decision] = []
        for some in self._prepared(images, prediction, "scoring"):
            with self.encoder.backbone.lock:
                found += self._decide(some, prediction)
        return found

    def _prepared(
        self, images: Iterable[ImageSource | PreparedImage], prediction: PredictionConfig, desc: str
    ) -> Iterator[list[PreparedImage]]:
        """The images decoded, as many at a time as are decided together, with progress."""
        at_once = in_flight(prediction.looks(len(self.bank), self.scoring.trials))
        count = len(images) if isinstance(images, Sequence) else None
        with Progress(0 if count is not None and count <= at_once else count, desc, "image") as bar:
            for some in batched(map(self.encoder.prepare, one_by_one(images)), at_once):
                yield some
                bar.update(len(some))

    def _decide(self, images: Sequence[PreparedImage], prediction: PredictionConfig) -> list[Decision]:
        keys = {image.id: (image.id, prediction) for image in images}
        new = {image.id: image for image in images if keys[image.id] not in self._decisions}
        known = {i: self._decisions[key] for i, key in keys.items() if i not in new}
        if new:
            scorer, latents = self.scorer(prediction.batch_size), self.reader.latents(list(new.values()))
            weights = torch.tensor(self.calibration.weights, dtype=torch.float64)
            looks = prediction.looks(len(self.bank), self.scoring.trials)
            offsets = self.offsets(list(new.values()), prediction)
            decisions = decide(scorer, latents, list(new), self.calibration.timesteps, weights, looks, offsets)
            spent = sum(fitted.witness.evaluations for fitted, _ in self.asked(prediction))
            decisions = [x._replace(evaluations=x.evaluations + spent) for x in decisions]
            known |= dict(zip(new, decisions, strict=True))
            self._decisions.update({keys[i]: decision for i, decision in known.items()})
            while len(self._decisions) > _REMEMBERED:
                self._decisions.popitem(last=False)
        return [known[image.id] for image in images]

    def offsets(self, images: Sequence[PreparedImage], prediction: PredictionConfig) -> Tensor | None:
        """What the witnesses add to the scores [N, C]; None where none counts."""
        if not (asked := self.asked(prediction)):
            return None
        log_p = [self.reader.log_probabilities(fitted, images) for fitted, _ in asked]
        return score_offsets(log_p, [weight for _, weight in asked], prediction.shortlist)

    def temperature(self, prediction: PredictionConfig) -> float:
        """Of the softmax over minus the scores of a prediction."""
        counts = any(weight for _, weight in self.asked(prediction))
        return self.calibration.temperature if counts else self.calibration.token_temperature

    def evaluations(self, prediction: PredictionConfig) -> int:
        """What an image costs at most, in evaluations."""
        trials = prediction.evaluations(len(self.bank), self.scoring.trials)
        return trials + sum(fitted.witness.evaluations for fitted, _ in self.asked(prediction))

    def evidence(
        self, images: Iterable[ImageSource | PreparedImage], prediction: PredictionConfig
    ) -> dict[str, Tensor]:
        """Log-probabilities [N, C] of each witness, and of the class tokens by their own scores, by name."""
        prediction = replace(prediction, shortlist=None)
        rows: dict[str, list[Tensor]] = {name: [] for name in ("class tokens", *(x.name for x in self.witnesses))}
        for some in self._prepared(images, prediction, "evidence"):
            decisions = self.decide(some, prediction)
            with self.encoder.backbone.lock:
                judged = self.witnesses if len(self.bank) > 1 else ()
                found = {x.name: self.reader.log_probabilities(x, some) for x in judged}
            own = torch.stack([decision.scores for decision in decisions])
            if asked := self.asked(prediction):
                own = own - score_offsets([found[x.name] for x, _ in asked], [weight for _, weight in asked])
            tokens = (-own / self.calibration.token_temperature).log_softmax(1)
            for name, log_p in ({"class tokens": tokens} | found).items():
                rows[name].append(log_p)
        return {name: torch.cat(parts) for name, parts in rows.items() if parts}

    def similarities(self, images: Iterable[ImageSource | PreparedImage], prediction: PredictionConfig) -> np.ndarray:
        """How similar the most similar shot is to each image [N], as of `Familiarity`.

        Raises:
            ValueError: the bank has no witness "features".
        """
        fitted, found = features_of(self.witnesses), []
        for some in self._prepared(images, prediction, "similarities"):
            with self.encoder.backbone.lock:
                found += [self.familiarity.similarities(self.reader.read(fitted, [image])) for image in some]
        return np.concatenate(found)

    @cached_property
    def familiarity(self) -> Familiarity:
        """Of the bank's shots."""
        return Familiarity(features_of(self.witnesses))

    def asked(self, prediction: PredictionConfig) -> list[tuple[FittedWitness, float]]:
        """The witnesses that count in a prediction, with their weights in units of the score."""
        if len(self.bank) < 2 or not self.scoring.uses_witnesses(prediction):
            return []
        self.check_witnesses(prediction)
        weights = self.calibration.witness_weights if prediction.use_witnesses else (0.0,) * len(self.witnesses)
        pairs = zip(self.witnesses, weights, strict=True)
        return [(x, weight) for x, weight in pairs if weight or prediction.shortlist is not None]

    def check_witnesses(self, prediction: PredictionConfig) -> None:
        """Raises a ValueError where witnesses are to count and have not learned every class."""
        known = [x.name for x in self.witnesses if list(x.shots) == list(self.bank.labels)]
        if self.scoring.uses_witnesses(prediction) and known != list(self.scoring.witnesses):
            raise ValueError(
                f"witnesses={self.scoring.witnesses} are to count in the decision or to draw up the shortlist, and "
                f"those of this bank, {tuple(known)}, have not learned every class: it was learned without them, as it "
                "is where none has a weight and no shortlist is asked for. Set prediction to "
                "PredictionConfig(use_witnesses=False) without a shortlist, or fit again with this prediction."
            )

    def errors(self, images: Iterable[ImageSource | PreparedImage], prediction: PredictionConfig) -> Tensor:
        """The error tensor [N, C, S] at the calibrated trials, of every class."""
        parts, timesteps = [], self.calibration.timesteps
        for some in self._prepared(images, prediction, "errors"):
            for image in some:
                with self.encoder.backbone.lock:
                    scorer, latents = self.scorer(prediction.batch_size), self.reader.latents([image])
                    parts.append(error_tensor(scorer, latents, [image.id], timesteps))
        return torch.cat(parts)

    def scorer(self, batch_size: int) -> Scorer:
        """The bank ready to score, in batches of so many evaluations."""
        if self._scorer is None or self._scorer.batch_size != batch_size:
            self._scorer = Scorer(self.encoder.backbone, self.bank, seed=self.scoring.seed, batch_size=batch_size)
        return self._scorer
