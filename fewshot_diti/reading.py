"""What is read of images to decide them: latents, what witnesses read, and what they say; each once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fewshot_diti.encoding import Encoder, PreparedImage
from fewshot_diti.witnesses import FittedWitness

_KEPT = 32  # images: more than are decided together


class Reader:
    """Reads images, and keeps what it has read of the last 32, by their ids.

    Shapes: N images, c, h, w latents, C classes.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self._known: OrderedDict[str, dict[str, Tensor]] = OrderedDict()

    def latents(self, images: Sequence[PreparedImage]) -> Tensor:
        """Latents [N, c, h, w]."""
        return self._once("latents", images, self.encoder.latents)

    def read(self, fitted: FittedWitness, images: Sequence[PreparedImage]) -> Tensor:
        """What a witness reads of images [N, ...]."""
        return self._once(
            f"read by {fitted.name}",
            images,
            lambda new: fitted.check_read(fitted.witness.read(self.encoder, new, self.latents(new)), new),
        )

    def log_probabilities(self, fitted: FittedWitness, images: Sequence[PreparedImage]) -> Tensor:
        """Those of a witness [N, C]; raises ValueError as `FittedWitness.log_probabilities`."""
        return self._once(
            f"judged by {fitted.name}", images, lambda new: fitted.log_probabilities(self.read(fitted, new), new)
        )

    def _once(
        self, what: str, images: Sequence[PreparedImage], read: Callable[[list[PreparedImage]], Tensor]
    ) -> Tensor:
        of_image = {image.id: self._known.get(image.id, {}) for image in images}
        new = {image.id: image for image in images if what not in of_image[image.id]}
        if new:
            for image_id, found in zip(new, read(list(new.values())), strict=True):
                of_image[image_id] = self._known.setdefault(image_id, {})  # `read` may have put something there
                of_image[image_id][what] = found
        rows = torch.stack([of_image[image.id][what] for image in images])
        while len(self._known) > _KEPT:
            self._known.popitem(last=False)
        return rows
