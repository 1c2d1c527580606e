"""The published procedure (TiF, CVPR 2024) as its authors run it, as a reference for timing; not used elsewhere.

One class after another, in training and in scoring; one LoRA in the networks, whose weights are switched from class to
class; batches of one shot and one prior image; the VAE encodes at every training step; no latent is kept.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torchvision.transforms.v2 import ColorJitter

from fewshot_diti.attention import attention_for_training
from fewshot_diti.backbone import Backbone
from fewshot_diti.bank import Bank
from fewshot_diti.data.images import ImageGeometry, ImageSource, image_id, open_image
from fewshot_diti.elimination import Decision, eliminate, published_stages
from fewshot_diti.lora import Layout
from fewshot_diti.training import TrainingConfig, lr_scale
from fewshot_diti.trials import even_grid, torch_generator, trial_noise

ADAPTER = "default"


class PublishedProcedure:
    """A backbone with one LoRA in it, by peft.

    Args:
        backbone: stays as it is; its U-Net and text encoder are copied.
        layout: which linears have LoRA, and the rank.
        geometry: of all images.
        batch_size: evaluations of one class in one forward.
    """

    def __init__(self, backbone: Backbone, layout: Layout, geometry: ImageGeometry, *, batch_size: int = 96) -> None:
        self.layout, self.geometry, self.batch_size = layout, geometry, batch_size
        self.backbone = copy.copy(backbone)
        self.backbone.compiled_unet = None  # that of the other U-Net
        self.backbone.unet, self.backbone.text_encoder = map(copy.deepcopy, (backbone.unet, backbone.text_encoder))
        for network, module in self.backbone.networks.items():
            names = [t.name for t in layout.targets if t.network == network]
            alpha: Any = layout.alpha  # annotated int in peft, which takes any number
            inject_adapter_in_model(LoraConfig(r=layout.rank, lora_alpha=alpha, target_modules=names), module)

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        """A and B of each target in turn, as in a row of a bank."""
        found = []
        for target in self.layout.targets:
            module: Any = self.backbone.networks[target.network].get_submodule(target.name)
            found += [module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight]
        return found

    @torch.no_grad()
    def switch(self, row_P: Tensor) -> None:
        """Puts one class's weights into the networks."""
        for p, piece in zip(self.parameters, row_P.split(self.layout.sizes), strict=True):
            p.copy_(piece.view_as(p))

    def train(
        self,
        shots: Sequence[ImageSource],
        prompt: str,
        prior: tuple[str, Sequence[ImageSource]],
        config: TrainingConfig,
    ) -> Tensor:
        """The row [P] of one class: one shot and one prior image per step, encoded at every step.

        In mixed precision, the trained weights in float32, where the backbone is in bfloat16.
        """
        generator, backbone = torch_generator(config.seed, "published", prompt), self.backbone
        for p in self.parameters:
            p.data = p.data.float()
            p.requires_grad_(True)
        row = self.layout.initial_row(generator)
        self.switch(row)
        in_unet = 2 * sum(t.network == "unet" for t in self.layout.targets)
        groups = [
            {"params": self.parameters[:in_unet], "lr": config.lr_unet},
            {"params": self.parameters[in_unet:], "lr": config.lr_text_encoder},
        ]
        optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_scale(config, step))
        mixed = torch.autocast(backbone.device.type, backbone.dtype, enabled=backbone.dtype != torch.float32)
        jitter = ColorJitter(config.brightness, config.contrast, config.saturation, config.hue)
        for _ in range(config.steps):
            which = (int(torch.randint(len(images), (), generator=generator)) for images in (shots, prior[1]))
            images = [open_image(source[i]) for source, i in zip((shots, prior[1]), which, strict=True)]
            pixels = torch.stack([self.geometry.pixels(jitter(images[0])), self.geometry.pixels(images[1])])
            mean, std = backbone.encode_images(pixels)
            latents = mean + std * torch.randn(mean.shape, generator=generator)
            noise = torch.randn(mean.shape, generator=generator)
            t = torch.randint(*config.timesteps, (2,), generator=generator)
            with attention_for_training(latents), mixed:
                text = backbone.encode_text(backbone.tokenize([prompt, prior[0]]))
                latents, noise, t = (x.to(backbone.device) for x in (latents, noise, t))
                backbone.errors(latents, noise, t, text).sum().backward()
            nn.utils.clip_grad_norm_(self.parameters, config.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        row = torch.cat([p.detach().cpu().flatten() for p in self.parameters])
        for p in self.parameters:
            p.requires_grad_(False)
            p.data = p.data.to(backbone.dtype)
        return row

    @torch.no_grad()
    def classify(self, image: ImageSource, bank: Bank, *, seed: int) -> Decision:
        """One image through the published stages, 500 trials, uniform weights."""
        backbone, opened = self.backbone, open_image(image)
        latents = backbone.encode_images(self.geometry.pixels(opened)[None])[0][0].to(backbone.device)
        key, rows, grid = image_id(opened), bank.scaled_rows(), even_grid(500, 0, backbone.num_train_timesteps)

        def errors(pairs: Tensor, positions: Tensor) -> Tensor:
            noise = trial_noise(seed, key, positions.tolist(), tuple(latents.shape)).to(backbone.device)
            t, found = grid[positions].to(backbone.device), []
            for c in pairs[:, 1].tolist():
                self.switch(rows[c])
                text = backbone.encode_text(backbone.tokenize([bank.tokens[c].prompt]))
                parts = zip(noise.split(self.batch_size), t.split(self.batch_size), strict=True)
                found.append(
                    torch.cat(
                        [
                            backbone.errors(latents.expand_as(n), n, part, text.expand(len(n), -1, -1)).cpu()
                            for n, part in parts
                        ]
                    )
                )
            return torch.stack(found)

        return eliminate(errors, 1, len(bank), published_stages(len(bank)), torch.ones(500))[0]
