"""The network that makes a feature of an image: PDAE's stacked convolutions on the latent.

Shapes in names: B batch, c, h, w latents, D width of the feature.
"""

from __future__ import annotations

from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

_FIRST, _REST = 128, 256  # channels
_GROUPS, _HEADS = 32, 4
_LAST_SIDE = 2  # latent positions along the shorter side that are left for the linear layer


class LatentEncoder(nn.Module):
    """z = E(x_0) (PDAE), of a latent instead of pixels: the latent is what is diffused.

    Args:
        channels: c of a latent.
        size: (h, w) of a latent.
        dims: D.
    """

    def __init__(self, channels: int, size: tuple[int, int], dims: int) -> None:
        super().__init__()
        attention = Attention(
            _FIRST,
            heads=_HEADS,
            dim_head=_FIRST // _HEADS,
            bias=True,
            norm_num_groups=_GROUPS,
            residual_connection=True,
        )
        layers: list[nn.Module] = [
            nn.Conv2d(channels, _FIRST, 3, padding=1),
            *_halved(_FIRST, _FIRST),
            attention,
            *_halved(_FIRST, _REST),
        ]
        height, width = (-(-side // 4) for side in size)
        while min(height, width) > _LAST_SIDE:
            layers += _halved(_REST, _REST)
            height, width = -(-height // 2), -(-width // 2)
        layers += [nn.GroupNorm(_GROUPS, _REST), nn.SiLU(), nn.Flatten(), nn.Linear(_REST * height * width, dims)]
        self.layers = nn.Sequential(*layers)

    def forward(self, latents_Bchw: Tensor) -> Tensor:
        """Features [B, D] of scaled latents, the VAE's means."""
        features_BD: Tensor = self.layers(latents_Bchw)
        return features_BD


def _halved(channels: int, out_channels: int) -> tuple[nn.Module, ...]:
    """Normalises, and halves both sides, rounding up."""
    return (
        nn.GroupNorm(_GROUPS, channels),
        nn.SiLU(),
        nn.Conv2d(channels, out_channels, 3, stride=2, padding=1),
    )
