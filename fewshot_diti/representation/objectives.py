"""Losses of representation learning: one figure a sample; the caller averages.

Shapes in names: B batch, c, h, w latents, T timesteps of the schedule.
"""

from __future__ import annotations

from torch import Tensor


def denoising_error(predicted_Bchw: Tensor, noise_Bchw: Tensor) -> Tensor:
    """e = mean over the latent of (eps - predicted)^2, [B]."""
    return (noise_Bchw - predicted_Bchw).square().mean((1, 2, 3))


def posterior_mean_gap(error_T: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Squared distance, averaged over the latent, of the true posterior mean of x_{t-1} from the predicted one, [T].

    beta_t^2 / (alpha_t (1 - abar_t)) times the denoising error at t, from the posterior of Ho et al. (DDPM, eq. 7). At
    t = 0 there is no x_{t-1}; there it is the distance of x_0 itself, as abar_{-1} is 1.

    Args:
        error_T: `denoising_error` at each timestep.
        alphas_cumprod: abar, [T].
    """
    abar_T = alphas_cumprod.double()
    alpha_T = abar_T / abar_T.roll(1).index_fill(0, abar_T.new_zeros(1).long(), 1.0)
    return (1 - alpha_T) ** 2 / (alpha_T * (1 - abar_T)) * error_T.double()
