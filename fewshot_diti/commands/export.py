"""`fewshot-diti export`: class tokens as LoRA files of other tools."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rich.console import Console
from tyro.conf import Positional, arg

from fewshot_diti.bank import Bank
from fewshot_diti.config import Label
from fewshot_diti.hub import saved_folder
from fewshot_diti.lora_files import LoraFormat, export_classes
from fewshot_diti.reports import printable


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Writes class tokens as LoRA files that other tools load at weight 1.

    Attributes:
        bank: folder that `fewshot-diti train` wrote, or user/repo on the hub.
        output_dir: folder that gets a folder for each class, or with kohya a file for each.
        format: diffusers, kohya (ComfyUI, A1111) or peft.
        classes: which, by default all.
        quiet: prints nothing but errors and warnings.
    """

    bank: Annotated[Positional[str], arg(metavar="BANK")]
    output_dir: Path
    format: LoraFormat = "diffusers"
    classes: tuple[str, ...] = ()
    quiet: bool = False


def export(config: ExportConfig, console: Console) -> None:
    """Writes the files, and says which class lies where.

    Raises:
        OSError, ValueError: no whole bank, a class that it does not hold, or a file that is there already.
    """
    bank = Bank.from_pretrained(saved_folder(config.bank))
    chosen = labels_of(bank, config.classes) if config.classes else None
    for label, path in export_classes(bank, config.output_dir, config.format, chosen).items():
        console.out(f"{printable(str(label))}: {printable(str(path))}")


def labels_of(bank: Bank, names: tuple[str, ...]) -> list[Label]:
    """The classes of these names, with their own type.

    Raises:
        ValueError: a class is not in the bank.
    """
    by_name = {str(label): label for label in bank.labels}
    if unknown := [name for name in names if name not in by_name]:
        raise ValueError(f"Classes {unknown} are not in the bank; it holds {list(by_name)}.")
    return [by_name[name] for name in names]
