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
from fewshot_diti.data.unlabelled import list_shard
from fewshot_diti.devices import as_dtype, default_device
from fewshot_diti.distributed import by_main, gather, process_state
from fewshot_diti.encoding import PreparedImage
from fewshot_diti.evaluation.predicting import predict_images
from fewshot_diti.files import write_atomically
from fewshot_diti.part_files import Record, Records
from fewshot_diti.prediction_files import encode_predictions
from fewshot_diti.shards import Listing, Shard, finish, finished


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
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

    def __init__(self, classifier: DiTiClassifier, bank: Path, options: ScoreOptions) -> None:
        self.classifier, self.bank = classifier, bank
        self.top_k = min(options.top_k, len(classifier.classes_))
        self._least = None if options.reject is None else classifier.decider().familiarity.least(options.reject)

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


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """Images that are scored in shards, each by itself.

    Attributes:
        named, split, image_column: the images, as `list_shard` takes them.
        bank: its folder.
        dtype: of the backbone, as the user gave it.
        folder: gets the shards.
    """

    named: tuple[str, ...]
    split: str | None
    image_column: str | None
    bank: Path
    dtype: str
    options: ScoreOptions
    folder: Path

    @property
    def made_by(self) -> dict[str, Any]:
        """What decides the rows, known before the bank is loaded."""
        return {
            "fewshot_diti": metadata.version("fewshot-diti"),
            "bank": bank_fingerprint(self.bank),
            "dtype": str(as_dtype(self.dtype, default_device())).removeprefix("torch."),
            "images": " ".join(self.named),
            "split": self.split,
            "image_column": self.image_column,
            "reject": self.options.reject,
            "top_k": self.options.top_k,
        }

    def list(self, shard: Shard) -> tuple[ImageSet, Listing]:
        """The shard's images; errors as `list_shard`, and a ValueError where processes have found other images."""
        images, listing = list_shard(self.named, shard, self.split, self.image_column)
        check_same(listing)
        return images, listing

    def finished(self, shard: Shard, listing: Listing) -> dict[str, int] | None:
        """`shards.finished`, looked at by the main process alone."""
        return by_main(lambda: finished(self.folder, shard, self.made_by, listing))

    def score(self, scorer: BankScorer, shard: Shard, images: ImageSet, listing: Listing) -> Scored:
        """Scores the shard, and writes its file and then its record."""
        scored = scorer.score(images, shard.file(self.folder))
        if process_state().is_main_process:
            finish(self.folder, shard, self.made_by, listing, scored.counts)
        return scored


def check_same(listing: Listing) -> None:
    """Raises a ValueError, in all processes, where they have not found the same images."""
    found = gather([listing])
    if any(one != found[0] for one in found):
        counts = ", ".join(str(one.count) for one in found)
        raise ValueError(f"The processes found different images ({counts}): files came or went. Start again.")


def parts_of(file: Path) -> Path:
    """The folder in which the processes keep what stands in the file later."""
    return file.with_name(f"{file.name}.parts")


def remove_parts(file: Path) -> None:
    """Removes what a shard's rows were made from, once its record is written and this launch reads it no more."""
    state = process_state()
    state.wait_for_everyone()
    if state.is_main_process:
        shutil.rmtree(parts_of(file), ignore_errors=True)


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
