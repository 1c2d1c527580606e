"""LoRA files of other tools as class tokens: diffusers (old and new names), kohya (ComfyUI, A1111), and peft.

Shapes: R rank, I and O features of a linear.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fewshot_diti.backbone import Backbone
from fewshot_diti.bank import Bank, ClassToken
from fewshot_diti.config import Label
from fewshot_diti.data.image_set import normalize_class_name
from fewshot_diti.data.images import ImageGeometry
from fewshot_diti.data.tables import parse_json, read_utf8
from fewshot_diti.lora import Layout, Target
from fewshot_diti.prompts import Prompts

_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # of diffusers and peft
_PART = re.compile(r"(?:_lora|\.lora|\.lora_linear_layer)?[._](?:lora_)?(down|up|A|B)(?:\.default)?\.weight$")
_DOWN = {"down": "A", "up": "B", "A": "A", "B": "B"}
_KOHYA = {"lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder"}
_PREFIXES = {"unet.": "unet", "text_encoder.": "text_encoder", "base_model.model.": ""}
_PLAIN = {"use_dora": False, "use_rslora": False, "bias": "none", "modules_to_save": None}  # of peft's settings


def import_lora(
    backbone: Backbone, files: Mapping[Label, str | Path], prompts: Prompts, geometry: ImageGeometry | None = None
) -> Bank:
    """A bank whose class tokens are LoRAs that another tool trained, one for each class, at weight 1.

    What a LoRA was trained on is not in its file: `prompts` must be those of its training, and no number of shots is
    known (0).

    Args:
        files: of each class a `.safetensors` file, or the folder that diffusers or peft wrote.
        geometry: of the images; by default the backbone's size, cropped.

    Raises:
        FileNotFoundError: no such file, or no LoRA in the folder.
        ValueError: no LoRA for linear layers of this backbone, naming the file, what does not fit and why, or a prompt
            that is longer than the text encoder reads.
    """
    if not files:
        raise ValueError("There are no LoRA files to import.")
    backbone.tokenize([prompts.of_class(label) for label in files])
    read = {label: read_lora(backbone, path) for label, path in files.items()}
    rank = max(a.shape[0] for adapters in read.values() for a, _ in adapters.values())
    targets = dict.fromkeys(target for adapters in read.values() for target in adapters)
    layout = Layout(tuple(sorted(targets, key=lambda t: (t.network != "unet", t.name))), rank)
    return Bank(
        tokens=tuple(
            ClassToken(label=x, prompt=prompts.of_class(x), num_shots=0, unet_scale=1.0, text_encoder_scale=1.0)
            for x in read
        ),
        layout=layout,
        rows=torch.stack([_row(layout, adapters) for adapters in read.values()]),
        backbone_name=backbone.public_name,
        backbone_hash=backbone.hash,
        geometry=geometry or ImageGeometry(size=backbone.image_size),
    )


def read_lora(backbone: Backbone, path: str | Path) -> dict[Target, tuple[Tensor, Tensor]]:
    """A [R, I] and B [O, R] of every linear that a LoRA adapts, fp32; B times alpha / rank.

    Raises:
        FileNotFoundError, ValueError: as `import_lora`.
    """
    found: dict[Target, dict[str, Tensor]] = {}
    linears = {key: _linears(network) for key, network in backbone.networks.items()}
    for file, network in _files(Path(path)):
        tensors, alphas = _read(file)
        for key, tensor in tensors.items():
            match = _PART.search(key)
            if match is None:
                raise ValueError(
                    f"{file} holds {key!r}, which is no LoRA of a linear layer; class tokens hold plain LoRA (no DoRA, "
                    "no trained bias, no embedding). Train such a one."
                )
            target = _target(file, key[: match.start()], network, linears)
            weight = tensor.float().flatten(1) if tensor.shape[2:] == (1, 1) else tensor.float()
            found.setdefault(target, {})[_DOWN[match[1]]] = weight
            if (alpha := alphas.get(key[: match.start()], alphas.get(target.network))) is not None:
                found[target]["alpha"] = torch.tensor(alpha)
    if not found:
        raise ValueError(f"{path} holds no adapters; pass the file of a LoRA.")
    return {target: _pair(path, target, parts) for target, parts in found.items()}


def _files(path: Path) -> list[tuple[Path, str]]:
    """The files of a LoRA, each with the network that its keys leave unsaid, or ""."""
    if os.path.isdir(path):  # False, too, for what can be no path
        parts = [(path / network / _NAMES[1], network) for network in ("unet", "text_encoder")]
        found = [(file, network) for file, network in parts if file.is_file()]
        found += [(path / name, "unet") for name in _NAMES if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(
                f"{path} holds no LoRA: neither {', '.join(_NAMES)} nor unet/{_NAMES[1]}; pass the file itself."
            )
        return found
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no LoRA file {path}; check the path.")
    return [(path, path.parent.name if path.parent.name == "text_encoder" else "unet")]


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The tensors of a file without their alphas, and these by the name of the adapted module or of the network."""
    try:
        with safe_open(file, "pt") as opened:
            tensors, metadata = {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} is no whole safetensors file ({error}); LoRAs in other formats are not read, since opening such a "
            "file can run code. Convert it, or copy it again."
        ) from error
    if strange := [key for key, tensor in tensors.items() if not tensor.is_floating_point()]:
        raise ValueError(f"{file} holds {strange[0]!r} in {tensors[strange[0]].dtype}; weights of a LoRA are floats.")
    named = [key for key in tensors if key.endswith(".alpha")]
    alphas: dict[str, Any] = {key.removesuffix(".alpha"): tensors.pop(key) for key in named}
    config = file.with_name("adapter_config.json")
    if file.name == _NAMES[1] and config.is_file():
        _check_config(config, parsed := _settings(read_utf8(config), config))
        alphas[file.parent.name if file.parent.name == "text_encoder" else "unet"] = parsed.get("lora_alpha")
    elif "lora_adapter_metadata" in metadata:
        parsed = _settings(metadata["lora_adapter_metadata"], file)
        for network in ("unet", "text_encoder"):
            own = {k.removeprefix(f"{network}."): v for k, v in parsed.items() if k.startswith(f"{network}.")}
            _check_config(file, own)
            alphas[network] = own.get("lora_alpha")
    return tensors, {key: _number(value, file) for key, value in alphas.items() if value is not None}


