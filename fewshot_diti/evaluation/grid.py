"""The grid of a few-shot table: methods, shots and seeds; one JSON a run, and only what is missing or stale is run."""

from __future__ import annotations

import json
import re
import resource
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from fewshot_diti.backbone import POCKET, DtypeName
from fewshot_diti.baselines.clip import VIT_H
from fewshot_diti.baselines.imagenet import PACKAGED
from fewshot_diti.data import (
    ImageSet,
    check_disjoint,
    load_images,
    sample_shots,
    sample_shots_of_one_value,
    seen_attribute,
)
from fewshot_diti.evaluation.bench import SIBLINGS, Bench, Task, fingerprint
from fewshot_diti.evaluation.methods import (
    METHODS,
    NEEDS_CLASS_TOKENS,
    NEEDS_CLIP,
    NEEDS_NETWORK,
    NEEDS_ZERO_SHOT,
    TRAINS_A_NETWORK,
)
from fewshot_diti.evaluation.metrics import summarize
from fewshot_diti.files import write_atomically
from fewshot_diti.learning import TrainingError
from fewshot_diti.processes import process_state
from fewshot_diti.recommended import recommended_scoring

PACKAGES = ("fewshot-diti", "torch", "diffusers", "transformers", "peft", "open-clip-torch", "timm", "scikit-learn")
AIRLINE = "airline"  # the attribute of the bundled images that a livery is


