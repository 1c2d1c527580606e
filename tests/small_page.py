"""A page on the tiny backbone, its bank of bundled aircraft, and what a browser needs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from small_classifier import SCORING, make

from fewshot_diti import Backbone, DiTiClassifier
from fewshot_diti.app.banks import ServedBank
from fewshot_diti.bank_files import bank_fingerprint
from fewshot_diti.data.sources import load_bundled

LONG = "x" * 300
STRANGE = '<img src=x onerror="document.title=1"> a/b \u98de\u673a'
CLASSES = ("A319", "A320", STRANGE, LONG)
CHROMIUM = Path("/usr/bin/chromium")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def save_bank(backbone: Backbone, folder: Path) -> ServedBank:
    """Two bundled classes, and two of strange names, from two shots each."""
    images = load_bundled("train")
    shots = [images.names[row] for name in ("A319", "A320", "747-8", "ATR-72") for row in _rows(images, name)[:2]]
    scoring = replace(SCORING, witnesses=("features",), witness_weights=(1.0,))
    classifier = make(backbone, scoring=scoring, prompt_template="a photo", generic_prompt="a photo")
    classifier.fit(shots, [name for name in CLASSES for _ in range(2)]).save_pretrained(folder)
    return ServedBank(folder, DiTiClassifier.from_pretrained(folder, backbone), bank_fingerprint(folder))


def pictures_of(name: str, count: int) -> list[str]:
    """Paths of bundled test images of a class."""
    images = load_bundled("test")
    return [images.names[row] for row in _rows(images, name)[:count]]


def _rows(images: object, name: str) -> list[int]:
    return [row for row, label in enumerate(images.label_names) if label == name]  # type: ignore[attr-defined]


def save_results(folder: Path) -> Path:
    """What `eval` leaves, of two methods at two numbers of shots."""
    for method, better in (("fewshot-diti", 0.2), ("finetune", 0.0)):
        for shots in (1, 4):
            for seed in (1, 2):
                accuracy = 0.3 + better + 0.05 * shots + 0.01 * seed
                record = {
                    "status": "ok",
                    "accuracy": accuracy,
                    "accuracy_by_class": {"A319": accuracy + 0.1, "A320": accuracy - 0.1},
                    "made_by": {"backbone": "elsewhere"},
                }
                file = folder / "bundled" / "tiny" / "none" / method / f"{shots}-{seed}.json"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(record))
    return folder
