"""What commands share: a classifier from its folder, and the check of numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fewshot_diti.backbone import CompileMode
from fewshot_diti.classifier import DiTiClassifier


def load_classifier(
    folder: Path, backbone: str | None, dtype: str, batch_size: int | None = None, compile: CompileMode | None = None
) -> DiTiClassifier:
    """The classifier that was saved in a folder.

    Args:
        backbone: folder or hub id; by default where the bank's is found.
        batch_size: evaluations in one forward; by default as saved.

    Raises:
        OSError, ValueError: bank or backbone cannot be loaded.
    """
    classifier = DiTiClassifier.from_pretrained(folder, backbone, dtype=dtype, compile=compile)
    if batch_size is not None:
        classifier.prediction = replace(classifier.current_prediction(), batch_size=batch_size)
    return classifier


def check_counts(config: object, *names: str) -> None:
    """Raises a ValueError where one of these fields is a number below 1; what was not given, and "all", pass."""
    for name in names:
        if isinstance(value := getattr(config, name), int) and value < 1:
            more = ', or "all"' if name == "shots" else ""
            raise ValueError(f"{name}={value}; pass a whole number of at least 1{more}.")


def check_can_choose(classifier: DiTiClassifier, folder: str | Path) -> None:
    """Raises a ValueError where there are fewer than two classes to choose among."""
    if len(classes := classifier.classes_.tolist()) < 2:
        raise ValueError(f"{folder} holds the classes {classes}; scoring takes two or more to choose among.")
