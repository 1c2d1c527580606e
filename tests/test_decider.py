"""What a classifier remembers of decisions, and when it forgets."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_classifier import PREDICTION, SCORING, TRAINING, bank_of, make, shots_of
from torch import Tensor

from fewshot_diti import Backbone, DiTiClassifier, PredictionConfig, decider
from fewshot_diti.scoring import Scorer


@pytest.fixture(scope="module")
def pair(backbone: Backbone, pictures: dict[str, list[Path]]) -> DiTiClassifier:
    scoring = replace(SCORING, trials=1)
    training = replace(TRAINING, steps=1)
    return make(backbone, training=training, scoring=scoring).fit(*shots_of(pictures, ["a320", "dc-9"], 1))


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Ids of the images that go through the U-Net."""
    ids: list[str] = []
    whole = Scorer.pair_errors

    def recorded(self: Scorer, latents: Tensor, image_ids: Sequence[str], *rest: object) -> Tensor:
        ids.extend(image_ids)
        return whole(self, latents, image_ids, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Scorer, "pair_errors", recorded)
    yield ids


def noise(count: int, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, 16, 32, 3), np.uint8))


def test_an_image_that_was_just_decided_is_not_decided_again(pair: DiTiClassifier, scored: list[str]) -> None:
    images = noise(3, seed=1)
    scores = pair.scores(images)
    assert len(scored) == 3
    assert torch.equal(pair.scores([*images[::-1], images[0]]), scores[[2, 1, 0, 0]])
    assert pair.predict(images).tolist() == pair.classes_[scores.argmin(1).numpy()].tolist()
    assert len(scored) == 3
    pair.scores([noise(1, seed=2)[0], images[1]])
    assert len(scored) == 4


def test_decisions_that_are_remembered_are_bounded(
    pair: DiTiClassifier, scored: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decider, "_REMEMBERED", 16)
    images = noise(25)
    pair.predict(images)
    few = len(pickle.dumps(pair))
    scored.clear()
    pair.predict(images[-12:])
    assert not scored  # the last ones are known
    pair.predict(images[:6])
    assert len(scored) == 6  # the first are not
    pair.predict(noise(25, seed=3))
    assert len(pickle.dumps(pair)) == pytest.approx(few, rel=0.01)


def test_a_bank_that_is_set_by_hand_is_used_at_once(
    backbone: Backbone, pictures: dict[str, list[Path]], tests: list[Path]
) -> None:
    images = shots_of(pictures, ["a320", "dc-9", "tu-154"], 1)
    classifier = make(backbone).fit(*images)
    other = make(backbone, training=replace(TRAINING, seed=1)).fit(*images)
    before, expected = classifier.scores(tests), other.scores(tests)
    assert not torch.equal(before, expected)
    classifier.bank_ = other.bank_
    assert torch.equal(classifier.scores(tests), expected)
    assert torch.equal(classifier.errors(tests), other.errors(tests))
    classifier.bank_ = bank_of(other).select(["dc-9", "a320"])
    assert classifier.classes_.tolist() == ["dc-9", "a320"]
    assert classifier.predict_proba(tests).shape == (3, 2)


def test_a_calibration_that_is_set_by_hand_is_used_at_once(
    backbone: Backbone, pictures: dict[str, list[Path]], tests: list[Path]
) -> None:
    classifier = make(backbone).fit(*shots_of(pictures, ["a320", "dc-9"], 1))
    classifier.scores(tests)
    classifier.calibration_ = replace(classifier.calibration_, weights=(5.0, 0.0, 0.0, 0.0, 0.0))
    torch.testing.assert_close(classifier.scores(tests), classifier.errors(tests)[:, :, 0].double())


def test_banks_are_equal_where_all_that_decides_is(fitted: DiTiClassifier) -> None:
    bank = bank_of(fitted)
    assert bank == replace(bank, rows=bank.rows.clone())
    assert bank != replace(bank, rows=bank.rows + 1e-3)
    assert bank != bank.select(bank.labels[::-1])
    assert bank != replace(bank, backbone_hash="another")
    assert bank != "a bank"


def test_threads_decide_as_one_after_the_other(
    backbone: Backbone, pictures: dict[str, list[Path]], tests: list[Any]
) -> None:
    images = shots_of(pictures, ["a320", "dc-9", "tu-154"], 2)
    prediction = PredictionConfig(schedule="racing")
    scoring = replace(SCORING, witnesses=("features",), witness_weights=(1.0,))
    tests = [*tests, *noise(5)]
    expected = make(backbone, scoring=scoring, prediction=prediction).fit(*images).scores(tests)
    shared = make(backbone, scoring=scoring, prediction=prediction).fit(*images)
    with ThreadPoolExecutor(4) as threads:
        parts = list(threads.map(lambda image: shared.scores([image]), tests))
    torch.testing.assert_close(torch.cat(parts), expected, rtol=0, atol=1e-5)


def test_the_decisions_of_one_prediction_are_not_those_of_another(
    backbone: Backbone, pictures: dict[str, list[Path]], tests: list[Path]
) -> None:
    classifier = make(backbone).fit(*shots_of(pictures, ["a320", "dc-9"], 1))
    assert {d.evaluations for d in classifier.decide(tests)} == {10}
    classifier.prediction = PredictionConfig(schedule="published", stages=((1, 1), (5, 1)))
    assert {d.evaluations for d in classifier.decide(tests)} == {6}
    classifier.prediction = PREDICTION
    assert {d.evaluations for d in classifier.decide(tests)} == {10}
