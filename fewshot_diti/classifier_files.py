"""What a saved classifier has beside its bank: settings, calibration, and its witnesses."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from safetensors.torch import load, save

from fewshot_diti.bank import Bank
from fewshot_diti.bank_files import SETTINGS, read_files, to_json, written_here
from fewshot_diti.calibration import Calibration
from fewshot_diti.config import Label, PredictionConfig, ScoringConfig, Settings, TrainingConfig
from fewshot_diti.model_card import model_card
from fewshot_diti.prompts import Prompts
from fewshot_diti.witnesses import FittedWitness, Witness

C = TypeVar("C", TrainingConfig, ScoringConfig)


class Saved(NamedTuple):
    """What a saved classifier has beside bank and witnesses.

    Attributes:
        concept: what all classes are; None where prompts were given instead.
        prompts: of the class tokens.
        given_training, given_scoring: as the user gave them: what is not given goes by the number of shots.
        settings: complete, as fitted.
        complete: False where the fit was interrupted or failed: classes or the calibration are missing.
        models: of the witnesses by name, as of `Witness.model`; of an older bank not known.
    """

    concept: str | None
    prompts: Prompts
    given_training: TrainingConfig | None
    given_scoring: ScoringConfig | None
    settings: Settings
    calibration: Calibration
    complete: bool
    models: Mapping[str, str] = {}


def save_classifier(bank: Bank, saved: Saved, witnesses: Sequence[FittedWitness], folder: str | Path) -> None:
    """Writes a classifier; its witnesses only where they know every class."""
    extra = {SETTINGS: _settings_file(saved)}
    for number, fitted in enumerate(x for x in witnesses if list(x.shots) == list(bank.labels)):
        shots = {f"shots.{c}": shots.contiguous() for c, shots in enumerate(fitted.shots.values())}
        learned = {f"learned.{name}": value.contiguous() for name, value in fitted.learned.items()}
        extra[_witness_file(number)] = save(shots | learned)
    bank.save_pretrained(folder, extra=extra, card=model_card(bank, saved))


def load_classifier(folder: str | Path) -> tuple[Bank, Saved | None]:
    """What `save_classifier` wrote: bank, and settings (None, with a warning, of a bank alone).

    Raises:
        FileNotFoundError: no complete bank in the folder.
        ValueError: a file was changed or cut short, or another version wrote it.
    """
    return Bank.from_pretrained(folder), read_settings(folder)


def load_witnesses(
    folder: str | Path, labels: Sequence[Label], witnesses: Mapping[str, Witness], models: Mapping[str, str]
) -> tuple[FittedWitness, ...]:
    """The witnesses by their names as they were saved, none where the classifier was saved without.

    Raises:
        ValueError: as `load_classifier`, or a witness reads images with another model than that of `Saved.models`.
    """
    found = []
    for number, (name, witness) in enumerate(witnesses.items()):
        if models.get(name, witness.model) != witness.model:
            raise ValueError(
                f"The witness {name!r} of {folder} was learned on another model ({models[name]}) than the one that is "
                f"here now ({witness.model}); bring that model back, or train again."
            )
        file = _witness_file(number)
        try:
            tensors = load(read_files(folder, [file])[file])
        except FileNotFoundError:
            return ()
        with written_here(folder):
            shots = {x: tensors[f"shots.{c}"] for c, x in enumerate(labels)}
        learned = {k.removeprefix("learned."): v for k, v in tensors.items() if k.startswith("learned.")}
        found.append(FittedWitness(name, witness, shots, learned))
    return tuple(found)


def _witness_file(number: int) -> str:
    return f"witness-{number}.safetensors"


def _settings_file(saved: Saved) -> bytes:
    return to_json(
        {
            "concept": saved.concept,
            "prompts": asdict(saved.prompts),
            "given_training": None if saved.given_training is None else asdict(saved.given_training),
            "given_scoring": None if saved.given_scoring is None else asdict(saved.given_scoring),
            "settings": saved.settings.to_dict(),
            "calibration": asdict(saved.calibration),
            "complete": saved.complete,
            "models": dict(saved.models),
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
            given_training=_given(TrainingConfig, found["given_training"]),
            given_scoring=_given(ScoringConfig, found["given_scoring"]),
            settings=Settings(
                TrainingConfig(**settings["training"]),
                ScoringConfig(**settings["scoring"]),
                PredictionConfig(**settings["prediction"]),
            ),
            calibration=Calibration(**_tuples(found["calibration"])),
            complete=found["complete"],
            models=found.get("models", {}),
        )
    if not saved.complete:
        warnings.warn(
            f"The classifier in {folder} was saved when its training was interrupted or failed: classes or the "
            "calibration are missing. Train it again.",
            stacklevel=3,
        )
    return saved


def _given(config: type[C], values: dict[str, Any] | None) -> C | None:
    return None if values is None else config(**_tuples(values))


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
