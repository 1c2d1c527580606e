"""A learned representation: features of images, and the noise that the backbone predicts with them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from fewshot_diti.backbone import Backbone
from fewshot_diti.backbone_search import find_backbone, remember_folder
from fewshot_diti.bank_files import CARD, CONFIG, from_fields, read_files, to_json, write_files, written_here
from fewshot_diti.data.arguments import as_list
from fewshot_diti.data.images import ImageGeometry, ImageSource
from fewshot_diti.encoding import Encoder
from fewshot_diti.hub import saved_folder
from fewshot_diti.representation.card import representation_card
from fewshot_diti.representation.estimator import FrozenPass, frozen_pass
from fewshot_diti.representation.methods import MethodConfig, Network, from_dict, to_dict
from fewshot_diti.representation.pdae import PdaeNetwork
from fewshot_diti.representation.subsets import ends_of_equal_snr

WEIGHTS = "representation.safetensors"
_WHAT = "representation"


class Representation:
    """A representation that was learned without labels on one frozen backbone.

    Attributes:
        backbone: the frozen Stable Diffusion.
        method: settings of the method that learned it.
        network: what was trained.
        prompt: the text that the U-Net reads.
        geometry: the size and resize rule that images get.
        history: what it was trained on and for how long, as the card writes it.
    """

    def __init__(
        self,
        backbone: Backbone,
        method: MethodConfig,
        network: Network,
        *,
        prompt: str,
        geometry: ImageGeometry,
        history: dict[str, Any],
    ) -> None:
        self.backbone, self.method = backbone, method
        self.network = network.to(backbone.device).eval().requires_grad_(False)
        self.prompt, self.geometry, self.history = prompt, geometry, history

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, backbone: Backbone | str | Path | None = None, **options: Any
    ) -> Representation:
        """Loads what `save_pretrained` wrote, from a folder or from `user/repo` on the Hugging Face hub.

        Args:
            backbone: the one it was learned on, or its folder or hub id where it has moved since.
            options: dtype and device, as of `Backbone.from_pretrained`.

        Raises:
            OSError: there is no such folder or repository, or the backbone is not found.
            ValueError: a file was changed or cut short, another version wrote it, or the backbone is another one.
        """
        folder = saved_folder(name_or_path)
        files = read_files(folder, (CONFIG, WEIGHTS), _WHAT)
        with written_here(folder):
            config = json.loads(files[CONFIG])
            method, geometry = from_dict(config["method"]), from_fields(ImageGeometry, config["geometry"])
            name, hash_, prompt, history = (config[k] for k in ("backbone", "backbone_hash", "prompt", "history"))
            if not all(isinstance(x, str) for x in (name, hash_, prompt)) or not isinstance(history, dict):
                raise ValueError("backbone, backbone_hash and prompt are texts, and history has fields.")
            weights = load(files[WEIGHTS])
            if not all(x.is_floating_point() and x.isfinite().all() for x in weights.values()):
                raise ValueError(f"{WEIGHTS} holds numbers that are not finite.")
            if method.dims > sum(x.numel() for x in weights.values()):  # before memory is taken for so many
                raise ValueError(f"{WEIGHTS} holds no weights for {method.dims} dimensions.")
        if not isinstance(backbone, Backbone):
            backbone = find_backbone(name, hash_, backbone, **options)
        if backbone.hash != hash_:
            raise ValueError(
                f"{folder} was learned on backbone {name!r} with hash {hash_}, not on {backbone.name!r} with hash "
                f"{backbone.hash}; pass the backbone it was learned on, or none."
            )
        with written_here(folder):
            network = method.build(backbone)
            network.load_state_dict(weights)
        return cls(backbone, method, network, prompt=prompt, geometry=geometry, history=history)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes settings, weights (not those of the backbone) and a card into a folder; all of them or none."""
        remember_folder(self.backbone)
        config = {
            "method": to_dict(self.method),
            "backbone": self.backbone.public_name,
            "backbone_hash": self.backbone.hash,
            "prompt": self.prompt,
            "geometry": self.geometry.to_dict(),
            "history": self.history,
        }
        weights = {name: value.cpu().contiguous() for name, value in self.network.state_dict().items()}
        pages = {CARD: representation_card(config).encode()}
        write_files(folder, {CONFIG: to_json(config), WEIGHTS: save(weights)}, pages)

    def features(self, images: ImageSource | Iterable[Any]) -> np.ndarray:
        """Features float32 [N, D] of images, each by itself, so that its neighbours cannot change it by a bit.

        Args:
            images: one or many, as `DiTiClassifier.predict` takes them.

        Raises:
            FileNotFoundError, ValueError, TypeError: an image cannot be read, or there is none.
        """
        encoder = Encoder(self.backbone, self.geometry, self.prompt)
        prepared = (encoder.prepare(image) for image in as_list(images)[1])
        return np.stack([self.encode(encoder.latents([image]))[0].cpu().numpy() for image in prepared])

    def subset(self, start: int, end: int) -> slice:
        """The dimensions that DiTi ties to the timesteps start <= t < end: `features(images)[:, subset(0, 100)]`.

        Raises:
            ValueError: the method ties none to timesteps, or no subset of timesteps begins there.
        """
        subsets = self.method.subsets(self.backbone)
        if subsets is None:
            raise ValueError(f"A representation learned by {self.method.name!r} ties no dimensions to timesteps.")
        return subsets.band(start, end)

    def stages(self) -> dict[str, slice]:
        """The dimensions of the published stages, by the timesteps at which this backbone's schedule has the published
        signal-to-noise ratios; errors as `subset`."""
        ends = (0, *ends_of_equal_snr(self.backbone.alphas_cumprod))
        return {f"t {a} to {b - 1}": self.subset(a, b) for a, b in pairwise(ends)}

    @torch.no_grad()
    def encode(self, latents_Bchw: Tensor) -> Tensor:
        """Features float32 [B, D] of scaled latents, the VAE's means."""
        return self.network.encode(latents_Bchw.to(self.backbone.device, torch.float32))

    def predict_noise(self, noisy_Bchw: Tensor, timesteps_B: Tensor, z_BD: Tensor) -> Tensor:
        """Noise float32 [B, c, h, w] that the backbone predicts in noisy latents with these features.

        Raises:
            ValueError: the method learns features alone.
        """
        frozen = frozen_pass(self.backbone, noisy_Bchw, timesteps_B, self.text_1LW)
        return self.predict_from(frozen, timesteps_B, z_BD)

    @torch.no_grad()
    def predict_from(self, frozen: FrozenPass, timesteps_B: Tensor, z_BD: Tensor) -> Tensor:
        """`predict_noise` from a pass of the backbone that was done already, for one feature after another."""
        if not isinstance(self.network, PdaeNetwork):
            raise ValueError(f"A representation learned by {self.method.name!r} has features and restores nothing.")
        dtype = self.backbone.dtype
        # hooks of G see every call, those of other threads too
        with self.backbone.lock, torch.autocast(self.backbone.device.type, dtype, enabled=dtype != torch.float32):
            return self.network.predict_noise(frozen, timesteps_B, z_BD)

    @cached_property
    def text_1LW(self) -> Tensor:
        """Embedding of the prompt."""
        return embed(self.backbone, self.prompt)


@torch.no_grad()
def embed(backbone: Backbone, prompt: str) -> Tensor:
    """Embedding [1, L, W] of a prompt."""
    return backbone.encode_text(backbone.tokenize([prompt]))
