"""Class tokens as the LoRA files of other tools: diffusers, ComfyUI and A1111 (kohya's names), and peft."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Literal

from peft import LoraConfig
from safetensors.torch import save as save_tensors
from torch import Tensor, tensor

from fewshot_diti.bank import Bank
from fewshot_diti.bank_files import MANIFEST
from fewshot_diti.config import Label
from fewshot_diti.files import is_empty, write_atomically
from fewshot_diti.lora import Target
from fewshot_diti.reports import printable

LoraFormat = Literal["diffusers", "kohya", "peft"]
_LONGEST = 120  # bytes of a file's name without its ending; a name has at most 255
_RESERVED = {"CON", "PRN", "AUX", "NUL", *(f"{port}{n}" for port in ("COM", "LPT") for n in range(1, 10))}  # on Windows
_Adapters = dict[Target, tuple[Tensor, Tensor]]
_Files = dict[str, bytes]


def export_lora(bank: Bank, label: Label, folder: str | Path, format: LoraFormat = "diffusers") -> Path:
    """Writes one class token as a LoRA that gives the bank's errors at weight 1; returns what the other tool loads.

    B is multiplied by the scoring scale and by alpha / rank, and alpha is the rank in all formats, so that tools which
    do not read it give the same.

    Args:
        folder: made where it is missing; with "kohya" it may hold several class tokens.
        format: "diffusers" is `pytorch_lora_weights.safetensors` for `pipe.load_lora_weights(folder)`; "kohya" a file
            with the name of the class for ComfyUI and A1111; "peft" the folders `unet` and `text_encoder` for
            `PeftModel.from_pretrained`.

    Raises:
        ValueError: the format is unknown, the class is not in the bank, or the folder holds a bank or that file.
    """
    if format not in _FORMATS:
        raise ValueError(f"format={format!r}; pass one of {sorted(_FORMATS)}.")
    loaded, files = _files_of(bank.select([label]), file_names(bank.labels)[label], format)
    for name in (MANIFEST, *files):
        if (Path(folder) / name).exists():
            raise ValueError(f"{Path(folder) / name} is there already; export each class into a folder of its own.")
    return _write(Path(folder), loaded, files)


def export_classes(
    bank: Bank, folder: str | Path, format: LoraFormat = "diffusers", labels: Sequence[Label] | None = None
) -> dict[Label, Path]:
    """`export_lora` of several class tokens, by default all, each into a folder of its own; with "kohya" into one.

    Returns what the other tool loads of each. Nothing is written where one of them cannot be; what an export that was
    cut short has left is completed.

    Raises:
        ValueError: as `export_lora`.
    """
    chosen = bank.labels if labels is None else bank.select(labels).labels
    if format not in _FORMATS:
        raise ValueError(f"format={format!r}; pass one of {sorted(_FORMATS)}.")
    names = file_names(bank.labels)  # of all, so that a class's name does not depend on which others are exported
    folder, together = Path(folder), format == "kohya"
    folders = {x: folder if together else folder / names[x] for x in chosen}
    if (folder / MANIFEST).exists():
        raise ValueError(f"{folder} holds a bank; pass another folder.")
    for x in chosen:
        _, files = _files_of(bank.select([x]), names[x], format)
        there = {folders[x] / name: content for name, content in files.items() if (folders[x] / name).exists()}
        others = [path for path, content in there.items() if _parts(path.read_bytes()) != _parts(content)]
        if others or (folders[x].exists() and not is_empty(folders[x]) and not there and not together):
            raise ValueError(f"{(*others, folders[x])[0]} is there already; pass another folder, or remove it.")
    return {x: _write(folders[x], *_files_of(bank.select([x]), names[x], format)) for x in chosen}


def _files_of(one: Bank, name: str, format: LoraFormat) -> tuple[str, _Files]:
    """What the other tool loads of a bank of one class, and the files."""
    scaled = one.layout.split(one.scaled_rows())
    adapters = {t: (a[0].contiguous(), (b[0] * one.layout.scale).contiguous()) for t, (a, b) in scaled.items()}
    loaded, files = _FORMATS[format](one, adapters, name)
    if format != "kohya":  # whose folder holds LoRAs of any kind
        files["README.md"] = _card(one).encode()
    return loaded, files


def _parts(content: bytes) -> tuple[Any, bytes]:
    """Head and data of a safetensors file, whose head has its metadata in any order; of other files no head."""
    size = int.from_bytes(content[:8], "little")
    try:
        return json.loads(content[8 : 8 + size]), content[8 + size :]
    except (ValueError, RecursionError):
        return None, content


def _write(folder: Path, loaded: str, files: _Files) -> Path:
    for name, content in files.items():
        write_atomically(folder / name, content)
    return folder / loaded


def file_names(labels: Sequence[Label]) -> dict[Label, str]:
    """A name of a file or folder for each class: letters, digits, dots and dashes, the same on every system.

    Long names are cut; what would be one name (also where a system does not tell capitals apart) is numbered.
    """
    names: dict[Label, str] = {}
    taken: set[str] = set()
    for label in labels:
        base = re.sub(r"[^\w.-]+", "_", str(label)).strip(".")
        base = base.encode()[:_LONGEST].decode(errors="ignore") or "_"
        if base.split(".")[0].upper() in _RESERVED:
            base = f"_{base}"
        found = (base if number == 1 else f"{base}-{number}" for number in count(1))
        names[label] = next(name for name in found if name.casefold() not in taken)
        taken.add(names[label].casefold())
    return names


def _diffusers(bank: Bank, adapters: _Adapters, _: str) -> tuple[str, _Files]:
    tensors: dict[str, Tensor] = {}
    for target, (a, b) in adapters.items():
        # every reader of the format knows the text encoder under its old prefix
        prefix = "unet" if target.network == "unet" else "text_encoder.text_model"
        tensors[f"{prefix}.{target.name}.lora_A.weight"] = a
        tensors[f"{prefix}.{target.name}.lora_B.weight"] = b
    configs = {f"{network}.{k}": v for network, c in _peft_configs(bank).items() for k, v in c.items()}
    encoded = json.dumps(configs, default=sorted, sort_keys=True)
    name = "pytorch_lora_weights.safetensors"  # that diffusers looks for
    return name, {name: save_tensors(tensors, metadata={"format": "pt", "lora_adapter_metadata": encoded})}


def _kohya(bank: Bank, adapters: _Adapters, name: str) -> tuple[str, _Files]:
    tensors: dict[str, Tensor] = {}
    rank = bank.layout.rank
    for target, (a, b) in adapters.items():
        prefix = "lora_unet" if target.network == "unet" else "lora_te_text_model"
        key = f"{prefix}_{target.name.replace('.', '_')}"
        tensors |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b, f"{key}.alpha": tensor(float(rank))}
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank),
        "ss_training_comment": f"fewshot-diti class token {bank.labels[0]!r}, prompt: {bank.tokens[0].prompt}",
    }
    return f"{name}.safetensors", {f"{name}.safetensors": save_tensors(tensors, metadata=metadata)}


def _peft(bank: Bank, adapters: _Adapters, _: str) -> tuple[str, _Files]:
    files: _Files = {}
    for network, config in _peft_configs(bank).items():
        tensors = {
            f"base_model.model.{target.name}.lora_{part}.weight": weight
            for target, pair in adapters.items()
            if target.network == network
            for part, weight in zip("AB", pair, strict=True)
        }
        encoded = json.dumps(config, default=sorted, sort_keys=True, indent=2)
        files[f"{network}/adapter_config.json"] = encoded.encode()
        files[f"{network}/adapter_model.safetensors"] = save_tensors(tensors, metadata={"format": "pt"})
    return "", files


_FORMATS: dict[str, Callable[[Bank, _Adapters, str], tuple[str, _Files]]] = {
    "diffusers": _diffusers,
    "kohya": _kohya,
    "peft": _peft,
}


def _peft_configs(bank: Bank) -> dict[str, dict[str, Any]]:
    """What peft has to know of the adapters of each network that has some."""
    configs = {}
    for network in ("unet", "text_encoder"):
        names = [t.name for t in bank.layout.targets if t.network == network]
        if names:
            config = LoraConfig(r=bank.layout.rank, lora_alpha=bank.layout.rank, target_modules=names).to_dict()
            configs[network] = config | {"target_modules": names}
    return configs


def _card(bank: Bank) -> str:
    token = bank.tokens[0]
    prompt, backbone = printable(token.prompt), printable(bank.backbone_name)
    return f"# Class token {token.label!r}\n\nPrompt: `{prompt}`\n\nBackbone: `{backbone}`\n"
