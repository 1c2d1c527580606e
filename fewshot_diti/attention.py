"""Which of torch's attention kernels a training step uses."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def attention_for_training(device: torch.device) -> AbstractContextManager[None]:
    """A context for forwards that will be differentiated.

    On a CPU, plain matrix products: on short sequences the backward of torch's fused kernel took a quarter of a step of
    the pocket's pre-training, and without it a step takes 0.8 of the time. Elsewhere torch's own choice.
    """
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
