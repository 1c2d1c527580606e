"""PDAE and DiTi on the tiny backbone, each part against another computation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import save_tiny_backbone
from torch import Tensor

from fewshot_diti import Backbone, loop
from fewshot_diti.hashes import hash_backbone
from fewshot_diti.representation import DitiConfig, Latents, PdaeConfig, Representation, RepresentationTraining, train
from fewshot_diti.representation.encoder import LatentEncoder
from fewshot_diti.representation.estimator import GradientEstimator, frozen_pass
from fewshot_diti.representation.methods import METHODS, from_dict, to_dict
from fewshot_diti.representation.model import embed
from fewshot_diti.representation.objectives import denoising_error, posterior_mean_gap
from fewshot_diti.representation.pdae import PdaeNetwork
from fewshot_diti.representation.sampling import exchanged, invert, sample
from fewshot_diti.representation.training import choose_sizes
from fewshot_diti.timesteps import pdae_weights

PROMPT = "a photo of an aircraft"
SIZES = (2, 3, 1, 4)
TIMES = torch.tensor([0, 250, 600, 999])


@pytest.fixture(scope="module")
def v_backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """A tiny backbone that predicts v."""
    folder = save_tiny_backbone(tmp_path_factory.mktemp("v"), prediction_type="v_prediction")
    return Backbone.from_pretrained(folder, dtype=torch.float32, device="cpu")


def latents_of(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 4, 8, 16, generator=torch.Generator().manual_seed(seed))


def shaken(network: PdaeNetwork, seed: int = 0) -> PdaeNetwork:
    """The network with G different from zero."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (*network.estimator.out.parameters(), *network.estimator.modulations.parameters()):
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=g))
    return network


@pytest.mark.parametrize("of", ["backbone", "v_backbone"])
def test_a_frozen_pass_gives_the_noise_whose_error_the_backbone_reports(
    of: str, request: pytest.FixtureRequest
) -> None:
    backbone: Backbone = request.getfixturevalue(of)
    x_0, noise, text = latents_of(4), latents_of(4, 1), embed(backbone, PROMPT)
    found = frozen_pass(backbone, backbone.add_noise(x_0, noise, TIMES), TIMES, text)
    with torch.no_grad():
        errors = backbone.errors(x_0, noise, TIMES, text.expand(4, -1, -1))
    torch.testing.assert_close(denoising_error(found.noise_Bchw, noise), errors, rtol=1e-4, atol=1e-6)


def test_a_frozen_pass_leaves_no_hooks_behind_and_no_gradients(backbone: Backbone) -> None:
    found = frozen_pass(backbone, latents_of(2), TIMES[:2], embed(backbone, PROMPT))
    assert not any(m._forward_pre_hooks for m in backbone.unet.modules())
    assert not found.noise_Bchw.requires_grad and not found.calls[0].hidden_states.requires_grad
    assert len(found.calls) == 5  # the middle and four up blocks


@pytest.mark.parametrize("of", ["backbone", "v_backbone"])
@pytest.mark.parametrize("method", [PdaeConfig(dims=8), DitiConfig(sizes=SIZES)], ids=lambda m: m.name)
def test_before_training_the_prediction_is_the_backbones(
    of: str, method: PdaeConfig | DitiConfig, request: pytest.FixtureRequest
) -> None:
    backbone: Backbone = request.getfixturevalue(of)
    frozen = frozen_pass(backbone, latents_of(4), TIMES, embed(backbone, PROMPT))
    assert torch.equal(method.build(backbone)(latents_of(4, 1), frozen, TIMES), frozen.noise_Bchw)


def test_replayed_without_a_feature_the_copies_give_what_the_frozen_decoder_gives(backbone: Backbone) -> None:
    estimator = GradientEstimator(backbone.unet, 8)
    estimator.out.load_state_dict(backbone.unet.conv_out.state_dict())
    frozen = frozen_pass(backbone, latents_of(4), TIMES, embed(backbone, PROMPT))
    with torch.no_grad():
        assert torch.equal(estimator(frozen.calls, torch.randn(4, 8)), frozen.noise_Bchw)


