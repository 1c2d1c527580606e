"""What a saved classifier has beside its bank: settings, calibration, and features of the shots."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load, save
from torch import Tensor

from fewshot_diti.bank import Bank
from fewshot_diti.bank_files import FEATURES, SETTINGS, read_files, to_json, written_here
from fewshot_diti.calibration import Calibration
from fewshot_diti.config import Label, PredictionConfig, ScoringConfig, Settings, TrainingConfig
from fewshot_diti.training import Prompts


class Saved(NamedTuple):
    """What a saved classifier has beside bank and features.

    Attributes:
        concept: what all classes are; None where prompts were given instead.
        prompts: of the class tokens.
        given: the training configuration that the user gave, for classes that are added later.
        settings: complete, as fitted.
        complete: False where the fit was interrupted or failed: classes or the calibration are missing.
    """

    concept: str | None
    prompts: Prompts
    given: TrainingConfig | None
    settings: Settings
    calibration: Calibration
    complete: bool


def save_classifier(bank: Bank, saved: Saved, shot_features: Mapping[Label, Tensor], folder: str | Path) -> None:
    """Writes a classifier; its features only where every class has them."""
    extra = {SETTINGS: _settings_file(saved)}
    if shot_features.keys() == set(bank.labels):
        extra[FEATURES] = save({str(c): shot_features[x].contiguous() for c, x in enumerate(bank.labels)})
    bank.save_pretrained(folder, extra=extra)


def load_classifier(folder: str | Path) -> tuple[Bank, Saved | None, dict[Label, Tensor]]:
    """What `save_classifier` wrote: bank, settings (None, with a warning, of a bank alone) and features (none where the
    classifier was saved without).

    Raises:
        FileNotFoundError: no complete bank in the folder.
        ValueError: a file was changed or cut short, or another version wrote it.
    """
    bank = Bank.from_pretrained(folder)
    return bank, read_settings(folder), _read_features(folder, bank.labels)


def _settings_file(saved: Saved) -> bytes:
    return to_json(
        {
            "concept": saved.concept,
            "prompts": asdict(saved.prompts),
            "given": None if saved.given is None else asdict(saved.given),
            "settings": saved.settings.to_dict(),
            "calibration": asdict(saved.calibration),
            "complete": saved.complete,
        }
    )


def read_settings(folder: str | Path) -> Saved | None:
    """The settings of the classifier saved in a folder; None, with a warning, of a bank alone.

    A classifier that was saved before it was complete is read with a warning.
    """
    try:
        found = json.loads(read_files(folder, [SETTINGS])[SETTINGS])
    except FileNotFoundError:
        warnings.warn(
            f"{folder} holds a bank without a classifier's settings: scores and probabilities are uncalibrated. Save "
            "one with DiTiClassifier.save_pretrained to keep settings.",
            stacklevel=3,
        )
        return None
    with written_here(folder):
        settings = _tuples(found["settings"])
        saved = Saved(
            concept=found["concept"],
            prompts=Prompts(**found["prompts"]),
            given=None if found["given"] is None else TrainingConfig(**_tuples(found["given"])),
            settings=Settings(
                TrainingConfig(**settings["training"]),
                ScoringConfig(**settings["scoring"]),
                PredictionConfig(**settings["prediction"]),
            ),
            calibration=Calibration(**_tuples(found["calibration"])),
            complete=found["complete"],
        )
    if not saved.complete:
        warnings.warn(
            f"The classifier in {folder} was saved when its training was interrupted or failed: classes or the "
            "calibration are missing. Train it again.",
            stacklevel=3,
        )
    return saved


def _read_features(folder: str | Path, labels: Sequence[Label]) -> dict[Label, Tensor]:
    """Features [n, V, D] of the shots of each class and of copies of them, where the bank was saved with them."""
    try:
        found = load(read_files(folder, [FEATURES])[FEATURES])
    except FileNotFoundError:
        return {}
    with written_here(folder):
        return {x: found[str(c)] for c, x in enumerate(labels)}


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
