"""Joint training: the class tokens of all classes in one process, in batches that mix classes.

Every class has its own random stream, step count, moments, weight decay and clipping, so that a class token comes out
the same whichever classes it is trained beside.

Shapes: C classes, G classes in one batch, P parameters of one class, n shots, K colour variants, c, h, w latents.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from accelerate.utils import reduce
from torch import Tensor, nn
from tqdm import tqdm

from fewshot_diti.attention import attention_for_training
from fewshot_diti.backbone import Backbone
from fewshot_diti.lora import BLOCK_FILTERS, Layout, adapted, find_targets, gradients_on
from fewshot_diti.memory import halved
from fewshot_diti.processes import process_state
from fewshot_diti.trials import torch_generator

Label = str | int | bool


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Everything that decides how class tokens are trained.

    Attributes:
        steps: optimizer steps of every class.
        rank: of the LoRA; alpha = rank.
        blocks: U-Net blocks with LoRA, a key of `lora.BLOCK_FILTERS`.
        lr_unet, lr_text_encoder: AdamW learning rates; `lr_schedule` "constant" or "cosine" (to zero at `steps`).
        shots_per_step: samples of a class in one step, drawn from its shots.
        prior_weight: weight of the loss on prior images, as many a step as shots; 0 uses none.
        prior_images: images of the generic prompt that the backbone makes once.
        timesteps: (lo, hi) in 0..T, drawn uniformly, hi excluded.
        colour_variants: K, colour-jittered copies of each shot that are encoded once; 1 keeps the shots as they are.
        brightness, contrast, saturation, hue: strength of the jitter, as in `torchvision.transforms.v2.ColorJitter`.
        permute_channels: whether a jittered copy may also have its colour channels permuted.
        flip: whether a copy may be mirrored; off, since aircraft noses point one way.
        weight_decay, max_grad_norm: of AdamW, and of each class's gradient over both networks.
        samples_per_batch: samples of one forward, one class's at least; decides how many classes share it, never the
            result. Halved where memory runs out.
        gradient_checkpointing: trades a second forward for the memory of the U-Net's activations.
        seed: of every class's own random stream.

    Raises:
        ValueError: a value is out of its range.
    """

    steps: int
    rank: int = 16
    blocks: str = "all"
    lr_unet: float = 1e-4
    lr_text_encoder: float = 5e-5
    lr_schedule: str = "constant"
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    shots_per_step: int = 1
    prior_weight: float = 1.0
    prior_images: int = 100
    timesteps: tuple[int, int] = (0, 1000)
    colour_variants: int = 8
    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2
    hue: float = 0.1
    permute_channels: bool = False
    flip: bool = False
    samples_per_batch: int = 48
    gradient_checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "rank", "shots_per_step", "colour_variants", "samples_per_batch", "prior_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; pass a whole number of at least 1.")
        for name in (
            "lr_unet",
            "lr_text_encoder",
            "weight_decay",
            "prior_weight",
            "brightness",
            "contrast",
            "saturation",
        ):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)}; pass a number of at least 0.")
        if not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm={self.max_grad_norm}; pass a number above 0 (inf: no clipping).")
        if self.lr_schedule not in ("constant", "cosine"):
            raise ValueError(f"lr_schedule={self.lr_schedule!r}; pass 'constant' or 'cosine'.")
        if self.blocks not in BLOCK_FILTERS:
            raise ValueError(f"blocks={self.blocks!r}; pass one of {sorted(BLOCK_FILTERS)}.")
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"hue={self.hue}; pass a number from 0 to 0.5.")
        lo, hi = self.timesteps
        if not 0 <= lo < hi:
            raise ValueError(f"timesteps={self.timesteps}; pass (lo, hi) with 0 <= lo < hi.")


@dataclass(frozen=True, kw_only=True)
class ClassShots:
    """What one class token is trained on.

    Attributes:
        label: the class as the user calls it; it also names the class's random stream.
        prompt: the class token's prompt.
        mean, std: of the shots' latents, fp32 [n, K, c, h, w].
    """

    label: Label
    prompt: str
    mean: Tensor
    std: Tensor


