"""Learning a representation from latents of images, without labels.

Shapes in names: N images, B batch, c, h, w latents, S timesteps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fewshot_diti.backbone import Backbone
from fewshot_diti.data.images import ImageGeometry
from fewshot_diti.loop import LoopConfig, run_loop, step_generator
from fewshot_diti.progress import say
from fewshot_diti.representation.estimator import frozen_pass
from fewshot_diti.representation.latents import Latents
from fewshot_diti.representation.methods import MethodConfig, to_dict
from fewshot_diti.representation.model import Representation, embed
from fewshot_diti.representation.objectives import denoising_error
from fewshot_diti.representation.pdae import PdaeNetwork
from fewshot_diti.representation.simclr import SimclrNetwork
from fewshot_diti.representation.subsets import (
    NUM_SUBSETS,
    PUBLISHED_DIMS,
    Stages,
    ends_of_equal_snr,
    even_sizes,
    sizes_by_loss,
    sizes_of_stages,
)
from fewshot_diti.representation.tcvae import TcvaeNetwork
from fewshot_diti.timesteps import pdae_weights

Losses: TypeAlias = Callable[[nn.Module, torch.Generator], dict[str, Tensor]]  # "loss" is minimised, the rest logged
Figures: TypeAlias = Callable[[nn.Module], dict[str, float]]

FOLDER = "representation"  # in output_dir
_HELD_OUT = 64  # images that the log has figures of


@dataclass(frozen=True, kw_only=True)
class RepresentationTraining(LoopConfig):
    """Settings of a run; by default PDAE's (published: Adam 1e-4 from random weights, batch 32).

    Attributes:
        prompt: the text that the U-Net reads; it names nothing.
    """

    prompt: str
    steps: int = 3_000
    batch_size: int = 32
    lr: float = 5e-4
    warmup: int = 20
    ema_decay: float = 0.999


def train(
    backbone: Backbone,
    method: MethodConfig,
    seen: Latents,
    unseen: Latents,
    config: RepresentationTraining,
    geometry: ImageGeometry | None = None,
) -> Representation:
    """Trains and saves `output_dir/representation` at every validation; a killed run continues at its last checkpoint.

    The log has figures on unseen images: of PDAE and DiTi, at ten timesteps, the error and the share of the backbone's
    error that the features save, 1 - e_z / e_theta; of other methods their losses.

    Args:
        unseen: latents that are not trained on.
        geometry: that the images got; by default the backbone's size, cropped.

    Raises:
        ValueError: a checkpoint in `output_dir` was made from other images or settings, or on another backbone;
            PDAE or DiTi is trained on a backbone in half precision, and not mixed; or SimCLR gets no views, or batches
            of one image.
    """
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    torch.manual_seed(config.seed)
    network = method.build(backbone)
    say(f"{method.name}: {sum(p.numel() for p in network.parameters()) / 1e6:.1f} M parameters")
    # gradients of what starts behind zeros are near 1e-10, which the usual eps of 1e-8 would damp
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.lr, eps=1e-14, weight_decay=0.0, fused=True)
    module: nn.Module = accelerator.prepare_model(network)
    few = unseen.spread(_HELD_OUT)
    if isinstance(network, PdaeNetwork):
        losses, figures = _restoring(network, backbone, accelerator, seen, few, config)
    else:
        losses, figures = _alone(network, backbone, accelerator, seen, few, config)
    done = config.steps

    def loss_fn(module: nn.Module, step: int) -> dict[str, Tensor]:
        nonlocal done
        done = step + 1
        return losses(module, step_generator(config.seed, step, accelerator.process_index))

    def snapshot() -> Representation:
        return Representation(
            backbone,
            method,
            copy.deepcopy(network),
            prompt=config.prompt,
            geometry=geometry or ImageGeometry(size=backbone.image_size),
            history={
                "Images": f"{len(seen)}, of latents with hash {seen.fingerprint}",
                "Training": f"{done} of {config.steps} steps of {config.batch_size * accelerator.num_processes} images",
                "Learning rate": f"{config.lr:g}, with a cosine to 0",
                "Average of weights": f"decay {config.ema_decay:g}",
                "Seed": config.seed,
            },
        )

    @torch.no_grad()
    def validate(module: nn.Module) -> dict[str, float]:
        found = figures(module)
        if accelerator.is_main_process:
            snapshot().save_pretrained(config.output_dir / FOLDER)
        return found

    made_from = f"latents {seen.fingerprint}, backbone {backbone.hash}, {to_dict(method)}"
    run_loop(accelerator, module, optimizer, config, made_from=made_from, loss_fn=loss_fn, validate=validate)
    trained = snapshot()
    if accelerator.is_main_process:
        trained.save_pretrained(config.output_dir / FOLDER)
    return trained


def _restoring(
    network: PdaeNetwork,
    backbone: Backbone,
    accelerator: Accelerator,
    seen: Latents,
    unseen: Latents,
    config: RepresentationTraining,
) -> tuple[Losses, Figures]:
    """What is minimised and what is logged where features help the backbone to restore noised latents."""
    if config.mixed_precision == "no" and backbone.dtype != torch.float32:
        raise ValueError(
            f"mixed_precision='no' on a backbone in {str(backbone.dtype).removeprefix('torch.')}; load the backbone in "
            "float32, or pass 'bf16'."
        )
    text_1LW, num_t = embed(backbone, config.prompt), backbone.num_train_timesteps

    def predict(module: nn.Module, mean: Tensor, x_0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        frozen = frozen_pass(backbone, backbone.add_noise(x_0, noise, t), t, text_1LW)
        with accelerator.autocast():
            return module(mean, frozen, t), frozen.noise_Bchw

    def losses(module: nn.Module, g: torch.Generator) -> dict[str, Tensor]:
        mean, x_0 = seen.draw(torch.randint(len(seen), (config.batch_size,), generator=g), g)
        t = torch.randint(num_t, (config.batch_size,), generator=g)
        noise = torch.randn(x_0.shape, generator=g)
        mean, x_0, noise, t = (x.to(backbone.device) for x in (mean, x_0, noise, t))
        predicted, without = predict(module, mean, x_0, noise, t)
        loss, base = (network.loss(x, noise, t).mean() for x in (predicted, without))
        return {"loss": loss, "backbone_loss": base, "error": denoising_error(predicted, noise).mean()}

    g = torch.Generator().manual_seed(config.seed)
    held_out = [*unseen.draw(torch.arange(len(unseen)), g), torch.randn(unseen.mean_Nchw.shape, generator=g)]

    def figures(module: nn.Module) -> dict[str, float]:
        mean, x_0, noise = (x.to(backbone.device) for x in held_out)
        found: dict[str, float] = {}
        for t in range(num_t // 20, num_t, num_t // 10):
            times = torch.full((len(mean),), t, device=backbone.device)
            e_z, e_theta = (float(denoising_error(x, noise).mean()) for x in predict(module, mean, x_0, noise, times))
            found |= {f"held_out_error_{t}": e_z, f"held_out_filled_{t}": 1 - e_z / e_theta}
        return found

    return losses, figures


def _alone(
    network: SimclrNetwork | TcvaeNetwork,
    backbone: Backbone,
    accelerator: Accelerator,
    seen: Latents,
    unseen: Latents,
    config: RepresentationTraining,
) -> tuple[Losses, Figures]:
    """The same where the network itself has a loss of latents, and the U-Net is not asked."""
    if isinstance(network, SimclrNetwork) and config.batch_size < 2:
        raise ValueError(f"batch_size={config.batch_size}; SimCLR compares the images of a batch, pass 2 or more.")

    def losses_of(module: nn.Module, latents: Latents, count: int, g: torch.Generator) -> dict[str, Tensor]:
        with accelerator.autocast():
            found: dict[str, Tensor] = module(*(x.to(backbone.device) for x in network.draw(latents, count, g)))
        return found

    def figures(module: nn.Module) -> dict[str, float]:
        g = torch.Generator().manual_seed(config.seed)
        found = losses_of(module, unseen, len(unseen), g)
        return {f"held_out_{name}": float(value) for name, value in found.items()}

    return lambda module, g: losses_of(module, seen, config.batch_size, g), figures


def choose_sizes(stages: Stages, dims: int, backbone: Backbone, latents: Latents, prompt: str) -> tuple[int, ...]:
    """Sizes of DiTi's subsets.

    Args:
        stages: "published": dimensions by stage at the published timesteps; "snr": at the timesteps where this
            backbone's schedule has the same signal-to-noise ratios; "loss": in proportion to the weighted error that
            the backbone makes on the latents; "even": the same for each subset.
        dims: D; the published stages have 512.

    Raises:
        ValueError: the subsets cannot have so many dimensions in all.
    """
    if stages == "even":
        return even_sizes(dims)
    if stages == "loss":
        return sizes_by_loss(dims, _weighted_errors(backbone, latents.spread(_HELD_OUT), prompt))
    if dims != sum(PUBLISHED_DIMS):
        raise ValueError(f"Stages {stages!r} have {sum(PUBLISHED_DIMS)} dimensions, not {dims}; pass 'loss' or 'even'.")
    if stages == "published":
        return sizes_of_stages(backbone.num_train_timesteps)
    return sizes_of_stages(backbone.num_train_timesteps, ends_of_equal_snr(backbone.alphas_cumprod))


@torch.no_grad()
def _weighted_errors(backbone: Backbone, latents: Latents, prompt: str) -> Tensor:
    """lambda_t times the backbone's error at each timestep, [T]: that in the middle of each of the 64 subsets."""
    g = torch.Generator().manual_seed(0)
    _, x_0 = latents.draw(torch.arange(len(latents)), g)
    noise, num_t = torch.randn(x_0.shape, generator=g).to(backbone.device), backbone.num_train_timesteps
    x_0, text = x_0.to(backbone.device), embed(backbone, prompt).expand(len(latents), -1, -1)
    subset_T = torch.arange(num_t) * NUM_SUBSETS // num_t
    middles = ((torch.arange(NUM_SUBSETS) + 0.5) * num_t / NUM_SUBSETS).long().to(backbone.device)
    errors = torch.stack([backbone.errors(x_0, noise, t.expand(len(x_0)), text).mean() for t in middles])
    return pdae_weights(backbone.alphas_cumprod) * errors.cpu()[subset_T]
