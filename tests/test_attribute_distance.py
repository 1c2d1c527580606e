"""The size of the smallest edit between two classes, against plain loops over pairs of shots."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from fewshot_diti import attribute_distance as module
from fewshot_diti.attribute_distance import attribute_distance, attribute_distance_released


def test_attribute_distances_are_percentiles_over_pairs_whatever_the_chunk(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(9, 4, 3, 5, generator=generator)
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 2, 2, 1])
    left_out, set_to_100 = 0.0, 0.0
    for h, w in itertools.product(range(3), range(5)):
        squared = [
            [(latents[i, :, h, w] - latents[j, :, h, w]).square().sum().item() for j in range(9)] for i in range(9)
        ]
        different = [squared[i][j] for i in range(9) for j in range(i) if labels[i] != labels[j]]
        ordered = [squared[i][j] if labels[i] != labels[j] else 100.0 for i in range(9) for j in range(9)]
        left_out += np.percentile(different, 0.1)
        set_to_100 += np.percentile(ordered, 0.1)
    for pairs_in_memory in (1, 81 * 4, 2**24):
        monkeypatch.setattr(module, "PAIRS_IN_MEMORY", pairs_in_memory)
        assert attribute_distance(latents, labels) == pytest.approx(math.sqrt(left_out), rel=1e-6)
        assert attribute_distance_released(latents, labels) == pytest.approx(math.sqrt(set_to_100), rel=1e-6)


def test_attribute_distance_needs_two_classes_and_a_label_for_each_latent():
    latents = torch.zeros(3, 4, 2, 2)
    with pytest.raises(ValueError, match="all 3 shots are of one class"):
        attribute_distance(latents, torch.tensor([1, 1, 1]))
    with pytest.raises(ValueError, match="labels"):
        attribute_distance_released(latents, torch.tensor([0, 1]))
