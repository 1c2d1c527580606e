"""The published procedure that timings are set against computes what the package computes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_classifier import TRAINING
from test_lora import random_bank

from eval.speed.published import PublishedProcedure
from fewshot_diti.backbone import Backbone
from fewshot_diti.data.images import ImageGeometry, image_id
from fewshot_diti.elimination import published_stages
from fewshot_diti.scoring import Scorer, decide
from fewshot_diti.trials import even_grid


def picture(number: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (32, 64, 3), np.uint8))


def test_switching_weights_class_after_class_gives_the_scores_of_the_stacked_bank(backbone: Backbone) -> None:
    bank = random_bank(backbone, 3, 2, 0)
    geometry, image = ImageGeometry(size=backbone.image_size), picture(0)
    procedure = PublishedProcedure(backbone, bank.layout, geometry, batch_size=64)
    found = procedure.classify(image, bank, seed=5)
    latents = backbone.encode_images(geometry.pixels(image)[None])[0]
    expected = decide(
        Scorer(backbone, bank, seed=5),
        latents,
        [image_id(image)],
        even_grid(500, 0, 1000).tolist(),
        torch.ones(500),
        published_stages(3),
    )[0]
    assert (found.position, found.evaluations) == (expected.position, expected.evaluations)
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_learns_its_shots_and_leaves_the_backbone_alone(backbone_folder: Path, dtype: torch.dtype) -> None:
    backbone = Backbone.from_pretrained(backbone_folder, dtype=dtype, device="cpu")
    bank = random_bank(backbone, 1, 2, 0)
    before = {k: v.clone() for k, v in backbone.unet.state_dict().items()}
    procedure = PublishedProcedure(backbone, bank.layout, ImageGeometry(size=backbone.image_size))
    config = replace(TRAINING, lr_unet=1e-2, lr_text_encoder=1e-2)
    row = procedure.train([picture(1)], "a photo of a hta", ("a photo", [picture(2)]), config)
    assert row.shape == (bank.layout.num_parameters,) and row.isfinite().all()
    up = [piece for i, piece in enumerate(row.split(bank.layout.sizes)) if i % 2]
    assert all(piece.abs().max() > 0 for piece in up)  # B was 0
    assert row.dtype == torch.float32 and (row != row.bfloat16()).any(), "weights are trained in float32"
    assert all(p.dtype == dtype for p in procedure.parameters), "and used as the backbone is"
    assert all(torch.equal(v, before[k]) for k, v in backbone.unet.state_dict().items())
    with pytest.raises(RuntimeError):
        procedure.switch(row[:-1])
