"""One experiment: shots, class tokens, test images, accuracy; what a recipe configures and a resumed run continues."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import tyro
from rich.console import Console
from sklearn.metrics import accuracy_score, f1_score

from fewshot_diti.backbone import Backbone, load_backbone
from fewshot_diti.bank import bank_fingerprint
from fewshot_diti.classifier import DiTiClassifier
from fewshot_diti.cost import announce_time
from fewshot_diti.data.benchmarks import load_duke, load_isic2019, load_veri
from fewshot_diti.data.image_set import ImageSet
from fewshot_diti.data.images import ImageGeometry, ResizeRule
from fewshot_diti.data.shots import Shots, check_disjoint, sample_shots
from fewshot_diti.data.sources import load_bundled, load_fgvc
from fewshot_diti.distributed import process_state
from fewshot_diti.files import write_atomically
from fewshot_diti.learning import TrainingError
from fewshot_diti.part_files import spread_over_processes
from fewshot_diti.recommended import ScoringConfig
from fewshot_diti.saved import SETTINGS_FILE
from fewshot_diti.scoring import in_flight
from fewshot_diti.training import TrainingConfig
from fewshot_diti.validation import validation_losses, validation_table

DatasetName = Literal["fgvc", "isic2019", "veri", "duke", "bundled"]

_LOADERS: dict[str, Callable[[Path, str], ImageSet]] = {
    "fgvc": load_fgvc,
    "isic2019": load_isic2019,
    "veri": load_veri,
    "duke": load_duke,
    "bundled": lambda folder, split: load_bundled(split),
}
_SETTINGS, _SHOTS, _BANK, _INCOMPLETE, _PREDICTIONS, _RESULTS = (
    "experiment.json",
    "shots.json",
    "bank",
    "bank_incomplete",
    "predictions",
    "results.json",
)
# Where the data lies, where the results go, and how many samples share a forward: none of them moves a result.
_WITHOUT_EFFECT = {"data", "output_dir", "samples_per_batch", "gradient_checkpointing", "batch_size"}


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A few-shot experiment, complete.

    Attributes:
        data: folder of the data set in its official layout; not for the bundled images.
        output_dir: folder for shots, bank, predictions and results; a run that was cut short goes on from there.
        backbone: "pocket", a folder, or a hub id.
        dtype: of U-Net and text encoder; auto is bfloat16 where the hardware has it, else float32. It decides, not the
            mixed precision of `accelerate launch`: frozen weights are kept in it.
        dataset: whose layout `data` has.
        num_shots: training images a class.
        seed: of the draw of the shots.
        prompt_template: prompt of a class token, `{}` standing for the class.
        generic_prompt: prompt of the prior images.
        resize: how images come to the backbone's size.
        banner_rows: pixel rows cut from the bottom of each image (20 in FGVC-Aircraft's official images).
        max_test_images: of each class, the first by image id; all where it is None.
        training: how class tokens are trained.
        scoring: how images are scored.

    Raises:
        ValueError: a value is out of its range, or a folder is given for the bundled images.
    """

    data: Path
    output_dir: Path
    backbone: str
    dataset: DatasetName
    num_shots: int
    prompt_template: str
    generic_prompt: str
    training: TrainingConfig
    scoring: ScoringConfig
    seed: int = 1
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # float16 loses small gradients
    resize: ResizeRule = "crop"
    banner_rows: int = 0
    max_test_images: int | None = None

    def __post_init__(self) -> None:
        if self.dataset not in get_args(DatasetName):
            raise ValueError(f"dataset={self.dataset!r}; pass one of {get_args(DatasetName)}.")
        if self.dataset == "bundled" and self.data != Path():
            raise ValueError(f"data={str(self.data)!r}, but the bundled images ship with the package; leave data out.")
        if self.num_shots < 1:
            raise ValueError(f"num_shots={self.num_shots}; pass a whole number of at least 1.")
        if self.max_test_images is not None and self.max_test_images < 1:
            raise ValueError(f"max_test_images={self.max_test_images}; pass at least 1, or None for all.")


