"""Validation loss: how well each class token restores images of its class that it was not trained on; only shown."""

from __future__ import annotations

from rich.table import Table

from fewshot_diti.bank import Bank
from fewshot_diti.classifier import DiTiClassifier
from fewshot_diti.data.image_set import ImageSet
from fewshot_diti.distributed import gather, my_share
from fewshot_diti.progress import Progress
from fewshot_diti.scoring import Scorer
from fewshot_diti.trials import even_grid

_IMAGES, _TRIALS = 10, 24  # at most, of each class and of each image


def validation_losses(classifier: DiTiClassifier, val: ImageSet, bank: Bank | None = None) -> dict[str, list[float]]:
    """Mean error of each class's own class token on its first ten validation images, at trials that never change.

    The processes share the images; all get the whole. Classes that the bank lacks are left out.

    Args:
        bank: by default the classifier's. One that is still being trained is this process's own, and so is the work.
    """
    own, scoring = bank is not None, classifier.settings_.scoring
    bank = classifier.bank_ if bank is None else bank
    assert bank is not None, "fit comes first"
    batch_size = classifier.current_prediction().batch_size
    scorer = Scorer(classifier.backbone_, bank, seed=scoring.seed, batch_size=batch_size)
    grid = even_grid(min(scoring.trials, _TRIALS), *scoring.timesteps).tolist()
    found = []
    val = val.first_of_each_class(_IMAGES)
    rows = list(range(len(val))) if own else my_share(len(val))
    with Progress(len(rows), "validation", "image", minor=True) as bar:
        for row in rows:
            name = val.class_names[val.labels[row]]
            if name in bank.labels:
                image = classifier.encoder_.prepare(val.decode(row))
                latents = classifier.encoder_.latents([image])[0]
                errors = scorer.errors(latents, image.id, [bank.labels.index(name)], range(len(grid)), grid)
                found.append((name, float(errors.mean())))
            bar.update()
    everything = found if own else gather(found)
    return {str(label): [loss for name, loss in everything if name == label] for label in bank.labels}


def validation_table(losses: dict[str, list[float]]) -> Table:
    """What `validation_losses` found, class by class."""
    table = Table(title="validation images (shown only; nothing is chosen by them)")
    for title in ("class", "images", "validation loss"):
        table.add_column(title, justify="left" if title == "class" else "right")
    for name, values in losses.items():
        table.add_row(name, str(len(values)), f"{sum(values) / len(values):.5f}" if values else "")
    return table
