"""Losses of an autoencoder in addition to pixel distances: features of an ImageNet network, weights of the object."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewshot_diti.baselines.imagenet import PACKAGED, ImageNetwork

_STRIDES = (2, 4, 8, 16)  # of the features, in pixels
_FROM_SKY = 0.15  # of a pixel's colour from the sky's, in units of [-1, 1], from which on it is the object's
_MARGIN = 5  # pixels about the object that count as it


class PerceptualLoss(nn.Module):
    """Mean squared distance of the features of a frozen EfficientNet-lite0, each position's channels of length 1.

    As LPIPS (Zhang et al., CVPR 2018) without its learned weights: the last features of each stride, averaged.

    Raises:
        ImportError: the packages of the extra `imagenet` are not installed.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.network = ImageNetwork(PACKAGED).module.network.to(device).float()

    def forward(self, images_BCHW: Tensor, others_BCHW: Tensor) -> Tensor:
        """The loss of images in [-1, 1] against others that get no gradient."""
        features = self._features(images_BCHW)
        with torch.no_grad():
            others = self._features(others_BCHW)
        distances = [(a - b).square().sum(1).mean() for a, b in zip(features, others, strict=True)]
        return torch.stack(distances).mean()

    def _features(self, images_BCHW: Tensor) -> list[Tensor]:
        network, found, width = self.network, {}, images_BCHW.shape[3]
        maps = network._swish(network._bn0(network._conv_stem(images_BCHW)))
        for block in network._blocks:
            if maps.shape[3] * _STRIDES[-1] < width:
                break
            maps = block(maps)
            found[width // maps.shape[3]] = maps  # the last of each stride stays
        return [F.normalize(found[stride], dim=1) for stride in _STRIDES]


def weights_of_object(images_BCHW: Tensor, weight: float) -> Tensor:
    """[B, 1, H, W]: 1 on the sky and 1 + `weight` on the object and a margin about it.

    The sky's colour in a row is interpolated between both ends of the row, where no object is.
    """
    width = images_BCHW.shape[3]
    edge = max(1, width // 16)
    left = images_BCHW[..., :edge].median(-1, keepdim=True).values
    right = images_BCHW[..., -edge:].median(-1, keepdim=True).values
    sky = torch.lerp(left, right, torch.linspace(0, 1, width, device=images_BCHW.device))
    object_B1HW = ((images_BCHW - sky).abs().amax(1, keepdim=True) > _FROM_SKY).float()
    return 1 + weight * F.max_pool2d(object_B1HW, _MARGIN, stride=1, padding=_MARGIN // 2)
