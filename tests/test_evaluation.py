"""Figures of runs and comparisons of methods, each computed a second way."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.gaps import equal_trials, join, measure, plot
from fewshot_diti.data import ImageSet
from fewshot_diti.evaluation.comparison import compare, mcnemar
from fewshot_diti.evaluation.kept_errors import DitiErrors
from fewshot_diti.evaluation.metrics import drop_from_matched_to_shifted, summarize
from fewshot_diti.evaluation.task import Task


def test_figures_of_a_run() -> None:
    probabilities = np.array([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.5, 0.4, 0.1], [0.2, 0.3, 0.5]])
    found = summarize(np.array([0, 1, 1, 2]), probabilities, ("a", "b", "c"), ["w", "x", "y", "z"])
    assert found["accuracy"] == 0.75
    assert found["interval"][0] < 0.75 < found["interval"][1]
    assert found["accuracy_by_class"] == {"a": 1.0, "b": 0.5, "c": 1.0}
    assert found["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    assert found["confusion"] == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    assert [p["label"] for p in found["predictions"]] == ["a", "b", "a", "c"]
    assert [p["margin"] for p in found["predictions"]] == pytest.approx([0.5, 0.3, 0.1, 0.2])


def test_groups_that_are_right_or_wrong_together_widen_the_interval() -> None:
    labels = np.zeros(40, dtype=int)
    right = np.repeat([1, 0, 1, 1, 0, 1, 1, 1], 5).astype(bool)
    probabilities = np.where(right[:, None], [[0.9, 0.1]], [[0.1, 0.9]])
    ids = [str(i) for i in range(40)]
    wilson = summarize(labels, probabilities, ("a", "b"), ids)["interval"]
    grouped = summarize(labels, probabilities, ("a", "b"), ids, groups=[str(i // 5) for i in range(40)])["interval"]
    assert grouped[1] - grouped[0] > 1.5 * (wilson[1] - wilson[0])
    # the spread of two groups says little, and an image without a group is one by itself
    two = summarize(labels, probabilities, ("a", "b"), ids, groups=["left"] * 20 + ["right"] * 20)
    assert (two["interval"], two["interval_over"]) == (wilson, "images")
    alone = summarize(labels, probabilities, ("a", "b"), ids, groups=[""] * 40)
    assert alone["interval_over"] == "groups" and alone["interval"] == pytest.approx(wilson, abs=0.06)


def test_matched_and_shifted_images_are_reported_apart() -> None:
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.2, 0.8], [0.9, 0.1]])
    parts = {"matched": np.array([True, True, False, False]), "shifted": np.array([False, False, True, True])}
    found = summarize(np.array([0, 0, 0, 0]), probabilities, ("a", "b"), list("wxyz"), parts=parts)
    assert (found["matched"]["accuracy"], found["matched"]["images"]) == (1.0, 2)
    assert (found["shifted"]["accuracy"], found["shifted"]["images"]) == (0.5, 2)


def test_the_drop_weighs_classes_alike_and_leaves_out_those_without_both_kinds() -> None:
    labels = np.array([0] * 10 + [1] * 4 + [2] * 5)
    matched = np.array([True] * 8 + [False] * 2 + [True] * 2 + [False] * 2 + [True] * 5)
    correct = np.array([1] * 8 + [1, 0] + [1, 0] + [0, 0] + [1] * 5, dtype=bool)
    drop = drop_from_matched_to_shifted(correct, matched, labels)
    assert drop is not None and drop.classes == 2
    assert (drop.matched, drop.shifted) == ((1 + 0.5) / 2, (0.5 + 0) / 2)
    assert drop.low <= drop.matched - drop.shifted <= drop.high
    together = drop_from_matched_to_shifted(labels == 0, np.arange(19) % 2 == 0, labels)
    assert together is not None and together.low == together.high == 0  # all classes drop alike, by nothing
    assert drop_from_matched_to_shifted(correct, np.ones(19, dtype=bool), labels) is None


def test_gaps_are_to_the_classes_whose_shots_show_the_livery_and_to_the_others() -> None:
    def images(labels: list[int], airlines: tuple[str, ...]) -> ImageSet:
        pictures = [np.full((2, 2, 3), 7 * len(airlines) + i, np.uint8) for i in range(len(labels))]
        names = tuple(str(i) for i in range(len(labels)))
        attributes = {"airline": airlines}
        return ImageSet(
            images=pictures, labels=np.array(labels), class_names=("a", "b", "c"), names=names, attributes=attributes
        )

    shots, test = images([0, 1, 2], ("KLM", "SAS", "TAP")), images([0, 0, 0, 0], ("SAS", "TAP", "KLM", ""))
    two = [[[1.0, 2.0], [1.5, 1.0], [3.0, 3.0]], [[2.0, 1.0], [4.0, 4.0], [3.0, 0.5]]]
    errors = torch.tensor(two + two)
    task = Task(shots=shots, test=test, num_shots=1, seed=0)
    gaps = measure(
        DitiErrors(
            timesteps=torch.tensor([10, 20]),
            test=errors,
            held_out=errors,
            held_out_labels=torch.tensor([0] * 4),
            out_of_fold=False,
            training_seconds=0.0,
            scoring_seconds=0.0,
        ),
        task,
        "airline",
    )
    assert gaps.right.tolist() == [[True, False], [True, False]] * 2
    assert gaps.misleading.tolist() == [True, True, False, False]  # the third is matched, of the last nothing is known
    deviations = errors.double().numpy().std(1)
    np.testing.assert_allclose((gaps.sharing * deviations)[:2], [[0.5, -1.0], [1.0, -0.5]])  # to b, and to c
    np.testing.assert_allclose((gaps.other * deviations)[:2], [[2.0, 1.0], [2.0, 3.0]])  # to c, and to b
    np.testing.assert_allclose(gaps.strongest[:2], gaps.other[:2])  # there is one other
    # all wrong classes are others to the last: b and c, of which b is the stronger at first, then c
    np.testing.assert_allclose((gaps.other * deviations)[3], [1.5, 1.25])
    np.testing.assert_allclose((gaps.strongest * deviations)[3], [1.0, -0.5])
    both = join([gaps, gaps])
    assert both.sharing.shape == both.other.shape == both.right.shape == (8, 2) and len(both.groups) == 8
    assert plot(both, "a title").startswith(b"\x89PNG")


def test_windows_are_compared_at_the_same_number_of_trials() -> None:
    labels, times = np.arange(40) % 2, torch.arange(0, 100, 10)
    noise = torch.rand(40, 2, 10, generator=torch.Generator().manual_seed(0))
    errors = 1 + noise + torch.nn.functional.one_hot(torch.from_numpy(1 - labels))[:, :, None]  # the true class: 1 less
    errors[:, :, :5] = 1 + noise[:, :, :5]  # small t say nothing
    all_errors = DitiErrors(
        timesteps=times,
        test=errors,
        held_out=errors,
        held_out_labels=torch.from_numpy(labels),
        out_of_fold=True,
        training_seconds=0.0,
        scoring_seconds=0.0,
    )
    found = equal_trials(all_errors, labels, {"small": (0, 50), "one": (50, 60), "large": (50, 100)})
    assert found["large"] == found["one"] == pytest.approx(1)  # one trial each, as "one" has
    assert 0.3 < found["small"] < 0.7
    with pytest.raises(ValueError, match="holds none of the trials"):
        equal_trials(all_errors, labels, {"none": (51, 60)})


def test_probabilities_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="Image x has no finite probability of class 'b'"):
        summarize(np.array([0]), np.array([[0.5, np.nan]]), ("a", "b"), ["x"])


@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 5))
def test_mcnemar_is_the_binomial_tail(only_a: int, only_b: int, both: int) -> None:
    a = np.array([True] * only_a + [False] * only_b + [True] * both, dtype=bool)
    b = np.array([False] * only_a + [True] * only_b + [True] * both, dtype=bool)
    n = only_a + only_b
    tail = sum(comb(n, i) for i in range(min(only_a, only_b) + 1)) / 2**n
    assert mcnemar(a, b) == pytest.approx(min(1.0, 2 * tail) if only_a != only_b else 1.0)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_interval_of_a_difference_holds_it_and_changes_sign_with_the_methods(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.random((3, 60)) < 0.7, rng.random((3, 60)) < 0.5
    one, other = compare(list(a), list(b)), compare(list(b), list(a))
    assert one.difference == pytest.approx(a.mean() - b.mean())
    assert one.low <= one.difference <= one.high
    assert (one.difference, one.low, one.high) == pytest.approx((-other.difference, -other.high, -other.low))
    assert one.p_values == pytest.approx(other.p_values)


def test_the_interval_covers_seeds_as_well_as_images() -> None:
    same = [np.arange(100) % 10 < 6] * 3
    few, many = [np.arange(100) % 10 < 5] * 3, [np.arange(100) % 10 < n for n in (2, 5, 8)]
    narrow, wide = compare(same, few), compare(same, many)
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


def test_other_images_are_refused() -> None:
    with pytest.raises(ValueError, match="compared on the same seeds and images"):
        compare([np.ones(3, bool)], [np.ones(4, bool)])
