"""Stacked LoRA equals one LoRA at a time through peft and diffusers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewshot_diti.backbone import Backbone
from fewshot_diti.bank import Bank, ClassToken
from fewshot_diti.data.images import ImageGeometry
from fewshot_diti.lora import BLOCK_FILTERS, Layout, adapted, adapted_linear, find_targets
from fewshot_diti.scoring import Scorer
from fewshot_diti.trials import trial_noise


def random_bank(backbone: Backbone, num_classes: int, rank: int, seed: int, blocks: str = "all") -> Bank:
    layout = Layout(find_targets(backbone.unet, backbone.text_encoder, blocks), rank)
    g = torch.Generator().manual_seed(seed)
    return Bank(
        tokens=tuple(
            ClassToken(label=f"{blocks} {rank} {i}", prompt=f"a photo of a hta {i}", num_shots=1)
            for i in range(num_classes)
        ),
        layout=layout,
        rows=0.2 * torch.randn(num_classes, layout.num_parameters, generator=g),
        backbone_name=backbone.name,
        backbone_hash=backbone.hash,
        geometry=ImageGeometry(size=backbone.image_size),
    )


def latents_of(backbone: Backbone, seed: int) -> Tensor:
    h, w = (n // backbone.vae_scale_factor for n in backbone.image_size)
    return torch.randn(backbone.latent_channels, h, w, generator=torch.Generator().manual_seed(seed))


def errors_through_diffusers(pipe: StableDiffusionPipeline, bank: Bank, label: str, x0: Tensor) -> Tensor:
    """The same errors, with diffusers' own networks and peft's own layers."""
    token = bank.select([label]).tokens[0]
    ids = pipe.tokenizer(
        [token.prompt], padding="max_length", max_length=pipe.tokenizer.model_max_length, return_tensors="pt"
    ).input_ids
    out = []
    with torch.no_grad():
        text = pipe.text_encoder(ids).last_hidden_state
        for s, t in enumerate((3, 400, 990)):
            noise = trial_noise(0, "an image", [s], tuple(x0.shape))
            noisy = pipe.scheduler.add_noise(x0[None], noise, torch.tensor([t]))
            predicted = pipe.unet(noisy, torch.tensor([t]), text).sample
            out.append((noise - predicted).square().mean())
    return torch.stack(out)


@pytest.fixture(scope="module")
def pipe(backbone_folder: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(backbone_folder)


@settings(max_examples=5, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    blocks=st.lists(st.sampled_from(sorted(BLOCK_FILTERS)), min_size=3, max_size=3),
    batch_size=st.integers(1, 13),
    seed=st.integers(0, 99),
)
def test_errors_from_mixed_class_batches_equal_one_exported_lora_at_a_time(
    backbone: Backbone,
    pipe: StableDiffusionPipeline,
    tmp_path_factory: pytest.TempPathFactory,
    ranks: list[int],
    blocks: list[str],
    batch_size: int,
    seed: int,
) -> None:
    bank = random_bank(backbone, 1, ranks[0], seed, blocks[0])
    for i, rank in enumerate(ranks[1:], 1):
        other = random_bank(backbone, 1, rank, seed + i, blocks[i])
        if set(bank.labels).isdisjoint(other.labels):
            bank = bank.merge(other)
    x0 = latents_of(backbone, seed)
    stacked = Scorer(backbone, bank, batch_size=batch_size).errors(
        x0, "an image", range(len(bank)), range(3), (3, 400, 990)
    )
    for row, label in enumerate(bank.labels):
        folder = tmp_path_factory.mktemp("export")
        bank.export(label, folder)
        pipe.load_lora_weights(folder)
        alone = errors_through_diffusers(pipe, bank, str(label), x0)
        pipe.unload_lora_weights()
        torch.testing.assert_close(stacked[row], alone, rtol=0, atol=1e-5)


def test_the_networks_are_left_as_they_were(backbone: Backbone) -> None:
    bank = random_bank(backbone, 1, 4, 0)
    ids = backbone.tokenize(["a photo of an aircraft"])
    with torch.no_grad():
        before = backbone.encode_text(ids)
        with adapted(backbone, bank.layout, bank.rows):
            inside = backbone.encode_text(ids)
        after = backbone.encode_text(ids)
    assert not torch.allclose(before, inside)
    assert torch.equal(before, after)


@pytest.mark.parametrize("bias", [True, False])
def test_the_gradients_of_an_adapted_linear_are_those_of_finite_differences(bias: bool) -> None:
    g = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(3, 5, bias=bias, dtype=torch.float64).requires_grad_(False)
    a, b, x = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((2, 2, 3), (2, 5, 2), (4, 3, 3)))
    inputs = tuple(tensor.requires_grad_() for tensor in (a, b, x))
    assert torch.autograd.gradcheck(lambda *args: adapted_linear(linear, *args), inputs)


def test_under_autocast_an_adapted_linear_is_what_it_is_without() -> None:
    g = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(3, 5).requires_grad_(False)
    a, b, x = (torch.randn(shape, generator=g).requires_grad_() for shape in ((2, 2, 3), (2, 5, 2), (4, 3, 3)))
    out = adapted_linear(linear, a, b, x)
    with torch.autocast("cpu", torch.bfloat16):
        cast = adapted_linear(linear, a, b, x)
    assert cast.dtype == torch.bfloat16
    torch.testing.assert_close(cast.float(), out, rtol=0.05, atol=0.05)
    for grad, expected in zip(*(torch.autograd.grad(y.sum(), (a, b, x)) for y in (cast, out)), strict=True):
        torch.testing.assert_close(grad, expected, rtol=0.05, atol=0.05)


def test_second_derivatives_are_refused_not_wrong() -> None:
    linear = torch.nn.Linear(3, 5).requires_grad_(False)
    a, b, x = (torch.ones(shape, requires_grad=True) for shape in ((2, 2, 3), (2, 5, 2), (4, 3, 3)))
    (grad,) = torch.autograd.grad(adapted_linear(linear, a, b, x).square().sum(), b, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_under_autocast_no_update_is_merged_into_rounded_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a gradient and with many tokens float32 takes the merged way; in bfloat16 the sum would lose it."""
    linear = torch.nn.Linear(8, 8).requires_grad_(False)
    a, b, x = torch.ones(1, 2, 8), torch.ones(1, 8, 2), torch.ones(1, 64, 8)
    merging: list[torch.Tensor] = []
    product = torch.baddbmm
    monkeypatch.setattr(torch, "baddbmm", lambda *args: merging.append(product(*args)) or merging[-1])
    adapted_linear(linear, a, b, x)
    assert merging
    merging.clear()
    with torch.autocast("cpu", torch.bfloat16):
        adapted_linear(linear, a, b, x)
    assert not merging
