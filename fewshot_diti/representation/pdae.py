"""PDAE and DiTi: features with which the frozen backbone restores an image.

Shapes in names: B batch, c, h, w latents, D width of the feature, T timesteps of the schedule.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from fewshot_diti.backbone import Backbone
from fewshot_diti.representation.encoder import LatentEncoder, latent_shape
from fewshot_diti.representation.estimator import FrozenPass, GradientEstimator, at_timesteps
from fewshot_diti.representation.objectives import denoising_error
from fewshot_diti.representation.subsets import Subsets
from fewshot_diti.timesteps import pdae_weights

Mode = Literal["base", "stop_grad"]


class PdaeNetwork(nn.Module):
    """What PDAE trains (Zhang et al., PDAE, NeurIPS 2022): an encoder E, and G, which shifts the backbone's prediction.

    The predicted noise is eps_theta - sqrt(1 - abar_t) G(x_t, t, z), z = E(x_0), in training and in sampling.

    Args:
        dims: D.
    """

    def __init__(self, backbone: Backbone, dims: int) -> None:
        super().__init__()
        self.sigmas_T: Tensor
        self.weights_T: Tensor
        self.encoder = LatentEncoder(*latent_shape(backbone), dims)
        self.estimator = GradientEstimator(backbone.unet, dims)
        abar_T = backbone.alphas_cumprod
        self.register_buffer("sigmas_T", (1 - abar_T).sqrt().float(), persistent=False)
        self.register_buffer("weights_T", pdae_weights(abar_T).float(), persistent=False)
        # as the backbone's: convolutions on a CPU are faster so, and a loaded network computes what a trained one did
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def encode(self, latents_Bchw: Tensor) -> Tensor:
        """Features z [B, D] of scaled latents, the VAE's means."""
        z_BD: Tensor = self.encoder(latents_Bchw)
        return z_BD

    def forward(self, latents_Bchw: Tensor, frozen: FrozenPass, timesteps_B: Tensor) -> Tensor:
        """Predicted noise [B, c, h, w] of noisy latents with the features of `latents_Bchw`, the VAE's means."""
        return self.predict_noise(frozen, timesteps_B, self.encode(latents_Bchw))

    def predict_noise(self, frozen: FrozenPass, timesteps_B: Tensor, z_BD: Tensor) -> Tensor:
        """Predicted noise [B, c, h, w] with given features."""
        sigma = at_timesteps(self.sigmas_T, timesteps_B, frozen.noise_Bchw)
        return frozen.noise_Bchw - sigma * self.estimator(frozen.calls, self.visible(z_BD, timesteps_B))

    def visible(self, z_BD: Tensor, timesteps_B: Tensor) -> Tensor:
        """What G sees of the features at the timesteps: all of it."""
        return z_BD

    def loss(self, predicted_Bchw: Tensor, noise_Bchw: Tensor, timesteps_B: Tensor) -> Tensor:
        """lambda_t times the denoising error, [B]."""
        return self.weights_T[timesteps_B] * denoising_error(predicted_Bchw, noise_Bchw)


class DitiNetwork(PdaeNetwork):
    """PDAE whose G sees at t the features of the subsets up to that of t alone (Yue et al., DiTi, ICLR 2024, eq. 5).

    Args:
        mode: "base", or "stop_grad", in which the loss at t teaches E the dimensions of the subset of t alone.
    """

    def __init__(self, backbone: Backbone, subsets: Subsets, mode: Mode) -> None:
        super().__init__(backbone, subsets.dims)
        self.subsets, self.mode = subsets, mode

    def visible(self, z_BD: Tensor, timesteps_B: Tensor) -> Tensor:
        """z of the own and the earlier subsets, 0 elsewhere."""
        own_BD, earlier_BD = self.subsets.own(timesteps_B), self.subsets.earlier(timesteps_B)
        return z_BD * own_BD + (z_BD.detach() if self.mode == "stop_grad" else z_BD) * earlier_BD
