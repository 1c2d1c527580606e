"""LoRA files that other tools write become class tokens with the errors that those tools would give."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from test_lora import errors_through_diffusers, latents_of, random_bank
from torch import Tensor

from fewshot_diti.backbone import Backbone
from fewshot_diti.bank import Bank
from fewshot_diti.lora_files import export_classes, export_lora, file_names
from fewshot_diti.lora_readers import import_lora, labelled_files, read_lora
from fewshot_diti.prompts import Prompts
from fewshot_diti.scoring import Scorer

PROMPTS = Prompts(template="a photo of a hta", generic="a photo")


@pytest.fixture
def bank(backbone: Backbone) -> Bank:
    bank = random_bank(backbone, 3, 4, 0)
    return replace(bank, tokens=tuple(replace(token, prompt=PROMPTS.template) for token in bank.tokens))


def errors(backbone: Backbone, bank: Bank, position: int = 0) -> Tensor:
    return Scorer(backbone, bank).errors(latents_of(backbone, 0), "an image", [position], range(3), (3, 400, 990))[0]


@pytest.mark.parametrize("form", ["diffusers", "kohya", "peft"])
def test_what_is_exported_comes_back_with_the_same_errors(
    backbone: Backbone, bank: Bank, tmp_path: Path, form: str
) -> None:
    bank = replace(bank, layout=replace(bank.layout, alpha=2))
    files = export_classes(bank, tmp_path, form)
    back = import_lora(backbone, files, PROMPTS)
    assert back.labels == bank.labels and [t.prompt for t in back.tokens] == [t.prompt for t in bank.tokens]
    for c in range(3):
        torch.testing.assert_close(errors(backbone, back, c), errors(backbone, bank, c), rtol=0, atol=1e-5)
    back.save_pretrained(tmp_path / "bank")
    assert Bank.from_pretrained(tmp_path / "bank") == back


def old_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As diffusers named attention in 2023."""
    renamed = {}
    for key, value in tensors.items():
        for part, old in (("A", "down"), ("B", "up")):
            key = key.replace(f".lora_{part}.weight", f".lora.{old}.weight")
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            key = key.replace(f".{name}.lora.", f".processor.{name.removesuffix('.0')}_lora.")
        key = key.replace("_proj.lora.", "_proj.lora_linear_layer.")
        renamed[key] = value
    return renamed


def test_the_names_of_old_files_are_read(backbone: Backbone, bank: Bank, tmp_path: Path) -> None:
    path = export_lora(bank, bank.labels[1], tmp_path)
    tensors = old_names(load_file(path))
    assert any(".processor.to_out_lora.down" in key for key in tensors)
    save_file(tensors, tmp_path / "old.safetensors")
    old, new = (read_lora(backbone, file) for file in (tmp_path / "old.safetensors", path))
    assert old.keys() == new.keys()
    assert all(torch.equal(a, b) for t in old for a, b in zip(old[t], new[t], strict=True))


def test_a_lora_that_diffusers_trained_gives_the_errors_of_its_pipeline(
    backbone: Backbone, backbone_folder: Path, bank: Bank, tmp_path: Path
) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(backbone_folder)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["to_q", "to_v"], init_lora_weights=False)
    torch.manual_seed(0)
    pipe.unet.add_adapter(config)
    layers = get_peft_model_state_dict(pipe.unet)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=layers, unet_lora_adapter_metadata=config.to_dict()
    )
    expected = errors_through_diffusers(pipe, bank, str(bank.labels[0]), latents_of(backbone, 0))
    back = import_lora(backbone, {"one": tmp_path, "two": tmp_path}, PROMPTS)
    torch.testing.assert_close(errors(backbone, back), expected, rtol=0, atol=1e-5)
    assert (errors(backbone, back) - errors(backbone, bank)).abs().max() > 1e-4


def test_ranks_and_layers_may_differ_between_files(backbone: Backbone, bank: Bank, tmp_path: Path) -> None:
    small = random_bank(backbone, 3, 2, 1)
    files = {
        "large": export_lora(bank, bank.labels[0], tmp_path / "large"),
        "small": export_lora(small, small.labels[0], tmp_path / "small", "kohya"),
    }
    tensors = {key: value for key, value in load_file(files["small"]).items() if "lora_te" not in key}
    save_file(tensors, files["small"])
    both = import_lora(backbone, files, PROMPTS)
    assert both.layout.rank == 4
    torch.testing.assert_close(errors(backbone, both), errors(backbone, bank), rtol=0, atol=1e-5)
    alone = import_lora(backbone, {"small": files["small"]}, PROMPTS)
    torch.testing.assert_close(errors(backbone, both, 1), errors(backbone, alone), rtol=0, atol=1e-5)


def _without(part: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {key: value for key, value in tensors.items() if part not in key}


def _renamed(old: str, new: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {key.replace(old, new): value for key, value in tensors.items()}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (_without("lora_B"), "one half of the adapter"),
        (_renamed("mid_block", "middle"), "no layer of this backbone"),
        (_renamed("attn1.to_q", "norm1"), "which is a LayerNorm of this backbone"),
        (lambda tensors: {key: value[:, :2].contiguous() for key, value in tensors.items()}, "cannot take"),
        (lambda tensors: {key: value * torch.nan for key, value in tensors.items()}, "not finite"),
        (lambda tensors: tensors | {"unet.mid.to_q.dora_scale": torch.ones(3)}, "is no LoRA of a linear layer"),
        (lambda tensors: {}, "holds no adapters"),
    ],
)
def test_what_does_not_fit_is_refused_and_named(
    backbone: Backbone,
    bank: Bank,
    tmp_path: Path,
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    text: str,
) -> None:
    path = export_lora(bank, bank.labels[0], tmp_path)
    save_file(change(load_file(path)), path)
    with pytest.raises(ValueError, match=text) as error:
        import_lora(backbone, {"one": path}, PROMPTS)
    assert str(tmp_path) in str(error.value)


