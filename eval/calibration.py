"""Are probabilities right, and how large are sets of classes? Before and after a temperature from held-out images.

    python -m eval.calibration --errors docs/logs/fewshot/errors --picture docs/calibration.png \
        --shipped_picture docs/reliability.png --levels_picture docs/levels.png

Two sources, both from what `python -m eval.fewshot` left in its folder `errors`. *Class tokens*: what is held out are
the shots, judged by class tokens that were trained without them, on half of the shots. *fewshot-diti*: what is held out
are test images, as many as there are shots, drawn at random twenty times; the others are judged. This is not to be had
in use, and shows what held-out images that are like the others would give. "Preset" is the temperature that ships,
"fitted" the one that is most likely on the held-out images, which also give the threshold of the sets.

Shapes in names: N images, n held-out ones, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

from fewshot_diti import plots
from fewshot_diti.conformal import prediction_sets
from fewshot_diti.data import ImageSet, load_images
from fewshot_diti.evaluation.hierarchy import level_probabilities, level_titles, levels_of
from fewshot_diti.evaluation.reliability import (
    Predictions,
    calibration_figures,
    errors_by_chance,
    expected_calibration_error,
    picture,
)
from fewshot_diti.evaluation.summary import draw_levels
from fewshot_diti.files import write_atomically
from fewshot_diti.presets import PRESETS
from fewshot_diti.progress import counted
from fewshot_diti.temperature import fit_temperature
from fewshot_diti.timesteps import relative, trial_weights, weighted_mean

PRESET, FITTED = "preset", "fitted"
COLOURS = {PRESET: plots.ORANGE, FITTED: plots.BLUE}
SPLITS = 20
TINY = np.finfo(np.float64).tiny
Levels = Mapping[str, Sequence[str]]
ByShots = dict[int, list[float]]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which draws are looked at.

    Attributes:
        errors: folder of `diti-<shots>-<seed>.safetensors` and `shipped-<shots>-<seed>.safetensors`; draws without a
            file are left out.
        dataset: whose test images these are of.
        picture: PNG of the class tokens' accuracy over confidence.
        shipped_picture: the same of fewshot-diti as it ships.
        levels_picture: PNG of its accuracy on the classes and on groups of them, such as families.
        shots, seeds: of the draws.
        coverages: asked of the sets.
    """

    errors: Path
    dataset: str = "bundled"
    picture: Path | None = None
    shipped_picture: Path | None = None
    levels_picture: Path | None = None
    shots: tuple[int, ...] = (1, 2, 4, 8, 16)
    seeds: tuple[int, ...] = (1, 2, 3)
    coverages: tuple[float, ...] = (0.8, 0.9, 0.95)


@dataclass(frozen=True, kw_only=True, eq=False)
class Judged:
    """Images under both temperatures.

    Attributes:
        test: probabilities [N, C], by `PRESET` and `FITTED`.
        labels: true classes [N].
        held_out: probability of its own class for each held-out image, with the fitted temperature.
        temperature: the fitted one, in parts of the preset's.
    """

    test: dict[str, np.ndarray]
    labels: np.ndarray
    held_out: list[float]
    temperature: float

    def predictions(self, name: str) -> Predictions:
        """Those under one of the temperatures."""
        return Predictions.of(self.labels, self.test[name])


def judge(test_NC: Tensor, labels_N: Tensor, held_nC: Tensor, truth_n: Tensor, preset: float) -> Judged:
    """Scores of test images, judged by held-out ones."""
    fitted = fit_temperature(held_nC, truth_n)
    own_n = (-held_nC / fitted).softmax(1)[torch.arange(len(truth_n)), truth_n]
    return Judged(
        test={name: (-test_NC / t).softmax(1).numpy() for name, t in ((PRESET, preset), (FITTED, fitted))},
        labels=labels_N.numpy(),
        held_out=own_n.tolist(),
        temperature=fitted / preset,
    )


