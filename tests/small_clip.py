"""A tiny OpenCLIP with random weights, in the layout that open_clip loads."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file
from transformers import CLIPTokenizer

from fewshot_diti.backbone import resolve

TOWERS = {
    "convolutions": {"timm_model_name": "edgenext_xx_small"},
    "attention pooling": {"timm_model_name": "test_byobnet", "timm_pool": "abs_attn", "timm_proj": ""},
    "transformer": {"layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
}


def save_tiny_clip(folder: Path, tower: str) -> Path:
    """Images of 32 x 64 pixels, the pocket's tokenizer."""
    tokenizer = CLIPTokenizer.from_pretrained(Path(resolve("pocket")) / "tokenizer")
    tokenizer.save_pretrained(folder)
    text = {"context_length": 32, "vocab_size": len(tokenizer), "hf_tokenizer_name": "here", "width": 64, "heads": 1}
    vision = TOWERS[tower] | {"image_size": [32, 64]}
    model = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text | {"layers": 2}}
    preprocess = {"size": [32, 64], "resize_mode": "squash", "mean": [0.5] * 3, "std": [0.5] * 3}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": preprocess}))
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**model).state_dict(), folder / "open_clip_model.safetensors")
    return folder
