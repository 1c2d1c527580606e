"""What a command will cost, told before it starts."""

from __future__ import annotations

import time

import torch
from rich.console import Console

from fewshot_diti.backbone import Backbone

LARGE_UNET = 200_000_000  # parameters; beyond it a CPU needs hours, and the user should know before


def announce_time(backbone: Backbone, size: tuple[int, int], evaluations: int, console: Console) -> None:
    """Before a large backbone starts on a CPU: measures one evaluation and prints how long all will take."""
    if backbone.device.type != "cpu" or backbone.unet.num_parameters() <= LARGE_UNET or not evaluations:
        return
    shape = (1, backbone.latent_channels, *(s // backbone.vae_scale_factor for s in size))
    with torch.no_grad():
        text = backbone.encode_text(backbone.tokenize([""]))
        start = time.perf_counter()
        backbone.errors(torch.zeros(shape), torch.zeros(shape), torch.tensor([0]), text)
    seconds = time.perf_counter() - start
    hours = seconds * evaluations / 3600
    console.out(
        f"This backbone has {backbone.unet.num_parameters() / 1e6:.0f} million parameters and runs on the CPU: "
        f"{seconds:.2g} s an evaluation, about {evaluations} evaluations, {hours:.1f} hours in all. A GPU is faster."
    )
