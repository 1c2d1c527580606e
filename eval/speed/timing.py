"""What scoring and training cost, piece by piece: measured functions, interleaved, on one machine in one run.

Shapes in names: N images, C classes, S trials of an image.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fewshot_diti.backbone import Backbone
from fewshot_diti.bank import Bank
from fewshot_diti.elimination import Decision, Stage, eliminate
from fewshot_diti.memory import return_freed_pages
from fewshot_diti.racing import Look
from fewshot_diti.reports import wilson_interval
from fewshot_diti.scoring import Scorer
from fewshot_diti.timesteps import weighted_mean
from fewshot_diti.trials import even_grid

T = TypeVar("T")

CLEAR = 2.0  # standard errors of the exhaustive margin beyond which a label counts as clear
H100_FLOPS = 989e12 * 0.4  # dense bf16, at 40 % of the data sheet's peak


def interleaved(
    functions: Mapping[str, Callable[[], object]], rounds: int, *, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each function, one call per round in turn, so that a busy machine slows all alike; drops one round."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            start = clock()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(clock() - start)
    return {name: values[1:] for name, values in seconds.items()}


def ratio(seconds: Mapping[str, Sequence[float]], of: str, to: str) -> float:
    """Median over rounds of the ratio of two functions' seconds in one round."""
    return float(np.median(np.divide(seconds[of], seconds[to])))


