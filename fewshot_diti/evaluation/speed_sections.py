"""The sections of the speed benchmark: each measures one thing and returns it ready for JSON."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewshot_diti.bank import Bank
from fewshot_diti.classifier import DiTiClassifier
from fewshot_diti.data import ImageSet
from fewshot_diti.data.images import image_id
from fewshot_diti.elimination import Look, Stage, count_evaluations, exhaustive, proportional_stages, published_stages
from fewshot_diti.evaluation import speed
from fewshot_diti.evaluation.full_size import full_size_round, gflop_of_an_evaluation
from fewshot_diti.evaluation.measurement import Measurement
from fewshot_diti.evaluation.published import PublishedProcedure
from fewshot_diti.prior import prior_latents
from fewshot_diti.recommended import recommended_training
from fewshot_diti.scoring import Scorer, decide
from fewshot_diti.trials import even_grid

PARTS_IMAGES = 16  # that the parts' sum is set against


def machine(m: Measurement) -> dict[str, Any]:
    """Processor or GPU, its measured peak, and what of it an evaluation gets."""
    backbone = m.backbone
    size = tuple(n // backbone.vae_scale_factor for n in backbone.image_size)
    channels = int(backbone.unet.config.block_out_channels[0])
    peak = speed.machine_peak(backbone.device, backbone.dtype, channels, (size[0], size[1]))
    flops = speed.flops_of_an_evaluation(backbone, (size[0], size[1]))
    batch = m.learner.scoring.batch_size
    run = speed.plain_evaluations(backbone, m.learner.encode([m.test.image(0)])[0], batch)
    seconds = min(speed.interleaved({"plain": run}, 3)["plain"]) / batch
    return {
        "device": torch.cuda.get_device_name() if backbone.device.type == "cuda" else platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "dtype": str(backbone.dtype),
        "avx512_bf16": bool(torch.cpu._is_avx512_bf16_supported()),
        "amx": bool(torch.cpu._is_amx_tile_supported()),
        "gflops_matmul": peak["matmul"] / 1e9,
        "gflops_convolution": peak["convolution"] / 1e9,
        "gflop_per_evaluation": flops / 1e9,
        "evaluations_per_second": 1 / seconds,
        "share_of_matmul_peak": flops / seconds / peak["matmul"],
    }


def elimination(m: Measurement) -> dict[str, Any]:
    """Decisions on the kept errors, also for images of either half of the classes, and over the race's confidence."""
    stages = m.classifier.scoring.schedule(len(m.bank))
    half = torch.tensor(m.labels) < len(m.bank) // 2
    found = {
        "all": _decided(m, stages),
        "first half of the classes": _decided(m, stages, half),
        "second half of the classes": _decided(m, stages, ~half),
        "evaluations_published": count_evaluations(published_stages(len(m.bank)), len(m.bank)),
        "evaluations_in_proportion": count_evaluations(proportional_stages(len(m.bank)), len(m.bank)),
    }
    curve = {}
    for confidence in (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99):
        looks = replace(m.classifier.scoring, decide="racing", confidence=confidence).schedule(len(m.bank))
        curve[str(confidence)] = _decided(m, looks)
    return found | {"by_confidence": curve}


