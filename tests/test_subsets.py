"""Dimensions by timestep: sizes as published, masks against loops."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st

from fewshot_diti.representation.subsets import Subsets, ends_of_equal_snr, even_sizes, sizes_by_loss, sizes_of_stages

STABLE_DIFFUSION = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod


def test_sizes_of_the_published_stages() -> None:
    stages = [2, 2, 2, 4], [8, 8, 9], [25] * 12 + [27], [8] * 11 + [12], [1] * 31 + [19]
    assert sizes_of_stages(1000) == tuple(size for stage in stages for size in stage)


def test_published_ends_have_the_same_snr_at_other_timesteps_of_stable_diffusion() -> None:
    ends = ends_of_equal_snr(STABLE_DIFFUSION)
    assert ends == (32, 99, 419, 708, 1000)
    assert sum(sizes_of_stages(1000, ends)) == 512
    linear = DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear").alphas_cumprod
    assert ends_of_equal_snr(linear) == (50, 100, 300, 500, 1000)


def test_sizes_by_loss_are_in_proportion_and_none_is_empty() -> None:
    loss_T = torch.zeros(1000)
    loss_T[500:750] = 3.0
    loss_T[750:] = 1.0
    sizes = torch.tensor(sizes_by_loss(512, loss_T))
    assert sizes.sum() == 512 and sizes[:32].tolist() == [1] * 32
    assert sizes[32:48].sum() / sizes[48:].sum() == pytest.approx(3, rel=0.1)
    assert set(sizes_by_loss(512, torch.ones(1000))) == {8}


@pytest.mark.parametrize("wrong", [lambda: even_sizes(100), lambda: sizes_by_loss(63, torch.ones(1000))])
def test_dimensions_that_do_not_suffice_are_refused(wrong: object) -> None:
    with pytest.raises(ValueError, match="64"):
        wrong()  # type: ignore[operator]


def test_a_stage_without_a_subset_or_with_too_few_dimensions_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[0, 0\) has 10 dimensions for 0 subsets"):
        sizes_of_stages(1000, (0, 100, 300, 500, 1000))
    with pytest.raises(ValueError, match=r"\[0, 200\) has 10 dimensions for 13 subsets"):
        sizes_of_stages(1000, (200, 300, 400, 500, 1000))


def test_sizes_must_be_positive_and_no_more_than_timesteps() -> None:
    for sizes in ((), (3, 0), (1,) * 11):
        with pytest.raises(ValueError, match="of subsets of 10 timesteps"):
            Subsets(sizes=sizes, num_timesteps=10)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=7), st.integers(7, 40))
def test_masks_are_those_of_a_loop_and_own_dimensions_partition_the_feature(sizes: list[int], num_t: int) -> None:
    subsets = Subsets(sizes=tuple(sizes), num_timesteps=num_t)
    times = torch.arange(num_t)
    own, earlier = subsets.own(times), subsets.earlier(times)
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    for t in range(num_t):
        i = int(len(sizes) * t / num_t)
        begin = ends[i] - sizes[i]
        assert own[t].tolist() == [begin <= d < ends[i] for d in range(ends[-1])]
        assert earlier[t].tolist() == [d < begin for d in range(ends[-1])]
    first = [min(t for t in range(num_t) if subsets.subset_of(torch.tensor([t])) == i) for i in range(len(sizes))]
    assert (own[first].sum(0) == 1).all()


def test_a_band_has_the_dimensions_of_the_subsets_that_begin_in_it() -> None:
    subsets = Subsets(sizes=sizes_of_stages(1000), num_timesteps=1000)
    bands = [subsets.band(*ends) for ends in ((0, 50), (50, 100), (100, 300), (300, 500), (500, 1000))]
    assert [(b.start, b.stop) for b in bands] == [(0, 10), (10, 35), (35, 362), (362, 462), (462, 512)]
    with pytest.raises(ValueError, match=r"No subset begins at a timestep of \[1, 16\)"):
        subsets.band(1, 16)
