"""The classifier: fit on a few images a class, predict, extend, save."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fewshot_diti import timesteps
from fewshot_diti.augment import colour_variants
from fewshot_diti.backbone import POCKET, Backbone
from fewshot_diti.bank import Bank, ClassToken, read_files
from fewshot_diti.calibration import candidate_windows, choose_window, fit_temperature
from fewshot_diti.data.images import ImageGeometry, ImageSource, image_id, open_image
from fewshot_diti.prior import prior_latents
from fewshot_diti.processes import process_state
from fewshot_diti.recommended import ScoringConfig, recommended_scoring, recommended_training
from fewshot_diti.scoring import Scorer, error_tensor
from fewshot_diti.training import ClassShots, Label, TrainingConfig, train_class_tokens

_SETTINGS = "classifier.json"


class TrainingError(RuntimeError):
    """Some class tokens could not be trained; the classifier holds the others."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What turns errors into labels and probabilities, all of it from the shots.

    Attributes:
        timesteps: of the trials [S].
        weights: of the trials [S].
        temperature: of the softmax over -score.
        accuracy: cross-validated on the shots, None where no folds were asked for.
    """

    timesteps: tuple[int, ...]
    weights: tuple[float, ...]
    temperature: float
    accuracy: float | None = None


class DiTiClassifier:
    """A few-shot classifier on the denoising errors of a Stable Diffusion.

    Args:
        backbone: "pocket", a folder, a hub id, or a loaded `Backbone`.
        concept: what all classes are, in the singular; it enters the prompts.
        prompt_template: prompt of a class token, `{}` standing for the class; without `{}` all classes share one prompt
            and differ in their LoRA alone. By default with the rare word before the class (TiF, section 4.1).
        generic_prompt: prompt of the prior images.
        training, scoring: by default what the package recommends for this backbone and number of shots.
        geometry: size and resize rule; by default the backbone's size, cropped.

    Attributes:
        classes_: the labels, sorted, after `fit`.
        bank_: the class tokens, in the order of `classes_`, after `fit`.
        calibration_: weights and temperature, after `fit`.
    """

    def __init__(
        self,
        backbone: str | Path | Backbone = POCKET,
        *,
        concept: str = "aircraft",
        prompt_template: str | None = None,
        generic_prompt: str | None = None,
        training: TrainingConfig | None = None,
        scoring: ScoringConfig | None = None,
        geometry: ImageGeometry | None = None,
    ) -> None:
        self.backbone = backbone if isinstance(backbone, Backbone) else Backbone.from_pretrained(backbone)
        self.concept, self.training = concept, training
        self.prompt_template = prompt_template or f"a photo of a hta {{}}, a type of {concept}."
        article = "an" if concept[:1].lower() in "aeiou" else "a"
        self.generic_prompt = generic_prompt or f"a photo of {article} {concept}"
        self.scoring = scoring or recommended_scoring(self.backbone.name)
        self.geometry = geometry or ImageGeometry(size=self.backbone.image_size)
        self.backbone.check_image_size(self.geometry.size)
        if self.scoring.timesteps[1] > self.backbone.num_train_timesteps:
            raise ValueError(
                f"Scoring at timesteps={self.scoring.timesteps} exceeds the {self.backbone.num_train_timesteps} "
                f"time-steps of backbone {self.backbone.name!r}; pass (lo, hi) inside its schedule."
            )
        self._errors: dict[str, Tensor] = {}
        self._scorer: Scorer | None = None

    def class_prompt(self, label: Label) -> str:
        """The prompt of a class token."""
        return self.prompt_template.replace("{}", str(label))

    def fit(self, images: Sequence[ImageSource], labels: Sequence[Label]) -> DiTiClassifier:
        """Learns one class token a label from the shots.

        Args:
            images: paths, PIL images or uint8 arrays.
            labels: one str, int or bool an image, at least two different ones.

        Raises:
            ValueError: lengths differ, labels of mixed type, fewer than two classes, or one image under two labels.
            TrainingError: a class's loss was not finite; the classifier holds the other classes.

        Where a class has one shot nothing can be held out, so `auto` and a temperature of None fall back to what the
        package recommends for the backbone, with a warning.
        """
        groups = _group(images, labels)
        if len(groups) < 2:
            raise ValueError(f"A classifier needs images of two classes or more, got {list(groups)}.")
        self._set_bank(None)
        failed = self._learn(groups)
        self._calibrate({x: g for x, g in groups.items() if x not in failed})
        return self._finish(failed)

    def partial_fit(self, images: Sequence[ImageSource], labels: Sequence[Label]) -> DiTiClassifier:
        """Adds classes; the class tokens that are there already, and the calibration, stay as they are to the bit.

        Raises:
            ValueError: as `fit`, or a class that the bank has already.
        """
        if self.bank_ is None:
            return self.fit(images, labels)
        groups = _group(images, labels)
        known = [x for x in groups if x in self.bank_.labels]
        if known:
            raise ValueError(f"Classes {known} are in the bank already; remove them first, or leave them out.")
        if type(next(iter(groups))) is not type(self.bank_.labels[0]):
            raise ValueError(f"Labels are {type(self.bank_.labels[0]).__name__} in the bank, got {list(groups)}.")
        return self._finish(self._learn(groups))

    bank_: Bank | None = None
    calibration_: Calibration

    @property
    def classes_(self) -> np.ndarray:
        """The labels in the order of `predict_proba`'s columns."""
        return np.array(self._fitted().labels)

    def predict(self, images: ImageSource | Sequence[ImageSource]) -> Any:
        """The label of one image, or an array of labels of many."""
        one, many = _as_list(images)
        labels = self.classes_[self.scores(many).argmin(1).numpy()]
        return labels[0].item() if one else labels

    def predict_proba(self, images: ImageSource | Sequence[ImageSource]) -> np.ndarray:
        """Probabilities [N, C], or [C] for one image: softmax of -score / temperature."""
        one, many = _as_list(images)
        p = (-self.scores(many) / self.calibration_.temperature).softmax(1).numpy()
        return p[0] if one else p

    def score(self, images: Sequence[ImageSource], labels: Sequence[Label]) -> float:
        """Accuracy, 0 to 1."""
        return float(np.mean(self.predict(list(images)) == np.asarray(labels)))

    def scores(self, images: Sequence[ImageSource]) -> Tensor:
        """Scores [N, C], float64; the smallest wins."""
        errors = self.errors(images)
        return timesteps.score(errors, torch.tensor(self.calibration_.weights, dtype=torch.float64))

    def errors(self, images: Sequence[ImageSource]) -> Tensor:
        """The error tensor [N, C, S] at the calibrated trials; an image scored before is not scored again."""
        scorer = self._ready()
        ids = [image_id(x) for x in images]
        new = {i: x for i, x in zip(ids, images, strict=True) if i not in self._errors}
        if new:
            latents = self._encode(list(new.values()))
            tensor = error_tensor(scorer, latents, list(new), self.calibration_.timesteps)
            self._errors |= dict(zip(new, tensor, strict=True))
        return torch.stack([self._errors[i] for i in ids])

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the bank with the classifier's settings beside it; of several processes the main one does."""
        bank, state = self._fitted(), process_state()
        settings = {
            "concept": self.concept,
            "prompt_template": self.prompt_template,
            "generic_prompt": self.generic_prompt,
            "scoring": asdict(self.scoring),
            "calibration": asdict(self.calibration_),
            "training": None if self.training is None else asdict(self.training),
        }
        if state.is_main_process:
            bank.save(folder, extra={_SETTINGS: (json.dumps(settings, indent=2) + "\n").encode()})
        state.wait_for_everyone()

    @classmethod
    def from_pretrained(cls, folder: str | Path, backbone: str | Path | Backbone | None = None) -> DiTiClassifier:
        """Loads what `save_pretrained` wrote; without `backbone` the one that the bank names.

        Raises:
            FileNotFoundError: no complete classifier in the folder.
            ValueError: a file was changed or cut short, or the backbone is not the bank's.
        """
        bank = Bank.load(folder)
        settings = json.loads(read_files(folder, [_SETTINGS])[_SETTINGS])
        training = settings["training"]
        classifier = cls(
            backbone if backbone is not None else bank.backbone_name,
            concept=settings["concept"],
            prompt_template=settings["prompt_template"],
            generic_prompt=settings["generic_prompt"],
            training=None if training is None else TrainingConfig(**_tuples(training)),
            scoring=ScoringConfig(**_tuples(settings["scoring"])),
            geometry=bank.geometry,
        )
        bank.check_backbone(classifier.backbone)
        classifier.calibration_ = Calibration(**_tuples(settings["calibration"]))
        classifier._set_bank(bank)
        return classifier

    def _fitted(self) -> Bank:
        if self.bank_ is None:
            raise ValueError("This classifier has no class tokens yet; call fit, or load one with from_pretrained.")
        return self.bank_

    def _set_bank(self, bank: Bank | None) -> None:
        self.bank_, self._scorer, self._errors = bank, None, {}

    def _ready(self) -> Scorer:
        if self._scorer is None:
            self._scorer = self._make_scorer(self._fitted())
        return self._scorer

    def _make_scorer(self, bank: Bank) -> Scorer:
        return Scorer(self.backbone, bank, seed=self.scoring.seed, batch_size=self.scoring.batch_size)

    def _finish(self, failed: dict[Label, int]) -> DiTiClassifier:
        if failed:
            names = ", ".join(f"{x!r} (step {s})" for x, s in failed.items())
            raise TrainingError(
                f"The loss of {names} was not finite; the other classes are trained and kept. Lower the learning rate, "
                "or load the backbone in float32, and add them again."
            )
        return self

    def _encode(self, images: Sequence[ImageSource]) -> Tensor:
        """Latents [N, c, h, w], each image by itself, so that its neighbours cannot change it by a bit."""
        return torch.cat([self.backbone.encode_images(self.geometry.pixels(x)[None])[0] for x in images])

    def _training_for(self, num_shots: int) -> TrainingConfig:
        return self.training or recommended_training(num_shots, self.backbone.name)

    def _train_bank(self, groups: dict[Label, list[ImageSource]], desc: str) -> tuple[Bank, dict[Label, int]]:
        """A bank of the groups' classes, sorted, without those that failed."""
        config = self._training_for(max(len(g) for g in groups.values()))
        prior = None
        if config.prior_weight > 0:
            prompt = self.generic_prompt
            prior = prompt, prior_latents(self.backbone, prompt, config.prior_images, self.geometry.size)
        shots = [self._class_shots(label, groups[label], config) for label in sorted(groups)]
        trained = train_class_tokens(self.backbone, shots, config, prior=prior, desc=desc)
        kept = [i for i, s in enumerate(shots) if s.label not in trained.failed]
        tokens = tuple(
            ClassToken(
                label=shots[i].label,
                prompt=shots[i].prompt,
                num_shots=len(shots[i].mean),
                unet_scale=self.scoring.unet_scale,
                text_encoder_scale=self.scoring.text_encoder_scale,
            )
            for i in kept
        )
        bank = Bank(
            tokens=tokens,
            layout=trained.layout,
            rows=trained.rows[kept],
            backbone_name=self.backbone.name,
            backbone_hash=self.backbone.hash,
            geometry=self.geometry,
        )
        return bank, trained.failed

    def _class_shots(self, label: Label, images: Sequence[ImageSource], config: TrainingConfig) -> ClassShots:
        copies = [colour_variants(self.geometry.pixels(x), image_id(x), config) for x in images]
        mean, std = self.backbone.encode_images(torch.cat(copies))
        shape = (len(images), config.colour_variants, *mean.shape[1:])
        return ClassShots(label=label, prompt=self.class_prompt(label), mean=mean.view(shape), std=std.view(shape))

    def _learn(self, groups: dict[Label, list[ImageSource]]) -> dict[Label, int]:
        """Trains class tokens and puts them into the bank; returns the classes that failed."""
        new, failed = self._train_bank(groups, "class tokens")
        bank = new if self.bank_ is None else self.bank_.merge(new)
        self._set_bank(bank.select(sorted(bank.labels)))
        return failed

    def _calibrate(self, groups: dict[Label, list[ImageSource]]) -> None:
        """Weights and temperature from the shots alone."""
        config = self._scoring_for(groups)
        grid = timesteps.even_grid(config.trials, *config.timesteps)
        self.calibration_ = Calibration(
            timesteps=tuple(grid.tolist()), weights=(1.0,) * len(grid), temperature=config.temperature or 1.0
        )
        if len(groups) < 2:
            return
        held_out = self._held_out_errors(groups, grid, config.folds) if config.folds else None
        weights = timesteps.trial_weights(self._weights(config.weighting, groups, grid, held_out), grid)
        weights = weights / weights.mean()  # a temperature then means the same under every weighting
        self.calibration_ = replace(self.calibration_, weights=tuple(weights.tolist()))
        if held_out is not None:
            errors, truth = held_out
            scores = timesteps.score(errors, weights)
            accuracy = float((scores.argmin(1) == truth).double().mean())
            temperature = config.temperature or fit_temperature(scores, truth)
            self.calibration_ = replace(self.calibration_, temperature=temperature, accuracy=accuracy)

    def _scoring_for(self, groups: dict[Label, list[ImageSource]]) -> ScoringConfig:
        """The scoring asked for, or without what must be fitted on held-out shots where none can be held out."""
        config = self.scoring
        single = sorted(x for x, shots in groups.items() if len(shots) < 2)
        if not config.folds or not single:
            return config
        default = recommended_scoring(self.backbone.name)
        auto = timesteps.parse_weighting(config.weighting).name == "auto"
        config = replace(
            config,
            folds=0,
            weighting=default.weighting if auto else config.weighting,
            temperature=config.temperature or default.temperature,
        )
        warnings.warn(
            f"Classes {single} have one shot, so none can be held out: folds={self.scoring.folds} is ignored, the "
            f"weighting is {config.weighting!r}, the temperature {config.temperature}.",
            stacklevel=4,
        )
        return config

    def _weights(
        self, name: str, groups: dict[Label, list[ImageSource]], grid: Tensor, held_out: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """Weights [T] of a weighting by name."""
        weighting = timesteps.parse_weighting(name)
        abar, parameters = self.backbone.alphas_cumprod, weighting.parameters
        if weighting.name == "uniform":
            return timesteps.uniform(abar)
        if weighting.name == "window":
            return timesteps.window(abar, int(parameters[0]), int(parameters[1]))
        if weighting.name == "pdae":
            return timesteps.pdae(abar, *parameters)
        if weighting.name == "auto":
            assert held_out is not None, "ScoringConfig asks for folds"
            candidates = candidate_windows(self.backbone.num_train_timesteps)
            return timesteps.window(abar, *choose_window(*held_out, grid, candidates))
        some = _spread_over_classes(groups, self.scoring.calibration_images)
        latents = self._encode([x for _, x in some])
        if weighting.name == "spread":
            if held_out is not None:
                return timesteps.spread(held_out[0], grid, len(abar))
            scorer = self._ready()
            errors = error_tensor(scorer, latents, [image_id(x) for _, x in some], grid.tolist(), desc="weights")
            return timesteps.spread(errors, grid, len(abar))
        order = sorted(groups)
        truth = torch.tensor([order.index(label) for label, _ in some])
        if weighting.name == "tif":
            return timesteps.tif(abar, *(parameters or (timesteps.attribute_distance(latents, truth),)))
        return timesteps.tif_released(*(parameters or (timesteps.attribute_distance_released(latents, truth),)))

    def _held_out_errors(
        self, groups: dict[Label, list[ImageSource]], grid: Tensor, folds: int
    ) -> tuple[Tensor, Tensor]:
        """Errors [N, C, S] of shots under class tokens trained without them, and their classes [N].

        Every class has two shots or more. Costs one training of the bank on the other shots a fold (no more folds than
        the largest class has shots), and C x S evaluations a shot.
        """
        order = sorted(groups)
        folds = min(folds, max(len(shots) for shots in groups.values()))
        errors, truth = [], []
        for fold in range(folds):
            kept = {x: [s for i, s in enumerate(groups[x]) if i % folds != fold] for x in order}
            held = [(x, s) for x in order for i, s in enumerate(groups[x]) if i % folds == fold]
            bank, failed = self._train_bank(kept, f"fold {fold + 1} of {folds}")
            self._finish(failed)
            images = [s for _, s in held]
            scorer = self._make_scorer(bank)
            errors.append(error_tensor(scorer, self._encode(images), [image_id(s) for s in images], grid.tolist()))
            truth += [order.index(x) for x, _ in held]
        return torch.cat(errors), torch.tensor(truth)


def _group(images: Sequence[ImageSource], labels: Sequence[Label]) -> dict[Label, list[ImageSource]]:
    """Shots by label; a picture given twice under one label counts once."""
    values: list[Label] = [x.item() if isinstance(x, np.generic) else x for x in labels]
    if len(images) != len(values) or not values:
        raise ValueError(f"{len(images)} images but {len(values)} labels; pass one label an image.")
    types = {type(x) for x in values}
    if len(types) > 1 or not types <= {str, int, bool}:
        raise ValueError(f"Labels must be all str, all int or all bool, got {sorted(t.__name__ for t in types)}.")
    label_of: dict[str, Label] = {}
    groups: dict[Label, list[ImageSource]] = {}
    for image, label in zip(images, values, strict=True):
        i = image_id(image)
        if i not in label_of:
            groups.setdefault(label, []).append(image if isinstance(image, str | Path) else open_image(image))
        if label_of.setdefault(i, label) != label:
            raise ValueError(f"One picture (image id {i}) is given as {label_of[i]!r} and as {label!r}; keep one.")
    return groups


def _as_list(images: ImageSource | Sequence[ImageSource]) -> tuple[bool, list[ImageSource]]:
    """Whether one image was passed, and the images; arrays of paths and [N, H, W, 3] pixels are many."""
    pixels = isinstance(images, np.ndarray) and images.dtype.kind not in "OU" and images.ndim < 4
    if pixels or isinstance(images, str | Path | bytes | Image.Image):
        return True, [images]  # type: ignore[list-item]
    if not len(images):
        raise ValueError("No images were passed.")
    return False, list(images)


def _spread_over_classes(groups: dict[Label, list[ImageSource]], count: int) -> list[tuple[Label, ImageSource]]:
    """Up to `count` shots, one of every class, then the second of every class, and so on; always one of every class."""
    turns = [(i, x) for x in sorted(groups) for i in range(len(groups[x]))]
    chosen = sorted(turns, key=lambda turn: turn[0])[: max(count, len(groups))]
    return [(x, groups[x][i]) for i, x in chosen]


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
