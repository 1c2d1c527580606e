"""Joint training equals training alone, equals peft with torch's AdamW, and survives a class that fails."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from processes import run_together
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewshot_diti.backbone import Backbone
from fewshot_diti.bank import Bank
from fewshot_diti.config import Label, TrainingConfig
from fewshot_diti.data import ImageGeometry
from fewshot_diti.distributed import process_state
from fewshot_diti.encoding import Encoder, PreparedImage
from fewshot_diti.lora import Layout, adapted, find_targets
from fewshot_diti.presets import complete
from fewshot_diti.prompts import Prompts
from fewshot_diti.training import (
    ClassShots,
    Trained,
    _ClassStream,
    class_losses,
    lr_scale,
    train_bank,
    train_class_tokens,
)
from fewshot_diti.trials import torch_generator

GENERIC = "a photo of an aircraft"
CONFIG = TrainingConfig(
    steps=30,
    rank=3,
    blocks="all",
    lr_unet=2e-3,
    lr_text_encoder=1e-3,
    lr_schedule="constant",
    max_grad_norm=0.05,
    shots_per_step=1,
    prior_weight=1.0,
    samples_per_batch=4,
)


@pytest.fixture(scope="module")
def backbone64(backbone_folder: Path) -> Backbone:
    return Backbone.from_pretrained(backbone_folder, dtype=torch.float64, device="cpu")


def random_shots(
    backbone: Backbone, label: str, *, num_shots: int = 3, dtype: torch.dtype = torch.float64
) -> ClassShots:
    h, w = (n // backbone.vae_scale_factor for n in backbone.image_size)
    g = torch_generator("shots", label)
    shape = (num_shots, 2, backbone.latent_channels, h, w)
    mean = torch.randn(shape, generator=g, dtype=dtype)
    return ClassShots(label=label, prompt=f"a photo of a hta {label}", mean=mean, std=torch.full_like(mean, 0.1))


def random_prior(backbone: Backbone, dtype: torch.dtype = torch.float64) -> tuple[str, Tensor]:
    return GENERIC, random_shots(backbone, "prior", num_shots=5, dtype=dtype).mean[:, 0]


def initial_rows(trained: Trained, labels: list[str], seed: int = 0) -> Tensor:
    return torch.stack([trained.layout.initial_row(torch_generator(seed, "initial", x)) for x in labels])


def test_joint_training_equals_training_alone(backbone64: Backbone) -> None:
    shots = [random_shots(backbone64, x, num_shots=n) for x, n in (("DC-9", 3), ("A320", 1), ("737", 5))]
    prior = random_prior(backbone64)
    # 2 samples a class and 4 a batch: the third class is absent from every first batch
    joint = train_class_tokens(backbone64, shots, CONFIG, prior=prior)
    alone = torch.cat([train_class_tokens(backbone64, [s], CONFIG, prior=prior).rows for s in shots])
    update = alone - initial_rows(joint, ["DC-9", "A320", "737"])
    assert update.norm() > 0.1
    assert ((joint.rows - alone).norm(dim=1) <= 1e-6 * update.norm(dim=1)).all()
    unclipped = train_class_tokens(backbone64, shots[:1], replace(CONFIG, max_grad_norm=float("inf")), prior=prior)
    assert (unclipped.rows - alone[:1]).norm() > 1e-2 * update[0].norm(), "clipping was active"


@settings(max_examples=4, deadline=None)
@given(order=st.permutations(["DC-9", "A320", "737"]), samples=st.integers(1, 12), m=st.integers(1, 3))
def test_neither_order_nor_batches_change_a_class_token(
    backbone64: Backbone, order: list[str], samples: int, m: int
) -> None:
    config = replace(CONFIG, steps=3, shots_per_step=m)
    prior = random_prior(backbone64)
    reference = train_class_tokens(backbone64, [random_shots(backbone64, "A320")], config, prior=prior)
    shots = [random_shots(backbone64, x) for x in order]
    joint = train_class_tokens(backbone64, shots, replace(config, samples_per_batch=samples), prior=prior)
    i = order.index("A320")
    torch.testing.assert_close(joint.rows[i], reference.rows[0], rtol=0, atol=1e-9)


def test_a_batch_that_memory_is_too_small_for_is_halved_and_changes_no_class_token(
    backbone64: Backbone, small_memory: Callable[[int], list[int]]
) -> None:
    shots = [random_shots(backbone64, x) for x in "abc"]
    config = replace(CONFIG, steps=3, prior_weight=0.0)
    alone = train_class_tokens(backbone64, shots, replace(config, samples_per_batch=1))
    tried = small_memory(1)
    halved = train_class_tokens(backbone64, shots, config)
    assert tried == [3, *9 * [1]]
    torch.testing.assert_close(halved.rows, alone.rows)


def test_our_loop_equals_peft_layers_with_torch_adamw(backbone64: Backbone) -> None:
    config = replace(CONFIG, steps=12, blocks="medium", prior_weight=0.7)
    shots, (_, prior) = random_shots(backbone64, "A320"), random_prior(backbone64)
    ours = train_class_tokens(backbone64, [shots], config, prior=(GENERIC, prior))

    networks = {name: copy.deepcopy(module) for name, module in backbone64.networks.items()}
    start = ours.layout.split(initial_rows(ours, ["A320"]).double())
    for name, network in networks.items():
        names = [t.name for t in ours.layout.targets if t.network == name]
        inject_adapter_in_model(LoraConfig(r=config.rank, lora_alpha=config.rank, target_modules=names), network)
        network.double()
    layers = {t: networks[t.network].get_submodule(t.name) for t in ours.layout.targets}
    parameters: dict[str, list[Tensor]] = {"unet": [], "text_encoder": []}
    for target, layer in layers.items():
        for part, value in zip((layer.lora_A, layer.lora_B), start[target], strict=True):
            part["default"].weight.data.copy_(value[0])
            parameters[target.network].append(part["default"].weight)
    optimizer = torch.optim.AdamW(
        [
            {"params": parameters["unet"], "lr": config.lr_unet},
            {"params": parameters["text_encoder"], "lr": config.lr_text_encoder},
        ],
        weight_decay=config.weight_decay,
    )
    stream = _ClassStream(shots, torch_generator(config.seed, "training", "A320"))
    ids = backbone64.tokenize([shots.prompt, GENERIC])
    for _ in range(config.steps):
        latents, noise, timesteps = stream.draw(config, prior)
        noisy = backbone64.scheduler.add_noise(latents, noise, timesteps)
        text = networks["text_encoder"](ids).last_hidden_state
        predicted = networks["unet"](noisy, timesteps, text).sample
        loss = torch.nn.functional.mse_loss(predicted[0], noise[0])
        loss = loss + config.prior_weight * torch.nn.functional.mse_loss(predicted[1], noise[1])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for ps in parameters.values() for p in ps], config.max_grad_norm)
        optimizer.step()
    theirs = torch.cat(
        [
            part["default"].weight.detach().flatten()
            for layer in layers.values()
            for part in (layer.lora_A, layer.lora_B)
        ]
    )
    update = theirs - initial_rows(ours, ["A320"])[0]
    assert (ours.rows[0] - theirs).norm() <= 1e-6 * update.norm()


def test_the_loss_is_the_class_error_plus_the_weighted_error_of_the_generic_prompt(backbone: Backbone) -> None:
    layout = Layout(find_targets(backbone.unet, backbone.text_encoder), 2)
    g = torch.Generator().manual_seed(0)
    rows = 0.1 * torch.randn(2, layout.num_parameters, generator=g)
    h, w = (n // backbone.vae_scale_factor for n in backbone.image_size)
    # of each of two classes: 3 shots, then 3 prior images
    latents, noise = torch.randn(2, 12, backbone.latent_channels, h, w, generator=g)
    timesteps = torch.randint(1000, (12,), generator=g)
    prompts = ["a photo of a hta A320", "a photo of a hta DC-9"]
    ids = torch.stack([backbone.tokenize([p, GENERIC]) for p in prompts])
    with torch.no_grad():
        with adapted(backbone, layout, rows):
            losses = class_losses(backbone, ids, latents, noise, timesteps, 0.3)
        for c in range(2):
            errors = []
            for i in range(6 * c, 6 * c + 6):
                one = slice(i, i + 1)
                with adapted(backbone, layout, rows[c : c + 1]):
                    text = backbone.encode_text(backbone.tokenize([prompts[c] if i - 6 * c < 3 else GENERIC]))
                    errors.append(backbone.errors(latents[one], noise[one], timesteps[one], text))
            expected = torch.cat(errors[:3]).mean() + 0.3 * torch.cat(errors[3:]).mean()
            torch.testing.assert_close(losses[c], expected, rtol=1e-5, atol=1e-6)


def test_prior_images_keep_the_generic_prompt_where_it_was(backbone64: Backbone) -> None:
    """Their error under the generic prompt is smaller than that of a class token trained without them."""
    shots, (_, prior) = random_shots(backbone64, "A320", num_shots=1), random_prior(backbone64)
    config = replace(CONFIG, steps=40, lr_unet=1e-2, lr_text_encoder=1e-2, shots_per_step=2)

    def prior_error(rows: Tensor, layout: Layout) -> float:
        g = torch.Generator().manual_seed(1)
        latents = prior.repeat(8, 1, 1, 1)
        noise = torch.randn(latents.shape, generator=g, dtype=latents.dtype)
        timesteps = torch.randint(1000, (len(latents),), generator=g)
        with torch.no_grad(), adapted(backbone64, layout, rows):
            text = backbone64.encode_text(backbone64.tokenize([GENERIC])).repeat(len(latents), 1, 1)
            return float(backbone64.errors(latents, noise, timesteps, text).mean())

    with_prior = train_class_tokens(backbone64, [shots], replace(config, prior_weight=5.0), prior=(GENERIC, prior))
    without = train_class_tokens(backbone64, [shots], replace(config, prior_weight=0.0))
    assert prior_error(with_prior.rows, with_prior.layout) < prior_error(without.rows, without.layout)


def test_gradient_checkpointing_runs_the_forward_again_and_changes_no_row(backbone64: Backbone) -> None:
    shots, prior = [random_shots(backbone64, x) for x in ("A320", "DC-9")], random_prior(backbone64)
    config = replace(CONFIG, steps=2, samples_per_batch=48)
    calls = []
    block = backbone64.unet.down_blocks[0].attentions[0].transformer_blocks[0]
    handle = block.register_forward_pre_hook(lambda *_: calls.append(1))
    plain = train_class_tokens(backbone64, shots, config, prior=prior)
    count = len(calls)
    again = train_class_tokens(backbone64, shots, replace(config, gradient_checkpointing=True), prior=prior)
    handle.remove()
    assert len(calls) - count == 2 * count
    torch.testing.assert_close(again.rows, plain.rows, rtol=0, atol=1e-12)
    assert not backbone64.unet.is_gradient_checkpointing


@pytest.mark.parametrize("samples_per_batch", [2, 48])
def test_a_class_that_is_not_finite_is_named_and_leaves_the_others_alone(
    backbone64: Backbone, samples_per_batch: int
) -> None:
    good = [random_shots(backbone64, x) for x in ("A320", "DC-9")]
    bad = random_shots(backbone64, "broken")
    bad.mean[:] = float("inf")
    config = replace(CONFIG, steps=4, samples_per_batch=samples_per_batch)
    prior = random_prior(backbone64)
    trained = train_class_tokens(backbone64, [good[0], bad, good[1]], config, prior=prior)
    assert trained.failed == {"broken": 1}
    reference = train_class_tokens(backbone64, good, config, prior=prior)
    torch.testing.assert_close(trained.rows[[0, 2]], reference.rows, rtol=0, atol=1e-10)
    assert reference.failed == {}


def test_training_ends_when_every_class_has_failed(backbone64: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = random_shots(backbone64, "broken")
    bad.mean[:] = float("nan")
    forwards = 0
    errors = Backbone.errors

    def counted(*args):
        nonlocal forwards
        forwards += 1
        return errors(*args)

    monkeypatch.setattr(Backbone, "errors", counted)
    config = replace(CONFIG, steps=20, prior_weight=0.0)
    assert train_class_tokens(backbone64, [bad], config).failed == {"broken": 1}
    assert forwards == 1


def test_the_random_stream_of_a_class_depends_on_its_label_and_the_seed(backbone64: Backbone) -> None:
    shots = random_shots(backbone64, "A320")
    config = replace(CONFIG, steps=1, prior_weight=0.0)
    first = train_class_tokens(backbone64, [shots], config).rows
    assert torch.equal(first, train_class_tokens(backbone64, [shots], config).rows)
    assert not torch.equal(first, train_class_tokens(backbone64, [shots], replace(config, seed=1)).rows)
    assert not torch.equal(first, train_class_tokens(backbone64, [replace(shots, label="A319")], config).rows)


def test_training_refuses_what_it_cannot_train(backbone64: Backbone) -> None:
    shots = random_shots(backbone64, "A320")
    with pytest.raises(ValueError, match="distinct labels"):
        train_class_tokens(backbone64, [shots, shots], CONFIG, prior=random_prior(backbone64))
    with pytest.raises(ValueError, match="at least one class"):
        train_class_tokens(backbone64, [], CONFIG, prior=random_prior(backbone64))
    with pytest.raises(ValueError, match=r"prior_weight=1\.0 needs prior images"):
        train_class_tokens(backbone64, [shots], CONFIG)
    with pytest.raises(ValueError, match=r"timesteps=\(0, 2000\) exceed the schedule's 1000"):
        train_class_tokens(backbone64, [shots], replace(CONFIG, timesteps=(0, 2000)), prior=random_prior(backbone64))


def test_the_learning_rate_is_constant_or_falls_to_zero_as_a_cosine() -> None:
    constant, cosine = (TrainingConfig(steps=10, lr_schedule=x) for x in ("constant", "cosine"))
    assert [lr_scale(constant, s) for s in (0, 5, 9)] == [1.0] * 3
    assert [lr_scale(cosine, s) for s in (0, 5, 10)] == pytest.approx([1.0, 0.5, 0.0])


class OneBrokenShot(Encoder):
    """Gives not-a-number for the image with the id `broken`."""

    broken: str

    def variants(self, image: PreparedImage, training: TrainingConfig) -> tuple[Tensor, Tensor]:
        mean, std = super().variants(image, training)
        return (mean * torch.nan if image.id == self.broken else mean), std


def bank_with_a_broken_class(backbone: Backbone) -> tuple[Bank, dict[Label, int]]:
    encoder = OneBrokenShot(backbone, ImageGeometry(size=backbone.image_size), GENERIC)
    rng = np.random.default_rng(0)
    pixels = {x: rng.integers(0, 256, (16, 32, 3), np.uint8) for x in ("A320", "broken", "DC-9", "737")}
    groups = {x: [encoder.prepare(array)] for x, array in pixels.items()}
    encoder.broken = groups["broken"][0].id
    settings = complete("pocket", 1, replace(CONFIG, steps=10, prior_images=3))
    return train_bank(encoder, groups, Prompts(template="a photo of a hta {}", generic=GENERIC), settings)


def test_two_processes_make_the_class_tokens_and_prior_images_of_one(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    bank, failed = bank_with_a_broken_class(backbone)
    assert failed == {"broken": 1}
    out = tmp_path / "out.safetensors"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "two"))

    def one_of_two() -> None:
        state = process_state()
        assert state.num_processes == 2
        own, failed = bank_with_a_broken_class(backbone)
        assert failed == {"broken": 1} and own.labels == ("737", "A320", "DC-9")
        if state.process_index == 1:
            save_file({"rows": own.rows}, out)
        state.destroy_process_group()

    run_together(one_of_two)
    torch.testing.assert_close(load_file(out)["rows"], bank.rows, rtol=0, atol=1e-5)
    made = [sorted((tmp_path / x).rglob("*.safetensors")) for x in ("one", "two")]
    assert [path.relative_to(tmp_path / "one") for path in made[0]] == [
        path.relative_to(tmp_path / "two") for path in made[1]
    ]
    assert len(made[0]) == 3
    for a, b in zip(*made, strict=True):
        torch.testing.assert_close(load_file(a), load_file(b), rtol=1e-4, atol=1e-4)  # of other batches
