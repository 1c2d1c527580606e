"""The backbone reads everything from its folder, and refuses what class tokens cannot stand on."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_tiny_backbone
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
from test_lora import latents_of, random_bank
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPTokenizer

from fewshot_diti.backbone import Backbone
from fewshot_diti.features import block_features
from fewshot_diti.scoring import Scorer

# as Stable Diffusion 2.1 on the hub has it
PNDM_V_PREDICTION = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.8.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}


def load(folder: Path) -> Backbone:
    return Backbone.from_pretrained(folder, dtype=torch.float32, device="cpu")


@pytest.fixture
def folder(backbone_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny backbone to change."""
    return Path(shutil.copytree(backbone_folder, tmp_path / "backbone"))


@pytest.fixture(scope="module")
def v_backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    folder = save_tiny_backbone(tmp_path_factory.mktemp("v"), prediction_type="v_prediction")
    return Backbone.from_pretrained(folder, dtype=torch.float64, device="cpu")


def test_the_hash_ignores_the_dtype_of_the_file_and_tells_weights_apart(
    backbone: Backbone, backbone_folder: Path, tmp_path: Path
) -> None:
    halves = StableDiffusionPipeline.from_pretrained(backbone_folder, dtype=torch.float16)
    assert halves.unet.dtype == torch.float16
    halves.save_pretrained(tmp_path / "half")
    assert load(tmp_path / "half").hash == backbone.hash
    assert Backbone.from_pretrained(backbone_folder, dtype=torch.bfloat16, device="cpu").hash == backbone.hash
    assert load(save_tiny_backbone(tmp_path / "other", seed=1)).hash != backbone.hash


