"""The pocket OpenCLIP, trained on the images and captions of the pocket: the CLIP of the offline tables.

Images have the pocket's size, and captions are drawn in the same way.

    accelerate launch --cpu -m recipes.pocket.clip --data DIR

`DIR` holds Parquet shards with columns image, variant, manufacturer, airline. Started again, a run continues at its
last checkpoint. A processor without bfloat16 needs --mixed_precision no. The rows with CLIP of `fewshot-diti eval`
use the model that ships; `--clip local-dir:runs/pocket-clip/clip` takes this one.

Hardware: two CPU cores; on GPUs leave out --cpu.
Time: 67 minutes in float32 on two cores with AVX2 alone (0.65 steps/s where nothing else runs).
Expected: held_out_accuracy 0.387 / 0.584 / 0.616 / 0.627 / 0.703 after 500 / 1,000 / 1,500 / 2,000 / 2,600 steps,
features of variants left out of training, 16 images per variant (docs/logs/pocket-clip.jsonl; its first 600 steps had
the learning rate of a run of 4,000). Measured 2026-11-26.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
import tyro
from accelerate import Accelerator
from open_clip.loss import gather_features
from safetensors.torch import save
from torch import Tensor, nn
from transformers import CLIPTokenizer

from fewshot_diti.backbone import resolve
from fewshot_diti.files import write_atomically
from fewshot_diti.loop import half_weights, run_loop, step_generator
from recipes.pocket.captions import Captioner
from recipes.pocket.renders import (
    HELD_OUT,
    KINDS,
    FalseColourConfig,
    Renders,
    as_batch,
    false_colour_copies,
    few_shot_accuracy,
    load_renders,
    random_crops,
    split_held_out,
)


@dataclass(frozen=True, kw_only=True)
class ClipConfig(FalseColourConfig):
    """Everything that decides a CLIP run.

    Attributes:
        kinds: JSON object that names kinds of aircraft for a variant; None: captions name none.
        tokenizer: folder of a CLIP tokenizer whose end-of-text has the largest id, as the backbone's has.
        size: (height, width) of the images in pixels.
        image_tower: a timm architecture that ends in a map of a multiple of 64 features; attention pools it, which
            gives CLIP-LoRA something to adapt.
        embed_dim, text_width, text_layers: as in an open_clip configuration.
        zoom, shift: of the random crops: an image is enlarged by up to this share, and shifted by up to this share.
    """

    tokenizer: Path
    kinds: Path | None = None
    size: tuple[int, int] = (64, 128)
    image_tower: str = "cs3darknet_s"
    embed_dim: int = 192
    text_width: int = 192
    text_layers: int = 3
    false_copies: int = 5
    zoom: float = 0.15
    shift: float = 0.06
    steps: int = 4_000
    batch_size: int = 128
    lr: float = 1e-3
    warmup: int = 200
    ema_decay: float = 0.995


class _ImageToText(nn.Module):
    """Both towers in one forward, so that data-parallel wrappers see one call."""

    def __init__(self, clip: open_clip.CLIP) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, images: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = (self.clip.encode_image(images), self.clip.encode_text(input_ids))
        image, text = (F.normalize(f.float(), dim=1) for f in features)
        return image, text, self.clip.logit_scale.exp()


def model_config(config: ClipConfig, tokenizer: CLIPTokenizer) -> dict[str, Any]:
    """The open_clip configuration, in the layout that `open_clip.create_model('local-dir:...')` reads."""
    return {
        "model_cfg": {
            "embed_dim": config.embed_dim,
            "vision_cfg": {
                "timm_model_name": config.image_tower,
                "timm_pool": "abs_attn",
                "timm_proj": "",  # attention pooling ends in one
                "image_size": list(config.size),
            },
            "text_cfg": {
                "context_length": tokenizer.model_max_length,
                "vocab_size": len(tokenizer),
                "hf_tokenizer_name": "in this folder",
                "width": config.text_width,
                "heads": max(1, config.text_width // 64),
                "layers": config.text_layers,
            },
        },
        "preprocess_cfg": {
            "size": list(config.size),
            "resize_mode": "squash",
            "interpolation": "bicubic",
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
        },
    }


def contrastive_loss(logits_BB: Tensor, input_ids_BL: Tensor) -> Tensor:
    """CLIP's loss, an image's probability shared evenly by all captions that are the same as its own.

    Many captions only name what all images are; as each other's negatives they would train to separate equal texts.
    """
    same_BB = (input_ids_BL[:, None] == input_ids_BL[None]).all(2).to(logits_BB)
    target_BB = same_BB / same_BB.sum(1, keepdim=True)
    return (F.cross_entropy(logits_BB, target_BB) + F.cross_entropy(logits_BB.T, target_BB)) / 2


class _CaptionedImages:
    """The training set: every image, as rendered and in false colours, and a fresh caption each time."""

    def __init__(self, renders: Renders, config: ClipConfig) -> None:
        self.config = config
        self.caption = Captioner(renders, config.kinds)
        self.pixels = [renders.pixels_NCHW, *false_colour_copies(renders, config.false_copies)]

    def batch(self, size: int, g: torch.Generator) -> tuple[Tensor, list[str]]:
        rows = torch.randperm(len(self.pixels[0]), generator=g)[:size].tolist()
        shuffled = (torch.rand(size, generator=g) < self.config.false_colours).tolist()
        versions = torch.randint(1, len(self.pixels), (size,), generator=g).tolist()
        rng = random.Random(int(torch.randint(2**62, (), generator=g)))
        captions = [self.caption(row, rng, false_colours=f) for row, f in zip(rows, shuffled, strict=True)]
        pixels = [self.pixels[v * f][row] for row, v, f in zip(rows, versions, shuffled, strict=True)]
        return torch.stack(pixels), captions


def train_clip(config: ClipConfig) -> open_clip.CLIP:
    """Trains and saves `output_dir/clip` at every validation; a killed run continues at its last checkpoint.

    Raises:
        ValueError: fewer than two variants are held out; the log reports how well features separate these.
    """
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    seen, unseen = split_held_out(load_renders(config.data, config.size), config.held_out)
    if len(set(unseen.variants)) < 2:
        raise ValueError(f"{config.held_out} holds out {sorted(set(unseen.variants))}; name two variants or more.")
    data = _CaptionedImages(seen, config)
    tokenizer = CLIPTokenizer.from_pretrained(config.tokenizer)
    layout = model_config(config, tokenizer)
    torch.manual_seed(config.seed)
    clip = open_clip.CLIP(**layout["model_cfg"])
    module: nn.Module = _ImageToText(clip).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    accelerator.print(f"{sum(p.numel() for p in module.parameters()) / 1e6:.1f} M parameters, {len(tokenizer)} tokens")
    optimizer = torch.optim.AdamW(module.parameters(), lr=config.lr, betas=(0.9, 0.98), weight_decay=0.1, fused=True)
    module = accelerator.prepare_model(module)
    to_batch = partial(as_batch, device=accelerator.device)

    def loss_fn(module: nn.Module, step: int) -> dict[str, Tensor]:
        g = step_generator(config.seed, step, accelerator.process_index)
        pixels, captions = data.batch(config.batch_size, g)
        encoded = tokenizer(
            captions, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
        )
        images = random_crops(to_batch(pixels), config.zoom, config.shift, g)
        ids = encoded.input_ids.to(accelerator.device)
        image, text, scale = module.train()(images, ids)
        if accelerator.num_processes > 1:
            ranks = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
            image, text = gather_features(image, text, gather_with_grad=True, **ranks)
            ids = accelerator.gather(ids)
        return {"loss": contrastive_loss(scale * image @ text.T, ids)}

    def validate(module: nn.Module) -> dict[str, float]:
        clip.eval()
        with torch.no_grad(), accelerator.autocast():
            features = [clip.encode_image(to_batch(b)).float().cpu() for b in unseen.pixels_NCHW.split(64)]
        if accelerator.is_main_process:
            save_clip()
        held_out = torch.cat(features).numpy()
        return {"held_out_accuracy": few_shot_accuracy(held_out, unseen.variants)}

    def save_clip() -> None:
        folder = config.output_dir / "clip"
        tokenizer.save_pretrained(folder)
        write_atomically(folder / "open_clip_model.safetensors", save(half_weights(clip)))
        write_atomically(folder / "open_clip_config.json", (json.dumps(layout, indent=2) + "\n").encode())

    made_from = f"images {seen.fingerprint}, {len(tokenizer)} tokens"
    run_loop(accelerator, module, optimizer, config, made_from=made_from, loss_fn=loss_fn, validate=validate)
    if accelerator.is_main_process:
        save_clip()
    return clip.eval()


def pocket_clip() -> ClipConfig:
    """The configuration of the pocket's counterpart."""
    return ClipConfig(
        data=Path("pocket-train"),
        held_out=HELD_OUT,
        kinds=KINDS,
        tokenizer=Path(resolve("pocket")) / "tokenizer",
        output_dir=Path("runs/pocket-clip"),
        steps=2_600,
    )


if __name__ == "__main__":
    try:
        train_clip(tyro.cli(ClipConfig, default=pocket_clip()))
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
