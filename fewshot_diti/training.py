"""From shots to class tokens: those of many classes are trained jointly, in batches that mix classes.

Every class has its own random stream, step count, moments, weight decay and clipping, so that a class token comes out
the same whichever classes it is trained beside.

Shapes: C classes, G classes in one batch, P parameters of one class, n shots, K colour variants, c, h, w latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import metadata
from typing import TypeAlias

import torch
from torch import Tensor

from fewshot_diti.attention import attention_for_training
from fewshot_diti.backbone import Backbone
from fewshot_diti.bank import Bank, ClassToken
from fewshot_diti.checkpoints import Checkpoint, Checkpoints
from fewshot_diti.config import Label, Settings, TrainingConfig
from fewshot_diti.distributed import gather, my_share
from fewshot_diti.encoding import Encoder, PreparedImage
from fewshot_diti.lora import Layout, adapted, find_targets, gradients_on
from fewshot_diti.memory import halved
from fewshot_diti.presets import complete
from fewshot_diti.prior_images import prior_latents
from fewshot_diti.progress import Progress
from fewshot_diti.prompts import Prompts
from fewshot_diti.row_adamw import RowAdamW
from fewshot_diti.trials import torch_generator

Groups: TypeAlias = Mapping[Label, Sequence[PreparedImage]]  # the shots of each class
# called after each step with its number, from 1, each class's loss, and what gives the class tokens as they are then
OnStep: TypeAlias = Callable[[int, Mapping[Label, float], Callable[[], Bank]], None]


def most_shots(groups: Groups) -> int:
    """How many shots the largest class has: presets go by it."""
    return max(len(shots) for shots in groups.values())


class TrainingError(RuntimeError):
    """Some class tokens could not be trained; the classifier holds the others."""


def raise_failed(
    failed: Mapping[Label, int],
    kept: str = "the other classes are trained and kept",
    way_out: str = "and add them again",
) -> None:
    """Raises a TrainingError that names the classes whose loss was not finite, with the step, where there are any."""
    if failed:
        names = ", ".join(f"{x!r} (step {s})" for x, s in failed.items())
        raise TrainingError(
            f"The loss of {names} was not finite; {kept}. Lower the learning rate, or load the backbone in float32, "
            f"{way_out}."
        )


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
        """Latents, noise, timesteps of one step: `shots_per_step` shots, then as many prior images if any."""
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
    """Raises a ValueError for timesteps beyond the schedule and for a backbone in float16."""
    if config.timesteps[1] > backbone.num_train_timesteps:
        raise ValueError(
            f"timesteps={config.timesteps} exceed the schedule's {backbone.num_train_timesteps} timesteps."
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
    checkpoint: Checkpoint | None = None,
    on_step: Callable[[int, Mapping[Label, float], Tensor], None] = lambda *_: None,
) -> Trained:
    """Trains one class token for each class, all jointly, in this process.

    Args:
        config: what is not given follows the preset.
        prior: generic prompt and prior latents [images, c, h, w], needed where `config.prior_weight` > 0.
        checkpoint: of the same training; it goes on from there, to the same rows.
        on_step: called after each step with its number, from 1, each class's loss, and the rows [C, P].

    Raises:
        ValueError: no class, two classes of one label, timesteps beyond the schedule, prior images missing, or a
            backbone in float16.
    """
    if classes:
        config = complete(backbone.kind, max(len(c.mean) for c in classes), config).training
    labels = [c.label for c in classes]
    if not classes or len({(type(x), x) for x in labels}) < len(labels):
        raise ValueError(f"Class tokens need at least one class and distinct labels, got {labels}.")
    check_can_train(backbone, config)
    if config.prior_weight > 0 and prior is None:
        raise ValueError(f"prior_weight={config.prior_weight} needs prior images; pass them, or set prior_weight=0.")
    prompts, prior_latents = ([prior[0]], prior[1]) if prior is not None and config.prior_weight > 0 else ([], None)
    layout = layout_of(backbone, config)
    device = backbone.device
    dtype = classes[0].mean.dtype
    rows = torch.zeros(len(classes), layout.num_parameters, dtype=dtype, device=device)
    for c, label in enumerate(labels):
        rows[c] = layout.initial_row(torch_generator(config.seed, "initial", label)).to(rows)
    in_unet = Layout(tuple(t for t in layout.targets if t.network == "unet"), config.rank).num_parameters
    lr = [(in_unet, config.lr_unet), (layout.num_parameters - in_unet, config.lr_text_encoder)]
    optimizer = RowAdamW(rows, lr, weight_decay=config.weight_decay, max_grad_norm=config.max_grad_norm)
    streams = [_ClassStream(x, torch_generator(config.seed, "training", x.label)) for x in classes]
    ids = [backbone.tokenize([x.prompt, *prompts]) for x in classes]
    per_class = config.shots_per_step * (1 + len(prompts))
    width = max(1, config.samples_per_batch // per_class)
    failed_at = [0] * len(classes)
    first = 0
    if checkpoint is not None and (saved := checkpoint.load()):
        first, state = saved
        rows.copy_(state["rows"])
        optimizer.load_state(state)
        for stream, generator in zip(streams, state["generators"], strict=True):
            stream.generator.set_state(generator.clone())  # it reads the start of the storage
        failed_at, width = state["failed_at"].tolist(), min(width, int(state["width"]))
    bar = Progress(config.steps, desc, "step", initial=first)
    for step in range(first, config.steps):
        alive = [c for c in range(len(classes)) if not failed_at[c]]
        if not alive:
            break
        drawn = {c: streams[c].draw(config, prior_latents) for c in alive}
        losses: dict[Label, float] = {}
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
            losses |= zip([labels[c] for c in batch], loss_G.tolist(), strict=True)
            finite = (loss_G.detach().isfinite() & grad.norm(dim=1).isfinite()).tolist()
            for c, fine in zip(batch, finite, strict=True):
                if not fine:
                    failed_at[c] = step + 1
            kept = grad if all(finite) else grad[finite]
            optimizer.step([c for c, fine in zip(batch, finite, strict=True) if fine], kept, lr_scale(config, step))
        bar.update(loss=f"{sum(losses.values()) / len(losses):.4f}")
        on_step(step + 1, losses, rows)
        if checkpoint is not None and (checkpoint.due or step == config.steps - 1):
            generators = torch.stack([stream.generator.get_state() for stream in streams])
            counts = {"failed_at": torch.tensor(failed_at), "width": torch.tensor(width)}
            checkpoint.save(step + 1, {"rows": rows, "generators": generators, **counts, **optimizer.state()})
    bar.close()
    if checkpoint is not None and any(failed_at):
        checkpoint.discard()
    failed = {labels[c]: step for c, step in enumerate(failed_at) if step}
    return Trained(layout, rows.cpu(), failed)


def train_bank(
    encoder: Encoder,
    groups: Groups,
    prompts: Prompts,
    settings: Settings,
    *,
    desc: str = "class tokens",
    checkpoints: Checkpoints | None = None,
    on_step: OnStep | None = None,
) -> tuple[Bank, dict[Label, int]]:
    """A bank of the groups' classes, sorted, without those whose loss was not finite; these with their step.

    Under several processes each encodes and trains its share of the classes, and calls `on_step` with these; all get
    the whole bank. Started again with the same checkpoints, images, settings and number of processes, it goes on where
    it was cut short.

    Raises:
        ValueError: as `check_can_train`, or a prompt is longer than the text encoder reads.
    """
    backbone, training = encoder.backbone, settings.training
    check_can_train(backbone, training)  # before the expensive work, as is the length of the prompts
    backbone.tokenize([*map(prompts.of_class, groups), prompts.generic])
    prior = None
    if training.prior_weight > 0:
        prior = prompts.generic, prior_latents(backbone, prompts.generic, training.prior_images, encoder.geometry.size)
    labels = sorted(groups)
    mine = [labels[c] for c in my_share(len(labels))]
    shots = []
    with Progress(len(mine), "encoding shots", "class", minor=True) as bar:
        for label in mine:
            shots.append(class_shots(encoder, label, groups[label], prompts, training))
            bar.update()

    bank_of = partial(_bank_of, encoder, groups, prompts, settings)

    def watch(step: int, losses: Mapping[Label, float], rows_CP: Tensor) -> None:
        if on_step is not None:
            on_step(step, losses, lambda: bank_of(dict(zip(mine, rows_CP.cpu(), strict=True))))

    checkpoint = None
    if checkpoints is not None:
        ids = {repr(label): [image.id for image in groups[label]] for label in mine}
        steps = replace(training, samples_per_batch=1, gradient_checkpointing=False)  # these decide memory alone
        decides = backbone.hash, backbone.dtype, backbone.device.type, encoder.geometry, prompts, steps
        checkpoint = checkpoints.of("class tokens", metadata.version("fewshot-diti"), ids, *map(str, decides))
    found = []
    if shots:
        trained = train_class_tokens(
            backbone, shots, training, prior=prior, desc=desc, checkpoint=checkpoint, on_step=watch
        )
        found.append((dict(zip(mine, trained.rows, strict=True)), trained.failed))
    rows: dict[Label, Tensor] = {}
    failed: dict[Label, int] = {}
    for its_rows, its_failed in gather(found):
        rows |= its_rows
        failed |= its_failed
    return bank_of({label: rows[label] for label in labels if label not in failed}), failed


def _bank_of(
    encoder: Encoder, groups: Groups, prompts: Prompts, settings: Settings, rows: Mapping[Label, Tensor]
) -> Bank:
    """A bank of a copy of these rows [P]."""
    backbone, (training, scoring, _) = encoder.backbone, settings
    layout = layout_of(backbone, training)
    return Bank(
        tokens=tuple(
            ClassToken(
                label=label,
                prompt=prompts.of_class(label),
                num_shots=len(groups[label]),
                unet_scale=scoring.unet_scale,
                text_encoder_scale=scoring.text_encoder_scale,
            )
            for label in rows
        ),
        layout=layout,
        rows=torch.stack([*rows.values()]) if rows else torch.empty(0, layout.num_parameters),
        backbone_name=backbone.public_name,
        backbone_hash=backbone.hash,
        geometry=encoder.geometry,
    )


def class_shots(
    encoder: Encoder, label: Label, images: Sequence[PreparedImage], prompts: Prompts, training: TrainingConfig
) -> ClassShots:
    """The latents of one class's shots and of their colour variants, with the prompt."""
    pairs = [encoder.variants(image, training) for image in images]
    mean, std = (torch.stack(parts) for parts in zip(*pairs, strict=True))
    return ClassShots(label=label, prompt=prompts.of_class(label), mean=mean, std=std)


def layout_of(backbone: Backbone, training: TrainingConfig) -> Layout:
    """Where the adapters of class tokens trained in this way lie in a row."""
    targets = find_targets(backbone.unet, backbone.text_encoder, training.blocks, training.target_modules)
    return Layout(targets, training.rank, training.alpha)
