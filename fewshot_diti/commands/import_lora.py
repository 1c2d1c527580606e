"""`fewshot-diti import`: a bank of LoRA files that another tool trained."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rich.console import Console
from tyro.conf import Positional, arg

from fewshot_diti.backbone import POCKET, load_backbone
from fewshot_diti.backbone_search import remember_folder
from fewshot_diti.bank_files import cut_short
from fewshot_diti.data import ImageGeometry, ResizeRule
from fewshot_diti.files import is_empty
from fewshot_diti.lora_readers import import_lora, labelled_files
from fewshot_diti.presets import PRESETS
from fewshot_diti.progress import counted
from fewshot_diti.prompts import Prompts


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Makes a bank of LoRA files that diffusers, kohya's scripts or peft trained, one for each class.

    Attributes:
        lora: files, or folders that diffusers or peft wrote, each as CLASS=PATH, or PATH alone with the class's name.
        output_dir: folder that gets the bank.
        prompt: the prompt that they were trained with, {} standing for the class, such as "a photo of sks {}".
        backbone: "pocket", a folder in diffusers' layout, or a hub id: the Stable Diffusion that they were trained on.
        concept: what all classes are, in the singular; for the pocket "aircraft" where it is not given.
        resize: how images come to the backbone's size.
        quiet: prints nothing but errors and warnings.
    """

    lora: Annotated[Positional[tuple[str, ...]], arg(metavar="CLASS=PATH...")]
    output_dir: Path
    prompt: str
    backbone: str = POCKET
    concept: str | None = None
    resize: ResizeRule = "crop"
    quiet: bool = False


def import_(config: ImportConfig, console: Console) -> None:
    """Writes a bank of class tokens.

    Raises:
        OSError, ValueError: a file is no LoRA of this backbone, or the output folder is not empty.
    """
    output = config.output_dir
    if os.path.lexists(output) and not (output.is_dir() and (is_empty(output) or cut_short(output))):
        raise ValueError(f"{config.output_dir} is there already; pass another --output_dir, or remove it.")
    files = labelled_files(config.lora)
    backbone = load_backbone(config.backbone, "float32")
    prompts = Prompts.complete(config.prompt, None, config.concept or PRESETS[backbone.kind].concept or "object")
    geometry = ImageGeometry(size=backbone.image_size, resize=config.resize)
    import_lora(backbone, files, prompts, geometry).save_pretrained(config.output_dir)
    remember_folder(backbone)
    console.out(
        f"{counted(len(files), 'class token')} in {config.output_dir}. They have no temperature of their own, so their "
        "probabilities are a guess; labels are not."
    )
