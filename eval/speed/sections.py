"""The sections of the speed benchmark: each measures one thing and returns it ready for JSON."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.speed import timing
from eval.speed.full_size import full_size_round, gflop_of_an_evaluation
from eval.speed.measurement import Measurement
from eval.speed.published import PublishedProcedure
from eval.speed.training import training
from fewshot_diti.backbone import Backbone
from fewshot_diti.bank import Bank
from fewshot_diti.classifier import DiTiClassifier
from fewshot_diti.data.images import image_id
from fewshot_diti.elimination import (
    Decision,
    Stage,
    count_evaluations,
    exhaustive,
    proportional_stages,
    published_stages,
)
from fewshot_diti.racing import Look
from fewshot_diti.scoring import Scorer, decide
from fewshot_diti.trials import even_grid

PARTS_IMAGES = 16  # whose time the parts' sum is compared with


def machine(m: Measurement) -> dict[str, Any]:
    """Processor or GPU, its measured peak, and the share of it that an evaluation reaches."""
    backbone = m.backbone
    size = tuple(n // backbone.vae_scale_factor for n in backbone.image_size)
    channels = int(backbone.unet.config.block_out_channels[0])
    peak = timing.machine_peak(backbone.device, backbone.dtype, channels, (size[0], size[1]))
    flops = timing.flops_of_an_evaluation(backbone, (size[0], size[1]))
    batch = m.settings.prediction.batch_size
    latents = m.latents([0])[0]
    sizes = [batch // 4, batch // 2, batch, 2 * batch]
    runs = {str(n): timing.plain_evaluations(backbone, latents, n) for n in sizes}
    seconds = {n: min(values) / int(n) for n, values in timing.interleaved(runs, 3).items()}
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
        "evaluations_per_second": 1 / seconds[str(batch)],
        "evaluations_per_second_by_batch_size": {n: 1 / s for n, s in seconds.items()},
        "share_of_matmul_peak": flops / seconds[str(batch)] / peak["matmul"],
    }


def elimination(m: Measurement) -> dict[str, Any]:
    """Decisions on the kept errors, also with either half of the classes alone, and over the race's confidence."""
    every, half = range(len(m.bank)), len(m.bank) // 2
    parts = {"all": every, "first half of the classes": every[:half], "second half of the classes": every[half:]}
    found = {
        **{name: _decided(m, m.stages, part) for name, part in parts.items() if len(part) > 1},
        "evaluations_published": count_evaluations(published_stages(len(m.bank)), len(m.bank)),
        "evaluations_in_proportion": count_evaluations(proportional_stages(len(m.bank)), len(m.bank)),
    }
    curve = {}
    for confidence in (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99):
        prediction = replace(m.settings.prediction, schedule="racing", confidence=confidence)
        looks = prediction.looks(len(m.bank), len(m.weights))
        curve[str(confidence)] = _decided(m, looks, every)
    return found | {"by_confidence": curve}


def schedule(m: Measurement) -> dict[str, Any]:
    """Labels by the published schedule, its 500 trials and uniform weights, beside those of the race."""
    count = min(m.config.pipeline_images, len(m.test))
    latents = m.latents(range(count))
    times, stages = even_grid(500, 0, m.backbone.num_train_timesteps).tolist(), published_stages(len(m.bank))
    decisions = decide(m.scorer, latents, m.test.ids[:count], times, torch.ones(500), stages)
    published = np.array([d.position for d in decisions])
    truth, offsets_NC = m.labels[:count], None if m.offsets is None else m.offsets[:count]
    raced = timing.on_kept_errors(m.errors[:count], m.weights, m.stages, offsets_NC)
    race = np.array([d.position for d in raced])
    return {
        "images": count,
        "evaluations": float(np.mean([d.evaluations for d in decisions])),
        "accuracy": 100 * float((published == truth).mean()),
        "accuracy_race": 100 * float((race == truth).mean()),
        "points_lost": 100 * float((published == truth).mean() - (race == truth).mean()),
        "points_lost_interval": [100 * x for x in timing.paired_interval(published == truth, race == truth)],
    }


def overhead(m: Measurement) -> dict[str, Any]:
    """A stacked mixed-class forward against the plain one, at 12 and at 100 classes of rank 16, with as many trials of
    a class as a round of a race has."""
    batch, latents = m.settings.prediction.batch_size, m.latents([0])[0]
    layout = replace(m.bank.layout, rank=16)
    wide = replace(m.bank, layout=layout, rows=m.bank.layout.repack(m.bank.rows, layout))
    found: dict[str, Any] = {"batch_size": batch, "rank": 16}
    for count in (12, 100):
        scorer = Scorer(m.backbone, timing.perturbed_bank(wide, count, strength=0.3), batch_size=batch)
        trials = len(m.looks(count)[0].trial_positions)
        evaluations, stacked = timing.stacked_evaluations(scorer, latents, trials)
        runs = {"plain": timing.plain_evaluations(m.backbone, latents, evaluations), "stacked": stacked}
        found[f"classes_{count}"] = timing.ratio(timing.interleaved(runs, 21), "stacked", "plain")
    return found


