"""Which score tells images of no known class: variants that are like the known ones, and pictures of something else.

    python -m eval.unknown --bank BANK --dataset fgvc:DIR --data DIR

A bank of the few-shot classes judges their test images (known), images of the four variants that pre-training leaves
out (unknown, and much like them), and crops of the photographs that come with scikit-learn (no aircraft). AUROC is the
chance that a known image has a higher score than an unknown one; the area under OSCR counts known images with the right
label alone. "Both" is the highest probability times the share of the shots that are no more similar to another shot
than the image is to its nearest one.

Shapes in names: N images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_sample_images
from sklearn.metrics import roc_auc_score

from fewshot_diti import DiTiClassifier, plots
from fewshot_diti.baselines.zero_shot import zero_shot_bank
from fewshot_diti.data import load_images
from fewshot_diti.data.images import ImageSource, as_picture
from fewshot_diti.files import write_atomically
from fewshot_diti.scoring import Scorer
from recipes.pocket.renders import HELD_OUT, load_renders, split_held_out

RESAMPLES = 1000
COLOURS = (plots.BLUE, plots.GREEN, plots.VERMILION, plots.BLACK)  # of the scores


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is judged.

    Attributes:
        bank: folder of a classifier of the few-shot classes.
        dataset: of these, as `load_images` reads it, with the split test.
        data: folder of the pre-training images.
        images: of each kind, at most.
        picture: PNG of the OSCR curves.
        reject: as of `DiTiClassifier.is_unknown`.
    """

    bank: Path
    dataset: str
    data: Path
    images: int = 120
    picture: Path | None = None
    reject: float = 0.01
    seed: int = 0


