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
from fewshot_diti.bank_files import (
    CLASSES,
    CONFIG,
    MANIFEST,
    SETTINGS,
    WEIGHTS,
    from_fields,
    read_files,
    to_json,
    written_here,
)
from fewshot_diti.calibration import Calibration
from fewshot_diti.config import Label, PredictionConfig, ScoringConfig, Settings, TrainingConfig
from fewshot_diti.data.folders import check_folder
from fewshot_diti.model_card import model_pages
from fewshot_diti.prompts import Prompts
from fewshot_diti.witnesses import KINDS, FittedWitness, Witness

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

    def check(self) -> None:
        """Raises a ValueError where a file holds what no classifier has."""
        scoring, calibration = self.settings.scoring, self.calibration
        texts = [*self.models, *self.models.values(), *([] if self.concept is None else [self.concept])]
        if not all(isinstance(x, str) for x in texts) or not isinstance(self.complete, bool):
            raise ValueError("concept and models are texts, and complete is true or false.")
        if unknown := [name for name in scoring.witnesses if name.partition(":")[0] not in KINDS]:
            raise ValueError(f"There is no witness {unknown[0]!r}; known are {', '.join(KINDS)}.")
        if len(calibration.timesteps) != scoring.trials or len(calibration.witness_weights) != len(scoring.witnesses):
            raise ValueError(
                f"The calibration has {len(calibration.timesteps)} trials and {len(calibration.witness_weights)} "
                f"weights of witnesses, the scoring {scoring.trials} and {len(scoring.witnesses)}."
            )
        if self.given_scoring is not None:
            self.given_scoring.check_unchanged(scoring)

    def check_schedule(self, num_train_timesteps: int) -> None:
        """Raises a ValueError where settings or trials lie beyond the backbone's schedule."""
        self.settings.check(num_train_timesteps)
        if self.calibration.timesteps and (last := max(self.calibration.timesteps)) >= num_train_timesteps:
            raise ValueError(f"The calibration has a trial at t = {last} of {num_train_timesteps} timesteps.")


def save_classifier(bank: Bank, saved: Saved, witnesses: Sequence[FittedWitness], folder: str | Path) -> None:
    """Writes a classifier; its witnesses only where they know every class."""
    extra = {SETTINGS: _settings_file(saved)}
    for number, fitted in enumerate(x for x in witnesses if list(x.shots) == list(bank.labels)):
        shots = {f"shots.{c}": shots.contiguous() for c, shots in enumerate(fitted.shots.values())}
        learned = {f"learned.{name}": value.contiguous() for name, value in fitted.learned.items()}
        extra[_witness_file(number)] = save(shots | learned)
    bank.save_pretrained(folder, extra=extra, pages=model_pages(bank, saved))


def load_classifier(folder: Path) -> tuple[Bank, Saved | None, dict[str, bytes]]:
    """`read_classifier`, with a warning where there is a bank alone."""
    bank, saved, contents = read_classifier(folder)
    if saved is None:
        warnings.warn(
            f"{folder} holds a bank without a classifier's settings: scores and probabilities are uncalibrated. Save "
            "one with DiTiClassifier.save_pretrained to keep settings.",
            stacklevel=3,
        )
    return bank, saved, contents


def read_classifier(folder: Path) -> tuple[Bank, Saved | None, dict[str, bytes]]:
    """What `save_classifier` wrote, of one save: bank, settings (None of a bank alone), and the contents of all files.

    Raises:
        FileNotFoundError: no complete bank in the folder.
        ValueError: a file was changed or cut short, or another version wrote it.
    """
    check_folder(folder, "the folder of a bank")
    contents = read_files(folder)
    for name in (WEIGHTS, CLASSES, CONFIG):
        if name not in contents:
            raise FileNotFoundError(f"{folder / MANIFEST} names no {name}; it names {', '.join(sorted(contents))}.")
    saved = _saved(folder, contents[SETTINGS]) if SETTINGS in contents else None
    return Bank.from_files(folder, contents), saved, contents


def load_witnesses(
    folder: Path,
    contents: Mapping[str, bytes],
    labels: Sequence[Label],
    witnesses: Mapping[str, Witness],
    models: Mapping[str, str],
) -> tuple[FittedWitness, ...]:
    """The witnesses by their names as they were saved, none where the classifier was saved without.

    Args:
        contents: as of `read_classifier`.

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
        if (file := _witness_file(number)) not in contents:
            return ()
        with written_here(folder):
            tensors = load(contents[file])
            shots = {x: tensors[f"shots.{c}"] for c, x in enumerate(labels)}
            learned = {k.removeprefix("learned."): v for k, v in tensors.items() if k.startswith("learned.")}
            found.append(FittedWitness(name, witness, shots, learned))
            found[-1].check()
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


def _saved(folder: Path, content: bytes) -> Saved:
    """What the settings file in a folder says; with a warning where the classifier was not complete."""
    with written_here(folder):
        found = json.loads(content)
        settings = found["settings"]
        saved = Saved(
            concept=found["concept"],
            prompts=from_fields(Prompts, found["prompts"]),
            given_training=_given(TrainingConfig, found["given_training"]),
            given_scoring=_given(ScoringConfig, found["given_scoring"]),
            settings=Settings(
                from_fields(TrainingConfig, settings["training"]),
                from_fields(ScoringConfig, settings["scoring"]),
                from_fields(PredictionConfig, settings["prediction"]),
            ),
            calibration=from_fields(Calibration, found["calibration"]),
            complete=found["complete"],
            models=dict(found.get("models", {})),
        )
        saved.check()
    if not saved.complete:
        warnings.warn(
            f"The classifier in {folder} was saved when its training was interrupted or failed: classes or the "
            "calibration are missing. Train it again.",
            stacklevel=4,
        )
    return saved


def _given(config: type[C], values: dict[str, Any] | None) -> C | None:
    return None if values is None else from_fields(config, values, complete=False)
