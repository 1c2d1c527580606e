"""The pocket's autoencoder: f8, 32 latent channels, 128 x 64 pixels, trained from scratch.

    accelerate launch --cpu -m recipes.pocket.vae --data DIR

`DIR` holds Parquet shards with columns image, variant, manufacturer, airline. Started again, a run continues at its
last checkpoint; OUTPUT_DIR/vae is the autoencoder at the last validation. A processor without bfloat16 needs
--mixed_precision no.

Hardware: two CPU cores with bfloat16; or a GPU, without `--cpu`.
Time: 17 minutes for the 4,500 steps.
Expected: 33.4 dB on the held-out variants, 32.5 dB on the 12 few-shot variants (`python -m eval.autoencoder`), measured
in November 2026.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import Tensor, nn

from fewshot_diti.loop import LoopConfig, run_loop, step_generator
from recipes.pocket.linear_start import linear_start
from recipes.pocket.renders import HELD_OUT, as_batch, load_renders, shuffle_colours, split_held_out


@dataclass(frozen=True, kw_only=True)
class VaeConfig(LoopConfig):
    """Everything that decides an autoencoder run.

    Attributes:
        data: folder of Parquet shards (see `load_renders`).
        held_out: JSON list of variants that are never trained on.
        size: (height, width) of the images in pixels.
        block_out_channels, layers_per_block, latent_channels: as in `diffusers.AutoencoderKL`.
        crop: (height, width) of the random crops that all but the last steps train on: smaller steps, but more of them,
            and steps are what an autoencoder of few steps lacks.
        full_share: share of the steps, the last ones, that see whole images.
        mse_weight, gradient_weight, kl_weight: beside an L1 loss of weight 1.
        false_colours: share of samples with shuffled colours, so that no livery is out of reach.
    """

    data: Path
    held_out: Path
    size: tuple[int, int] = (64, 128)
    block_out_channels: tuple[int, ...] = (32, 64, 128, 128)
    layers_per_block: int = 1
    latent_channels: int = 32
    norm_num_groups: int = 8
    steps: int = 4_500
    batch_size: int = 8
    crop: tuple[int, int] = (32, 64)
    full_share: float = 0.05
    lr: float = 8e-4
    warmup: int = 100
    ema_decay: float = 0.995
    mse_weight: float = 4.0
    gradient_weight: float = 0.5
    kl_weight: float = 1e-7
    false_colours: float = 0.4


class _Roundtrip(nn.Module):
    """Encode, sample, decode in one forward, so that data-parallel wrappers see one call."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.vae.encode(images).latent_dist
        return self.vae.decode(posterior.mean + posterior.std * noise).sample, posterior.kl()


