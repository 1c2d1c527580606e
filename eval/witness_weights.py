"""How much each witness should count beside the class tokens, from held-out shots.

    python -m eval.witness_weights --errors docs/logs/fewshot/errors --output docs/logs/witness-weights.json

Reads the errors of held-out shots that a table has kept (two folds), lets every witness learn the same folds, and fits
weights for each number of shots over all draws. A fold at 16 shots has 8 to learn from.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from safetensors.torch import load_file
from torch import Tensor

from fewshot_diti.backbone import Backbone
from fewshot_diti.calibration import Fit, held_out_log_probabilities
from fewshot_diti.classifier import DiTiClassifier
from fewshot_diti.data import load_bundled, sample_shots
from fewshot_diti.data.arguments import group_shots
from fewshot_diti.evaluation.bench import FOLDS
from fewshot_diti.files import write_atomically
from fewshot_diti.presets import PRESETS
from fewshot_diti.temperature import fit_temperature, fit_weights, negative_log_likelihood
from fewshot_diti.timesteps import trial_weights, weighted_mean
from fewshot_diti.weighting import timestep_weights
from fewshot_diti.witnesses import FittedWitness, read_groups, score_offsets


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to read and where to write.

    Attributes:
        errors: folder of kept errors, `diti-SHOTS-SEED.safetensors`.
        output: JSON with the log-probabilities of every witness and what was fitted; what is there is kept.
        witnesses: by name.
        shots, seeds: draws of the table.
    """

    errors: Path
    output: Path
    witnesses: tuple[str, ...] = ("features", "network", "linear-network")
    shots: tuple[int, ...] = (16, 4, 8, 2)
    seeds: tuple[int, ...] = (1, 2, 3)


def judge(config: Config, num_shots: int, seed: int, names: list[str]) -> dict[str, Tensor]:
    """Log-probabilities [N, C] of held-out shots by each witness, in the order of the kept errors."""
    pool = load_bundled("train")
    classifier = DiTiClassifier(concept="aircraft", witnesses=names)
    settings = classifier.checked_settings(num_shots)
    training, scoring = replace(settings.training, seed=seed), replace(settings.scoring, folds=FOLDS)
    settings = settings._replace(training=training, scoring=scoring)
    drawn = pool.subset(sample_shots(pool, num_shots, seed).rows(pool))
    labels = [drawn.class_names[c] for c in drawn.labels]
    groups = group_shots(drawn.decoded(), labels, classifier.encoder_.prepare)
    fit = Fit(encoder=classifier.encoder_, prompts=classifier.prompts_, settings=settings, groups=groups)
    found = {}
    for name in names:
        witness = classifier.witnesses_[name]
        shots = read_groups(witness, classifier.encoder_, groups, training)
        fitted = FittedWitness(name, witness, {x: shots[x] for x in sorted(shots)}, {})
        found[name] = held_out_log_probabilities(fit, fitted)
    return found


def token_scores(path: Path, weighting: str, alphas_cumprod: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [N, C] of held-out shots by the class tokens alone, columns in sorted order, and their classes [N]."""
    kept = load_file(path)
    errors, times = kept["held_out"], kept["timesteps"]
    weights = trial_weights(timestep_weights(weighting, alphas_cumprod, shot_errors=(errors, times)), times)
    return weighted_mean(errors, weights / weights.mean()), kept["held_out_labels"]


def report(tokens: Tensor, log_p: dict[str, Tensor], truth: Tensor) -> dict[str, Any]:
    """Accuracy and likelihood of the class tokens, of each witness, and of both together, with the weights fitted."""

    def judged(scores: Tensor) -> dict[str, float]:
        best = fit_temperature(scores, truth)
        return {
            "accuracy": float((scores.argmin(1) == truth).double().mean()),
            "nats": negative_log_likelihood(scores, truth, best),
            "temperature": best,
        }

    found: dict[str, Any] = {"class tokens": judged(tokens)} | {name: judged(-p) for name, p in log_p.items()}
    alone = found["class tokens"]["temperature"]
    names = tuple(log_p)
    several = (names, *(tuple(x for x in names if x != out) for out in names)) if len(names) > 1 else ()
    for some in (*((name,) for name in names), *several):
        parts = [log_p[name] for name in some]
        start = [alone] * len(some)
        fitted = fit_weights(tokens, parts, truth, start, alone * (1 + 0.5 * len(some)))
        for how, weights in (("equal", start), ("fitted", list(fitted))):
            together = judged(tokens + score_offsets(parts, weights))
            together["weights"] = [weight / alone for weight in weights]  # type: ignore[assignment]
            together["softer"] = together["temperature"] / alone
            found[f"{' + '.join(some)}, {how}"] = together
    found["witnesses without class tokens"] = judged(sum(-p for p in log_p.values()))  # type: ignore[arg-type]
    return found


def main(config: Config) -> None:
    """Judges what is not judged yet, then fits and prints."""
    kept: dict[str, Any] = json.loads(config.output.read_text()) if config.output.is_file() else {"judged": {}}
    for seed in config.seeds:
        for num_shots in config.shots:
            known = kept["judged"].setdefault(f"{num_shots}-{seed}", {})
            if missing := [name for name in config.witnesses if name not in known]:
                found = judge(config, num_shots, seed, missing)
                known |= {name: [[round(x, 4) for x in row] for row in p.tolist()] for name, p in found.items()}
                write_atomically(config.output, json.dumps(kept).encode())
                print(f"judged {num_shots}-{seed}", flush=True)
    weighting = PRESETS["pocket"].scoring["weighting"]
    alphas_cumprod = Backbone.from_pretrained("pocket").alphas_cumprod
    for num_shots in config.shots:
        draws = [
            (*token_scores(config.errors / f"diti-{num_shots}-{seed}.safetensors", weighting, alphas_cumprod), seed)
            for seed in config.seeds
        ]
        parts = {
            name: torch.cat(
                [torch.tensor(kept["judged"][f"{num_shots}-{s}"][name], dtype=torch.float64) for s in config.seeds]
            )
            for name in config.witnesses
        }
        truth = torch.cat([truth for _, truth, _ in draws])
        kept[str(num_shots)] = report(torch.cat([scores for scores, _, _ in draws]), parts, truth)
        print(f"\n{num_shots} shots, {num_shots // FOLDS} of them to learn from; {len(truth)} held-out shots")
        for name, row in kept[str(num_shots)].items():
            weights = [round(weight, 2) for weight in row.get("weights", ())]
            more = f"weights {weights}, {row['softer']:.2f} x as soft" if weights else ""
            print(f"{name:45s} {100 * row['accuracy']:5.1f} % {row['nats']:.3f} nats {row['temperature']:.3g} {more}")
    write_atomically(config.output, json.dumps(kept).encode())


if __name__ == "__main__":
    main(tyro.cli(Config))
