"""The page that goes with a saved representation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fewshot_diti.hub import is_repo


def representation_card(config: Mapping[str, Any]) -> str:
    """Markdown with a head that the Hugging Face hub reads. No licence stands in it: that is for those who share it.

    Args:
        config: as the folder's config.json holds it.
    """
    method, history = config["method"], config["history"]
    head = ["---", "library_name: fewshot-diti", "pipeline_tag: image-feature-extraction"]
    if is_repo(config["backbone"]):
        head += [f"base_model: {config['backbone']}"]
    height, width = config["geometry"]["size"]
    settings = ", ".join(f"{k} {v}" for k, v in method.items() if k != "method")
    lines = [
        *head,
        "tags: [representation-learning, stable-diffusion]",
        "---",
        "",
        f"# Features of images, learned without labels by {method['method']}",
        "",
        "```python",
        "from fewshot_diti.representation import Representation",
        "",
        'representation = Representation.from_pretrained("this-folder")  # or user/repo',
        'features = representation.features(["image.jpg"])',
        "```",
        "",
        "## How it was made",
        "",
        f"- Backbone `{config['backbone']}`, hash `{config['backbone_hash']}`; it is not part of this folder.",
        f"- Settings of the method: {settings}.",
        f"- Images {width} x {height} pixels, the text that the U-Net reads: {config['prompt']!r}.",
        *(f"- {name}: {value}." for name, value in history.items()),
        "",
        "## Limits",
        "",
        "- Features describe images like those it was trained on.",
    ]
    return "\n".join(lines) + "\n"
