"""CLIP: what it makes of the classes' names alone, and with a cache of the shots.

Shapes in names: N images, n shots, V views of a shot, C classes, D values of a feature.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fewshot_diti.baselines.clip import VIT_H, load_clip, prompt_templates
from fewshot_diti.baselines.presets import preset_of
from fewshot_diti.baselines.tip_adapter import ALPHAS, BETAS, TipAdapter, cache_logits
from fewshot_diti.baselines.views import ColourJitter, as_it_is, random_view, seeded
from fewshot_diti.config import TrainingConfig
from fewshot_diti.data.images import as_picture
from fewshot_diti.encoding import Encoder, PreparedImage
from fewshot_diti.temperature import fit_temperature
from fewshot_diti.witnesses.base import Judge, ShotsRead, Witness, positions


class ZeroShotWitness(Witness):
    """CLIP's own classifier on prompts with the classes' names; the shots give its temperature alone.

    Args:
        model: as `OpenClip` takes it; "" for the one of the published figures.
        concept: what all classes are, as the prompts say it.
    """

    def __init__(self, model: str, concept: str) -> None:
        self.clip, self.templates = load_clip(model or VIT_H), prompt_templates(concept)

    @property
    def model(self) -> str:
        """Of model and prompts."""
        return f"{self.clip.hash}, {self.templates}"

    def read_shots(self, encoder: Encoder, shots: Sequence[PreparedImage], training: TrainingConfig) -> Tensor:
        """Unit vectors [n, 1, D]."""
        return self.read(encoder, shots, torch.empty(0))[:, None]

    def read(self, encoder: Encoder, images: Sequence[PreparedImage], latents_Nchw: Tensor) -> Tensor:
        """Unit vectors [N, D], of images in the bank's geometry."""
        return torch.from_numpy(self.clip.encode_images([as_picture(image.pixels_CHW) for image in images]))

    def learn(self, shots: ShotsRead, training: TrainingConfig) -> dict[str, Tensor]:
        """Of each class the mean of its prompts, times what makes the shots most likely, float64 [C, D]."""
        text_CD = torch.from_numpy(self.clip.class_weights([str(x) for x in shots], self.templates))
        text_CD = text_CD.double().contiguous()
        check_told_apart(list(map(str, shots)), text_CD)
        if len(shots) == 1:  # of a bank that grows: there is nothing to tell apart yet
            return {"text": text_CD}
        logits_nC = torch.cat([views[:, 0] for views in shots.values()]).double() @ text_CD.T
        return {"text": text_CD / fit_temperature(-logits_nC, torch.from_numpy(positions(shots)))}

    def judge(self, shots: ShotsRead, learned: Mapping[str, Tensor]) -> Judge:
        """As learned."""
        return _TextJudge(learned["text"])

    def select(self, learned: dict[str, Tensor], chosen: Sequence[int]) -> dict[str, Tensor]:
        """The prompts of these classes."""
        return {"text": learned["text"][list(chosen)]}


def check_told_apart(names: Sequence[str], text_CD: Tensor) -> None:
    """Raises a ValueError where two names are the same text to CLIP, whose tokenizer knows no capitals."""
    for row, text in enumerate(text_CD[:-1]):
        same = (text_CD[row + 1 :] == text).all(1).nonzero()
        if len(same):
            raise ValueError(
                f"CLIP reads {names[row]!r} and {names[row + 1 + int(same[0])]!r} as one text; rename one of the "
                "classes, or leave out witnesses that read names."
            )


class _TextJudge(NamedTuple):
    text_CD: Tensor

    def log_probabilities(self, features_ND: Tensor) -> Tensor:
        return (features_ND.double() @ self.text_CD.T).log_softmax(1)