def of_class_tokens(kept: Mapping[str, Tensor], labels_N: Tensor, preset: float) -> list[Judged]:
    """A draw by its errors; none where no shot was held out."""
    if not kept["out_of_fold"]:
        return []
    times, held_out = kept["timesteps"], kept["held_out"]
    weights_S = trial_weights(relative(held_out, times, int(times.max()) + 1), times)
    weights_S = weights_S / weights_S.mean()
    test_NC, held_nC = (weighted_mean(errors.double(), weights_S) for errors in (kept["test"], held_out))
    return [judge(test_NC, labels_N, held_nC, kept["held_out_labels"], preset)]


def of_classifier(probabilities_NC: Tensor, labels_N: Tensor, count: int, rng: np.random.Generator) -> list[Judged]:
    """A draw of which `count` test images are held out instead of shots, in `SPLITS` ways."""
    scores_NC, found = -probabilities_NC.double().clamp(min=TINY).log(), []
    for _ in range(SPLITS):
        order = torch.from_numpy(rng.permutation(len(labels_N)))
        held, rest = order[:count], order[count:]
        found.append(judge(scores_NC[rest], labels_N[rest], scores_NC[held], labels_N[held], 1.0))
    return found


def calibration_table(title: str, by_shots: Mapping[int, Sequence[Judged]]) -> Table:
    """Means over draws, and the range of the fitted temperatures."""
    columns = ("shots", "temperature", "of the preset's", "calibration error", "by chance", "Brier", "log-loss")
    table = Table(*columns, title=title)
    for num_shots, judged in by_shots.items():
        for name in COLOURS:
            found = [calibration_figures(x.labels, x.test[name]) for x in judged]
            chance = np.mean([errors_by_chance(x.predictions(name), draws=50) for x in judged])
            error, brier, nats = (np.mean([x[k] for x in found]) for k in ("calibration_error", "brier", "log_loss"))
            times = [x.temperature for x in judged]
            softer = "1" if name == PRESET else f"{np.mean(times):.2f} ({min(times):.2f} to {max(times):.2f})"
            figures = (f"{100 * error:.1f}", f"{100 * chance:.1f}", f"{brier:.3f}", f"{nats:.3f}")
            table.add_row(str(num_shots), name, softer, *figures)
    return table


def pooled_table(by_shots: Mapping[int, Sequence[Predictions]]) -> Table:
    """The draws of each number of shots together, beside what right probabilities would show."""
    columns = ("images", "confidence, %", "accuracy, %", "calibration error", "by chance", "chance is as large in, %")
    table = Table("shots", *columns, title="fewshot-diti as it ships, draws together")
    for num_shots, parts in by_shots.items():
        joined = Predictions.join(parts)
        error, chance = expected_calibration_error(joined), errors_by_chance(joined, draws=1000)
        shares = (joined.confidence.mean(), joined.correct.mean(), error, chance.mean())
        cells = (f"{100 * x:.1f}" for x in shares)
        table.add_row(str(num_shots), str(len(joined.correct)), *cells, f"{100 * (chance >= error).mean():.0f}")
    return table


def sets_table(title: str, by_shots: Mapping[int, Sequence[Judged]], coverages: Sequence[float]) -> Table:
    """Share of images whose set holds their class, mean and range over draws, and the mean size of a set."""
    table = Table("shots", "held out", "asked for, %", "coverage, %", "range", "classes in a set", title=title)
    for num_shots, judged in by_shots.items():
        for coverage in coverages:
            covered, sizes = [], []
            for x in judged:
                found = prediction_sets(torch.from_numpy(x.test[FITTED]), x.held_out, coverage)
                covered.append(100 * np.mean([c in places for c, places in zip(x.labels, found, strict=True)]))
                sizes.append(np.mean([len(places) for places in found]))
            cells = (f"{np.mean(covered):.1f}", f"{min(covered):.0f} to {max(covered):.0f}", f"{np.mean(sizes):.2f}")
            table.add_row(str(num_shots), str(len(judged[0].held_out)), f"{100 * coverage:.0f}", *cells)
    return table


