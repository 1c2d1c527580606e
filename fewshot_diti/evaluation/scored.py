"""Many images through one bank, into files of predictions: all of them in one file, or a shard of them."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from time import monotonic
from typing import Any

from fewshot_diti.bank_files import bank_fingerprint
from fewshot_diti.classifier import DiTiClassifier
from fewshot_diti.data import ImageSet
from fewshot_diti.distributed import gather, process_state
from fewshot_diti.encoding import PreparedImage
from fewshot_diti.evaluation.predicting import predict_images
from fewshot_diti.files import write_atomically
from fewshot_diti.part_files import Record, Records
from fewshot_diti.prediction_files import encode_predictions
from fewshot_diti.shards import Listing, Shard, finish


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What is asked of each image.

    Attributes:
        top_k: how many of the best classes are named.
        reject: share of images like the shots that may be marked as rejected; None marks none.
    """

    top_k: int
    reject: float | None


class Scored:
    """What is known of images, each record read when its turn comes.

    Attributes:
        names, found: of all images, in their order.
        top_k: how many classes a row names.
        predicted, seconds: images that were predicted now, by all processes, and how long that took.
        counts: images by what became of them, as `shards.COUNTS`.
    """

    def __init__(self, names: Sequence[str], found: Records, top_k: int, predicted: int, seconds: float) -> None:
        self.names, self.found, self.top_k = names, found, top_k
        self.predicted, self.seconds = predicted, seconds
        self.counts = Counter[str]()
        for record in found:
            if "error" in record:
                self.counts["missing" if record.get("missing") else "failed"] += 1
            else:
                self.counts["scored"] += 1
                self.counts["undecided"] += not record["decided"]
                self.counts["rejected"] += record.get("rejected", False)

    def __iter__(self) -> Iterator[Record]:
        for name, record in zip(self.names, self.found, strict=True):
            if "error" not in record:
                best = dict(list(record["probabilities"].items())[: self.top_k])
                yield {"path": name, **record, "probabilities": best}
            elif not record.get("missing"):  # a link to nothing, or a file that has gone since, is no image
                yield {"path": name, **{key: value for key, value in record.items() if key != "missing"}}

    def usable(self) -> Iterator[Record]:
        """Of the images that could be scored."""
        return (record for record in self if "error" not in record)


class BankScorer:
    """A loaded bank that scores one set of images after another.

    Args:
        bank: the folder that the classifier was loaded from.

    Raises:
        ValueError: images are to be rejected, and the bank cannot say which.
    """

    def __init__(self, classifier: DiTiClassifier, bank: Path, rows: Rows) -> None:
        self.classifier, self.bank = classifier, bank
        self.top_k = min(rows.top_k, len(classifier.classes_))
        self._least = None if rows.reject is None else classifier.decider().familiarity.least(rows.reject)

    def records(self, images: ImageSet, rows: Sequence[int], parts: Path) -> tuple[Records, int]:
        """Records of the images at some positions, and how many of them were predicted now; `parts` keeps them."""
        predicted = 0

        def predict(some: Sequence[PreparedImage]) -> list[Record]:
            nonlocal predicted
            predicted += len(some)
            return _predictions(self.classifier, self._least, some)

        asked = "" if self._least is None else f" least similarity {self._least}"
        found = predict_images(self.classifier, rows, images.decode, predict, parts, self.bank, asked)
        return found, sum(gather([predicted]))

    def score(self, images: ImageSet, file: Path) -> Scored:
        """Scores the images, over the processes, and writes the file."""
        began = monotonic()
        found, predicted = self.records(images, range(len(images)), parts_of(file))
        scored = Scored(images.names, found, self.top_k, predicted, monotonic() - began)
        if process_state().is_main_process:
            label_type = type(self.classifier.classes_.tolist()[0])
            write_atomically(file, encode_predictions(scored, file.suffix, self.top_k, label_type))
        return scored

    def score_shard(
        self, images: ImageSet, listing: Listing, folder: Path, shard: Shard, made_by: dict[str, Any]
    ) -> Scored:
        """Scores the images of a shard, and writes its file and then its record into the folder."""
        scored = self.score(images, shard.file(folder))
        if process_state().is_main_process:
            finish(folder, shard, made_by, listing, scored.counts)
        return scored


def parts_of(file: Path) -> Path:
    """The folder in which the processes keep what stands in the file later."""
    return file.with_name(f"{file.name}.parts")


def remove_parts(file: Path) -> None:
    """Removes what a shard's rows were made from, once they are safe, and no process reads it any more."""
    state = process_state()
    state.wait_for_everyone()
    if state.is_main_process:
        shutil.rmtree(parts_of(file), ignore_errors=True)


def made_with(bank: Path, dtype: str, rows: Rows) -> dict[str, Any]:
    """What decides the rows of a shard, known before the bank is loaded."""
    return {
        "fewshot_diti": metadata.version("fewshot-diti"),
        "bank": bank_fingerprint(bank),
        "dtype": dtype,
        "reject": rows.reject,
        "top_k": rows.top_k,
    }


def _predictions(classifier: DiTiClassifier, least: float | None, images: Sequence[PreparedImage]) -> list[Record]:
    """Label, with its own type, probabilities, the best first, margin, scores and cost of each image."""
    labels, found = classifier.classes_.tolist(), []
    similarities = [math.nan] * len(images)
    if least is not None:
        similarities = classifier.decider().similarities(images, classifier.current_prediction()).tolist()
    for decision, similarity in zip(classifier.decide(images), similarities, strict=True):
        values = decision.scores.tolist()
        probabilities = classifier.probabilities(decision.scores[None])[0].tolist()
        order = sorted(range(len(labels)), key=lambda c: (c != decision.position, values[c]))
        found.append(
            {
                "label": labels[decision.position],
                "probabilities": {str(labels[c]): probabilities[c] for c in order},
                "margin": values[order[1]] - values[order[0]],
                **({} if least is None else {"similarity": similarity, "rejected": similarity < least}),
                "decided": decision.decided,
                "evaluations": decision.evaluations,
                "scores": {str(label): s for label, s in zip(labels, decision.json_scores(), strict=True)},
            }
        )
    return found
