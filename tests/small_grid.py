"""The grid of a few-shot table at tiny size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_commands
import timm
import torch
from PIL import Image
from rich.console import Console
from small_clip import save_tiny_clip

from fewshot_diti.commands.evaluate import EvalConfig
from fewshot_diti.presets import PRESETS

TRAINING = replace(small_commands.TRAINING, steps=3)
SCORING = replace(
    small_commands.SCORING, trials=24, weighting="relative", witnesses=(), witness_weights=(), calibration_images=24
)
PRESET = replace(small_commands.PRESET, steps=(TRAINING.steps,) * 5, training=asdict(TRAINING), scoring=asdict(SCORING))
COLOURS = {"nut": (200, 80, 80), "bolt": (80, 200, 80), "gear": (80, 80, 200)}
QUIET = Console(quiet=True)


@pytest.fixture
def small_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Settings that take a second, and no downloads."""
    monkeypatch.setitem(PRESETS, "pocket", PRESET)
    create = timm.create_model

    def same_weights_each_time(name: str, pretrained: bool, **k: Any) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return create(name, **k)

    monkeypatch.setattr(timm, "create_model", same_weights_each_time)
    yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("parts"), np.random.default_rng(0)
    for split, count in (("train", 3), ("test", 2)):
        for name, colour in COLOURS.items():
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(rng.normal(colour, 60, (32, 64, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    return folder


@pytest.fixture
def config(data: Path, backbone_folder: Path, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> EvalConfig:
    return EvalConfig(
        dataset=f"folder:{data}",
        backbone=str(backbone_folder),
        clip=f"local-dir:{save_tiny_clip(tmp_path_factory.mktemp('clip'), 'transformer')}",
        network="test_resnet",
        siblings="test_resnet",
        concept="part",
        shots=(1, 2),
        seeds=(1,),
        trials=3,
        output_dir=tmp_path,
    )
