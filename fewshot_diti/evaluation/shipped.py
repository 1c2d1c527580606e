"""The row `fewshot-diti`: the classifier as it ships, with its own trials, race, witnesses and temperature."""

from __future__ import annotations

from dataclasses import asdict
from math import inf
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from fewshot_diti.classifier import DiTiClassifier
from fewshot_diti.config import FROM_PRESET, ScoringConfig, TrainingConfig
from fewshot_diti.evaluation.bench import Bench
from fewshot_diti.evaluation.kept_errors import save_errors
from fewshot_diti.evaluation.predicting import BANK, classify
from fewshot_diti.evaluation.run import learn, settle
from fewshot_diti.evaluation.task import Outcome, Task, fingerprint
from fewshot_diti.kept_tensors import kept_tensors
from fewshot_diti.presets import PRESETS


def shipped_settings(bench: Bench, num_shots: int, seed: int) -> dict[str, Any]:
    """All that decides what the classifier gives, beside images and backbone."""
    settings, preset = _classifier(bench, num_shots, seed).settings_for(num_shots), PRESETS[bench.backbone.kind]
    return settings.to_dict() | {
        "features": asdict(preset.features),
        "overlap": preset.overlap,
        "witnesses": {name: bench.witness(name).described for name in settings.scoring.witnesses},
    }


def prepare_shipped(bench: Bench, task: Task) -> None:
    """Trains the classifier and classifies the test images, unless that is on disk; the processes share the work.

    Beside the errors of other rows lie its bank and its predictions, so that a run that was cut short goes on.

    Raises:
        TrainingError: a class's loss was not finite.
    """
    path, made_by = shipped_file(bench, task)
    if kept_tensors(path, made_by) is not None:
        return
    start = perf_counter()
    classifier, folder = trained_classifier(bench, task)
    trained = perf_counter()
    records = classify(classifier, task.test, folder)
    scored = perf_counter()
    order = [classifier.classes_.tolist().index(name) for name in task.class_names]
    scores = torch.tensor([[inf if s is None else s for s in record["scores"]] for record in records])
    found = {
        "probabilities": torch.from_numpy(classifier.probabilities(scores.double()))[:, order].contiguous(),
        "evaluations": torch.tensor([record["evaluations"] for record in records]),
        "seconds": torch.tensor([trained - start, scored - trained]),
    }
    save_errors(path, found, made_by)


def trained_classifier(bench: Bench, task: Task) -> tuple[DiTiClassifier, Path]:
    """The classifier of a draw, trained unless its bank is on disk, and the folder of its bank and predictions."""
    path, made_by = shipped_file(bench, task)
    folder = path.with_suffix("")
    settle(folder, made_by)
    return learn(_classifier(bench, task.num_shots, task.seed), task, folder / BANK), folder


def shipped(bench: Bench, task: Task) -> Outcome:
    """What `prepare_shipped` left; raises FileNotFoundError where it failed."""
    path, made_by = shipped_file(bench, task)
    kept = kept_tensors(path, made_by)
    if kept is None:
        raise FileNotFoundError(f"{path} is missing: the classifier could not be trained.")
    training_seconds, scoring_seconds = kept["seconds"].tolist()
    return Outcome(
        probabilities=kept["probabilities"].numpy(),
        evaluations=float(kept["evaluations"].double().mean()),
        training_seconds=training_seconds,
        scoring_seconds=scoring_seconds,
    )


def _classifier(bench: Bench, num_shots: int, seed: int) -> DiTiClassifier:
    return DiTiClassifier(
        bench.backbone,
        concept=bench.concept,
        training=TrainingConfig(steps=bench.training(num_shots, seed).steps, seed=seed),
        scoring=ScoringConfig(trials=FROM_PRESET if bench.trials is None else bench.trials, seed=seed),
        geometry=bench.geometry,
    )


def shipped_file(bench: Bench, task: Task) -> tuple[Path, dict[str, str]]:
    """Where the probabilities of a draw are kept, and what decides them."""
    settings = f"{shipped_settings(bench, task.num_shots, task.seed)} {bench.concept}"
    path = bench.folder / f"shipped-{task.num_shots}-{task.seed}.safetensors"
    return path, bench.made_by(settings, fingerprint(task.shots), fingerprint(task.test))
