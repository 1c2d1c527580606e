"""Which time-steps decide? Accuracy of small t, all t, large t, auto and tif on the bundled images, by shots and seed.

    python -m eval.timesteps --shots 1 2 4 8 16 --seeds 1 2 3 --output_dir results/timesteps

Class tokens are trained and scored once for each (shots, seed); every row reads the same errors. What is on
disk already is not computed again.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
import tyro
from safetensors.torch import load_file, save
from torch import Tensor

from fewshot_diti import Backbone, timesteps
from fewshot_diti.bank import Bank, ClassToken
from fewshot_diti.calibration import candidate_windows, choose_window
from fewshot_diti.classifier import DiTiClassifier
from fewshot_diti.data.shots import check_disjoint, sample_shots, seen_attribute
from fewshot_diti.data.sources import load_images
from fewshot_diti.files import write_atomically
from fewshot_diti.recommended import ScoringConfig
from fewshot_diti.scoring import Scorer, error_tensor
from fewshot_diti.training import Label, TrainingConfig

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SMALL_T, LARGE_T = 300, 500


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What to run.

    Attributes:
        data: as `load_images` reads it, with splits train and test.
        trials: S, evenly over all t.
        folds: of cross-validation on the shots, for `auto`; 0 leaves that row out. k = 1 has none.
        training: steps and so on; None takes the recommended ones.
    """

    data: str = "bundled"
    backbone: str = "pocket"
    shots: tuple[int, ...] = (1, 2, 4, 8, 16)
    seeds: tuple[int, ...] = (1, 2, 3)
    trials: int = 24
    folds: int = 0
    test_images: int = 240
    output_dir: Path = Path("results/timesteps")
    training: TrainingConfig | None = None


