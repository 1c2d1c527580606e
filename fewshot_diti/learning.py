"""From shots to class tokens, and to errors on shots that were held back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from accelerate.utils import gather_object
from torch import Tensor

from fewshot_diti.augment import colour_variants
from fewshot_diti.backbone import Backbone
from fewshot_diti.bank import Bank, ClassToken
from fewshot_diti.data.images import ImageGeometry, ImageSource, image_id
from fewshot_diti.prior import prior_latents
from fewshot_diti.processes import process_state
from fewshot_diti.recommended import ScoringConfig, recommended_training
from fewshot_diti.scoring import Scorer, error_tensor
from fewshot_diti.training import ClassShots, Label, TrainingConfig, train_class_tokens

Groups: TypeAlias = Mapping[Label, Sequence[ImageSource]]  # the shots of each class


class TrainingError(RuntimeError):
    """Some class tokens could not be trained; the classifier holds the others."""


def raise_failed(
    failed: Mapping[Label, int],
    kept: str = "the other classes are trained and kept",
    way_out: str = "and add them again",
) -> None:
    """Raises a TrainingError that names the classes whose loss was not finite, with the step, where there are any."""
    if failed:
        names = ", ".join(f"{x!r} (step {s})" for x, s in failed.items())
        raise TrainingError(
            f"The loss of {names} was not finite; {kept}. Lower the learning rate, or load the backbone in float32, "
            f"{way_out}."
        )


@dataclass(frozen=True, kw_only=True)
class Learner:
    """All that turns shots into a bank.

    Attributes:
        prompt_template: prompt of a class token, `{}` standing for the class.
        generic_prompt: prompt of the prior images.
        training: None takes what the package recommends for the number of shots.
        encoded: latents of shots and their colour variants, kept so that folds do not encode them again.
    """

    backbone: Backbone
    geometry: ImageGeometry
    prompt_template: str
    generic_prompt: str
    training: TrainingConfig | None
    scoring: ScoringConfig
    encoded: dict[tuple[str, TrainingConfig], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def class_prompt(self, label: Label) -> str:
        """The prompt of a class token."""
        return self.prompt_template.replace("{}", str(label))

    def config(self, groups: Groups) -> TrainingConfig:
        """The settings that these shots are trained with."""
        most = max(len(shots) for shots in groups.values())
        return self.training or recommended_training(most, small=self.backbone.small)

    def encode(self, images: Sequence[ImageSource]) -> Tensor:
        """Latents [N, c, h, w], each image by itself, so that its neighbours cannot change it by a bit."""
        return torch.cat([self.backbone.encode_images(self.geometry.pixels(x)[None])[0] for x in images])

    def scorer(self, bank: Bank) -> Scorer:
        """The bank made ready to score."""
        return Scorer(self.backbone, bank, seed=self.scoring.seed, batch_size=self.scoring.batch_size)

    def class_shots(self, label: Label, images: Sequence[ImageSource], config: TrainingConfig) -> ClassShots:
        """The latents of one class's shots and of their colour variants, with the prompt."""
        pairs = [self._encode_variants(x, replace(config, steps=1)) for x in images]
        mean, std = (torch.stack(parts) for parts in zip(*pairs, strict=True))
        return ClassShots(label=label, prompt=self.class_prompt(label), mean=mean, std=std)

    def _encode_variants(self, image: ImageSource, config: TrainingConfig) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [K, c, h, w] of a shot's colour variants."""
        key = image_id(image), config
        if key not in self.encoded:
            copies = colour_variants(self.geometry.pixels(image), key[0], config)
            self.encoded[key] = self.backbone.encode_images(copies)
        return self.encoded[key]

    def train(self, groups: Groups, *, desc: str = "class tokens") -> tuple[Bank, dict[Label, int]]:
        """A bank of the groups' classes, sorted, without those whose loss was not finite; these with their step."""
        config = self.config(groups)
        prior = None
        if config.prior_weight > 0:
            latents = prior_latents(self.backbone, self.generic_prompt, config.prior_images, self.geometry.size)
            prior = self.generic_prompt, latents
        shots = [self.class_shots(label, groups[label], config) for label in sorted(groups)]
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

    def shared_errors(self, bank: Bank, images: Sequence[ImageSource], grid: Tensor) -> Tensor:
        """The error tensor [N, C, S] at time-steps `grid` [S]; the processes share the images, all get the whole."""
        state = process_state()
        mine = images[state.process_index :: state.num_processes]
        try:
            latents = self.encode(mine) if mine else torch.empty(0)
            ids = [image_id(x) for x in mine]
            found: Tensor | ValueError = error_tensor(self.scorer(bank), latents, ids, grid.tolist(), desc="weights")
        except ValueError as error:  # the others wait for this process, and are told
            found = error
        parts = gather_object([found])
        for part in parts:
            if isinstance(part, ValueError):
                raise part
        errors = torch.empty(len(images), *parts[0].shape[1:])
        for rank, part in enumerate(parts):
            errors[rank :: len(parts)] = part
        return errors

    def held_out_errors(self, groups: Groups, grid: Tensor, folds: int) -> tuple[Tensor, Tensor]:
        """Errors [N, C, S] of shots under class tokens trained without them, and their classes [N].

        Every class has two shots or more. Costs one training of the bank on the other shots a fold (no more folds than
        the largest class has shots), and C x S evaluations a shot.

        Args:
            grid: time-steps [S] of the trials.

        Raises:
            TrainingError: a class's loss was not finite.
        """
        order = sorted(groups)
        folds = min(folds, max(len(shots) for shots in groups.values()))
        errors, truth = [], []
        for fold in range(folds):
            kept = {x: [s for i, s in enumerate(groups[x]) if i % folds != fold] for x in order}
            held = [(x, s) for x in order for i, s in enumerate(groups[x]) if i % folds == fold]
            bank, failed = self.train(kept, desc=f"fold {fold + 1} of {folds}")
            raise_failed(
                failed, "that was in cross-validation, the class tokens are trained and kept", "or pass folds=0"
            )
            images = [s for _, s in held]
            errors.append(self.shared_errors(bank, images, grid))
            truth += [order.index(x) for x, _ in held]
        return torch.cat(errors), torch.tensor(truth)
