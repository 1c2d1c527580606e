"""The network that makes a feature of an image, PDAE's stacked convolutions on the latent, and its mirror.

Shapes in names: B batch, c, h, w latents, D width of the feature.
"""

from __future__ import annotations

from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from fewshot_diti.backbone import Backbone

_FIRST, _REST = 128, 256  # channels
_GROUPS, _HEADS = 32, 4
_LAST_SIDE = 2  # latent positions along the shorter side that are left for the linear layer


def latent_shape(backbone: Backbone) -> tuple[int, tuple[int, int]]:
    """c and (h, w) of the backbone's latents."""
    height, width = (side // backbone.vae_scale_factor for side in backbone.image_size)
    return backbone.latent_channels, (height, width)


class LatentEncoder(nn.Module):
    """z = E(x_0) (PDAE), of a latent instead of pixels: the latent is what is diffused.

    Args:
        channels: c of a latent.
        size: (h, w) of a latent.
        dims: D.
    """

    def __init__(self, channels: int, size: tuple[int, int], dims: int) -> None:
        super().__init__()
        self.dims = dims
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
        *_, (height, width) = sizes = _sizes(size)
        for _ in sizes[3:]:
            layers += _halved(_REST, _REST)
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


class LatentDecoder(nn.Module):
    """The mirror of `LatentEncoder`: a latent from a feature.

    Args:
        channels: c of a latent.
        size: (h, w) of a latent.
        dims: D.
    """

    def __init__(self, channels: int, size: tuple[int, int], dims: int) -> None:
        super().__init__()
        *larger, (height, width) = _sizes(size)
        layers: list[nn.Module] = [nn.Linear(dims, _REST * height * width), nn.Unflatten(1, (_REST, height, width))]
        before = _REST
        for place, side in reversed([*enumerate(larger)]):
            after = _REST if place > 1 else _FIRST
            layers += [nn.GroupNorm(_GROUPS, before), nn.SiLU(), nn.Upsample(side)]
            layers += [nn.Conv2d(before, after, 3, padding=1)]
            before = after
        layers += [nn.GroupNorm(_GROUPS, before), nn.SiLU(), nn.Conv2d(before, channels, 3, padding=1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, z_BD: Tensor) -> Tensor:
        """Scaled latents [B, c, h, w]."""
        latents_Bchw: Tensor = self.layers(z_BD)
        return latents_Bchw


def _sizes(size: tuple[int, int]) -> list[tuple[int, int]]:
    """(h, w) of a latent and after each halving, two or more, until the shorter side is small."""
    found = [size]
    while len(found) < 3 or min(found[-1]) > _LAST_SIDE:
        found.append((-(-found[-1][0] // 2), -(-found[-1][1] // 2)))
    return found
