"""From shots to class tokens, and to errors on shots that were held back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from accelerate.utils import gather_object
from torch import Tensor

from fewshot_diti.augment import colour_variants
from fewshot_diti.backbone import Backbone
from fewshot_diti.bank import Bank, ClassToken
from fewshot_diti.data.images import ImageGeometry, ImageSource, image_id
from fewshot_diti.features import VIEWS, block_features
from fewshot_diti.held_out import split_folds
from fewshot_diti.prior import prior_latents
from fewshot_diti.processes import process_state
from fewshot_diti.recommended import ScoringConfig, recommended_training
from fewshot_diti.scoring import Scorer, decide, error_tensor
from fewshot_diti.training import ClassShots, Label, TrainingConfig, check_can_train, train_class_tokens

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

    def shot_latents(self, groups: Groups) -> tuple[Tensor, Tensor]:
        """Latents of all shots [N, c, h, w] on the backbone's device, and their classes [N] in sorted order.

        Those that training encoded are taken from there.
        """
        config, order = self.config(groups), sorted(groups)
        latents = torch.cat([self.class_shots(x, groups[x], config).mean[:, 0] for x in order])
        labels = torch.arange(len(order)).repeat_interleave(torch.tensor([len(groups[x]) for x in order]))
        return latents.to(self.backbone.device), labels

    def features(self, latents_Nchw: Tensor) -> Tensor:
        """What the frozen U-Net holds of images, float32 [N, D], each by itself as in `encode`."""
        text = self.backbone.encode_text(self.backbone.tokenize([self.generic_prompt]))
        return torch.cat([block_features(self.backbone, x[None], text)[0] for x in latents_Nchw])

    def shot_features(self, groups: Groups) -> dict[Label, Tensor]:
        """`features` [n_c, V, D] of each class's shots and of copies in other colours, float16; none where the scoring
        does not ask for them."""
        if not self.scoring.asks_features:
            return {}
        config, found = self.config(groups), {}
        for label in sorted(groups):
            latents = self.class_shots(label, groups[label], config).mean[:, :VIEWS]
            features = self.features(latents.flatten(0, 1))
            found[label] = features.unflatten(0, latents.shape[:2]).half()
        return found

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
        check_can_train(self.backbone, config)  # before the dear work, as is the length of the prompts
        self.backbone.tokenize([*map(self.class_prompt, groups), self.generic_prompt])
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

        def errors(mine: Sequence[ImageSource]) -> Tensor:
            ids = [image_id(x) for x in mine]
            return error_tensor(self.scorer(bank), self.encode(mine), ids, grid.tolist(), desc="weights")

        return _share(images, errors, (len(bank), len(grid)))

    def shared_scores(
        self,
        bank: Bank,
        images: Sequence[ImageSource],
        grid: Tensor,
        weights: Tensor,
        offsets: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Scores [N, C] by the configured schedule with `weights` [S] and each image id's `offsets` [C]; shared as
        `shared_errors`."""
        stages = self.scoring.schedule(len(bank))

        def scores(mine: Sequence[ImageSource]) -> Tensor:
            ids = [image_id(x) for x in mine]
            added = torch.stack([offsets[i] for i in ids]) if offsets else None
            decisions = decide(self.scorer(bank), self.encode(mine), ids, grid.tolist(), weights, stages, added)
            return torch.stack([decision.scores for decision in decisions])

        return _share(images, scores, (len(bank),))

    def held_out(
        self, groups: Groups, folds: int, judge: Callable[[Bank, Sequence[ImageSource]], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """What `judge` says of every shot under class tokens trained without it, [N, ...], and the shots' classes [N].

        Every class has two shots or more. Costs one training of the bank on the other shots a fold (no more folds than
        the largest class has shots).

        Raises:
            TrainingError: a class's loss was not finite.
        """
        judged, truth = [], []
        parts = list(split_folds(groups, folds))
        for number, (kept, held) in enumerate(parts, start=1):
            bank, failed = self.train(kept, desc=f"fold {number} of {len(parts)}")
            raise_failed(
                failed, "that was in cross-validation, the class tokens are trained and kept", "or pass folds=0"
            )
            judged.append(judge(bank, [shot for _, shot in held]))
            truth += [c for c, _ in held]
        return torch.cat(judged), torch.tensor(truth)


def _share(
    images: Sequence[ImageSource], compute: Callable[[Sequence[ImageSource]], Tensor], shape: tuple[int, ...]
) -> Tensor:
    """What `compute` gives for each image, [N, *shape]; each process computes its share, all get the whole.

    Raises:
        ValueError: as `compute`, on all processes.
    """
    state = process_state()
    mine = images[state.process_index :: state.num_processes]
    try:
        found: Tensor | ValueError = compute(mine) if mine else torch.empty(0, *shape)
    except ValueError as error:  # the others wait for this process, and are told
        found = error
    parts = gather_object([found])
    for part in parts:
        if isinstance(part, ValueError):
            raise part
    whole = parts[0].new_empty(len(images), *shape)
    for rank, part in enumerate(parts):
        whole[rank :: len(parts)] = part
    return whole
