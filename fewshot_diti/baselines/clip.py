"""OpenCLIP: a frozen model as a source of features, and its zero-shot classifier."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors import SafetensorError
from scipy.special import softmax
from torch import Tensor

from fewshot_diti.backbone import POCKET, default_device
from fewshot_diti.baselines.base import Baseline, KeptFeatures
from fewshot_diti.baselines.views import seeded
from fewshot_diti.data.images import ImageSource
from fewshot_diti.files import shipped
from fewshot_diti.hashes import check_finite, hash_weights

VIT_H = "ViT-H-14/laion2b_s32b_b79k"  # what the published figures stand on


class OpenClip:
    """A frozen OpenCLIP model.

    Args:
        name: "pocket", the small one that ships; "local-dir:FOLDER", in open_clip's layout; "hf-hub:ORGANISATION/NAME";
            or an architecture and its weights, a tag or a file: "ViT-H-14/laion2b_s32b_b79k".

    Raises:
        ValueError: an architecture or weights that open_clip does not know, or a folder without weights.

    Attributes:
        image_features: images to unit vectors [N, D].
        logit_scale: what cosines are multiplied by, learned in pre-training.
    """

    def __init__(self, name: str = VIT_H, *, batch_size: int = 32) -> None:
        if name == POCKET:
            name = f"local-dir:{shipped('pocket-clip')}"
        whole = name.startswith(("local-dir:", "hf-hub:"))
        architecture, _, weights = (name, "", "") if whole else name.partition("/")
        folder = Path(name.removeprefix("local-dir:"))
        if not whole:
            _check_has_weights(architecture, weights)
        elif name.startswith("local-dir:") and not [*folder.glob("*.safetensors")]:
            raise ValueError(
                f"{folder} holds no weights as safetensors; other files of weights can be programs and are not read. "
                "Convert them."
            )
        self.name, self.device, self._batch_size = name, default_device(), batch_size
        with seeded(0):  # weights are drawn before they are loaded
            try:
                model, _, self._preprocess = open_clip.create_model_and_transforms(
                    architecture, pretrained=weights or None, device=self.device
                )
            except (UnpicklingError, SafetensorError, EOFError, KeyError, RuntimeError) as error:
                # a program among them, which torch does not run; a RuntimeError of a name: there is no such model
                if type(error) is RuntimeError and not name.startswith("local-dir:"):
                    raise
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                raise ValueError(f"{name} has weights that cannot be read; pass safetensors. ({reason})") from error
        check_finite(name, CLIP=model)
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = open_clip.get_tokenizer(architecture)
        self.logit_scale = float(self.model.logit_scale.exp())
        self.image_features = KeptFeatures(self.encode_images)

    @cached_property
    def hash(self) -> str:
        """Hash of the weights."""
        return hash_weights(self.model)

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Unit vectors [N, D] of PIL images, float32; nothing is kept."""
        batches = [images[i : i + self._batch_size] for i in range(0, len(images), self._batch_size)]
        features = [self.model.encode_image(self.pixels(b), normalize=True).float().cpu() for b in batches]
        return torch.cat(features).numpy()

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """What the image tower takes, [N, 3, height, width] on the model's device."""
        return torch.stack([self._preprocess(image) for image in images]).to(self.device)

    @torch.no_grad()
    def class_weights(self, class_names: Sequence[str], templates: Sequence[str]) -> np.ndarray:
        """Unit vectors [C, D], the mean over prompts of each class; `{}` in a template stands for the class."""
        weights: Tensor = open_clip.build_zero_shot_classifier(
            self.model, self.tokenizer, list(class_names), list(templates), device=self.device
        )
        return weights.T.float().cpu().numpy()


@lru_cache(maxsize=1)
def load_clip(name: str) -> OpenClip:
    """An `OpenClip`, the same one as long as no other is asked for: what reads one model shares it."""
    return OpenClip(name)


def _check_has_weights(architecture: str, weights: str) -> None:
    """Raises ValueError: open_clip would go on with random weights, or fail in its own words."""
    known = architecture in open_clip.list_models()
    if known and (open_clip.is_pretrained_cfg(architecture, weights) or Path(weights).is_file()):
        return
    tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none by name, so pass a file"
    raise ValueError(
        f"{architecture}/{weights} is no OpenCLIP model with weights; pass ARCHITECTURE/WEIGHTS such as {VIT_H}, "
        "hf-hub:ORGANISATION/NAME, local-dir:FOLDER or pocket. "
        + (f"Weights of {architecture}: {tags}." if known else f"No architecture is called {architecture!r}.")
    )


def prompt_templates(concept: str) -> tuple[str, ...]:
    """Prompts for things that are all one concept; CLIP's own for fine-grained data, and plainer ones."""
    return (
        f"a photo of a {{}}, a type of {concept}.",
        f"a photo of the {{}}, a type of {concept}.",
        "a photo of a {}.",
        "a picture of a {}.",
    )


class ZeroShotClip(Baseline):
    """CLIP's own classifier on prompts; of the shots it takes the names of the classes.

    Args:
        clip: the model.
        templates: prompts, averaged in feature space.
    """

    def __init__(self, clip: OpenClip, templates: Sequence[str]) -> None:
        self.clip, self.templates = clip, tuple(templates)

    def _fit(self, images: Sequence[ImageSource], labels_N: np.ndarray) -> None:
        self._weights_CD = self.clip.class_weights([str(x) for x in self.classes_], self.templates)

    def predict_proba(self, images: Sequence[ImageSource]) -> np.ndarray:
        """Probabilities [N, C]."""
        return softmax(self.clip.logit_scale * self.clip.image_features(images) @ self._weights_CD.T, axis=1)
