"""PSNR of a backbone's autoencoder on a data set in FGVC layout with masks: whole images, and inside the aircraft.

python -m eval.autoencoder --vae fewshot_diti/assets/pocket-sd/vae --data DIR
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from diffusers import AutoencoderKL
from PIL import Image

from fewshot_diti.data.images import ImageGeometry
from fewshot_diti.data.sources import load_fgvc


@dataclass(frozen=True, kw_only=True)
class Config:
    """Folder of the autoencoder, and of the data set with `masks/*.png` beside `images/`."""

    vae: Path
    data: Path
    split: str = "test"
    output: Path | None = None
    """Where to write a sheet of originals and restorations."""


def main(config: Config) -> None:
    """Prints both figures."""
    vae = AutoencoderKL.from_pretrained(config.vae, dtype=torch.float32).eval()
    geometry = ImageGeometry(size=tuple(vae.config.sample_size), resize="squash")
    data = load_fgvc(config.data, config.split)
    squared: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    pairs = []
    height, width = geometry.size
    for start in range(0, len(data), 48):
        rows = range(start, min(start + 48, len(data)))
        pixels = torch.stack([geometry.pixels(data.image(i)) for i in rows])
        with torch.no_grad():
            restored = vae.decode(vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
        squared += list(((restored - pixels) / 2).square().mean(1).numpy())
        for i in rows:
            mask = Image.open(config.data / "masks" / f"{Path(data.names[i]).stem}.png").convert("L")
            masks.append(np.asarray(mask.resize((width, height), Image.Resampling.BOX)) > 127)
        pairs.append(torch.cat([pixels[:2], restored[:2]], 2))
    error, inside = np.stack(squared), np.stack(masks)
    print(f"{len(data)} images: PSNR {-10 * np.log10(error.mean()):.2f} dB over the whole image", end=", ")
    print(f"{-10 * np.log10(error[inside].mean()):.2f} dB inside the masks")
    if config.output:
        sheet = ((torch.cat(pairs)[:16] + 1) * 127.5).to(torch.uint8).permute(0, 2, 3, 1).numpy()
        columns = min(4, len(sheet))
        starts = range(0, len(sheet) // columns * columns, columns)
        picture = Image.fromarray(np.concatenate([np.concatenate(list(sheet[i : i + columns]), 1) for i in starts]))
        picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST).save(config.output)


if __name__ == "__main__":
    main(tyro.cli(Config))
