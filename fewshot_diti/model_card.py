"""The page that goes with a saved bank: what it holds, how it was made, how good it is, and what it cannot do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fewshot_diti.hub import is_repo
from fewshot_diti.reports import printable, wilson_interval

if TYPE_CHECKING:
    from fewshot_diti.bank import Bank
    from fewshot_diti.classifier_files import Saved


def model_card(bank: Bank, saved: Saved | None = None) -> str:
    """Markdown with a head that the Hugging Face hub reads. No licence stands in it: that is for those who share it.

    Args:
        saved: of a whole classifier; None: class tokens alone.
    """
    concept = saved.concept if saved is not None and saved.concept else "images"
    parts = [
        _head(bank),
        f"# {len(bank)} classes of {_cell(concept)}, from a few images each",
        "A few-shot classifier for the Python package fewshot-diti: for each class a prompt and a LoRA on the Stable "
        f"Diffusion `{_cell(bank.backbone_name)}` that restore its images from noise.",
        _use(saved),
        "## Classes",
        "| class | images learned from | prompt |\n|---|---:|---|\n"
        + "\n".join(f"| {_cell(t.label)} | {t.num_shots or 'unknown'} | {_cell(t.prompt)} |" for t in bank.tokens),
        "## How good it is",
        _accuracy(bank, saved),
        "## How it was made",
        _training(bank, saved),
        "## Limits",
        _limits(bank, saved),
    ]
    return "\n\n".join(parts) + "\n"


def _head(bank: Bank) -> str:
    lines = ["library_name: fewshot-diti", "pipeline_tag: image-classification"]
    if is_repo(bank.backbone_name):
        lines += [f"base_model: {bank.backbone_name}", "base_model_relation: adapter"]
    return "\n".join(["---", *lines, "tags: [few-shot, stable-diffusion, lora]", "---"])


def _use(saved: Saved | None) -> str:
    what = "DiTiClassifier" if saved is not None else "Bank"
    lines = [f"from fewshot_diti import {what}", "", f'loaded = {what}.from_pretrained("this-folder")  # or user/repo']
    if saved is not None:
        lines.append('print(loaded.predict("image.jpg"), loaded.predict_proba("image.jpg"))')
    return "\n".join(["```python", *lines, "```"])


def _accuracy(bank: Bank, saved: Saved | None) -> str:
    if saved is None:
        return "Not known: these are class tokens alone, without a temperature or weights of the trials."
    accuracy, shots = saved.calibration.accuracy, len(saved.calibration.held_out)
    if accuracy is None or not shots:
        return "Not known: it was not cross-validated. Test it on images of your own before you rely on it."
    low, high = wilson_interval(round(accuracy * shots), shots)
    interval = f"95 % interval {100 * low:.1f} to {100 * high:.1f}"
    return (
        f"{100 * accuracy:.1f} % of {shots} images [{interval}], cross-validated in {saved.settings.scoring.folds} "
        "folds: each image was judged by class tokens that were trained without it, on fewer images than those of this "
        "bank. That is on images like those it learned from, and of the classes at that time."
    )


def _training(bank: Bank, saved: Saved | None) -> str:
    height, width = bank.geometry.size
    lines = [
        f"- Backbone `{_cell(bank.backbone_name)}`, hash `{bank.backbone_hash}`; it is not part of this folder.",
        f"- Images {width} x {height} pixels ({bank.geometry.resize}).",
        f"- LoRA of rank {bank.layout.rank} on {len(bank.layout.targets)} linear layers.",
    ]
    if saved is not None:
        training, scoring, _ = saved.settings
        names = [f"{name} ({weight:g})" for name, weight in _witnesses(saved)]
        lines += [
            f"- {training.steps} steps of {training.shots_per_step} images for each class, learning rate "
            f"{training.lr_unet:g} (U-Net) and {training.lr_text_encoder:g} (text encoder), {training.lr_schedule}.",
            f"- Decides by {scoring.trials} trials at timesteps {scoring.timesteps[0]} to {scoring.timesteps[1]}, "
            f"weights `{scoring.weighting}`" + (f"; together with {', '.join(names)}" if names else "") + ".",
        ]
    return "\n".join(lines)


def _witnesses(saved: Saved) -> list[tuple[str, float]]:
    """Those that count, with their weight beside a nat of the class tokens."""
    calibration = saved.calibration
    if not calibration.witness_weights:
        return []
    pairs = zip(saved.settings.scoring.witnesses, calibration.witness_weights, strict=True)
    return [(name, weight / calibration.token_temperature) for name, weight in pairs if weight]


def _limits(bank: Bank, saved: Saved | None) -> str:
    lines = [
        "- Every image gets one of these classes, also a picture of something else.",
        "- What the images of a class share by chance, such as a background, may have been learned as part of it.",
    ]
    if bank.backbone_name == "pocket":
        lines.append("- The backbone `pocket` knows rendered airliners seen from the side, and nothing else.")
    if saved is not None and any(name.partition(":")[0] == "network" for name in saved.settings.scoring.witnesses):
        lines.append("- **This folder holds the images that it learned from**, in the size that the network reads.")
    elif saved is not None and saved.settings.scoring.witnesses:
        lines.append("- This folder holds features of the images that it learned from.")
    return "\n".join(lines)


def _cell(value: object) -> str:
    """A text as a cell of a table takes it."""
    return printable(str(value)).replace("|", "\\|")
