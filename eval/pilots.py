"""How good a Stable Diffusion is as a backbone: class tokens, features, and both, on images of the val split.

    python -m eval.pilots --backbones pocket runs/pocket-sd-second/pipeline --dataset fgvc:DIR

What runs of pre-training are chosen by. Class tokens have 16 even trials, and the features count with the weight of the
preset.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from fewshot_diti import DiTiClassifier, PredictionConfig, ScoringConfig, TrainingConfig
from fewshot_diti.backbone import load_backbone
from fewshot_diti.data import ImageSet, check_disjoint, load_images, sample_shots
from fewshot_diti.presets import PRESETS
from fewshot_diti.temperature import fit_temperature, negative_log_likelihood


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is compared.

    Attributes:
        backbones: names or folders.
        dataset: as `load_images` reads it; the shots come from its split train, the images from val.
        shots, seeds: of the draws.
    """

    backbones: tuple[str, ...]
    dataset: str
    concept: str = "aircraft"
    shots: tuple[int, ...] = (2, 16)
    seeds: tuple[int, ...] = (1,)
    trials: int = 16
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"


def evidence(config: Config, backbone: str, shots: ImageSet, val: ImageSet, seed: int) -> dict[str, torch.Tensor]:
    """Log-probabilities [N, C] of class tokens, of features, and of both."""
    loaded = load_backbone(backbone, config.dtype)
    num_shots = int(np.bincount(shots.labels).max())
    weights = PRESETS[loaded.kind].weights_of(("features",), num_shots)
    scoring = ScoringConfig(
        witnesses=("features",), witness_weights=weights, trials=config.trials, density="even", seed=seed
    )
    classifier = DiTiClassifier(
        loaded,
        concept=config.concept,
        training=TrainingConfig(seed=seed),
        scoring=scoring,
        prediction=PredictionConfig(schedule="exhaustive"),
    )
    classifier.fit(shots.decoded(), [shots.class_names[c] for c in shots.labels])
    found = classifier.evidence(val.decoded())
    order = [classifier.classes_.tolist().index(name) for name in val.class_names]
    found = {name: log_p[:, order] for name, log_p in found.items()}
    return found | {"both": found["class tokens"] + weights[0] * found["features"]}


def main(config: Config) -> None:
    """Prints one table."""
    pool, val = (load_images(config.dataset, split) for split in ("train", "val"))
    truth = torch.from_numpy(val.labels)
    table = Table("backbone", "shots", "class tokens", "features", "both")
    table.title = f"{len(val)} images, seeds {config.seeds}: accuracy in % (nats at the best temperature)"
    for backbone in config.backbones:
        for num_shots in config.shots:
            rows: dict[str, list[tuple[float, float]]] = {}
            for seed in config.seeds:
                shots = pool.subset(sample_shots(pool, num_shots, seed).rows(pool))
                check_disjoint(shots, val)
                for name, log_p in evidence(config, backbone, shots, val, seed).items():
                    accuracy = 100 * float((log_p.argmax(1) == truth).double().mean())
                    nats = negative_log_likelihood(-log_p, truth, fit_temperature(-log_p, truth))
                    rows.setdefault(name, []).append((accuracy, nats))
            cells = ["{:.1f} ({:.2f})".format(*np.mean(row, axis=0)) for row in rows.values()]
            print(backbone, num_shots, *cells, flush=True)
            table.add_row(backbone, str(num_shots), *cells)
    Console().print(table)


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