def run_one(grid: Grid, backbone: Backbone, num_shots: int, seed: int) -> dict[str, Tensor]:
    """Errors on the test images and on the shots, latents, classes, and which test liveries were seen."""
    folder = grid.output_dir / f"{num_shots}-{seed}"
    path = folder / "errors.safetensors"
    if path.is_file():
        return load_file(path)
    train, test = load_images(grid.data, "train"), load_images(grid.data, "test")
    test = test.subset(range(0, len(test), max(1, len(test) // grid.test_images)))
    shots = train.subset(sample_shots(train, num_shots, seed).rows(train))
    check_disjoint(shots, test)
    folds = grid.folds if num_shots > 1 else 0
    classifier = DiTiClassifier(
        backbone,
        training=grid.training,
        scoring=ScoringConfig(
            trials=grid.trials, weighting="uniform", unet_scale=1.0, text_encoder_scale=1.0, seed=seed
        ),
    )
    images = [shots.image(i) for i in range(len(shots))]
    classifier.fit(images, [shots.class_names[c] for c in shots.labels])
    order = [classifier.classes_.tolist().index(n) for n in test.class_names]
    tensors = {
        "test_errors": classifier.errors([test.image(i) for i in range(len(test))]),
        "shot_errors": classifier.errors(images[:: max(1, len(images) // 48)]),
        "test_labels": torch.tensor([order[c] for c in test.labels]),
        "shot_labels": torch.tensor([order[c] for c in shots.labels]),
        "seen": torch.from_numpy(seen_attribute(shots, test)),
        "timesteps": torch.tensor(classifier.calibration_.timesteps),
        "shot_latents": classifier.learner.encode(images),
        "test_latents": classifier.learner.encode([test.image(i) for i in range(len(test))]),
    }
    if folds:
        groups: dict[Label, list] = defaultdict(list)
        for image, c in zip(images, shots.labels, strict=True):
            groups[shots.class_names[c]].append(image)
        held_out, truth = classifier.learner.held_out_errors(groups, tensors["timesteps"], folds)
        tensors |= {"held_out_errors": held_out, "held_out_labels": truth}
    classifier.save_pretrained(folder / "bank")
    write_atomically(path, save({k: v.contiguous() for k, v in tensors.items()}))
    airlines = [test.attributes["airline"][i] for i in range(len(test))]
    record = {"num_shots": num_shots, "seed": seed, "airlines": airlines, "backbone_hash": backbone.hash}
    write_atomically(folder / "run.json", (json.dumps(record | {"grid": asdict(grid)}, default=str) + "\n").encode())
    return tensors


def run_zero_shot(grid: Grid, backbone: Backbone, reference: dict[str, Tensor]) -> Tensor:
    """Errors of the class names alone, without any LoRA, on the same test images and trials."""
    path = grid.output_dir / "zero-shot.safetensors"
    if not path.is_file():
        test = load_images(grid.data, "test")
        test = test.subset(range(0, len(test), max(1, len(test) // grid.test_images)))
        some = Bank.load(grid.output_dir / f"{grid.shots[0]}-{grid.seeds[0]}" / "bank")
        tokens = tuple(
            ClassToken(label=x, prompt=f"a photo of a {x}, a type of aircraft.", num_shots=0) for x in some.labels
        )
        bank = Bank(**(vars(some) | {"tokens": tokens, "rows": torch.zeros_like(some.rows)}))
        errors = error_tensor(
            Scorer(backbone, bank),
            reference["test_latents"],
            test.ids,
            reference["timesteps"].tolist(),
            desc="zero-shot",
        )
        write_atomically(path, save({"errors": errors}))
    return load_file(path)["errors"]


def predictions(run: dict[str, Tensor], zero_shot: Tensor, abar: Tensor) -> dict[str, Tensor]:
    """Predicted class of every test image under each row of the table."""
    t, errors = run["timesteps"], run["test_errors"]

    def predict(weights_T: Tensor, errors: Tensor = errors) -> Tensor:
        return timesteps.score(errors, timesteps.trial_weights(weights_T, t)).argmin(1)

    big_t = len(abar)
    d = timesteps.attribute_distance(run["shot_latents"], run["shot_labels"])
    rows = {
        "zero-shot pocket": predict(timesteps.uniform(abar), zero_shot),
        "nearest neighbour in latents": run["shot_labels"][
            torch.cdist(run["test_latents"].flatten(1), run["shot_latents"].flatten(1)).argmin(1)
        ],
        f"small t (below {SMALL_T})": predict(timesteps.window(abar, 0, SMALL_T)),
        f"large t (from {LARGE_T})": predict(timesteps.window(abar, LARGE_T, big_t)),
        "all t, uniform": predict(timesteps.uniform(abar)),
        "all t, spread weights": predict(timesteps.spread(run["shot_errors"], t, big_t)),
        "tif weights": predict(timesteps.tif(abar, d)),
        "pdae weights": predict(timesteps.pdae(abar)),
    }
    if "held_out_errors" in run:
        window = choose_window(run["held_out_errors"], run["held_out_labels"], t, candidate_windows(big_t))
        rows["auto window"] = predict(timesteps.window(abar, *window))
    return rows


def bootstrap_interval(correct_N: np.ndarray, groups: list[str], samples: int = 2000) -> tuple[float, float]:
    """95 % interval of the mean under resampling of whole groups (liveries), seeded."""
    names = sorted(set(groups))
    index = np.array([names.index(g) for g in groups])
    hits, sizes = np.bincount(index, correct_N, len(names)), np.bincount(index, minlength=len(names))
    draws = np.random.default_rng(0).integers(len(names), size=(samples, len(names)))
    low, high = np.quantile(hits[draws].sum(1) / sizes[draws].sum(1), [0.025, 0.975])
    return float(low), float(high)


def report(grid: Grid, backbone: Backbone) -> str:
    """Runs what is missing; returns the table in Markdown and writes table and plot."""
    abar = backbone.alphas_cumprod
    accuracy: dict[str, dict[int, list[tuple[float, float, float]]]] = defaultdict(lambda: defaultdict(list))
    pooled: dict[tuple[str, int], list[tuple[np.ndarray, list[str]]]] = defaultdict(list)
    for num_shots in grid.shots:
        for seed in grid.seeds:
            run = run_one(grid, backbone, num_shots, seed)
            airlines = json.loads((grid.output_dir / f"{num_shots}-{seed}" / "run.json").read_text())["airlines"]
            seen = run["seen"].numpy()
            for name, predicted in predictions(run, run_zero_shot(grid, backbone, run), abar).items():
                hit = (predicted == run["test_labels"]).double().numpy()
                parts = [100 * float(hit[m].mean()) if m.any() else float("nan") for m in (seen | True, seen, ~seen)]
                accuracy[name][num_shots].append((parts[0], parts[1], parts[2]))
                pooled[name, num_shots].append((hit, airlines))
    lines = ["| | " + " | ".join(f"{k} shots" for k in grid.shots) + " |", "|---" * (len(grid.shots) + 1) + "|"]
    for name, by_shots in accuracy.items():
        cells = []
        for k in grid.shots:
            if not by_shots[k]:
                cells.append("")
                continue
            mean = np.nanmean(np.array(by_shots[k]), 0)
            hits = np.concatenate([h for h, _ in pooled[name, k]])
            low, high = bootstrap_interval(hits, [a for _, airlines in pooled[name, k] for a in airlines])
            cells.append(f"{mean[0]:.1f} [{100 * low:.1f}, {100 * high:.1f}] ({mean[1]:.1f} / {mean[2]:.1f})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    table = "\n".join(lines) + "\n"
    write_atomically(grid.output_dir / "table.md", table.encode())
    plot(grid, {n: {k: [x[0] for x in v] for k, v in by.items()} for n, by in accuracy.items()})
    return table


def plot(grid: Grid, accuracy: dict[str, dict[int, list[float]]]) -> None:
    """Accuracy over shots with the range over seeds."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, by_shots in accuracy.items():
        shots = [k for k in grid.shots if by_shots[k]]
        values = [np.array(by_shots[k]) for k in shots]
        (line,) = axes.plot(shots, [v.mean() for v in values], marker="o", label=name)
        axes.fill_between(
            shots, [v.min() for v in values], [v.max() for v in values], color=line.get_color(), alpha=0.15, lw=0
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(grid.shots, [str(k) for k in grid.shots])
    axes.set_xlabel("shots a class")
    axes.set_ylabel("accuracy (%)")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(grid.output_dir / "accuracy.png", dpi=130)


if __name__ == "__main__":
    grid = tyro.cli(Grid)
    print(report(grid, Backbone.from_pretrained(grid.backbone)))
