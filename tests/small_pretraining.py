"""Renders, an autoencoder of the pocket's kind at tiny size, and a pre-training that is cut short."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage

from fewshot_diti import loop
from recipes.pocket.vae import VaeConfig


@pytest.fixture(scope="session")
def renders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of twelve images of two variants to train on and of one that is left out."""
    folder = tmp_path_factory.mktemp("renders")
    rng = np.random.default_rng(0)
    rows = {
        "image": [PILImage.fromarray(rng.integers(0, 255, (32, 64, 3), np.uint8)) for _ in range(12)],
        "variant": ["A1", "A2", "B1"] * 4,
        "manufacturer": ["A", "A", "B"] * 4,
        "airline": ["Delta", "default", "200-d-icwd"] * 4,
    }
    features = Features(
        {"image": Image(), "variant": Value("string")} | dict.fromkeys(("manufacturer", "airline"), Value("string"))
    )
    Dataset.from_dict(rows, features=features).to_parquet(str(folder / "train.parquet"))
    (folder / "held_out.json").write_text('["B1"]')
    return folder


def vae_config(data: Path, output_dir: Path) -> VaeConfig:
    return VaeConfig(
        data=data,
        held_out=data / "held_out.json",
        output_dir=output_dir,
        size=(16, 32),
        block_out_channels=(16, 16),
        latent_channels=4,
        norm_num_groups=4,
        steps=6,
        batch_size=2,
        crop=(8, 16),
        full_share=0.5,
        warmup=2,
        mixed_precision="no",
        log_every=2,
        validate_every=3,
        save_seconds=0.0,
    )


@contextmanager
def dies_after(checkpoints: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pre-training inside is killed when it has written so many checkpoints."""
    save, calls = loop.save_checkpoint, []

    def save_then_die(*args: object) -> None:
        save(*args)  # type: ignore[arg-type]
        calls.append(1)
        if len(calls) == checkpoints:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "save_checkpoint", save_then_die)
        yield
