"""How far probabilities can be trusted: calibration error, Brier score, log-loss, and the reliability plot.

Shapes in names: N images, C classes, B bins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import brier_score_loss, log_loss

from fewshot_diti import plots
from fewshot_diti.reports import wilson_interval

BINS = 10


class Bins(NamedTuple):
    """Images by the probability of their predicted class, the least probable first.

    Attributes:
        confidence: mean of these probabilities [B].
        accuracy: share of right predictions [B].
        images: how many there are [B].
    """

    confidence: np.ndarray
    accuracy: np.ndarray
    images: np.ndarray


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictions:
    """Of N images: the probability of the predicted class, and whether it is right."""

    confidence: np.ndarray
    correct: np.ndarray

    @classmethod
    def of(cls, labels_N: np.ndarray, probabilities_NC: np.ndarray) -> Predictions:
        """Those of the most probable classes."""
        return cls(confidence=probabilities_NC.max(1), correct=probabilities_NC.argmax(1) == labels_N)

    @classmethod
    def join(cls, parts: Sequence[Predictions]) -> Predictions:
        """Those of several draws together."""
        confidence, correct = (np.concatenate([getattr(x, name) for x in parts]) for name in ("confidence", "correct"))
        return cls(confidence=confidence, correct=correct)

    @classmethod
    def of_records(cls, records: Sequence[Mapping[str, Any]]) -> Predictions | None:
        """Those of several runs together; None where a run was recorded without probabilities."""
        rows = [p for record in records for p in record["predictions"]]
        if not rows or any("probability" not in p for p in rows):
            return None
        correct = np.array([p["label"] == p["true_label"] for p in rows])
        return cls(confidence=np.array([p["probability"] for p in rows]), correct=correct)


def equal_mass_bins(predictions: Predictions, count: int = BINS) -> Bins:
    """Images sorted by confidence, in `count` bins of as many images each, but for one; never more bins than images."""
    order = np.argsort(predictions.confidence, kind="stable")
    parts = np.array_split(order, min(count, len(order)))
    return Bins(
        np.array([predictions.confidence[part].mean() for part in parts]),
        np.array([predictions.correct[part].mean() for part in parts]),
        np.array([len(part) for part in parts]),
    )


def expected_calibration_error(predictions: Predictions) -> float:
    """Mean over images of |confidence - accuracy| of their bin, 0 to 1 (ECE; Naeini et al., AAAI 2015), in ten bins of
    equal mass.

    Few images make it too large: see `errors_by_chance`.
    """
    bins = equal_mass_bins(predictions)
    return float(np.average(np.abs(bins.confidence - bins.accuracy), weights=bins.images))


def errors_by_chance(predictions: Predictions, *, draws: int = 200, seed: int = 0) -> np.ndarray:
    """Calibration errors [draws] that the same images would have if their probabilities were exactly right."""
    rng, confidence_N = np.random.default_rng(seed), predictions.confidence
    return np.array(
        [
            expected_calibration_error(replace(predictions, correct=rng.random(len(confidence_N)) < confidence_N))
            for _ in range(draws)
        ]
    )


def calibration_figures(labels_N: np.ndarray, probabilities_NC: np.ndarray) -> dict[str, float]:
    """`calibration_error` as `expected_calibration_error`; `brier`, the sum over classes of squared differences, 0 to 2
    (Brier, 1950); `log_loss`, the mean of -log(probability of the true class) in nats."""
    p_NC = probabilities_NC.astype(np.float64)
    p_NC = p_NC / p_NC.sum(1, keepdims=True)  # scikit-learn warns where float32 does not add up to 1
    classes = range(p_NC.shape[1])
    return {
        "calibration_error": expected_calibration_error(Predictions.of(labels_N, p_NC)),
        "brier": float(brier_score_loss(labels_N, p_NC, labels=classes, scale_by_half=False)),
        "log_loss": float(log_loss(labels_N, p_NC, labels=classes)),
    }


def picture(found: Mapping[int, Mapping[str, Predictions]], colours: Mapping[str, str]) -> bytes:
    """PNG: a panel for each number of shots, accuracy over confidence of each method, with 95 % intervals (Wilson).

    On the diagonal probabilities are right; below it they are too high.
    """
    columns = min(5, len(found))
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(2.6 * columns + 0.6, 2.9 * rows + 0.8), dpi=130, layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
    for axes in panels[len(found) :]:
        axes.set_axis_off()
    for axes, (num_shots, by_method) in zip(panels, found.items(), strict=False):
        axes.plot([0, 100], [0, 100], color=plots.GREY, lw=0.8)
        for name, predictions in by_method.items():
            _curve(axes, equal_mass_bins(predictions), colours[name], name)
        axes.set_title(f"{num_shots} shot{'s' if num_shots > 1 else ''}", fontsize=10)
        axes.set(xlim=(0, 102), ylim=(0, 102), aspect="equal", xlabel="confidence (%)")
        plots.tidy(axes)
    panels[0].set_ylabel("accuracy (%)")
    handles = {name: handle for axes in panels for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=len(handles), fontsize=9, frameon=False)
    return plots.png(figure)


def _curve(axes: Axes, bins: Bins, colour: str, name: str) -> None:
    right = np.rint(bins.accuracy * bins.images).astype(int)
    ends = np.array([wilson_interval(int(x), int(n)) for x, n in zip(right, bins.images, strict=True)]).T
    spread = 100 * np.abs(ends - bins.accuracy)
    x, y = 100 * bins.confidence, 100 * bins.accuracy
    axes.errorbar(x, y, spread, color=colour, marker="o", markersize=3, lw=1.4, elinewidth=0.7, label=name)
