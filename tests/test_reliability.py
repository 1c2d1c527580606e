"""Figures of probabilities, each computed a second way, and levels above the classes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy.special import softmax
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import make_classification
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from small_grid import QUIET

from fewshot_diti.commands.evaluate import EvalConfig, evaluate
from fewshot_diti.data import ImageSet, load_bundled
from fewshot_diti.evaluation.grid import Grid
from fewshot_diti.evaluation.hierarchy import level_probabilities, levels_of
from fewshot_diti.evaluation.metrics import summarize
from fewshot_diti.evaluation.reliability import (
    Predictions,
    calibration_figures,
    equal_mass_bins,
    errors_by_chance,
    expected_calibration_error,
    picture,
)
from fewshot_diti.temperature import fit_temperature, negative_log_likelihood


def drawn(n: int, classes: int, *, power: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities [n, C] that are right about themselves when `power` is 1, too sure above it; and true classes."""
    rng = np.random.default_rng(n)
    p = rng.dirichlet(np.full(classes, 0.4), n).clip(1e-9)
    truth = np.array([rng.choice(classes, p=row / row.sum()) for row in p])
    return p**power / (p**power).sum(1, keepdims=True), truth


@pytest.mark.parametrize("strength", [0.001, 1e4])  # of the probabilities: too low, and too high
def test_the_fitted_temperature_is_scikit_learns(strength: float) -> None:
    features, labels = make_classification(
        1800, 20, n_informative=6, n_classes=4, n_clusters_per_class=1, flip_y=0.2, random_state=0
    )
    few = LogisticRegression(C=strength, max_iter=5000).fit(features[:60], labels[:60])
    held_out, truth = features[60:], labels[60:]
    theirs = CalibratedClassifierCV(FrozenEstimator(few), method="temperature").fit(held_out, truth)
    logits = few.decision_function(held_out)
    scores, targets = torch.from_numpy(-logits), torch.from_numpy(truth)
    ours = fit_temperature(scores, targets)
    assert (ours < 0.5) if strength < 1 else (ours > 2)
    # ours counts one further image of unknown class among the 1,740
    np.testing.assert_allclose(softmax(logits / ours, axis=1), theirs.predict_proba(held_out), atol=5e-3)
    figures = calibration_figures(truth, softmax(logits / ours, axis=1))
    assert figures["log_loss"] == pytest.approx(negative_log_likelihood(scores, targets, ours))
    before = calibration_figures(truth, softmax(logits, axis=1))
    assert all(figures[name] < before[name] for name in figures)


def test_figures_of_calibration_by_hand() -> None:
    p = np.array([[0.9, 0.1, 0.0], [0.2, 0.5, 0.3], [0.6, 0.2, 0.2]])
    found = calibration_figures(np.array([0, 2, 1]), p)
    assert found["brier"] == pytest.approx((0.1**2 + 0.1**2 + 0.2**2 + 0.5**2 + 0.7**2 + 0.6**2 + 0.8**2 + 0.2**2) / 3)
    assert found["log_loss"] == pytest.approx(-np.log([0.9, 0.3, 0.2]).mean())
    assert found["calibration_error"] == pytest.approx((0.1 + 0.5 + 0.6) / 3)  # three images, three bins
    sure_and_wrong = calibration_figures(np.array([0, 1]), np.array([[0.0, 1.0], [1.0, 0.0]], np.float32))
    assert sure_and_wrong["brier"] == 2 and 30 < sure_and_wrong["log_loss"] < np.inf


def test_bins_hold_as_many_images_each_and_the_error_is_over_them() -> None:
    confidence = np.linspace(0.5, 0.99, 100)
    correct = np.arange(100) % 2 == 0
    bins = equal_mass_bins(Predictions(confidence=confidence[::-1], correct=correct[::-1]), 4)
    assert bins.images.tolist() == [25] * 4
    np.testing.assert_allclose(bins.confidence, confidence.reshape(4, 25).mean(1))
    assert expected_calibration_error(Predictions(confidence=confidence, correct=correct)) == pytest.approx(
        np.mean([abs(confidence[i : i + 10].mean() - 0.5) for i in range(0, 100, 10)])
    )
    assert len(equal_mass_bins(Predictions(confidence=np.ones(3), correct=np.ones(3, bool))).images) == 3


def test_right_probabilities_have_the_error_of_chance_and_others_more() -> None:
    for power, holds in ((1.0, lambda error, chance: error < 2 * chance), (4.0, lambda e, c: e > 3 * c)):
        p, truth = drawn(2000, 6, power=power)
        predictions = Predictions.of(truth, p)
        assert holds(expected_calibration_error(predictions), errors_by_chance(predictions).mean())
    few = errors_by_chance(Predictions.of(truth[:100], p[:100])).mean()
    assert few > 2 * errors_by_chance(predictions).mean()


