"""A network that was trained on ImageNet: fine-tuned as a whole on the shots, or with a linear head on its features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from sklearn.pipeline import Pipeline
from torch import Tensor, nn

from fewshot_diti.baselines.imagenet import PACKAGED, FineTuned, ImageNetwork, size_for
from fewshot_diti.baselines.presets import preset_of
from fewshot_diti.baselines.probe import COPIES, fit_logistic
from fewshot_diti.baselines.views import ColourJitter
from fewshot_diti.config import TrainingConfig
from fewshot_diti.data.images import ImageGeometry
from fewshot_diti.encoding import Encoder, PreparedImage
from fewshot_diti.temperature import fit_temperature
from fewshot_diti.witnesses.base import ShotsRead, Witness

# of the fine-tuned network's probabilities, which label smoothing keeps low; 0.53 is most likely on held-out shots of
# one draw at 16 shots (docs/experiments/witnesses.md)
TEMPERATURE = 0.53


class _Network(Witness):
    """What both have in common: the network, and the pixels that it reads."""

    geometry: ImageGeometry

    def __init__(self, model: str, geometry: ImageGeometry, *, tuned: bool) -> None:
        name = model or PACKAGED
        self.network = ImageNetwork(name, size=size_for(geometry.size))
        self.preset = preset_of(self.network.module)
        if tuned and self.preset.tuning_scale != 1:
            self.network = ImageNetwork(name, size=size_for(geometry.size, self.preset.tuning_scale))
        # the whole picture, as the network has it in the tables, without the bank's banner
        self.geometry = replace(self.network.geometry, banner_rows=geometry.banner_rows)

    def pictures(self, images: Sequence[PreparedImage]) -> list[Image.Image]:
        """In the size that the network reads."""
        return [_picture(image.resized[self.geometry]) for image in images]


class TunedNetwork(_Network):
    """The whole network trained on the shots (`baselines.imagenet.FineTuned`)."""

    def __init__(self, model: str, geometry: ImageGeometry) -> None:
        super().__init__(model, geometry, tuned=True)

    def read_shots(self, encoder: Encoder, shots: Sequence[PreparedImage], training: TrainingConfig) -> Tensor:
        """Pixels uint8 [n, 1, 3, height, width]."""
        return torch.stack([shot.resized[self.geometry] for shot in shots])[:, None]

    def read(self, encoder: Encoder, images: Sequence[PreparedImage], latents_Nchw: Tensor) -> Tensor:
        """Pixels uint8 [N, 3, height, width]."""
        return torch.stack([image.resized[self.geometry] for image in images])

    def learn(self, shots: ShotsRead, training: TrainingConfig) -> dict[str, Tensor]:
        """Weights of network and head, in float16."""
        pictures = [_picture(pixels) for views in shots.values() for pixels in views[:, 0]]
        labels = np.arange(len(shots)).repeat([len(views) for views in shots.values()])
        tuned = FineTuned(self.network, self.preset.tuning, recolour=ColourJitter.of(training), seed=training.seed)
        tuned.fit(pictures, labels.tolist())
        return tuned.weights()

    def judge(self, shots: ShotsRead, learned: Mapping[str, Tensor]) -> _NetworkJudge:
        """The trained network."""
        return _NetworkJudge(self.network, FineTuned.module_of(self.network, learned))

    def select(self, learned: dict[str, Tensor], positions: Sequence[int]) -> dict[str, Tensor]:
        """The head's rows of these classes."""
        head = {k: learned[k][list(positions)] for k in FineTuned.HEAD}
        return learned | head


class _NetworkJudge:
    def __init__(self, network: ImageNetwork, module: nn.Module) -> None:
        self._network, self._module = network, module

    @torch.no_grad()
    def log_probabilities(self, pixels_N3HW: Tensor) -> Tensor:
        parts = pixels_N3HW.split(self._network.batch_size)
        logits = [self._module(self._network.normalized(part.float() / 255)).double().cpu() for part in parts]
        return (torch.cat(logits) / TEMPERATURE).log_softmax(1)


class LinearNetwork(_Network):
    """Logistic regression on the frozen network's features of the shots and of copies in other colours."""

    def __init__(self, model: str, geometry: ImageGeometry) -> None:
        super().__init__(model, geometry, tuned=False)

    def read_shots(self, encoder: Encoder, shots: Sequence[PreparedImage], training: TrainingConfig) -> Tensor:
        """Features float32 [n, 1 + copies, D]."""
        return read_copies(self.network.features, self.pictures(shots), training)

    def read(self, encoder: Encoder, images: Sequence[PreparedImage], latents_Nchw: Tensor) -> Tensor:
        """Features float32 [N, D]."""
        return torch.from_numpy(self.network.features(self.pictures(images)))

    def judge(self, shots: ShotsRead, learned: Mapping[str, Tensor]) -> LogisticJudge:
        """Fitted on the shots."""
        return LogisticJudge(shots)


def read_copies(features, pictures: Sequence[Image.Image], training: TrainingConfig) -> Tensor:  # type: ignore[no-untyped-def]
    """Features float32 [n, 1 + copies, D] of pictures and of copies in the colours of training."""
    recolour, rows = ColourJitter.of(training), []
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(training.seed)
        for picture in pictures:
            rows.append(torch.from_numpy(features([picture, *(recolour(picture) for _ in range(COPIES))])))
    return torch.stack(rows)


class LogisticJudge:
    """Logistic regression, its probabilities made as sure as they are right on shots that are held out."""

    def __init__(self, shots: ShotsRead) -> None:
        views_nVD = torch.cat(list(shots.values())).numpy()
        labels_n = np.arange(len(shots)).repeat([len(views) for views in shots.values()])
        self._model = fit_logistic(views_nVD, labels_n)
        self._temperature = self._held_out_temperature(views_nVD, labels_n)

    def log_probabilities(self, features_ND: Tensor) -> Tensor:
        return torch.from_numpy(_logits(self._model, features_ND.numpy()) / self._temperature).double().log_softmax(1)

    @staticmethod
    def _held_out_temperature(views_nVD: np.ndarray, labels_n: np.ndarray, folds: int = 4) -> float:
        counts = np.bincount(labels_n)
        if counts.min() < 2:
            return 1.0
        rank_n = np.concatenate([np.arange(count) for count in counts])
        fold_n, logits = rank_n % min(folds, counts.min()), np.zeros((len(labels_n), len(counts)))
        for fold in set(fold_n):
            kept, held = fold_n != fold, fold_n == fold
            logits[held] = _logits(fit_logistic(views_nVD[kept], labels_n[kept]), views_nVD[held, 0])
        return fit_temperature(torch.from_numpy(-logits), torch.from_numpy(labels_n))


def _logits(model: Pipeline, features_ND: np.ndarray) -> np.ndarray:
    return np.asarray(model.predict_log_proba(features_ND))


def _picture(pixels_CHW: Tensor) -> Image.Image:
    return Image.fromarray(pixels_CHW.permute(1, 2, 0).numpy())
