"""CLIP-LoRA: low-rank updates of both towers' attention, trained on the shots (Zanella and Ben Ayed, CVPRW 2024)."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.special import log_softmax, softmax
from sklearn.model_selection import StratifiedKFold
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fewshot_diti.baselines.base import Baseline, opened
from fewshot_diti.baselines.clip import OpenClip
from fewshot_diti.baselines.views import Recolour, as_it_is, random_view, seeded
from fewshot_diti.data.images import ImageSource, open_image
from fewshot_diti.lora import gradients_on
from fewshot_diti.progress import Progress


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Of CLIP-LoRA; by default the published ones.

    Attributes:
        rank, lr, batch_size: of the updates and their training.
        candidates: numbers of steps to choose from by two-fold cross-validation on the shots; none: as published. One
            shot per class takes `steps_per_shot`, or the largest candidate if that is smaller.
        steps_per_shot: steps for each shot of a class, where there are no candidates.
        views: of each shot, made once, for a batch to draw from; None: a new view at every step. What the image tower
            makes of them below its first update is then computed once too.
    """

    rank: int = 2
    lr: float = 2e-4
    batch_size: int = 32
    candidates: tuple[int, ...] = ()
    steps_per_shot: int = 500
    views: int | None = None


class ClipLora(Baseline):
    """Both towers with a low-rank update of each attention's q, k and v, trained with cross-entropy over prompts.

    As published: scale 1 / sqrt(rank), AdamW, a learning rate that falls by cosine. Without the published dropout of
    0.25, since the update is added to the weights; not by peft, whose LoRA of `torch.nn.MultiheadAttention` takes q, k
    and v as one matrix, and the output projection with them.

    Args:
        clip: the model, which stays as it is.
        template: the one prompt of a class.
        settings: of the training.
        recolour: colours of a view; a batch takes a random crop of a shot.
        seed: of crops and batches.

    Attributes:
        steps_: the number of steps, after `fit`.
    """

    def __init__(
        self,
        clip: OpenClip,
        template: str,
        settings: LoraSettings = LoraSettings(),
        *,
        recolour: Recolour = as_it_is,
        seed: int = 0,
    ) -> None:
        self.clip, self.template, self.settings, self.recolour, self.seed = clip, template, settings, recolour, seed

    def _fit(self, images: Sequence[ImageSource], labels_N: np.ndarray) -> None:
        settings, fewest = self.settings, int(np.bincount(labels_N).min())
        kept = None if settings.views is None else self._views(images, settings.views)
        self.steps_ = settings.steps_per_shot * fewest
        if settings.candidates:
            self.steps_ = min(self.steps_, max(settings.candidates))
        if settings.candidates and fewest > 1:
            self.steps_ = self._cross_validate(images, labels_N, kept)
        self._towers = self._train(images, labels_N, np.arange(len(images)), self.steps_, kept)

    def predict_proba(self, images: Sequence[ImageSource]) -> np.ndarray:
        """Probabilities [N, C]."""
        return softmax(self._logits(self._towers, images), axis=1)

    def _cross_validate(self, images: Sequence[ImageSource], labels_N: np.ndarray, kept: Tensor | None) -> int:
        """The candidate under which most held-out shots get their class, then the likeliest; each has a schedule of its
        own."""
        candidates = self.settings.candidates
        right, likelihood = dict.fromkeys(candidates, 0), dict.fromkeys(candidates, 0.0)
        folds = StratifiedKFold(2, shuffle=True, random_state=self.seed).split(labels_N, labels_N)
        for train, held_out in folds:
            for steps in candidates:
                towers = self._train(images, labels_N, train, steps, kept)
                logits = self._logits(towers, images, held_out)
                right[steps] += int((logits.argmax(1) == labels_N[held_out]).sum())
                likelihood[steps] += log_softmax(logits, axis=1)[range(len(held_out)), labels_N[held_out]].sum()
        return max(candidates, key=lambda steps: (right[steps], likelihood[steps]))

    def _new_towers(self) -> _Towers:
        return _Towers(self.clip, [self.template.format(x) for x in self.classes_], self.settings.rank)

    @gradients_on()
    def _train(
        self, images: Sequence[ImageSource], labels_N: np.ndarray, train_n: np.ndarray, steps: int, kept: Tensor | None
    ) -> _Towers:
        """Trains on the images at the positions `train_n`."""
        with seeded(self.seed), Progress(steps, "clip-lora", "step") as bar:
            towers = self._new_towers()
            optimizer = torch.optim.AdamW(towers.updates.parameters(), lr=self.settings.lr, weight_decay=1e-2)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps), eta_min=1e-6)
            labels, train = torch.from_numpy(labels_N), torch.from_numpy(train_n)
            order = torch.empty(0, dtype=torch.long)
            for _ in range(steps):
                if not len(order):
                    order = train[torch.randperm(len(train))]
                rows, order = order.tensor_split([self.settings.batch_size])
                if kept is None:
                    lower = towers.lower([random_view(open_image(images[i]), self.recolour) for i in rows.tolist()])
                else:
                    lower = kept[rows, torch.randint(kept.shape[1], (len(rows),))]
                logits = towers.logits(lower)
                loss = F.cross_entropy(logits, labels[rows].to(logits.device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
        return towers

    def _views(self, images: Sequence[ImageSource], count: int) -> Tensor:
        """What `_Towers.lower`, the same before and after training, makes of each image's views [N, count, ...]."""
        with seeded(self.seed):
            towers = self._new_towers()
            shots = map(open_image, images)
            return torch.stack([towers.lower([random_view(x, self.recolour) for _ in range(count)]) for x in shots])

    @torch.no_grad()
    def _logits(self, towers: _Towers, images: Sequence[ImageSource], rows: np.ndarray | None = None) -> np.ndarray:
        batches = opened(images, self.settings.batch_size, rows)
        return torch.cat([towers.logits(towers.lower(batch)).cpu() for batch in batches]).numpy()


class _Update(nn.Module):
    """Low-rank updates of the q, k and v rows of one stacked weight [3 d, d]; zero at first."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        rows, width = weight.shape
        self.down = nn.Parameter(torch.empty(3, rank, width, device=weight.device))
        self.up = nn.Parameter(torch.zeros(3, rows // 3, rank, device=weight.device))
        for part in self.down:
            nn.init.kaiming_uniform_(part, a=math.sqrt(5))
        self.scale = 1 / math.sqrt(rank)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * (self.up @ self.down).flatten(0, 1).to(weight)


class _Towers:
    """A copy of a CLIP with updates on its attention, and the prompts of the classes."""

    def __init__(self, clip: OpenClip, prompts: list[str], rank: int) -> None:
        self._clip = clip
        self._model = copy.deepcopy(clip.model)  # in evaluation mode: batch normalisation keeps its statistics
        self.updates = nn.ModuleList()
        of_images = []
        for name, module in list(self._model.named_modules()):
            attention = isinstance(module, nn.MultiheadAttention)
            if attention or name.endswith(".qkv"):
                weight = "in_proj_weight" if attention else "weight"
                update = _Update(getattr(module, weight), rank)
                parametrize.register_parametrization(module, weight, update)
                self.updates.append(update)
                of_images += [name] if name.startswith("visual.") else []
        self._prompts = clip.tokenizer(prompts).to(clip.device)
        self._pooled = bool(of_images) and all(name.startswith("visual.head.") for name in of_images)

    @torch.no_grad()
    def lower(self, images: Sequence[Image.Image]) -> Tensor:
        """What the image tower makes of B images below its first update [B, ...]: maps where that is the attention
        pooling on one of timm's networks, else the pixels."""
        pixels = self._clip.pixels(images)
        maps: Tensor = self._model.visual.trunk(pixels) if self._pooled else pixels
        return maps

    def logits(self, lower: Tensor) -> Tensor:
        """Logits [B, C], float32, from what `lower` gave."""
        visual = self._model.visual
        image = visual.head(lower) if self._pooled else visual(lower)
        image = F.normalize(image, dim=-1).float()
        text = self._model.encode_text(self._prompts, normalize=True).float()
        return self._model.logit_scale.exp() * image @ text.T