class RowAdamW:
    """torch's AdamW on chosen rows of a matrix: absent rows keep moments, steps and values.

    Clipping is by the norm of each row's gradient.

    Args:
        rows_CP: changed in place.
        lr: (width, learning rate) of the consecutive pieces of a row.
    """

    def __init__(
        self, rows_CP: Tensor, lr: Sequence[tuple[int, float]], *, weight_decay: float, max_grad_norm: float
    ) -> None:
        self.widths, self.lr = [w for w, _ in lr], [x for _, x in lr]
        self.max_grad_norm = max_grad_norm
        self.pieces = [[nn.Parameter(piece) for piece in row.split(self.widths)] for row in rows_CP]
        groups = [{"params": list(ps), "lr": x} for ps, x in zip(zip(*self.pieces, strict=True), self.lr, strict=True)]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=weight_decay, fused=True)

    @torch.no_grad()
    def step(self, classes: Sequence[int], grad_GP: Tensor, lr_scale: float) -> None:
        """One step of the rows `classes` with learning rate `lr * lr_scale`; clips `grad_GP` in place."""
        norm = grad_GP.norm(dim=1, keepdim=True)
        clipped = grad_GP.mul_((self.max_grad_norm / (norm + 1e-6)).clamp(max=1))
        for c, row in zip(classes, clipped, strict=True):
            for p, piece in zip(self.pieces[c], row.split(self.widths), strict=True):
                p.grad = piece
        for group, lr in zip(self.optimizer.param_groups, self.lr, strict=True):
            group["lr"] = lr * lr_scale
        self.optimizer.step()
        self.optimizer.zero_grad()


@dataclass(frozen=True)
class Trained:
    """Rows [C, P] of the class tokens in the order of the classes, and how the training went.

    Attributes:
        failed: classes whose loss was not finite, with the step; their rows are worthless.
    """

    layout: Layout
    rows: Tensor
    failed: dict[Label, int] = field(default_factory=dict)


