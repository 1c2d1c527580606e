"""Memory does not grow with the number of images, nor of predictions; where it runs out, batches are halved."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from small_classifier import SCORING, make
from small_commands import CLASSES, read_lines, save_image

from fewshot_diti import Backbone, DiTiClassifier, PredictionConfig, cli, decider
from fewshot_diti.elimination import Decision
from fewshot_diti.encoding import PreparedImage

Count = Callable[[str, object], None]


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (16, 32, 3), np.uint8)


@pytest.fixture(scope="module")
def pair(backbone: Backbone) -> DiTiClassifier:
    classifier = make(backbone, concept="part", scoring=replace(SCORING, trials=1))
    return classifier.fit([noise(0), noise(1)], ["bolt", "nut"])


@pytest.mark.usefixtures("quick_train")
@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_score_holds_no_images_and_no_results(
    suffix: str,
    bank: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    thorough: bool,
    record_property: Count,
) -> None:
    def quick(self: DiTiClassifier, images: Sequence[PreparedImage]) -> list[Decision]:
        """Without the U-Net, whose memory does not depend on how many images there are."""
        scores = torch.tensor([[float(int(image.id[:c], 16) % 97) for c in (3, 4, 5)] for image in images])
        return [Decision(int(s.argmin()), s.double(), 9, True) for s in scores]

    monkeypatch.setattr(DiTiClassifier, "decide", quick)
    small, large = (1000, 20_000 if suffix == "jsonl" else 4000) if thorough else (30, 130)

    def used(count: int, name: str) -> tuple[int, int]:
        """Peak of Python's memory, and resident memory afterwards, in bytes."""
        folder = tmp_path / name
        for seed in range(count):
            save_image(folder / f"{seed}.png", seed)
        output = tmp_path / f"{name}.{suffix}"
        gc.collect()
        tracemalloc.start()
        assert cli.main(["score", "--bank", str(bank), str(folder), "--output", str(output), "--quiet"]) == 0
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        if suffix == "jsonl":
            rows = read_lines(output)
            assert len(rows) == count and set(rows[-1]["scores"]) == set(CLASSES)
        return peak, psutil.Process().memory_info().rss

    used(10, "first")  # what is kept from then on
    peaks, resident = zip(used(small, "small"), used(large, "large"), strict=True)
    each = (peaks[1] - peaks[0]) / (large - small)
    record_property("images", f"{small} and {large}")
    record_property("bytes of peak memory for each image more", round(each))
    record_property("MB resident more afterwards", round((resident[1] - resident[0]) / 2**20, 1))
    assert each < 2000  # its path, its id and where its line stands


def test_a_server_that_predicts_does_not_grow(
    pair: DiTiClassifier, thorough: bool, record_property: Count, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm, count = (2000, 100_000) if thorough else (40, 100)  # decisions and readings of the last images are kept
    if not thorough:
        monkeypatch.setattr(decider, "_REMEMBERED", 16)

    def serve(seeds: Iterable[int]) -> None:
        for seed in seeds:
            assert pair.predict(noise(seed)) in ("bolt", "nut")

    process, steps = psutil.Process(), 10
    tracemalloc.start()
    serve(range(warm))
    gc.collect()
    before, resident = tracemalloc.get_traced_memory()[0], [process.memory_info().rss]
    for step in range(steps):
        start = 10**6 + step * count // steps
        serve(range(start, start + count // steps))
        if step == 0 and thorough:
            tracemalloc.stop()  # it costs time
        resident.append(process.memory_info().rss)
    gc.collect()
    slope = np.polyfit(np.linspace(0, count, len(resident)), resident, 1)[0]
    record_property("predictions", count)
    record_property("bytes resident for each prediction more", round(slope, 1))
    if thorough:
        assert slope < 100
    else:
        grown = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
        record_property("bytes of Python for each prediction more", round(grown / count, 1))
        assert grown / count < 500


@pytest.mark.parametrize("schedule", ["exhaustive", "racing"])
def test_out_of_memory_halves_the_batch_and_gives_the_same(
    schedule: str,
    backbone: Backbone,
    small_memory: Callable[[int], list[int]],
    thorough: bool,
    record_property: Count,
) -> None:
    classifier = make(backbone, concept="part").fit([noise(0), noise(1), noise(2)], list(CLASSES))
    classifier.prediction = PredictionConfig(schedule=schedule, batch_size=24)
    images = [noise(10 + n) for n in range(12 if thorough else 3)]
    right = classifier.scores(images)
    limits = range(1, 25) if thorough else (1, 5, 11)
    worst, failed = 0.0, 0
    for limit in limits:
        again = copy(classifier)
        again._made = None  # a decider of its own, which remembers nothing
        tried = small_memory(limit)
        found = again.scores(images)
        failed += sum(size > limit for size in tried)
        worst = max(worst, float((found - right).abs().max()))
        assert found.argmin(1).tolist() == right.argmin(1).tolist() and max(tried) > limit
    record_property("batches for which memory was too small", failed)
    record_property("largest difference of a score", f"{worst:.1e}")
    assert worst <= 1e-5
