"""One few-shot run: shots, class tokens, test images, accuracy. A recipe is a preset of one, a table has many."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from sklearn.metrics import accuracy_score, f1_score

from fewshot_diti.backbone import POCKET, Backbone, load_backbone
from fewshot_diti.bank_files import MANIFEST, bank_fingerprint, cut_short
from fewshot_diti.checkpoints import checkpoints_for
from fewshot_diti.classifier import DiTiClassifier
from fewshot_diti.config import PredictionConfig, ScoringConfig, TrainingConfig
from fewshot_diti.data import ImageSet, Shots, load_images, sample_shots
from fewshot_diti.data.images import ImageGeometry, ResizeRule
from fewshot_diti.devices import TrainingDtype
from fewshot_diti.distributed import process_state
from fewshot_diti.evaluation.predicting import BANK, classify
from fewshot_diti.evaluation.task import Task, fingerprint, listed_shots, make_task
from fewshot_diti.files import write_atomically
from fewshot_diti.training import OnStep

RUN, SHOTS, RESULTS = "run.json", "shots.json", "results.json"
# Where things lie, and how many samples share a forward pass: none of them changes a result.
_WITHOUT_EFFECT = {"output_dir", "samples_per_batch", "gradient_checkpointing", "batch_size"}
_WITHOUT_EFFECT |= {"dataset", "shots_file", "backbone"}  # hashes say what was in them


@dataclass(frozen=True, kw_only=True)
class FewShotRun:
    """A few-shot run, complete.

    Attributes:
        dataset: as `data.load_images` reads it, with splits train and test.
        output_dir: folder for shots, bank, predictions and results; a run that was cut short goes on from there.
        backbone: "pocket", a folder, or a hub id.
        dtype: of U-Net and text encoder; auto is bfloat16 where the hardware has it, else float32. It decides, not the
            mixed precision of `accelerate launch`: frozen weights are kept in it.
        num_shots: training images per class.
        train_split: split that the shots come from; published lists of FGVC-Aircraft need trainval.
        shots_file: the shots, as `Shots.save` wrote them or as a published list of paths; None draws them.
        seed: of the draw of the shots, of training and of scoring.
        concept: what all classes are, in the singular; for the pocket "aircraft" where it is not given.
        prompt_template, generic_prompt: as of `DiTiClassifier`.
        resize: how images come to the backbone's size.
        banner_rows: pixel rows cut from the bottom of each image (20 in FGVC-Aircraft's official images).
        max_test_images: per class, the first by image id; None: all.
        training, scoring, prediction: as of `DiTiClassifier`.

    Raises:
        ValueError: a value is out of its range, or training or scoring have a seed of their own.
    """

    dataset: str
    output_dir: Path
    num_shots: int
    backbone: str = POCKET
    dtype: TrainingDtype = "auto"
    train_split: str = "train"
    shots_file: Path | None = None
    seed: int = 1
    concept: str | None = None
    prompt_template: str | None = None
    generic_prompt: str | None = None
    resize: ResizeRule = "crop"
    banner_rows: int = 0
    max_test_images: int | None = None
    training: TrainingConfig = field(default_factory=TrainingConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    prediction: PredictionConfig = field(default_factory=PredictionConfig)

    def __post_init__(self) -> None:
        for name in ("num_shots", "max_test_images"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value}; pass a whole number of at least 1.")
        for name in ("training", "scoring"):
            if (own := getattr(self, name).seed) not in (0, self.seed):
                raise ValueError(f"{name}.seed={own}; pass seed, which all parts of a run follow.")
            object.__setattr__(self, name, replace(getattr(self, name), seed=0))  # so that `seed` alone can be changed

    def classifier(self, backbone: Backbone) -> DiTiClassifier:
        """The classifier that the run trains."""
        return DiTiClassifier(
            backbone,
            concept=self.concept,
            prompt_template=self.prompt_template,
            generic_prompt=self.generic_prompt,
            training=replace(self.training, seed=self.seed),
            scoring=replace(self.scoring, seed=self.seed),
            prediction=self.prediction,
            geometry=ImageGeometry(size=backbone.image_size, resize=self.resize, banner_rows=self.banner_rows),
        )


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run gives.

    Attributes:
        accuracy, macro_f1: 0 to 1, over the test images.
        images: test images.
        classes: class tokens in the bank.
        evaluations_per_image: samples through the U-Net, mean over the images.
    """

    accuracy: float
    macro_f1: float
    images: int
    classes: int
    evaluations_per_image: float


def load_task(run: FewShotRun) -> tuple[Task, Shots]:
    """The run's shots and test images, and how the shots were drawn.

    Raises:
        FileNotFoundError, ValueError: the data cannot be read, a class has too few images, or a test image is a shot.
    """
    pool, test = (load_images(run.dataset, split) for split in (run.train_split, "test"))
    if run.max_test_images is not None:
        test = test.first_of_each_class(run.max_test_images)
    if run.shots_file is None:
        drawn = sample_shots(pool, run.num_shots, run.seed)
    else:
        drawn = listed_shots(run.shots_file, pool, test, run.num_shots)
    return make_task(pool, test, drawn, run.num_shots, run.seed), drawn


def execute(run: FewShotRun) -> Result:
    """Does a run, or goes on with one that was cut short; under `accelerate launch` all processes share it.

    Writes `run.json`, `shots.json`, `bank/`, `predictions/part-*.jsonl` (one per process) and `results.json` to
    `output_dir`.

    Raises:
        FileNotFoundError: the data set or the backbone is not there; the error names what to get.
        ValueError: the data do not fit the run, or `output_dir` holds another run.
        TrainingError: a class token could not be trained.
    """
    task, drawn = load_task(run)
    classifier = learn(begin(run, task, drawn), task, run.output_dir / BANK)
    records = classify(classifier, task.test, run.output_dir)
    predicted = [record["label"] for record in records]
    result = Result(
        accuracy=float(accuracy_score(task.truth(), predicted)),
        macro_f1=float(f1_score(task.truth(), predicted, average="macro", zero_division=0)),
        images=len(task.test),
        classes=len(classifier.classes_),
        evaluations_per_image=sum(record["evaluations"] for record in records) / len(records),
    )
    if process_state().is_main_process:
        record = {**asdict(result), "run": asdict(run), "settings": classifier.settings_.to_dict()}
        record["versions"] = {p: metadata.version(p) for p in ("torch", "diffusers", "transformers", "peft")}
        write_atomically(run.output_dir / RESULTS, _json(record))
    return result


def begin(run: FewShotRun, task: Task, drawn: Shots) -> DiTiClassifier:
    """The classifier that the run trains, and the run's folder marked as its own; what cannot run marks none.

    Raises:
        FileNotFoundError, ValueError: the backbone, the settings, or a folder that holds another run.
    """
    backbone = load_backbone(run.backbone, run.dtype)
    classifier = run.classifier(backbone)
    classifier.checked_settings(run.num_shots)
    claim(run.output_dir, describe(run, task, backbone), drawn)
    return classifier


def describe(run: FewShotRun, task: Task, backbone: Backbone) -> dict[str, Any]:
    """All that decides a run's results."""
    kind, _, _ = run.dataset.partition(":")
    return {
        "fewshot_diti": metadata.version("fewshot-diti"),
        "data": kind,
        "test": fingerprint(task.test),
        "backbone_hash": backbone.hash,
        "dtype_used": str(backbone.dtype),
        **_effective(asdict(run)),
    }


def claim(folder: Path, description: dict[str, Any], drawn: Shots) -> None:
    """Marks a folder as a run's; raises ValueError where it holds something else, naming what differs."""
    path, way_out = folder / RUN, "pass another output_dir, or remove that folder."
    description = json.loads(_json(description))
    if path.is_file():
        theirs, mine = _flat(_read_json(path)), _flat(description)
        different = [key for key, value in mine.items() if theirs.get(key) != value]
        if different:
            changes = ", ".join(f"{key} {theirs.get(key)} there and {mine[key]} here" for key in different)
            raise ValueError(f"{folder} holds another run ({changes}); {way_out}")
        if (folder / SHOTS).is_file() and Shots.load(folder / SHOTS) != drawn:
            raise ValueError(f"{folder} holds a run on other shots, so the data have changed; {way_out}")
    elif (folder / BANK).exists():
        raise ValueError(f"{folder} holds a bank that no run made; {way_out}")
    state = process_state()
    state.wait_for_everyone()
    if state.is_main_process:
        write_atomically(path, _json(description))
        drawn.save(folder / SHOTS)
    state.wait_for_everyone()


def settle(folder: Path, made_by: Mapping[str, str]) -> None:
    """Empties a folder that something else made, and marks it."""
    path, state = folder / RUN, process_state()
    state.wait_for_everyone()
    if state.is_main_process and not (path.is_file() and _read_json(path) == dict(made_by)):
        shutil.rmtree(folder, ignore_errors=True)
        write_atomically(path, _json(dict(made_by)))
    state.wait_for_everyone()


def learn(classifier: DiTiClassifier, task: Task, folder: Path) -> DiTiClassifier:
    """Fits the classifier on the shots and saves it, or loads the one that a complete run saved in the folder.

    A folder is replaced only by a complete classifier. Where the fit fails or is interrupted, what there is goes to a
    folder beside it, which is marked as incomplete and which no later run takes for the bank.

    Raises:
        TrainingError: a class token could not be trained.
    """
    if (folder / MANIFEST).is_file():  # written last
        saved = DiTiClassifier.from_pretrained(folder, classifier.backbone)
        if cut_short(folder):
            with checkpoints_for(folder):  # which go, as do the hidden names
                saved.save_pretrained(folder)
            process_state().wait_for_everyone()
        saved.prediction = classifier.prediction  # may share batches in another way
        return saved
    fit_and_save(classifier, task.shots, task.shot_labels(), folder)
    process_state().wait_for_everyone()  # all read it
    return classifier


def fit_and_save(
    classifier: DiTiClassifier,
    shots: ImageSet,
    labels: Sequence[str],
    folder: Path,
    before: str = "",
    on_step: OnStep | None = None,
) -> None:
    """Fits the classifier and saves it to a folder; what is incomplete is saved beside it, as FOLDER_incomplete.

    Started again after it was cut short, it goes on from the checkpoints in the folder.

    Args:
        before: fingerprint of the bank that it replaces, "" of none.

    Raises:
        ValueError: the folder holds another bank, which another program has saved since.
    """
    with checkpoints_for(folder) as checkpoints:
        now = bank_fingerprint(folder) if (folder / MANIFEST).is_file() else ""
        if process_state().is_main_process and now != before:
            raise ValueError(f"Another program has saved a bank in {folder} meanwhile; pass another folder.")
        try:
            classifier.fit(shots.decoded(), labels, checkpoints=checkpoints, on_step=on_step)
        except BaseException:
            if classifier.bank_ is not None:
                incomplete = folder.resolve().with_name(f"{folder.resolve().name}_incomplete")
                where = f"in {incomplete}, marked as incomplete"
                try:
                    classifier.save_pretrained(incomplete)
                except OSError as error:  # what stopped it is what the user has to know first
                    where = f"lost: {error}"
                warnings.warn(f"what was trained before it stopped is {where}", stacklevel=2)
            raise
        classifier.save_pretrained(folder)


def _effective(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that decide the results."""
    return {
        key: _effective(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if key not in _WITHOUT_EFFECT
    }


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields by their dotted names, as the command line has them."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON file of an earlier run; raises ValueError naming it where it is damaged."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove its folder, or pass another output_dir.") from error


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, default=str) + "\n").encode()
