"""`fewshot-diti info`: what a bank holds, and whether it can be used on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated

from rich.console import Console
from rich.table import Table
from tyro.conf import Positional, arg

from fewshot_diti.backbone_search import find_backbone
from fewshot_diti.bank import Bank
from fewshot_diti.bank_files import MANIFEST
from fewshot_diti.classifier_files import Saved, read_classifier
from fewshot_diti.hub import saved_folder
from fewshot_diti.progress import counted
from fewshot_diti.reports import printable


@dataclass(frozen=True, kw_only=True)
class InfoConfig:
    """Shows what a bank holds: classes, shots, backbone, size, date, accuracy, and whether its backbone is here.

    Attributes:
        bank: folder that `fewshot-diti train` wrote, or user/repo on the hub.
        quiet: prints nothing but errors and warnings.
    """

    bank: Annotated[Positional[str], arg(metavar="BANK")]
    quiet: bool = False


def info(config: InfoConfig, console: Console) -> None:
    """Prints a table of the classes and a line for everything else.

    Raises:
        OSError, ValueError: no whole bank in the folder.
    """
    folder = saved_folder(config.bank)
    bank, settings, contents = read_classifier(folder)
    table = Table("class", "shots", "prompt")
    for token in bank.tokens:
        table.add_row(printable(str(token.label)), str(token.num_shots or "unknown"), printable(token.prompt))
    console.print(table)
    height, width = bank.geometry.size
    saved = datetime.fromtimestamp((folder / MANIFEST).stat().st_mtime, UTC)
    lines = {
        "classes": f"{len(bank)}, LoRA of rank {bank.layout.rank} on {len(bank.layout.targets)} layers",
        "images": f"{width} x {height} pixels, {bank.geometry.resize}",
        "size": f"{sum(map(len, contents.values())) / 1e6:.1f} MB",
        "written": f"{saved:%Y-%m-%d %H:%M} UTC, by the date of its files",
        "accuracy": _accuracy(settings),
        "witnesses": ", ".join(settings.settings.scoring.witnesses if settings else ()) or "none",
        "backbone": f"{bank.backbone_name}, hash {bank.backbone_hash}; {_whereabouts(bank)}",
    }
    for name, text in lines.items():
        console.out(f"{name:9} {printable(text)}")


def _accuracy(saved: Saved | None) -> str:
    """What cross-validation said."""
    if saved is None:
        return "not known: these are class tokens alone, without a classifier's settings"
    calibration = saved.calibration
    if calibration.accuracy is None:
        return "not cross-validated"
    folds = counted(calibration.folds or saved.settings.scoring.folds, "fold")
    shots = counted(len(calibration.held_out), "shot") if calibration.held_out else "the shots"
    return f"{100 * calibration.accuracy:.1f} % of {shots}, cross-validated in {folds} when it was trained"


def _whereabouts(bank: Bank) -> str:
    """Whether the backbone is on this machine; nothing is downloaded."""
    try:
        found = find_backbone(bank.backbone_name, bank.backbone_hash, local_files_only=True)
    except FileNotFoundError as error:
        return f"NOT on this machine. {error}"
    return f"found as {found.name}"
