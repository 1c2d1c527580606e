"""The section of the speed benchmark about training: all classes jointly, beside one after another as published."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from eval.speed import timing
from eval.speed.measurement import Measurement
from eval.speed.published import PublishedProcedure
from fewshot_diti.bank import Bank
from fewshot_diti.data import ImageSet
from fewshot_diti.prior_images import prior_latents
from fewshot_diti.training import class_shots, train_bank
from fewshot_diti.trials import even_grid

VALIDATION_IMAGES = 6  # per class


def training(m: Measurement) -> dict[str, Any]:
    """Seconds per class, jointly and as published, over the same number of samples, and validation loss of both."""
    config, encoder, prompts = m.config, m.encoder, m.classifier.prompts_
    names = list(m.bank.labels)
    groups = m.groups
    settings = replace(
        m.settings.training,
        steps=config.training_steps,
        shots_per_step=1,
        prior_weight=1.0,
        prior_images=8,
        lr_schedule="constant",
    )
    prior = prior_latents(m.backbone, prompts.generic, settings.prior_images, encoder.geometry.size)
    pictures = m.backbone.decode_latents(prior)
    procedure = PublishedProcedure(m.backbone, m.bank.layout, encoder.geometry)
    few = names[: config.training_classes]
    whole = m.settings._replace(training=settings)
    encoder.forget()

    def published(some: Sequence[Any]) -> list[Tensor]:
        priors = prompts.generic, pictures
        return [procedure.train(m.shots_of(x), prompts.of_class(x), priors, settings) for x in some]

    # the joint training stands between two parts of the other
    one, one_seconds, published_memory = timing.timed(lambda: published(few[:1]))
    _, encoding_seconds, _ = timing.timed(
        lambda: [class_shots(encoder, x, groups[x], prompts, settings) for x in names]
    )
    (joint, _), steps_seconds, joint_memory = timing.timed(lambda: train_bank(encoder, groups, prompts, whole))
    others, other_seconds, _ = timing.timed(lambda: published(few[1:]))
    joint_seconds = (encoding_seconds + steps_seconds) / len(names)
    published_seconds = (one_seconds + other_seconds) / len(few)
    separate = replace(joint.select(few), rows=torch.stack(one + others))
    held_back = m.pool.subset([i for i, key in enumerate(m.pool.ids) if key not in set(m.shots.ids)])
    val = held_back if len(held_back) else m.test
    banks = {
        "joint": joint.select(few),
        "published": separate,
        "without class tokens": replace(separate, rows=torch.zeros_like(separate.rows)),
    }
    losses = {name: _losses(m, bank, val, few) for name, bank in banks.items()}
    apart = torch.cat(losses["joint"]) - torch.cat(losses["published"])
    return {
        "steps": settings.steps,
        "samples_per_class": 2 * settings.steps,
        "classes_jointly": len(names),
        "seconds_per_class": joint_seconds,
        "of_these_encoding": encoding_seconds / len(names),
        "seconds_per_class_published": published_seconds,
        "ratio": joint_seconds / published_seconds,
        "memory_beyond_mb": {"joint": joint_memory, "published": published_memory},
        "validation_loss": {name: [float(x.mean()) for x in found] for name, found in losses.items()},
        "validation_loss_joint_minus_published": float(apart.mean()),
        "its_standard_error_over_images": float(apart.std() / len(apart) ** 0.5) if len(apart) > 1 else None,
    }


def _losses(m: Measurement, bank: Bank, val: ImageSet, names: list[Any]) -> list[Tensor]:
    """Error of each class token on each image of its class that was no shot, mean over fixed trials."""
    scorer, grid, found = m.scorer_of(bank), even_grid(16, 0, m.backbone.num_train_timesteps).tolist(), []
    for c, name in enumerate(names):
        rows = [i for i, label in enumerate(val.labels) if val.class_names[label] == name][:VALIDATION_IMAGES]
        if not rows:
            raise ValueError(f"No image of class {name!r} is left to measure the validation loss on.")
        latents = m.latents(rows, val)
        errors = [scorer.errors(x, val.ids[i], [c], range(16), grid).mean() for x, i in zip(latents, rows, strict=True)]
        found.append(torch.stack(errors))
    return found