def test_features_scale_and_shift_after_the_second_norm_of_each_residual_block(backbone: Backbone) -> None:
    """By another way: scale and shift folded into the norm's own weights, for one feature."""
    network = shaken(PdaeConfig(dims=8).build(backbone))
    folded = shaken(PdaeConfig(dims=8).build(backbone))
    frozen = frozen_pass(backbone, latents_of(1), TIMES[:1], embed(backbone, PROMPT))
    z = torch.randn(1, 8)
    with torch.no_grad():
        folded.load_state_dict(network.state_dict())
        embedded = F.silu(network.estimator.embed(z))[0]
        for resnet, modulation in zip(folded.estimator._resnets(), folded.estimator.modulations, strict=True):
            scale, shift = modulation(embedded).chunk(2)
            resnet.norm2.weight *= 1 + scale
            resnet.norm2.bias.copy_(resnet.norm2.bias * (1 + scale) + shift)
            for parameter in modulation.parameters():
                parameter.zero_()
        one, other = (n.estimator(frozen.calls, z) for n in (network, folded))
    assert one.std() > 0.01
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_shift_of_the_prediction_is_in_units_of_the_noise(backbone: Backbone) -> None:
    network = shaken(PdaeConfig(dims=8).build(backbone))
    frozen = frozen_pass(backbone, latents_of(4), TIMES, embed(backbone, PROMPT))
    z = torch.randn(4, 8)
    with torch.no_grad():
        moved = frozen.noise_Bchw - network.predict_noise(frozen, TIMES, z)
        gradient = network.estimator(frozen.calls, z)
    for row, t in enumerate(TIMES):
        sigma = (1 - float(backbone.scheduler.alphas_cumprod[t])) ** 0.5
        torch.testing.assert_close(moved[row], sigma * gradient[row], rtol=1e-3, atol=1e-5)


def test_the_encoder_of_the_pocket_has_two_thousand_positions_and_sixteen_hundred_thousand_weights() -> None:
    encoder = LatentEncoder(32, (8, 16), 512)
    assert encoder.layers[-1].in_features == 2048
    assert sum(p.numel() for p in encoder.parameters()) == pytest.approx(1.6e6, rel=0.01)
    assert LatentEncoder(4, (64, 64), 512)(torch.randn(2, 4, 64, 64)).shape == (2, 512)
    assert LatentEncoder(4, (9, 14), 16)(torch.randn(2, 4, 9, 14)).shape == (2, 16)


def test_a_gradient_mode_changes_no_value_and_teaches_the_newest_subset_alone(backbone: Backbone) -> None:
    base, stop = (shaken(DitiConfig(sizes=SIZES, mode=m).build(backbone)) for m in ("base", "stop_grad"))
    stop.load_state_dict(base.state_dict())
    frozen = frozen_pass(backbone, latents_of(4), TIMES, embed(backbone, PROMPT))
    gradients = []
    for network in (base, stop):
        z = torch.randn(4, sum(SIZES), generator=torch.Generator().manual_seed(3)).requires_grad_(True)
        predicted = network.predict_noise(frozen, TIMES, z)
        gradients.append((predicted.detach(), torch.autograd.grad(predicted.square().sum(), z)[0] != 0))
    (one, touched_base), (other, touched_stop) = gradients
    assert torch.equal(one, other)
    ends = torch.tensor(SIZES).cumsum(0)
    for row, end in enumerate(ends):  # the four timesteps lie in the four subsets
        dims = torch.arange(sum(SIZES))
        assert torch.equal(touched_base[row], dims < end)
        assert torch.equal(touched_stop[row], (dims < end) & (dims >= end - SIZES[row]))


def test_features_of_later_subsets_do_not_move_the_prediction_at_small_timesteps(backbone: Backbone) -> None:
    network = shaken(DitiConfig(sizes=SIZES).build(backbone))
    frozen = frozen_pass(backbone, latents_of(4), TIMES, embed(backbone, PROMPT))
    z = torch.randn(4, sum(SIZES))
    with torch.no_grad():
        before = network.predict_noise(frozen, TIMES, z)
        z[:, SIZES[0] + SIZES[1] :] = 7.0  # the subsets of t >= 500
        moved = (network.predict_noise(frozen, TIMES, z) - before).flatten(1).abs().amax(1)
    assert moved[:2].tolist() == [0, 0] and moved[2:].min() > 1e-4


