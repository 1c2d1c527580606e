"""Baselines on a tiny CLIP with random weights, each against its formula written a second way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import permutations

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler
from small_pictures import NAMES, pictures

from fewshot_diti.backbone import Backbone
from fewshot_diti.baselines import (
    Baseline,
    LogisticProbe,
    NearestMean,
    NearestNeighbour,
    OpenClip,
)
from fewshot_diti.baselines.base import KeptFeatures, LazyImages, opened
from fewshot_diti.baselines.presets import PRESETS, preset_of
from fewshot_diti.baselines.probe import logistic_head
from fewshot_diti.baselines.unet_features import UnetFeatures
from fewshot_diti.baselines.views import ColourJitter
from fewshot_diti.data import ImageGeometry, ImageSet
from fewshot_diti.training import TrainingConfig


def mean_colour(images: Sequence[Image.Image], *, keep: bool = True) -> np.ndarray:
    return np.stack([np.asarray(image).mean((0, 1)) for image in images])


def test_features_of_one_picture_are_computed_once() -> None:
    asked: list[int] = []

    def compute(images: list[Image.Image]) -> np.ndarray:
        asked.append(len(images))
        return mean_colour(images)

    features, (images, _) = KeptFeatures(compute), pictures(2, 0)
    first = features([*images, images[0]])
    again = features([np.asarray(images[0]), images[1]])
    assert asked == [6]
    np.testing.assert_array_equal(first[6], first[0])
    np.testing.assert_array_equal(again, first[:2])


def test_a_slice_of_a_set_decodes_nothing_and_batches_decode_as_they_are_asked_for() -> None:
    decoded: list[int] = []

    def source(number: int) -> Callable[[], np.ndarray]:
        def decode() -> np.ndarray:
            decoded.append(number)
            return np.full((2, 2, 3), number, np.uint8)

        return decode

    images = LazyImages(
        ImageSet(
            images=[source(i) for i in range(6)],
            labels=np.zeros(6, int),
            class_names=("one",),
            names=tuple(map(str, range(6))),
        )
    )
    ids = images.ids  # one pass
    decoded.clear()
    odd = images[1::2]
    assert decoded == [] and len(odd) == 3 and odd.ids == ids[1::2]
    batches = opened(odd, 2)
    assert decoded == []
    assert [np.asarray(image)[0, 0, 0] for image in next(batches)] == [1, 3] and decoded == [1, 3]
    assert len(next(batches)) == 1 and next(batches, None) is None


def test_presets_are_those_of_the_model_that_is_trained() -> None:
    pocket = OpenClip("pocket").model
    assert preset_of(pocket) is PRESETS["small"] and preset_of(pocket).lora.rank == 16
    with torch.device("meta"):
        large = open_clip.CLIP(**open_clip.get_model_config("ViT-B-32"))
    assert preset_of(large) is PRESETS["published"]
    assert (preset_of(large).lora.rank, preset_of(large).lora.lr, preset_of(large).tip.one_shot) == (
        2,
        2e-4,
        (1.0, 5.5),
    )


def test_the_logistic_probe_is_scikit_learns_with_the_strength_that_cross_validates_best() -> None:
    (shots, labels), (test, _) = pictures(4, 0), pictures(3, 1)
    probe = LogisticProbe({"mean colour": mean_colour}).fit(shots, labels)
    scaler = StandardScaler().fit(mean_colour(shots))
    x, y = scaler.transform(mean_colour(shots)), np.searchsorted(sorted(NAMES), labels)
    strengths = np.logspace(-3, 2, 6)
    scores = [cross_val_score(LogisticRegression(C=c, max_iter=1000), x, y, cv=4).mean() for c in strengths]
    best = LogisticRegression(C=strengths[int(np.argmax(scores))], max_iter=1000).fit(x, y)
    expected = best.predict_proba(scaler.transform(mean_colour(test)))
    np.testing.assert_allclose(probe.predict_proba(test), expected, atol=1e-3)
    assert probe.classes_.tolist() == sorted(NAMES)


def test_recoloured_copies_of_the_kept_shots_alone_help_to_choose_the_strength() -> None:
    (shots, labels), (test, _) = pictures(4, 0), pictures(3, 1)

    def darker(image: Image.Image) -> Image.Image:
        return Image.fromarray(np.asarray(image) // 2)

    features = KeptFeatures(mean_colour)
    probe = LogisticProbe({"mean colour": features}, recolour=darker, copies=1).fit(shots, labels)
    plain, dark = mean_colour(shots), mean_colour([darker(image) for image in shots])
    scaler = StandardScaler().fit(np.concatenate([plain, dark]))
    x, z, y = scaler.transform(plain), scaler.transform(dark), np.searchsorted(sorted(NAMES), labels)

    def merit(c: float) -> float:
        right = []
        for kept, held in StratifiedKFold(4).split(x, y):
            model = LogisticRegression(C=c, max_iter=1000)
            model.fit(np.concatenate([x[kept], z[kept]]), np.concatenate([y[kept], y[kept]]))
            right.append(model.score(x[held], y[held]))
        return float(np.mean(right))

    best = LogisticRegression(C=max(np.logspace(-3, 2, 6), key=merit), max_iter=1000)
    best.fit(np.concatenate([x, z]), np.concatenate([y, y]))
    np.testing.assert_allclose(
        probe.predict_proba(test), best.predict_proba(scaler.transform(mean_colour(test))), atol=1e-3
    )
    assert len(features._kept) == len(shots) + len(test)  # nobody asks for the copies again
    for kept, held in logistic_head(y, copies=1)[-1].cv:  # copies of held-out shots are held out too
        assert set(kept) == (set(range(24)) - set(held)) - {i + 12 for i in held}
        assert sorted(set(kept) | set(held)) == sorted(set(range(24)) - {i + 12 for i in held})


def test_recolouring_is_as_strong_as_class_tokens_are_jittered() -> None:
    image, still = pictures(1, 0)[0][0], {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
    assert np.array_equal(ColourJitter.of(TrainingConfig(steps=1, **still))(image), image)
    permute = ColourJitter.of(TrainingConfig(steps=1, permute_channels=True, **still))
    seen = {tuple(np.asarray(permute(image)).mean((0, 1)).round(6)) for _ in range(100)}
    assert seen == set(permutations(np.asarray(image).mean((0, 1)).round(6)))
    darkest = ColourJitter.of(TrainingConfig(steps=1, **still | {"brightness": 0.5}))
    ratios = [np.asarray(darkest(image)).mean() / np.asarray(image).mean() for _ in range(100)]
    assert 0.48 < min(ratios) < 0.6 and max(ratios) > 1.1  # bright pixels are cut off at 255


@pytest.mark.parametrize(
    ("baseline", "reference"),
    [
        (
            NearestMean({"mean colour": mean_colour}),
            make_pipeline(StandardScaler(with_std=False), Normalizer(), NearestCentroid()),
        ),
        (NearestNeighbour(mean_colour), KNeighborsClassifier(n_neighbors=1)),
    ],
)
def test_nearest_mean_and_neighbour_agree_with_scikit_learn(
    baseline: Baseline, reference: Pipeline | KNeighborsClassifier
) -> None:
    (shots, labels), (test, _) = pictures(3, 0), pictures(20, 1)
    reference.fit(mean_colour(shots), labels)
    np.testing.assert_array_equal(baseline.fit(shots, labels).predict(test), reference.predict(mean_colour(test)))


@pytest.mark.parametrize("kind", [LogisticProbe, NearestMean])
def test_the_shots_choose_the_features_that_tell_classes_apart_and_one_shot_takes_the_first(
    kind: type[LogisticProbe | NearestMean],
) -> None:
    def nothing(images: Sequence[Image.Image], *, keep: bool = True) -> np.ndarray:
        return np.random.default_rng(0).normal(size=(len(images), 3))

    candidates = {"nothing": nothing, "mean colour": mean_colour}
    assert kind(candidates).fit(*pictures(4, 0)).chosen_ == "mean colour"
    assert kind(candidates).fit(*pictures(1, 0)).chosen_ == "nothing"


def test_unet_features_are_what_the_blocks_hold(backbone: Backbone) -> None:
    images, _ = pictures(1, 0)
    geometry = ImageGeometry(size=backbone.image_size, resize="squash")
    features = UnetFeatures(backbone, geometry, "a photo of an aircraft", positions=(4, 4), batch_size=2)
    candidates = features.candidates()
    assert len(candidates) == 3 * 9
    first = next(iter(candidates))
    assert first == f"up 2, t = {round(0.06 * backbone.num_train_timesteps)}"
    kept = []
    handle = backbone.unet.up_blocks[2].register_forward_hook(lambda _, __, out: kept.append(out))
    pixels = torch.stack([geometry.pixels(image) for image in images])
    latents, t = backbone.encode_images(pixels)[0], torch.full((3,), round(0.06 * backbone.num_train_timesteps))
    a = backbone.alphas_cumprod[t][:, None, None, None].float()
    with torch.no_grad():
        text = backbone.encode_text(backbone.tokenize(["a photo of an aircraft"] * 3))
        backbone.unet(a.sqrt() * latents, t, text)
    handle.remove()
    pooled = torch.nn.functional.adaptive_avg_pool2d(kept[0], 4 if kept[0].shape[2] > 4 else kept[0].shape[2:])
    np.testing.assert_allclose(candidates[first](images), pooled.flatten(1).numpy(), atol=2e-3, rtol=2e-3)
    shapes = {name: f(images).shape for name, f in candidates.items()}
    assert all(n == 3 and width > 0 for n, width in shapes.values())
