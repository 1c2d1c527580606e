"""A network that was trained on ImageNet, fine-tuned on the shots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fewshot_diti.baselines.imagenet import PACKAGED, FineTuned, ImageNetwork, size_for
from fewshot_diti.baselines.presets import preset_of
from fewshot_diti.baselines.views import ColourJitter
from fewshot_diti.config import TrainingConfig
from fewshot_diti.data.images import ImageGeometry, as_picture
from fewshot_diti.encoding import Encoder, PreparedImage
from fewshot_diti.witnesses.base import ShotsRead, Witness, log_counts, positions

# of the fine-tuned network's probabilities, which label smoothing keeps low; 0.53 is most likely on held-out shots of
# one draw at 16 shots (docs/experiments/witnesses.md)
TEMPERATURE = 0.53
FROZEN = 0.3  # of the network: trained in two thirds of the time, and as accurate (docs/experiments/witnesses.md)


class TunedNetwork(Witness):
    """The network trained on the shots but for its first layers (`baselines.imagenet.FineTuned`), at the size of its
    preset.

    Args:
        model: as `ImageNetwork` takes it; "" for the one whose weights come in packages.
        geometry: of the bank; the network sees the whole image, without the bank's banner.
    """

    kept = torch.uint8
    geometry: ImageGeometry

    def __init__(self, model: str, geometry: ImageGeometry) -> None:
        network = ImageNetwork(model or PACKAGED, size=size_for(geometry.size))
        preset = preset_of(network.module)
        self.settings = replace(preset.tuning, frozen=FROZEN)
        self.network = network.at(size_for(geometry.size, preset.tuning_scale))
        self.geometry = replace(self.network.geometry, banner_rows=geometry.banner_rows)

    @property
    def model(self) -> str:
        """The network before it is tuned."""
        return self.network.described

    @property
    def described(self) -> str:
        """Of the network before it is tuned, and of how it is tuned."""
        return f"{self.model}, {self.settings}, temperature {TEMPERATURE}"

    def read_shots(self, encoder: Encoder, shots: Sequence[PreparedImage], training: TrainingConfig) -> Tensor:
        """Pixels uint8 [n, 1, 3, height, width]."""
        return torch.stack([shot.resized[self.geometry] for shot in shots])[:, None]

    def read(self, encoder: Encoder, images: Sequence[PreparedImage], latents_Nchw: Tensor) -> Tensor:
        """Pixels uint8 [N, 3, height, width]."""
        return torch.stack([image.resized[self.geometry] for image in images])

    def learn(self, shots: ShotsRead, training: TrainingConfig) -> dict[str, Tensor]:
        """Weights of network and head, in float16."""
        pictures = [as_picture(pixels) for views in shots.values() for pixels in views[:, 0]]
        tuned = FineTuned(self.network, self.settings, recolour=ColourJitter.of(training), seed=training.seed)
        tuned.fit(pictures, positions(shots).tolist())
        return tuned.weights()

    def judge(self, shots: ShotsRead, learned: Mapping[str, Tensor]) -> _NetworkJudge:
        """The trained network."""
        return _NetworkJudge(self.network, FineTuned.module_of(self.network, learned), log_counts(shots))

    def select(self, learned: dict[str, Tensor], chosen: Sequence[int]) -> dict[str, Tensor]:
        """The head's rows of these classes."""
        head = {k: learned[k][list(chosen)] for k in FineTuned.HEAD}
        return learned | head


class _NetworkJudge:
    def __init__(self, network: ImageNetwork, module: nn.Module, log_counts_C: Tensor) -> None:
        self._network, self._module, self._log_counts_C = network, module, log_counts_C

    @torch.no_grad()
    def log_probabilities(self, pixels_N3HW: Tensor) -> Tensor:
        parts = pixels_N3HW.split(self._network.batch_size)
        logits = [self._module(self._network.normalized(part.float() / 255)).cpu().double() for part in parts]
        return ((torch.cat(logits) - self._log_counts_C) / TEMPERATURE).log_softmax(1)