def machine_peak(device: torch.device, dtype: torch.dtype, channels: int, size: tuple[int, int]) -> dict[str, float]:
    """FLOP/s of a large matrix product and of a 3 x 3 convolution of the U-Net's kind: the best of five."""
    a, b = (torch.randn(2048, 2048, device=device, dtype=dtype) for _ in range(2))
    x = torch.randn(64, channels, *size, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    kernel = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    work = {"matmul": 2 * 2048**3, "convolution": 2 * 64 * channels**2 * 9 * size[0] * size[1]}
    seconds = interleaved({"matmul": lambda: a @ b, "convolution": lambda: F.conv2d(x, kernel, padding=1)}, 5)
    return {name: flops / min(seconds[name]) for name, flops in work.items()}


def flops_of_an_evaluation(backbone: Backbone, latent_size: tuple[int, int]) -> float:
    """FLOP of one sample through the U-Net; a multiplication and an addition are two."""
    latents = torch.zeros(1, backbone.latent_channels, *latent_size, device=backbone.device)
    text = backbone.encode_text(backbone.tokenize([""]))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        backbone.errors(latents, latents, torch.tensor([0], device=backbone.device), text)
    return float(counter.get_total_flops())


def plain_evaluations(backbone: Backbone, latents: Tensor, count: int) -> Callable[[], object]:
    """`count` samples of one image through the frozen U-Net, without LoRA."""
    text = backbone.encode_text(backbone.tokenize([""])).expand(count, -1, -1)
    x = latents.to(backbone.device).expand(count, *latents.shape).contiguous()
    t = even_grid(count, 0, backbone.num_train_timesteps).to(backbone.device)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(backbone.device)

    def run() -> None:
        with torch.no_grad():
            backbone.errors(x, noise, t, text)

    return run


def stacked_evaluations(scorer: Scorer, latents: Tensor, trials: int) -> tuple[int, Callable[[], object]]:
    """How many evaluations fill a batch with `trials` of each class, and these as the scorer makes them.

    As many classes as fit, of as many images as it takes; all images have the same latents [c, h, w].
    """
    grid = even_grid(trials, 0, scorer.backbone.num_train_timesteps).tolist()
    count = max(1, scorer.batch_size // trials)
    classes = min(len(scorer.bank), count)
    images = -(-count // classes)
    pairs = torch.cartesian_prod(torch.arange(images), torch.arange(classes))[:count]
    ids = [f"image {n}" for n in range(images)]
    latents_Nchw = latents.expand(images, *latents.shape)
    return len(pairs) * trials, lambda: scorer.pair_errors(latents_Nchw, ids, pairs, range(trials), grid)


def timed(run: Callable[[], T]) -> tuple[T, float, float]:
    """What it gives, its seconds, and the megabytes by which memory rose."""
    start = time.perf_counter()
    found, memory = memory_beyond(run)
    return found, time.perf_counter() - start, memory / 2**20


def memory_beyond(run: Callable[[], T]) -> tuple[T, float]:
    """The result of `run`, and by how many bytes memory peaked above its level before; NaN where that is unknown."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return run(), float(torch.cuda.max_memory_allocated() - before)
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not clear.exists():
        return run(), float("nan")

    def kilobytes(field: str) -> int:
        return int(next(line.split()[1] for line in status.read_text().splitlines() if line.startswith(f"{field}:")))

    return_freed_pages()
    clear.write_text("5")  # sets the peak, VmHWM, to what is in use (man 5 proc)
    before = kilobytes("VmRSS")
    return run(), float(1024 * (kilobytes("VmHWM") - before))


def perturbed_bank(bank: Bank, num_classes: int, *, strength: float, seed: int = 0) -> Bank:
    """A bank of any size: the class tokens themselves, then copies whose weights are moved by `strength` of their own
    standard deviation, piece by piece."""
    g = torch.Generator().manual_seed(seed)
    tokens, rows = [], []
    for n in range(num_classes):
        c = n % len(bank)
        pieces = bank.rows[c].split(bank.layout.sizes)
        moved = [p if n < len(bank) else p + strength * p.std() * torch.randn(p.shape, generator=g) for p in pieces]
        tokens.append(replace(bank.tokens[c], label=f"{bank.tokens[c].label} {n}"))
        rows.append(torch.cat(moved))
    return replace(bank, tokens=tuple(tokens), rows=torch.stack(rows))


def on_kept_errors(
    errors_NCS: Tensor, weights_S: Tensor, stages: Sequence[Stage | Look], offsets_NC: Tensor | None = None
) -> list[Decision]:
    """What a schedule decides on errors that were computed before."""
    N, C, _ = errors_NCS.shape
    return eliminate(lambda pairs, s: errors_NCS[pairs[:, 0], pairs[:, 1]][:, s], N, C, stages, weights_S, offsets_NC)


def paired_interval(one_N: np.ndarray, other_N: np.ndarray) -> tuple[float, float]:
    """95 % interval of the difference in accuracy of two ways on the same images, from Wilson's of the images that only
    one of them gets right (Zou and Donner, 2008): it keeps its width where there are none."""
    shares = []
    for only in (one_N & ~other_N, other_N & ~one_N):
        share = only.mean()
        low, high = wilson_interval(int(only.sum()), len(only))
        shares.append((share, share - low, high - share))
    (lost, lost_below, lost_above), (won, won_below, won_above) = shares
    difference = lost - won
    return float(difference - np.hypot(lost_below, won_above)), float(difference + np.hypot(lost_above, won_below))


def against_exhaustive(
    errors_NCS: Tensor,
    labels_N: np.ndarray,
    weights_S: Tensor,
    stages: Sequence[Stage | Look],
    offsets_NC: Tensor | None = None,
) -> dict[str, Any]:
    """What a schedule decides on kept errors, compared with every class on every trial; both with the same offsets.

    Accuracy and differences in points. The interval of the difference is put together from those of the images lost
    and won (`paired_interval`); a label is clear where the exhaustive margin over the second class exceeds two standard
    errors of their paired difference.
    """
    N, C, S = errors_NCS.shape
    offsets_NC = torch.zeros(N, C) if offsets_NC is None else offsets_NC
    found = on_kept_errors(errors_NCS, weights_S, stages, offsets_NC)
    chosen = np.array([f.position for f in found])
    scores_NC = weighted_mean(errors_NCS, weights_S) + offsets_NC
    best_N2 = scores_NC.topk(2, largest=False).indices
    weighted = errors_NCS.double() * weights_S + offsets_NC[:, :, None]
    rows = torch.arange(N)
    apart_NS = weighted[rows, best_N2[:, 1]] - weighted[rows, best_N2[:, 0]]
    clear = (apart_NS.mean(1) > CLEAR * apart_NS.std(1) / S**0.5).numpy()
    exhaustive = best_N2[:, 0].numpy()
    right, right_exhaustive = chosen == labels_N, exhaustive == labels_N
    agree = chosen == exhaustive
    low, high = wilson_interval(int(agree[clear].sum()), int(clear.sum())) if clear.any() else (None, None)
    evaluations = np.array([f.evaluations for f in found])
    return {
        "images": N,
        "evaluations": float(evaluations.mean()),
        "evaluations_exhaustive": C * S,
        "decided_early": float(np.mean([f.decided for f in found])),
        "accuracy": 100 * float(right.mean()),
        "accuracy_exhaustive": 100 * float(right_exhaustive.mean()),
        "points_lost": 100 * float(right_exhaustive.mean() - right.mean()),
        "points_lost_interval": [100 * x for x in paired_interval(right_exhaustive, right)],
        "agreement": float(agree.mean()),
        "clear_images": int(clear.sum()),
        "agreement_on_clear": float(agree[clear].mean()) if clear.any() else None,
        "agreement_on_clear_interval": [low, high],
    }
