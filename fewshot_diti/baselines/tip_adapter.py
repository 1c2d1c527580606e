"""Tip-Adapter: CLIP's zero-shot classifier with a cache of the shots (Zhang et al., ECCV 2022)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import log_softmax, softmax
from torch import Tensor

from fewshot_diti.baselines.base import Baseline, opened
from fewshot_diti.baselines.clip import OpenClip
from fewshot_diti.baselines.views import Recolour, as_it_is, random_view, seeded
from fewshot_diti.data.images import ImageSource
from fewshot_diti.lora import gradients_on

BATCH = 256  # of views, and of keys in training
ALPHAS = (0.0, 0.1, 0.3, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0)
BETAS = (0.5, 1.0, 2.0, 3.5, 5.5, 8.0, 12.0, 20.0, 40.0)


def cache_logits(features_ND: np.ndarray, keys_nD: np.ndarray, values_nC: np.ndarray, beta: float) -> np.ndarray:
    """Logits of images [N, C] by the cache, before it is weighted by alpha: exp(-beta (1 - f K)) L (equation 5)."""
    found: np.ndarray = np.exp(-beta * (1 - features_ND @ keys_nD.T)) @ values_nC
    return found


@dataclass(frozen=True, kw_only=True)
class TipSettings:
    """Of Tip-Adapter and Tip-Adapter-F; by default the paper's.

    Attributes:
        one_shot: alpha and beta where a class has one shot: nothing can be left out.
        views: random crops of each shot; a key is their mean.
        steps, lr: of the training of keys, in batches of 256.
        least_epochs: passes over the shots, however few `steps` are; 20 is the paper's number of epochs.
    """

    one_shot: tuple[float, float] = (1.0, 5.5)
    views: int = 10
    steps: int = 500
    least_epochs: int = 20
    lr: float = 1e-3


class TipAdapter(Baseline):
    """Logits scale * f W + alpha * exp(-beta (1 - f K)) L, with the shots' features as keys K (equation 5).

    alpha and beta are those under which the shots are most often right, each classified by the keys of the others; for
    Tip-Adapter-F those under which they are most likely, which is what its keys then learn. The paper takes them from
    validation images.

    Args:
        clip: the model.
        templates: prompts of the zero-shot part W.
        settings: of views and training.
        fine_tune: whether keys are trained, Tip-Adapter-F.
        recolour: colours of a view.
        seed: of crops and training.

    Attributes:
        alpha_, beta_: the chosen ones, after `fit`.
        text_CD, keys_ND: unit vectors of the classes' prompts, and of the shots before any training of keys.
        weights_N: of the keys: those of all classes have the same sum, 1 each where classes have as many shots.
        left_out: logits [N, C] of each shot by the keys of the others, before any training of keys; None where a class
            has one shot.
    """

    def __init__(
        self,
        clip: OpenClip,
        templates: Sequence[str],
        settings: TipSettings = TipSettings(),
        *,
        fine_tune: bool = False,
        recolour: Recolour = as_it_is,
        seed: int = 0,
    ) -> None:
        self.clip, self.templates, self.settings = clip, tuple(templates), settings
        self.fine_tune, self.recolour, self.seed = fine_tune, recolour, seed

    def _fit(self, images: Sequence[ImageSource], labels_N: np.ndarray) -> None:
        views_VND = self._encode_views(images)
        self.learn(self.clip.image_features(images), views_VND, labels_N, [str(x) for x in self.classes_])

    def learn(
        self, features_ND: np.ndarray, views_VND: np.ndarray, labels_N: np.ndarray, class_names: Sequence[str]
    ) -> None:
        """Learns from the shots' features and those of their views; labels are positions in `class_names`."""
        self.text_CD = self.clip.class_weights(class_names, self.templates)
        mean = views_VND.mean(0)
        self.keys_ND = mean / np.linalg.norm(mean, axis=1, keepdims=True)
        counts_C = np.bincount(labels_N, minlength=len(class_names))
        self.weights_N = (counts_C.mean() / counts_C)[labels_N]
        self._values_NC = np.eye(len(class_names))[labels_N] * self.weights_N[:, None]
        self.alpha_, self.beta_, self.left_out = self._leave_one_out(features_ND, labels_N)
        if self.fine_tune:
            self._train_keys(views_VND, labels_N)

    def logits(self, features_ND: np.ndarray) -> np.ndarray:
        """Logits [N, C] of images by their features."""
        cache_NC = cache_logits(features_ND, self.keys_ND, self._values_NC, self.beta_)
        found: np.ndarray = self._zero_shot(features_ND) + self.alpha_ * cache_NC
        return found

    def predict_proba(self, images: Sequence[ImageSource]) -> np.ndarray:
        """Probabilities [N, C]."""
        return softmax(self.logits(self.clip.image_features(images)), axis=1)

    def _zero_shot(self, features_ND: np.ndarray) -> np.ndarray:
        return self.clip.logit_scale * features_ND @ self.text_CD.T

    def _encode_views(self, images: Sequence[ImageSource]) -> np.ndarray:
        """Features [views, N, D] of random crops that keep each image's shape."""
        with seeded(self.seed):
            return np.stack([np.concatenate(list(self._one_view(images))) for _ in range(self.settings.views)])

    def _one_view(self, images: Sequence[ImageSource]) -> Iterator[np.ndarray]:
        for batch in opened(images, BATCH):
            yield self.clip.encode_images([random_view(image, self.recolour) for image in batch])

    def _leave_one_out(self, features_ND: np.ndarray, labels_N: np.ndarray) -> tuple[float, float, np.ndarray | None]:
        counts = np.bincount(labels_N)[labels_N]
        if counts.min() < 2:
            return *self.settings.one_shot, None
        zero_shot, cosines = self._zero_shot(features_ND), features_ND @ self.keys_ND.T
        rows = np.arange(len(labels_N))

        def logits(alpha: float, beta: float) -> np.ndarray:
            affinity = np.exp(-beta * (1 - cosines))
            affinity[rows, rows] = 0  # the shot's own key
            cache = affinity @ self._values_NC
            cache[rows, labels_N] *= counts / (counts - 1)  # its class has one key less than its rivals
            out: np.ndarray = zero_shot + alpha * cache
            return out

        def merit(alpha: float, beta: float) -> tuple[float, float]:
            found = logits(alpha, beta)
            right = (found.argmax(1) == labels_N).mean()
            likely = log_softmax(found, axis=1)[rows, labels_N].mean()
            return (likely, right) if self.fine_tune else (right, likely)

        alphas = [a for a in ALPHAS if a or not self.fine_tune]  # keys of no weight learn nothing
        best = max(product(alphas, BETAS), key=lambda pair: merit(*pair))
        return *best, logits(*best)

    @gradients_on()
    def _train_keys(self, views_VND: np.ndarray, labels_N: np.ndarray) -> None:
        """AdamW on the keys, cosine schedule; each epoch sees one random view of every shot, in batches of 256."""
        g = torch.Generator().manual_seed(self.seed)
        views, labels = torch.from_numpy(views_VND), torch.from_numpy(labels_N)
        values = torch.from_numpy(self._values_NC).float()
        keys = torch.from_numpy(self.keys_ND).clone().requires_grad_()
        optimizer = torch.optim.AdamW([keys], lr=self.settings.lr, eps=1e-4)
        batches = -(-len(labels) // BATCH)
        epochs = max(self.settings.least_epochs, -(-self.settings.steps // batches))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
        for _ in range(epochs):
            for rows in torch.randperm(len(labels), generator=g).split(BATCH):
                features = views[torch.randint(len(views), (len(rows),), generator=g), rows]
                cache: Tensor = torch.exp(-self.beta_ * (1 - features @ keys.T)) @ values
                zero_shot = torch.from_numpy(self._zero_shot(features.numpy()))
                loss = F.cross_entropy(zero_shot + self.alpha_ * cache, labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        self.keys_ND = keys.detach().numpy()
