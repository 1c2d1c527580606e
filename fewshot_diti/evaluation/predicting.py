"""What a classifier says of many images: the processes share them, and what an earlier run has said is kept."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TypeVar

from fewshot_diti.bank_files import bank_fingerprint
from fewshot_diti.classifier import DiTiClassifier
from fewshot_diti.cost import announce_time
from fewshot_diti.data import ImageSet
from fewshot_diti.data.images import ImageSource
from fewshot_diti.distributed import main_alone_in, my_share, predict_shared
from fewshot_diti.elimination import NotFiniteError
from fewshot_diti.encoding import PreparedImage
from fewshot_diti.part_files import Record, Records
from fewshot_diti.progress import Progress
from fewshot_diti.scoring import in_flight

BANK, PREDICTIONS = "bank", "predictions"
T = TypeVar("T")


def classify(classifier: DiTiClassifier, test: ImageSet, folder: Path) -> Records:
    """A record of each test image: label, scores and evaluations, beside the bank in `folder`. The processes share
    the images, and those decided by an earlier run are kept.

    Raises:
        ValueError: test images that cannot be read, all named.
    """
    names = classifier.classes_.tolist()

    def predict(images: Sequence[PreparedImage]) -> list[Record]:
        decisions = classifier.decide(images)
        return [
            {"label": names[d.position], "scores": d.json_scores(), "evaluations": d.evaluations} for d in decisions
        ]

    rows, bank = range(len(test)), folder / BANK
    records = predict_images(classifier, rows, test.decode, predict, folder / PREDICTIONS, bank)
    broken = [f"{test.names[row]}: {record['error']}" for row, record in enumerate(records) if "error" in record]
    if broken:
        raise ValueError(f"{len(broken)} test images cannot be read:\n" + "\n".join(broken[:20]))
    return records


def predict_images(
    classifier: DiTiClassifier,
    images: Sequence[T],
    decode: Callable[[T], ImageSource],
    predict: Callable[[Sequence[PreparedImage]], list[Record]],
    folder: Path,
    bank: Path,
    asked: str = "",
) -> Records:
    """What `predict` gives for each image, or why it cannot be read; with progress and, first, how long it will take.

    The processes share the images, and `folder` keeps what is known, as `predict_shared` says. Memory holds neither
    images nor records, however many there are.

    Args:
        asked: what else decides the records, beside bank and prediction.
    """
    prediction, trials = classifier.current_prediction(), classifier.settings_.scoring.trials
    looks = prediction.looks(len(classifier.classes_), trials)
    decider = classifier.decider()
    evaluations = len(images) * decider.evaluations(prediction)
    announce_time(classifier.backbone_, classifier.geometry_.size, evaluations, "scoring")

    def predict_usable(some: Sequence[PreparedImage]) -> list[Record]:
        errors: dict[str, Record] = {}
        for image in some:
            try:
                decider.encode(image)
            except ValueError as error:  # of one image: the others are predicted
                errors[image.id] = {"error": str(error)}
        usable = [image for image in some if image.id not in errors]
        try:
            found = dict(zip((image.id for image in usable), predict(usable) if usable else [], strict=True))
        except NotFiniteError as error:
            if len(some) > 1:
                return [predict_usable([image])[0] for image in some]
            found = {some[0].id: {"error": f"{some[0].name}: {error}"}}
        return [errors.get(image.id) or found[image.id] for image in some]

    with main_alone_in(folder, folder), Progress(len(my_share(len(images))), "images", "image") as bar:
        return predict_shared(
            images,
            lambda image: classifier.encoder_.prepare(decode(image)),
            lambda image: image.id,
            predict_usable,
            folder,
            made_by(classifier, bank) + asked,
            at_once=in_flight(looks),
            advance=bar.update,
        )


def made_by(classifier: DiTiClassifier, bank: Path) -> str:
    """What decides a prediction: a bank that was trained again has other errors, and so has another dtype."""
    prediction = replace(classifier.current_prediction(), batch_size=1)
    decides = f"{bank_fingerprint(bank)} in {classifier.backbone_.dtype}, {prediction}"
    return f"{metadata.version('fewshot-diti')} {hashlib.sha256(decides.encode()).hexdigest()[:16]}"
