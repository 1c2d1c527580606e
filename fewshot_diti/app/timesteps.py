"""The tab Timesteps: which timesteps are compared decides what the class tokens see.

The error tensor of some bundled test images is computed once and kept; a window of timesteps then takes milliseconds.

Shapes in names: N images, C classes, S trials, P noised pictures.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fewshot_diti.app import markup
from fewshot_diti.app.banks import ServedBank
from fewshot_diti.app.events import QUEUED, QUICK, Context, Report, report_to
from fewshot_diti.backbone import Backbone
from fewshot_diti.classifier import DiTiClassifier
from fewshot_diti.config import Label
from fewshot_diti.data import ImageSet, load_bundled
from fewshot_diti.data.images import as_picture
from fewshot_diti.evaluation.kept_errors import save_errors
from fewshot_diti.evaluation.task import fingerprint
from fewshot_diti.kept_tensors import kept_tensors
from fewshot_diti.progress import reported_to
from fewshot_diti.scoring import error_tensor
from fewshot_diti.timesteps import weighted_mean
from fewshot_diti.trials import even_grid, trial_noise

PER_CLASS = 3  # test images
TRIALS = 25  # of each image and class, over all timesteps; the sliders have as many places
_AROUND = 2  # trials on each side of one that its point of the curve is the mean of
_WIDE = 16  # units of the curve's picture between two trials
_THUMBNAIL = (96, 48)
_FILE = "timesteps.safetensors"


@dataclass(frozen=True, kw_only=True, eq=False)
class Kept:
    """What the tab works with.

    Attributes:
        errors_NCS: of every class token on every image; trials are spread evenly over the timesteps.
        pixels_NCHW: uint8, the images.
        noised_PCHW: uint8, the first image as the U-Net is given it, at TRIALS + 1 timesteps from none to the last.
        truth_N: true classes, positions in `classes`.
        classes: of the bank.
        num_timesteps: of the backbone.
    """

    errors_NCS: Tensor
    pixels_NCHW: Tensor
    noised_PCHW: Tensor
    truth_N: np.ndarray
    classes: tuple[Label, ...]
    num_timesteps: int

    def predicted(self, low: int, high: int) -> np.ndarray:
        """Positions of the classes [N] that the class tokens choose by the trials from place `low` to before `high`."""
        inside_S = (torch.arange(TRIALS) >= low) & (torch.arange(TRIALS) < high)
        return weighted_mean(self.errors_NCS, inside_S.double()).argmin(1).numpy()

    def accuracy(self, low: int, high: int) -> float:
        """Their share of right ones, 0 to 1."""
        return float((self.predicted(low, high) == self.truth_N).mean())

    @cached_property
    def curve(self) -> list[float]:
        """Accuracy around each trial [S]."""
        return [self.accuracy(max(0, s - _AROUND), min(TRIALS, s + _AROUND + 1)) for s in range(TRIALS)]

    def timestep(self, place: int) -> int:
        """The timestep at a place of the sliders, 0 to TRIALS."""
        return place * self.num_timesteps // TRIALS

    @cached_property
    def thumbnails(self) -> str:
        """HTML that the grid of predictions takes its pictures from, sent once: all of them in one."""
        width, height = _THUMBNAIL
        together = Image.new("RGB", (width, height * len(self.truth_N)))
        for n, pixels in enumerate(self.pixels_NCHW):
            together.paste(as_picture(pixels).resize(_THUMBNAIL), (0, n * height))
        return f"<style>.seen {{ background-image: url({markup.address(together)}) }}</style>"


def test_images(classifier: DiTiClassifier) -> ImageSet:
    """Bundled test images of the classes that the bank has.

    Raises:
        ValueError: it has fewer than two of them.
    """
    images = load_bundled("test")
    known = set(map(str, classifier.classes_.tolist()))
    rows = [row for row, name in enumerate(images.label_names) if name in known]
    if len({images.label_names[row] for row in rows}) < 2:
        raise ValueError(
            f"This tab looks at bundled test images of {', '.join(images.class_names)}; the bank has fewer than two of "
            "these classes. Choose the demo bank to see it."
        )
    return images.subset(rows).first_of_each_class(PER_CLASS)


class KeptErrors:
    """The error tensors of banks, in memory and in a folder beside each bank."""

    def __init__(self) -> None:
        self._kept: dict[str, Kept] = {}

    def restore(self, bank: ServedBank) -> Kept | None:
        """What was computed for the bank as it is now; None where there is nothing.

        Raises:
            ValueError: as `test_images`.
        """
        if bank.fingerprint in self._kept:
            return self._kept[bank.fingerprint]
        images = test_images(bank.classifier)
        tensors = kept_tensors(_file(bank), _made_by(bank, images))
        return None if tensors is None else self._keep(bank, images, tensors)

    def compute(self, bank: ServedBank, report: Report) -> Kept:
        """What `restore` gives, computed where it is not there.

        Raises:
            ValueError: as `test_images`, or an error is not finite.
        """
        if (found := self.restore(bank)) is not None:
            return found
        images = test_images(bank.classifier)
        made_by = _made_by(bank, images)
        tensors = _compute(bank.classifier, images, report)
        try:
            save_errors(_file(bank), tensors, made_by)
        except OSError as error:  # a folder that cannot be written to: it is computed again next time
            warnings.warn(f"The errors for the tab Timesteps are not kept: {error}", stacklevel=2)
        return self._keep(bank, images, tensors)

    def _keep(self, bank: ServedBank, images: ImageSet, tensors: dict[str, Tensor]) -> Kept:
        classes = bank.classifier.classes_.tolist()
        names = list(map(str, classes))
        self._kept[bank.fingerprint] = found = Kept(
            errors_NCS=tensors["errors"],
            pixels_NCHW=tensors["pixels"],
            noised_PCHW=tensors["noised"],
            truth_N=np.array([names.index(name) for name in images.label_names]),
            classes=tuple(classes),
            num_timesteps=bank.classifier.backbone_.num_train_timesteps,
        )
        return found


def show(kept: Kept, low: float, high: float) -> str:
    """HTML of a window of timesteps: accuracy, curve, and the prediction of each image.

    Args:
        low, high: timesteps, rounded to the trials' spacing.

    Raises:
        ValueError: an empty window.
    """
    low, high = sorted(min(max(round(t * TRIALS / kept.num_timesteps), 0), TRIALS) for t in (low, high))
    if low == high:
        raise ValueError("The window is empty; move the sliders apart.")
    predicted = kept.predicted(low, high)
    right_N = predicted == kept.truth_N
    return (
        f'<div class="window"><div class="figure"><span class="large">{100 * right_N.mean():.0f} %</span> right: '
        f"{right_N.sum()} of {len(right_N)} test images with {kept.timestep(low)} \u2264 t &lt; {kept.timestep(high)}. "
        f"With all timesteps: {100 * kept.accuracy(0, TRIALS):.0f} %.</div>"
        f"{_curve(kept, low, high)}{_noised(kept, low, high)}</div>{_grid(kept, predicted, right_N)}"
    )


def _curve(kept: Kept, low: int, high: int) -> str:
    """Accuracy over timesteps, the window shaded."""
    points = " ".join(f"{(s + 0.5) * _WIDE:.0f},{100 * (1 - share):.1f}" for s, share in enumerate(kept.curve))
    chance = 100 * (1 - 1 / len(kept.classes))
    return (
        '<div class="curve"><div class="axis"><span>100 %</span><span>0</span></div>'
        f'<svg viewBox="0 0 {TRIALS * _WIDE} 100" preserveAspectRatio="none" role="img" aria-label="accuracy over t">'
        f'<rect x="{low * _WIDE}" y="0" width="{(high - low) * _WIDE}" height="100" class="shade"/>'
        f'<line x1="0" x2="{TRIALS * _WIDE}" y1="{chance:.1f}" y2="{chance:.1f}" class="chance"/>'
        f'<polyline points="{points}"/></svg>'
        '<div class="axis-t"><span>t = 0, no noise</span><span>accuracy by a few timesteps around t; dashed: chance'
        f"</span><span>t = {kept.num_timesteps}, noise alone</span></div></div>"
    )


def _noised(kept: Kept, low: int, high: int) -> str:
    """What noise leaves of a picture at both ends of the window."""
    shown = "".join(
        f"<figure>{markup.picture(as_picture(kept.noised_PCHW[place]))}<figcaption>t = {kept.timestep(place)}"
        "</figcaption></figure>"
        for place in (low, high)
    )
    return f'<div class="noised"><p>What noise leaves of a picture at both ends of the window</p>{shown}</div>'


def _grid(kept: Kept, predicted: np.ndarray, right_N: np.ndarray) -> str:
    """Each image with its predicted class, and its true one where that is another."""
    width, height = _THUMBNAIL
    cells = []
    for n, (guess, truth) in enumerate(zip(predicted, kept.truth_N, strict=True)):
        kind, sign = ("right", "\u2713") if right_N[n] else ("wrong", "\u2717")
        true = "" if right_N[n] else f"<small>is {markup.name(kept.classes[truth])}</small>"
        style = f"width: {width}px; height: {height}px; background-position: 0 -{n * height}px"
        cells.append(
            f'<div class="cell {kind}"><div class="seen" style="{style}"></div>'
            f"<div>{sign} {markup.name(kept.classes[guess])}{true}</div></div>"
        )
    return f'<div class="grid">{"".join(cells)}</div>'


def _compute(classifier: DiTiClassifier, images: ImageSet, report: Report) -> dict[str, Tensor]:
    backbone, encoder = classifier.backbone_, classifier.encoder_
    prepared = [encoder.prepare(images.decode(row)) for row in range(len(images))]
    latents = encoder.latents(prepared)
    times = even_grid(TRIALS, 0, backbone.num_train_timesteps).tolist()
    scorer = classifier.decider().scorer(classifier.current_prediction().batch_size)
    with reported_to(lambda _, done, total: report(done / total, f"{done} of {total} test images")):
        errors_NCS = error_tensor(scorer, latents, [image.id for image in prepared], times)
    return {
        "errors": errors_NCS,
        "pixels": torch.stack([image.pixels_CHW for image in prepared]),
        "noised": _noised_pictures(backbone, latents[0], prepared[0].id),
    }


def _noised_pictures(backbone: Backbone, latents: Tensor, image_id: str) -> Tensor:
    """uint8 [TRIALS + 1, 3, height, width]: noise added to the latents of an image, and decoded."""
    last = backbone.num_train_timesteps - 1
    times_P = torch.arange(TRIALS + 1) * last // TRIALS
    noise = trial_noise(0, image_id, [0], tuple(latents.shape))
    noised = backbone.add_noise(latents.expand(len(times_P), -1, -1, -1), noise, times_P)
    pictures = [torch.from_numpy(np.array(picture)) for picture in backbone.decode_latents(noised)]
    return torch.stack(pictures).permute(0, 3, 1, 2).contiguous()


def _file(bank: ServedBank) -> Path:
    return bank.folder.with_name(f"{bank.folder.name}_cache") / _FILE


def _made_by(bank: ServedBank, images: ImageSet) -> dict[str, str]:
    """What decides the errors."""
    dtype = str(bank.classifier.backbone_.dtype)
    return {"bank": bank.fingerprint, "images": fingerprint(images), "trials": str(TRIALS), "dtype": dtype}


def build(context: Context, tab: Any) -> None:
    """The tab.

    Args:
        tab: that it stands in.
    """
    import gradio as gr

    errors = KeptErrors()
    waiting = markup.note("Compute the errors first. They are kept beside the bank for the next time.")

    def view(kept: Kept, low: float, high: float) -> tuple[Any, ...]:
        return gr.Button(visible=False), kept.thumbnails, show(kept, low, high)

    def open_(name: str, low: float, high: float) -> tuple[Any, ...]:
        try:
            kept = errors.restore(context.banks[name])
        except ValueError as error:  # this bank has nothing to show here, which is no failure
            return gr.Button(visible=False), "", markup.note(str(error))
        return (gr.Button(visible=True), "", waiting) if kept is None else view(kept, low, high)

    def compute(name: str, low: float, high: float, progress: Any = gr.Progress()) -> tuple[Any, ...]:  # noqa: B008
        return view(errors.compute(context.banks[name], report_to(progress)), low, high)

    def move(name: str, low: float, high: float) -> str:
        kept = errors.restore(context.banks[name])
        return waiting if kept is None else show(kept, low, high)

    gr.Markdown(
        "Noise destroys an image's fine attributes first, at small timesteps t, and its prominent ones only at large "
        "t. Move the window of timesteps that count, and see what can still be told apart. Only class tokens decide "
        "here: the label on the tab Classify also counts the bank's other sources of evidence."
    )
    with gr.Row():
        low = gr.Slider(0, 1000, 0, step=1000 // TRIALS, label="from t", elem_id="from-t", buttons=[])
        high = gr.Slider(0, 1000, 1000, step=1000 // TRIALS, label="to t", elem_id="to-t", buttons=[])
        with gr.Column(min_width=320):
            windows = {"little noise": (0, 200), "in between": (200, 600), "much noise": (600, 1000), "all": (0, 1000)}
            with gr.Row():
                buttons = {gr.Button(text, size="sm", min_width=60): window for text, window in windows.items()}
    button = gr.Button("Compute the errors: some minutes", variant="primary", visible=False, elem_id="compute")
    thumbnails, shown = gr.HTML(elem_id="thumbnails"), gr.HTML(waiting, elem_id="window")
    asked = [context.chosen, low, high]
    outputs = [button, thumbnails, shown]
    gr.on([tab.select, context.chosen.change], context.answering(open_), asked, outputs, **QUICK)
    button.click(context.answering(compute), asked, outputs, show_progress_on=shown, **QUEUED)
    gr.on([low.change, high.change], context.answering(move), asked, shown, trigger_mode="always_last", **QUICK)
    for preset, window in buttons.items():
        preset.click(lambda window=window: window, None, [low, high], **QUICK)
