"""What a witness is: a classifier that is fitted on the same shots as the class tokens, and decides together with them.

Shapes in names: N images, n shots, V views of a shot, C classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fewshot_diti.config import Label, TrainingConfig
from fewshot_diti.data.images import ImageGeometry
from fewshot_diti.distributed import by_main, gather_from, my_share
from fewshot_diti.encoding import Encoder, PreparedImage
from fewshot_diti.training import Groups

ShotsRead = Mapping[Label, Tensor]  # [n, V, ...] of each class, as `Witness.read_shots` gives them


class Judge(Protocol):
    """What a witness has learned."""

    def log_probabilities(self, read: Tensor) -> Tensor:
        """Log-probabilities [N, C], float64, of what `Witness.read` gives."""


class Witness(ABC):
    """A source of features and a classifier on them.

    What is read of the shots is kept with the bank: a class that comes later is learned beside them.

    Attributes:
        evaluations: samples through the U-Net that an image costs.
        geometry: of pixels that are read beside those of the backbone; None: no others.
    """

    evaluations = 0
    geometry: ImageGeometry | None = None

    @property
    def model(self) -> str:
        """Which other model reads the images: a hash of its weights and what else it makes of them; "" for none."""
        return ""

    @property
    def described(self) -> str:
        """What decides its log-probabilities beside shots, backbone and training: the other model, and constants."""
        return self.model

    @abstractmethod
    def read_shots(self, encoder: Encoder, shots: Sequence[PreparedImage], training: TrainingConfig) -> Tensor:
        """What is kept of shots, [n, V, ...]: of the shot itself first, then of copies in the colours of training."""

    @abstractmethod
    def read(self, encoder: Encoder, images: Sequence[PreparedImage], latents_Nchw: Tensor) -> Tensor:
        """What is read of images [N, ...], as of a shot itself."""

    def learn(self, shots: ShotsRead, training: TrainingConfig) -> dict[str, Tensor]:
        """What is learned of the classes in the order of `shots`, to be saved; nothing where `judge` learns all in a
        moment."""
        return {}

    @abstractmethod
    def judge(self, shots: ShotsRead, learned: Mapping[str, Tensor]) -> Judge:
        """What gives log-probabilities of the classes, in the order of `shots`; all equally likely beforehand."""

    def select(self, learned: dict[str, Tensor], chosen: Sequence[int]) -> dict[str, Tensor]:
        """What was learned of the classes at some positions."""
        return learned


@dataclass(frozen=True, eq=False)
class FittedWitness:
    """A witness that has learned the classes of a bank.

    Attributes:
        name: as in `ScoringConfig.witnesses`.
        shots: what it has read of them, in the order of the bank.
        learned: as `Witness.learn` gives it.
    """

    name: str
    witness: Witness
    shots: ShotsRead
    learned: dict[str, Tensor]

    @classmethod
    def fit(cls, name: str, witness: Witness, shots: ShotsRead, training: TrainingConfig) -> Self:
        """Learns the classes; the main process does, and all get the same."""
        ordered = {x: shots[x] for x in sorted(shots)}
        return cls(name, witness, ordered, by_main(lambda: witness.learn(ordered, training)))

    @cached_property
    def judge(self) -> Judge:
        """Made when it is first asked for."""
        return self.witness.judge(self.shots, self.learned)

    def log_probabilities(self, encoder: Encoder, images: Sequence[PreparedImage], latents_Nchw: Tensor) -> Tensor:
        """Log-probabilities [N, C] of images.

        Raises:
            ValueError: one is not a number, naming the witness.
        """
        found = self.judge.log_probabilities(self.witness.read(encoder, images, latents_Nchw))
        if found.isnan().any():
            raise ValueError(
                f"The witness {self.name!r} gives probabilities that are not a number on image "
                f"{images[int(found.isnan().any(1).nonzero()[0])].name}; learn the shots again, leave the witness out, "
                "or set prediction to PredictionConfig(use_witnesses=False)."
            )
        return found

    def select(self, labels: Sequence[Label]) -> FittedWitness:
        """Of some of its classes, in the order given."""
        if list(labels) == list(self.shots):
            return self
        order = list(self.shots)
        learned = self.witness.select(self.learned, [order.index(x) for x in labels])
        return FittedWitness(self.name, self.witness, {x: self.shots[x] for x in labels}, learned)


def positions(shots: ShotsRead) -> np.ndarray:
    """The class of each shot [n], as its position among the classes."""
    return np.arange(len(shots)).repeat([len(views) for views in shots.values()])


def log_counts(shots: ShotsRead) -> Tensor:
    """Logarithm of the number of each class's shots [C], float64: what a classifier has learned of how frequent classes
    are, and what is taken off again."""
    return torch.tensor([len(views) for views in shots.values()], dtype=torch.float64).log()


def as_picture(pixels_CHW: Tensor) -> Image.Image:
    """uint8 pixels [3, height, width] as a PIL image."""
    return Image.fromarray(pixels_CHW.permute(1, 2, 0).numpy())


def read_groups(witness: Witness, encoder: Encoder, groups: Groups, training: TrainingConfig) -> dict[Label, Tensor]:
    """What a witness keeps of the shots of each class; the processes share the classes."""
    labels = sorted(groups)
    mine = [labels[c] for c in my_share(len(labels))]
    return dict(gather_from(lambda: [(x, witness.read_shots(encoder, groups[x], training)) for x in mine]))


def fit_witnesses(
    witnesses: Mapping[str, Witness],
    encoder: Encoder,
    groups: Groups,
    training: TrainingConfig,
    known: Sequence[FittedWitness] = (),
) -> list[FittedWitness]:
    """The witnesses by their names, of the classes of these shots and of those that `known` ones have learned."""
    shots = {x.name: dict(x.shots) for x in known}
    return [
        FittedWitness.fit(name, x, {**shots.get(name, {}), **read_groups(x, encoder, groups, training)}, training)
        for name, x in witnesses.items()
    ]


def score_offsets(
    log_probabilities: Sequence[Tensor], weights: Sequence[float], shortlist: int | None = None
) -> Tensor:
    """What witnesses add to scores, [N, C]: minus each one's weight times its log-probabilities [N, C], and infinity
    off the shortlist of the classes whose log-probabilities have the largest sum."""
    offsets_NC = sum(-weight * log_p for weight, log_p in zip(weights, log_probabilities, strict=True))
    assert isinstance(offsets_NC, Tensor), "there is a witness"
    if shortlist is None:
        return offsets_NC
    ranks_NC = (-torch.stack(list(log_probabilities)).sum(0)).argsort(dim=1, stable=True).argsort(dim=1)
    return offsets_NC.masked_fill(ranks_NC >= shortlist, torch.inf)
