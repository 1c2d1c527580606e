"""Times joint training of class tokens against training them one after another, in one run.

python -m eval.joint_speed --backbone pocket --steps 30

Both train the same classes for the same steps (1 shot and 1 prior image a step) from random latents, with the backbone
loaded once; what differs is how many classes share a forward. Prints both times and their ratio as one line of JSON.
"""

from __future__ import annotations

import json
import platform
import time
from dataclasses import dataclass

import torch
import tyro

from fewshot_diti import Backbone, TrainingConfig
from fewshot_diti.training import ClassShots, train_class_tokens


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What is timed.

    Attributes:
        backbone: "pocket", a folder or a hub id.
        classes: trained jointly, and one after another.
        steps: of every class.
    """

    backbone: str = "pocket"
    classes: int = 12
    steps: int = 30
    rank: int = 16
    samples_per_batch: int = 48


def measure(config: Speed) -> dict[str, float | int | str]:
    """Seconds of both ways and their ratio."""
    backbone = Backbone.from_pretrained(config.backbone)
    height, width = (n // backbone.vae_scale_factor for n in backbone.image_size)
    g = torch.Generator().manual_seed(0)
    prior = "a photo of an aircraft", torch.randn(8, backbone.latent_channels, height, width, generator=g)
    shots = []
    for c in range(config.classes):
        mean = torch.randn(4, 1, backbone.latent_channels, height, width, generator=g)
        prompt = f"a photo of a hta {c}, a type of aircraft."
        shots.append(ClassShots(label=c, prompt=prompt, mean=mean, std=torch.zeros_like(mean)))

    def seconds(groups: list[list[ClassShots]], steps: int) -> float:
        training = TrainingConfig(steps=steps, rank=config.rank, samples_per_batch=config.samples_per_batch)
        start = time.perf_counter()
        for group in groups:
            train_class_tokens(backbone, group, training, prior=prior)
        return time.perf_counter() - start

    one_by_one = [[s] for s in shots]
    seconds([shots], 2)
    seconds(one_by_one[:1], 2)
    joint, separate = seconds([shots], config.steps), seconds(one_by_one, config.steps)
    return {
        "backbone": config.backbone,
        "dtype": str(backbone.dtype),
        "device": torch.cuda.get_device_name() if backbone.device.type == "cuda" else platform.processor(),
        "threads": torch.get_num_threads(),
        "classes": config.classes,
        "steps": config.steps,
        "evaluations": 2 * config.classes * config.steps,
        "joint_s": round(joint, 2),
        "one_after_another_s": round(separate, 2),
        "ratio": round(joint / separate, 3),
    }


if __name__ == "__main__":
    print(json.dumps(measure(tyro.cli(Speed))))
