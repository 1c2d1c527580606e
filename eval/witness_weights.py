"""How much each witness should count beside the class tokens, from images of the val split.

    python -m eval.witness_weights --dataset fgvc:DIR --output docs/logs/witness-weights.json

Everything learns the same shots and is judged on the same images; then weights are fitted for each number of shots over
all draws. Class tokens have 16 even trials, and the weight 1.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor

from eval.val import draw, judged
from fewshot_diti import Backbone, DiTiClassifier, PredictionConfig, ScoringConfig, TrainingConfig
from fewshot_diti.backbone import load_backbone
from fewshot_diti.data import ImageSet, load_images
from fewshot_diti.evaluation.task import fingerprint
from fewshot_diti.files import write_atomically
from fewshot_diti.temperature import fit_weights
from fewshot_diti.witnesses import score_offsets

TOKENS = "class tokens"


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to read and where to write.

    Attributes:
        dataset: as `load_images` reads it; the shots come from its split train, the images from val.
        output: JSON with the log-probabilities of class tokens and every witness, and what was fitted; what is there
            is kept.
        witnesses: by name.
        shots, seeds: of the draws.
        trials: of class tokens.
    """

    dataset: str
    output: Path
    backbone: str = "pocket"
    concept: str = "aircraft"
    witnesses: tuple[str, ...] = ("features", "network", "linear-network")
    shots: tuple[int, ...] = (16, 4, 2, 1, 8)
    seeds: tuple[int, ...] = (1,)
    trials: int = 16
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"


def judge(config: Config, backbone: Backbone, shots: ImageSet, val: ImageSet, seed: int) -> dict[str, Tensor]:
    """Log-probabilities [N, C] of the val images by class tokens and each witness."""
    classifier = DiTiClassifier(
        backbone,
        concept=config.concept,
        training=TrainingConfig(seed=seed),
        scoring=ScoringConfig(
            witnesses=config.witnesses,
            witness_weights=(1.0,) * len(config.witnesses),
            trials=config.trials,
            density="even",
            seed=seed,
        ),
        prediction=PredictionConfig(schedule="exhaustive"),
    )
    classifier.fit(shots.decoded(), shots.label_names)
    return classifier.evidence(val.decoded())


def report(tokens: Tensor, log_p: dict[str, Tensor], truth: Tensor) -> dict[str, Any]:
    """Accuracy and likelihood of class tokens, of each witness, and of them together, with equal and fitted weights."""

    def verdict(scores: Tensor) -> dict[str, Any]:
        return judged(scores, truth)._asdict()

    found: dict[str, Any] = {"class tokens": verdict(tokens)} | {name: verdict(-p) for name, p in log_p.items()}
    alone = found["class tokens"]["temperature"]
    names = tuple(log_p)
    several = (names, *(tuple(x for x in names if x != out) for out in names)) if len(names) > 1 else ()
    for some in (*((name,) for name in names), *several):
        parts = [log_p[name] for name in some]
        start = [alone] * len(some)
        fitted = fit_weights(tokens, parts, truth, start, alone * (1 + 0.5 * len(some)))
        for how, weights in (("equal", start), ("fitted", list(fitted))):
            together = verdict(tokens + score_offsets(parts, weights))
            together["weights"] = [weight / alone for weight in weights]
            together["softer"] = together["temperature"] / alone
            found[f"{' + '.join(some)}, {how}"] = together
    for some in several:
        first, *rest = (log_p[name] for name in some)
        shares = fit_weights(-first, rest, truth, [1.0] * len(rest), 1.0)
        scores = -first + score_offsets(rest, shares) if rest else -first
        found[f"{' + '.join(some)}, fitted, without {TOKENS}"] = verdict(scores)
    return found


def main(config: Config) -> None:
    """Judges what is not judged yet, then fits and prints."""
    backbone = load_backbone(config.backbone, config.dtype)
    pool, val = (load_images(config.dataset, split) for split in ("train", "val"))
    made_from = {
        "images": fingerprint(val),
        "pool": fingerprint(pool),
        "concept": config.concept,
        "version": metadata.version("fewshot-diti"),
        "backbone": backbone.hash,
        "dtype": str(backbone.dtype),
        "trials": config.trials,
    }
    kept: dict[str, Any] = (
        json.loads(config.output.read_text()) if config.output.is_file() else made_from | {"judged": {}}
    )
    if {k: kept.get(k) for k in made_from} != made_from:
        raise ValueError(f"{config.output} was made of other images or with other settings; pass another --output.")
    names = val.label_names
    truth = torch.from_numpy(np.unique(names, return_inverse=True)[1])  # a classifier sorts its labels
    for num_shots in config.shots:
        for seed in config.seeds:
            known = kept["judged"].setdefault(f"{num_shots}-{seed}", {})
            if set((TOKENS, *config.witnesses)) <= set(known):
                continue
            found = judge(config, backbone, draw(pool, val, num_shots, seed), val, seed)
            known |= {name: [[round(x, 6) for x in row] for row in p.tolist()] for name, p in found.items()}
            write_atomically(config.output, json.dumps(kept).encode())
        parts = {
            name: torch.cat(
                [torch.tensor(kept["judged"][f"{num_shots}-{s}"][name], dtype=torch.float64) for s in config.seeds]
            )
            for name in (TOKENS, *config.witnesses)
        }
        kept[str(num_shots)] = report(-parts.pop(TOKENS), parts, truth.repeat(len(config.seeds)))
        print(f"\n{num_shots} shots, seeds {config.seeds}, {len(val)} images")
        for name, row in kept[str(num_shots)].items():
            weights = [round(weight, 2) for weight in row.get("weights", ())]
            more = f"weights {weights}, {row['softer']:.2f} x as soft" if weights else ""
            print(
                f"{name:60s} {100 * row['accuracy']:5.1f} % {row['nats']:.3f} nats {row['temperature']:.3g} {more}",
                flush=True,
            )
    write_atomically(config.output, json.dumps(kept).encode())


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
