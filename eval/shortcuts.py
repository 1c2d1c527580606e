"""Is the livery taken for the variant? Two variants that wear mostly one livery each in training; a balanced test.

    python -m eval.shortcuts --data DIR --output docs/logs/shortcuts.json --picture docs/shortcuts.png

The design of Waterbirds (Sagawa et al., ICLR 2020; with generative classifiers: Li et al., ICLR 2025). At strength
90 %, 9 of 10 images of the first variant show the first livery and 9 of 10 of the second variant the second one; the
test has as many images of each of the four pairs. What is reported is the accuracy on the worst of these four, beside
their mean. `DIR` holds the pre-training images; the variants are two that pre-training leaves out, and the liveries the
only two airlines that both have (15 images of the rarest pair).

Shapes in names: N test images, S timesteps.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
import tyro
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torchvision.transforms import v2

from fewshot_diti import Backbone, DiTiClassifier, ScoringConfig, TrainingConfig, plots
from fewshot_diti.baselines.imagenet import size_for
from fewshot_diti.baselines.views import ColourJitter, random_view
from fewshot_diti.config import Settings
from fewshot_diti.data.images import as_picture
from fewshot_diti.files import write_atomically
from fewshot_diti.folds import Fit, shared_errors
from fewshot_diti.presets import recommended
from fewshot_diti.reports import bootstrap_interval
from fewshot_diti.timesteps import snr
from fewshot_diti.trials import even_grid
from recipes.pocket.renders import HELD_OUT, Renders, load_renders, split_held_out

SHIPPED, EVEN = "fewshot-diti", "class tokens, even trials"
SOURCES = {  # of evidence, each reported alone, and what the table calls it
    "class tokens": "class tokens",
    "features": "U-Net features, discriminant",
    "network": "ImageNet network, fine-tuned",
    "linear-network": "ImageNet network, linear head",
    "tip-adapter:pocket": "CLIP, Tip-Adapter",
    "linear-clip:pocket": "CLIP, linear head",
}
SCRATCH = "network from scratch"
WINDOW = 0.2  # width of a window, of the schedule


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is measured.

    Attributes:
        data: folder of Parquet shards.
        output: JSON of every draw; what is there is kept.
        picture: PNG of accuracy by strength, by window of timesteps, and of what each timestep tells.
        variants: two.
        liveries: two airlines that both variants have.
        strengths: share of a variant's shots that wear its own livery; at the first the picture shows single timesteps.
        shots: of each variant.
        test: images of each of the four pairs.
        trials: even timesteps at which class tokens are compared.
        scratch_steps: of the network that begins with random weights.

    Raises:
        ValueError: a strength is no whole number of shots, or a livery has no name.
    """

    data: Path
    output: Path
    picture: Path | None = None
    variants: tuple[str, str] = ("737-900", "787-9")
    liveries: tuple[str, str] = ("United Airlines", "ELAL")
    strengths: tuple[float, ...] = (0.5, 0.7, 0.8, 0.9, 1.0)
    seeds: tuple[int, ...] = (1, 2, 3, 4)
    shots: int = 10
    test: int = 5
    trials: int = 32
    scratch_steps: int = 300
    backbone: str = "pocket"

    def __post_init__(self) -> None:
        for strength in self.strengths:
            if abs(strength * self.shots - round(strength * self.shots)) > 1e-6:
                raise ValueError(f"strength {strength} of {self.shots} shots is no whole number; pass another of them.")
        if not all(self.liveries):
            raise ValueError(
                "An image without an airline's name wears the paint of its maker, which no two variants share."
            )


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Images of one draw.

    Attributes:
        shots, test: PIL images.
        pairs_of_shots, pairs_of_test: (variant, livery) of each, 0 or 1.
        test_rows: positions of the test images among the renders.
    """

    shots: list[Image.Image]
    pairs_of_shots: np.ndarray
    test: list[Image.Image]
    pairs_of_test: np.ndarray
    test_rows: tuple[int, ...]


def draw(renders: Renders, config: Config, strength: float, seed: int) -> Draw:
    """Shots of this strength, and a balanced test that is the same at every strength.

    Raises:
        ValueError: a pair has too few images.
    """
    rng = np.random.default_rng(seed)
    own = round(strength * config.shots)
    shots, test = [], []
    for v, variant in enumerate(config.variants):
        for a, livery in enumerate(config.liveries):
            pairs = zip(renders.variants, renders.airlines, strict=True)
            rows = rng.permutation([i for i, pair in enumerate(pairs) if pair == (variant, livery)])
            needed = own if v == a else config.shots - own
            if len(rows) < config.test + needed:
                raise ValueError(
                    f"{len(rows)} images of {variant} in livery {livery!r}; {config.test + needed} needed."
                )
            test += [(row, v, a) for row in rows[: config.test]]
            shots += [(row, v, a) for row in rows[config.test :][:needed]]

    def images(found: Sequence[tuple[int, int, int]]) -> list[Image.Image]:
        return [as_picture(renders.pixels_NCHW[row]) for row, _, _ in found]

    pairs_of_shots, pairs_of_test = (np.array([(v, a) for _, v, a in found]) for found in (shots, test))
    return Draw(
        shots=images(shots),
        pairs_of_shots=pairs_of_shots,
        test=images(test),
        pairs_of_test=pairs_of_test,
        test_rows=tuple(int(row) for row, _, _ in test),
    )


def differences(classifier: DiTiClassifier, images: Sequence[Image.Image], trials: int) -> list[list[float]]:
    """How much better the second class token restores each image than the first at even timesteps, [N][S]: the
    difference of the errors over their sum."""
    assert classifier.bank_ is not None
    fit = Fit(encoder=classifier.encoder_, prompts=classifier.prompts_, settings=classifier.settings_, groups={})
    grid = even_grid(trials, 0, classifier.backbone_.num_train_timesteps)
    errors_NCS = shared_errors(fit, classifier.bank_, images, grid).double()
    found = (errors_NCS[:, 0] - errors_NCS[:, 1]) / errors_NCS.sum(1)
    return [[float(f"{x:.3g}") for x in row] for row in found.tolist()]


def from_scratch(drawn: Draw, config: Config, size: tuple[int, int], recolour: ColourJitter, seed: int) -> np.ndarray:
    """Predicted variants of the test images by a network that has seen the shots alone, in the views of fine-tuning."""
    torch.manual_seed(seed)
    network: nn.Module = timm.create_model("cs3darknet_s", pretrained=False, num_classes=2)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=config.scratch_steps)
    change, labels = v2.TrivialAugmentWide(), torch.from_numpy(drawn.pairs_of_shots[:, 0])

    def pixels(images: Sequence[Image.Image]) -> Tensor:
        resized = [v2.functional.resize(v2.functional.to_image(image), list(size), antialias=True) for image in images]
        return torch.stack(resized).float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)

    for _ in range(config.scratch_steps):
        rows = torch.randperm(len(labels))[:24]
        batch = pixels([change(random_view(drawn.shots[row], recolour)) for row in rows.tolist()])
        loss = F.cross_entropy(network.train()(batch), labels[rows], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        found: np.ndarray = network.eval()(pixels(drawn.test)).argmax(1).numpy()
    return found


def judge(config: Config, backbone: Backbone, renders: Renders, strength: float, seed: int) -> dict[str, Any]:
    """What every method predicts of a draw, and the differences between class tokens at each timestep."""
    drawn = draw(renders, config, strength, seed)
    settings: Settings = recommended(config.shots, backbone.kind)
    assert not isinstance(settings.scoring.witness_weights, str)
    own, weights = settings.scoring.witnesses, settings.scoring.witness_weights
    more = tuple(name for name in SOURCES if name not in own and name != "class tokens")  # reported, without a weight
    scoring = ScoringConfig(witnesses=own + more, witness_weights=weights + (0.0,) * len(more), seed=seed)
    classifier = DiTiClassifier(backbone, concept="aircraft", training=TrainingConfig(seed=seed), scoring=scoring)
    classifier.fit(drawn.shots, [config.variants[v] for v in drawn.pairs_of_shots[:, 0]])
    assert tuple(classifier.classes_) == config.variants, "variants are named in sorted order"
    found = {SHIPPED: [config.variants.index(x) for x in classifier.predict(drawn.test)]}
    evidence = classifier.evidence(drawn.test)
    found |= {label: evidence[name].argmax(1).tolist() for name, label in SOURCES.items()}
    recolour = ColourJitter.of(settings.training)
    found[SCRATCH] = from_scratch(drawn, config, size_for(backbone.image_size, 0.5), recolour, seed).tolist()
    by_time = differences(classifier, drawn.test, config.trials)
    found[EVEN] = [int(sum(row) > 0) for row in by_time]
    return {
        "pairs": drawn.pairs_of_test.tolist(),
        "rows": list(drawn.test_rows),
        "predicted": found,
        "variant": by_time,
    }


def livery_differences(config: Config, backbone: Backbone, renders: Renders, seed: int) -> list[list[float]]:
    """The differences between class tokens of the two liveries, learned where liveries and variants are independent."""
    drawn = draw(renders, config, config.strengths[0], seed)
    classifier = DiTiClassifier(backbone, concept="aircraft", training=TrainingConfig(seed=seed), witnesses=())
    in_order = sorted(config.liveries)
    classifier.fit(drawn.shots, [config.liveries[a] for a in drawn.pairs_of_shots[:, 1]])
    sign = 1 if in_order == list(config.liveries) else -1
    return [[sign * x for x in row] for row in differences(classifier, drawn.test, config.trials)]


def by_pair(correct_N: np.ndarray, pairs_N2: np.ndarray) -> list[np.ndarray]:
    """Masks [N] of the four pairs of variant and livery, the least accurate first."""
    masks = [(pairs_N2 == pair).all(1) for pair in np.unique(pairs_N2, axis=0)]
    return sorted(masks, key=lambda mask: float(correct_N[mask].mean()))


def worst_and_mean(correct_N: np.ndarray, pairs_N2: np.ndarray) -> tuple[float, float]:
    """Accuracy on the worst of the four pairs, and the mean over them."""
    accuracies = [float(correct_N[mask].mean()) for mask in by_pair(correct_N, pairs_N2)]
    return accuracies[0], float(np.mean(accuracies))


def of_method(draws: Sequence[dict[str, Any]], method: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of all draws' test images: whether a method is right [N], the pairs [N, 2], and the images [N]."""
    pairs = np.concatenate([np.array(x["pairs"]) for x in draws])
    predicted = np.concatenate([np.array(x["predicted"][method]) for x in draws])
    return predicted == pairs[:, 0], pairs, np.concatenate([np.array(x["rows"]) for x in draws])


