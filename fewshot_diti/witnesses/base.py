"""What a witness is: a classifier that is fitted on the same shots as the class tokens, and decides together with them.

Shapes in names: N images, n shots, V views of a shot, C classes.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor

from fewshot_diti.checkpoints import Checkpoints
from fewshot_diti.config import Label, TrainingConfig
from fewshot_diti.data.images import ImageGeometry
from fewshot_diti.distributed import by_main, gather_from, my_share
from fewshot_diti.elimination import NotFiniteError
from fewshot_diti.encoding import Encoder, PreparedImage
from fewshot_diti.progress import Progress
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
        kept: type of what is kept of the shots.
        geometry: of pixels that are read beside those of the backbone; None: no others.
    """

    evaluations = 0
    kept: torch.dtype = torch.float32
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
    def fit(
        cls,
        name: str,
        witness: Witness,
        shots: ShotsRead,
        training: TrainingConfig,
        checkpoints: Checkpoints | None = None,
    ) -> Self:
        """Learns the classes, or takes from the checkpoints what a run that was cut short had learned of them; the main
        process does, and all get the same."""
        ordered = {x: shots[x] for x in sorted(shots)}

        def learn() -> dict[str, Tensor]:
            if checkpoints is None:
                return witness.learn(ordered, training)
            read = {repr(x): hashlib.sha256(views.numpy().tobytes()).hexdigest() for x, views in ordered.items()}
            decides = name, witness.described, str(training), read
            return checkpoints.computed(lambda: witness.learn(ordered, training), *decides)

        return cls(name, witness, ordered, by_main(learn))

    def check(self) -> None:
        """Raises a ValueError where shots or what was learned of them is not what a witness of this kind keeps."""
        shapes = {views.shape[1:] for views in self.shots.values()}
        kinds = {(views.dtype, views.ndim > 2, views.numel() > 0) for views in self.shots.values()}
        if self.shots and (kinds != {(self.witness.kept, True, True)} or len({x[1:] for x in shapes}) > 1):
            raise ValueError(
                f"What the witness {self.name!r} has read of the shots are tensors of another kind or shape."
            )
        if not all(x.isfinite().all() for x in (*self.shots.values(), *self.learned.values())):
            raise ValueError(f"What the witness {self.name!r} has read and learned holds numbers that are not finite.")

    @cached_property
    def judge(self) -> Judge:
        """Made when it is first asked for."""
        with self._whole():
            return self.witness.judge(self.shots, self.learned)

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Raises a ValueError that names the witness where what it has learned cannot be used."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except (KeyError, IndexError, TypeError, RuntimeError) as error:
            raise ValueError(
                f"What the witness {self.name!r} has learned cannot be used ({error}); copy the bank again, or "
                "train again."
            ) from error

    def check_read(self, read: Tensor, images: Sequence[PreparedImage]) -> Tensor:
        """What the witness has read of images [N, ...], as it was given.

        Raises:
            NotFiniteError: it is not finite, naming the witness and the image.
            ValueError: it has another shape than what is kept of the shots.
        """
        kept = next(iter(self.shots.values())).shape[2:]
        if read.shape[1:] != kept:
            raise ValueError(
                f"The witness {self.name!r} reads {list(read.shape[1:])} values of an image and keeps {list(kept)} "
                "of a shot; copy the bank again, or train again."
            )
        broken = (~read.isfinite().flatten(1).all(1)).nonzero()
        if len(broken):
            raise NotFiniteError(
                f"The witness {self.name!r} reads numbers that are not finite of {images[int(broken[0])].name}; leave "
                "the image out, or load the backbone in float32."
            )
        return read

    def log_probabilities(self, read: Tensor, images: Sequence[PreparedImage]) -> Tensor:
        """Log-probabilities [N, C] of images, by what the witness has read of them [N, ...].

        Raises:
            ValueError: one is not a number, naming the witness and the image.
        """
        with self._whole():
            found = self.judge.log_probabilities(read)
        if found.shape[1] != len(self.shots):
            raise ValueError(
                f"The witness {self.name!r} has learned {found.shape[1]} classes, and the bank holds "
                f"{len(self.shots)}; copy the bank again, or train again."
            )
        if found.isnan().any():
            raise NotFiniteError(
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
        with self._whole():
            learned = self.witness.select(self.learned, [order.index(x) for x in labels])
        return FittedWitness(self.name, self.witness, {x: self.shots[x] for x in labels}, learned)


def positions(shots: ShotsRead) -> np.ndarray:
    """The class of each shot [n], as its position among the classes."""
    return np.arange(len(shots)).repeat([len(views) for views in shots.values()])


def log_counts(shots: ShotsRead) -> Tensor:
    """Logarithm of the number of each class's shots [C], float64: what a classifier has learned of how frequent classes
    are, and what is taken off again."""
    return torch.tensor([len(views) for views in shots.values()], dtype=torch.float64).log()


def read_groups(witness: Witness, encoder: Encoder, groups: Groups, training: TrainingConfig) -> dict[Label, Tensor]:
    """What a witness keeps of the shots of each class; the processes share the classes."""
    labels = sorted(groups)
    mine = [labels[c] for c in my_share(len(labels))]

    def read() -> list[tuple[Label, Tensor]]:
        found = []
        with Progress(len(mine), "reading shots", "class", minor=True) as bar:
            for label in mine:
                found.append((label, witness.read_shots(encoder, groups[label], training)))
                bar.update()
        return found

    return dict(gather_from(read))


def fit_witnesses(
    witnesses: Mapping[str, Witness],
    encoder: Encoder,
    groups: Groups,
    training: TrainingConfig,
    known: Sequence[FittedWitness] = (),
    checkpoints: Checkpoints | None = None,
) -> list[FittedWitness]:
    """The witnesses by their names, of the classes of these shots and of those that `known` ones have learned."""
    shots = {x.name: dict(x.shots) for x in known}
    fitted = []
    for name, witness in witnesses.items():
        read = shots.get(name, {}) | read_groups(witness, encoder, groups, training)
        fitted.append(FittedWitness.fit(name, witness, read, training, checkpoints))
    return fitted


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
