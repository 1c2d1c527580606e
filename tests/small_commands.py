"""Command lines on a tiny folder of images, with settings that take a second."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import small_classifier
from PIL import Image

from fewshot_diti import PredictionConfig
from fewshot_diti.presets import PRESETS

CLASSES = ("bolt", "gear", "nut")
TRAINING = replace(small_classifier.TRAINING, steps=4, shots_per_step=1, samples_per_batch=48)
SCORING = replace(
    small_classifier.SCORING,
    trials=3,
    witnesses=("features",),
    witness_weights=(1.0,),
    temperature=0.001,
    calibration_images=3,
)
PREDICTION = PredictionConfig(schedule="exhaustive", batch_size=96)
PRESET = replace(
    PRESETS["pocket"],
    steps=(TRAINING.steps,) * 5,
    training=asdict(TRAINING),
    scoring=asdict(SCORING),
    temperatures=(SCORING.temperature,),
    prediction=asdict(PREDICTION),
)


def save_image(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def save_classes(folder: Path, count: int, seed: int = 0) -> Path:
    for c, name in enumerate(CLASSES):
        for i in range(count):
            save_image(folder / name / f"{i}.png", seed + 100 * c + i)
    return folder


def train_command(folder: Path, backbone: Path, output: Path, *more: str) -> list[str]:
    return ["train", str(folder), "--output_dir", str(output), "--concept", "part", "--backbone", str(backbone), *more]


def read_lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]
