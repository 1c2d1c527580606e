"""Sets of classes are those of the package crepes, and hold the true class as often as asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from small_classifier import SCORING, make, shots_of

from fewshot_diti import Backbone, DiTiClassifier
from fewshot_diti.conformal import prediction_sets

crepes = pytest.importorskip("crepes", reason="the development extra installs it")


def drawn(n: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities [n, C] that are right about themselves, and true classes."""
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(classes, 0.4), n)
    return p, np.array([rng.choice(classes, p=row) for row in p])


@pytest.mark.parametrize("n", [6, 36, 192])  # (n + 1) coverage is no whole number: there crepes takes one more
@pytest.mark.parametrize("coverage", [0.5, 0.8, 0.9, 0.95])
def test_sets_are_those_of_crepes(n: int, coverage: float) -> None:
    from crepes.extras import hinge

    p, truth = drawn(n, 6, n)
    test, _ = drawn(200, 6, 7)
    oracle = crepes.ConformalClassifier().fit(hinge(p, np.arange(6), truth))
    expected = oracle.predict_set(hinge(test), confidence=coverage, smoothing=False)
    found = prediction_sets(torch.from_numpy(test), p[np.arange(n), truth].tolist(), coverage)
    for row, places in enumerate(found):
        assert sorted(places) == np.flatnonzero(expected[row]).tolist()
        assert places == sorted(places, key=lambda c: -test[row, c])


def test_the_true_class_is_in_the_set_as_often_as_asked_for() -> None:
    held = []
    for seed in range(200):
        p, truth = drawn(72, 12, seed)
        test, true = drawn(100, 12, 1000 + seed)
        sets = prediction_sets(torch.from_numpy(test), p[np.arange(72), truth].tolist(), 0.9)
        held.append(np.mean([t in places for t, places in zip(true, sets, strict=True)]))
    assert np.mean(held) == pytest.approx(66 / 73, abs=0.01)  # ceil(73 x 0.9) of 73


def test_a_classifier_predicts_sets_by_its_held_out_shots(
    backbone: Backbone, pictures: dict[str, list[Path]], tests: list[Path], tmp_path: Path
) -> None:
    from dataclasses import replace

    images, labels = shots_of(pictures, ["a320", "dc-9"])
    plain = make(backbone).fit(images, labels)
    with pytest.raises(ValueError, match="need held-out shots; fit with"):
        plain.predict_set(tests)
    classifier = make(backbone, scoring=replace(SCORING, folds=2, temperature="fit")).fit(images, labels)
    held = classifier.calibration_.held_out
    assert len(held) == len(images) and all(0 < p < 1 for p in held)
    classifier.save_pretrained(tmp_path)
    again = DiTiClassifier.from_pretrained(tmp_path, backbone)
    sets = again.predict_set(tests, coverage=0.7)
    assert sets == classifier.predict_set(tests, coverage=0.7) and len(sets) == len(tests)
    assert again.predict_set(tests[0], coverage=0.7) == sets[0]
    least = sorted(held, reverse=True)[int(np.ceil((len(held) + 1) * 0.7)) - 1]
    for places, probabilities in zip(sets, classifier.predict_proba(tests), strict=True):
        assert len(places) == (probabilities >= least).sum()
    for wrong in (0, 1, 90):
        with pytest.raises(ValueError, match=f"coverage={wrong}; pass a share"):
            classifier.predict_set(tests, coverage=wrong)
