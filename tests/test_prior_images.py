"""Prior images are generated once."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save

from fewshot_diti.backbone import Backbone
from fewshot_diti.prior_images import prior_latents

GENERIC = "a photo of an aircraft"


def test_prior_images_are_made_once_and_their_number_can_grow(backbone: Backbone, tmp_path: Path) -> None:
    two = prior_latents(backbone, GENERIC, 2, backbone.image_size, cache=tmp_path)
    files = sorted(tmp_path.rglob("*.safetensors"))
    times = [f.stat().st_mtime_ns for f in files]
    four = prior_latents(backbone, GENERIC, 4, backbone.image_size, cache=tmp_path)
    assert torch.equal(four[:2], two)
    assert [f.stat().st_mtime_ns for f in files] == times
    assert len(set(map(float, four.std((1, 2, 3))))) == 4
    other = prior_latents(backbone, "a photo of a car", 1, backbone.image_size, cache=tmp_path)
    assert not torch.equal(other[0], two[0])


def test_a_kept_prior_image_that_is_damaged_is_made_again(backbone: Backbone, tmp_path: Path) -> None:
    whole = prior_latents(backbone, GENERIC, 1, backbone.image_size, cache=tmp_path)
    [file] = tmp_path.rglob("*.safetensors")
    for damaged in (
        b"",
        save({"latent": torch.full((4, 8, 16), torch.nan)}),
        save({"latent": torch.zeros(4, 4, 4)}),
        save({"latent": torch.zeros(4, 8, 16, dtype=torch.int8)}),
        save({"other": torch.zeros(4, 8, 16)}),
    ):
        file.write_bytes(damaged)
        assert torch.equal(prior_latents(backbone, GENERIC, 1, backbone.image_size, cache=tmp_path), whole)
