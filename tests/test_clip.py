"""CLIP as a classifier: zero-shot, Tip-Adapter, LoRA."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from scipy.special import softmax
from small_clip import TOWERS, save_tiny_clip
from small_pictures import NAMES, pictures

from fewshot_diti.baselines import (
    Baseline,
    ClipLora,
    OpenClip,
    TipAdapter,
    ZeroShotClip,
)
from fewshot_diti.baselines.clip import prompt_templates
from fewshot_diti.baselines.clip_lora import LoraSettings
from fewshot_diti.baselines.imagenet import FineTuned, ImageNetwork, TuningSettings
from fewshot_diti.baselines.tip_adapter import ALPHAS, BETAS, TipSettings

TEMPLATES = prompt_templates("aircraft")


@pytest.fixture(scope="module", params=sorted(TOWERS))
def clip(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> OpenClip:
    return OpenClip(f"local-dir:{save_tiny_clip(tmp_path_factory.mktemp('clip'), request.param)}")


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


def test_a_clip_without_weights_is_refused() -> None:
    for name, text in (("ViT-B-32", "Weights of ViT-B-32: .*openai"), ("ViT-X/openai", "called 'ViT-X'")):
        with pytest.raises(ValueError, match=f"is no OpenCLIP model with weights.*{text}"):
            OpenClip(name)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (save_tiny_clip(tmp_path, "transformer") / "open_clip_model.safetensors").rename(tmp_path / "open_clip_model.pt")
    with pytest.raises(ValueError, match="holds no weights"):
        OpenClip(f"local-dir:{tmp_path}")