def crops(photographs: Sequence[np.ndarray], count: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Parts of photographs, twice as wide as high."""
    found = []
    for number in range(count):
        photograph = photographs[number % len(photographs)]
        height, width = photograph.shape[:2]
        h = int(rng.integers(height // 4, min(height, width // 2)))
        y, x = int(rng.integers(height - h + 1)), int(rng.integers(width - 2 * h + 1))
        found.append(photograph[y : y + h, x : x + 2 * h])
    return found


class Judged(NamedTuple):
    """Scores [N] by name, higher for what is known, and the predicted class of each image."""

    scores: dict[str, np.ndarray]
    labels: np.ndarray


def judge(classifier: DiTiClassifier, images: Sequence[ImageSource]) -> Judged:
    """What the classifier says of images."""
    decider = classifier.decider()
    probabilities_NC = classifier.predict_proba(images)
    best_N = probabilities_NC.argmax(1)
    similarities_N = decider.similarities(images, classifier.current_prediction())
    usual_n = decider.familiarity.usual()
    found = {
        "highest probability": probabilities_NC.max(1),
        "similarity of the nearest shot": similarities_N,
        "both": probabilities_NC.max(1) * (1 + (usual_n < similarities_N[:, None]).sum(1)) / (len(usual_n) + 1),
        "class token against none": against_none(classifier, images, best_N),
    }
    return Judged(found, classifier.classes_[best_N])


def against_none(classifier: DiTiClassifier, images: Sequence[ImageSource], best_N: np.ndarray) -> np.ndarray:
    """By how much the best class's token restores each image better than the backbone with the generic prompt [N], as a
    share of the latter's error: the mean over the calibrated trials, by their weights, both on the same noise."""
    decider, encoder = classifier.decider(), classifier.encoder_
    bare = zero_shot_bank(encoder.backbone, ("",), decider.bank.geometry, "")
    generic = replace(bare, tokens=(replace(bare.tokens[0], prompt=encoder.generic_prompt),))
    scorer = Scorer(encoder.backbone, generic, seed=decider.scoring.seed)
    trials, times = range(len(decider.calibration.timesteps)), decider.calibration.timesteps
    found = []
    for row, best in enumerate(best_N.tolist()):
        image = encoder.prepare(images[row])
        latents = encoder.latents([image])[0]
        token_S = decider.scorer(scorer.batch_size).errors(latents, image.id, [best], trials, times)[0]
        bare_S = scorer.errors(latents, image.id, [0], trials, times)[0]
        found.append(np.average(1 - (token_S / bare_S).numpy(), weights=decider.calibration.weights))
    return np.array(found)


def oscr(known_N: np.ndarray, correct_N: np.ndarray, unknown_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The open-set classification rate curve (Dhamija et al., NeurIPS 2018), from 0 unknown images on.

    For every threshold that a score passes: the share of unknown images with such a score or a higher one (false
    positive rate), and the share of known images that have it and the right label (correct classification rate).
    """
    thresholds = np.unique(np.concatenate([known_N, unknown_N]))[::-1, None]
    rates = (unknown_N >= thresholds).mean(1), ((known_N >= thresholds) & correct_N).mean(1)
    false_positive, right = (np.concatenate([[0.0], rate]) for rate in rates)
    return false_positive, right


def auroc(known_N: np.ndarray, unknown_N: np.ndarray) -> float:
    """The chance that a known image has a higher score than an unknown one; ties count half."""
    truth = [1] * len(known_N) + [0] * len(unknown_N)
    return float(roc_auc_score(truth, np.concatenate([known_N, unknown_N])))


def row(known_N: np.ndarray, correct_N: np.ndarray, unknown_N: np.ndarray) -> list[str]:
    """AUROC with its 95 % interval (bootstrap over images), area under OSCR, and both shares at 95 %."""
    rng = np.random.default_rng(0)
    drawn = [auroc(*(rng.choice(x, len(x)) for x in (known_N, unknown_N))) for _ in range(RESAMPLES)]
    low, high = np.quantile(drawn, (0.025, 0.975))
    false_positive, right = oscr(known_N, correct_N, unknown_N)
    lost = (known_N <= np.quantile(unknown_N, 0.95)).mean()
    let_through = (unknown_N >= np.quantile(known_N, 0.05)).mean()
    return [
        f"{auroc(known_N, unknown_N):.3f} [{low:.2f}, {high:.2f}]",
        f"{np.trapezoid(right, false_positive):.3f}",
        f"{100 * lost:.0f}",
        f"{100 * let_through:.0f}",
    ]


def picture(known: Judged, correct_N: np.ndarray, kinds: Mapping[str, Judged]) -> bytes:
    """PNG: an OSCR curve for each score, a panel for each kind of unknown images."""
    figure = Figure(figsize=(4.4 * len(kinds), 4), dpi=130, layout="constrained")
    panels = figure.subplots(1, len(kinds), squeeze=False, sharey=True)[0]
    for axes, (kind, unknown) in zip(panels, kinds.items(), strict=True):
        axes.axhline(100 * correct_N.mean(), color=plots.GREY, lw=0.8, ls=":")
        for colour, (name, known_N) in zip(COLOURS, known.scores.items(), strict=True):
            false_positive, right = oscr(known_N, correct_N, unknown.scores[name])
            label = f"{name}  {np.trapezoid(right, false_positive):.3f}"
            axes.step(100 * false_positive, 100 * right, where="post", color=colour, lw=1.8, label=label)
        axes.set(xlim=(0, 100), ylim=(0, 102), xlabel=f"{kind} taken for known (%)")
        axes.legend(loc="lower right", fontsize=8, frameon=False, title="area under the curve", title_fontsize=8)
        plots.tidy(axes)
    panels[0].set_ylabel("known images kept and right (%)")
    return plots.png(figure)


def main(config: Config) -> None:
    """Prints one table, and draws the curves."""
    rng = np.random.default_rng(config.seed)
    classifier = DiTiClassifier.from_pretrained(config.bank)
    test = load_images(config.dataset, "test")
    rows = rng.permutation(len(test))[: config.images]
    known = judge(classifier, [test.decode(int(row)) for row in rows])
    correct_N = known.labels == np.array(test.label_names)[rows]
    _, left_out = split_held_out(load_renders(config.data, (128, 256)), HELD_OUT)
    others = rng.permutation(len(left_out))[: config.images]
    pictures = [as_picture(left_out.pixels_NCHW[int(row)]) for row in others]
    kinds = {
        "variants left out": judge(classifier, pictures),
        "photographs": judge(
            classifier, [Image.fromarray(x) for x in crops(load_sample_images().images, config.images, rng)]
        ),
    }
    console = Console(width=180)
    console.print(f"{100 * correct_N.mean():.1f} % of {len(correct_N)} known images are right; no area can be larger.")
    for kind, unknown in kinds.items():
        table = Table(
            "score",
            "AUROC [95 % interval]",
            "area under OSCR",
            "known lost, % (95 % of the unknown caught)",
            "unknown let through, % (95 % of the known kept)",
            title=kind,
        )
        for name, known_N in known.scores.items():
            table.add_row(name, *row(known_N, correct_N, unknown.scores[name]))
        console.print(table)
    if config.picture is not None:
        write_atomically(config.picture, picture(known, correct_N, kinds))
    least = classifier.decider().familiarity.least(config.reject)
    nearest = "similarity of the nearest shot"
    shares = {"known": known, **kinds}
    rejected = ", ".join(f"{100 * (x.scores[nearest] < least).mean():.0f} % of {kind}" for kind, x in shares.items())
    console.print(f"reject={config.reject} (similarity below {least:.2f}) rejects {rejected}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
