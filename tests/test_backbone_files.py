"""A backbone is loaded from folders, variants, the hub's cache and pipelines, and found again by its public name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_tiny_backbone
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from test_backbone import frozen_error, load
from test_lora import latents_of, random_bank

from fewshot_diti.backbone import Backbone
from fewshot_diti.backbone_search import find_backbone
from fewshot_diti.lora_files import export_lora
from fewshot_diti.scoring import Scorer


@pytest.fixture
def folder(backbone_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny backbone to change."""
    return Path(shutil.copytree(backbone_folder, tmp_path / "backbone"))


# ---- weights and where they come from


def halved(folder: Path) -> Path:
    """The folder with its weights as `*.fp16.safetensors`, and nothing else."""
    pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float16)
    shutil.rmtree(folder)
    pipe.save_pretrained(folder, variant="fp16")
    assert {p.name for p in folder.rglob("*.safetensors")} == {
        "diffusion_pytorch_model.fp16.safetensors",
        "model.fp16.safetensors",
    }
    return folder


def test_the_variant_that_is_there_is_loaded(
    backbone: Backbone, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert load(halved(folder)).hash == backbone.hash
    assert Backbone.from_pretrained(folder, device="cpu", variant="fp16").hash == backbone.hash
    assert not caplog.records
    with pytest.raises(FileNotFoundError, match="neither a folder"):
        Backbone.from_pretrained(folder, device="cpu", variant="ema")


def test_a_given_variant_is_loaded_though_plain_weights_lie_beside_it(backbone: Backbone, folder: Path) -> None:
    for path in list(folder.rglob("*.safetensors")):
        ema = {name: weight + 1 for name, weight in load_file(path).items()}
        save_file(ema, path.with_suffix(".ema.safetensors"), metadata={"format": "pt"})
    assert load(folder).hash == backbone.hash
    assert Backbone.from_pretrained(folder, device="cpu", variant="ema").hash != backbone.hash


@pytest.mark.parametrize("variant", [False, True])
def test_a_revision_in_the_cache_of_the_hub_is_loaded(
    backbone: Backbone, folder: Path, tmp_path: Path, variant: bool
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--someone--tiny-sd"
    shutil.copytree(halved(folder) if variant else folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "mine").write_text(commit)
    options: dict[str, Any] = {"cache_dir": tmp_path / "hub", "local_files_only": True, "device": "cpu"}
    loaded = Backbone.from_pretrained("someone/tiny-sd", revision="mine", **options)
    assert (loaded.hash, loaded.name, loaded.public_name) == (backbone.hash, "someone/tiny-sd", "someone/tiny-sd")
    assert load(repository / "snapshots" / commit).public_name == "someone/tiny-sd"
    with pytest.raises(FileNotFoundError, match="nor can it be downloaded"):
        Backbone.from_pretrained("someone/tiny-sd", **options)  # there is no revision main


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(folder: Path, value: float) -> None:
    path = folder / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    name = next(x for x in weights if x.endswith("q_proj.weight"))
    weights[name][0, 0] = value
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"'.*q_proj\.weight' of its text_encoder holds numbers that are not finite"):
        load(folder)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("text_encoder", {"max_position_embeddings": 32}),
        ("text_encoder", {"num_hidden_layers": 3}),
        ("vae", {"mid_block_add_attention": True}),
        ("unet", {"block_out_channels": [8, 8, 16, 8]}),
    ],
)
def test_weights_of_another_network_than_the_config_describes_are_refused(
    folder: Path, part: str, change: dict[str, Any]
) -> None:
    config = folder / part / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(OSError, match=rf"The {part} .* its config\.json describes"):
        load(folder)


# ---- pipelines


