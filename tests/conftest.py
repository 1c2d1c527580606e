"""A tiny Stable Diffusion in diffusers' folder layout, made of the real classes with random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import small_commands
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from small_classifier import COLOURS, make, shots_of
from small_grid import config, data, small_settings  # noqa: F401, fixtures
from small_pretraining import renders  # noqa: F401, a fixture
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from fewshot_diti import Backbone, DiTiClassifier, cli
from fewshot_diti.presets import PRESETS

torch.set_num_threads(1)  # tensors this small lose more to threads than they gain


def tiny_tokenizer() -> CLIPTokenizer:
    """Bytes as tokens: every text has a tokenization."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=64)


def save_tiny_backbone(folder: Path, *, prediction_type: str = "epsilon", seed: int = 0, square: bool = False) -> Path:
    """A Stable Diffusion with four levels, f2 latents of 4 channels, 16 x 32 pixels (or 16 x 16)."""
    torch.manual_seed(seed)
    size = (16, 16) if square else (16, 32)
    tokenizer = tiny_tokenizer()
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=list(size),
        mid_block_add_attention=False,
    )
    unet = UNet2DConditionModel(
        sample_size=(size[0] // 2, size[1] // 2),
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=2,
        use_linear_projection=True,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--thorough", action="store_true", help="many more inputs and faults in tests/reliability: hours")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item) -> None:
    """What was recorded goes from process to process as text."""
    item.user_properties[:] = [(name, str(value)) for name, value in item.user_properties]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What tests/reliability tried, and how much of it was lost."""
    reports = [x for x in terminalreporter.getreports("passed") if x.when == "call" and x.user_properties]
    if reports:
        terminalreporter.section("tried")
    for report in sorted(reports, key=lambda x: x.nodeid):
        counts = ", ".join(f"{name}: {value}" for name, value in report.user_properties)
        terminalreporter.write_line(f"{report.nodeid.rpartition('/')[2]}  {counts}")


@pytest.fixture(scope="session")
def thorough(request: pytest.FixtureRequest) -> bool:
    """Whether tests/reliability tries all that it can, instead of what takes CI a moment."""
    return bool(request.config.getoption("--thorough"))


@pytest.fixture(scope="session", autouse=True)
def _a_cache_of_their_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Prior images, and notes of where backbones lie, are not left in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def backbone_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny backbone that predicts eps."""
    return save_tiny_backbone(tmp_path_factory.mktemp("tiny-sd"))


@pytest.fixture(scope="session")
def backbone(backbone_folder: Path) -> Backbone:
    """The tiny backbone, fp32 on the CPU."""
    return Backbone.from_pretrained(backbone_folder, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Four pictures a class: noise of the class's colour, of various sizes."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    out: dict[str, list[Path]] = {}
    for label, colour in COLOURS.items():
        for i in range(4):
            pixels = np.clip(np.array(colour) + rng.normal(0, 40, (20 + i, 37, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{label} {i}.png")
            out.setdefault(label, []).append(folder / f"{label} {i}.png")
    return out


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """Sets how many samples a forward of the U-Net has memory for; returns the list of what is tried from then on."""
    whole = Backbone.errors

    def limit(samples: int) -> list[int]:
        tried: list[int] = []

        def errors(self: Backbone, latents: torch.Tensor, *rest: torch.Tensor, **options: object) -> torch.Tensor:
            tried.append(len(latents))
            if len(latents) > samples:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return whole(self, latents, *rest, **options)

        monkeypatch.setattr(Backbone, "errors", errors)
        return tried

    return limit


@pytest.fixture(scope="session")
def fitted(backbone: Backbone, pictures: dict[str, list[Path]]) -> DiTiClassifier:
    return make(backbone).fit(*shots_of(pictures, ["tu-154", "a320", "dc-9"]))


@pytest.fixture(scope="session")
def tests(pictures: dict[str, list[Path]]) -> list[Path]:
    return [pictures[x][3] for x in ("a320", "dc-9", "tu-154")]


@pytest.fixture(scope="module")
def quick_train() -> Iterator[None]:
    """Settings of the commands that take a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "pocket", small_commands.PRESET)
        yield


@pytest.fixture(scope="module")
def shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images of each of three parts, in a folder a class."""
    return small_commands.save_classes(tmp_path_factory.mktemp("shots"), 3)


@pytest.fixture(scope="module")
def bank(quick_train: None, shots: Path, backbone_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank that the command trained."""
    folder = tmp_path_factory.mktemp("trained") / "bank"
    command = ["train", str(shots), "--output_dir", str(folder), "--concept", "machine part", "--folds", "0"]
    assert cli.main([*command, "--backbone", str(backbone_folder)]) == 0
    return folder
