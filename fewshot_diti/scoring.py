"""Errors of class tokens on images: the tensor [images, classes, trials] that every decision is made from.

No function here takes a label of an image: the scorer cannot know it.

Shapes: N images, C classes, S trials; P pairs of image and class, or parameters of one class; G groups of a batch, each
E trials of one pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fewshot_diti.backbone import Backbone
from fewshot_diti.bank import Bank
from fewshot_diti.elimination import Decision, NotFiniteError, Stage, eliminate
from fewshot_diti.lora import Layout, adapted
from fewshot_diti.memory import halved
from fewshot_diti.progress import Progress
from fewshot_diti.racing import Look
from fewshot_diti.trials import trial_noise

_IN_FLIGHT = 16
_STACKED_AT_ONCE = 8  # classes
_COMPILED_TRIALS = 2  # of a group; the looks of a race have a multiple, but for the last where S is odd


class Scorer:
    """A bank made ready to score: adapters in the backbone's dtype and text embeddings, once for each class.

    Args:
        backbone: the one that the bank was trained on.
        bank: C class tokens.
        seed: of the noise, together with image id and trial number.
        batch_size: evaluations in one forward; never changes a result beyond rounding. Halved where memory runs out.

    Raises:
        ValueError: the bank belongs to another backbone.
    """

    def __init__(self, backbone: Backbone, bank: Bank, *, seed: int = 0, batch_size: int = 96) -> None:
        bank.check_backbone(backbone)
        self.backbone, self.bank, self.seed, self.batch_size = backbone, bank, seed, batch_size
        self._at_once = batch_size  # what memory has been found to hold
        self._full_GP: Tensor | None = None
        self.layout, self.rows_CP, self.text_CLD = self._stack()

    @torch.no_grad()
    def _stack(self) -> tuple[Layout, Tensor, Tensor]:
        """The U-Net's adapters and the text embeddings of all classes; few classes at a time, since the float32 weights
        of many, and their copies on the way, take more memory than everything else."""
        backbone, bank, texts = self.backbone, self.bank, []
        layout, _ = bank.layout.of_network("unet", bank.rows[:0])
        rows_CP = torch.empty(len(bank), layout.num_parameters, dtype=backbone.dtype, device=backbone.device)
        for start in range(0, len(bank), _STACKED_AT_ONCE):
            some = slice(start, start + _STACKED_AT_ONCE)
            few = replace(bank, tokens=bank.tokens[some], rows=bank.rows[some])
            rows = few.scaled_rows().to(backbone.device, backbone.dtype)
            _, rows_CP[some] = bank.layout.of_network("unet", rows)
            with adapted(backbone, *bank.layout.of_network("text_encoder", rows)):
                texts.append(backbone.encode_text(backbone.tokenize([token.prompt for token in few.tokens])))
        return layout, rows_CP, torch.cat(texts)

    def errors(
        self, latents: Tensor, image_id: str, classes: Sequence[int], trials: Sequence[int], timesteps: Sequence[int]
    ) -> Tensor:
        """Errors [len(classes), len(trials)] of one image with latents [c, h, w]; otherwise as `pair_errors`."""
        pairs = torch.tensor([(0, c) for c in classes])
        return self.pair_errors(latents[None], [image_id], pairs, trials, timesteps)

    @torch.no_grad()
    def pair_errors(
        self,
        latents_Nchw: Tensor,
        image_ids: Sequence[str],
        pairs_P2: Tensor,
        trials: Sequence[int],
        timesteps: Sequence[int],
    ) -> Tensor:
        """Errors [P, trials] of pairs of image and class, fp32 on the CPU; a batch mixes images and classes.

        Args:
            latents_Nchw: means of the VAE's posterior, scaled.
            pairs_P2: int64; positions of an image in `latents_Nchw` and of a class in the bank.
            trials: trial numbers; with seed and image id they fix the noise.
            timesteps: of each trial.

        Raises:
            NotFiniteError: an error is not finite, naming the class.
        """
        shape, count = tuple(latents_Nchw.shape[1:]), len(trials)
        compiled = self.backbone.compiled_unet is not None and count % _COMPILED_TRIALS == 0
        each = _COMPILED_TRIALS if compiled else count  # trials of a group
        groups_P2 = pairs_P2.repeat_interleave(count // each, 0)
        trials_PE = torch.arange(count).view(-1, each).repeat(len(pairs_P2), 1)
        times_S, out_PE = torch.as_tensor(timesteps), torch.empty(len(groups_P2), each)
        noise: dict[int, Tensor] = {}  # of the images in the batch
        done = 0
        while done < len(groups_P2):
            together = min(each, self._at_once)
            now = slice(done, done + max(1, self._at_once // together))
            images = groups_P2[now, 0].tolist()
            noise = {
                n: noise[n] if n in noise else trial_noise(self.seed, image_ids[n], trials, shape) for n in set(images)
            }
            try:
                for part in torch.arange(each).split(together):
                    which_GE = trials_PE[now][:, part]
                    noise_GE = torch.stack([noise[n][which] for n, which in zip(images, which_GE, strict=True)])
                    out_PE[now, part] = self._batch_errors(latents_Nchw, groups_P2[now], noise_GE, times_S[which_GE])
            except RuntimeError as error:
                self._at_once = halved(self._at_once, error)
                continue
            done += len(images)
        out_PS = out_PE.view(len(pairs_P2), count)
        broken = (~out_PS.isfinite().all(1)).nonzero()
        if len(broken):
            image, label = pairs_P2[int(broken[0])].tolist()
            raise NotFiniteError(
                f"Class token {self.bank.tokens[label].label!r} gives an error that is not a finite number on image "
                f"{image_ids[image]}; train it again, remove it from the bank, or score in float32."
            )
        return out_PS

    @torch.no_grad()
    def error_maps(
        self, latents: Tensor, image_id: str, classes: Sequence[int], trials: Sequence[int], timesteps: Sequence[int]
    ) -> Tensor:
        """Errors by latent position [len(classes), len(trials), h, w] of one image; otherwise as `errors`."""
        noise_Schw, times_S = trial_noise(self.seed, image_id, trials, tuple(latents.shape)), torch.tensor(timesteps)
        device, maps = self.backbone.device, []
        for c in classes:
            parts = []
            for some in torch.arange(len(trials)).split(self._at_once):
                with adapted(self.backbone, self.layout, self.rows_CP[c : c + 1]):
                    found = self.backbone.error_maps(
                        latents.to(device).expand(len(some), -1, -1, -1),
                        noise_Schw[some].to(device),
                        times_S[some].to(device),
                        self.text_CLD[c].expand(len(some), -1, -1),
                    )
                parts.append(found.float().cpu())
            maps.append(torch.cat(parts))
        return torch.stack(maps)

    def _batch_errors(self, latents_Nchw: Tensor, pairs_G2: Tensor, noise_GE: Tensor, timesteps_GE: Tensor) -> Tensor:
        """Errors [G, E] in one forward; noise is [G, E, c, h, w]."""
        device = self.backbone.device
        images, classes = pairs_G2.T
        index, each = classes.to(device), noise_GE.shape[1]
        full_batch = each == _COMPILED_TRIALS and len(index) == self._at_once // each
        compiled = self.backbone.compiled_unet if full_batch else None
        with self.backbone.lock:  # other threads use the memory at that address too
            rows_GP = self.rows_CP[index] if compiled is None else self._at_one_address(index)
            with adapted(self.backbone, self.layout, rows_GP):
                errors = self.backbone.errors(
                    latents_Nchw[images].to(device).repeat_interleave(each, 0),
                    noise_GE.flatten(0, 1).to(device),
                    timesteps_GE.flatten().to(device),
                    self.text_CLD[index].repeat_interleave(each, 0),
                    unet=compiled,
                )
        return errors.view(-1, each).float().cpu()

    @torch.inference_mode(False)  # memory that is made under inference mode cannot be written to outside
    def _at_one_address(self, index_G: Tensor) -> Tensor:
        """The adapters of a full batch's classes, where CUDA graphs were recorded to look for them."""
        if self._full_GP is None or len(self._full_GP) != len(index_G):
            self._full_GP = self.rows_CP.new_empty(len(index_G), self.rows_CP.shape[1])
        return torch.index_select(self.rows_CP, 0, index_G, out=self._full_GP)