def cell(draws: Sequence[dict[str, Any]], method: str) -> str:
    """Accuracy on the worst pair with its interval, and the mean over the pairs."""
    correct, pairs, rows = of_method(draws, method)
    worst, mean = worst_and_mean(correct, pairs)
    mask = by_pair(correct, pairs)[0]
    low, high = bootstrap_interval(correct[mask].astype(float), rows[mask].astype(str).tolist())
    return f"{100 * worst:.0f} [{100 * low:.0f}, {100 * high:.0f}], {100 * mean:.1f}"


def accuracy_by_window(draws: Sequence[dict[str, Any]], times_S: np.ndarray, length: int) -> list[tuple[float, float]]:
    """(middle, accuracy on the worst pair) of class tokens compared inside a window of timesteps alone."""
    pairs = np.concatenate([np.array(x["pairs"]) for x in draws])
    differences_NS = np.concatenate([np.array(x["variant"]) for x in draws])
    found = []
    for lo in np.arange(0, 1 - WINDOW + 1e-9, WINDOW / 2):
        inside = (times_S >= lo * length) & (times_S < (lo + WINDOW) * length)
        predicted = differences_NS[:, inside].sum(1) > 0
        found.append(((lo + WINDOW / 2) * length, worst_and_mean(predicted == pairs[:, 0], pairs)[0]))
    return found


