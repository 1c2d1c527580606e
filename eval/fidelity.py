"""Do samples prompted by a variant show that variant? The share that a probe trained on renders classifies as it.

    python -m eval.fidelity --data DIR --backbone pocket

The probe is a logistic regression on latents of the pre-training renders, tested on renders it has not seen; it then
classifies samples of every variant's prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from fewshot_diti import Backbone
from fewshot_diti.prompts import with_article
from recipes.pocket.renders import HELD_OUT, load_renders, split_held_out


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """`data` is the folder of pre-training renders; `samples` are drawn of each variant, seeds 0 onwards."""

    data: Path
    backbone: str = "pocket"
    held_out: Path = HELD_OUT
    samples: int = 16
    steps: int = 30
    guidance_scale: float = 3.0


def main(config: Fidelity) -> None:
    """Prints the probe's own accuracy and the share of samples it classifies as their prompt's variant."""
    backbone = Backbone.from_pretrained(config.backbone)
    renders, _ = split_held_out(load_renders(config.data, backbone.image_size), config.held_out)
    renders = renders.subset(range(0, len(renders), 3))
    latents = backbone.encode_images(renders.pixels_NCHW.float() / 127.5 - 1)[0].flatten(1).numpy()
    variants = np.array(renders.variants)
    test = np.arange(len(variants)) % 4 == 0
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=1e-3, max_iter=200))
    probe.fit(latents[~test], variants[~test])
    print(f"probe on {test.sum()} unseen renders: {100 * probe.score(latents[test], variants[test]):.1f} %")
    shares = {}
    for variant in sorted(set(renders.variants)):
        samples = backbone.generate_latents(
            f"a photo of {with_article(variant)}, a type of aircraft",
            range(config.samples),
            size=backbone.image_size,
            steps=config.steps,
            guidance_scale=config.guidance_scale,
        )
        shares[variant] = float((probe.predict(samples.flatten(1).numpy()) == variant).mean())
        print(f"{variant:20s} {100 * shares[variant]:5.1f} %")
    mean = 100 * np.mean(list(shares.values()))
    print(f"samples called by the variant of their prompt: {mean:.1f} % (chance {100 / len(shares):.1f} %)")


if __name__ == "__main__":
    main(tyro.cli(Fidelity))