def overhead(m: Measurement) -> dict[str, Any]:
    """A stacked mixed-class forward beside the plain one, at 12 and at 100 classes of rank 16.

    Of 100 classes, as many are in a batch as in a race's first round, with four trials each.
    """
    batch, latents = m.learner.scoring.batch_size, m.learner.encode([m.test.image(0)])[0]
    layout = replace(m.bank.layout, rank=16)
    wide = replace(m.bank, layout=layout, rows=m.bank.layout.repack(m.bank.rows, layout))
    found: dict[str, Any] = {"batch_size": batch, "rank": 16}
    for count in (12, 100):
        scorer = Scorer(m.backbone, speed.perturbed_bank(wide, count, strength=0.3), batch_size=batch)
        trials = 4 if count > batch // 4 else batch // count
        classes = range(min(count, batch // trials))
        runs = {
            "plain": speed.plain_evaluations(m.backbone, latents, len(classes) * trials),
            "stacked": speed.stacked_evaluations(scorer, latents, classes, trials),
        }
        found[f"classes_{count}"] = speed.ratio(speed.interleaved(runs, 7), "stacked", "plain")
    return found


def pipeline(m: Measurement) -> dict[str, Any]:
    """Images a second from files to labels, interleaved; the labels that both give."""
    paths = [m.test_file(row) for row in range(min(m.config.pipeline_images, len(m.test)))]
    procedure = PublishedProcedure(
        m.backbone, m.bank.layout, m.learner.geometry, batch_size=m.learner.scoring.batch_size
    )
    ours, theirs, labels, evaluations = 0.0, 0.0, [], []
    share = -(-len(paths) // m.config.published_images)
    for turn in range(m.config.published_images):
        part = paths[turn * share : (turn + 1) * share]
        start = perf_counter()
        decisions = m.classifier.decide(part)
        ours += perf_counter() - start
        evaluations += [d.evaluations for d in decisions]
        start = perf_counter()
        published = procedure.classify(part[0], m.bank, seed=m.config.seed)
        theirs += perf_counter() - start
        labels.append((decisions[0].label, published.label, int(m.labels[turn * share])))
    per_second = len(paths) / ours, m.config.published_images / theirs
    return {
        "images": len(paths),
        "published_images": m.config.published_images,
        "images_per_second": per_second[0],
        "images_per_second_published": per_second[1],
        "ratio": per_second[0] / per_second[1],
        "evaluations": float(np.mean(evaluations)),
        "labels_race_published_true": labels,
    }


def training(m: Measurement) -> dict[str, Any]:
    """Seconds a class, jointly and as published, over the same number of samples, and validation loss of both."""
    config, learner = m.config, m.learner
    names = list(m.bank.labels)
    groups = m.groups
    settings = replace(
        recommended_training(config.num_shots, small=m.backbone.small),
        steps=config.training_steps,
        shots_per_step=1,
        prior_weight=1.0,
        prior_images=8,
        lr_schedule="constant",
    )
    prior = prior_latents(m.backbone, learner.generic_prompt, settings.prior_images, learner.geometry.size)
    pictures = m.backbone.decode_latents(prior)
    procedure = PublishedProcedure(m.backbone, m.bank.layout, learner.geometry)
    few = names[: config.training_classes]
    joint_learner = replace(learner, training=settings)
    start = perf_counter()
    joint, _ = joint_learner.train(groups)
    joint_seconds = (perf_counter() - start) / len(names)
    start = perf_counter()
    rows = [
        procedure.train(groups[x], learner.class_prompt(x), (learner.generic_prompt, pictures), settings) for x in few
    ]
    published_seconds = (perf_counter() - start) / len(few)
    separate = replace(joint.select(few), rows=torch.stack(rows))
    held_back = m.pool.subset([i for i, key in enumerate(m.pool.ids) if key not in set(m.shots.ids)])
    val = held_back if len(held_back) else m.test
    losses = {
        name: [float(x) for x in _losses(m, bank, val, few)]
        for name, bank in (("joint", joint.select(few)), ("published", separate))
    }
    without = replace(joint.select(few), rows=torch.zeros_like(separate.rows))
    losses["without class tokens"] = [float(x) for x in _losses(m, without, val, few)]
    return {
        "steps": settings.steps,
        "samples_per_class": 2 * settings.steps,
        "classes_jointly": len(names),
        "seconds_per_class": joint_seconds,
        "seconds_per_class_published": published_seconds,
        "ratio": joint_seconds / published_seconds,
        "validation_loss": losses,
    }


def _losses(m: Measurement, bank: Bank, val: ImageSet, names: list[Any]) -> list[float]:
    """Mean error of each class token on images of its class that were no shots, at fixed trials."""
    scorer, grid, found = m.learner.scorer(bank), even_grid(16, 0, m.backbone.num_train_timesteps).tolist(), []
    for c, name in enumerate(names):
        rows = [i for i, label in enumerate(val.labels) if val.class_names[label] == name][:6]
        if not rows:
            raise ValueError(f"No image of class {name!r} is left to measure the validation loss on.")
        latents = m.learner.encode([val.image(i) for i in rows])
        errors = [scorer.errors(x, val.ids[i], [c], range(16), grid).mean() for x, i in zip(latents, rows, strict=True)]
        found.append(float(torch.stack(errors).mean()))
    return found


def growth(m: Measurement) -> dict[str, Any]:
    """Evaluations an image, and memory beyond the stacked weights, as the number of classes grows, by strength of the
    perturbation."""
    return {str(strength): _growth(m, strength) for strength in m.config.growth_strengths}


def _growth(m: Measurement, strength: float) -> dict[str, Any]:
    times, found = m.classifier.calibration_.timesteps, {}
    latents = m.learner.encode([m.test.image(i) for i in range(m.config.growth_images)])
    for count in m.config.growth:
        bank = speed.perturbed_bank(m.bank, count, strength=strength)
        scorer = m.learner.scorer(bank)
        stages, ids = m.classifier.scoring.schedule(count), m.test.ids[: len(latents)]
        decisions, memory = speed.memory_beyond(partial(decide, scorer, latents, ids, times, m.weights, stages))
        found[str(count)] = {
            "evaluations": float(np.mean([d.evaluations for d in decisions])),
            "evaluations_exhaustive": count_evaluations(exhaustive(len(times)), count),
            "stacked_weights_mb": scorer.rows_CP.numel() * scorer.rows_CP.element_size() / 2**20,
            "memory_beyond_mb": memory / 2**20,
        }
        print(f"perturbed by {strength}, {count} classes: {found[str(count)]}", flush=True)
    return found


def breakdown(m: Measurement) -> dict[str, Any]:
    """Milliseconds an image of a race's parts.

    LoRA is what a stacked forward costs beyond the plain one, the rest what the whole costs beyond its parts.
    """
    path = m.test_file(0)
    pixels = m.learner.geometry.pixels(path)[None]
    latents = m.backbone.encode_images(pixels)[0]
    prompts = [token.prompt for token in m.bank.tokens]
    batch = m.learner.scoring.batch_size
    classes, trials = range(len(m.bank)), max(1, batch // len(m.bank))
    evaluations = len(classes) * trials
    with torch.no_grad():
        seconds = speed.interleaved(
            {
                "decode": lambda: (image_id(path), m.learner.geometry.pixels(path)),
                "vae": lambda: m.backbone.encode_images(pixels),
                "text": lambda: m.backbone.encode_text(m.backbone.tokenize(prompts)),
                "plain": speed.plain_evaluations(m.backbone, latents[0], evaluations),
                "stacked": speed.stacked_evaluations(m.scorer, latents[0], classes, trials),
            },
            12,
        )
    one = {name: float(np.median(values)) for name, values in seconds.items()}
    some = [m.test_file(i) for i in range(min(PARTS_IMAGES, len(m.test)))]
    fresh = DiTiClassifier.from_pretrained(m.config.output_dir / "bank", m.backbone)  # nothing is decided yet
    start = perf_counter()
    decisions = fresh.decide(some)
    whole = (perf_counter() - start) / len(some)
    per_image = float(np.mean([d.evaluations for d in decisions])) / evaluations
    parts = {
        "decode": one["decode"],
        "vae": one["vae"],
        "text": one["text"] / len(some),
        "u-net": one["plain"] * per_image,
        "lora": (one["stacked"] - one["plain"]) * per_image,
    }
    parts["the rest"] = whole - sum(parts.values())
    return {
        "images": len(some),
        "milliseconds": {k: 1000 * v for k, v in parts.items()},
        "share": {k: v / whole for k, v in parts.items()},
    }


def full_size(m: Measurement) -> dict[str, Any]:
    """One round of a race on Stable Diffusion 2.0's U-Net at 256 px, and what an H100 would make of its schedules.

    At 100 classes and 512 px; a race is taken to cost the same evaluations a class as the pocket's did.
    """
    gflop, published = gflop_of_an_evaluation(), count_evaluations(published_stages(100), 100)
    raced = _decided(m, m.classifier.scoring.schedule(len(m.bank)))
    race = 100 * raced["evaluations"] / len(m.bank)
    return {
        **full_size_round(),
        "gflop_per_evaluation_512_px": gflop,
        "h100_flops_taken": speed.H100_FLOPS,
        "h100_images_per_second_published": speed.H100_FLOPS / (gflop * 1e9 * published),
        "h100_images_per_second_race": speed.H100_FLOPS / (gflop * 1e9 * race),
    }


def _decided(m: Measurement, stages: Sequence[Stage | Look], rows_N: Tensor | None = None) -> dict[str, Any]:
    """`speed.against_exhaustive` on the kept errors of all test images, or of some."""
    rows_N = torch.ones(len(m.test), dtype=torch.bool) if rows_N is None else rows_N
    offsets_NC = None if m.offsets is None else m.offsets[rows_N]
    return speed.against_exhaustive(m.errors[rows_N], m.labels[rows_N.numpy()], m.weights, stages, offsets_NC)


SECTIONS: dict[str, Callable[[Measurement], dict[str, Any]]] = {
    "machine": machine,
    "overhead": overhead,
    "elimination": elimination,
    "pipeline": pipeline,
    "training": training,
    "breakdown": breakdown,
    "growth": growth,
    "full_size": full_size,
}