@dataclass(frozen=True, kw_only=True)
class Result:
    """What an experiment gives.

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


def main(configs: Mapping[str, Callable[[int], Experiment]], num_shots: int) -> None:
    """A recipe's command line: `--config` picks one of `configs` (the first by default), flags change its values.

    `--num_shots` picks the configuration of that many shots, which decides more than the number alone. Errors that a
    user can cure end the program with one line.
    """
    chooser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chooser.add_argument("--config", choices=list(configs), default=next(iter(configs)))
    chooser.add_argument("--num_shots", "--num-shots", type=int, default=num_shots)
    choice, flags = chooser.parse_known_args()
    try:
        default = configs[choice.config](choice.num_shots)
        names = ", ".join(configs)
        description = (
            f"Values below are those of --config {choice.config} (one of {names}; {next(iter(configs))} by default)."
        )
        run(tyro.cli(Experiment, default=default, args=flags, use_underscores=True, description=description))
    except torch.OutOfMemoryError as error:
        raise SystemExit(
            "error: out of GPU memory, even with the smallest batches; pass --training.gradient_checkpointing or "
            f"fewer --training.shots_per_step. {str(error).split('.')[0]}"
        ) from error
    except (OSError, ValueError, TrainingError) as error:
        raise SystemExit(f"error: {error}") from error


def run(experiment: Experiment) -> Result:
    """Runs an experiment, or goes on with one that was cut short; under `accelerate launch` all processes share it.

    Writes `shots.json`, `bank/`, `predictions/part-*.jsonl` (one a process) and `results.json` to `output_dir`.

    Raises:
        FileNotFoundError: the data set or the backbone is not there; the text says what to get.
        ValueError: the data do not fit the experiment, or `output_dir` holds another experiment.
        TrainingError: a class token could not be trained.
    """
    state = process_state()
    pool, test = (_LOADERS[experiment.dataset](experiment.data, split) for split in ("train", "test"))
    if experiment.max_test_images is not None:
        test = test.first_of_each_class(experiment.max_test_images)
    shots = sample_shots(pool, experiment.num_shots, experiment.seed)
    backbone = load_backbone(experiment.backbone, experiment.dtype)  # a wrong name claims no folder
    _claim(experiment, shots)
    shots_set = pool.subset(shots.rows(pool))
    check_disjoint(shots_set, test)
    num_classes = len(pool.class_names)
    to_score = len(test) * experiment.scoring.evaluations(num_classes)
    classifier = _class_tokens(experiment, backbone, shots_set, to_score)
    predictions = _predict(experiment, classifier, test)
    truth = [test.class_names[label] for label in test.labels]
    predicted = [record["prediction"] for record in predictions]
    num_classes = len(classifier.classes_)
    result = Result(
        accuracy=float(accuracy_score(truth, predicted)),
        macro_f1=float(f1_score(truth, predicted, average="macro", zero_division=0)),
        images=len(test),
        classes=num_classes,
        evaluations_per_image=sum(record["evaluations"] for record in predictions) / len(test),
    )
    if state.is_main_process:
        record = {
            **asdict(result),
            "backbone_hash": classifier.backbone.hash,
            "experiment": asdict(experiment),
            "versions": {p: metadata.version(p) for p in ("torch", "diffusers", "transformers", "peft")},
        }
        write_atomically(experiment.output_dir / _RESULTS, _json(record))
        print(
            f"accuracy {100 * result.accuracy:.1f} %, macro-F1 {100 * result.macro_f1:.1f} %: {result.images} images, "
            f"{num_classes} classes, {experiment.num_shots} shots a class; {experiment.output_dir / _RESULTS}"
        )
    return result


def _claim(experiment: Experiment, shots: Shots) -> None:
    """Marks the output folder as this experiment's; raises ValueError where it holds something else."""
    folder, settings = experiment.output_dir, json.loads(_json(_settings(asdict(experiment))))
    path, way_out = folder / _SETTINGS, "pass another --output_dir, or remove that folder."
    if path.is_file():
        theirs, mine = _flat(_read_json(path)), _flat(settings)
        different = [key for key, value in mine.items() if theirs.get(key) != value]
        if different:
            changes = ", ".join(f"{key} {theirs.get(key)} there and {mine[key]} here" for key in different)
            raise ValueError(f"{folder} holds another experiment ({changes}); {way_out}")
        if (folder / _SHOTS).is_file() and Shots.load(folder / _SHOTS) != shots:
            raise ValueError(f"{folder} holds an experiment on other shots, so the data have changed; {way_out}")
    elif (folder / _BANK).exists():
        raise ValueError(f"{folder} holds a bank that no experiment made; {way_out}")
    state = process_state()
    state.wait_for_everyone()
    if state.is_main_process:
        write_atomically(path, _json(settings))
        shots.save(folder / _SHOTS)
    state.wait_for_everyone()


