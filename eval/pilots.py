"""How good a Stable Diffusion is as a backbone: class tokens, features, and both, on images of the val split.

    python -m eval.pilots --backbones pocket runs/pocket-sd-second/pipeline --dataset fgvc:DIR

What runs of pre-training are chosen by. Class tokens, which take minutes each, have 16 even trials; beside them the
features count with the best of some weights on the same images, which is optimistic. "Nats" are at the best
temperature.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fewshot_diti import DiTiClassifier, PredictionConfig, ScoringConfig, TrainingConfig
from fewshot_diti.backbone import Backbone, load_backbone
from fewshot_diti.data import ImageGeometry, ImageSet, check_disjoint, load_images, sample_shots
from fewshot_diti.data.arguments import group_shots
from fewshot_diti.encoding import Encoder
from fewshot_diti.presets import recommended
from fewshot_diti.prompts import Prompts
from fewshot_diti.temperature import fit_temperature, negative_log_likelihood
from fewshot_diti.witnesses import FittedWitness, UnetWitness, read_groups


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is compared.

    Attributes:
        backbones: names or folders.
        dataset: as `load_images` reads it; the shots come from its split train, the images from val.
        shots, seeds: of the draws at which the features are judged; the figures are means over seeds.
        token_shots, token_seeds: of those at which class tokens are judged too.
        weights: of the features beside the class tokens.
    """

    backbones: tuple[str, ...]
    dataset: str
    concept: str = "aircraft"
    shots: tuple[int, ...] = (1, 2, 4, 8, 16)
    seeds: tuple[int, ...] = (1, 2, 3)
    token_shots: tuple[int, ...] = (2, 16)
    token_seeds: tuple[int, ...] = (1,)
    weights: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0)
    trials: int = 16
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"


def token_evidence(config: Config, backbone: Backbone, shots: ImageSet, val: ImageSet, seed: int) -> dict[str, Tensor]:
    """Log-probabilities [N, C] of class tokens and of features."""
    scoring = ScoringConfig(
        witnesses=("features",), witness_weights=(1.0,), trials=config.trials, density="even", seed=seed
    )
    classifier = DiTiClassifier(
        backbone,
        concept=config.concept,
        training=TrainingConfig(seed=seed),
        scoring=scoring,
        prediction=PredictionConfig(schedule="exhaustive"),
    )
    classifier.fit(shots.decoded(), names_of(shots))
    return classifier.evidence(val.decoded())


def feature_evidence(config: Config, backbone: Backbone, shots: ImageSet, val: ImageSet, seed: int) -> Tensor:
    """Log-probabilities [N, C] of features."""
    prompts = Prompts.complete(None, None, config.concept)
    encoder = Encoder(backbone, ImageGeometry(size=backbone.image_size), prompts.generic)
    training = replace(recommended(int(np.bincount(shots.labels).max()), backbone.kind).training, seed=seed)
    groups = group_shots(shots.decoded(), names_of(shots), encoder.prepare)
    witness = UnetWitness()
    fitted = FittedWitness.fit("features", witness, read_groups(witness, encoder, groups, training), training)
    images = [encoder.prepare(image) for image in val.decoded()]
    return fitted.log_probabilities(encoder, images, encoder.latents(images))


def names_of(images: ImageSet) -> list[str]:
    """The class of each image."""
    return [images.class_names[c] for c in images.labels]


def judged(log_p_NC: Tensor, truth_N: Tensor) -> tuple[float, float]:
    """Accuracy in %, and nats."""
    accuracy = 100 * float((log_p_NC.argmax(1) == truth_N).double().mean())
    return accuracy, negative_log_likelihood(-log_p_NC, truth_N, fit_temperature(-log_p_NC, truth_N))


def main(config: Config) -> None:
    """Prints a table of the features, and one of class tokens."""
    pool, val = (load_images(config.dataset, split) for split in ("train", "val"))
    truth = torch.from_numpy(np.unique(names_of(val), return_inverse=True)[1])  # labels are sorted in a classifier

    def draw(num_shots: int, seed: int) -> ImageSet:
        shots = pool.subset(sample_shots(pool, num_shots, seed).rows(pool))
        check_disjoint(shots, val)
        return shots

    features = Table("backbone", *(f"{k} shots" for k in config.shots))
    features.title = f"Features: accuracy in % (nats) on {len(val)} images, mean of seeds {config.seeds}"
    tokens = Table("backbone", "shots", "class tokens", "features", "both, at its best weight")
    tokens.title = f"The same with class tokens, seeds {config.token_seeds}"
    for name in config.backbones:
        backbone = load_backbone(name, config.dtype)
        cells = []
        for k in config.shots:
            found = [judged(feature_evidence(config, backbone, draw(k, s), val, s), truth) for s in config.seeds]
            cells.append("{:.1f} ({:.2f})".format(*np.mean(found, axis=0)))
        print(name, *cells, flush=True)
        features.add_row(name, *cells)
        for k in config.token_shots:
            rows = []
            for seed in config.token_seeds:
                evidence = token_evidence(config, backbone, draw(k, seed), val, seed)
                alone, feature = evidence["class tokens"], evidence["features"]
                both = [judged(alone + weight * feature, truth) for weight in config.weights]
                rows.append([judged(alone, truth), judged(feature, truth), *both])
            means = np.mean(rows, axis=0)
            best = int(means[2:, 1].argmin())
            cells = ["{:.1f} ({:.2f})".format(*means[i]) for i in (0, 1, 2 + best)]
            cells[-1] += f" at {config.weights[best]}"
            print(name, k, *cells, flush=True)
            tokens.add_row(name, str(k), *cells)
    Console(width=140).print(features, tokens)


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