def _settings(text: str, file: Path) -> dict[str, Any]:
    """The settings of peft in a JSON text; raises ValueError where it holds none."""
    if not isinstance(parsed := parse_json(text, file), dict):
        raise ValueError(f"{file} holds no settings of a LoRA but {text[:40]!r}; copy it again.")
    return parsed


def _number(alpha: Any, file: Path) -> float:
    """An alpha, which other tools write as a number or a tensor of one; raises ValueError for anything else."""
    try:
        found = float(alpha)
    except (TypeError, ValueError, RuntimeError):
        found = math.nan
    if not math.isfinite(found):
        raise ValueError(f"{file} has the alpha {alpha}; it must be one finite number. Copy the file again.")
    return found


def _check_config(file: Path, config: Mapping[str, Any]) -> None:
    """Raises a ValueError where peft's settings ask for more than plain LoRA of one alpha."""
    for name, plain in _PLAIN.items():
        if config.get(name, plain) not in (plain, None, []):
            raise ValueError(f"{file} was made with {name}={config[name]!r}; class tokens hold plain LoRA ({plain!r}).")
    if config.get("alpha_pattern"):
        raise ValueError(
            f"{file} has an alpha of its own for some layers (alpha_pattern); export it in kohya's format."
        )


def _linears(network: nn.Module) -> dict[str, tuple[str, nn.Module]]:
    """Modules by their names with underscores for dots, as kohya writes them."""
    return {name.replace(".", "_"): (name, module) for name, module in network.named_modules() if name}


def _target(file: Path, module: str, network: str, linears: Mapping[str, Mapping[str, Any]]) -> Target:
    """The linear of the backbone that a file calls `module`."""
    name = module
    for prefix, its_network in {**_KOHYA, **_PREFIXES}.items():
        if name.startswith(prefix):
            name, network = name.removeprefix(prefix), its_network or network
    name = name.replace(".processor.", ".").replace(".", "_").removesuffix("_lora")
    known = linears.get(network, {})
    tried = (name, f"{name}_0", name.removeprefix("text_model_"))  # an old file calls to_out.0 to_out
    found = [known[x] for x in tried if x in known and isinstance(known[x][1], nn.Linear)]
    if not found:
        other = next((known[x] for x in tried if x in known), None)
        what = f"a {type(other[1]).__name__} of this backbone" if other else "no layer of this backbone"
        raise ValueError(
            f"{file} adapts {module!r}, which is {what}; class tokens adapt linear layers. A LoRA fits the kind of "
            "Stable Diffusion that it was trained on: pass that as backbone."
        )
    full_name, linear = found[0]
    return Target(network, full_name, linear.in_features, linear.out_features)


def _pair(path: str | Path, target: Target, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A and B of one linear, of the shapes that it asks for."""
    if {"A", "B"} - parts.keys():
        raise ValueError(f"{path} holds one half of the adapter of {target.name} alone; copy the file again.")
    a, b = parts["A"], parts["B"]
    rank = len(a) if a.ndim == 2 else 0
    if not rank or a.shape != (rank, target.in_features) or b.shape != (target.out_features, rank):
        raise ValueError(
            f"{path} adapts {target.name} by {list(a.shape)} and {list(b.shape)}, which that layer of this backbone "
            f"({target.in_features} to {target.out_features}) cannot take; pass the Stable Diffusion that the LoRA was "
            "trained on as backbone."
        )
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError(f"{path} holds values for {target.name} that are not finite; train it again.")
    return a, b * (float(parts.get("alpha", rank)) / rank)


def _row(layout: Layout, adapters: Mapping[Target, tuple[Tensor, Tensor]]) -> Tensor:
    """One class's row: smaller ranks and absent targets are zero."""
    row = torch.zeros(1, layout.num_parameters)
    for target, (a_1RI, b_1OR) in layout.split(row).items():
        if target in adapters:
            a, b = adapters[target]
            a_1RI[0, : len(a)], b_1OR[0, :, : len(a)] = a, b
    return row[0]


def labelled_files(named: tuple[str, ...]) -> dict[Label, Path]:
    """Files by class from texts LABEL=PATH, or PATH alone, whose name then is the class's.

    Raises:
        ValueError: one class twice, or a text that is no class name.
    """
    files: dict[Label, Path] = {}
    for text in named:
        label, equals, path = text.partition("=")
        if not equals or os.path.exists(text):
            label, path = Path(text).stem if os.path.isfile(text) else Path(text).name, text
        if not (label := normalize_class_name(label)):
            raise ValueError(f"{text!r} names no class; name it as LABEL=PATH.")
        if label in files:
            raise ValueError(f"Two LoRAs are named {label!r}, {files[label]} and {path}; name one as LABEL={path}.")
        files[label] = Path(path)
    return files