def _flat(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields by their dotted names, as the command line has them."""
    flat: dict[str, Any] = {}
    for key, value in fields.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _settings(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields that decide the results."""
    return {
        key: _settings(value) if isinstance(value, dict) else value
        for key, value in fields.items()
        if key not in _WITHOUT_EFFECT
    }


def _class_tokens(experiment: Experiment, backbone: Backbone, shots_set: ImageSet, evaluations: int) -> DiTiClassifier:
    """The bank that an earlier run left, or a new one trained on the shots; `evaluations` of scoring will follow.

    Where something failed, what is trained is saved in a folder of its own, which no later run takes for the bank.
    """
    folder = experiment.output_dir / _BANK
    if (folder / SETTINGS_FILE).is_file():  # written last
        classifier = DiTiClassifier.from_pretrained(folder, backbone)
        classifier.scoring = experiment.scoring  # may share batches in another way
        return classifier
    classifier = DiTiClassifier(
        backbone,
        prompt_template=experiment.prompt_template,
        generic_prompt=experiment.generic_prompt,
        training=experiment.training,
        scoring=experiment.scoring,
        geometry=ImageGeometry(size=backbone.image_size, resize=experiment.resize, banner_rows=experiment.banner_rows),
    )
    announce_time(backbone, classifier.geometry.size, evaluations, "scoring")
    try:
        classifier.fit(shots_set.names, [shots_set.class_names[label] for label in shots_set.labels])
    except BaseException:
        if classifier.bank_ is not None:
            classifier.save_pretrained(experiment.output_dir / _INCOMPLETE)
        raise
    classifier.save_pretrained(folder)
    process_state().wait_for_everyone()  # all read it
    if experiment.dataset == "fgvc":
        with suppress(FileNotFoundError):  # not every tree has the val lists
            losses = validation_losses(classifier, load_fgvc(experiment.data, "val"))
            Console(quiet=not process_state().is_main_process).print(validation_table(losses))
    return classifier


def _predict(experiment: Experiment, classifier: DiTiClassifier, test: ImageSet) -> list[dict[str, Any]]:
    """What is said of each test image; the processes share the images, and those decided by an earlier run are kept."""
    names = classifier.classes_.tolist()

    def predict(rows: Sequence[int]) -> list[dict[str, Any]]:
        decisions = classifier.decide([test.image(row) for row in rows])
        return [
            {"prediction": names[d.label], "scores": d.json_scores(), "evaluations": d.evaluations} for d in decisions
        ]

    rows = {image: row for row, image in enumerate(test.ids)}
    folder = experiment.output_dir / _PREDICTIONS
    # a bank that was trained again has other errors, and so has another dtype
    made_by = f"{bank_fingerprint(experiment.output_dir / _BANK)} in {classifier.backbone.dtype}"
    at_once = in_flight(experiment.scoring.schedule(len(names)))
    records = spread_over_processes(rows, predict, folder, made_by, at_once=at_once)
    return [records[image] for image in test.ids]


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON file of an earlier run; raises ValueError naming it where it is damaged."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); remove its folder, or pass another --output_dir.") from error


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, default=str) + "\n").encode()