def test_weights_of_the_loss_are_as_published(backbone: Backbone) -> None:
    weights = pdae_weights(backbone.alphas_cumprod)
    assert weights[[0, 100]].tolist() == pytest.approx([0.0017, 0.131], rel=0.03)
    assert (int(weights.argmax()), float(weights.max())) == (673, pytest.approx(0.7225, abs=1e-4))


def test_the_gap_is_the_distance_of_the_posterior_means(backbone: Backbone) -> None:
    """By the posterior's own coefficients of x_0 and x_t (Ho et al., DDPM, eq. 7)."""
    abar = backbone.alphas_cumprod
    x_0, noise, predicted = (latents_of(1, seed).double() for seed in range(3))
    error = denoising_error(predicted, noise)[0]
    found = posterior_mean_gap(error.expand(1000), abar)
    for t in (1, 30, 500, 999):
        before, alpha = abar[t - 1], abar[t] / abar[t - 1]
        x_t = abar[t].sqrt() * x_0 + (1 - abar[t]).sqrt() * noise
        guess = (x_t - (1 - abar[t]).sqrt() * predicted) / abar[t].sqrt()
        means = [
            before.sqrt() * (1 - alpha) / (1 - abar[t]) * x + alpha.sqrt() * (1 - before) / (1 - abar[t]) * x_t
            for x in (x_0, guess)
        ]
        torch.testing.assert_close(found[t], (means[0] - means[1]).square().mean(), rtol=1e-8, atol=0)
    torch.testing.assert_close(found[0], error * (1 - abar[0]) / abar[0])


def images_as_latents(count: int, seed: int) -> Latents:
    mean = latents_of(count, seed).half()
    return Latents(mean_Nchw=mean, std_Nchw=mean.abs() / 10)


