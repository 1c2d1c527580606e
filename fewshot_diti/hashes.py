"""Hashes of weights, and of a backbone: class tokens hold for the one that they were trained on, and for no other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

# what decides an error beside weights and vocabulary; names, not whole configurations, which grow with each release
_SCHEDULER_SETTINGS = (
    "beta_schedule",
    "beta_start",
    "beta_end",
    "trained_betas",
    "num_train_timesteps",
    "rescale_betas_zero_snr",
    "prediction_type",
)
_VAE_SETTINGS = ("scaling_factor", "act_fn", "norm_num_groups")
_TEXT_SETTINGS = ("hidden_act", "num_attention_heads", "layer_norm_eps")
_UNET_SETTINGS = (
    "act_fn",
    "attention_head_dim",
    "center_input_sample",
    "flip_sin_to_cos",
    "freq_shift",
    "mid_block_scale_factor",
    "norm_eps",
    "norm_num_groups",
    "num_attention_heads",
    "resnet_time_scale_shift",
)
# settings that decide an error and that hardly a pipeline changes: they count where they are not these, so that the
# hash of a common pipeline is what it was before they counted
_USUAL_UNET = {"downsample_padding": 1, "time_embedding_act_fn": None, "timestep_post_act": None}
_USUAL_TOKENS = {"bos_token": "<|startoftext|>", "pad_token": "<|endoftext|>"}


def hash_backbone(
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    unet: UNet2DConditionModel,
    scheduler: DDIMScheduler,
) -> str:
    """32 hex characters that identify all that decides an error; files in fp32 and in fp16 agree."""
    decides: tuple[Any, ...] = (
        hash_weights(vae, text_encoder, unet),
        _settings(vae.config, _VAE_SETTINGS),
        _settings(text_encoder.config, _TEXT_SETTINGS),
        _settings(unet.config, _UNET_SETTINGS),
        # the schedule's numbers, not its tensors: these are rounded differently from processor to processor
        _settings(scheduler.config, _SCHEDULER_SETTINGS),
        sorted(tokenizer.get_vocab().items()),
    )
    length = {"model_max_length": text_encoder.config.max_position_embeddings}
    unusual = _unusual(unet.config, _USUAL_UNET) | _unusual(tokenizer, _USUAL_TOKENS | length)
    if unusual:
        decides = (*decides, json.dumps(unusual, sort_keys=True))
    return hashlib.sha256(repr(decides).encode()).hexdigest()[:32]


def hash_weights(*modules: nn.Module) -> str:
    """32 hex characters of the sha256 of names, shapes and values as fp16: an fp32 file and its fp16 copy agree."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            if tensor.is_floating_point():
                digest.update(f"{name} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().to("cpu", torch.float16).contiguous().numpy())
    return digest.hexdigest()[:32]


def check_finite(model: str, **networks: nn.Module) -> None:
    """Raises a ValueError that names model, network and tensor where a weight is infinite or no number."""
    for network, module in networks.items():
        for name, tensor in module.state_dict().items():
            # the sum is cheap, but large weights may overflow it
            if tensor.is_floating_point() and not tensor.sum().isfinite() and not tensor.isfinite().all():
                raise ValueError(
                    f"Model {model!r}: weight {name!r} of its {network} holds numbers that are not finite; get "
                    "the weights again, or load the pipeline in float32."
                )


def _settings(config: Any, names: Sequence[str]) -> str:
    return json.dumps({name: getattr(config, name) for name in names}, sort_keys=True)


def _unusual(settings: Any, usual: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: getattr(settings, name, value) for name, value in usual.items()}
    return {name: value for name, value in found.items() if value != usual[name]}
