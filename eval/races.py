"""How often a race ends with another label than all trials give: simulated, where its model holds and where not.

    python -m eval.races

Scores of classes and noise of trials are drawn, not measured, so the label of all trials is known. Counts how often a
race at the given confidence ends with another label, and which share of all evaluations it takes. Prints a Markdown
table with a row per kind of noise and a column per kind of classes, in units of the noise of a trial.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro
from torch import Tensor

from eval.speed.timing import on_kept_errors
from fewshot_diti.racing import racing

FAMILY_SHARE = 0.9  # of the noise's variance that classes of one family have in common


@dataclass(frozen=True, kw_only=True)
class Races:
    """What is simulated.

    Attributes:
        classes, trials: of a race.
        confidence: that it ends with the label of all trials.
        races: of each cell of the table.
    """

    classes: int = 12
    trials: int = 32
    confidence: float = 0.9
    races: int = 1000
    seed: int = 0


# noise [races, classes, trials] with a standard deviation of about 1
def _independent(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=g, dtype=torch.float64)


def _families(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    common = _independent((shape[0], 2, shape[2]), g)[:, torch.arange(shape[1]) % 2]
    return FAMILY_SHARE**0.5 * common + (1 - FAMILY_SHARE) ** 0.5 * _independent(shape, g)


def _unequal(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    noisier = torch.where(torch.arange(shape[1]) % 2 == 0, 3.0, 1.0)
    return _independent(shape, g) * noisier[:, None] / 5**0.5


def _heavy(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    chi_squared = _independent((*shape, 3), g).square().sum(-1)
    return _independent(shape, g) / chi_squared.sqrt()  # Student's with 3 degrees of freedom, divided by sqrt(3)


NOISE: dict[str, Callable[[tuple[int, ...], torch.Generator], Tensor]] = {
    "independent, one variance": _independent,
    "two families that share nine tenths of it": _families,
    "every other class's three times another's": _unequal,
    "Student's with 3 degrees of freedom": _heavy,
}


# means [races, classes] in units of the noise
Means = Callable[[int, int, torch.Generator], Tensor]


def _spread(deviation: float) -> Means:
    return lambda races, classes, g: deviation * _independent((races, classes), g)


def _ahead(by: float, *, share: float = 0.0) -> Means:
    """The first class, or a share of all, is ahead of the others; classes ahead are equal, and so are the others."""

    def means(races: int, classes: int, g: torch.Generator) -> Tensor:
        front_C = torch.arange(classes) < max(1, share * classes)
        return torch.where(front_C, -by, 0.0).double().expand(races, classes)

    return means


MEANS: dict[str, Means] = {
    "all equal": _spread(0.0),
    "spread 0.3": _spread(0.3),
    "spread 1": _spread(1.0),
    "one ahead by 0.5": _ahead(0.5),
    "half ahead by 1": _ahead(1.0, share=0.5),
    "half ahead by 6": _ahead(6.0, share=0.5),
    "all but one ahead by 20": _ahead(20.0, share=0.9),
}


def missed(means_NC: Tensor, noise_NCS: Tensor, confidence: float) -> tuple[float, float]:
    """Share of races that end with another label than that of all trials, and share of all evaluations they take."""
    errors_NCS = means_NC[:, :, None] + noise_NCS
    N, C, S = errors_NCS.shape
    found = on_kept_errors(errors_NCS, torch.ones(S), racing(S, confidence=confidence))
    labels = torch.tensor([race.position for race in found])
    evaluations = sum(race.evaluations for race in found)
    return float((labels != errors_NCS.mean(2).argmin(1)).double().mean()), evaluations / (N * C * S)


def main(config: Races) -> None:
    """Prints the table."""
    print("| noise | " + " | ".join(MEANS) + " |\n" + "|---" * (1 + len(MEANS)) + "|")
    for noise_name, noise in NOISE.items():
        cells = []
        for means in MEANS.values():
            g = torch.Generator().manual_seed(config.seed)
            means_NC = means(config.races, config.classes, g)
            noise_NCS = noise((config.races, config.classes, config.trials), g)
            share, evaluations = missed(means_NC, noise_NCS, config.confidence)
            cells.append(f"{100 * share:.1f} % ({100 * evaluations:.0f})")
        print(f"| {noise_name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Races))
