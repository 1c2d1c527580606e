"""Validation loss: how well each class token restores images of its class that it was not trained on; only shown."""

from __future__ import annotations

from rich.table import Table

from fewshot_diti.classifier import DiTiClassifier
from fewshot_diti.data.image_set import ImageSet
from fewshot_diti.distributed import gather, my_share
from fewshot_diti.scoring import Scorer
from fewshot_diti.trials import even_grid

_IMAGES, _TRIALS = 10, 24  # at most, of each class and of each image


def validation_losses(classifier: DiTiClassifier, val: ImageSet) -> dict[str, list[float]]:
    """Mean error of each class's own class token on its first ten validation images, at trials that never change.

    The processes share the images; all get the whole. Classes that the bank lacks are left out.
    """
    assert classifier.bank_ is not None, "fit comes first"
    bank, scoring = classifier.bank_, classifier.settings_.scoring
    batch_size = classifier.current_prediction().batch_size
    scorer = Scorer(classifier.backbone_, bank, seed=scoring.seed, batch_size=batch_size)
    grid = even_grid(min(scoring.trials, _TRIALS), *scoring.timesteps).tolist()
    found = []
    val = val.first_of_each_class(_IMAGES)
    for row in my_share(len(val)):
        name = val.class_names[val.labels[row]]
        if name in bank.labels:
            image = classifier.encoder_.prepare(val.decode(row))
            latents = classifier.encoder_.latents([image])[0]
            errors = scorer.errors(latents, image.id, [bank.labels.index(name)], range(len(grid)), grid)
            found.append((name, float(errors.mean())))
    everything = gather(found)
    return {str(label): [loss for name, loss in everything if name == label] for label in bank.labels}


def validation_table(losses: dict[str, list[float]]) -> Table:
    """What `validation_losses` found, class by class."""
    table = Table(title="validation images (shown only; nothing is chosen by them)")
    for title in ("class", "images", "validation loss"):
        table.add_column(title, justify="left" if title == "class" else "right")
    for name, values in losses.items():
        table.add_row(name, str(len(values)), f"{sum(values) / len(values):.5f}" if values else "")
    return table