def picture(kept: dict[str, Any], config: Config, backbone: Backbone) -> bytes:
    """PNG of three plots."""
    figure = Figure(figsize=(16, 5.2), dpi=110, layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.25, 1.25, 1))
    length = backbone.num_train_timesteps
    times_S = even_grid(config.trials, 0, length).numpy()
    colours = {SHIPPED: plots.BLACK, SOURCES["class tokens"]: plots.BLUE, SOURCES["network"]: plots.VERMILION}
    colours |= {SOURCES["features"]: plots.SKY, SOURCES["linear-network"]: plots.ORANGE, SCRATCH: plots.GREY}
    colours |= {SOURCES["tip-adapter:pocket"]: plots.GREEN}
    ends = []
    for method, colour in colours.items():
        y = [100 * worst_and_mean(*of_method(_draws(kept, s, config), method)[:2])[0] for s in config.strengths]
        left.plot([100 * s for s in config.strengths], y, "o-", color=colour, lw=2.5 if method == SHIPPED else 1.5)
        ends.append(plots.End(100 * config.strengths[-1], y[-1], method, colour, method == SHIPPED))
    _axes(left, "Images in the livery that goes with their variant in training, %")
    plots.label_ends(left, ends)
    shades = np.linspace(0.85, 0.0, len(config.strengths))
    ends = []
    for strength, shade in zip(config.strengths, shades, strict=True):
        points = accuracy_by_window(_draws(kept, strength, config), times_S, length)
        x, y = [p[0] for p in points], [100 * p[1] for p in points]
        blue = to_hex((shade * 0.8, shade * 0.85, 0.7 + 0.2 * shade))
        middle.plot(x, y, "o-", color=blue)
        ends.append(plots.End(x[-1], y[-1], f"{100 * strength:.0f} %", blue))
    _axes(middle, f"Timestep: middle of a window of {WINDOW * length:.0f}, class tokens alone")
    plots.label_ends(middle, ends)
    log_snr = snr(backbone.alphas_cumprod.double()).log()[torch.from_numpy(times_S)].numpy()
    draws = _draws(kept, config.strengths[0], config)
    pairs = np.concatenate([np.array(x["pairs"]) for x in draws])
    ends = []
    for name, column, colour in (("variant", 0, plots.BLUE), ("livery", 1, plots.ORANGE)):
        predicted = np.concatenate([np.array(x[name]) for x in draws]) > 0
        y = 100 * (predicted == pairs[:, [column]]).mean(0)
        right.plot(log_snr, y, color=colour)
        ends.append(plots.End(float(log_snr[-1]), float(y[-1]), name, colour))
    right.invert_xaxis()
    _axes(right, "log SNR of one trial (noise grows to the right)")
    right.set_ylabel("Accuracy of one trial, %")
    plots.label_ends(right, ends)
    left.set_ylabel("Accuracy on the worst pair of variant and livery, %")
    left.set_title("A livery that predicts the variant in training", loc="left", fontsize=11)
    middle.set_title("The same by window of timesteps, for each strength", loc="left", fontsize=11)
    right.set_title(f"Variant and livery by timestep, {100 * config.strengths[0]:.0f} %", loc="left", fontsize=11)
    return plots.png(figure)


