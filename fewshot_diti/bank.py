"""The bank: an ordered set of class tokens over one backbone, saved, shared, extended and exported."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from fewshot_diti.backbone import Backbone
from fewshot_diti.bank_files import (
    CLASSES,
    CONFIG,
    FORMAT,
    WEIGHTS,
    from_fields,
    read_files,
    to_json,
    write_files,
    written_here,
)
from fewshot_diti.config import Label
from fewshot_diti.data.arguments import plain_labels
from fewshot_diti.data.folders import check_folder
from fewshot_diti.data.images import ImageGeometry
from fewshot_diti.hub import saved_folder, upload
from fewshot_diti.lora import Layout, Target, adapted, union_layout
from fewshot_diti.model_card import model_pages
from fewshot_diti.progress import Progress

if TYPE_CHECKING:
    from fewshot_diti.lora_files import LoraFormat


@dataclass(frozen=True, kw_only=True)
class ClassToken:
    """What a bank holds for one class beside its weights.

    Attributes:
        label: the class as the user calls it.
        prompt: the text that conditions the U-Net.
        num_shots: images it was trained on.
        unet_scale: of the U-Net's LoRA at scoring.
        text_encoder_scale: of the text encoder's.
    """

    label: Label
    prompt: str
    num_shots: int
    unet_scale: float = 0.6
    text_encoder_scale: float = 0.7

    def __post_init__(self) -> None:
        if not isinstance(self.label, str | int) or not isinstance(self.prompt, str):
            got = f"{self.label!r} and {self.prompt!r}"
            raise ValueError(f"A class token has a label, text or whole number, and a prompt, got {got}.")
        if type(self.num_shots) is not int or self.num_shots < 0:
            raise ValueError(f"num_shots={self.num_shots!r}; pass a whole number of at least 0.")
        scales = self.unet_scale, self.text_encoder_scale
        if not all(isinstance(x, int | float) and isfinite(x) for x in scales):
            raise ValueError(f"The scales of {self.label!r} are {scales}; pass finite numbers.")


@dataclass(frozen=True, kw_only=True, eq=False)
class Bank:
    """Class tokens over one backbone; every method that changes one returns a new bank.

    Attributes:
        tokens: C class tokens.
        layout: where each adapter lies in a row.
        rows: their LoRA weights [C, P], fp32, as trained (unscaled).
        backbone_name: as others may call it.
        backbone_hash: a backbone with another one is refused.
        geometry: size and resize rule of shots and test images.
    """

    tokens: tuple[ClassToken, ...]
    layout: Layout
    rows: Tensor
    backbone_name: str
    backbone_hash: str
    geometry: ImageGeometry

    def __post_init__(self) -> None:
        labels = self.labels
        if len({(type(x), x) for x in labels}) < len(labels):
            raise ValueError(f"A bank holds each class once, got {list(labels)}.")
        if len(types := sorted({type(x).__name__ for x in labels})) > 1:
            raise ValueError(f"Labels of a bank are all str, all int or all bool, got {types}: {list(labels)}.")
        name, hash = self.backbone_name, self.backbone_hash
        if not (isinstance(name, str) and isinstance(hash, str) and hash.isalnum()):  # files are named by the hash
            raise ValueError(f"A bank names its backbone and the hash of it, got {name!r} and {hash!r}.")
        if not self.rows.is_floating_point():
            raise ValueError(f"Weights of class tokens are floats, got {self.rows.dtype}.")
        if self.rows.shape != (len(labels), self.layout.num_parameters):
            raise ValueError(
                f"A bank of {len(labels)} classes needs weights [{len(labels)}, {self.layout.num_parameters}], got "
                f"{list(self.rows.shape)}."
            )

    def __len__(self) -> int:
        return len(self.tokens)

    def __eq__(self, other: object) -> bool:
        """Whether both hold the same class tokens over the same backbone, to the bit."""
        if not isinstance(other, Bank):
            return NotImplemented
        mine, theirs = ((b.tokens, b.layout, b.backbone_hash, b.geometry) for b in (self, other))
        return mine == theirs and torch.equal(self.rows, other.rows)

    __hash__ = None  # type: ignore[assignment]

    @property
    def labels(self) -> tuple[Label, ...]:
        """The classes in order."""
        return tuple(t.label for t in self.tokens)

    def as_label(self, name: str) -> Label:
        """A class's name as a label of the type that the bank's have.

        Raises:
            ValueError: the bank's labels are whole numbers and this is none as Python writes it (01 is another class
                than 1), or they are neither texts nor whole numbers.
        """
        kinds = {type(label) for label in self.labels}
        if kinds <= {str}:
            return name
        if kinds == {int} and re.fullmatch("0|-?[1-9][0-9]*", name):
            return int(name)
        raise ValueError(
            f"The bank's labels are {', '.join(map(repr, self.labels[:3]))} and so on; {name!r} is none such."
        )

    def check_backbone(self, backbone: Backbone) -> None:
        """Raises a ValueError that names both when the backbone is not the one the bank was trained on."""
        if not isinstance(backbone, Backbone):
            raise TypeError(f"{backbone!r} is no Backbone; load one with Backbone.from_pretrained.")
        if backbone.hash != self.backbone_hash:
            raise ValueError(
                f"The bank was trained on backbone {self.backbone_name!r} (hash {self.backbone_hash}), not on "
                f"{backbone.name!r} (hash {backbone.hash}); load that backbone, or train the class tokens again. "
                "Under one name, weights or settings have changed, or another version of fewshot-diti made the bank."
            )
        for target in self.layout.targets:
            if not target.fits(backbone):
                raise ValueError(
                    f"The bank adapts {target}, and backbone {backbone.name!r} has no such layer; train again."
                )

    def scaled_rows(self) -> Tensor:
        """Weights [C, P] for scoring: B multiplied by each class's scoring scale."""
        scales = {
            "unet": torch.tensor([t.unet_scale for t in self.tokens]),
            "text_encoder": torch.tensor([t.text_encoder_scale for t in self.tokens]),
        }
        rows = self.rows.clone()  # scaled in place: with many classes they fill the memory
        for target, (_, b_COR) in self.layout.split(rows).items():
            b_COR.mul_(scales[target.network][:, None, None].to(b_COR))
        return rows

    def merge(self, other: Bank) -> Bank:
        """The classes of both; weights of a smaller rank or narrower block filter are zero-padded.

        Raises:
            ValueError: another backbone or geometry, or a class that stands in both.
        """
        if (self.backbone_hash, self.geometry) != (other.backbone_hash, other.geometry):
            raise ValueError(
                "Banks merge over one backbone and one geometry, got "
                f"{self.backbone_name!r} ({self.backbone_hash}), {self.geometry} and "
                f"{other.backbone_name!r} ({other.backbone_hash}), {other.geometry}."
            )
        both = sorted({repr(x) for x in self.labels} & {repr(x) for x in other.labels})
        if both:
            raise ValueError(f"Classes {', '.join(both)} stand in both banks; remove them from one first.")
        layout = union_layout([self.layout, other.layout])
        rows = torch.cat([b.layout.repack(b.rows, layout) for b in (self, other)])
        return replace(self, tokens=self.tokens + other.tokens, layout=layout, rows=rows)

    def select(self, labels: Sequence[Label]) -> Bank:
        """The given classes in the given order.

        Raises:
            ValueError: a class is not in the bank.
        """
        labels = plain_labels(labels)
        position = {(type(x), x): i for i, x in enumerate(self.labels)}
        unknown = [x for x in labels if (type(x), x) not in position]
        if unknown:
            raise ValueError(f"Classes {unknown} are not in the bank; it holds {list(self.labels)}.")
        index = [position[type(x), x] for x in labels]
        return replace(self, tokens=tuple(self.tokens[i] for i in index), rows=self.rows[index])

    def remove(self, labels: Sequence[Label]) -> Bank:
        """All classes but the given ones.

        Raises:
            ValueError: a class is not in the bank.
        """
        labels = plain_labels(labels)
        self.select(labels)
        gone = {(type(x), x) for x in labels}
        return self.select([x for x in self.labels if (type(x), x) not in gone])

    def save_pretrained(
        self, folder: str | Path, extra: Mapping[str, bytes] | None = None, pages: Mapping[str, bytes] | None = None
    ) -> None:
        """Writes the bank, so that a reader sees the old bank or the new one whenever this is interrupted.

        Args:
            extra: further files by name, covered by the same manifest; `bank_files.read_files` reads them.
            pages: for people, by name; by default `model_card.model_pages` of the class tokens alone.
        """
        config = {
            "format": FORMAT,
            "backbone_name": self.backbone_name,
            "backbone_hash": self.backbone_hash,
            "geometry": self.geometry.to_dict(),
            "rank": self.layout.rank,
            "alpha": self.layout.alpha,
            "targets": [asdict(t) for t in self.layout.targets],
            "versions": {p: metadata.version(p) for p in ("torch", "diffusers", "transformers", "peft")},
        }
        contents = {
            WEIGHTS: save_tensors({"rows": self.rows.contiguous()}),
            CLASSES: to_json([asdict(t) for t in self.tokens]),
            CONFIG: to_json(config),
            **(extra or {}),
        }
        write_files(folder, contents, model_pages(self) if pages is None else pages)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **hub: Any) -> Bank:
        """Reads what `save_pretrained` wrote.

        Args:
            folder: or `user/repo` on the hub.
            hub: as of `hub.saved_folder`: revision, token, cache_dir, local_files_only, force_download.

        Raises:
            FileNotFoundError: there is no such folder or repository, or it holds no complete bank.
            ValueError: as `bank_files.read_files`, or another version wrote it.
        """
        folder = saved_folder(folder, **hub)
        check_folder(folder, "the folder of a bank")
        return cls.from_files(folder, read_files(folder, (WEIGHTS, CLASSES, CONFIG)))

    @classmethod
    def from_files(cls, folder: Path, contents: Mapping[str, bytes]) -> Bank:
        """A bank from the contents of its files, which `folder` holds; raises ValueError as `from_pretrained`."""
        with written_here(folder):
            config = json.loads(contents[CONFIG])
            bank = cls(
                tokens=tuple(from_fields(ClassToken, t) for t in json.loads(contents[CLASSES])),
                layout=Layout(
                    tuple(from_fields(Target, t) for t in config["targets"]), config["rank"], config["alpha"]
                ),
                rows=load_tensors(contents[WEIGHTS])["rows"],
                backbone_name=config["backbone_name"],
                backbone_hash=config["backbone_hash"],
                geometry=from_fields(ImageGeometry, config["geometry"]),
            )
            if not_finite := [x for x, row in zip(bank.labels, bank.rows, strict=True) if not row.isfinite().all()]:
                raise ValueError(f"The weights of the class tokens {not_finite} are not finite.")
            return bank

    def push_to_hub(self, repo_id: str, *, commit_message: str = "Upload class tokens", **options: Any) -> Any:
        """Uploads what `save_pretrained` writes to `user/repo`.

        Args:
            options: as of `hub.upload`: private, token, revision, create_pr.
        """
        return upload(self.save_pretrained, repo_id, commit_message=commit_message, **options)

    def export(self, label: Label, folder: str | Path, format: LoraFormat = "diffusers") -> Path:
        """`lora_files.export_lora` of one class token."""
        from fewshot_diti.lora_files import export_lora  # which imports this module

        return export_lora(self, label, folder, format)

    def generate(
        self,
        label: Label,
        backbone: Backbone,
        num_images: int = 4,
        *,
        num_inference_steps: int = 25,
        guidance_scale: float = 7.5,
        negative_prompt: str | None = None,
        seed: int = 0,
        batch_size: int = 8,
    ) -> list[Image.Image]:
        """Images that the backbone makes of a class's prompt with its LoRA at the scoring scale, in the bank's size.

        They are those of diffusers' StableDiffusionPipeline with DDIM and the class token that `export` writes. Image i
        depends on `seed + i` alone, whatever is made beside it.

        Args:
            num_inference_steps, guidance_scale, negative_prompt: as in diffusers. The LoRA counts for the negative
                prompt too, by default the empty text.
            batch_size: images at once; lower it where memory runs out.

        Raises:
            ValueError: the class is not in the bank, the backbone is another one, a number is below 1, or the negative
                prompt is longer than the text encoder reads.
        """
        counts = {"num_images": num_images, "num_inference_steps": num_inference_steps, "batch_size": batch_size}
        if wrong := [f"{name}={value}" for name, value in counts.items() if value < 1]:
            raise ValueError(f"{', '.join(wrong)}; pass 1 or more.")
        self.check_backbone(backbone)
        one = self.select([label])
        prompt, rows = one.tokens[0].prompt, one.scaled_rows().to(backbone.device, backbone.dtype)
        backbone.tokenize([prompt, negative_prompt or ""])  # the pipeline would cut them short
        images: list[Image.Image] = []
        with Progress(num_images if num_images > batch_size else 0, f"images of {label}", "image") as bar:
            for start in range(0, num_images, batch_size):
                seeds = range(seed + start, seed + min(start + batch_size, num_images))
                with adapted(backbone, one.layout, rows):
                    latents = backbone.generate_latents(
                        prompt,
                        seeds,
                        size=self.geometry.size,
                        steps=num_inference_steps,
                        guidance_scale=guidance_scale,
                        negative_prompt=negative_prompt,
                    )
                images += backbone.decode_latents(latents)
                bar.update(len(seeds))
        return images