def test_the_probability_of_a_group_is_the_sum_of_its_classes() -> None:
    p = np.array([[0.4, 0.3, 0.3], [0.1, 0.2, 0.7]])
    names, found = level_probabilities(p, ("x", "y", "y"))
    assert names == ("x", "y")
    np.testing.assert_allclose(found, [[0.4, 0.6], [0.1, 0.9]])
    figures = summarize(np.array([1, 2]), p, ("a", "b", "c"), ["0", "1"], levels={"kind": ("x", "y", "y")})
    assert figures["accuracy"] == 0.5  # the first image is called a, whose group is x; together b and c are likelier
    assert figures["levels"]["kind"]["accuracy"] == 1.0
    with pytest.raises(ValueError, match=r"\(2, 3\) and 2 groups"):
        level_probabilities(p, ("x", "y"))


def test_levels_are_attributes_that_group_the_classes() -> None:
    train, test = load_bundled("train"), load_bundled("test")
    found = levels_of(train, test)
    assert list(found) == ["family", "manufacturer"]  # neither variant, nor airline, nor split
    of_class = {name: (found["family"][c], found["manufacturer"][c]) for c, name in enumerate(test.class_names)}
    assert of_class["737-300"] == of_class["737-800"] == ("Boeing 737", "Boeing")
    assert of_class["A319"] == ("A320", "Airbus")

    def images(values: tuple[str, ...]) -> ImageSet:
        pictures = [np.full((2, 2, 3), i, np.uint8) for i in range(4)]
        return ImageSet(
            images=pictures,
            labels=np.array([0, 1, 2, 0]),
            class_names=("a", "b", "c"),
            names=tuple("0123"),
            attributes={"maker": values},
        )

    assert levels_of(images(("x", "y", "y", "x"))) == {"maker": ("x", "y", "y")}
    for no_level in (("x", "y", "y", "y"), ("x", "x", "x", "x"), ("x", "y", "z", "x"), ("", "y", "y", "")):
        assert levels_of(images(no_level)) == {}
    assert levels_of(images(("x", "y", "y", "x")), images(("x", "y", "x", "x"))) == {}


@pytest.mark.usefixtures("small_settings")
def test_eval_reports_calibration_and_levels(
    config: EvalConfig, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    maker = {"nut": "small", "bolt": "small", "gear": "large"}
    lines = [
        f"{path.relative_to(data)},{path.parent.name},{path.parts[-3]},{maker[path.parent.name]}"
        for path in sorted(data.glob("*/*/*.png"))
    ]
    table = tmp_path / "parts.csv"
    table.write_text("\n".join(["path,label,split,size", *lines]))
    few = replace(config, dataset=f"manifest:{table}@{data}", methods=("nn-latents", "ncm-sd"), against="ncm-sd")
    assert evaluate(few, Console(width=200)) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "at the level size (2 groups of 3 classes)" in printed and "log-loss in nats" in printed
    folder = Grid(few).config.folder
    record = json.loads((folder / "ncm-sd" / "2-1.json").read_text())
    right = np.mean([maker[p["label"]] == maker[p["true_label"]] for p in record["predictions"]])
    assert record["accuracy"] <= right and 0 <= record["levels"]["size"]["accuracy"] <= 1
    cell = f"{100 * record['calibration_error']:.1f}, {record['brier']:.3f}, {record['log_loss']:.3f}"
    assert cell in (folder / "calibration.md").read_text()
    assert "by the sum of its classes' probabilities" in (folder / "levels.md").read_text()
    for name in ("reliability.png", "levels.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")

    path = folder / "ncm-sd" / "2-1.json"  # as an earlier version wrote it
    old = {k: v for k, v in record.items() if k not in ("levels", "brier", "log_loss", "calibration_error", "checksum")}
    for prediction in old["predictions"]:
        del prediction["probability"]
    path.write_text(json.dumps(old))
    assert evaluate(few, QUIET) == 0
    assert cell not in (folder / "calibration.md").read_text()


def test_a_picture_has_a_panel_for_each_number_of_shots() -> None:
    p, truth = drawn(50, 4)
    found = {k: {"ours": Predictions.of(truth, p)} for k in (1, 2, 4, 8, 16, 32)}
    assert picture(found, {"ours": "#0072B2"}).startswith(b"\x89PNG")
