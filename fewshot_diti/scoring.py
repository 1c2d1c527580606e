"""Errors of class tokens on images: the tensor [images, classes, trials] that every decision is made from.

No function here takes a label of an image: the scorer cannot know it.

Shapes: N images, C classes, S trials, G classes in one batch, m trials of each, P parameters of one class.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from fewshot_diti.backbone import Backbone
from fewshot_diti.bank import Bank
from fewshot_diti.lora import adapted
from fewshot_diti.processes import process_state
from fewshot_diti.trials import trial_noise


class Scorer:
    """A bank made ready to score: adapters in the backbone's dtype and text embeddings, once for each class.

    Args:
        backbone: the one that the bank was trained on.
        bank: C class tokens.
        seed: of the noise, together with image id and trial number.
        batch_size: evaluations in one forward; never changes a result beyond rounding.

    Raises:
        ValueError: the bank belongs to another backbone.
    """

    def __init__(self, backbone: Backbone, bank: Bank, *, seed: int = 0, batch_size: int = 96) -> None:
        bank.check_backbone(backbone)
        self.backbone, self.bank, self.seed, self.batch_size = backbone, bank, seed, batch_size
        self.rows_CP = bank.scaled_rows().to(backbone.device, backbone.dtype)
        self.text_CLD = self._encode_text()

    @torch.no_grad()
    def _encode_text(self) -> Tensor:
        prompts = [token.prompt for token in self.bank.tokens]
        chunks = []
        for i in range(0, len(prompts), self.batch_size):
            with adapted(
                self.backbone.networks, self.bank.layout, self.rows_CP[i : i + self.batch_size], ("text_encoder",)
            ):
                chunks.append(self.backbone.encode_text(self.backbone.tokenize(prompts[i : i + self.batch_size])))
        return torch.cat(chunks)

    @torch.no_grad()
    def errors(
        self, latents: Tensor, image_id: str, classes: Sequence[int], trials: Sequence[int], timesteps: Sequence[int]
    ) -> Tensor:
        """Errors [len(classes), len(trials)] of one image, fp32 on the CPU.

        Args:
            latents: [c, h, w], the mean of the VAE's posterior, scaled.
            trials: trial numbers; with seed and image id they fix the noise.
            timesteps: of each trial.

        Raises:
            ValueError: an error is not finite, naming the class.
        """
        device = self.backbone.device
        noise = trial_noise(self.seed, image_id, trials, tuple(latents.shape)).to(device)
        x0 = latents.to(device).expand(len(trials), *latents.shape)
        t = torch.as_tensor(timesteps, device=device)
        m = min(len(trials), self.batch_size)
        width = max(1, self.batch_size // m)
        out = torch.empty(len(classes), len(trials))
        for i in range(0, len(classes), width):
            index = torch.as_tensor(classes[i : i + width], device=device)
            groups = len(index)
            with adapted(self.backbone.networks, self.bank.layout, self.rows_CP[index], ("unet",)):
                for j in range(0, len(trials), m):
                    part = slice(j, j + m)
                    each = len(t[part])
                    e = self.backbone.errors(
                        x0[part].repeat(groups, 1, 1, 1),
                        noise[part].repeat(groups, 1, 1, 1),
                        t[part].repeat(groups),
                        self.text_CLD[index].repeat_interleave(each, 0),
                    )
                    out[i : i + groups, part] = e.view(groups, each).float().cpu()
        broken = ~out.isfinite().all(1)
        if broken.any():
            label = self.bank.tokens[classes[int(broken.nonzero()[0])]].label
            raise ValueError(
                f"Class token {label!r} gives an error that is not a finite number on image {image_id}; train it "
                "again, remove it from the bank, or score in float32."
            )
        return out


def error_tensor(
    scorer: Scorer, latents_Nchw: Tensor, image_ids: Sequence[str], timesteps_S: Sequence[int], *, desc: str = "scoring"
) -> Tensor:
    """Errors [N, C, S] of every class token on every image: the exhaustive schedule.

    Trial number s is at time-step `timesteps_S[s]`. A progress bar shows on the main process's terminal.

    Raises:
        ValueError: as `Scorer.errors`.
    """
    classes, trials = range(len(scorer.bank.tokens)), range(len(timesteps_S))
    rows = []
    disable = None if process_state().is_main_process and len(latents_Nchw) > 1 else True
    for latents, image_id in zip(tqdm(latents_Nchw, desc=desc, unit="image", disable=disable), image_ids, strict=True):
        rows.append(scorer.errors(latents, image_id, classes, trials, timesteps_S))
    return torch.stack(rows) if rows else torch.empty(0, len(classes), len(trials))
