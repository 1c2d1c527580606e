"""Temperature, window and accuracy from held-out shots, and the shots whose errors calibration reads."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_classifier import PREDICTION, SCORING, TRAINING, make
from torch import Tensor

from fewshot_diti import Backbone, DiTiClassifier
from fewshot_diti import calibration as calibration_module
from fewshot_diti.bank import Bank
from fewshot_diti.calibration import calibrate
from fewshot_diti.data import ImageGeometry
from fewshot_diti.encoding import Encoder, PreparedImage
from fewshot_diti.folds import Fit, split_folds
from fewshot_diti.presets import PRESETS, complete
from fewshot_diti.prompts import Prompts
from fewshot_diti.temperature import fit_temperature, negative_log_likelihood
from fewshot_diti.timesteps import weighted_mean
from fewshot_diti.trials import even_grid
from fewshot_diti.weighting import candidate_windows, choose_window

ONE_STEP = replace(TRAINING, steps=1)


def test_the_temperature_that_drew_the_labels_is_found():
    generator = torch.Generator().manual_seed(0)
    scores = 3 + 0.01 * torch.randn(4000, 5, generator=generator)
    for temperature in (0.003, 0.02):
        labels = torch.multinomial((-scores / temperature).softmax(dim=1), 1, generator=generator)[:, 0]
        assert fit_temperature(scores, labels) == pytest.approx(temperature, rel=0.15)


@given(st.integers(0, 2**31), st.floats(1e-4, 1e4), st.floats(-5, 5))
@settings(max_examples=20, deadline=None)
def test_the_temperature_scales_with_the_scores_and_no_other_is_likelier(seed, scale, shift):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(40, 4, generator=generator, dtype=torch.float64)
    labels = torch.where(torch.rand(40, generator=generator) < 0.7, scores.argmin(dim=1), torch.arange(40) % 4)
    temperature = fit_temperature(scores, labels)
    assert fit_temperature(scale * scores + shift, labels) == pytest.approx(scale * temperature, rel=1e-3)
    # The one further image of unknown class, written out: each label once more per class, N C + C images in all.
    smoothed = torch.cat([scores.repeat(40 * 4, 1), scores.repeat(4, 1)])
    targets = torch.cat([labels.repeat(40 * 4), torch.arange(4).repeat_interleave(40)])
    best = negative_log_likelihood(smoothed, targets, temperature)
    for factor in (0.8, 0.99, 1.01, 1.25):
        assert best <= negative_log_likelihood(smoothed, targets, factor * temperature) + 1e-12


def test_shots_that_are_all_right_still_give_probabilities_below_one():
    scores = 1 - 0.1 * torch.eye(4).repeat(5, 1)
    temperature = fit_temperature(scores, torch.arange(4).repeat(5))
    assert (-scores / temperature).softmax(dim=1).max().item() == pytest.approx(1 - 0.75 / 21, abs=1e-4)


def test_scores_that_mislead_give_nearly_equal_probabilities():
    scores = 1 + 0.1 * torch.eye(4).repeat(5, 1)
    temperature = fit_temperature(scores, torch.arange(4).repeat(5))
    assert negative_log_likelihood(scores, torch.arange(4).repeat(5), temperature) == pytest.approx(
        math.log(4), abs=1e-3
    )


def test_scores_and_labels_that_fit_no_temperature_are_refused():
    labels = torch.tensor([0, 1])
    with pytest.raises(ValueError, match="class index 1 has the score nan"):
        fit_temperature(torch.tensor([[1.0, 2.0, 3.0], [1.0, math.nan, 2.0]]), labels)
    with pytest.raises(ValueError, match="same in all classes"):
        fit_temperature(torch.ones(2, 3), labels)
    with pytest.raises(ValueError, match="C >= 2"):
        fit_temperature(torch.ones(2, 1), labels)
    with pytest.raises(ValueError, match="indices from 0 to 2"):
        fit_temperature(torch.rand(2, 3), torch.tensor([0, 3]))


def test_the_candidates_are_all_windows_between_tenths_of_the_schedule():
    windows = candidate_windows(1000)
    assert len(windows) == 55 and windows[0] == (0, 100) and (0, 1000) in windows and windows[-1] == (900, 1000)


def held_out_errors(informative: tuple[int, int], timesteps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    errors = 1 + 0.1 * torch.randn(len(labels), 6, len(timesteps), generator=generator)
    inside = (timesteps >= informative[0]) & (timesteps < informative[1])
    errors[torch.arange(len(labels)), labels] -= 0.1 * inside.float()
    return errors


@pytest.mark.parametrize("informative", [(0, 300), (200, 500), (700, 1000)])
def test_the_window_that_holds_the_information_is_chosen(informative):
    labels = torch.arange(96) % 6
    steps = even_grid(40, 0, 1000)
    lo, hi = choose_window(held_out_errors(informative, steps, labels), labels, steps, candidate_windows(1000))
    assert abs(lo - informative[0]) <= 100 and abs(hi - informative[1]) <= 100


def test_the_choice_depends_neither_on_the_order_of_candidates_nor_of_images():
    labels = torch.arange(30) % 6
    steps = even_grid(20, 0, 1000)
    errors = held_out_errors((100, 400), steps, labels)
    candidates = candidate_windows(1000)
    chosen = choose_window(errors, labels, steps, candidates)
    assert choose_window(errors.flip(0), labels.flip(0), steps.expand(30, -1), candidates[::-1]) == chosen


def test_equally_likely_windows_go_to_the_wider_and_then_to_the_smaller_lo():
    labels = torch.arange(8) % 2
    steps = torch.tensor([50, 150, 250, 350])
    errors = (1 - torch.nn.functional.one_hot(labels, 2).float())[:, :, None].repeat(1, 1, 4)
    for candidates in itertools.permutations([(0, 100), (0, 300), (100, 400), (200, 300)]):
        assert choose_window(errors, labels, steps, candidates) == (0, 300)


def test_candidates_without_a_trial_are_left_out_and_none_left_is_an_error():
    labels = torch.arange(8) % 2
    errors = held_out_errors((0, 1000), torch.tensor([50, 950]), labels)
    assert choose_window(errors, labels, torch.tensor([50, 950]), [(100, 900), (0, 100)]) == (0, 100)
    with pytest.raises(ValueError, match="none of the 1 candidate windows"):
        choose_window(errors, labels, torch.tensor([50, 950]), [(100, 900)])


@given(st.lists(st.integers(2, 9), min_size=2, max_size=5), st.integers(2, 12))
def test_folds_hold_out_every_shot_once_and_keep_one_of_every_class(counts: list[int], folds: int) -> None:
    groups = {f"{c}": [(c, i) for i in range(n)] for c, n in enumerate(counts)}
    parts = list(split_folds(groups, folds))
    assert len(parts) == min(folds, max(counts))
    everything = [shot for shots in groups.values() for shot in shots]
    assert sorted(shot for _, held in parts for _, shot in held) == everything
    for kept, held in parts:
        assert all(kept.values()) and all(shot[0] == c for c, shot in held)
        assert sorted([*(s for shots in kept.values() for s in shots), *(s for _, s in held)]) == everything


def classifiers_of_folds(
    whole: DiTiClassifier, groups: dict[str, list[Path]], folds: int
) -> list[tuple[DiTiClassifier, list[Path], list[int]]]:
    """For each fold a classifier fitted on the other shots, with the held-out shots and their classes."""
    found = []
    scoring = replace(whole.scoring, folds=0, temperature=1.0, weighting="uniform")
    for kept, held in split_folds(groups, folds):
        images, labels = [p for x in kept for p in kept[x]], [x for x in kept for _ in kept[x]]
        part = make(whole.backbone_, training=whole.training, scoring=scoring, prediction=whole.prediction)
        found.append((part.fit(images, labels), [path for _, path in held], [c for c, _ in held]))
    return found


@pytest.mark.parametrize("weighting", ["relative", "uniform"])
@pytest.mark.parametrize("schedule", ["racing", "exhaustive"])
def test_cross_validation_judges_each_shot_by_class_tokens_trained_without_it(
    backbone: Backbone, pictures: dict[str, list[Path]], weighting: str, schedule: str
) -> None:
    """Classes of 3, 2 and 4 shots: as many folds as the largest has, though more are asked for."""
    groups = {x: pictures[x][:n] for x, n in (("a320", 3), ("dc-9", 2), ("tu-154", 4))}
    density = "importance" if schedule == "racing" else "even"
    scoring = replace(SCORING, trials=12, density=density, weighting=weighting, folds=7, temperature="fit")
    prediction = replace(PREDICTION, schedule=schedule, confidence=0.5)
    whole = make(backbone, training=ONE_STEP, scoring=scoring, prediction=prediction)
    whole.fit([p for x in groups for p in groups[x]], [x for x in groups for _ in groups[x]])
    parts = classifiers_of_folds(whole, groups, 7)
    assert len(parts) == 4
    scores, truth = [], []
    for part, held, classes in parts:
        part.calibration_ = whole.calibration_
        scores.append(part.scores(held))
        truth += classes
    assert sorted(truth) == [0, 0, 0, 1, 1, 2, 2, 2, 2]
    calibration = whole.calibration_
    right = torch.cat(scores).argmin(1) == torch.tensor(truth)
    assert calibration.accuracy == pytest.approx(float(right.double().mean()))
    expected = fit_temperature(torch.cat(scores), torch.tensor(truth))
    assert calibration.temperature == pytest.approx(expected, rel=1e-2)
    assert calibration.temperature_from == "shots"


def test_auto_chooses_its_window_on_held_out_shots(backbone: Backbone, pictures: dict[str, list[Path]]) -> None:
    groups = {x: pictures[x][:3] for x in ("a320", "dc-9", "tu-154")}
    scoring = replace(SCORING, trials=20, weighting="auto", folds=3, temperature="fit")
    whole = make(backbone, training=ONE_STEP, scoring=scoring)
    whole.fit([p for x in groups for p in groups[x]], [x for x in groups for _ in groups[x]])
    errors, truth = [], []
    for part, held, classes in classifiers_of_folds(whole, groups, 3):
        errors.append(part.errors(held))
        truth += classes
    grid, labels = even_grid(20, 0, 1000), torch.tensor(truth)
    lo, hi = choose_window(torch.cat(errors), labels, grid, candidate_windows(1000))
    calibration = whole.calibration_
    assert all(lo <= t < hi for t in calibration.timesteps) and set(calibration.weights) == {1.0}
    scores = weighted_mean(torch.cat(errors), ((grid >= lo) & (grid < hi)).double())
    assert calibration.accuracy == pytest.approx(float((scores.argmin(1) == labels).double().mean()))
    inside = float(((grid >= lo) & (grid < hi)).double().mean())
    # scores are means over the trials of the window
    assert calibration.temperature == pytest.approx(fit_temperature(scores / inside, labels), rel=2e-2)


def test_one_shot_falls_back_to_the_preset_and_says_so(backbone: Backbone, pictures: dict[str, list[Path]]) -> None:
    scoring = replace(SCORING, weighting="auto", temperature="fit", folds=3)
    classifier = make(backbone, training=ONE_STEP, scoring=scoring)
    with pytest.warns(UserWarning, match=r"Classes \['dc-9'\] have one shot, .* folds=3 is ignored"):
        classifier.fit([*pictures["a320"][:2], pictures["dc-9"][0]], ["a320", "a320", "dc-9"])
    calibration, preset = classifier.calibration_, PRESETS["pocket"]
    assert calibration.accuracy is None
    assert (calibration.temperature, calibration.temperature_from) == (preset.temperature_of(2), "preset")
    relative = make(backbone, training=ONE_STEP, scoring=replace(SCORING, weighting=preset.scoring["weighting"]))
    relative.fit([*pictures["a320"][:2], pictures["dc-9"][0]], ["a320", "a320", "dc-9"])
    assert calibration.weights == relative.calibration_.weights


def shots_read(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch, counts: dict[str, int], images: int, seed: int
) -> list[str]:
    """The classes of the shots whose errors `relative` reads."""
    encoder = Encoder(backbone, ImageGeometry(size=backbone.image_size), "a photo of an aircraft")
    shot = torch.zeros(3, *backbone.image_size, dtype=torch.uint8)
    groups = {x: [PreparedImage(f"{x} {i}", f"{x} {i}", shot) for i in range(n)] for x, n in counts.items()}
    scoring = replace(SCORING, weighting="relative", calibration_images=images, seed=seed)
    fit = Fit(
        encoder=encoder,
        prompts=Prompts(template="{}", generic="a photo of an aircraft"),
        settings=complete("pocket", 1, TRAINING, scoring, PREDICTION),
        groups=groups,
    )
    read: list[str] = []

    def errors(fit: Fit, bank: Bank, images: Sequence[PreparedImage], grid: Tensor) -> Tensor:
        read.extend(image.id.rsplit(" ", 1)[0] for image in images)
        return torch.ones(len(images), len(groups), len(grid))

    monkeypatch.setattr(calibration_module, "shared_errors", errors)
    calibrate(fit, None)  # type: ignore[arg-type]  # no bank is asked: the errors are given
    return read


def test_where_there_are_more_classes_than_calibration_images_they_are_drawn_from_all_classes(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {f"class {c:02}": 2 for c in range(30)}
    read = shots_read(backbone, monkeypatch, counts, 24, seed=0)
    assert len(read) == len(set(read)) == 24
    assert set(read) != set(sorted(counts)[:24])
    assert shots_read(backbone, monkeypatch, counts, 24, seed=0) == read
    others = [shots_read(backbone, monkeypatch, counts, 24, seed) for seed in range(1, 9)]
    assert any(other != read for other in others)
    assert {x for other in others for x in other} == set(counts)  # no class is left out for good


def test_where_there_are_enough_calibration_images_every_class_gives_its_share(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {f"class {c:02}": 5 for c in range(12)}
    assert Counter(shots_read(backbone, monkeypatch, counts, 24, seed=0)) == dict.fromkeys(counts, 2)
    uneven = {"a": 1, "b": 2, "c": 9}
    assert Counter(shots_read(backbone, monkeypatch, uneven, 7, seed=0)) == {"a": 1, "b": 2, "c": 4}
    assert len(shots_read(backbone, monkeypatch, uneven, 100, seed=0)) == 12


def test_the_source_of_the_temperature_is_told(backbone: Backbone, pictures: dict[str, list[Path]]) -> None:
    images, labels = [*pictures["a320"][:2], *pictures["dc-9"][:2]], ["a320"] * 2 + ["dc-9"] * 2
    for temperature, source in ((None, "preset"), (0.123, "user")):
        scoring = replace(SCORING, temperature=temperature)
        classifier = make(backbone, training=ONE_STEP, scoring=scoring).fit(images, labels)
        assert classifier.calibration_.temperature_from == source
        assert classifier.calibration_.temperature == (temperature or PRESETS["pocket"].temperature_of(2))