def by_level(test: ImageSet, levels: Levels, shipped: Mapping[int, Sequence[np.ndarray]]) -> dict[str, ByShots]:
    """Accuracy in % on the classes and on groups of them, by title and shots, a value a draw.

    Args:
        levels: the group of each class by the name of a level.
        shipped: probabilities [N, C] of each draw, by shots.
    """

    def accuracy(probabilities_NC: np.ndarray, groups_C: Sequence[str]) -> float:
        names, p_NG = level_probabilities(probabilities_NC, groups_C)
        return 100 * float((np.array(names)[p_NG.argmax(1)] == np.array(groups_C)[test.labels]).mean())

    return {
        title: {k: [accuracy(x, levels.get(level, test.class_names)) for x in draws] for k, draws in shipped.items()}
        for level, title in level_titles(test.class_names, levels).items()
    }


def levels_table(found: Mapping[str, ByShots]) -> Table:
    """Mean and standard deviation over draws."""
    shots = next(iter(found.values()))
    table = Table(
        "accuracy, %", *(f"{counted(k, 'shot')}, {counted(len(draws), 'draw')}" for k, draws in shots.items())
    )
    for title, by_shots in found.items():
        spread = {k: f" ± {np.std(x, ddof=1):.1f}" if len(x) > 1 else "" for k, x in by_shots.items()}
        table.add_row(title, *(f"{np.mean(x):.1f}{spread[k]}" for k, x in by_shots.items()))
    return table


def main(config: Config) -> None:
    """Prints the tables, and draws the picture."""
    test = load_images(config.dataset, "test")
    labels_N, rng = torch.from_numpy(test.labels), np.random.default_rng(0)
    sources: dict[str, dict[int, list[Judged]]] = {"class tokens": {}, "fewshot-diti": {}}
    shipped: dict[int, list[np.ndarray]] = {}
    for k in config.shots:
        for seed in config.seeds:
            errors, kept = (config.errors / f"{kind}-{k}-{seed}.safetensors" for kind in ("diti", "shipped"))
            if errors.is_file():
                found = of_class_tokens(load_file(errors), labels_N, PRESETS["pocket"].temperature_of(k))
                sources["class tokens"].setdefault(k, []).extend(found)
            if kept.is_file():
                probabilities_NC = load_file(kept)["probabilities"]
                shipped.setdefault(k, []).append(probabilities_NC.numpy())
                found = of_classifier(probabilities_NC, labels_N, k * len(test.class_names), rng)
                sources["fewshot-diti"].setdefault(k, []).extend(found)
    console = Console(width=120)
    draws = {k: [Predictions.of(test.labels, x) for x in found] for k, found in shipped.items()}
    levels = by_level(test, levels_of(load_images(config.dataset, "train"), test), shipped)
    console.print(pooled_table(draws))
    console.print(levels_table(levels))
    for title, by_shots in sources.items():
        known = {k: judged for k, judged in by_shots.items() if judged}
        console.print(calibration_table(title, known))
        console.print(sets_table(f"{title}: sets of classes", known, config.coverages))
    if config.picture is not None:
        pictured = {
            k: {name: Predictions.join([x.predictions(name) for x in judged]) for name in COLOURS}
            for k, judged in sources["class tokens"].items()
            if judged
        }
        write_atomically(config.picture, picture(pictured, COLOURS))
    if config.shipped_picture is not None:
        joined = {k: {"fewshot-diti": Predictions.join(parts)} for k, parts in draws.items()}
        write_atomically(config.shipped_picture, picture(joined, {"fewshot-diti": plots.BLUE}))
    if config.levels_picture is not None:
        write_atomically(config.levels_picture, draw_levels(levels, list(shipped), "fewshot-diti"))


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