def test_other_files_are_refused(backbone: Backbone, bank: Bank, tmp_path: Path) -> None:
    (tmp_path / "lora.bin").write_bytes(b"\x80\x04cposix\nsystem\n.")
    with pytest.raises(ValueError, match="no whole safetensors file"):
        read_lora(backbone, tmp_path / "lora.bin")
    with pytest.raises(FileNotFoundError, match="holds no LoRA"):
        read_lora(backbone, tmp_path)
    with pytest.raises(FileNotFoundError, match="There is no LoRA file"):
        read_lora(backbone, tmp_path / "gone.safetensors")
    folder = export_lora(bank, bank.labels[0], tmp_path / "peft", "peft")
    config = folder / "unet" / "adapter_config.json"
    plain = json.loads(config.read_text())
    for setting in ({"use_dora": True}, {"use_rslora": True}, {"bias": "all"}, {"alpha_pattern": {"to_q": 2}}):
        config.write_text(json.dumps(plain | setting))
        with pytest.raises(ValueError, match=r"class tokens hold plain LoRA|alpha of its own"):
            read_lora(backbone, folder)


@pytest.mark.parametrize(
    ("changes", "metadata", "text"),
    [
        ({"lora_down.weight": torch.zeros(0, 16), "lora_up.weight": torch.zeros(16, 0)}, {}, "cannot take"),
        ({"lora_down.weight": torch.zeros(0, 0, 1, 1)}, {}, "cannot take"),
        ({"lora_down.weight": torch.tensor(1.0)}, {}, "cannot take"),
        ({"lora_down.weight": torch.zeros(4, 16, dtype=torch.int8)}, {}, "in torch.int8; weights of a LoRA are floats"),
        ({"alpha": torch.ones(2)}, {}, "must be one finite number"),
        ({"alpha": torch.tensor(torch.nan)}, {}, "must be one finite number"),
        ({"alpha": None}, {"lora_adapter_metadata": "[]"}, "holds no settings of a LoRA"),
        ({"alpha": None}, {"lora_adapter_metadata": "{"}, "is no JSON"),
        ({"alpha": None}, {"lora_adapter_metadata": '{"text_encoder.lora_alpha": [1]}'}, "must be one finite number"),
    ],
)
def test_files_that_no_tool_writes_are_refused_by_name(
    backbone: Backbone, bank: Bank, tmp_path: Path, changes: dict, metadata: dict[str, str], text: str
) -> None:
    path = export_lora(bank, bank.labels[0], tmp_path, "kohya")
    tensors = load_file(path)
    key = next(key.removesuffix(".alpha") for key in tensors if key.endswith(".alpha") and "_te_" in key)
    tensors |= {f"{key}.{part}": value for part, value in changes.items()}
    if changes.get("alpha", 0) is None:
        tensors = {key: value for key, value in tensors.items() if not key.endswith(".alpha")}
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=text) as raised:
        read_lora(backbone, path)
    assert str(path) in str(raised.value)


def test_files_are_named_with_their_class_or_by_it(tmp_path: Path) -> None:
    file = tmp_path / "A=B.safetensors"
    file.write_bytes(b"")
    assert labelled_files((str(file), f"DC-9={file}", "folder/MD-11")) == {
        "A=B": file,
        "DC-9": file,
        "MD-11": Path("folder/MD-11"),
    }
    with pytest.raises(ValueError, match="Two LoRAs are named 'x'"):
        labelled_files(("x=a.safetensors", "b/x"))
    with pytest.raises(ValueError, match="Two LoRAs are named '\u00e9'"):
        labelled_files(("\u00e9=a.safetensors", "e\u0301=b.safetensors"))
    with pytest.raises(ValueError, match="names no class"):
        labelled_files(("=a.safetensors",))
    long = "x" * 300  # which is no path
    assert labelled_files((f"{long}={file}",)) == {long: file}


def test_every_class_gets_a_file_name_that_every_system_takes() -> None:
    labels = ("a/b", "a b", "A_B", "..", ".hidden", "nul", "com1.txt", "\u98de\u673a", "x" * 300, "x" * 299, "", 7)
    names = file_names(labels)
    assert list(names) == list(labels)
    assert len({name.casefold() for name in names.values()}) == len(labels)
    for name in names.values():
        assert name and not name.startswith(".") and "/" not in name and len(name.encode()) < 255
        assert name.split(".")[0].upper() not in ("NUL", "COM1")
    assert names["a/b"] == "a_b" and names["a b"] == "a_b-2" and names[7] == "7"


def test_nothing_is_exported_where_a_class_is_in_the_way(bank: Bank, tmp_path: Path) -> None:
    last = file_names(bank.labels)[bank.labels[2]]
    (tmp_path / last).mkdir()
    (tmp_path / last / "mine").touch()
    with pytest.raises(ValueError, match="is there already; pass another folder"):
        export_classes(bank, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [last]
    assert list(export_classes(bank, tmp_path, labels=bank.labels[:1])) == [bank.labels[0]]