def compiled(m: Measurement) -> dict[str, Any]:
    """A stacked forward, and a race of several images, in the U-Net that torch compiled beside the same without."""
    backbone = Backbone.from_pretrained(m.config.backbone, dtype=m.backbone.dtype, compile=m.config.compile)
    scorers = {"compiled": m.scorer_of(m.bank, backbone), "plain": m.scorer}
    rows = range(min(m.config.pipeline_images, len(m.test)))
    latents_Nchw, trials = m.latents(rows), len(m.stages[0].trial_positions)
    stacked = {name: timing.stacked_evaluations(x, latents_Nchw[0], trials) for name, x in scorers.items()}
    forwards = {name: forward for name, (_, forward) in stacked.items()}
    races = {name: partial(_race, m, x, latents_Nchw) for name, x in scorers.items()}
    _, first_seconds, _ = timing.timed(forwards["compiled"])
    labels = [[decision.position for decision in race()] for race in races.values()]
    return {
        "mode": m.config.compile,
        "batch_size": stacked["compiled"][0],
        "seconds_before_the_first_batch": first_seconds,
        "ratio": timing.ratio(timing.interleaved(forwards, 7), "compiled", "plain"),
        "images": len(rows),
        "race_ratio": timing.ratio(timing.interleaved(races, 3), "compiled", "plain"),
        "same_label": float(np.mean(np.equal(labels[0], labels[1]))),
    }


def pipeline(m: Measurement) -> dict[str, Any]:
    """Images per second from files to labels, interleaved; the labels that both give."""
    paths = [m.test_file(row) for row in range(min(m.config.pipeline_images, len(m.test)))]
    procedure = PublishedProcedure(
        m.backbone, m.bank.layout, m.encoder.geometry, batch_size=m.settings.prediction.batch_size
    )
    fresh = DiTiClassifier.from_pretrained(m.bank_folder, m.backbone)  # nothing is decided yet
    turns = np.array_split(np.arange(len(paths)), min(m.config.published_images, len(paths)))
    seconds, memory = {"race": 0.0, "published": 0.0}, {"race": 0.0, "published": 0.0}
    labels, evaluations = [], []
    for turn in turns:
        race, race_seconds, beyond = timing.timed(partial(fresh.decide, [paths[row] for row in turn]))
        seconds["race"] += race_seconds
        memory["race"] = max(memory["race"], beyond)
        classify = partial(procedure.classify, paths[turn[0]], m.bank, seed=m.config.seed)
        published, published_seconds, beyond = timing.timed(classify)
        seconds["published"] += published_seconds
        memory["published"] = max(memory["published"], beyond)
        evaluations += [d.evaluations for d in race]
        labels.append((race[0].position, published.position, int(m.labels[turn[0]])))
    per_second = len(paths) / seconds["race"], len(turns) / seconds["published"]
    return {
        "images": len(paths),
        "published_images": len(turns),
        "images_per_second": per_second[0],
        "images_per_second_published": per_second[1],
        "ratio": per_second[0] / per_second[1],
        "evaluations": float(np.mean(evaluations)),
        "memory_beyond_mb": memory,
        "labels_race_published_true": labels,
    }


def growth(m: Measurement) -> dict[str, Any]:
    """Evaluations per image, and memory beyond the stacked weights, as the number of classes grows, by strength of the
    perturbation; by class tokens alone, without the U-Net's features."""
    return {str(strength): _growth(m, strength) for strength in m.config.growth_strengths}


def _race(m: Measurement, scorer: Scorer, latents_Nchw: Tensor) -> list[Decision]:
    """The first test images among a bank's classes, by class tokens alone."""
    times, ids = m.classifier.calibration_.timesteps, m.test.ids[: len(latents_Nchw)]
    stages = m.looks(len(scorer.bank))
    return decide(scorer, latents_Nchw, ids, times, m.weights, stages)


def _stacked_race(m: Measurement, bank: Bank, latents_Nchw: Tensor) -> tuple[list[Decision], int]:
    """The same from the bank on, and the bytes of its stacked weights."""
    scorer = m.scorer_of(bank)
    return _race(m, scorer, latents_Nchw), scorer.rows_CP.nbytes


