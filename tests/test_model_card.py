"""The page that goes with a bank, word for word."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_classifier import SCORING, make, shots_of
from test_lora import random_bank

from fewshot_diti import Backbone, Bank
from fewshot_diti.model_card import _by_class, confusion_picture

ALONE = """---
library_name: fewshot-diti
pipeline_tag: image-classification
base_model: user/tiny
base_model_relation: adapter
tags: [few-shot, stable-diffusion, lora]
---

# 2 classes of images, from a few images each

A few-shot classifier for the Python package fewshot-diti: for each class a prompt and a LoRA on the Stable Diffusion \
`user/tiny` that restore its images from noise.

```python
from fewshot_diti import Bank

loaded = Bank.from_pretrained("this-folder")  # or user/repo
```

## Classes

| class | images learned from | prompt |
|---|---:|---|
| all 4 0 | unknown | a photo of a hta 0 |
| a\\|b | 1 | a photo of a hta a\\|b |

## How good it is

Not known: these are class tokens alone, without a temperature or weights of the trials.

## How it was made

- Backbone `user/tiny`, hash `abc`; it is not part of this folder.
- Images 32 x 16 pixels (crop).
- LoRA of rank 4 on LAYERS linear layers.

## Limits

- Every image gets one of these classes, also a picture of something else.
- What the images of a class share by chance, such as a background, may have been learned as part of it.
"""

WHOLE = """## How good it is

ACCURACY % of 4 images [95 % interval LOW to HIGH], cross-validated in 2 folds: each image was judged by class tokens \
that were trained without it, on fewer images than those of this bank. That is on images like those it learned from, \
and of the classes at that time.

| class | right | 95 % interval | predicted as |
|---|---:|---:|---|
ROWS

![Held-out images of each class, and the classes that they were predicted as](held-out.png)

## How it was made

- Backbone `tiny-sd0`, hash `HASH`; it is not part of this folder.
- Images 32 x 16 pixels (crop).
- LoRA of rank RANK on LAYERS linear layers.
- STEPS steps of SHOTS images for each class, learning rate LR_UNET (U-Net) and LR_TEXT (text encoder), SCHEDULE.
- Decides by TRIALS trials at timesteps FROM to TO, weights `WEIGHTS`; together with features (0.5).

## Limits

- Every image gets one of these classes, also a picture of something else.
- What the images of a class share by chance, such as a background, may have been learned as part of it.
- This folder holds features of the images that it learned from.
"""


@pytest.fixture
def bank(backbone: Backbone) -> Bank:
    return random_bank(backbone, 3, 4, 0)


def test_the_card_of_class_tokens_alone(bank: Bank, tmp_path: Path) -> None:
    bank = replace(bank.select(bank.labels[:2]), backbone_name="user/tiny", backbone_hash="abc")
    first, second = bank.tokens
    tokens = replace(first, num_shots=0), replace(second, label="a|b", prompt="a photo of a hta a|b")
    replace(bank, tokens=tokens).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == ALONE.replace("LAYERS", str(len(bank.layout.targets)))


def test_the_card_of_a_classifier(backbone: Backbone, pictures: dict[str, list[Path]], tmp_path: Path) -> None:
    scoring = replace(SCORING, witnesses=("features",), witness_weights=(0.5,), folds=2, temperature="fit")
    images, labels = shots_of(pictures, ["a320", "dc-9"])
    classifier = make(backbone, scoring=scoring, concept="aircraft").fit(images, labels)
    classifier.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    training, fitted, _ = classifier.settings_
    assert classifier.bank_ is not None
    layout, right = classifier.bank_.layout, classifier.calibration_.accuracy
    assert right is not None and len(images) == 4
    judged = [line.split(" | ") for line in card.splitlines() if " of 2 | " in line]
    assert [cells[0] for cells in judged] == ["| a320", "| dc-9"]
    assert sum(int(cells[1].split()[0]) for cells in judged) == round(4 * right)
    filled = {
        "ROWS": "\n".join(" | ".join(cells) for cells in judged),
        "ACCURACY": f"{100 * right:.1f}",
        "LOW to HIGH": card.partition("95 % interval ")[2].partition("]")[0],
        "HASH": backbone.hash,
        "RANK": layout.rank,
        "LAYERS": len(layout.targets),
        "STEPS": training.steps,
        "SHOTS": training.shots_per_step,
        "LR_UNET": f"{training.lr_unet:g}",
        "LR_TEXT": f"{training.lr_text_encoder:g}",
        "SCHEDULE": training.lr_schedule,
        "TRIALS": fitted.trials,
        "FROM to TO": f"{fitted.timesteps[0]} to {fitted.timesteps[1]}",
        "WEIGHTS": fitted.weighting,
    }
    expected = WHOLE
    for name, value in filled.items():
        expected = expected.replace(name, str(value))
    assert "## How good it is" + card.partition("## How good it is")[2] == expected
    assert card.startswith("---\nlibrary_name: fewshot-diti\npipeline_tag: image-classification\ntags: [")
    with Image.open(tmp_path / "held-out.png") as picture:
        assert picture.format == "PNG"
    classifier.bank_.save_pretrained(tmp_path)  # which knows nothing of held-out images
    assert not (tmp_path / "held-out.png").exists()
    assert "base_model" not in card and "# 2 classes of aircraft, from a few images each" in card


def test_the_card_names_what_each_class_was_predicted_as() -> None:
    judged = [("a|b", "a|b"), ("a|b", "c"), ("a|b", "d"), ("a|b", "c"), ("c", "c"), ("d", "d")]
    assert _by_class(judged).splitlines()[2:] == [
        "| a\\|b | 1 of 4 | 5 to 70 % | c (2), d (1) |",
        "| c | 1 of 1 | 21 to 100 % |  |",
        "| d | 1 of 1 | 21 to 100 % |  |",
    ]


@pytest.mark.parametrize("classes", [2, 12, 300])
def test_the_picture_of_confusions_keeps_a_size_that_can_be_read(classes: int) -> None:
    names = [f"class {c}" for c in range(classes)]
    judged = [(name, names[(c + (c % 5 == 0)) % classes]) for c, name in enumerate(names)]
    with Image.open(io.BytesIO(confusion_picture(judged))) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    assert max(pixels.shape[:2]) < 2000
    assert (pixels[..., 2] - pixels[..., 0]).max() > 100, "blue on the diagonal"
    assert (pixels[..., 0] - pixels[..., 2]).max() > 100, "vermilion beside it"