def _axes(axes: Axes, label: str) -> None:
    axes.set(xlabel=label, ylim=(-3, 103))
    axes.axhline(50, color=plots.GREY, lw=0.8, ls=":")
    plots.tidy(axes)


def _draws(kept: dict[str, Any], strength: float, config: Config) -> list[dict[str, Any]]:
    return [kept[f"{strength}-{seed}"] for seed in config.seeds]


def _read(config: Config, backbone: Backbone) -> dict[str, Any]:
    """What is kept; raises ValueError where it was made with other settings."""
    decisive = ("variants", "liveries", "shots", "test", "trials", "scratch_steps")
    made_by = {name: str(getattr(config, name)) for name in decisive}
    made_by |= {
        "backbone": f"{backbone.hash} in {backbone.dtype}",
        "settings": str(recommended(config.shots, backbone.kind)),
    }
    kept = json.loads(config.output.read_text()) if config.output.is_file() else {"made_by": made_by}
    if kept["made_by"] != made_by:
        raise ValueError(f"{config.output} was made with other settings or another backbone; pass another --output.")
    return kept


def main(config: Config) -> None:
    """Fills in what is missing, prints a table, and draws."""
    backbone = Backbone.from_pretrained(config.backbone)
    kept = _read(config, backbone)
    missing = [(s, seed) for seed in config.seeds for s in config.strengths if f"{s}-{seed}" not in kept]
    if missing:
        _, renders = split_held_out(load_renders(config.data, (128, 256)), HELD_OUT)
        for strength, seed in missing:
            found = judge(config, backbone, renders, strength, seed)
            if strength == config.strengths[0]:
                found["livery"] = livery_differences(config, backbone, renders, seed)
            kept[f"{strength}-{seed}"] = found
            write_atomically(config.output, json.dumps(kept).encode())
            print(f"{strength}-{seed} is done", flush=True)
    images = config.test * len(config.seeds)
    title = (
        f"{' and '.join(config.variants)}, {config.shots} shots each: accuracy in % on the worst of four pairs "
        f"({images} images each) [95 % interval, bootstrap over images], mean of the four"
    )
    table = Table("method", *(f"{100 * s:.0f} %" for s in config.strengths), title=title)
    for method in (SHIPPED, EVEN, *SOURCES.values(), SCRATCH):
        table.add_row(method, *(cell(_draws(kept, s, config), method) for s in config.strengths))
    Console(width=160).print(table)
    if config.picture is not None:
        write_atomically(config.picture, picture(kept, config, backbone))


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
