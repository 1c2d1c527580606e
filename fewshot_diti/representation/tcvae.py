"""The beta-TCVAE: a variational autoencoder of latents whose dimensions are pushed to be independent (Chen et al.,
NeurIPS 2018).

Shapes in names: B batch, c, h, w latents, D width of the feature.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fewshot_diti.backbone import Backbone
from fewshot_diti.representation.encoder import LatentDecoder, LatentEncoder, latent_shape
from fewshot_diti.representation.latents import Latents


class Divergence(NamedTuple):
    """The KL divergence of q(z | x) from N(0, I), averaged over a batch, in nats, in its three parts.

    Minibatch-weighted sampling takes the density of z for smaller than it is, by a factor of up to the number N of
    images. So the parts are off by up to log N, (D - 1) log N and -D log N; their sum is not, nor are gradients.

    Attributes:
        mutual_information: of image and z.
        total_correlation: of the dimensions of z.
        dimension_wise_kl: divergence of each dimension's marginal, summed.
    """

    mutual_information: Tensor
    total_correlation: Tensor
    dimension_wise_kl: Tensor


class TcvaeNetwork(nn.Module):
    """Encoder and decoder of latents; the feature is the mean of q(z | x).

    Args:
        backbone: its latents are what is encoded.
        dims: D.
        beta: weight of the total correlation.
    """

    def __init__(self, backbone: Backbone, dims: int, beta: float) -> None:
        super().__init__()
        shape = latent_shape(backbone)
        self.encoder = LatentEncoder(*shape, 2 * dims)
        self.decoder = LatentDecoder(*shape, dims)
        self.beta = beta

    def encode(self, latents_Bchw: Tensor) -> Tensor:
        """Features [B, D] of scaled latents, the VAE's means."""
        return self._posterior(latents_Bchw)[0]

    def draw(self, latents: Latents, count: int, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Latents fp32 [B, c, h, w] of different images, standard normal noise [B, D], and the number of all images."""
        rows_B = torch.randperm(len(latents), generator=g)[:count]
        noise_BD = torch.randn(len(rows_B), self.encoder.dims // 2, generator=g)
        return latents.mean_Nchw[rows_B].float(), noise_BD, torch.tensor(len(latents))

    def forward(self, latents_Bchw: Tensor, noise_BD: Tensor, num_images: Tensor) -> dict[str, Tensor]:
        """The loss, per value of a latent, and its parts in nats per image."""
        mean_BD, log_variance_BD = self._posterior(latents_Bchw)
        z_BD = mean_BD + noise_BD * (log_variance_BD / 2).exp()
        error = (latents_Bchw - self.decoder(z_BD).float()).square().flatten(1).sum(1).mean() / 2
        parts = divergence(z_BD, mean_BD, log_variance_BD, int(num_images))
        loss = error + parts.mutual_information + self.beta * parts.total_correlation + parts.dimension_wise_kl
        return {"loss": loss / latents_Bchw[0].numel(), "error": error, **parts._asdict()}

    def _posterior(self, latents_Bchw: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance of q(z | x), fp32 [B, D] each."""
        mean_BD, log_variance_BD = self.encoder(latents_Bchw).float().chunk(2, dim=1)
        return mean_BD, log_variance_BD


def divergence(z_BD: Tensor, mean_BD: Tensor, log_variance_BD: Tensor, num_images: int) -> Divergence:
    """The parts, with q(z) and its marginals estimated from the batch (minibatch-weighted sampling, appendix C.1).

    Args:
        z_BD: a sample of each q(z | x).
        num_images: that the batch was drawn from.
    """
    log_q_BBD = _log_normal(z_BD[:, None], mean_BD[None], log_variance_BD[None])  # of z_i under q(z | x_j)
    weight = math.log(num_images * len(z_BD))
    log_q_z_B = log_q_BBD.sum(2).logsumexp(1) - weight
    log_product_B = (log_q_BBD.logsumexp(1) - weight).sum(1)
    log_q_given_x_B = _log_normal(z_BD, mean_BD, log_variance_BD).sum(1)
    log_prior_B = _log_normal(z_BD, torch.zeros_like(z_BD), torch.zeros_like(z_BD)).sum(1)
    return Divergence(
        (log_q_given_x_B - log_q_z_B).mean(), (log_q_z_B - log_product_B).mean(), (log_product_B - log_prior_B).mean()
    )


def _log_normal(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    return -((x - mean).square() * (-log_variance).exp() + log_variance + math.log(2 * math.pi)) / 2
