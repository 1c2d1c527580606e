"""Which of torch's attention kernels a training step uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

_SHORT = 1024  # latent positions; beyond, the matrix of attention weights costs more memory than the kernel time


@contextmanager
def attention_for_training(latents: Tensor) -> Iterator[None]:
    """A context for forwards on latents [B, c, h, w] that will be differentiated.

    On a CPU and for short sequences, plain matrix products: the backward of torch's fused kernel took a quarter of a
    step of the pocket's pre-training, and without it a step takes 0.8 of the time. In bfloat16 these stay in bfloat16,
    which torch by itself would not do: the rest of the network rounds as much, and the gradient of the pocket's class
    tokens has a cosine of 0.91 with that of float32 then, and of 0.90 otherwise (36 of them). Elsewhere torch chooses.
    """
    if latents.device.type != "cpu" or latents.shape[-2] * latents.shape[-1] > _SHORT:
        yield
        return
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # of the CPU too, whatever its name says
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)
