"""A small network trained with labels of the pre-training variants: siblings of the few-shot classes.

This is extra supervision that few-shot methods do not have. Its features separate variants far better than theirs.

    accelerate launch --cpu -m recipes.pocket.siblings --data DIR

`DIR` holds Parquet shards with columns image, variant, manufacturer, airline. Started again, a run continues at its
last checkpoint. A processor without bfloat16 needs --mixed_precision no. The row `siblings` of `fewshot-diti eval`
uses features of the network that ships; `--siblings local-dir:runs/pocket-siblings/network` takes this one.

Hardware: two CPU cores; on GPUs leave out --cpu.
Time: 28 minutes in float32 on two cores with AVX2 alone (1.8 steps/s).
Expected: held_out_accuracy 0.989 after 3,000 steps (0.940 after 500), features of variants left out of training, 16
images per variant; as the row `siblings` 77.6 / 86.9 / 89.3 / 95.0 / 95.6 % at 1 / 2 / 4 / 8 / 16 shots of the 12
bundled variants, seeds 1 to 3, measured 2026-11-26. `regnetx_002` had 0.702 after 1,500 steps.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
import tyro
from accelerate import Accelerator
from safetensors.torch import save
from torch import Tensor, nn

from fewshot_diti.files import write_atomically
from fewshot_diti.loop import half_weights, run_loop, step_generator
from recipes.pocket.renders import (
    HELD_OUT,
    FalseColourConfig,
    as_batch,
    false_colour_copies,
    few_shot_accuracy,
    load_renders,
    random_crops,
    split_held_out,
)


@dataclass(frozen=True, kw_only=True)
class SiblingsConfig(FalseColourConfig):
    """Everything that decides a run.

    Attributes:
        size: (height, width) of the images in pixels.
        network: a timm architecture.
        zoom, shift: as in `ClipConfig`.
        label_smoothing: of the cross-entropy.
    """

    size: tuple[int, int] = (64, 128)
    network: str = "cs3darknet_s"
    zoom: float = 0.15
    shift: float = 0.06
    label_smoothing: float = 0.1
    steps: int = 3_000
    batch_size: int = 64
    lr: float = 2e-3
    warmup: int = 100
    ema_decay: float = 0.99


class View(NamedTuple):
    """What the network sees of uint8 images [N, 3, height, width].

    Attributes:
        channels: of what it sees.
        keep: what is kept in memory of all images [N, ...].
        batch: what the network takes, from some of it, on a device: float32 [B, channels, height, width].
    """

    channels: int
    keep: Callable[[Tensor], Tensor]
    batch: Callable[[Tensor, torch.device], Tensor]


PIXELS = View(channels=3, keep=lambda pixels_NCHW: pixels_NCHW, batch=as_batch)


def train_siblings(config: SiblingsConfig, view: View = PIXELS) -> nn.Module:
    """Trains and saves `output_dir/network` at every validation; a killed run continues at its last checkpoint.

    Args:
        view: what the network sees. `ImageNetwork` loads one that sees pixels.

    Raises:
        ValueError: fewer than two variants are held out; the log reports how well features separate these.
    """
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    seen, unseen = split_held_out(load_renders(config.data, config.size), config.held_out)
    if len(set(unseen.variants)) < 2:
        raise ValueError(f"{config.held_out} holds out {sorted(set(unseen.variants))}; name two variants or more.")
    names = sorted(set(seen.variants))
    labels = torch.tensor([names.index(v) for v in seen.variants])
    versions = [view.keep(x) for x in (seen.pixels_NCHW, *false_colour_copies(seen, config.false_copies))]
    unseen_kept = view.keep(unseen.pixels_NCHW)
    torch.manual_seed(config.seed)
    network: Any = timm.create_model(config.network, pretrained=False, in_chans=view.channels, num_classes=len(names))
    module: nn.Module = network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(module.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=0.05, fused=True)
    module = accelerator.prepare_model(module)

    def loss_fn(module: nn.Module, step: int) -> dict[str, Tensor]:
        g = step_generator(config.seed, step, accelerator.process_index)
        rows = torch.randint(len(seen), (config.batch_size,), generator=g)
        shuffled = torch.rand(len(rows), generator=g) < config.false_colours
        version = torch.where(shuffled, torch.randint(1, len(versions), (len(rows),), generator=g), 0)
        pixels = torch.stack([versions[v][row] for v, row in zip(version.tolist(), rows.tolist(), strict=True)])
        images = random_crops(view.batch(pixels, accelerator.device), config.zoom, config.shift, g)
        logits = module.train()(images)
        target = labels[rows].to(logits.device)
        return {"loss": F.cross_entropy(logits.float(), target, label_smoothing=config.label_smoothing)}

    def validate(module: nn.Module) -> dict[str, float]:
        network.eval()
        with torch.no_grad(), accelerator.autocast():
            batches = [view.batch(kept, accelerator.device) for kept in unseen_kept.split(64)]
            features = [network.forward_head(network.forward_features(b), pre_logits=True) for b in batches]
        if accelerator.is_main_process:
            save_network()
        return {"held_out_accuracy": few_shot_accuracy(torch.cat(features).float().cpu().numpy(), unseen.variants)}

    def save_network() -> None:
        folder = config.output_dir / "network"
        head = network.pretrained_cfg["classifier"] + "."
        weights = {k: v for k, v in half_weights(network).items() if not k.startswith(head)}
        write_atomically(folder / "model.safetensors", save(weights))
        layout = {"network": config.network, "size": list(config.size)}
        write_atomically(folder / "config.json", (json.dumps(layout) + "\n").encode())

    made_from = f"images {seen.fingerprint}"
    run_loop(accelerator, module, optimizer, config, made_from=made_from, loss_fn=loss_fn, validate=validate)
    if accelerator.is_main_process:
        save_network()
    return network.eval()


def pocket_siblings() -> SiblingsConfig:
    """Images of the pocket's size."""
    return SiblingsConfig(data=Path("pocket-train"), held_out=HELD_OUT, output_dir=Path("runs/pocket-siblings"))


if __name__ == "__main__":
    try:
        train_siblings(tyro.cli(SiblingsConfig, default=pocket_siblings()))
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