def build_vae(config: VaeConfig) -> AutoencoderKL:
    """An untrained autoencoder without attention; scaling_factor 1, since `standardize_latents` sets the scale."""
    levels = len(config.block_out_channels)
    vae = AutoencoderKL(
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_num_groups,
        mid_block_add_attention=False,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        sample_size=list(config.size),
        scaling_factor=1.0,
    )
    linear_start(vae)
    return vae


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB over all pixels of images in [-1, 1]."""
    return -10 * torch.log10(((a.float() - b.float()) / 2).square().mean())


@torch.no_grad()
def standardize_latents(vae: AutoencoderKL, images_NCHW: Tensor) -> None:
    """Gives every latent channel mean 0 and variance 1 over the images, without changing what the autoencoder restores.

    Encoder means become (z - mean) / std, absorbed by the two 1x1 convolutions around the latent. Channels of very
    different spread would otherwise drown in noise at very different timesteps.
    """
    latents = torch.cat([vae.encode(b).latent_dist.mean for b in images_NCHW.split(64)])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    channels = mean.numel()
    quant, post_quant = vae.quant_conv, vae.post_quant_conv
    quant.bias[:channels] = (quant.bias[:channels] - mean) / std
    quant.weight[:channels] /= std[:, None, None, None]
    quant.bias[channels:] -= 2 * std.log()
    post_quant.bias += post_quant.weight[:, :, 0, 0] @ mean
    post_quant.weight *= std[None, :, None, None]


def train_vae(config: VaeConfig) -> AutoencoderKL:
    """Trains and saves `output_dir/vae`; a killed run continues at its last checkpoint."""
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    seen, unseen = split_held_out(load_renders(config.data, config.size), config.held_out)
    pixels = seen.pixels_NCHW
    torch.manual_seed(config.seed)
    vae = build_vae(config)
    factor = 2 ** (len(config.block_out_channels) - 1)
    roundtrip: nn.Module = _Roundtrip(vae).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(roundtrip.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=1e-3)
    roundtrip = accelerator.prepare_model(roundtrip)
    to_batch = partial(as_batch, device=accelerator.device)

    def loss_fn(module: nn.Module, step: int) -> dict[str, Tensor]:
        g = step_generator(config.seed, step, accelerator.process_index)
        drawn = pixels[torch.randint(len(pixels), (config.batch_size,), generator=g)]
        for i in torch.nonzero(torch.rand(config.batch_size, generator=g) < config.false_colours).flatten().tolist():
            drawn[i] = shuffle_colours(drawn[i], int(torch.randint(2**62, (), generator=g)))
        if step < (1 - config.full_share) * config.steps:
            top, left = (
                factor * int(torch.randint((full - part) // factor + 1, (), generator=g))
                for full, part in zip(config.size, config.crop, strict=True)
            )
            drawn = drawn[..., top : top + config.crop[0], left : left + config.crop[1]]
        images = to_batch(drawn)
        latent_shape = (len(images), config.latent_channels, images.shape[2] // factor, images.shape[3] // factor)
        noise = torch.randn(latent_shape, generator=g).to(images)
        restored, kl = module(images, noise)
        difference = restored.float() - images
        l1, mse = difference.abs().mean(), difference.square().mean()
        gradient = difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
        loss = l1 + config.mse_weight * mse + config.gradient_weight * gradient + config.kl_weight * kl.float().mean()
        return {"loss": loss, "l1": l1, "mse": mse, "kl": kl.float().mean()}

    def validate(module: nn.Module) -> dict[str, float]:
        images = to_batch(unseen.pixels_NCHW[::14])
        with torch.no_grad(), accelerator.autocast():
            restored = [vae.decode(vae.encode(b).latent_dist.mean).sample for b in images.split(24)]
        if accelerator.is_main_process:
            _save_standardized(vae, to_batch(pixels[::40]), config.output_dir / "vae")
        return {"psnr_held_out": float(psnr(torch.cat(restored).clamp(-1, 1), images))}

    made_from = f"images {seen.fingerprint}"
    run_loop(accelerator, roundtrip, optimizer, config, made_from=made_from, loss_fn=loss_fn, validate=validate)
    vae = vae.to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
    if accelerator.is_main_process:
        standardize_latents(vae, to_batch(pixels[::10]))
        vae.save_pretrained(config.output_dir / "vae")
    return vae


def _save_standardized(vae: AutoencoderKL, images_NCHW: Tensor, folder: Path) -> None:
    """Saves a standardized copy, so that an unfinished run leaves a usable autoencoder."""
    copy = AutoencoderKL.from_config(vae.config)
    copy.load_state_dict(vae.state_dict())
    copy = copy.to(images_NCHW.device).eval()
    standardize_latents(copy, images_NCHW)
    copy.half().save_pretrained(folder)


def pocket_vae() -> VaeConfig:
    """The configuration of the autoencoder that ships."""
    return VaeConfig(data=Path("pocket-train"), held_out=HELD_OUT, output_dir=Path("runs/pocket-vae"))


if __name__ == "__main__":
    try:
        train_vae(tyro.cli(VaeConfig, default=pocket_vae()))
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
