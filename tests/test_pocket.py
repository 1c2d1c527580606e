"""What ships: the pocket is a whole Stable Diffusion of its promised size, and the main job works on it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from rich.console import Console
from safetensors import safe_open

from fewshot_diti.backbone import POCKET, resolve
from fewshot_diti.baselines import presets as baseline_presets
from fewshot_diti.baselines.clip import OpenClip
from fewshot_diti.baselines.imagenet import TuningSettings
from fewshot_diti.commands.demo import DemoConfig, run_demo
from fewshot_diti.data import load_images
from fewshot_diti.files import shipped
from fewshot_diti.presets import PRESETS
from recipes.pocket.captions import sky_name


def test_the_pocket_has_its_promised_size_and_dtype() -> None:
    files = [path for path in Path(resolve(POCKET)).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 60e6
    for path in (path for path in files if path.suffix == ".safetensors"):
        with safe_open(path, "pt") as weights:
            assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"F16"}  # noqa: SIM118


def test_diffusers_makes_an_image_with_it() -> None:
    pipe = StableDiffusionPipeline.from_pretrained(resolve(POCKET))
    pipe.set_progress_bar_config(disable=True)
    prompt, seed = "a photo of a Delta aircraft in a grey sky", torch.Generator().manual_seed(0)
    image = pipe(prompt, height=64, width=128, num_inference_steps=4, generator=seed).images[0]
    assert image.size == (128, 64)
    low, high = image.convert("L").getextrema()
    assert high - low > 50  # no flat noise-grey


def test_its_clip_is_small_and_reads_the_sky_off_images_that_it_has_not_seen() -> None:
    assert sum(path.stat().st_size for path in shipped("pocket-clip").iterdir()) < 15e6
    clip, images = OpenClip(POCKET), load_images("bundled", "test")
    pictures = [images.image(i) for i in range(0, len(images), 4)]
    truth = [sky_name(torch.from_numpy(np.array(picture)).permute(2, 0, 1)) for picture in pictures]
    skies = sorted(set(truth))
    assert len(skies) == 4
    scores = clip.encode_images(pictures) @ clip.class_weights(skies, ["a photo of an aircraft in {}"]).T
    assert np.mean(np.array(skies)[scores.argmax(1)] == truth) > 0.9


def test_the_demo_tells_bundled_aircraft_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a fifth of the training, which takes minutes; the nearest neighbour gets 6 of 24, chance 2."""
    shorter = replace(baseline_presets.PRESETS["small"], tuning=TuningSettings(steps=30))
    monkeypatch.setitem(baseline_presets.PRESETS, "small", shorter)
    monkeypatch.setitem(PRESETS, "pocket", replace(PRESETS["pocket"], steps=(25,) * 5))
    config = DemoConfig(shots=4, test_images=24, trials=8, dtype="float32", output_dir=tmp_path)
    found = run_demo(config, Console(quiet=True)).results[0]
    assert found.name == "fewshot-diti"
    assert found.correct.sum() >= 13
    assert (tmp_path / "bank" / "manifest.json").is_file() and (tmp_path / "predictions.png").is_file()
