"""`fewshot-diti app`: a web page for a bank."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from platformdirs import user_cache_path
from rich.console import Console

from fewshot_diti.app.banks import ServedBank
from fewshot_diti.app.page import served
from fewshot_diti.backbone import DtypeName, load_backbone
from fewshot_diti.bank_files import MANIFEST, bank_fingerprint
from fewshot_diti.commands.demo import DemoConfig, set_up
from fewshot_diti.commands.loading import load_classifier
from fewshot_diti.evaluation.run import describe, learn


@dataclass(frozen=True, kw_only=True)
class AppConfig:
    """Serves a web page for a bank on this machine: drop pictures to classify, add classes, look at results, and move
    the window of timesteps. Needs the extra `app`.

    Attributes:
        bank: folder that `fewshot-diti train` wrote; without it the bank of the demo, trained where there is none yet.
        results: folder that `fewshot-diti eval` wrote, for the tab Results.
        port: of the page, on 127.0.0.1.
        backbone: folder or hub id of the bank's backbone, where it has moved since.
        dtype: of U-Net and text encoder; auto is bfloat16 where the hardware has it, else float32.
        quiet: prints nothing but errors and warnings.

    Raises:
        ValueError: a value is out of its range.
    """

    bank: Path | None = None
    results: Path | None = None
    port: int = 7860
    backbone: str | None = None
    dtype: DtypeName = "auto"
    quiet: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.port <= 65535:
            raise ValueError(f"port={self.port}; pass a number from 1 to 65535.")


def app(config: AppConfig, console: Console) -> None:
    """Serves the page until it is interrupted.

    Raises:
        OSError, ValueError: gradio is not installed, the bank, its backbone or the results cannot be loaded, or the
            port is taken.
    """
    if find_spec("gradio") is None:
        raise ValueError("The page needs gradio, which is not installed; run pip install 'fewshot-diti[app]'.")
    folder = demo_bank(DemoConfig(), console) if config.bank is None else config.bank
    fingerprint = bank_fingerprint(folder)
    bank = ServedBank(folder, load_classifier(folder, config.backbone, config.dtype), fingerprint)
    with served(bank, config.results, config.port, Path.cwd()) as address:
        console.out(f"The page is at {address} ; end it with Ctrl+C.")
        while True:
            time.sleep(1)


def demo_bank(config: DemoConfig, console: Console) -> Path:
    """The folder of the demo's bank in the user's cache, trained where it is not there yet.

    Raises:
        OSError, ValueError: as the backbone's loader.
        TrainingError: a class's loss was not finite.
    """
    setup = set_up(config)
    backbone = load_backbone(setup.run.backbone, setup.run.dtype)
    decides = repr(describe(setup.run, setup.task, backbone))
    folder = user_cache_path("fewshot-diti") / "app" / hashlib.sha256(decides.encode()).hexdigest()[:12] / "demo"
    if not (folder / MANIFEST).is_file():
        console.out(f"Training the demo's bank, once, in {folder}: some minutes on two cores ...")
    learn(setup.run.classifier(backbone), setup.task, folder)
    return folder
