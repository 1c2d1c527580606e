"""CLIP-LoRA: low-rank updates of both towers' attention, trained on the shots (Zanella and Ben Ayed, CVPRW 2024)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from PIL import Image
from scipy.special import log_softmax, softmax
from sklearn.model_selection import StratifiedKFold
from torch import Tensor, nn

from fewshot_diti.baselines.base import Baseline
from fewshot_diti.baselines.clip import OpenClip
from fewshot_diti.baselines.views import random_crop
from fewshot_diti.data.images import ImageSource, open_image

STEPS_PER_SHOT = 500


class ClipLora(Baseline):
    """Both towers with LoRA on their attention's q, k and v, trained with cross-entropy over the classes' prompts.

    The published settings: rank 2, alpha 1, dropout 0.25, AdamW, learning rate 2e-4 falling by cosine, batches of 32,
    500 iterations a shot. peft's LoRA takes q, k and v as one matrix, and the output projection of
    `torch.nn.MultiheadAttention` with them.

    Args:
        clip: the model, which stays as it is.
        template: the one prompt of a class.
        candidates: numbers of iterations to choose from by two-fold cross-validation on the shots; none: as published.
            One shot a class takes the published number, or the largest candidate if that is smaller.
        seed: of crops, batches and dropout.

    Attributes:
        steps_: the number of iterations, after `fit`.
    """

    def __init__(
        self,
        clip: OpenClip,
        template: str,
        *,
        rank: int = 2,
        lr: float = 2e-4,
        batch_size: int = 32,
        candidates: Sequence[int] = (),
        seed: int = 0,
    ) -> None:
        self.clip, self.template = clip, template
        self.rank, self.lr, self.batch_size, self.seed = rank, lr, batch_size, seed
        self.candidates = tuple(candidates)

    def _fit(self, images: list[ImageSource], labels_N: np.ndarray) -> None:
        opened = [open_image(image) for image in images]
        fewest = int(np.bincount(labels_N).min())
        self.steps_ = STEPS_PER_SHOT * fewest
        if self.candidates:
            self.steps_ = min(self.steps_, max(self.candidates))
        if self.candidates and fewest > 1:
            self.steps_ = self._cross_validate(opened, labels_N)
        self._tower = self._train(opened, labels_N, self.steps_)

    def predict_proba(self, images: Sequence[ImageSource]) -> np.ndarray:
        """Probabilities [N, C]."""
        return softmax(self._logits(self._tower, [open_image(image) for image in images]), axis=1)

    def _cross_validate(self, images: list[Image.Image], labels_N: np.ndarray) -> int:
        """The candidate under which held-out shots are most likely; each is trained with a schedule of its own."""
        likelihood = dict.fromkeys(self.candidates, 0.0)
        folds = StratifiedKFold(2, shuffle=True, random_state=self.seed).split(images, labels_N)
        for train, held_out in folds:
            for steps in self.candidates:
                tower = self._train([images[i] for i in train], labels_N[train], steps)
                logits = self._logits(tower, [images[i] for i in held_out])
                likelihood[steps] += log_softmax(logits, axis=1)[range(len(held_out)), labels_N[held_out]].sum()
        return max(likelihood, key=lambda steps: likelihood[steps])

    def _train(self, images: list[Image.Image], labels_N: np.ndarray, steps: int) -> _Tower:
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            tower = _Tower(self.clip, [self.template.format(x) for x in self.classes_], self.rank)
            trained = [p for p in tower.model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=self.lr, weight_decay=1e-2)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=1e-6)
            labels = torch.from_numpy(labels_N)
            order = torch.empty(0, dtype=torch.long)
            for _ in range(steps):
                if not len(order):
                    order = torch.randperm(len(images))
                rows, order = order[: self.batch_size], order[self.batch_size :]
                logits = tower.logits(tower.pixels([random_crop(images[i]) for i in rows.tolist()]))
                loss = F.cross_entropy(logits, labels[rows].to(logits.device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        tower.model.eval()
        return tower

    @torch.no_grad()
    def _logits(self, tower: _Tower, images: list[Image.Image]) -> np.ndarray:
        batches = [images[i : i + self.batch_size] for i in range(0, len(images), self.batch_size)]
        return torch.cat([tower.logits(tower.pixels(batch)).cpu() for batch in batches]).numpy()


class _Tower:
    """A copy of a CLIP with LoRA on its attention, and the prompts of the classes; begins in training mode.

    Only dropout cares for the mode: batch normalisation keeps the statistics of pre-training.
    """

    def __init__(self, clip: OpenClip, prompts: list[str], rank: int) -> None:
        self._clip = clip
        model = copy.deepcopy(clip.model)
        attention = [
            name
            for name, module in model.named_modules()
            if name.endswith(".qkv") or isinstance(module, nn.MultiheadAttention)
        ]
        lora = LoraConfig(
            r=rank, lora_alpha=1, lora_dropout=0.25, target_modules=attention, init_lora_weights="gaussian"
        )
        self.model: Any = inject_adapter_in_model(lora, model)
        for module in self.model.modules():
            module.training = isinstance(module, nn.Dropout)
        self._prompts = clip.tokenizer(prompts).to(clip.device)

    def pixels(self, images: list[Image.Image]) -> Tensor:
        return self._clip.pixels(images)

    def logits(self, pixels_BCHW: Tensor) -> Tensor:
        """Logits [B, C], float32."""
        image = self.model.encode_image(pixels_BCHW, normalize=True).float()
        text = self.model.encode_text(self._prompts, normalize=True).float()
        return self.model.logit_scale.exp() * image @ text.T
