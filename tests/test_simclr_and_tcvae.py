"""Methods that learn features of latents without the U-Net, each part against another computation."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from test_represent_command import command
from test_representation import images_as_latents, latents_of, training
from torch import Tensor

from fewshot_diti import Backbone, cli
from fewshot_diti.representation import (
    DitiConfig,
    Latents,
    PdaeConfig,
    Representation,
    SimclrConfig,
    TcvaeConfig,
    train,
)
from fewshot_diti.representation.encoder import LatentDecoder
from fewshot_diti.representation.methods import METHODS, from_dict, to_dict
from fewshot_diti.representation.simclr import VIEWS, nt_xent, views_of
from fewshot_diti.representation.tcvae import divergence
from recipes.pocket.representation import run
from recipes.representation_simclr import SimclrTraining
from recipes.representation_simclr import method as simclr_of
from recipes.representation_tcvae import TcvaeTraining
from recipes.representation_tcvae import method as tcvae_of


def with_views(count: int, seed: int) -> Latents:
    """Views that are the image and a little noise."""
    found = images_as_latents(count, seed)
    noise = latents_of(count * VIEWS, seed + 100).view(count, VIEWS, 4, 8, 16)
    return Latents(
        mean_Nchw=found.mean_Nchw, std_Nchw=found.std_Nchw, views_NVchw=found.mean_Nchw[:, None] + 0.1 * noise.half()
    )


def test_the_contrastive_loss_is_that_of_loops_over_pairs() -> None:
    heads, temperature = torch.randn(8, 5, dtype=torch.float64), 0.3
    loss, accuracy = nt_xent(heads, temperature)
    unit = [h / h.norm() for h in heads]
    losses, right = [], []
    for i in range(8):
        other = (i + 4) % 8
        similar = {j: float(unit[i] @ unit[j]) / temperature for j in range(8) if j != i}
        losses.append(math.log(sum(map(math.exp, similar.values()))) - similar[other])
        right.append(max(similar, key=lambda j: similar[j]) == other)
    assert float(loss) == pytest.approx(sum(losses) / 8) and float(accuracy) == sum(right) / 8


def test_the_parts_of_the_divergence_are_those_of_loops_and_sum_to_the_whole() -> None:
    g = torch.Generator().manual_seed(0)
    mean, log_variance = torch.randn(2, 6, 3, generator=g, dtype=torch.float64)
    z = mean + torch.randn(6, 3, generator=g, dtype=torch.float64) * (log_variance / 2).exp()
    parts = divergence(z, mean, log_variance, num_images=40)

    def log_density(x: Tensor, m: Tensor, s: Tensor) -> float:
        return float(torch.distributions.Normal(m, (s / 2).exp()).log_prob(x).sum())

    def log_mixture(i: int, dims: slice) -> float:
        each = [math.exp(log_density(z[i, dims], mean[j, dims], log_variance[j, dims])) for j in range(6)]
        return math.log(sum(each) / (40 * 6))

    given = [log_density(z[i], mean[i], log_variance[i]) for i in range(6)]
    joint = [log_mixture(i, slice(None)) for i in range(6)]
    marginals = [sum(log_mixture(i, slice(d, d + 1)) for d in range(3)) for i in range(6)]
    prior = [log_density(z[i], torch.zeros(3), torch.zeros(3)) for i in range(6)]
    expected = (np.subtract(given, joint), np.subtract(joint, marginals), np.subtract(marginals, prior))
    assert [float(x) for x in parts] == pytest.approx([float(x.mean()) for x in expected])
    assert float(sum(parts)) == pytest.approx(np.mean(given) - np.mean(prior))


@pytest.mark.parametrize("size", [(8, 16), (9, 14), (64, 64), (2, 2)])
def test_the_decoder_gives_a_latent_of_the_size_that_was_encoded(size: tuple[int, int]) -> None:
    found = LatentDecoder(4, size, 6)(torch.randn(2, 6))
    assert found.shape == (2, 4, *size) and found[0].std() > 0


def test_views_depend_on_the_image_alone_and_are_not_mirrored() -> None:
    ramp = torch.linspace(-1, 1, 64).expand(3, 32, 64).clone()  # darker on the left
    views = views_of(ramp, "an image")
    assert views.shape == (VIEWS, 3, 32, 64) and views.abs().max() <= 1
    assert torch.equal(views, views_of(ramp, "an image"))
    assert not torch.equal(views, views_of(ramp, "another"))
    assert not any(torch.equal(views[i], views[j]) for i in range(VIEWS) for j in range(i))
    for k in range(40):
        assert all(v[:, :, :8].mean() < v[:, :, -8:].mean() for v in views_of(ramp, f"image {k}"))


def test_a_step_compares_two_different_views_of_each_of_several_different_images(backbone: Backbone) -> None:
    count = 5
    views = torch.arange(count * VIEWS).view(count, VIEWS, 1, 1, 1).expand(-1, -1, 4, 8, 16)
    latents = Latents(mean_Nchw=torch.zeros(count, 4, 8, 16), std_Nchw=torch.zeros(count, 4, 8, 16), views_NVchw=views)
    network = SimclrConfig(dims=8).build(backbone)
    one, other = (x[:, 0, 0, 0] for x in network.draw(latents, 4, torch.Generator().manual_seed(0)))
    assert torch.equal(one // VIEWS, other // VIEWS) and (one != other).all()
    assert len(set((one // VIEWS).tolist())) == 4
    assert len(network.draw(latents, 99, torch.Generator())[0]) == count


def test_simclr_learns_to_match_views_of_images_it_has_not_seen(backbone: Backbone, tmp_path: Path) -> None:
    config = training(tmp_path, steps=30, batch_size=16, lr=1e-3, validate_every=1000, save_seconds=1e9, ema_decay=0.5)
    learned = train(backbone, SimclrConfig(dims=16), with_views(32, 0), with_views(16, 1), config)
    unseen = with_views(16, 2)
    z = learned.encode(unseen.views_NVchw[:, :2].transpose(0, 1).flatten(0, 1).float())
    with torch.no_grad():
        before = SimclrConfig(dims=16).build(backbone)
        loss, matched = nt_xent(learned.network.head(z), 0.5)
        assert float(matched) > 0.9 and float(loss) < float(nt_xent(before.head(z), 0.5)[0])


def test_the_tcvae_restores_latents_better_than_their_mean_and_beta_weighs_the_correlation(
    backbone: Backbone, tmp_path: Path
) -> None:
    cause = torch.randn(64, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    mean = cause * latents_of(1, 3) + 0.1 * latents_of(64, 4)
    images = Latents(mean_Nchw=mean, std_Nchw=torch.zeros_like(mean))
    settings = {"steps": 60, "batch_size": 16, "lr": 3e-3, "ema_decay": 0.5, "save_seconds": 1e9, "log_every": 99}
    network = train(backbone, TcvaeConfig(dims=4, beta=1), images, images, training(tmp_path, **settings)).network
    found = {}
    with torch.no_grad():
        for network.beta in (1, 5):
            batch = network.draw(images, 64, torch.Generator().manual_seed(1))
            found[network.beta] = {name: float(value) for name, value in network(*batch).items()}
    numel, whole = mean[0].numel(), found[1]
    assert whole["error"] < 0.8 * float((mean - mean.mean(0)).square().flatten(1).sum(1).mean() / 2)
    parts = sum(whole[x] for x in ("error", "mutual_information", "total_correlation", "dimension_wise_kl"))
    assert whole["loss"] == pytest.approx(parts / numel, rel=1e-5)
    assert found[5]["loss"] - whole["loss"] == pytest.approx(4 * whole["total_correlation"] / numel, rel=1e-3)


@pytest.mark.parametrize("method", [SimclrConfig(dims=6), TcvaeConfig(dims=6, beta=2.0)], ids=lambda m: m.name)
def test_what_was_learned_is_saved_gives_features_and_restores_nothing(
    method: SimclrConfig | TcvaeConfig, backbone: Backbone, pictures: dict[str, list[Path]], tmp_path: Path
) -> None:
    learned = train(backbone, method, with_views(6, 0), with_views(3, 1), training(tmp_path))
    loaded = Representation.from_pretrained(tmp_path / "representation", backbone)
    image = next(iter(pictures.values()))[0]
    features = loaded.features(image)
    assert features.shape == (1, 6) and np.array_equal(features, learned.features(image))
    assert loaded.method == method == from_dict(to_dict(method)) and METHODS[method.name] is type(method)
    with pytest.raises(ValueError, match="has features and restores nothing"):
        loaded.predict_noise(latents_of(1), torch.tensor([5]), torch.zeros(1, 6))
    with pytest.raises(ValueError, match="ties no dimensions"):
        loaded.subset(0, 100)


def test_training_that_is_started_again_goes_on(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = TcvaeConfig(dims=6), with_views(6, 0), with_views(3, 1)
    whole = train(backbone, *given, training(tmp_path / "whole"))
    draw, calls = type(whole.network).draw, []

    def die(self: object, *rest: object) -> object:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return draw(self, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(whole.network), "draw", die)
        train(backbone, *given, training(tmp_path / "killed"))
    resumed = train(backbone, *given, training(tmp_path / "killed"))
    for name, value in whole.network.state_dict().items():
        torch.testing.assert_close(resumed.network.state_dict()[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SimclrConfig(dims=0), "dims=0"),
        (lambda: SimclrConfig(temperature=0), "temperature=0"),
        (lambda: TcvaeConfig(dims=-1), "dims=-1"),
        (lambda: TcvaeConfig(beta=float("nan")), "beta=nan"),
        (lambda: from_dict({"method": "tcvae", "dims": "six"}), "dims"),
    ],
)
def test_wrong_settings_are_refused(make: object, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()  # type: ignore[operator]


def test_the_contrastive_loss_is_computed_in_full_precision_under_autocast(backbone: Backbone) -> None:
    network = SimclrConfig(dims=8, temperature=0.1).build(backbone)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = network(latents_of(16), latents_of(16, 1))
        heads = network.head(network.encode(torch.cat([latents_of(16), latents_of(16, 1)])))
    assert found["loss"].dtype == torch.float32
    torch.testing.assert_close(found["loss"], nt_xent(heads.float(), 0.1)[0], rtol=1e-6, atol=0)


def test_the_parts_are_off_by_constants_where_z_says_nothing_of_the_image() -> None:
    zeros = torch.zeros(50, 4, dtype=torch.float64)
    parts = divergence(torch.randn(50, 4, dtype=torch.float64), zeros, zeros, num_images=1000)
    size = math.log(1000)
    assert [float(x) / size for x in parts] == pytest.approx([1, 3, -4]) and float(sum(parts)) == pytest.approx(
        0, abs=1e-9
    )


def test_simclr_needs_views(backbone: Backbone, tmp_path: Path) -> None:
    few = images_as_latents(4, 0)
    with pytest.raises(ValueError, match="pass latents with views"):
        train(backbone, SimclrConfig(dims=6), few, few, training(tmp_path))
    with pytest.raises(ValueError, match="batch_size=1; SimCLR compares the images of a batch"):
        train(backbone, SimclrConfig(dims=6), with_views(4, 0), with_views(4, 0), training(tmp_path, batch_size=1))
    with pytest.raises(ValueError, match="Views of 3 images beside latents of 4"):
        Latents(mean_Nchw=few.mean_Nchw, std_Nchw=few.std_Nchw, views_NVchw=torch.zeros(3, 2, 4, 8, 16))


@pytest.mark.parametrize("method", ["simclr", "tcvae"])
def test_the_command_learns_by_either_method(
    method: str, pictures: dict[str, list[Path]], backbone_folder: Path, tmp_path: Path
) -> None:
    more = ("--method", method, "--dims", "6", "--beta", "3", "--batch_size", "3")
    assert cli.main(command(pictures, backbone_folder, tmp_path, *more)) == 0
    learned = Representation.from_pretrained(tmp_path / "representation", dtype="float32").method
    assert learned == (SimclrConfig(dims=6) if method == "simclr" else TcvaeConfig(dims=6, beta=3.0))


def test_recipes_learn_from_renders(backbone_folder: Path, renders: Path, tmp_path: Path) -> None:
    common = {
        "data": renders, "held_out": renders / "held_out.json", "latents": tmp_path, "backbone": str(backbone_folder),
        "steps": 2, "batch_size": 3, "dims": 5, "warmup": 1, "mixed_precision": "no",
    }  # fmt: skip
    found = run(SimclrTraining(output_dir=tmp_path / "simclr", **common), simclr_of)  # type: ignore[arg-type]
    assert found.method == SimclrConfig(dims=5) and (tmp_path / "latents-train-views.safetensors").is_file()
    found = run(TcvaeTraining(output_dir=tmp_path / "tcvae", **common), tcvae_of)  # type: ignore[arg-type]
    assert found.method == TcvaeConfig(dims=5)


def test_methods_of_the_backbone_are_the_ones_with_a_batch_of_32() -> None:
    assert [x.batch_size for x in METHODS.values()] == [32, 32, 256, 256]
    assert [PdaeConfig, DitiConfig, SimclrConfig, TcvaeConfig] == [*METHODS.values()]
