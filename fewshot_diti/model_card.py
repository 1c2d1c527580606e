"""The page that goes with a saved bank: what it holds, how it was made, how good it is, and what it cannot do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from fewshot_diti import plots
from fewshot_diti.bank_files import CARD, PICTURE
from fewshot_diti.config import Label
from fewshot_diti.hub import is_repo
from fewshot_diti.reports import drawn_name, printable, wilson_interval

if TYPE_CHECKING:
    from fewshot_diti.bank import Bank
    from fewshot_diti.classifier_files import Saved


Judged = Sequence[tuple[Label, Label]]  # the class of each held-out image, and the one that was predicted
PICTURED = 40  # classes, at most: more cannot be read


def model_pages(bank: Bank, saved: Saved | None = None) -> dict[str, bytes]:
    """The files by name that go with a bank for people to read: the card, and the picture in it where images were held
    out.

    Args:
        saved: of a whole classifier; None: class tokens alone.
    """
    judged = saved.calibration.held_out_labels if saved is not None else ()
    pages = {CARD: model_card(bank, saved).encode()}
    return pages | ({PICTURE: confusion_picture(judged)} if judged else {})


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
    folds = saved.calibration.folds or saved.settings.scoring.folds
    text = (
        f"{100 * accuracy:.1f} % of {shots} images [{interval}], cross-validated in {folds} folds: each image was "
        "judged by class tokens that were trained without it, on fewer images than those of this bank. That is on "
        "images like those it learned from, and of the classes at that time."
    )
    judged = saved.calibration.held_out_labels
    if not judged:
        return text
    picture = f"![Held-out images of each class, and the classes that they were predicted as]({PICTURE})"
    return "\n\n".join([text, *_changes(bank, judged), _by_class(judged), picture])


def _changes(bank: Bank, judged: Judged) -> list[str]:
    """A sentence on the classes that were added and removed since images were held out, where there are any."""
    then, now = {true for true, _ in judged}, set(bank.labels)
    parts = [
        f"{what} since then: {', '.join(_cell(x) for x in sorted(labels))}."
        for what, labels in (("Added", now - then), ("Removed", then - now))
        if labels
    ]
    return [" ".join(parts)] if parts else []


def _by_class(judged: Judged) -> str:
    """A row for each class: how many of its images were right, and what the others were predicted as."""
    lines = ["| class | right | 95 % interval | predicted as |", "|---|---:|---:|---|"]
    for label, counts in _counts(judged).items():
        right, total = counts[label], counts.total()
        low, high = wilson_interval(right, total)
        wrong = ", ".join(f"{_cell(x)} ({n})" for x, n in counts.most_common() if x != label)
        lines.append(f"| {_cell(label)} | {right} of {total} | {100 * low:.0f} to {100 * high:.0f} % | {wrong} |")
    return "\n".join(lines)


def _counts(judged: Judged) -> dict[Label, Counter[Label]]:
    """For each class, how often its images were predicted as which."""
    counts: dict[Label, Counter[Label]] = {true: Counter() for true in sorted({true for true, _ in judged})}
    for true, predicted in judged:
        counts[true][predicted] += 1
    return counts


def confusion_picture(judged: Judged) -> bytes:
    """PNG of how many held-out images of each class were predicted as which: right ones blue on the diagonal, wrong
    ones vermilion. Where there are more classes than can be read, those with the most mistakes."""
    by_class = _counts(judged)
    wrong = Counter({x: 0 for x in by_class})
    for true, predicted in judged:
        if true != predicted:
            wrong.update([true, predicted])
    shown = sorted(x for x, _ in wrong.most_common(PICTURED))
    counts = np.array([[by_class[row][column] for column in shown] for row in shown])
    shares = counts / np.array([[by_class[x].total()] for x in shown])
    diagonal = np.eye(len(shown), dtype=bool)
    names = [drawn_name(x) for x in shown]
    side = max(1.5, 0.32 * len(shown)) + 0.08 * max(map(len, names)) + 0.9  # inches, with the names and titles
    figure = Figure(figsize=(side, side), dpi=110, layout="constrained")
    axes = figure.subplots()
    for mask, colour in ((diagonal, plots.BLUE), (~diagonal, plots.VERMILION)):
        colours = LinearSegmentedColormap.from_list(colour, ["white", colour])
        axes.imshow(np.where(mask & (counts > 0), shares, np.nan), cmap=colours, vmin=0, vmax=1)
    for y, x in np.argwhere(counts):
        colour = "white" if shares[y, x] > 0.6 else plots.BLACK
        axes.text(x, y, str(counts[y, x]), ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(len(shown)), names, rotation=90, fontsize=8)
    axes.set_yticks(range(len(shown)), names, fontsize=8)
    axes.set(xlabel="predicted as", ylabel="class")
    few = f", the {len(shown)} of {len(wrong)} classes most often mistaken" if len(shown) < len(wrong) else ""
    figure.suptitle(f"held-out images{few}", fontsize=9, color=plots.GREY)
    axes.spines[:].set(color=plots.PALE)
    axes.tick_params(length=0)
    return plots.png(figure)


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
