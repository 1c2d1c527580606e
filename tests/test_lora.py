"""Stacked LoRA equals one LoRA at a time through peft and diffusers."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_tiny_backbone
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewshot_diti.backbone import Backbone
from fewshot_diti.bank import Bank, ClassToken
from fewshot_diti.data.images import ImageGeometry
from fewshot_diti.lora import (
    BLOCK_FILTERS,
    Layout,
    adapted,
    adapted_linear,
    find_targets,
    gradients_on,
    union_layout,
)
from fewshot_diti.scoring import Scorer
from fewshot_diti.training import ClassShots, TrainingConfig, train_class_tokens
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


# ---- which linears


@pytest.fixture(scope="module")
def three_levels(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """A U-Net of three levels, all with attention, and without a middle block."""
    folder = save_tiny_backbone(tmp_path_factory.mktemp("three-levels"))
    UNet2DConditionModel(
        sample_size=(8, 16),
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=2,
    ).save_pretrained(folder / "unet")
    return Backbone.from_pretrained(folder, dtype=torch.float32, device="cpu")


def blocks_of(backbone: Backbone, *how: object) -> set[str]:
    targets = find_targets(backbone.unet, backbone.text_encoder, *how)  # type: ignore[arg-type]
    return {t.name.split(".attentions")[0] for t in targets if t.network == "unet"}


def test_block_filters_count_blocks_with_attention_from_the_middle(backbone: Backbone, three_levels: Backbone) -> None:
    assert blocks_of(backbone, "narrow") == {"down_blocks.2", "mid_block", "up_blocks.1"}
    assert blocks_of(backbone, "medium") == {f"{x}_blocks.{i}" for x in ("down", "up") for i in (1, 2)} | {"mid_block"}
    assert blocks_of(three_levels, "narrow") == {"down_blocks.2", "up_blocks.0"}
    assert blocks_of(three_levels, "medium") == {"down_blocks.1", "down_blocks.2", "up_blocks.0", "up_blocks.1"}
    assert blocks_of(three_levels, "all") == {f"{x}_blocks.{i}" for x in ("down", "up") for i in range(3)}


@pytest.mark.parametrize("blocks", sorted(BLOCK_FILTERS))
def test_a_unet_without_a_middle_block_is_scored(three_levels: Backbone, tmp_path: Path, blocks: str) -> None:
    bank = random_bank(three_levels, 2, 2, 0, blocks)
    x0 = latents_of(three_levels, 0)
    found = Scorer(three_levels, bank).errors(x0, "an image", range(2), range(3), (3, 400, 990))
    bank.export(bank.labels[1], tmp_path)
    pipe = StableDiffusionPipeline.from_pretrained(three_levels.name)
    pipe.load_lora_weights(tmp_path)
    alone = errors_through_diffusers(pipe, bank, str(bank.labels[1]), x0)
    torch.testing.assert_close(found[1], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "target_modules",
    [["to_q", "to_v"], ("ff.net.2",), r".*attn2\.to_[kv]", ["to_k", "fc1"], "mid_block.*proj_in", ["linear_1"]],
)
def test_targets_by_name_are_those_of_peft(backbone: Backbone, target_modules: list[str] | str) -> None:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    config = LoraConfig(target_modules=target_modules)
    expected = [
        (network, name)
        for network, module in backbone.networks.items()
        for name, m in module.named_modules()
        if isinstance(m, torch.nn.Linear) and check_target_module_exists(config, name)
    ]
    found = find_targets(backbone.unet, backbone.text_encoder, "all", target_modules)
    assert [(t.network, t.name) for t in found] == expected and expected


def test_targets_by_name_can_be_kept_to_some_blocks(backbone: Backbone) -> None:
    found = find_targets(backbone.unet, backbone.text_encoder, "narrow", ["to_q", "fc1"])
    assert {t.name.split(".attentions")[0] for t in found if t.network == "unet"} == {
        "down_blocks.2",
        "mid_block",
        "up_blocks.1",
    }
    assert {t.name.rsplit(".", 1)[-1] for t in found} == {"to_q", "fc1"}


def test_names_that_match_nothing_are_refused(backbone: Backbone) -> None:
    for wrong in (["to_x"], "to_q", ["conv_in"]):  # an expression has to match the whole name
        with pytest.raises(
            ValueError, match=r"target_modules=.* matches no linear with blocks='all'; pass ends .*'to_q'"
        ):
            find_targets(backbone.unet, backbone.text_encoder, "all", wrong)
    with pytest.raises(ValueError, match="blocks='wide' is not one of"):
        find_targets(backbone.unet, backbone.text_encoder, "wide")


@pytest.mark.parametrize("target_modules", [["to_q"], ["fc1"]])
def test_class_tokens_may_adapt_one_of_the_networks(backbone: Backbone, target_modules: list[str]) -> None:
    layout = Layout(find_targets(backbone.unet, backbone.text_encoder, "all", target_modules), 2)
    g = torch.Generator().manual_seed(0)
    bank = replace(
        random_bank(backbone, 2, 2, 0), layout=layout, rows=torch.randn(2, layout.num_parameters, generator=g)
    )
    errors = Scorer(backbone, bank).errors(latents_of(backbone, 0), "an image", range(2), range(2), (3, 400))
    assert errors.isfinite().all() and not torch.equal(errors[0], errors[1])


# ---- alpha


def test_adapters_are_multiplied_by_alpha_over_rank(backbone: Backbone) -> None:
    bank = random_bank(backbone, 2, 4, 0)
    twice = replace(bank, layout=replace(bank.layout, alpha=8))
    rows = bank.rows.clone()
    for _, b in bank.layout.split(rows).values():
        b *= 2
    x0, how = latents_of(backbone, 0), ("an image", range(2), range(2), (3, 400))
    found = Scorer(backbone, twice).errors(x0, *how)
    assert torch.equal(found, Scorer(backbone, replace(bank, rows=rows)).errors(x0, *how))
    assert bank.layout == replace(bank.layout, alpha=4) and bank.layout.scale == 1


def test_the_networks_are_left_as_they_were_where_memory_runs_out(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, calls = random_bank(backbone, 1, 4, 0).layout, itertools.count()
    before = {name: set(module.__dict__) for name, module in backbone.unet.named_modules()}

    def scale(_: object) -> float:
        if next(calls) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return 2.0

    monkeypatch.setattr(type(layout), "scale", property(scale))
    rows = random_bank(backbone, 1, 4, 0).rows
    with pytest.raises(torch.OutOfMemoryError), adapted(backbone, layout, rows):
        pass
    assert {name: set(module.__dict__) for name, module in backbone.unet.named_modules()} == before


def test_merged_banks_of_other_alphas_give_the_same_errors(backbone: Backbone) -> None:
    banks = [random_bank(backbone, 1, 4, 0), random_bank(backbone, 1, 2, 1), random_bank(backbone, 1, 6, 2)]
    banks[1] = replace(banks[1], layout=replace(banks[1].layout, alpha=6))
    x0, how = latents_of(backbone, 0), (range(2), (3, 400))
    alone = [Scorer(backbone, bank).errors(x0, "an image", [0], *how)[0] for bank in banks]
    merged = Scorer(backbone, banks[0].merge(banks[1]).merge(banks[2])).errors(x0, "an image", range(3), *how)
    torch.testing.assert_close(merged, torch.stack(alone), rtol=0, atol=1e-5)
    same = [replace(bank.layout, alpha=bank.layout.rank / 2) for bank in banks]
    assert union_layout(same).alpha == 3


def test_gradients_reach_adapters_of_another_alpha(backbone: Backbone) -> None:
    bank = random_bank(backbone, 1, 2, 0)
    grads = []
    for alpha in (2, 4):
        rows = bank.rows.clone().requires_grad_()
        with adapted(backbone, replace(bank.layout, alpha=alpha), rows):
            text = backbone.encode_text(backbone.tokenize(["a"]))
        (grad,) = torch.autograd.grad(text.square().sum(), rows)
        grads.append(grad)
    assert all(grad.isfinite().all() and grad.any() for grad in grads) and not torch.equal(*grads)


# ---- gradients


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_on_inside_whatever_they_are_outside(mode: Callable[[], Any]) -> None:
    with mode():
        with gradients_on():
            x = torch.ones(2, requires_grad=True)
            assert x.square().sum().requires_grad
        assert not torch.is_grad_enabled()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_class_tokens_are_trained_where_gradients_are_off(backbone_folder: Path, mode: Callable[[], Any]) -> None:
    config = TrainingConfig(steps=2, rank=2, lr_unet=0.1, lr_text_encoder=0.1, shots_per_step=2)

    def train() -> Tensor:
        backbone = Backbone.from_pretrained(backbone_folder, dtype=torch.float32, device="cpu")
        pixels = torch.rand(2, 3, 16, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
        mean, std = (x[:, None] for x in backbone.encode_images(pixels))
        shots = ClassShots(label="a", prompt="a photo of a hta a", mean=mean, std=std)
        return train_class_tokens(backbone, [shots], config, prior=("a photo", mean[:, 0])).rows

    with mode():
        found = train()
    assert torch.equal(found, train()) and not found.is_inference()


def test_two_threads_with_adapters_wait_for_each_other(backbone: Backbone) -> None:
    bank, ids = random_bank(backbone, 1, 4, 0), backbone.tokenize(["a photo of an aircraft"])
    with torch.no_grad():
        before = backbone.encode_text(ids)
    with ThreadPoolExecutor(1) as pool:
        with adapted(backbone, bank.layout, bank.rows), torch.no_grad():
            other = pool.submit(lambda: backbone.encode_text(ids).detach())
            time.sleep(0.1)
            assert not other.done()
            assert not torch.equal(backbone.encode_text(ids), before)
        assert torch.equal(other.result(), before)
