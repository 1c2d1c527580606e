"""Linear heads on features, on data whose answers are known."""

from __future__ import annotations

import numpy as np
import pytest

from fewshot_diti.representation import probes

PARTS = {"train": 200, "val": 100, "test": 150}


def planted(seed: int = 0, width: int = 6) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Features whose first dimension says whether an image has the attribute, and the truth."""
    rng = np.random.default_rng(seed)
    truth = {part: rng.integers(0, 2, n).astype(float) for part, n in PARTS.items()}
    features = {part: rng.normal(size=(n, width)) for part, n in PARTS.items()}
    for part in PARTS:
        features[part][:, 0] = 10 * truth[part] + rng.normal(size=PARTS[part])
    return features, truth


def test_a_planted_attribute_is_found_and_unknown_truth_is_left_out() -> None:
    features, truth = planted()
    for part in PARTS:  # what is not known would mislead
        features[part][:20, 0] *= -1
        truth[part][:20] = np.nan
    scores = probes.scores(probes.standardised(features, "train"), truth, "train")
    assert len(scores) == 150 and probes.average_precision(scores, truth["test"]) == pytest.approx(1)


def test_shuffled_labels_give_the_base_rate() -> None:
    features, truth = planted()
    rng = np.random.default_rng(1)
    shuffled = {part: rng.permutation(values) for part, values in truth.items()}
    found = probes.average_precision(probes.scores(features, shuffled, "train"), shuffled["test"])
    assert found == pytest.approx(shuffled["test"].mean(), abs=0.12)


def test_there_is_no_precision_where_all_have_the_attribute() -> None:
    assert probes.average_precision(np.arange(3.0), np.array([1, np.nan, 1])) is None


def test_few_shots_of_each_side_are_drawn_and_a_confounder_misleads() -> None:
    features, truth = planted(width=2)
    features = {part: np.stack([np.random.default_rng(2).normal(size=n), truth[part]], 1) for part, n in PARTS.items()}
    sky = np.random.default_rng(3).integers(0, 2, 200).astype(float)
    features["train"][:, 0] = 5 * sky
    for part in ("val", "test"):
        features[part][:, 0] = 5 * np.random.default_rng(4).integers(0, 2, PARTS[part])
    fair = probes.few_shot_accuracies(features, truth, "test", 5, 8)
    biased = probes.few_shot_accuracies(features, truth, "test", 5, 8, confounder_N=sky)
    assert len(fair) == 8 and np.mean(fair) > np.mean(biased) + 0.1
    assert probes.few_shot_accuracies(features, truth, "test", 5, 8) == fair
    with pytest.raises(ValueError, match="No training image has the attribute 1"):
        probes.few_shot_accuracies(features, truth, "test", 5, 1, confounder_N=np.zeros(200))


def test_a_linear_number_is_regressed_and_noise_is_not() -> None:
    features, _ = planted()
    numbers = {part: 3 + 2 * values[:, 1] for part, values in features.items()}
    numbers["test"][0] = np.nan
    r, error = probes.regression(features, numbers)
    assert r > 0.999 and error < 0.001
    noise = {part: np.random.default_rng(9).normal(size=n) for part, n in PARTS.items()}
    assert abs(probes.regression(features, noise)[0]) < 0.3