def error_tensor(
    scorer: Scorer, latents_Nchw: Tensor, image_ids: Sequence[str], timesteps_S: Sequence[int], *, desc: str = "scoring"
) -> Tensor:
    """Errors [N, C, S] of every class token on every image: the exhaustive schedule.

    Trial number s is at timestep `timesteps_S[s]`. A progress bar shows on the main process's terminal.

    Raises:
        ValueError: as `Scorer.errors`.
    """
    classes, trials = range(len(scorer.bank.tokens)), range(len(timesteps_S))
    rows = []
    with Progress(len(latents_Nchw) if len(latents_Nchw) > 1 else 0, desc, "image") as bar:
        for latents, image_id in zip(latents_Nchw, image_ids, strict=True):
            rows.append(scorer.errors(latents, image_id, classes, trials, timesteps_S))
            bar.update()
    return torch.stack(rows) if rows else torch.empty(0, len(classes), len(trials))


def in_flight(stages: Sequence[Stage | Look]) -> int:
    """Images that go through a schedule together: several in a race, whose later rounds one image cannot fill.

    Under other schedules one image fills the batches, and its errors are the same to the bit whatever follows it.
    """
    return _IN_FLIGHT if isinstance(stages[0], Look) else 1


def decide(
    scorer: Scorer,
    latents_Nchw: Tensor,
    image_ids: Sequence[str],
    timesteps_S: Sequence[int],
    weights_S: Tensor,
    stages: Sequence[Stage | Look],
    offsets_NC: Tensor | None = None,
    *,
    desc: str = "scoring",
) -> list[Decision]:
    """Winner and scores of every image, by a schedule; what is still in of several images shares the batches.

    Trial number s is at timestep `timesteps_S[s]` and weighs `weights_S[s]`, whatever the schedule; `offsets_NC` as of
    `eliminate`. A progress bar shows on the main process's terminal.

    Raises:
        ValueError: as `Scorer.pair_errors` and `eliminate`.
    """
    together = in_flight(stages)
    decisions: list[Decision] = []
    with Progress(len(latents_Nchw) if len(latents_Nchw) > together else 0, desc, "image") as bar:
        for start in range(0, len(latents_Nchw), together):
            latents, ids = latents_Nchw[start : start + together], image_ids[start : start + together]

            def errors(pairs: Tensor, positions: Tensor, latents: Tensor = latents, ids: Sequence[str] = ids) -> Tensor:
                trials = positions.tolist()
                return scorer.pair_errors(latents, ids, pairs, trials, [timesteps_S[s] for s in trials])

            offsets = None if offsets_NC is None else offsets_NC[start : start + together]
            decisions += eliminate(errors, len(latents), len(scorer.bank), stages, weights_S, offsets)
            bar.update(len(latents))
    return decisions