def test_one_changed_weight_changes_the_hash(backbone: Backbone, folder: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    unet.conv_out.bias.data[0] += 0.01
    unet.save_pretrained(folder / "unet")
    assert load(folder).hash != backbone.hash


def test_sizes_come_from_the_model(backbone: Backbone) -> None:
    assert backbone.image_size == (16, 32)
    assert (backbone.latent_channels, backbone.vae_scale_factor, backbone.num_train_timesteps) == (4, 2, 1000)
    assert backbone.alphas_cumprod.dtype == torch.float64
    assert not any(
        p.requires_grad for m in (backbone.vae, backbone.unet, backbone.text_encoder) for p in m.parameters()
    )


def test_a_square_model_names_one_sample_size(tmp_path: Path) -> None:
    folder = save_tiny_backbone(tmp_path, square=True)
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": 8}))
    assert load(folder).image_size == (16, 16)


def test_image_sizes_are_multiples_of_what_the_levels_divide(backbone: Backbone) -> None:
    backbone.check_image_size((16, 32))
    backbone.check_image_size((48, 16))
    for size in ((16, 24), (8, 16), (0, 16), (-16, 16)):
        with pytest.raises(ValueError, match="multiples of 16 pixels"):
            backbone.check_image_size(size)


def test_a_prompt_that_is_too_long_is_refused_with_both_counts(backbone: Backbone) -> None:
    assert backbone.tokenize(["a" * 62]).shape == (1, 64)
    with pytest.raises(ValueError, match=r"has 65 tokens, backbone .* reads 64"):
        backbone.tokenize(["short", "a" * 63])


def test_an_inpainting_unet_is_refused(folder: Path) -> None:
    config = UNet2DConditionModel.load_config(folder, subfolder="unet")
    UNet2DConditionModel.from_config({**config, "in_channels": 9}).save_pretrained(folder / "unet")
    with pytest.raises(ValueError, match="takes 9 channels, the VAE gives 4"):
        load(folder)


def test_a_unet_for_another_text_encoder_is_refused(folder: Path) -> None:
    config = UNet2DConditionModel.load_config(folder, subfolder="unet")
    UNet2DConditionModel.from_config({**config, "cross_attention_dim": 24}).save_pretrained(folder / "unet")
    with pytest.raises(ValueError, match="reads text of width 24, the text encoder gives 16"):
        load(folder)


def test_a_model_that_predicts_the_image_is_refused(folder: Path) -> None:
    (folder / "scheduler" / "scheduler_config.json").write_text(
        json.dumps(PNDM_V_PREDICTION | {"prediction_type": "sample"})
    )
    with pytest.raises(ValueError, match="predicts 'sample'"):
        load(folder)


@pytest.mark.parametrize("missing", ["unet", "scheduler", ""])
def test_a_missing_part_is_an_os_error(folder: Path, missing: str) -> None:
    shutil.rmtree(folder / missing)
    with pytest.raises(OSError, match="backbone"):
        load(folder)


@pytest.mark.parametrize("kept", [(), ("tokenizer_config.json",)])
def test_an_incomplete_tokenizer_is_refused(folder: Path, kept: tuple[str, ...]) -> None:
    for path in (folder / "tokenizer").iterdir():
        if path.name not in kept:
            path.unlink()
    with pytest.raises(ValueError, match=r"the tokenizer knows \d+ tokens, the text encoder .* tokenizer/"):
        load(folder)


def test_weights_that_are_cut_short_are_an_os_error_that_names_the_folder(folder: Path) -> None:
    weights = folder / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(OSError, match=f"weights file of {folder} is damaged or cut short"):
        load(folder)
    with pytest.raises(NotADirectoryError, match="is a file; pass the folder"):
        load(weights)


def test_the_hash_covers_schedule_prediction_type_and_vocabulary(backbone: Backbone, folder: Path) -> None:
    assert load(folder).hash == backbone.hash
    path = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    found = {backbone.hash}
    for change in ({"beta_end": 0.02}, {"prediction_type": "v_prediction"}):
        path.write_text(json.dumps(config | change))
        found.add(load(folder).hash)
    path.write_text(json.dumps(config))
    tokenizer = load(folder).tokenizer
    swapped = tokenizer.get_vocab()
    first, second = list(swapped)[:2]
    swapped[first], swapped[second] = swapped[second], swapped[first]
    CLIPTokenizer(vocab=swapped, merges=[]).save_pretrained(folder / "tokenizer")
    found.add(load(folder).hash)
    assert len(found) == 4


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("vae/config.json", {"scaling_factor": 1.0}),
        ("text_encoder/config.json", {"hidden_act": "relu"}),
        ("unet/config.json", {"norm_eps": 1e-3}),
        ("unet/config.json", {"timestep_post_act": "silu"}),
        ("unet/config.json", {"downsample_padding": 0}),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 48}),
        ("tokenizer/tokenizer_config.json", {"pad_token": "<|startoftext|>"}),
    ],
)
def test_the_hash_covers_settings_that_no_weight_shows(
    backbone: Backbone, folder: Path, file: str, change: dict[str, Any]
) -> None:
    config = json.loads((folder / file).read_text())
    assert config != config | change
    (folder / file).write_text(json.dumps(config | change))
    assert load(folder).hash != backbone.hash


def test_a_tokenizer_that_cannot_be_read_is_named(folder: Path) -> None:
    path = folder / "tokenizer" / "tokenizer.json"
    broken = json.loads(path.read_text())
    broken["model"]["merges"] = [["no such", "tokens"]]
    path.write_text(json.dumps(broken))
    with pytest.raises(FileNotFoundError, match="tokenizer cannot be read"):
        load(folder)


def test_the_schedule_is_read_whatever_sampler_the_folder_names(backbone: Backbone, folder: Path) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(PNDM_V_PREDICTION))
    pndm = load(folder)
    assert pndm.prediction_type == "v_prediction"
    assert torch.equal(pndm.alphas_cumprod, backbone.alphas_cumprod)
    # the original Stable Diffusion 1.x does not say what it predicts
    path.write_text(json.dumps({k: v for k, v in PNDM_V_PREDICTION.items() if k != "prediction_type"}))
    assert load(folder).prediction_type == "epsilon"