@dataclass
class _ClassStream:
    """One class's shots and the random stream that all its draws come from."""

    shots: ClassShots
    generator: torch.Generator

    def draw(self, config: TrainingConfig, prior: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, noise, time-steps of one step: `shots_per_step` shots, then as many prior images if any."""
        g, m = self.generator, config.shots_per_step
        n, variants = self.shots.mean.shape[:2]
        rows = torch.randperm(n, generator=g)[:m] if n >= m else torch.randint(n, (m,), generator=g)
        which = rows, torch.randint(variants, (m,), generator=g)
        mean = self.shots.mean[which]
        latents = mean + self.shots.std[which] * torch.randn(mean.shape, generator=g, dtype=mean.dtype)
        if prior is not None:
            latents = torch.cat([latents, prior[torch.randint(len(prior), (m,), generator=g)]])
        noise = torch.randn(latents.shape, generator=g, dtype=mean.dtype)
        return latents, noise, torch.randint(*config.timesteps, (len(latents),), generator=g)


@contextmanager
def _checkpointing(backbone: Backbone, on: bool) -> Iterator[None]:
    """The U-Net with gradient checkpointing inside the context, and without outside, whatever happens inside."""
    if on:
        backbone.unet.enable_gradient_checkpointing()
    try:
        yield
    finally:
        if on:
            backbone.unet.disable_gradient_checkpointing()


def lr_scale(config: TrainingConfig, step: int) -> float:
    """Factor on the learning rates at a class's `step`."""
    return 1.0 if config.lr_schedule == "constant" else 0.5 * (1 + math.cos(math.pi * step / config.steps))


def class_losses(
    backbone: Backbone,
    input_ids_GpL: Tensor,
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    prior_weight: float,
) -> Tensor:
    """Loss of each class [G]: mean error over its shots plus `prior_weight` times that over its prior images.

    The samples of a class are consecutive, those of prompt 0 (class) before those of prompt 1 (generic). Must be called
    inside `adapted`.
    """
    groups, prompts = input_ids_GpL.shape[:2]
    text = backbone.encode_text(input_ids_GpL.flatten(0, 1))
    each = len(latents) // (groups * prompts)
    errors = backbone.errors(latents, noise, timesteps, text.repeat_interleave(each, 0)).view(groups, prompts, each)
    loss = errors[:, 0].mean(1)
    return loss if prompts == 1 else loss + prior_weight * errors[:, 1].mean(1)


def check_can_train(backbone: Backbone, config: TrainingConfig) -> None:
    """Raises a ValueError for time-steps beyond the schedule and for a backbone in float16."""
    if config.timesteps[1] > backbone.num_train_timesteps:
        raise ValueError(
            f"timesteps={config.timesteps} exceed the schedule's {backbone.num_train_timesteps} time-steps."
        )
    if backbone.dtype == torch.float16:
        raise ValueError("float16 loses small gradients; load the backbone in bfloat16 or float32 to train.")


@gradients_on()
def train_class_tokens(
    backbone: Backbone,
    classes: Sequence[ClassShots],
    config: TrainingConfig,
    *,
    prior: tuple[str, Tensor] | None = None,
    desc: str = "class tokens",
) -> Trained:
    """Trains one class token for each class, all jointly; under several processes each trains its share of the classes.

    Args:
        prior: generic prompt and prior latents [images, c, h, w], needed where `config.prior_weight` > 0.

    Raises:
        ValueError: no class, two classes of one label, time-steps beyond the schedule, prior images missing, or a
            backbone in float16.
    """
    labels = [c.label for c in classes]
    if not classes or len({(type(x), x) for x in labels}) < len(labels):
        raise ValueError(f"Class tokens need at least one class and distinct labels, got {labels}.")
    check_can_train(backbone, config)
    if config.prior_weight > 0 and prior is None:
        raise ValueError(f"prior_weight={config.prior_weight} needs prior images; pass them, or set prior_weight=0.")
    state = process_state()
    prompts, prior_latents = ([prior[0]], prior[1]) if prior is not None and config.prior_weight > 0 else ([], None)
    layout = Layout(find_targets(backbone.unet, backbone.text_encoder, config.blocks), config.rank)
    device = backbone.device
    dtype = classes[0].mean.dtype
    mine = list(range(len(classes)))[state.process_index :: state.num_processes]
    rows = torch.zeros(len(classes), layout.num_parameters, dtype=dtype, device=device)
    for c in mine:
        generator = torch_generator(config.seed, "initial", labels[c])
        rows[c] = layout.initial_row(generator).to(rows)
    in_unet = Layout(tuple(t for t in layout.targets if t.network == "unet"), config.rank).num_parameters
    lr = [(in_unet, config.lr_unet), (layout.num_parameters - in_unet, config.lr_text_encoder)]
    optimizer = RowAdamW(rows, lr, weight_decay=config.weight_decay, max_grad_norm=config.max_grad_norm)
    streams = {c: _ClassStream(classes[c], torch_generator(config.seed, "training", labels[c])) for c in mine}
    ids = {c: backbone.tokenize([classes[c].prompt, *prompts]) for c in mine}
    per_class = config.shots_per_step * (1 + len(prompts))
    width = max(1, config.samples_per_batch // per_class)
    failed_at = [0] * len(classes)
    bar = tqdm(total=config.steps, desc=desc, unit="step", disable=None if state.is_main_process else True)
    for step in range(config.steps):
        alive = [c for c in mine if not failed_at[c]]
        if not alive:
            break
        drawn = {c: streams[c].draw(config, prior_latents) for c in alive}
        while alive:
            batch = alive[:width]
            parts = zip(*(drawn[c] for c in batch), strict=True)
            latents, noise, timesteps = (torch.cat(part).to(device) for part in parts)
            active = torch.stack([rows[c].to(backbone.dtype) for c in batch]).requires_grad_()
            try:
                # backward stays inside: with gradient checkpointing it runs the adapted forward again
                with (
                    adapted(backbone, layout, active),
                    attention_for_training(latents),
                    _checkpointing(backbone, config.gradient_checkpointing),
                ):
                    loss_G = class_losses(
                        backbone,
                        torch.stack([ids[c] for c in batch]),
                        latents,
                        noise,
                        timesteps,
                        config.prior_weight,
                    )
                    (grad,) = torch.autograd.grad(loss_G.sum(), active)
            except RuntimeError as error:
                width = halved(len(batch), error)
                continue
            alive = alive[width:]
            grad = grad.to(dtype)
            finite = (loss_G.detach().isfinite() & grad.norm(dim=1).isfinite()).tolist()
            for c, fine in zip(batch, finite, strict=True):
                if not fine:
                    failed_at[c] = step + 1
            kept = grad if all(finite) else grad[finite]
            optimizer.step([c for c, fine in zip(batch, finite, strict=True) if fine], kept, lr_scale(config, step))
        bar.update()
        if step % 10 == 0:
            bar.set_postfix(loss=f"{float(loss_G.detach().mean()):.4f}")
    bar.close()
    if state.num_processes > 1:
        rows, steps = (reduce(x, "sum") for x in (rows, torch.tensor(failed_at, device=device)))
        failed_at = steps.tolist()
    failed = {labels[c]: step for c, step in enumerate(failed_at) if step}
    return Trained(layout, rows.cpu(), failed)
