"""Logistic regression on the features of a frozen network, of the shots and of copies of them in other colours.

Shapes in names: N images, n shots, V views of a shot, D values of a feature.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from sklearn.pipeline import Pipeline
from torch import Tensor

from fewshot_diti.baselines.clip import VIT_H, load_clip
from fewshot_diti.baselines.imagenet import PACKAGED, ImageNetwork, size_for
from fewshot_diti.baselines.probe import COPIES, MOST_ROWS, STRENGTHS, fit_logistic
from fewshot_diti.baselines.views import ColourJitter, seeded
from fewshot_diti.config import TrainingConfig
from fewshot_diti.data.images import ImageGeometry, as_picture
from fewshot_diti.encoding import Encoder, PreparedImage
from fewshot_diti.temperature import FOLDS, held_out_temperature
from fewshot_diti.witnesses.base import ShotsRead, Witness, positions


class _Linear(Witness):
    """What reads features, and fits logistic regression on them."""

    @property
    def described(self) -> str:
        """Of model and regression."""
        strengths = [float(c) for c in STRENGTHS]
        return f"{self.model}, {COPIES} copies, at most {MOST_ROWS} rows, C of {strengths}, {FOLDS} folds"

    @abstractmethod
    def features(self, pictures: list[Image.Image]) -> np.ndarray:
        """Features [N, D], float32."""

    @abstractmethod
    def pixels(self, image: PreparedImage) -> Tensor:
        """uint8 [3, height, width], as the features are read from."""

    def read_shots(self, encoder: Encoder, shots: Sequence[PreparedImage], training: TrainingConfig) -> Tensor:
        """Features float32 [n, V, D]."""
        recolour, rows = ColourJitter.of(training), []
        with seeded(training.seed):
            for shot in shots:
                picture = as_picture(self.pixels(shot))
                rows.append(torch.from_numpy(self.features([picture, *(recolour(picture) for _ in range(COPIES))])))
        return torch.stack(rows)

    def read(self, encoder: Encoder, images: Sequence[PreparedImage], latents_Nchw: Tensor) -> Tensor:
        """Features float32 [N, D]."""
        return torch.from_numpy(self.features([as_picture(self.pixels(image)) for image in images]))

    def learn(self, shots: ShotsRead, training: TrainingConfig) -> dict[str, Tensor]:
        """Slopes [C, D] and offsets [C] of the log-probabilities, float64.

        Divided by the temperature that is most likely on shots held out of it, in folds.
        """
        views_nVD, labels_n = torch.cat(list(shots.values())).numpy(), positions(shots)

        def fitted(kept_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            slopes_CD, offsets_C = _linear_map(fit_logistic(views_nVD[kept_n], labels_n[kept_n]))
            return slopes_CD, offsets_C - np.log(np.bincount(labels_n[kept_n]))

        def judge_held_out(kept_n: np.ndarray, held_n: np.ndarray) -> Tensor:
            slopes_CD, offsets_C = fitted(kept_n)
            return torch.from_numpy(views_nVD[held_n, 0] @ slopes_CD.T + offsets_C)

        if len(shots) == 1:  # of a bank that grows: there is nothing to tell apart yet
            none = torch.zeros(1, views_nVD.shape[2], dtype=torch.float64)
            return {"slopes": none, "offsets": none[:, 0].contiguous()}
        temperature = held_out_temperature(labels_n, judge_held_out)
        slopes_CD, offsets_C = fitted(np.ones(len(labels_n), dtype=bool))
        return {
            "slopes": torch.from_numpy(slopes_CD / temperature),
            "offsets": torch.from_numpy(offsets_C / temperature),
        }

    def judge(self, shots: ShotsRead, learned: Mapping[str, Tensor]) -> _LinearJudge:
        """As learned."""
        return _LinearJudge(learned["slopes"], learned["offsets"])

    def select(self, learned: dict[str, Tensor], chosen: Sequence[int]) -> dict[str, Tensor]:
        """Of these classes."""
        return {name: values[list(chosen)] for name, values in learned.items()}


class _LinearJudge(NamedTuple):
    slopes_CD: Tensor
    offsets_C: Tensor

    def log_probabilities(self, features_ND: Tensor) -> Tensor:
        return (features_ND.double() @ self.slopes_CD.T + self.offsets_C).log_softmax(1)


class LinearNetwork(_Linear):
    """On mean features of a network that was trained on ImageNet.

    Args:
        model: as `ImageNetwork` takes it; "" for the one whose weights come in packages.
        geometry: of the bank; the network sees the whole image, without the bank's banner.
    """

    geometry: ImageGeometry

    def __init__(self, model: str, geometry: ImageGeometry) -> None:
        self.network = ImageNetwork(model or PACKAGED, size=size_for(geometry.size))
        self.geometry = replace(self.network.geometry, banner_rows=geometry.banner_rows)

    @property
    def model(self) -> str:
        """Weights, and size of the images."""
        return self.network.described

    def features(self, pictures: list[Image.Image]) -> np.ndarray:
        """Mean features [N, D]."""
        return self.network.features(pictures)

    def pixels(self, image: PreparedImage) -> Tensor:
        """In the size that the network reads."""
        return image.resized[self.geometry]


class LinearClip(_Linear):
    """On the image features of an OpenCLIP model, of images in the bank's geometry.

    Args:
        model: as `OpenClip` takes it; "" for the one of the published figures.
        geometry: of the bank.
    """

    def __init__(self, model: str, geometry: ImageGeometry) -> None:
        self.clip = load_clip(model or VIT_H)

    @property
    def model(self) -> str:
        """Hash of the weights."""
        return self.clip.hash

    def features(self, pictures: list[Image.Image]) -> np.ndarray:
        """Unit vectors [N, D]."""
        return self.clip.encode_images(pictures)

    def pixels(self, image: PreparedImage) -> Tensor:
        """As the backbone has them."""
        return image.pixels_CHW


def _linear_map(model: Pipeline) -> tuple[np.ndarray, np.ndarray]:
    """Slopes [C, D] and offsets [C] of the logits of `fit_logistic`, float64."""
    scaler, pca, head = model
    head = getattr(head, "best_estimator_", head)
    slopes_CD = head.coef_.astype(np.float64) @ pca.components_ / scaler.scale_
    offsets_C = head.intercept_ - slopes_CD @ (scaler.mean_ + pca.mean_ * scaler.scale_)
    if len(slopes_CD) == 1:  # of two classes scikit-learn has the second alone
        slopes_CD, offsets_C = np.vstack([0 * slopes_CD, slopes_CD]), np.append(0.0, offsets_C)
    return slopes_CD, offsets_C
