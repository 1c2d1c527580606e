"""Pre-training at tiny size: it resumes exactly, leaves held-out variants alone, and saves what diffusers loads."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, StableDiffusionPipeline
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from small_pretraining import dies_after, vae_config

from fewshot_diti import loop
from fewshot_diti.backbone import Backbone
from recipes.pocket import latents
from recipes.pocket.captions import GENERIC_CAPTION, Captioner, train_tokenizer, write_caption
from recipes.pocket.latents import encode_latents
from recipes.pocket.renders import airline_name, load_renders, split_held_out
from recipes.pocket.sd import UnetConfig, train_unet
from recipes.pocket.vae import build_vae, standardize_latents, train_vae


def test_held_out_variants_are_not_trained_on(renders: Path) -> None:
    seen, unseen = split_held_out(load_renders(renders, (16, 32)), renders / "held_out.json")
    assert set(seen.variants) == {"A1", "A2"}
    assert set(unseen.variants) == {"B1"}
    assert seen.airlines[:2] == ("Delta", "")


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        ("Delta", "Delta"),
        ("default", ""),
        ("200-d-icwd", ""),
        ("2000-Loganair", "Loganair"),
        ("N815PA", ""),
        ("9H-AFR", ""),
        ("Blue1", "Blue1"),
    ],
)
def test_airlines_are_named_and_registrations_are_not(raw: str, name: str) -> None:
    assert airline_name(raw) == name


def test_about_one_caption_in_eight_names_the_variant() -> None:
    rng = random.Random(0)
    captions = [
        write_caption(rng, airline="Delta", sky="a grey sky", manufacturer="Boeing", variant="717") for _ in range(4000)
    ]
    assert 0.08 < sum("717" in c for c in captions) / len(captions) < 0.13
    assert 0.15 < captions.count(GENERIC_CAPTION) / len(captions) < 0.25


def test_captions_of_false_colours_name_the_shape_and_no_colour() -> None:
    rng = random.Random(0)
    words = {"airline": "Delta", "sky": "a grey sky", "manufacturer": "Boeing", "variant": "717"}
    captions = [write_caption(rng, **words, false_colours=True) for _ in range(4000)]
    assert all(c.endswith("in false colours") for c in captions)
    assert not any("Delta" in c or "sky" in c for c in captions)
    assert 0.08 < sum("717" in c for c in captions) / len(captions) < 0.13


def test_some_captions_say_the_kind_in_place_of_aircraft() -> None:
    rng = random.Random(0)
    words = {"airline": "", "sky": "a grey sky", "manufacturer": "Airbus", "variant": "A340-200"}
    captions = [write_caption(rng, **words, kinds=["four-engine jet"]) for _ in range(4000)]
    assert 0.3 < sum("four-engine jet" in c for c in captions) / len(captions) < 0.5
    assert "a photo of an Airbus four-engine jet" in captions
    assert "an Airbus A340-200, a four-engine jet in flight" in captions
    assert not any("four-engine jet aircraft" in c for c in captions)


def test_the_tokenizer_reads_any_text_and_ends_with_the_largest_id() -> None:
    tokenizer = train_tokenizer(["a photo of a Delta aircraft"] * 3, 600, 24)
    assert tokenizer.eos_token_id == len(tokenizer) - 1
    ids = tokenizer("a ❄ über-hta 737").input_ids
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == "a❄über-hta737"


def test_an_untrained_autoencoder_is_a_linear_map(renders: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = build_vae(vae_config(renders, tmp_path)).eval()
    one, other = torch.rand(2, 4, 3, 16, 32) * 2 - 1
    with torch.no_grad():
        codes = [vae.encode(x).latent_dist.mean for x in (one, other, (one + other) / 2)]
        images = [vae.decode(z).sample for z in (codes[0], codes[1], (codes[0] + codes[1]) / 2)]
    for a, b, middle in (codes, images):
        assert a.std() > 0.05  # it is not silent
        assert ((a + b) / 2 - middle).std() < 0.02 * a.std()


def test_too_few_channels_for_a_linear_start_are_refused(renders: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"8 channels in 4 groups cannot carry 4 signals"):
        build_vae(replace(vae_config(renders, tmp_path), block_out_channels=(8, 8)))


def test_standardized_latents_restore_the_same_images(renders: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = build_vae(vae_config(renders, tmp_path)).eval()
    images = torch.randn(6, 3, 16, 32)
    with torch.no_grad():
        before = vae.decode(vae.encode(images).latent_dist.mean).sample
        standardize_latents(vae, images)
        means = vae.encode(images).latent_dist.mean
        after = vae.decode(means).sample
    torch.testing.assert_close(before, after, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(means.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(means.std((0, 2, 3)), torch.ones(4), atol=1e-3, rtol=0)


def test_a_killed_run_ends_where_an_uninterrupted_one_does(
    renders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_vae(vae_config(renders, tmp_path / "whole"))
    with dies_after(2, monkeypatch):
        train_vae(vae_config(renders, tmp_path / "killed"))
    train_vae(vae_config(renders, tmp_path / "killed"))
    one, other = (AutoencoderKL.from_pretrained(tmp_path / n / "vae").state_dict() for n in ("whole", "killed"))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-6)


def test_a_checkpoint_of_named_tensors_is_resumed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = {
        f"{kind}.{name}": torch.rand(shape)
        for kind in ("model", "ema", "exp_avg", "exp_avg_sq")
        for name, shape in (("0.weight", (2, 3)), ("0.bias", (2,)), ("1.weight", (2,)), ("1.bias", (2,)))
    }
    state |= {"buffer.1.running_mean": torch.rand(2), "buffer.1.running_var": torch.rand(2)}
    state["buffer.1.num_batches_tracked"] = torch.tensor(7)
    save_file(state, tmp_path / "checkpoint.safetensors", {"step": "7", "made_from": "paint"})
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    optimizer, ema = torch.optim.AdamW(module.parameters()), EMAModel(module.parameters(), 0.9)
    assert loop.load_checkpoint(tmp_path / "checkpoint.safetensors", module, optimizer, ema, "paint") == 7
    assert ema.optimization_step == 7 and ema.get_decay(8) == 8 / 17  # step 7, counted from 0, has (1 + 7) / (10 + 7)
    for (name, p), average in zip(module.named_parameters(), ema.shadow_params, strict=True):
        assert torch.equal(p, state[f"model.{name}"]) and torch.equal(average, state[f"ema.{name}"])
        assert torch.equal(optimizer.state[p]["exp_avg_sq"], state[f"exp_avg_sq.{name}"])
        assert optimizer.state[p]["step"] == 7
    assert torch.equal(module[1].running_var, state["buffer.1.running_var"])
    loop.save_checkpoint(tmp_path / "again.safetensors", module, optimizer, ema, 7, "paint")
    assert all(torch.equal(v, state[k]) for k, v in load_file(tmp_path / "again.safetensors").items())
    assert load_file(tmp_path / "again.safetensors").keys() == state.keys()


def test_a_killed_unet_run_ends_where_an_uninterrupted_one_does(
    renders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_vae(vae_config(renders, tmp_path / "vae"))
    config = unet_config(renders, tmp_path / "vae" / "vae", tmp_path / "whole", "v_prediction")
    config = replace(config, steps=6, save_seconds=0.0)
    whole = train_unet(config)
    config = replace(config, output_dir=tmp_path / "killed")
    with dies_after(3, monkeypatch):
        train_unet(config)
    resumed = train_unet(config)
    for one, other in ((whole.unet, resumed.unet), (whole.text_encoder, resumed.text_encoder)):
        torch.testing.assert_close(dict(one.named_parameters()), dict(other.named_parameters()), rtol=1e-3, atol=1e-5)


def test_a_checkpoint_of_other_data_or_another_model_is_refused(renders: Path, tmp_path: Path) -> None:
    config = vae_config(renders, tmp_path / "vae")
    train_vae(config)
    other = tmp_path / "held_out.json"
    other.write_text('["A1"]')
    for changed in (replace(config, held_out=other), replace(config, latent_channels=3), replace(config, lr=1e-5)):
        with pytest.raises(ValueError, match="was made from other data or settings, or of another model"):
            train_vae(changed)


def unet_config(renders: Path, vae: Path, output_dir: Path, prediction_type: str) -> UnetConfig:
    return UnetConfig(
        data=renders,
        held_out=renders / "held_out.json",
        vae=vae,
        output_dir=output_dir,
        block_out_channels=(16, 8, 16, 16),
        norm_num_groups=2,
        head_size=8,
        text_width=16,
        text_layers=1,
        vocab_size=600,
        prediction_type=prediction_type,
        steps=2,
        batch_size=2,
        warmup=1,
        mixed_precision="no",
        log_every=1,
        validate_every=2,
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_pipeline_it_saves_is_a_backbone(renders: Path, tmp_path: Path, prediction_type: str) -> None:
    train_vae(vae_config(renders, tmp_path / "vae"))
    config = unet_config(renders, tmp_path / "vae" / "vae", tmp_path / "sd", prediction_type)
    train_unet(config)
    backbone = Backbone.from_pretrained(tmp_path / "sd" / "pipeline", dtype=torch.float32, device="cpu")
    assert backbone.image_size == (16, 32)
    assert backbone.prediction_type == prediction_type
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "sd" / "pipeline")
    image = pipe("a Delta aircraft", num_inference_steps=2, output_type="np").images
    assert image.shape == (1, 16, 32, 3)
    records = [json.loads(line) for line in (tmp_path / "sd" / "log.jsonl").read_text().splitlines()]
    assert "held_out_error_50" in records[-1]


def test_a_head_for_variants_adds_its_loss_and_is_not_in_the_pipeline(renders: Path, tmp_path: Path) -> None:
    train_vae(vae_config(renders, tmp_path / "vae"))
    config = unet_config(renders, tmp_path / "vae" / "vae", tmp_path / "sd", "v_prediction")
    plain = train_unet(config)
    with_head = replace(config, class_weight=0.5, class_until=1.0, zoom=0.1, shift=0.1, output_dir=tmp_path / "head")
    trained = train_unet(replace(with_head, batch_size=8))
    assert trained.unet.state_dict().keys() == plain.unet.state_dict().keys()
    record = json.loads((tmp_path / "head" / "log.jsonl").read_text().splitlines()[0])
    assert record["variant"] > 0
    assert record["loss"] == pytest.approx(record["restoration"] + 0.5 * record["variant"], rel=1e-5)


def test_the_log_says_how_well_features_separate_variants_that_are_left_out(renders: Path, tmp_path: Path) -> None:
    train_vae(vae_config(renders, tmp_path / "vae"))
    (renders / "two.json").write_text('["B1", "A2"]')
    config = unet_config(renders, tmp_path / "vae" / "vae", tmp_path / "sd", "v_prediction")
    train_unet(replace(config, held_out=renders / "two.json"))
    record = json.loads((tmp_path / "sd" / "log.jsonl").read_text().splitlines()[-1])
    assert 0 <= record["held_out_accuracy"] <= 1


def test_a_caption_names_the_shape_by_variant_manufacturer_or_kind(renders: Path) -> None:
    caption = Captioner(load_renders(renders, (16, 32)), None)  # the first image is an A1 of the manufacturer A
    for caption_of_shape in ("a photo of an A1", "a photo of an A aircraft"):
        assert caption.names_shape(0, caption_of_shape)
    for other in (GENERIC_CAPTION, "a Delta aircraft in a grey sky"):
        assert not caption.names_shape(0, other)


def test_a_run_that_starts_from_a_backbone_goes_on_with_its_weights(renders: Path, tmp_path: Path) -> None:
    train_vae(vae_config(renders, tmp_path / "vae"))
    config = unet_config(renders, tmp_path / "vae" / "vae", tmp_path / "first", "v_prediction")
    first = train_unet(config)
    start = replace(config, start_from=tmp_path / "first" / "pipeline", output_dir=tmp_path / "second", lr=0.0)
    second = train_unet(replace(start, block_out_channels=(8, 8, 8, 8)))  # sizes are those of the start
    for one, other in ((first.unet, second.unet), (first.text_encoder, second.text_encoder)):
        torch.testing.assert_close(dict(one.named_parameters()), dict(other.named_parameters()), rtol=0, atol=0)
    assert second.tokenizer.get_vocab() == first.tokenizer.get_vocab()
    with pytest.raises(ValueError, match="predicts v_prediction, not epsilon"):
        train_unet(replace(start, prediction_type="epsilon"))
    train_vae(replace(vae_config(renders, tmp_path / "other_vae"), seed=1))
    with pytest.raises(ValueError, match="stands on another autoencoder"):
        train_unet(replace(start, vae=tmp_path / "other_vae" / "vae"))


def test_an_encoding_that_was_cut_short_goes_on(renders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4).eval()
    images, accelerator, encode, done = load_renders(renders, (16, 32)), Accelerator(cpu=True), encode_latents, []

    def counted(*arguments: Any) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(1)
        return encode(*arguments)

    def run(folder: str) -> Any:
        return latents.cached_latents(vae, images, 3, accelerator, tmp_path / folder / "x.safetensors", (0.1, 0.05))

    whole = run("whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(latents, "encode_latents", counted)
        run("cut")
    done.clear()
    monkeypatch.setattr(latents, "encode_latents", counted)
    found = run("cut")
    assert len(done) == 2
    assert all(torch.equal(one, other) for one, other in zip(found, whole, strict=True))