def test_generated_latents_are_never_clipped(folder: Path) -> None:
    EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
    ).save_config(folder / "scheduler")
    assert "clip_sample" not in (folder / "scheduler" / "scheduler_config.json").read_text()
    latents = load(folder).generate_latents("an aircraft", range(2), size=(16, 32), steps=3, guidance_scale=2.0)
    assert latents.shape == (2, 4, 8, 16)
    assert latents.abs().max() > 1


def test_a_seed_makes_the_same_image_whatever_is_made_beside_it(backbone: Backbone) -> None:
    kwargs = {"size": (16, 32), "steps": 3, "guidance_scale": 2.0}
    both = backbone.generate_latents("an aircraft", [3, 7], **kwargs)  # type: ignore[arg-type]
    alone = backbone.generate_latents("an aircraft", [7], **kwargs)  # type: ignore[arg-type]
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=1e-5)


def test_noise_is_added_as_diffusers_does_it(backbone: Backbone) -> None:
    x0, noise = torch.randn(2, 5, 4, 8, 16, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 10, 300, 700, 999])
    expected = backbone.scheduler.add_noise(x0, noise, t)
    torch.testing.assert_close(backbone.add_noise(x0, noise, t), expected, rtol=0, atol=1e-6)


def test_the_error_of_a_v_model_is_the_error_of_the_eps_that_its_v_means(v_backbone: Backbone) -> None:
    x0, noise = torch.randn(2, 4, 4, 8, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.tensor([0, 50, 500, 999])
    with torch.no_grad():
        text = v_backbone.encode_text(v_backbone.tokenize(["a photo of an aircraft"] * 4))
        errors = v_backbone.errors(x0, noise, t, text)
        noisy = v_backbone.add_noise(x0, noise, t)
        v = v_backbone.unet(noisy, t, text).sample
    a = v_backbone.alphas_cumprod[t][:, None, None, None]
    eps = a.sqrt() * v + (1 - a).sqrt() * noisy
    torch.testing.assert_close(errors, (eps - noise).square().mean((1, 2, 3)), rtol=1e-9, atol=0)


def test_images_are_encoded_one_by_one_or_together_to_the_same_latents(backbone: Backbone) -> None:
    pixels = torch.rand(5, 3, 16, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = backbone.encode_images(pixels)
    with torch.no_grad():
        posterior = backbone.vae.encode(pixels).latent_dist
    torch.testing.assert_close(mean, posterior.mean * backbone.vae.config.scaling_factor)
    torch.testing.assert_close(std, posterior.std * backbone.vae.config.scaling_factor)
    alone = torch.cat([backbone.encode_images(p[None])[0] for p in pixels])
    torch.testing.assert_close(mean, alone, rtol=0, atol=1e-5)
    assert mean.dtype == torch.float32


def test_loading_prints_no_warning(backbone_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    Backbone.from_pretrained(backbone_folder, dtype=torch.bfloat16, device="cpu")
    assert not caplog.records


def test_a_compiled_network_is_made_on_request_alone(backbone_folder: Path) -> None:
    assert Backbone.from_pretrained(backbone_folder).compiled_unet is None
    assert Backbone.from_pretrained(backbone_folder, compile="default").compiled_unet is not None
    with pytest.raises(ValueError, match="compile='fast'; pass one of"):
        Backbone.from_pretrained(backbone_folder, compile="fast")  # type: ignore[arg-type]


# ---- threads


def frozen_error(backbone: Backbone, prompt: str = "a photo of an aircraft") -> Tensor:
    """An error of the network without adapters."""
    x0 = latents_of(backbone, 0)[None]
    noise = latents_of(backbone, 1)[None]
    with torch.no_grad():
        text = backbone.encode_text(backbone.tokenize([prompt]))
        return backbone.errors(x0, noise, torch.tensor([400]), text)


def test_four_threads_get_the_answers_of_one_at_a_time(backbone: Backbone) -> None:
    banks = [random_bank(backbone, 3, 4, seed) for seed in range(2)]
    text = backbone.encode_text(backbone.tokenize(["a photo of an aircraft"])).detach()
    jobs: list[Callable[[], Tensor]] = []
    for i in range(6):
        x0 = latents_of(backbone, i)
        for bank in banks:
            jobs.append(
                lambda bank=bank, x0=x0: Scorer(backbone, bank).errors(
                    x0, "an image", range(3), range(4), [9, 99, 400, 700]
                )
            )
        jobs.append(lambda x0=x0: block_features(backbone, x0[None], text)[0])
        jobs.append(lambda i=i: frozen_error(backbone, "a" * (5 * i + 1)))
        jobs.append(lambda i=i: backbone.generate_latents("a", [i], size=(16, 32), steps=2 + i % 2, guidance_scale=2.0))
    alone = [job() for job in jobs]
    for _ in range(3):
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda job: job(), jobs))
        assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert not [m for network in backbone.networks.values() for m in network.modules() if "adapters" in m.__dict__]
    assert torch.equal(jobs[3](), alone[3])


def test_a_backbone_can_be_pickled_and_a_deep_copy_is_the_same_object(backbone_folder: Path) -> None:
    backbone = Backbone.from_pretrained(backbone_folder, dtype=torch.float32, device="cpu", compile="default")
    other = pickle.loads(pickle.dumps(backbone))
    assert (other.hash, other.name, other.dtype, other.device) == (
        backbone.hash,
        backbone.name,
        backbone.dtype,
        backbone.device,
    )
    assert other.lock is not backbone.lock
    assert other.compiled_unet is not None and other.compiled_unet._orig_mod is other.unet
    assert torch.equal(frozen_error(other), frozen_error(backbone))
    assert copy.deepcopy(backbone) is backbone
    twin = copy.copy(backbone)
    assert twin is not backbone and twin.lock is backbone.lock and twin.unet is backbone.unet


# ---- gradients


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_backbone_that_is_loaded_without_gradients_can_be_trained_through(
    backbone: Backbone, backbone_folder: Path, mode: Callable[[], Any]
) -> None:
    with mode():
        loaded = Backbone.from_pretrained(backbone_folder, dtype=torch.float64, device="cpu")
        pipe = StableDiffusionPipeline.from_pretrained(backbone_folder)
        piped = Backbone.from_pipe(pipe)
    for other in (loaded, piped):
        assert not any(p.is_inference() for network in other.networks.values() for p in network.parameters())
        latents = latents_of(other, 0)[None].to(other.dtype).requires_grad_()
        text = other.encode_text(other.tokenize(["a"]))
        other.errors(latents, torch.zeros_like(latents), torch.tensor([400]), text).sum().backward()
        assert latents.grad is not None and latents.grad.any()


# ---- devices and dtypes


class NoFloat64(TorchDispatchMode):
    """Refuses tensors in float64 on the meta device, as MPS does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tensor.device.type == "meta" and tensor.dtype == torch.float64:
                raise TypeError(f"{func} makes a tensor in float64")
        return out


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_no_tensor_in_float64_comes_onto_the_device(tmp_path: Path, prediction_type: str) -> None:
    folder = save_tiny_backbone(tmp_path, prediction_type=prediction_type)
    with NoFloat64():
        backbone = Backbone.from_pretrained(folder, dtype=torch.float32, device="meta")
        latents = torch.empty(2, 4, 8, 16, device="meta")
        text = torch.empty(2, 64, 16, device="meta")
        times = torch.zeros(2, dtype=torch.long, device="meta")
        with torch.no_grad():
            assert backbone.errors(latents, latents, times, text).dtype == torch.float32


def test_the_kind_of_a_backbone_names_its_presets(backbone: Backbone) -> None:
    assert backbone.kind == "pocket"
