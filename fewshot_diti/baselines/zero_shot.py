"""The diffusion classifier without class tokens (Li et al., ICCV 2023): the same scoring, prompts alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fewshot_diti.backbone import Backbone
from fewshot_diti.bank import Bank, ClassToken
from fewshot_diti.data.images import ImageGeometry
from fewshot_diti.lora import Layout, find_targets
from fewshot_diti.prompts import with_article


def zero_shot_bank(backbone: Backbone, class_names: Sequence[str], geometry: ImageGeometry, concept: str) -> Bank:
    """Class tokens that are a prompt and nothing else: their LoRA is zero."""
    layout = Layout(find_targets(backbone.unet, backbone.text_encoder, "narrow"), rank=1)
    tokens = [
        ClassToken(label=name, prompt=f"a photo of {with_article(name)}, a type of {concept}.", num_shots=0)
        for name in class_names
    ]
    return Bank(
        tokens=tuple(tokens),
        layout=layout,
        rows=torch.zeros(len(tokens), layout.num_parameters),
        backbone_name=backbone.name,
        backbone_hash=backbone.hash,
        geometry=geometry,
    )