@pytest.fixture
def pipe(backbone_folder: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(backbone_folder)


def test_a_backbone_from_a_pipeline_shares_weights_and_leaves_it_as_it_was(
    backbone: Backbone, backbone_folder: Path, pipe: StableDiffusionPipeline
) -> None:
    pipe.unet.train()
    before = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    strides = {k: v.stride() for k, v in pipe.unet.state_dict().items()}
    piped = Backbone.from_pipe(pipe)
    assert (piped.hash, piped.dtype, piped.device.type) == (backbone.hash, torch.float32, "cpu")
    assert piped.name == str(backbone_folder.resolve())
    assert torch.equal(frozen_error(piped), frozen_error(backbone))
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    assert piped.unet.get_parameter(name).data_ptr() == pipe.unet.get_parameter(name).data_ptr()
    for other in (piped, Backbone.from_pipe(pipe, dtype="bfloat16")):
        assert other.hash == backbone.hash
        Scorer(other, random_bank(backbone, 1, 2, 0)).errors(latents_of(backbone, 0), "an image", [0], [0], [400])
    assert pipe.unet.training and all(p.requires_grad for p in pipe.unet.parameters())
    after = pipe.unet.state_dict()
    assert all(torch.equal(v, before[k]) and v.stride() == strides[k] for k, v in after.items())
    assert (pipe.unet.dtype, pipe.vae.dtype) == (torch.float32, torch.float32)


def test_a_pipeline_in_half_precision_keeps_it_and_the_hash(backbone: Backbone, backbone_folder: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(backbone_folder, dtype=torch.float16)
    piped = Backbone.from_pipe(pipe)
    assert (piped.hash, piped.dtype, piped.vae.dtype) == (backbone.hash, torch.float16, torch.float32)
    assert pipe.vae.dtype == torch.float16


def test_a_pipeline_with_lora_layers_is_refused_until_they_are_unloaded(
    backbone: Backbone, pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    export_lora(random_bank(backbone, 1, 2, 0), "all 2 0", tmp_path)
    pipe.load_lora_weights(tmp_path)
    with pytest.raises(ValueError, match=r"text_encoder of the .* has LoRA layers; call unload_lora_weights\(\)"):
        Backbone.from_pipe(pipe)
    pipe.unload_lora_weights()
    assert Backbone.from_pipe(pipe).hash == backbone.hash


def test_an_offloaded_pipeline_is_refused(backbone: Backbone, pipe: StableDiffusionPipeline) -> None:
    from accelerate import cpu_offload

    cpu_offload(pipe.unet, "cpu")
    with pytest.raises(ValueError, match=r"unet of the .* is offloaded; call remove_all_hooks\(\)"):
        Backbone.from_pipe(pipe)


def test_a_pipeline_of_another_kind_is_refused(pipe: StableDiffusionPipeline) -> None:
    parts = {k: pipe.components[k] for k in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    xl = StableDiffusionXLPipeline(
        **parts, text_encoder_2=pipe.text_encoder, tokenizer_2=pipe.tokenizer, add_watermarker=False
    )
    with pytest.raises(ValueError, match="A StableDiffusionXLPipeline cannot be a backbone; pass a StableDiffusionPip"):
        Backbone.from_pipe(xl)


# ---- names that can be shared


def test_the_public_name_of_a_folder_is_its_last_part(backbone: Backbone, backbone_folder: Path) -> None:
    assert backbone.name == str(backbone_folder.resolve())
    assert backbone.public_name == backbone_folder.name


def test_a_backbone_is_found_by_its_name_or_hash_in_the_listed_folders(
    backbone: Backbone, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = save_tiny_backbone(tmp_path / "models" / "mine", seed=1)
    monkeypatch.delenv("FEWSHOT_DITI_BACKBONES", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # where no other test has left a note
    with pytest.raises(FileNotFoundError, match=r"'mine' with hash .* is not there; pass backbone= .* Tried: nothing"):
        find_backbone("mine", backbone.hash)
    assert find_backbone("mine", backbone.hash, hint=folder, device="cpu").name == str(folder.resolve())
    monkeypatch.setenv("FEWSHOT_DITI_BACKBONES", f"{tmp_path / 'nowhere'}:{tmp_path / 'models'}")
    mine = find_backbone("mine", load(other).hash, device="cpu")
    assert mine.name == str(other.resolve())
    with pytest.raises(FileNotFoundError, match=f"mine' has hash {mine.hash}"):
        find_backbone("mine", backbone.hash)
    # under another name, and as the listed folder itself
    monkeypatch.setenv("FEWSHOT_DITI_BACKBONES", f"{tmp_path / 'models'}:{folder}")
    assert find_backbone("mine", backbone.hash, dtype="float16").dtype == torch.float16


def test_the_pocket_is_found_by_its_name() -> None:
    pocket = Backbone.from_pretrained()
    assert pocket.public_name == "pocket"
    assert find_backbone("pocket", pocket.hash).hash == pocket.hash
    with pytest.raises(FileNotFoundError, match=f"'pocket' has hash {pocket.hash}"):
        find_backbone("pocket", "another")
