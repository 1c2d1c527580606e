"""What lies beside the class tokens of a saved classifier: its settings, and features of the shots."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from fewshot_diti.bank import read_files, written_here
from fewshot_diti.calibration import Calibration
from fewshot_diti.recommended import ScoringConfig
from fewshot_diti.training import Label, TrainingConfig

SETTINGS_FILE, FEATURES_FILE = "classifier.json", "shot_features.safetensors"


def settings_file(arguments: Mapping[str, Any], calibration: Calibration) -> bytes:
    """What `read_settings` reads; `arguments` are the classifier's, with its configurations."""
    written = {key: asdict(x) if isinstance(x, TrainingConfig | ScoringConfig) else x for key, x in arguments.items()}
    return (json.dumps(written | {"calibration": asdict(calibration)}, indent=2) + "\n").encode()


def features_file(shot_features: Mapping[Label, Tensor], labels: Sequence[Label]) -> bytes:
    """What `read_features` reads."""
    return save({str(c): shot_features[x] for c, x in enumerate(labels)})


def read_settings(folder: str | Path) -> tuple[dict[str, Any], Calibration | None]:
    """Arguments of the classifier saved in a folder, and its calibration; none, with a warning, of a bank alone."""
    try:
        settings = json.loads(read_files(folder, [SETTINGS_FILE])[SETTINGS_FILE])
    except FileNotFoundError:
        warnings.warn(
            f"{folder} holds a bank without a classifier's settings: scores and probabilities are uncalibrated. Save "
            "one with DiTiClassifier.save_pretrained to keep settings.",
            stacklevel=3,
        )
        return {}, None
    with written_here(folder):
        return {
            "training": settings["training"] and TrainingConfig(**_tuples(settings["training"])),
            "scoring": ScoringConfig(**_tuples(settings["scoring"])),
            **{key: settings[key] for key in ("concept", "prompt_template", "generic_prompt")},
        }, Calibration(**_tuples(settings["calibration"]))


def read_features(folder: str | Path, labels: Sequence[Label]) -> dict[Label, Tensor]:
    """Features [n, V, D] of the shots of each class and of copies of them, where the bank was saved with them."""
    try:
        found = load(read_files(folder, [FEATURES_FILE])[FEATURES_FILE])
    except FileNotFoundError:
        return {}
    with written_here(folder):
        features = {x: found[str(c)] for c, x in enumerate(labels)}
        if any(views.ndim != 3 for views in features.values()):
            raise TypeError("shots without copies in other colours")
        return features


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
