"""Witnesses on CLIP: zero-shot, Tip-Adapter, and a linear classifier of its features."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_classifier import SCORING, TRAINING, make, shots_of
from small_clip import save_tiny_clip

from fewshot_diti import Backbone, DiTiClassifier
from fewshot_diti.baselines import OpenClip, TipAdapter
from fewshot_diti.baselines import presets as baseline_presets
from fewshot_diti.baselines.clip import prompt_templates
from fewshot_diti.data.images import ImageGeometry
from fewshot_diti.witnesses import make_witness
from fewshot_diti.witnesses.clip import check_told_apart

CLASSES = ["a320", "dc-9", "tu-154"]


@pytest.mark.parametrize("kind", ["clip", "tip-adapter", "linear-clip"])
def test_witnesses_of_clip_save_grow_and_shrink(
    backbone: Backbone, pictures: dict[str, list[Path]], tests: list[Path], tmp_path: Path, kind: str
) -> None:
    name = f"{kind}:local-dir:{save_tiny_clip(tmp_path, 'transformer')}"
    scoring = replace(SCORING, witnesses=(name,), witness_weights=(1.0,))
    classifier = make(backbone, scoring=scoring).fit(*shots_of(pictures, CLASSES))
    log_p = classifier.evidence(tests)[name]
    assert log_p.shape == (3, 3) and log_p.std(1).min() > 0
    classifier.save_pretrained(tmp_path / "bank")
    assert torch.equal(DiTiClassifier.from_pretrained(tmp_path / "bank", backbone).evidence(tests)[name], log_p)
    some = make(backbone, scoring=scoring).fit(*shots_of(pictures, CLASSES[1:]))
    some.add_classes(*shots_of(pictures, CLASSES[:1]))
    torch.testing.assert_close(some.evidence(tests)[name], log_p, rtol=0, atol=1e-4)
    some.remove_classes(["dc-9"])
    torch.testing.assert_close(some.evidence(tests)[name], log_p[:, [0, 2]].log_softmax(1), rtol=0, atol=1e-4)
    some.remove_classes(CLASSES[:1]).remove_classes(CLASSES[2:])  # the last one
    assert not len(some.classes_)


def test_zero_shot_and_tip_adapter_are_the_baselines_but_for_a_temperature(
    backbone: Backbone, pictures: dict[str, list[Path]], tests: list[Path], tmp_path: Path
) -> None:
    model = f"local-dir:{save_tiny_clip(tmp_path, 'transformer')}"
    names = (f"clip:{model}", f"tip-adapter:{model}")
    scoring = replace(SCORING, witnesses=names, witness_weights=(1.0, 1.0))
    classifier = make(backbone, scoring=scoring, concept="plane").fit(*shots_of(pictures, CLASSES))
    evidence, templates = classifier.evidence(tests), prompt_templates("plane")
    seen = [classifier.encoder_.prepare(image).pixels_CHW.permute(1, 2, 0).numpy() for image in tests]
    clip = OpenClip(model)
    features = clip.image_features(seen)
    zero_shot = clip.logit_scale * features @ clip.class_weights(CLASSES, templates).T
    views = torch.cat(list(classifier._held[1][1].shots.values())).numpy()
    tip = TipAdapter(clip, templates, baseline_presets.preset_of(clip.model).tip)
    tip.learn(views[:, 0], views[:, 1 + tip.settings.views :].swapaxes(0, 1), np.arange(3).repeat(2), CLASSES)
    for name, logits in zip(names, (zero_shot, tip.logits(features)), strict=True):
        found, expected = evidence[name].numpy(), logits - logits.mean(1, keepdims=True)
        found = found - found.mean(1, keepdims=True)
        np.testing.assert_allclose(found / np.abs(found).max(), expected / np.abs(expected).max(), atol=1e-3)


def test_names_that_clip_cannot_tell_apart_are_named() -> None:
    with pytest.raises(ValueError, match="CLIP reads 'Rose' and 'rose' as one text"):
        check_told_apart(["Rose", "tulip", "rose"], torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]))


def test_a_class_with_more_shots_has_no_heavier_cache(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def unit(rows: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(rows / np.linalg.norm(rows, axis=-1, keepdims=True)).float()

    name = f"tip-adapter:local-dir:{save_tiny_clip(tmp_path, 'transformer')}"
    witness = make_witness(name, ImageGeometry(size=(32, 64)), "plane")
    centres, width = rng.normal(0, 1, (3, 16)), 1 + 2 * witness.settings.views  # type: ignore[attr-defined]
    counts = dict(zip(CLASSES, (16, 16, 1), strict=True))
    views = {x: unit(c + rng.normal(0, 1, (counts[x], width, 16))) for x, c in zip(CLASSES, centres, strict=True)}
    judge = witness.judge(views, witness.learn(views, TRAINING))
    asked = unit(np.concatenate([c + rng.normal(0, 1, (100, 16)) for c in centres]))
    chosen = judge.log_probabilities(asked).argmax(1)
    assert 30 < (chosen == 2).sum() < 170  # a third is 100
    one_shot = {x: v[:1] for x, v in views.items()}
    assert witness.learn(one_shot, TRAINING)["weights"].tolist() == [1.0, 1.0, 1.0]
