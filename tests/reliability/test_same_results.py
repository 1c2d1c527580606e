"""Scoring in shards, in another order, in other batches and after a kill; training and scoring twice: one result."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import end, run_together, start, start_together
from small_classifier import SCORING, TRAINING, make
from small_commands import CLASSES, read_lines, save_image, train_command

from fewshot_diti import Backbone, DiTiClassifier, PredictionConfig, cli
from fewshot_diti.commands import score
from fewshot_diti.data import image_id

pytestmark = pytest.mark.usefixtures("quick_train")
Count = Callable[[str, object], None]
NOISE = 1e-5  # what the order of additions may change in a score


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, thorough: bool) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for seed in range(120 if thorough else 12):
        save_image(folder / f"{seed:03}.png", 7000 + seed)
    return folder


class Compared:
    """Rows of score against those of one undisturbed run."""

    def __init__(self, right: list[dict]) -> None:
        self.right = {row["path"]: row for row in right}
        self.rows = self.ties = 0
        self.worst = 0.0

    def __call__(self, output: Path) -> None:
        rows = read_lines(output)
        assert sorted(row["path"] for row in rows) == sorted(self.right)
        for row in rows:
            other = self.right[row["path"]]
            off = max(abs(row["scores"][name] - other["scores"][name]) for name in CLASSES)
            self.worst, self.rows = max(self.worst, off), self.rows + 1
            assert off <= NOISE and row["image_id"] == other["image_id"]
            if other["margin"] <= 2 * NOISE:
                self.ties += 1
            else:
                assert row["label"] == other["label"]


def test_shards_orders_batches_and_kills_change_no_row(
    bank: Path, images: Path, tmp_path: Path, thorough: bool, record_property: Count
) -> None:
    def command(output: Path, *more: str) -> list[str]:
        return ["score", "--bank", str(bank), "--output", str(output), "--quiet", "--dtype", "float32", *more]

    paths = [str(path) for path in sorted(images.iterdir())]
    whole, chance = tmp_path / "whole.jsonl", random.Random(0)
    began = time.monotonic()
    assert cli.main(command(whole, *paths)) == 0
    seconds = time.monotonic() - began
    compared, kills, runs = Compared(read_lines(whole)), 0, 0
    for batch_size in (1, 3, 8):
        shuffled = chance.sample(paths, len(paths))
        output = tmp_path / f"batch-{batch_size}.jsonl"
        assert cli.main(command(output, *shuffled, "--batch_size", str(batch_size))) == 0
        compared(output)
        runs += 1

    for processes in (2, 5) if thorough else (2,):
        output = tmp_path / f"shards-{processes}.jsonl"

        def job(output: Path = output) -> int:
            return cli.main(command(output, *paths))

        run_together(job, processes)
        compared(output)
        parts = [read_lines(part) for part in sorted(output.with_name(output.name + ".parts").glob("part-*"))]
        assert sum(map(len, parts)) == len(paths) and all(parts), "each image once, each process some"
        runs += 1

    for attempt in range(30 if thorough else 3):
        output = tmp_path / f"killed-{attempt}.jsonl"

        def alone(output: Path = output) -> int:
            return cli.main(command(output, *paths))

        child = start(alone)
        time.sleep(chance.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        kills += end(child) == -signal.SIGKILL
        assert not output.exists() or len(read_lines(output)) == len(paths)
        assert cli.main(command(output, *paths)) == 0
        compared(output)
        runs += 1

    for attempt in range(10 if thorough else 1):
        output = tmp_path / f"worker-{attempt}.jsonl"

        def shared(output: Path = output) -> int:
            return cli.main(command(output, *paths))

        children = start_together(shared, 2)
        time.sleep(chance.uniform(0.3, 1) * seconds)
        victim = chance.choice(children)
        os.kill(victim, signal.SIGKILL)
        kills += end(victim) == -signal.SIGKILL
        [other] = set(children) - {victim}
        time.sleep(0.2)
        os.kill(other, signal.SIGKILL)  # as the launcher ends those that wait for it
        end(other)
        assert cli.main(command(output, *paths)) == 0
        compared(output)
        runs += 1
    record_property("runs compared", runs)
    record_property("processes killed", kills)
    record_property("rows compared", compared.rows)
    record_property("ties below the noise", compared.ties)
    record_property("largest difference of a score", f"{compared.worst:.1e}")
    record_property("lost", 0)


def test_a_damaged_line_of_an_earlier_run_is_not_believed(
    bank: Path, images: Path, tmp_path: Path, thorough: bool, record_property: Count
) -> None:
    paths = [str(path) for path in sorted(images.iterdir())[:4]]
    output = tmp_path / "out.jsonl"
    command = ["score", "--bank", str(bank), "--output", str(output), "--quiet", *paths]
    assert cli.main(command) == 0
    right, part = read_lines(output), tmp_path / "out.jsonl.parts" / "part-00000.jsonl"
    content, chance = part.read_bytes(), random.Random(1)
    damages = [bytes([0]) * len(content), b"[" * 100_000 + b"\n" + content, content * 2, content[: len(content) // 2]]
    damages += [b"null\n1\n[]\n{}\n\xff\xfe\n" + content, content.replace(b'"label": "', b'"label": "x')]
    for _ in range(200 if thorough else 4):
        flipped = bytearray(content)
        flipped[chance.randrange(len(flipped))] ^= 1 << chance.randrange(8)
        damages.append(bytes(flipped))
    for damaged in damages:
        part.write_bytes(damaged)
        assert cli.main(command) == 0
        assert read_lines(output) == right
    record_property("damages", len(damages))
    record_property("false rows", 0)


def test_two_trainings_with_one_seed_are_equal_to_the_bit(
    shots: Path, backbone_folder: Path, tmp_path: Path, thorough: bool, record_property: Count
) -> None:
    count = 5 if thorough else 2
    folders = [tmp_path / str(number) / "bank" for number in range(count)]
    for folder in folders:

        def job(folder: Path = folder) -> int:
            return cli.main([*train_command(shots, backbone_folder, folder, "--folds", "2"), "--quiet"])

        assert end(start(job)) == 0
    files = [{str(x.relative_to(f)): x.read_bytes() for x in f.rglob("*") if x.is_file()} for f in folders]
    assert all(found == files[0] for found in files[1:])
    record_property("trainings", count)
    record_property("files compared", (count - 1) * len(files[0]))
    record_property("files that differ", 0)


def test_threads_and_batches_change_no_score_beyond_rounding(
    backbone: Backbone, thorough: bool, record_property: Count
) -> None:
    rng = np.random.default_rng(5)
    pictures = [rng.integers(0, 256, (16, 32, 3), np.uint8) for _ in range(23 if thorough else 5)]
    worst, compared = 0.0, 0
    for schedule, witnesses in (("exhaustive", ()), ("racing", ("features",))):
        scoring = replace(SCORING, witnesses=witnesses, witness_weights=(1e-3,) * len(witnesses))
        classifier = make(backbone, concept="part", training=TRAINING, scoring=scoring).fit(pictures[:3], list(CLASSES))
        found = []
        for threads, batch_size in ((1, 24), (2, 3), (1, 7), (1, 1), (2, 24))[: 5 if thorough else 2]:
            torch.set_num_threads(threads)
            try:
                again = copy(classifier)
                again._made, again.prediction = None, PredictionConfig(schedule=schedule, batch_size=batch_size)
                found.append(again.scores(pictures[3:]))
            finally:
                torch.set_num_threads(1)
        again = copy(classifier)
        again._made, again.prediction = None, PredictionConfig(schedule=schedule, batch_size=24)
        assert again.scores(pictures[3:]).equal(found[0]), "the same run is equal to the bit"
        for other in found[1:]:
            worst, compared = max(worst, float((other - found[0]).abs().max())), compared + other.numel()
            assert other.argmin(1).equal(found[0].argmin(1))
    record_property("scores compared", compared)
    record_property("largest difference of a score", f"{worst:.1e}")
    assert worst <= NOISE


def test_two_classifiers_of_two_processes_are_one(backbone: Backbone, tmp_path: Path, record_property: Count) -> None:
    rng = np.random.default_rng(6)
    pictures = [rng.integers(0, 256, (16, 32, 3), np.uint8) for _ in range(5)]

    def job(output: Path) -> None:
        classifier: DiTiClassifier = make(backbone, concept="part").fit(pictures[:3], list(CLASSES))
        np.save(output, classifier.scores(pictures).numpy())

    for name in ("one.npy", "two.npy"):
        assert end(start(lambda name=name: job(tmp_path / name))) == 0
    one, two = np.load(tmp_path / "one.npy"), np.load(tmp_path / "two.npy")
    record_property("scores compared", one.size)
    assert np.array_equal(one, two)


def test_a_file_that_changes_after_it_was_listed_gives_no_false_row(
    bank: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Count
) -> None:
    for seed in range(6):
        save_image(tmp_path / "images" / f"{seed}.png", 40 + seed)
    changed = tmp_path / "images" / "3.png"
    new = save_image(tmp_path / "new.png", 999)
    load = score.load_classifier
    classifier = DiTiClassifier.from_pretrained(bank)
    right = classifier.scores([new])[0].tolist()

    def replaced() -> None:
        changed.write_bytes(new.read_bytes())

    def cut_short() -> None:
        changed.write_bytes(new.read_bytes()[:300])

    for change in (replaced, cut_short, changed.unlink):

        def after_listing(*given: object, change: Callable[[], None] = change) -> DiTiClassifier:
            change()
            return load(*given)  # type: ignore[arg-type]

        monkeypatch.setattr(score, "load_classifier", after_listing)
        output = tmp_path / f"{getattr(change, '__name__', 'gone')}.jsonl"
        status = cli.main(["score", "--bank", str(bank), "--output", str(output), "--quiet", str(tmp_path / "images")])
        rows = {row["path"]: row for row in read_lines(output)}
        assert status == (0 if change is replaced else 1)
        assert sum("label" in row for row in rows.values()) == (6 if change is replaced else 5)
        if change is replaced:
            row = rows[str(changed)]
            assert row["image_id"] == image_id(new)
            assert max(abs(a - b) for a, b in zip(row["scores"].values(), right, strict=True)) <= NOISE
        elif change is cut_short:
            assert "3.png" in rows[str(changed)]["error"]
        else:
            assert str(changed) not in rows
    record_property("changes", 3)
    record_property("false rows", 0)