def training(output_dir: Path, **changes: object) -> RepresentationTraining:
    settings: dict[str, object] = {
        "prompt": PROMPT, "steps": 6, "batch_size": 4, "lr": 1e-2, "warmup": 2, "mixed_precision": "no",
        "log_every": 1, "validate_every": 3, "save_seconds": 0.0,
    }  # fmt: skip
    return RepresentationTraining(output_dir=output_dir, **settings | changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def trained(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> tuple[Representation, Path]:
    folder = tmp_path_factory.mktemp("trained")
    method = DitiConfig(sizes=SIZES, mode="stop_grad")
    return train(backbone, method, images_as_latents(12, 0), images_as_latents(3, 1), training(folder)), folder


def test_training_moves_the_network_and_leaves_the_backbone_alone(
    trained: tuple[Representation, Path], backbone: Backbone
) -> None:
    network = trained[0].network
    assert all(p.abs().max() > 0 for p in network.estimator.out.parameters())
    assert network.estimator.modulations[0].weight.abs().max() > 0
    parts = backbone.vae, backbone.tokenizer, backbone.text_encoder, backbone.unet, backbone.scheduler
    assert hash_backbone(*parts) == backbone.hash
    assert not any(p.requires_grad for p in backbone.unet.parameters())


def test_training_lowers_the_loss_below_the_backbones(backbone: Backbone, tmp_path: Path) -> None:
    """Two images whose latents differ from noise in sign alone: the feature tells them apart at every timestep."""
    mean = torch.cat([torch.ones(1, 4, 8, 16), -torch.ones(1, 4, 8, 16)])
    two = Latents(mean_Nchw=mean, std_Nchw=torch.zeros_like(mean))
    config = training(tmp_path, steps=50, batch_size=4, validate_every=1000, save_seconds=1e9, ema_decay=0.9)
    learned = train(backbone, PdaeConfig(dims=8), two, two, config)
    noise, t = latents_of(2), torch.tensor([600, 600])
    noisy = backbone.add_noise(mean, noise, t)
    with torch.no_grad():
        text = embed(backbone, PROMPT)
        e_theta = denoising_error(frozen_pass(backbone, noisy, t, text).noise_Bchw, noise)
        right, swapped = (
            denoising_error(learned.predict_noise(noisy, t, learned.encode(x)), noise) for x in (mean, mean.flip(0))
        )
    assert (right < 0.8 * e_theta).all() and (right < swapped).all()


def test_a_killed_run_ends_where_an_uninterrupted_one_does(
    trained: tuple[Representation, Path], backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, calls = loop.save_checkpoint, []

    def save_then_die(*args: object) -> None:
        save(*args)  # type: ignore[arg-type]
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    arguments = trained[0].method, images_as_latents(12, 0), images_as_latents(3, 1), training(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "save_checkpoint", save_then_die)
        train(backbone, *arguments)
    resumed = train(backbone, *arguments)
    for name, value in trained[0].network.state_dict().items():
        torch.testing.assert_close(resumed.network.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_a_checkpoint_of_other_images_or_another_method_is_refused(
    trained: tuple[Representation, Path], backbone: Backbone
) -> None:
    config, unseen = training(trained[1]), images_as_latents(3, 1)
    for method, seen in (
        (trained[0].method, images_as_latents(12, 5)),
        (DitiConfig(sizes=SIZES, mode="base"), images_as_latents(12, 0)),
    ):
        with pytest.raises(ValueError, match="was made from other data or settings"):
            train(backbone, method, seen, unseen, config)


def test_a_backbone_in_half_precision_needs_mixed_precision(backbone_folder: Path, tmp_path: Path) -> None:
    half = Backbone.from_pretrained(backbone_folder, dtype=torch.bfloat16, device="cpu")
    few = images_as_latents(3, 1)
    with pytest.raises(ValueError, match="on a backbone in bfloat16; load the backbone in float32"):
        train(half, PdaeConfig(dims=8), few, few, training(tmp_path))


def test_a_saved_representation_gives_the_same_features_each_image_by_itself(
    trained: tuple[Representation, Path], backbone: Backbone, pictures: dict[str, list[Path]]
) -> None:
    images = [paths[0] for paths in pictures.values()]
    loaded = Representation.from_pretrained(trained[1] / "representation", backbone)
    features = loaded.features(images)
    assert features.shape == (len(images), sum(SIZES)) and features.dtype == np.float32
    assert np.array_equal(features, trained[0].features(images))
    assert np.array_equal(features[:1], loaded.features(images[0]))
    assert torch.equal(loaded.encode(latents_of(8)), trained[0].encode(latents_of(8)))
    assert loaded.method == trained[0].method and loaded.history == trained[0].history


def test_the_backbone_is_found_again_by_its_name(trained: tuple[Representation, Path]) -> None:
    loaded = Representation.from_pretrained(trained[1] / "representation", dtype=torch.float32, device="cpu")
    assert loaded.backbone.hash == trained[0].backbone.hash


def test_a_representation_of_another_backbone_is_refused(
    trained: tuple[Representation, Path], v_backbone: Backbone
) -> None:
    with pytest.raises(ValueError, match="pass the backbone it was learned on"):
        Representation.from_pretrained(trained[1] / "representation", v_backbone)


def test_a_changed_file_and_a_folder_without_one_are_refused(
    trained: tuple[Representation, Path], backbone: Backbone, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError, match="no complete representation"):
        Representation.from_pretrained(tmp_path, backbone)
    trained[0].save_pretrained(tmp_path)
    weights = tmp_path / "representation.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"representation\.safetensors .* was changed or cut short"):
        Representation.from_pretrained(tmp_path, backbone)


def test_subsets_are_those_of_diti_and_pdae_has_none(trained: tuple[Representation, Path], backbone: Backbone) -> None:
    assert trained[0].subset(250, 750) == slice(2, 6)
    pdae = PdaeConfig(dims=8)
    plain = Representation(
        backbone, pdae, pdae.build(backbone), prompt=PROMPT, geometry=trained[0].geometry, history={}
    )
    with pytest.raises(ValueError, match="learned by 'pdae' ties no dimensions"):
        plain.subset(0, 100)


def test_the_card_names_method_backbone_and_training(trained: tuple[Representation, Path]) -> None:
    card = (trained[1] / "representation" / "README.md").read_text()
    for text in (
        "by diti",
        trained[0].backbone.hash,
        "mode stop_grad",
        "6 of 6 steps of 4 images",
        "32 x 16 pixels",
        PROMPT,
    ):
        assert text in card
    assert str(trained[1].parent) not in card


@pytest.mark.parametrize("method", [PdaeConfig(dims=7), DitiConfig(sizes=(1, 2), mode="stop_grad")])
def test_settings_of_a_method_survive_json(method: PdaeConfig | DitiConfig) -> None:
    import json

    assert from_dict(json.loads(json.dumps(to_dict(method)))) == method
    assert METHODS[method.name] is type(method)


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="known are pdae, diti, simclr, tcvae"):
        from_dict({"method": "pca"})
    with pytest.raises(ValueError, match="dims=0"):
        PdaeConfig(dims=0)
    with pytest.raises(ValueError, match="mode='both'"):
        DitiConfig(sizes=(1,), mode="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="give two of the same"):
        Latents(mean_Nchw=torch.zeros(2, 4, 8, 16), std_Nchw=torch.zeros(1, 4, 8, 16))


def test_sampling_after_inversion_returns_to_the_latents_the_nearer_the_more_steps(
    trained: tuple[Representation, Path],
) -> None:
    x_0 = latents_of(2, 4)
    z = trained[0].encode(x_0)
    off = []
    for steps in (10, 40):
        x_T = invert(trained[0], x_0, z, steps)
        assert (x_T - x_0).std() > 0.1
        off.append(float((sample(trained[0], x_T, z, steps) - x_0).square().mean()))
    assert off[1] < off[0] / 2 and off[1] < 0.05  # of latents with variance 1


def test_sampling_is_the_loop_of_ddim(trained: tuple[Representation, Path]) -> None:
    """By the equation itself, from the schedule: x' = sqrt(abar') x_0 + sqrt(1 - abar') eps."""
    representation, x, z = trained[0], latents_of(2, 5), torch.randn(2, sum(SIZES))
    abar = representation.backbone.alphas_cumprod.float()
    found = sample(representation, x, z, 4)
    for t in (751, 501, 251, 1):
        eps = representation.predict_noise(x, torch.tensor([t, t]), z)
        clean = (x - (1 - abar[t]).sqrt() * eps) / abar[t].sqrt()
        after = abar[max(t - 250, 0)]
        x = after.sqrt() * clean + (1 - after).sqrt() * eps
    torch.testing.assert_close(found, x, rtol=1e-3, atol=1e-4)


def test_exchanged_features_are_those_of_b_in_the_band_alone() -> None:
    a, b = torch.zeros(2, 6), torch.ones(2, 6)
    assert exchanged(a, b, slice(1, 3)).tolist() == [[0, 1, 1, 0, 0, 0]] * 2
    assert not a.any()


def test_sizes_by_loss_follow_the_backbones_weighted_error(backbone: Backbone) -> None:
    sizes = choose_sizes("loss", 640, backbone, images_as_latents(4, 0), PROMPT)
    weights = pdae_weights(backbone.alphas_cumprod)
    # the tiny backbone is untrained: its error is about the same at every timestep
    assert sum(sizes) == 640 and np.corrcoef(sizes, weights[8 :: 1000 // 64][:64])[0, 1] > 0.98
    assert choose_sizes("even", 640, backbone, images_as_latents(4, 0), PROMPT) == (10,) * 64
    assert choose_sizes("published", 512, backbone, images_as_latents(4, 0), PROMPT)[:4] == (2, 2, 2, 4)
    assert sum(choose_sizes("snr", 512, backbone, images_as_latents(4, 0), PROMPT)[:2]) == 10
    with pytest.raises(ValueError, match="'snr' have 512 dimensions, not 640"):
        choose_sizes("snr", 640, backbone, images_as_latents(4, 0), PROMPT)