def _growth(m: Measurement, strength: float) -> dict[str, Any]:
    found = {}
    latents = m.latents(range(m.config.growth_images))
    for count in m.config.growth:
        bank = timing.perturbed_bank(m.bank, count, strength=strength)
        (decisions, stacked), memory = timing.memory_beyond(partial(_stacked_race, m, bank, latents))
        found[str(count)] = {
            "evaluations": float(np.mean([d.evaluations for d in decisions])),
            "evaluations_exhaustive": count_evaluations(exhaustive(len(m.weights)), count),
            "stacked_weights_mb": stacked / 2**20,
            "memory_beyond_mb": (memory - stacked) / 2**20,
        }
        print(f"perturbed by {strength}, {count} classes: {found[str(count)]}", flush=True)
    return found


def breakdown(m: Measurement) -> dict[str, Any]:
    """Milliseconds per image of a race's parts, and what the first image costs beyond the others.

    LoRA is what a stacked forward costs beyond the plain one, the rest what the whole costs beyond its parts.
    """
    path = m.test_file(0)
    image = m.encoder.prepare(path)
    pixels = image.values_CHW[None]
    latents = m.backbone.encode_images(pixels)[0]
    evaluations, stacked = timing.stacked_evaluations(m.scorer, latents[0], len(m.stages[0].trial_positions))
    with torch.no_grad():
        seconds = timing.interleaved(
            {
                "decode": lambda: (image_id(path), m.encoder.geometry.pixels(path)),
                "vae": lambda: m.backbone.encode_images(pixels),
                "features": lambda: m.offsets_of([image], latents),
                "plain": timing.plain_evaluations(m.backbone, latents[0], evaluations),
                "stacked": stacked,
            },
            12,
        )
    one = {name: float(np.median(values)) for name, values in seconds.items()}
    first, *some = [m.test_file(i) for i in range(min(1 + PARTS_IMAGES, len(m.test)))]
    fresh = DiTiClassifier.from_pretrained(m.bank_folder, m.backbone)  # nothing is decided yet
    _, first_seconds, _ = timing.timed(lambda: fresh.decide([first]))  # and texts encoded, the discriminant fitted
    decisions, whole_seconds, _ = timing.timed(lambda: fresh.decide(some))
    whole = whole_seconds / len(some)
    trials = float(np.mean([d.evaluations for d in decisions])) - m.reads_features
    parts = {
        "decode": one["decode"],
        "vae": one["vae"],
        "features": one["features"],
        "u-net": one["plain"] * trials / evaluations,
        "lora": (one["stacked"] - one["plain"]) * trials / evaluations,
    }
    parts["the rest"] = whole - sum(parts.values())
    return {
        "images": len(some),
        "first_image_beyond_milliseconds": 1000 * (first_seconds - whole),
        "milliseconds": {k: 1000 * v for k, v in parts.items()},
        "share": {k: v / whole for k, v in parts.items()},
    }


def full_size(m: Measurement) -> dict[str, Any]:
    """One round of a race on Stable Diffusion 2.0's U-Net at 256 px, and estimates of its schedules on an H100.

    At 100 classes and 512 px; a race is taken to cost the same evaluations per class as the pocket's did.
    """
    gflop, published = gflop_of_an_evaluation(), count_evaluations(published_stages(100), 100)
    raced = _decided(m, m.stages, range(len(m.bank)))
    race = 100 * raced["evaluations"] / len(m.bank)
    return {
        **full_size_round(),
        "gflop_per_evaluation_512_px": gflop,
        "h100_flops_taken": timing.H100_FLOPS,
        "h100_images_per_second_published": timing.H100_FLOPS / (gflop * 1e9 * published),
        "h100_images_per_second_race": timing.H100_FLOPS / (gflop * 1e9 * race),
    }


def _decided(m: Measurement, stages: Sequence[Stage | Look], classes: Sequence[int]) -> dict[str, Any]:
    """`timing.against_exhaustive` on the kept errors of some classes, in ascending order, and their images."""
    keep_C = torch.tensor(classes)
    rows_N = torch.isin(torch.tensor(m.labels), keep_C)
    labels = torch.searchsorted(keep_C, torch.tensor(m.labels)[rows_N]).numpy()
    offsets_NC = None if m.offsets is None else m.offsets[rows_N][:, keep_C]
    found = timing.against_exhaustive(m.errors[rows_N][:, keep_C], labels, m.weights, stages, offsets_NC)
    return found | {"evaluations": found["evaluations"] + m.reads_features}


SECTIONS: dict[str, Callable[[Measurement], dict[str, Any]]] = {
    "machine": machine,
    "overhead": overhead,
    "compiled": compiled,
    "elimination": elimination,
    "schedule": schedule,
    "pipeline": pipeline,
    "training": training,
    "breakdown": breakdown,
    "growth": growth,
    "full_size": full_size,
}
