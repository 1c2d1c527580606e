"""Which of torch's attention kernels a training step uses."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

_SHORT = 1024  # latent positions; beyond, the matrix of attention weights costs more memory than the kernel time


def attention_for_training(latents: Tensor) -> AbstractContextManager[None]:
    """A context for forwards on latents [B, c, h, w] that will be differentiated.

    On a CPU and for short sequences, plain matrix products: the backward of torch's fused kernel took a quarter of a
    step of the pocket's pre-training, and without it a step takes 0.8 of the time. Elsewhere torch's own choice.
    """
    short = latents.shape[-2] * latents.shape[-1] <= _SHORT
    return sdpa_kernel(SDPBackend.MATH) if latents.device.type == "cpu" and short else nullcontext()
