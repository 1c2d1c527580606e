"""SimCLR: features that are alike for views of one image and unlike for other images (Chen et al., ICML 2020).

Views differ in colours, sharpness and frame, so such features ignore these. Views are not mirrored: noses of aircraft
point one way. Of the backbone only the VAE is used.

Shapes in names: N images, V views, B batch, c, h, w latents, D width of the feature, E width of the head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2 import functional

from fewshot_diti.backbone import Backbone
from fewshot_diti.representation.encoder import LatentEncoder, latent_shape
from fewshot_diti.representation.latents import Latents
from fewshot_diti.trials import stream

VIEWS = 4  # of an image that are encoded; two of them are compared in a step
_HEAD = 256
_ZOOM = 0.15  # at most, of the frame
_JITTER, _HUE = 0.8, 0.2  # of brightness, contrast and saturation, and of the hue
_P_JITTER, _P_GREY, _P_BLUR = 0.8, 0.2, 0.5
_BLUR = (0.1, 2.0)  # pixels
MADE = repr((VIEWS, _ZOOM, _JITTER, _HUE, _P_JITTER, _P_GREY, _P_BLUR, _BLUR))  # how views are made


class SimclrNetwork(nn.Module):
    """The encoder, and a head that is thrown away after training.

    Args:
        backbone: its latents are what is encoded.
        dims: D.
        temperature: of `nt_xent`.
    """

    def __init__(self, backbone: Backbone, dims: int, temperature: float) -> None:
        super().__init__()
        self.encoder = LatentEncoder(*latent_shape(backbone), dims)
        self.head = nn.Sequential(nn.Linear(dims, dims), nn.ReLU(), nn.Linear(dims, _HEAD))
        self.temperature = temperature

    def encode(self, latents_Bchw: Tensor) -> Tensor:
        """Features [B, D] of scaled latents, the VAE's means."""
        z_BD: Tensor = self.encoder(latents_Bchw)
        return z_BD

    def draw(self, latents: Latents, count: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        """Two views of different images, fp32 [B, c, h, w] each; fewer than `count` where there are no more images.

        Raises:
            ValueError: the latents hold no views, one view, or one image where several are asked for.
        """
        views = latents.views_NVchw
        if views is None or views.shape[1] < 2 or len(latents) < min(count, 2):
            raise ValueError("SimCLR compares views of several images; pass latents with views, of 2 images or more.")
        rows_B = torch.randperm(len(latents), generator=g)[:count]
        which_B2 = torch.rand(len(rows_B), views.shape[1], generator=g).argsort(1)[:, :2]
        return views[rows_B, which_B2[:, 0]].float(), views[rows_B, which_B2[:, 1]].float()

    def forward(self, one_Bchw: Tensor, other_Bchw: Tensor) -> dict[str, Tensor]:
        """The loss, and the accuracy with which the nearest of all other views is that of the same image."""
        heads = self.head(self.encode(torch.cat([one_Bchw, other_Bchw])))
        with torch.autocast(heads.device.type, enabled=False):
            loss, accuracy = nt_xent(heads.float(), self.temperature)
        return {"loss": loss, "accuracy": accuracy}


def nt_xent(heads_2BE: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each view's other view among all others, by cosine; and the share that is matched.

    Args:
        heads_2BE: the first views of B images, then their second views.
    """
    unit = F.normalize(heads_2BE, dim=1)
    logits = (unit @ unit.T / temperature).fill_diagonal_(float("-inf"))
    other = torch.arange(len(unit), device=unit.device).roll(len(unit) // 2)
    return F.cross_entropy(logits, other), (logits.argmax(1) == other).float().mean()


def encode_views(backbone: Backbone, pixels_CHW: Tensor, image_id: str) -> Tensor:
    """Means float16 [V, c, h, w] of the latents of an image's views."""
    return backbone.encode_images(views_of(pixels_CHW, image_id))[0].half()


def views_of(pixels_CHW: Tensor, image_id: str, seed: int = 0) -> Tensor:
    """Versions [V, 3, h, w] of an image in [-1, 1], drawn from (seed, image id, number of the view) alone.

    The frame is enlarged by up to 15 % and moves inside the image, so that no border is made up.
    """
    height, width = pixels_CHW.shape[1:]
    views = []
    for k in range(VIEWS):
        g = stream(seed, image_id, "views", k)
        view = (pixels_CHW + 1) / 2
        if g.uniform() < _P_JITTER:
            for adjust in (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation):
                view = adjust(view, 1 + _JITTER * g.uniform(-1, 1))
            view = functional.adjust_hue(view, _HUE * g.uniform(-1, 1))
        if g.uniform() < _P_GREY:
            view = functional.rgb_to_grayscale(view, 3)
        if g.uniform() < _P_BLUR:
            size = 2 * (height // 20) + 1  # a tenth of the height, as published
            view = functional.gaussian_blur(view, [size, size], [g.uniform(*_BLUR)] * 2)
        share = 1 / (1 + _ZOOM * g.uniform())
        h, w = round(share * height), round(share * width)
        top, left = round(g.uniform(0, height - h)), round(g.uniform(0, width - w))
        view = functional.resized_crop(view, top, left, h, w, [height, width], antialias=True)
        views.append(view.clamp(0, 1) * 2 - 1)
    return torch.stack(views)
