"""The images that a class token makes are those of diffusers' pipeline with the exported class token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import save_tiny_backbone
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from small_classifier import bank_of
from test_lora import random_bank

from fewshot_diti import Backbone, Bank, DiTiClassifier
from fewshot_diti.lora_files import export_lora

FEW = {"num_inference_steps": 3, "guidance_scale": 3.0}


@pytest.fixture
def bank(backbone: Backbone) -> Bank:
    return random_bank(backbone, 2, 4, 0)


def levels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images]).astype(int)


@pytest.mark.parametrize("negative", [None, "a photo of a bird"])
def test_they_are_those_of_diffusers_with_the_exported_class_token(
    backbone_folder: Path, backbone: Backbone, bank: Bank, tmp_path: Path, negative: str | None
) -> None:
    label = bank.labels[1]
    found = levels(bank.generate(label, backbone, 2, seed=5, negative_prompt=negative, **FEW))
    pipe = StableDiffusionPipeline.from_pretrained(backbone_folder)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    options = {"height": 16, "width": 32, "output_type": "pil", "negative_prompt": negative, **FEW}

    def by_diffusers() -> np.ndarray:
        prompt = bank.select([label]).tokens[0].prompt
        images = [pipe(prompt, generator=torch.Generator().manual_seed(s), **options).images[0] for s in (5, 6)]
        return levels(images)

    assert np.abs(by_diffusers() - found).max() > 1  # the frozen backbone makes others
    pipe.load_lora_weights(export_lora(bank, label, tmp_path).parent)
    assert np.abs(by_diffusers() - found).max() <= 1


def test_an_image_depends_on_its_seed_alone(backbone: Backbone, bank: Bank) -> None:
    label = bank.labels[0]
    five = bank.generate(label, backbone, 5, seed=3, batch_size=2, **FEW)
    assert {image.size for image in five} == {(32, 16)}
    assert (levels(bank.generate(label, backbone, 5, seed=3, batch_size=2, **FEW)) == levels(five)).all()
    alone = [bank.generate(label, backbone, 1, seed=seed, **FEW)[0] for seed in range(3, 8)]
    assert np.abs(levels(alone) - levels(five)).max() <= 1  # the rounding of a batch
    assert len({image.tobytes() for image in five}) == 5
    other = bank.generate(bank.labels[1], backbone, 5, seed=3, **FEW)
    assert np.abs(levels(other) - levels(five)).max() > 1


def test_a_classifier_makes_those_of_its_bank_and_scores_as_before(fitted: DiTiClassifier, tests: list[Path]) -> None:
    before = fitted.errors(tests)
    images = fitted.generate("a320", 2, seed=1, **FEW)
    assert (levels(images) == levels(bank_of(fitted).generate("a320", fitted.backbone_, 2, seed=1, **FEW))).all()
    assert torch.equal(fitted.errors(tests), before)


def test_what_cannot_be_made_is_refused(backbone: Backbone, bank: Bank, tmp_path: Path) -> None:
    label = bank.labels[0]
    with pytest.raises(ValueError, match=r"num_images=0, num_inference_steps=-1; pass 1 or more"):
        bank.generate(label, backbone, 0, num_inference_steps=-1)
    with pytest.raises(ValueError, match=r"Classes \['concorde'\] are not in the bank"):
        bank.generate("concorde", backbone)
    with pytest.raises(ValueError, match=r"Prompt 'a{70}' has 72 tokens"):
        bank.generate(label, backbone, negative_prompt="a" * 70)
    other = Backbone.from_pretrained(save_tiny_backbone(tmp_path, seed=1), dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match="The bank was trained on backbone"):
        bank.generate(label, other)