@dataclass(frozen=True, kw_only=True)
class GridConfig:
    """Which runs a table has.

    Attributes:
        dataset: as `load_images` reads it, with splits train and test.
        backbone: "pocket", a folder, or a hub id.
        dtype: of its U-Net and text encoder; auto is bfloat16 where the hardware has it, else float32. A table that is
            begun on one processor and ended on another names one.
        clip: as `OpenClip` takes it; by default the pocket's for the pocket, else ViT-H-14.
        network: as `ImageNetwork` takes it.
        siblings: a network trained with labels of sibling classes, as `ImageNetwork` takes it; by default the pocket's
            for the pocket, else none.
        methods: rows, keys of `METHODS`; by default all, `siblings` where there is such a network.
        shots, seeds: columns, and draws of each.
        concept: what all classes are.
        trials: of the diffusion methods, over all time-steps; by default 16 for the pocket, else what is recommended.
        training_share: of the steps that class tokens, finetune and clip-lora are trained for; less for a quick look.
        max_test_images: of each class; by default all.
        shift: "livery", the same as `group` airline; "none".
        group: an attribute of the images: the shots of a class share one value of it, as far as some value has so many
            images; test images of the class with a value that its shots show are matched, the others shifted.
        output_dir: gets one JSON a run at <dataset>/<backbone>/<shift>/<method>/<shots>-<seed>.json.

    Raises:
        ValueError: an unknown method, a number below 1, nothing to run or something twice, or the row `siblings`
            without a network.
    """

    dataset: str = "bundled"
    backbone: str = POCKET
    dtype: DtypeName = "auto"
    clip: str | None = None
    network: str = PACKAGED
    siblings: str | None = None
    methods: tuple[str, ...] = ()
    shots: tuple[int, ...] = (1, 2, 4, 8, 16)
    seeds: tuple[int, ...] = (1, 2, 3)
    concept: str = "aircraft"
    trials: int | None = None
    training_share: float = 1.0
    max_test_images: int | None = None
    shift: Literal["none", "livery"] = "none"
    group: str | None = None
    output_dir: Path = Path("results")

    def __post_init__(self) -> None:
        if not self.methods:
            usable = (m for m in METHODS if self.has_siblings or m != SIBLINGS)
            object.__setattr__(self, "methods", tuple(usable))
        unknown = [m for m in self.methods if m not in METHODS]
        if unknown:
            raise ValueError(f"methods {unknown}; pass some of {', '.join(METHODS)}.")
        if not self.has_siblings and SIBLINGS in self.methods:
            raise ValueError(
                "The row siblings needs a network that was trained with labels of sibling classes; pass "
                "--siblings local-dir:FOLDER (recipes/pocket_siblings.py trains one), or other --methods."
            )
        for name in ("methods", "shots", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name}={values}; pass at least one, and each once.")
        for name in ("shots", "trials", "max_test_images"):
            value = getattr(self, name)
            if value is not None and np.min(value) < 1:
                raise ValueError(f"{name}={value}; pass whole numbers of at least 1.")

        if not 0 < self.training_share <= 1:
            raise ValueError(f"training_share={self.training_share}; pass a number above 0, of at most 1.")

    @property
    def has_siblings(self) -> bool:
        """Whether there is a network for the row `siblings`."""
        return self.siblings is not None or self.backbone == POCKET

    @property
    def column(self) -> str:
        """The attribute that matched and shifted test images differ in."""
        return self.group or AIRLINE

    @property
    def shifted(self) -> bool:
        """Whether the shots of a class share one value of it."""
        return self.group is not None or self.shift != "none"

    @property
    def folder(self) -> Path:
        """What all runs of this data set and backbone share."""
        images = "" if self.max_test_images is None else f"@{self.max_test_images}"
        return self.output_dir / (_slug(self.dataset) + images) / _slug(self.backbone) / _slug(self.group or self.shift)


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
        self.pool = load_images(config.dataset, "train")
        test = load_images(config.dataset, "test")
        self.test = test if config.max_test_images is None else test.first_of_each_class(config.max_test_images)
        self._has_column = all(config.column in part.attributes for part in (self.pool, self.test))
        if config.shifted and not self._has_column:
            raise ValueError(f"No attribute {config.column!r}; these images have {list(test.attributes)}.")
        if self.pool.class_names != test.class_names:
            raise ValueError(
                f"Train and test of {config.dataset} differ in their classes: "
                f"{sorted(set(self.pool.class_names) ^ set(test.class_names))}; leave these out."
            )
        counts = np.bincount(self.pool.labels, minlength=len(self.pool.class_names))
        if counts.min() < max(config.shots):
            raise ValueError(
                f"Class {self.pool.class_names[int(counts.argmin())]!r} of {config.dataset} has {counts.min()} train "
                f"images, {max(config.shots)} are needed; pass fewer --shots, add images, or leave the class out."
            )
        if not len(test):
            raise ValueError(f"{config.dataset} has no test images; add some.")
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
            usable = record["status"] == "ok" and record["made_by"] == self.made_by(run)
        except (ValueError, KeyError, TypeError):  # damaged: as good as none
            return None
        return record if usable else None

    def run_missing(self) -> list[Run]:
        """Runs what is missing under one progress bar, and returns the runs that failed.

        All processes train and score class tokens together, draw by draw; then they share the runs. A failed run is
        recorded, and does not stop the rest.
        """
        state = process_state()
        missing = broadcast_object_list([self.missing()])[0]
        draws = list(dict.fromkeys((r.num_shots, r.seed) for r in missing if r.method in NEEDS_CLASS_TOKENS))
        bar = tqdm(total=len(draws) + len(missing), desc="runs", disable=None if state.is_main_process else True)
        reasons: dict[tuple[int, int] | None, str] = {}
        zero_shot = [None] if any(r.method in NEEDS_ZERO_SHOT for r in missing) else []
        for draw in [*zero_shot, *draws]:
            try:
                if draw is None:
                    self.bench.prepare_zero_shot(self.test)
                else:
                    self.bench.prepare(self.task(*draw))
            except Exception as error:
                if state.num_processes > 1 and not isinstance(error, TrainingError | ValueError):
                    raise  # the other processes may not have met it, and would wait for ever
                reasons[draw] = f"{type(error).__name__}: {error}"
            bar.update(draw is not None)
        mine = missing[state.process_index :: state.num_processes]
        for run in mine:
            try:
                record = self._run(run)
            except Exception as error:  # whatever it is, the other runs go on
                reason, trace = f"{type(error).__name__}: {error}", traceback.format_exc()
                if run.method in NEEDS_ZERO_SHOT:
                    reason = reasons.get(None, reason)
                elif run.method in NEEDS_CLASS_TOKENS:
                    reason = reasons.get((run.num_shots, run.seed), reason)
                record = {"status": "failed", "error": reason, "traceback": trace}
            record = {"made_by": self.made_by(run), "versions": _versions()} | record
            write_atomically(run.path, (json.dumps(record, indent=1, default=str) + "\n").encode())
            bar.update(state.num_processes)
        bar.close()
        state.wait_for_everyone()
        return [run for run in missing if self.record(run) is None]

    def task(self, num_shots: int, seed: int) -> Task:
        """The draw's shots with the test images.

        Raises:
            ValueError: a class has too few images, or a test image is a shot.
        """
        if self.config.shifted and num_shots <= most_of_one_value(self.pool, self.config.column):
            drawn = sample_shots_of_one_value(self.pool, self.test, num_shots, seed, self.config.column)
        else:
            drawn = sample_shots(self.pool, num_shots, seed)
        shots = self.pool.subset(drawn.rows(self.pool))
        check_disjoint(shots, self.test)
        return Task(shots=shots, test=self.test, num_shots=num_shots, seed=seed)

    def prepared(self, num_shots: int, seed: int) -> bool:
        """Whether the errors of the draw's class tokens are on disk."""
        try:
            self.bench.diti(self.task(num_shots, seed))
        except FileNotFoundError:
            return False
        return True

    def made_by(self, run: Run) -> dict[str, Any]:
        """All that decides a run's figures, save the code."""
        config, bench = self.config, self.bench
        needs_tokens = run.method in NEEDS_CLASS_TOKENS
        reads_errors = needs_tokens or run.method in NEEDS_ZERO_SHOT
        recommended = recommended_scoring(small=bench.backbone.small)
        judged_by = f"{recommended.weighting}, temperature {recommended.temperature}"
        if run.method == "diti+sd":
            judged_by += f", features_weight {recommended.features_weight}"
        return {
            "method": run.method,
            "num_shots": run.num_shots,
            "seed": run.seed,
            "dataset": config.dataset,
            "pool": fingerprint(self.pool),
            "test": fingerprint(self.test),
            "backbone": config.backbone,
            "backbone_hash": self.bench.backbone.hash,
            "dtype": str(self.bench.backbone.dtype),
            "clip_hash": _hash(lambda: bench.clip.hash) if run.method in NEEDS_CLIP else None,
            "network": _hash(lambda: bench.network_of(run.method).described) if run.method in NEEDS_NETWORK else None,
            "training": str(bench.training(run.num_shots, run.seed)) if needs_tokens else None,
            "training_share": config.training_share if run.method in TRAINS_A_NETWORK else None,
            "errors": bench.error_settings(run.seed) if reads_errors else None,
            "judged_by": judged_by if reads_errors else None,
            "concept": config.concept,
            "one_value_of": config.column if config.shifted else None,
        }

    def _run(self, run: Run) -> dict[str, Any]:
        task, start = self.task(run.num_shots, run.seed), perf_counter()
        outcome = METHODS[run.method](self.bench, task)
        figures = summarize(
            self.test.labels,
            outcome.probabilities,
            self.test.class_names,
            self.test.ids,
            groups=self.test.attributes.get(self.config.column),
            matched=seen_attribute(task.shots, self.test, self.config.column) if self._has_column else None,
        )
        count = len(self.test)
        return {
            "status": "ok",
            **figures,
            "chosen": outcome.chosen,
            "evaluations_per_image": outcome.evaluations,
            "training_seconds": outcome.training_seconds,
            "seconds_per_image": outcome.scoring_seconds / count,
            "seconds": perf_counter() - start,
            "peak_memory_of_the_process_so_far": _peak_memory(),
            "shots": {"k": run.num_shots, "seed": run.seed, "image_ids": list(task.shots.ids)},
        }


def most_of_one_value(images: ImageSet, column: str) -> int:
    """The largest number such that every class has so many images of some one value of the column."""
    values = zip(images.labels.tolist(), images.attributes[column], strict=True)
    counts = Counter(pair for pair in values if pair[1])
    return min(
        max((n for (c, _), n in counts.items() if c == label), default=0) for label in set(images.labels.tolist())
    )


def _hash(of: Callable[[], str]) -> str:
    """Of a model's weights; the run itself will say why a model cannot be loaded."""
    try:
        return of()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _slug(name: str) -> str:
    return re.sub(r"[^\w.@-]+", "_", name).strip("_")


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _peak_memory() -> int:
    """Bytes: of this process so far, or on a GPU of its tensors."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
