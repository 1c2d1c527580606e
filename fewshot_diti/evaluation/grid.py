"""The grid of a few-shot table: methods, shots and seeds. Each run leaves a JSON; what is missing or stale is run."""

from __future__ import annotations

import hashlib
import json
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list

from fewshot_diti.backbone import POCKET
from fewshot_diti.baselines.clip import VIT_H
from fewshot_diti.data import (
    ImageSet,
    Shots,
    SplitError,
    load_images,
    sample_shots,
    sample_shots_of_one_value,
    shown_attribute,
)
from fewshot_diti.distributed import main_alone_in, process_state
from fewshot_diti.evaluation.bench import Bench
from fewshot_diti.evaluation.config import GridConfig
from fewshot_diti.evaluation.hierarchy import levels_of
from fewshot_diti.evaluation.methods import METHODS
from fewshot_diti.evaluation.metrics import summarize
from fewshot_diti.evaluation.shipped import prepare_shipped
from fewshot_diti.evaluation.task import Task, fingerprint, listed_shots, make_task
from fewshot_diti.files import write_atomically
from fewshot_diti.memory import peak_memory
from fewshot_diti.progress import Progress
from fewshot_diti.training import TrainingError

PACKAGES = ("fewshot-diti", "torch", "diffusers", "transformers", "peft", "open-clip-torch", "timm", "scikit-learn")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One cell of the grid."""

    method: str
    num_shots: int
    seed: int
    path: Path


class Grid:
    """The runs of a configuration, over data that is read once.

    Raises:
        FileNotFoundError, ValueError: as the data set's loader, or a class has fewer images than the grid needs.
    """

    def __init__(self, config: GridConfig) -> None:
        self.config = config
        self.pool, test = _load(config.dataset, "train"), _load(config.dataset, "test")
        self.test = test if config.max_test_images is None else test.first_of_each_class(config.max_test_images)
        lacking = [
            name for name, part in (("train", self.pool), ("test", test)) if config.column not in part.attributes
        ]
        self._has_column = not lacking
        if config.shifted and lacking:
            raise ValueError(
                f"{config.dataset} has no attribute {config.column!r} in its split {' and '.join(lacking)}; pass "
                f"group with one of {sorted(set(self.pool.attributes) & set(test.attributes))} (a manifest's further "
                "columns, or attributes.csv beside FGVC's lists), or neither group nor shift."
            )
        if self.pool.class_names != test.class_names:
            raise ValueError(
                f"Train and test of {config.dataset} differ in their classes: "
                f"{sorted(set(self.pool.class_names) ^ set(test.class_names))}; leave these out."
            )
        if len(test.class_names) < 2:
            raise ValueError(f"{config.dataset} has the class {list(test.class_names)} alone; two at least are needed.")
        counts = np.bincount(self.pool.labels, minlength=len(self.pool.class_names))
        if counts.min() < max(config.shots):
            raise ValueError(
                f"Class {self.pool.class_names[int(counts.argmin())]!r} of {config.dataset} has {counts.min()} train "
                f"images, {max(config.shots)} are needed; pass fewer shots, add images, or leave the class out."
            )
        if not len(test):
            raise ValueError(f"{config.dataset} has no test images; add some.")
        self.levels = levels_of(self.pool, test)
        self.bench = Bench(
            backbone=config.backbone,
            dtype=config.dtype,
            clip=config.clip or (POCKET if config.backbone == POCKET else VIT_H),
            network=config.network,
            siblings=config.siblings or POCKET,
            concept=config.concept,
            trials=config.trials,
            training_share=config.training_share,
            folder=config.folder / "errors",
            representations=config.representations,
        )

    def runs(self) -> list[Run]:
        """Draw by draw, so that what a draw computes is used by all methods before the next."""
        config = self.config
        return [
            Run(method=m, num_shots=k, seed=s, path=config.folder / m / f"{k}-{s}.json")
            for k in config.shots
            for s in config.seeds
            for m in config.methods
        ]

    def missing(self) -> list[Run]:
        """Runs without a record that these settings made; a failed one is missing too."""
        return [run for run in self.runs() if self.record(run) is None]

    def record(self, run: Run) -> dict[str, Any] | None:
        """What a run of these settings left, None where there is none or it failed."""
        if not run.path.is_file():
            return None
        try:
            record: dict[str, Any] = json.loads(run.path.read_text(encoding="utf-8"))
            checksum = record.pop("checksum", None)  # 0.4 wrote none
            status, made_by = record["status"], record["made_by"]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # damaged: as good as none
            return None
        if status != "ok" or made_by != self.made_by(run) or checksum not in (None, _checksum(record)):
            return None
        return record

    def run_missing(self) -> list[Run]:
        """Runs what is missing under one progress bar, and returns the runs that failed.

        Draw by draw, all processes train and score its class tokens together, then share its runs. A failed run is
        recorded, and does not stop the rest.
        """
        with main_alone_in(self.config.folder, self.config.folder):
            return self._run_missing()

    def _run_missing(self) -> list[Run]:
        state = process_state()
        missing: list[Run] = broadcast_object_list([self.missing()])[0]
        bar = Progress(len(missing), "table", "run")
        zero_shot = self._failure(lambda: self.bench.prepare_zero_shot(self.test), missing, "bare prompts")
        for draw in dict.fromkeys((run.num_shots, run.seed) for run in missing):
            runs = [run for run in missing if (run.num_shots, run.seed) == draw]
            tokens = self._failure(partial(self._prepare, *draw), runs, "class tokens")
            shipped = self._failure(partial(self._prepare_shipped, *draw), runs, "classifier")
            failures = {"bare prompts": zero_shot, "class tokens": tokens, "classifier": shipped, "": None}
            runs.sort(key=lambda run: not METHODS[run.method].trains_a_network)  # what takes long is dealt out first
            for run in runs[state.process_index :: state.num_processes]:
                record = failures[METHODS[run.method].reads] or self._run(run)
                record = {
                    "made_by": self.made_by(run),
                    "versions": {package: _version(package) for package in PACKAGES},
                } | record
                record = json.loads(json.dumps(record, default=str))  # as it is read again
                record["checksum"] = _checksum(record)
                write_atomically(run.path, (json.dumps(record, indent=1) + "\n").encode())
            state.wait_for_everyone()
            bar.update(len(runs))
        bar.close()
        return [run for run in missing if self.record(run) is None]

    def _prepare(self, num_shots: int, seed: int) -> None:
        self.bench.prepare(self.task(num_shots, seed))

    def _prepare_shipped(self, num_shots: int, seed: int) -> None:
        prepare_shipped(self.bench, self.task(num_shots, seed))

    def _failure(self, prepare: Callable[[], None], runs: list[Run], errors: str) -> dict[str, Any] | None:
        """Prepares the errors that some of the runs read; the record of its failure, if it fails."""
        if all(METHODS[run.method].reads != errors for run in runs):
            return None
        try:
            prepare()
        except Exception as error:
            if process_state().num_processes > 1 and not isinstance(error, TrainingError | ValueError):
                raise  # the other processes may not have met it, and would wait for ever
            return _failed(error)
        return None

    def draw(self, num_shots: int, seed: int) -> Shots:
        """Which images of the pool are the shots.

        Raises:
            ValueError: a class has too few images.
        """
        if self.config.shots_file is not None:
            return listed_shots(self.config.shots_file, self.pool, self.test, num_shots)
        if self.of_one_value(num_shots):
            return sample_shots_of_one_value(self.pool, self.test, num_shots, seed, self.config.column)
        return sample_shots(self.pool, num_shots, seed)

    def task(self, num_shots: int, seed: int) -> Task:
        """The draw's shots with the test images.

        Raises:
            ValueError: a class has too few images, or a test image is a shot.
        """
        return make_task(self.pool, self.test, self.draw(num_shots, seed), num_shots, seed)

    def of_one_value(self, num_shots: int) -> bool:
        """Whether the shots of a class share one value of the attribute; not where some class has too few images."""
        return self.config.shifted and num_shots <= self._most_of_one_value

    @cached_property
    def _most_of_one_value(self) -> int:
        return most_of_one_value(self.pool, self.config.column)

    @cached_property
    def _values(self) -> str:
        """What decides shots of one value: the attribute, and a hash of its values."""
        column = self.config.column
        values = repr([part.attributes[column] for part in (self.pool, self.test)])
        return f"{column} {hashlib.sha256(values.encode()).hexdigest()[:32]}"

    def shown(self, task: Task) -> np.ndarray | None:
        """bool [N, C]: whether the shots of a class show a test image's value of the attribute; None where the images
        have no such attribute."""
        if not self._has_column:
            return None
        return shown_attribute(task.shots, task.test, self.config.column)

    def kinds(self, shown_NC: np.ndarray) -> dict[str, np.ndarray]:
        """Masks [N] of test images by `shown`: those are "matched" whose value the shots of their class show, those
        "shifted" that have another, and of these "misleading" whose value the shots of another class show."""
        known = np.array([bool(value) for value in self.test.attributes[self.config.column]])
        matched = shown_NC[np.arange(len(known)), self.test.labels]
        shifted = known & ~matched
        return {"matched": matched, "shifted": shifted, "misleading": shifted & shown_NC.any(1)}

    def prepared(self, num_shots: int, seed: int) -> bool:
        """Whether the errors of the draw's class tokens are on disk."""
        try:
            self.bench.diti(self.task(num_shots, seed))
        except FileNotFoundError:
            return False
        return True

    def made_by(self, run: Run) -> dict[str, Any]:
        """All that decides a run's figures; of the code, the version of the package."""
        config, bench = self.config, self.bench
        try:
            settings = METHODS[run.method].settings(bench, run.num_shots, run.seed)
        except Exception as error:  # the run itself will say why a model cannot be loaded
            settings = {"error": f"{type(error).__name__}: {error}"}
        made_by = {
            "version": _version("fewshot-diti"),
            "method": run.method,
            "num_shots": run.num_shots,
            "seed": run.seed,
            "dataset": config.dataset,
            "pool": fingerprint(self.pool),
            "test": fingerprint(self.test),
            "one_value_of": self._values if config.shifted else None,
            "concept": config.concept,
            "backbone": config.backbone,
            "backbone_hash": bench.backbone.hash,
            "dtype": str(bench.backbone.dtype),
            "settings": settings,
        }
        return json.loads(json.dumps(made_by, default=str))  # type: ignore[no-any-return]  # as a record reads it

    def _run(self, run: Run) -> dict[str, Any]:
        """What a run found, or why it failed."""
        start = perf_counter()
        try:
            task = self.task(run.num_shots, run.seed)
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            shown_NC = self.shown(task)
            outcome = METHODS[run.method].run(self.bench, task)
            figures = summarize(
                self.test.labels,
                outcome.probabilities,
                self.test.class_names,
                self.test.ids,
                groups=self.test.attributes.get(self.config.column),
                parts={} if shown_NC is None else self.kinds(shown_NC),
                levels=self.levels,
            )
        except Exception as error:  # whatever it is, the other runs go on
            return _failed(error)
        return {
            "status": "ok",
            **figures,
            "chosen": outcome.chosen,
            "evaluations_per_image": outcome.evaluations,
            "training_seconds": outcome.training_seconds,
            "seconds_per_image": outcome.scoring_seconds / len(self.test),
            "seconds": perf_counter() - start,
            "peak_memory": peak_memory(self.bench.backbone.device),
            "shots": {"k": run.num_shots, "seed": run.seed, "image_ids": list(task.shots.ids)},
            "shots_of_one_value": self.of_one_value(run.num_shots),
        }


def _load(dataset: str, split: str) -> ImageSet:
    try:
        return load_images(dataset, split)
    except SplitError as error:
        raise SplitError(
            f"{error} A few-shot table draws shots from the split train and classifies images of the split test: "
            "folders train/CLASS and test/CLASS, or a manifest with a column split."
        ) from error


def _failed(error: Exception) -> dict[str, Any]:
    trace = "".join(traceback.format_exception(error))
    return {"status": "failed", "error": f"{type(error).__name__}: {error}", "traceback": trace}


def most_of_one_value(images: ImageSet, column: str) -> int:
    """The largest number such that every class has so many different images of some one value of the column."""
    values = zip(images.labels.tolist(), images.attributes[column], images.ids, strict=True)
    counts = Counter((label, value) for label, value, _ in set(values) if value)
    return min(
        max((n for (c, _), n in counts.items() if c == label), default=0) for label in set(images.labels.tolist())
    )


def _checksum(record: dict[str, Any]) -> str:
    """Of what a record says: a number that was damaged is not taken for a result."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
