"""Errors hang on the image, the class token, the trial and the seed, and on nothing else."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fewshot_diti.learning import Learner
from hypothesis import given, settings
from hypothesis import strategies as st
from test_lora import latents_of, random_bank
from torch import Tensor

from fewshot_diti import DiTiClassifier
from fewshot_diti.backbone import Backbone
from fewshot_diti.bank import Bank
from fewshot_diti.elimination import eliminate, exhaustive, racing
from fewshot_diti.scoring import Scorer, decide, error_tensor
from fewshot_diti.trials import trial_noise

TIMESTEPS = (1, 120, 400, 650, 990)


@pytest.fixture(scope="module")
def bank(backbone: Backbone) -> Bank:
    return random_bank(backbone, 4, 3, 0)


@pytest.fixture(scope="module")
def latents(backbone: Backbone) -> Tensor:
    return torch.stack([latents_of(backbone, s) for s in range(3)])


@pytest.fixture(scope="module")
def errors(backbone: Backbone, bank: Bank, latents: Tensor) -> Tensor:
    """One evaluation at a time."""
    return error_tensor(Scorer(backbone, bank, batch_size=1), latents, ["a", "b", "c"], TIMESTEPS)


@settings(max_examples=8, deadline=None)
@given(
    batch_size=st.integers(1, 24),
    classes=st.permutations(range(4)).flatmap(lambda p: st.integers(1, 4).map(lambda n: p[:n])),
    trials=st.permutations(range(5)).flatmap(lambda p: st.integers(1, 5).map(lambda n: p[:n])),
)
def test_batch_size_and_the_choice_of_classes_and_trials_change_no_error(
    backbone: Backbone,
    bank: Bank,
    latents: Tensor,
    errors: Tensor,
    batch_size: int,
    classes: list[int],
    trials: list[int],
) -> None:
    scorer = Scorer(backbone, bank, batch_size=batch_size)
    some = scorer.errors(latents[1], "b", classes, trials, [TIMESTEPS[s] for s in trials])
    torch.testing.assert_close(some, errors[1][classes][:, trials], rtol=0, atol=1e-5)


def test_a_batch_that_memory_is_too_small_for_is_halved_and_the_size_kept(
    backbone: Backbone, bank: Bank, latents: Tensor, errors: Tensor, small_memory: Callable[[int], list[int]]
) -> None:
    for limit, sizes in ((5, {5}), (3, {1, 2})):  # the second cuts an image's five trials
        tried = small_memory(limit)
        scorer = Scorer(backbone, bank, batch_size=16)
        found = error_tensor(scorer, latents, ["a", "b", "c"], TIMESTEPS)
        assert tried[0] == 15 and set(tried[3:]) == sizes
        torch.testing.assert_close(found, errors, rtol=0, atol=1e-5)
    small_memory(0)
    with pytest.raises(RuntimeError, match="out of memory"):
        scorer.errors(latents[0], "a", [0], [0], [1])


def test_the_order_of_images_and_classes_changes_no_error(
    backbone: Backbone, bank: Bank, latents: Tensor, errors: Tensor
) -> None:
    order = [2, 0, 1]
    shuffled = bank.select([bank.labels[i] for i in (3, 1, 0, 2)])
    again = error_tensor(Scorer(backbone, shuffled), latents[order], ["c", "a", "b"], TIMESTEPS)
    torch.testing.assert_close(again, errors[order][:, [3, 1, 0, 2]], rtol=0, atol=1e-5)


def test_an_image_is_scored_to_the_bit_the_same_whatever_is_scored_beside_it(
    backbone: Backbone, bank: Bank, latents: Tensor
) -> None:
    scorer = Scorer(backbone, bank)
    many = error_tensor(scorer, latents, ["a", "b", "c"], TIMESTEPS)
    for i, image_id in enumerate("abc"):
        assert torch.equal(error_tensor(scorer, latents[i : i + 1], [image_id], TIMESTEPS)[0], many[i])


@settings(max_examples=8, deadline=None)
@given(
    batch_size=st.integers(1, 24),
    pairs=st.permutations([(n, c) for n in range(3) for c in range(4)]).flatmap(
        lambda p: st.integers(1, 12).map(lambda n: p[:n])
    ),
)
def test_batches_that_mix_images_and_classes_give_the_errors_of_each(
    backbone: Backbone, bank: Bank, latents: Tensor, errors: Tensor, batch_size: int, pairs: list[tuple[int, int]]
) -> None:
    trials = [3, 0, 4]
    scorer = Scorer(backbone, bank, batch_size=batch_size)
    found = scorer.pair_errors(latents, "abc", torch.tensor(pairs), trials, [TIMESTEPS[s] for s in trials])
    expected = torch.stack([errors[n, c, trials] for n, c in pairs])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_full_batches_go_through_the_compiled_network_in_one_graph_and_the_rest_without(
    backbone: Backbone, bank: Bank, latents: Tensor
) -> None:
    twin, batches = copy.copy(backbone), []
    compiled = torch.compile(backbone.unet, backend="eager", dynamic=False)

    def run(x: Tensor, *rest: Tensor) -> Any:
        batches.append(len(x))
        return compiled(x, *rest)

    twin.compiled_unet = run
    torch._dynamo.utils.counters.clear()
    grid = [1, 120, 250, 400, 520, 650, 800, 990]
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(4))
    for some, trials in (
        (pairs, range(4)),
        (pairs[[0, 5, 7, 2, 8]], range(8)),
        (pairs[3:7], [7, 1]),
        (pairs, [2, 4, 6]),
    ):
        times = [grid[s] for s in trials]
        expected = Scorer(backbone, bank, batch_size=1).pair_errors(latents, "abc", some, trials, times)
        found = Scorer(twin, bank, batch_size=10).pair_errors(latents, "abc", some, trials, times)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert batches == [10] * (4 + 4)  # of 48, 40 and 8 evaluations; three trials are no whole groups
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_race_is_decided_on_the_errors_of_the_exhaustive_schedule(
    backbone: Backbone, bank: Bank, latents: Tensor, errors: Tensor
) -> None:
    weights = torch.tensor([1.0, 0.5, 2.0, 1.0, 0.1], dtype=torch.float64)
    for stages in (exhaustive(5), racing(5, confidence=0.5)):
        found = decide(Scorer(backbone, bank), latents, "abc", TIMESTEPS, weights, stages)
        expected = eliminate(lambda pairs, s: errors[pairs[:, 0], pairs[:, 1]][:, s], 3, 4, stages, weights)
        assert [(f.label, f.evaluations, f.decided) for f in found] == [
            (e.label, e.evaluations, e.decided) for e in expected
        ]
        for f, e in zip(found, expected, strict=True):
            torch.testing.assert_close(f.scores, e.scores, rtol=0, atol=1e-5)


def test_noise_hangs_on_seed_image_and_trial_number_alone() -> None:
    shape = (4, 8, 16)
    noise = trial_noise(0, "an image", range(6), shape)
    assert noise.dtype == torch.float32
    assert torch.equal(noise[[4, 1]], trial_noise(0, "an image", [4, 1], shape))
    others = [trial_noise(1, "an image", [0], shape), trial_noise(0, "another", [0], shape), noise[1:2]]
    assert not any(torch.equal(noise[:1], x) for x in others)
    many = trial_noise(0, "an image", range(400), shape)
    assert many.mean().abs() < 0.01
    assert (many.std() - 1).abs() < 0.01


def test_noise_is_the_same_on_every_machine() -> None:
    expected = torch.tensor([-1.7897560596466064, -1.0897003412246704, 0.6585617065429688, -0.7896870970726013])
    torch.testing.assert_close(trial_noise(0, "an image", [7], (4,))[0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (Scorer.__init__, "self backbone bank seed batch_size"),
        (Scorer.errors, "self latents image_id classes trials timesteps"),
        (Scorer.pair_errors, "self latents_Nchw image_ids pairs_P2 trials timesteps"),
        (error_tensor, "scorer latents_Nchw image_ids timesteps_S desc"),
        (decide, "scorer latents_Nchw image_ids timesteps_S weights_S stages offsets_NC desc"),
        (Learner.shared_errors, "self bank images grid"),
        (Learner.shared_scores, "self bank images grid weights offsets"),
        (DiTiClassifier.decide, "self images"),
        (DiTiClassifier.errors, "self images"),
        (DiTiClassifier.offsets, "self latents_Nchw"),
        (DiTiClassifier.predict_proba, "self images"),
    ],
)
def test_the_true_label_has_no_way_into_the_scorer(function: object, parameters: str) -> None:
    assert " ".join(inspect.signature(function).parameters) == parameters  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_class_token_is_named_and_cannot_win(
    backbone: Backbone, bank: Bank, latents: Tensor, value: float
) -> None:
    rows = bank.rows.clone()
    rows[2, 100] = value
    scorer = Scorer(backbone, replace(bank, rows=rows))
    with pytest.raises(ValueError, match=f"Class token '{bank.labels[2]}' gives an error that is not a finite number"):
        error_tensor(scorer, latents, ["a", "b", "c"], TIMESTEPS)
    assert scorer.errors(latents[0], "a", [0, 1, 3], range(5), TIMESTEPS).isfinite().all()


def test_no_images_give_an_empty_tensor(backbone: Backbone, bank: Bank, latents: Tensor) -> None:
    assert error_tensor(Scorer(backbone, bank), latents[:0], [], TIMESTEPS).shape == (0, 4, 5)


def test_bfloat16_agrees_with_float32(
    backbone_folder: Path, bank: Bank, latents: Tensor, errors: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    low = Backbone.from_pretrained(backbone_folder, dtype=torch.bfloat16, device="cpu")
    rough = error_tensor(Scorer(low, bank), latents, ["a", "b", "c"], TIMESTEPS)
    relative = ((rough - errors).abs() / errors).max()
    # what decides: differences between classes, whose noise is the same
    apart = errors - errors.mean(1, keepdim=True)
    moved = (rough - rough.mean(1, keepdim=True) - apart).std() / apart.std()
    same = (rough.mean(2).argmin(1) == errors.mean(2).argmin(1)).double().mean()
    with capsys.disabled():
        print(
            f"\nbf16: errors off by {relative:.1e} at most, class differences by {moved:.1e}, labels agree {same:.0%}"
        )
    assert relative < 0.05
    assert moved < 0.2
