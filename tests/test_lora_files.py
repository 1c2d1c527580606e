"""An exported class token, loaded by the tool that its file is for, gives the bank's errors at weight 1."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import PeftModel
from safetensors import safe_open
from test_lora import errors_through_diffusers, latents_of, random_bank

from fewshot_diti.backbone import Backbone
from fewshot_diti.bank import Bank
from fewshot_diti.lora import Layout, find_targets
from fewshot_diti.lora_files import export_lora
from fewshot_diti.scoring import Scorer


@pytest.fixture
def bank(backbone: Backbone) -> Bank:
    return random_bank(backbone, 3, 4, 0)


@pytest.fixture
def pipe(backbone_folder: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(backbone_folder)


def load(pipe: StableDiffusionPipeline, exported: Path, form: str) -> None:
    """As the tool does that the file is for."""
    if form == "peft":
        pipe.unet = PeftModel.from_pretrained(pipe.unet, exported / "unet").base_model.model
        if (exported / "text_encoder").exists():
            pipe.text_encoder.load_adapter(str(exported / "text_encoder"))  # PeftModel warns of the next transformers
    else:
        pipe.load_lora_weights(exported.parent, weight_name=exported.name)


@pytest.mark.parametrize("form", ["diffusers", "kohya", "peft"])
@pytest.mark.parametrize("alpha", [None, 1])
def test_the_loaded_file_gives_the_errors_of_the_bank(
    backbone: Backbone, bank: Bank, pipe: StableDiffusionPipeline, tmp_path: Path, form: str, alpha: float | None
) -> None:
    bank = replace(bank, layout=replace(bank.layout, alpha=alpha))
    x0, label = latents_of(backbone, 0), bank.labels[1]
    expected = Scorer(backbone, bank).errors(x0, "an image", [1], range(3), (3, 400, 990))[0]
    frozen = errors_through_diffusers(pipe, bank, str(label), x0)
    load(pipe, export_lora(bank, label, tmp_path, form), form)
    found = errors_through_diffusers(pipe, bank, str(label), x0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (found - frozen).abs().max() > 1e-4


@pytest.mark.parametrize("form", ["diffusers", "kohya", "peft"])
def test_adapters_of_one_network_can_be_exported(
    backbone: Backbone, bank: Bank, pipe: StableDiffusionPipeline, tmp_path: Path, form: str
) -> None:
    layout = Layout(find_targets(backbone.unet, backbone.text_encoder, "all", ["to_q", "ff.net.2"]), 2)
    assert {t.network for t in layout.targets} == {"unet"}
    rows = 0.2 * torch.randn(3, layout.num_parameters, generator=torch.Generator().manual_seed(0))
    bank, x0 = replace(bank, layout=layout, rows=rows), latents_of(backbone, 0)
    expected = Scorer(backbone, bank).errors(x0, "an image", [1], range(3), (3, 400, 990))[0]
    load(pipe, export_lora(bank, bank.labels[1], tmp_path, form), form)
    found = errors_through_diffusers(pipe, bank, str(bank.labels[1]), x0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_b_is_multiplied_by_the_scale_and_the_adapter_config_is_saved(
    bank: Bank, pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    path = bank.export(bank.labels[1], tmp_path)
    assert path.name == "pytorch_lora_weights.safetensors"
    with safe_open(path, "pt") as file:
        keys, metadata = list(file.keys()), file.metadata()
        scaled = {k: file.get_tensor(k) for k in keys}
    config = json.loads(metadata["lora_adapter_metadata"])
    assert (config["unet.r"], config["unet.lora_alpha"], config["text_encoder.r"]) == (4, 4, 4)
    for target, (a, b) in bank.select([bank.labels[1]]).layout.split(bank.rows[1:2]).items():
        prefix = "unet" if target.network == "unet" else "text_encoder.text_model"
        scale = 0.6 if target.network == "unet" else 0.7
        assert torch.equal(scaled.pop(f"{prefix}.{target.name}.lora_A.weight"), a[0])
        torch.testing.assert_close(scaled.pop(f"{prefix}.{target.name}.lora_B.weight"), scale * b[0])
    assert not scaled
    pipe.load_lora_weights(tmp_path)
    assert pipe.get_list_adapters().keys() == {"unet", "text_encoder"}
    with pytest.raises(ValueError, match="not in the bank"):
        bank.export("tu-154", tmp_path)
    with pytest.raises(ValueError, match="is there already; export each class into a folder of its own"):
        bank.export(bank.labels[0], tmp_path)


def test_kohya_files_have_the_name_of_the_class_and_share_a_folder(bank: Bank, tmp_path: Path) -> None:
    bank = replace(bank, tokens=(replace(bank.tokens[0], label="Boeing 747/400"), *bank.tokens[1:]))
    path = export_lora(bank, "Boeing 747/400", tmp_path, "kohya")
    export_lora(bank, bank.labels[1], tmp_path, "kohya")
    assert path == tmp_path / "Boeing_747_400.safetensors"
    assert {p.name for p in tmp_path.iterdir()} == {path.name, "all_4_1.safetensors"}
    with safe_open(path, "pt") as file:
        alpha = file.get_tensor("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.alpha")
        assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight" in file.keys()  # noqa: SIM118
        metadata = file.metadata()
    assert (alpha, metadata["ss_network_dim"], metadata["ss_network_alpha"]) == (4, "4", "4")
    assert "a photo of a hta 0" in metadata["ss_training_comment"]
    with pytest.raises(ValueError, match=r"Boeing_747_400\.safetensors is there already"):
        export_lora(bank, "Boeing 747/400", tmp_path, "kohya")


def test_nothing_is_exported_over_a_bank_or_in_an_unknown_format(bank: Bank, tmp_path: Path) -> None:
    bank.save_pretrained(tmp_path)
    before = {p.name for p in tmp_path.iterdir()}
    for form in ("diffusers", "kohya", "peft"):
        with pytest.raises(ValueError, match=r"manifest\.json is there already"):
            bank.export(bank.labels[0], tmp_path, form)
    with pytest.raises(ValueError, match=r"format='a1111'; pass one of \['diffusers', 'kohya', 'peft'\]"):
        bank.export(bank.labels[0], tmp_path / "new", "a1111")  # type: ignore[arg-type]
    assert {p.name for p in tmp_path.iterdir()} == before