class TipAdapterWitness(ZeroShotWitness):
    """Tip-Adapter (`baselines.tip_adapter.TipAdapter`), with the temperature that is most likely on each shot by the
    keys of the others; 1 where a class has one shot."""

    def __init__(self, model: str, concept: str) -> None:
        super().__init__(model, concept)
        self.settings = preset_of(self.clip.model).tip

    @property
    def described(self) -> str:
        """Of model, prompts and settings."""
        return f"{self.model}, {self.settings}, alpha of {ALPHAS}, beta of {BETAS}"

    def read_shots(self, encoder: Encoder, shots: Sequence[PreparedImage], training: TrainingConfig) -> Tensor:
        """Unit vectors [n, 1 + 2 V, D]: of the shot, of V crops, and of V crops in other colours."""
        rows = []
        with seeded(training.seed):
            for shot in shots:
                picture = as_picture(shot.pixels_CHW)
                ways = [as_it_is] * self.settings.views + [ColourJitter.of(training)] * self.settings.views
                crops = [random_view(picture, way) for way in ways]
                rows.append(torch.from_numpy(self.clip.encode_images([picture, *crops])))
        return torch.stack(rows)

    def learn(self, shots: ShotsRead, training: TrainingConfig) -> dict[str, Tensor]:
        """Keys of the shots [n, D], their weights and classes [n], prompts [C, D], alpha and beta, as log-probabilities
        need them. Keys are recoloured where every class has two shots (see `evaluation.class_tokens.tip_adapter`)."""
        labels_n = positions(shots)
        views_nVD, views = torch.cat(list(shots.values())).numpy(), self.settings.views
        crops = slice(1 + views, None) if np.bincount(labels_n).min() > 1 else slice(1, 1 + views)
        tip = TipAdapter(self.clip, self.templates, self.settings)
        tip.learn(views_nVD[:, 0], views_nVD[:, crops].swapaxes(0, 1), labels_n, [str(x) for x in shots])
        temperature = 1.0
        if tip.left_out is not None and len(shots) > 1:
            temperature = fit_temperature(-torch.from_numpy(tip.left_out), torch.from_numpy(labels_n))
        found = _TipJudge(
            text=torch.from_numpy(tip.text_CD).double().contiguous() * self.clip.logit_scale / temperature,
            keys=torch.from_numpy(tip.keys_ND).double(),
            weights=torch.from_numpy(tip.weights_N),
            classes=torch.from_numpy(labels_n),
            alpha=torch.tensor(tip.alpha_ / temperature, dtype=torch.float64),
            beta=torch.tensor(tip.beta_, dtype=torch.float64),
        )
        return found._asdict()

    def judge(self, shots: ShotsRead, learned: Mapping[str, Tensor]) -> Judge:
        """As learned."""
        return _TipJudge(**learned)

    def select(self, learned: dict[str, Tensor], chosen: Sequence[int]) -> dict[str, Tensor]:
        """The prompts and keys of these classes."""
        return _TipJudge(**learned).select(chosen)._asdict()


class _TipJudge(NamedTuple):
    text: Tensor
    keys: Tensor
    weights: Tensor
    classes: Tensor
    alpha: Tensor
    beta: Tensor

    def log_probabilities(self, features_ND: Tensor) -> Tensor:
        features = features_ND.double()
        values_nC = torch.eye(len(self.text), dtype=torch.float64)[self.classes] * self.weights[:, None]
        cache_NC = cache_logits(features.numpy(), self.keys.numpy(), values_nC.numpy(), self.beta.item())
        return (features @ self.text.T + self.alpha * torch.from_numpy(cache_NC)).log_softmax(1)

    def select(self, chosen: Sequence[int]) -> _TipJudge:
        """Of these classes, in this order."""
        old = self.classes.tolist()
        places = [(new, row) for new, c in enumerate(chosen) for row, x in enumerate(old) if x == c]
        rows = [row for _, row in places]
        return self._replace(
            text=self.text[list(chosen)],
            keys=self.keys[rows],
            weights=self.weights[rows],
            classes=torch.tensor([new for new, _ in places], dtype=torch.int64),
        )
