"""Builds the images that ship, fewshot_diti/assets/aircraft/, from a tree in FGVC-Aircraft's layout with liveries.

    python -m recipes.pocket.bundle_aircraft --data flightgear-aircraft

Takes every train image and, per variant, 10 test images in liveries of the train split and 10 in others, the first by
image id. The same tree gives the same files, byte by byte, in seconds on one core.
"""

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from fewshot_diti.data import ImageSet, load_fgvc, seen_attribute
from fewshot_diti.files import write_atomically

TEST_IMAGES = 10  # per variant, in liveries of the train split and again in others
COLUMNS = ("image", "variant", "manufacturer", "family", "airline", "split")
README = """# Bundled aircraft images

{images} images of {variants} airliner variants, {train} for training and {test} for testing, 256 x 128 pixels:
rendered side views of the AI fleet of the flight simulator FlightGear, in real airlines' liveries. Of a variant's test
images {half} wear liveries that its train images wear and {half} wear others. `attributes.csv` gives each image's
variant, manufacturer, family, airline (empty: no airline's livery) and split.

Origin: models and textures of the Debian package flightgear-data-ai 2020.3.16 (source package flightgear-data,
<https://packages.debian.org/flightgear-data-ai>), aircraft by many authors, named in that package's documentation.

Licence: GPL-2-or-later, as the models; the text is in `COPYING`. It covers the files of this folder, not the code of
the project. Airline names and logos belong to their owners.

Written by `recipes/pocket/bundle_aircraft.py`; do not edit by hand.
"""


@dataclass(frozen=True, kw_only=True)
class BundleConfig:
    """Where from and where to.

    Attributes:
        data: folder in FGVC-Aircraft's layout with an attributes.csv that has an airline column.
        output_dir: folder to write.
    """

    data: Path
    output_dir: Path = Path("fewshot_diti/assets/aircraft")


def choose_test(train: ImageSet, test: ImageSet, count: int) -> ImageSet:
    """The first `count` test images by image id, of each variant, in liveries seen in train and in others."""
    seen = seen_attribute(train, test)
    by_id = np.argsort(np.array(test.ids))
    chosen: list[int] = []
    for label, variant in enumerate(test.class_names):
        for kind in (True, False):
            rows = [row for row in by_id if test.labels[row] == label and seen[row] == kind]
            if len(rows) < count:
                raise ValueError(
                    f"{variant} has {len(rows)} test images with livery seen = {kind}; {count} are needed."
                )
            chosen += rows[:count]
    return test.subset(sorted(chosen))


def bundle_aircraft(config: BundleConfig) -> None:
    """Writes images, attributes.csv and README.md."""
    train = load_fgvc(config.data, "train")
    test = choose_test(train, load_fgvc(config.data, "test"), TEST_IMAGES)
    table = io.StringIO(newline="")
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(COLUMNS)
    for split, part in (("train", train), ("test", test)):
        for row, path in enumerate(map(Path, part.names)):
            write_atomically(config.output_dir / "images" / path.name, path.read_bytes())
            attributes = {key: values[row] for key, values in part.attributes.items()} | {"split": split}
            writer.writerow([path.stem, *(attributes[column] for column in COLUMNS[1:])])
    readme = README.format(
        images=len(train) + len(test),
        variants=len(train.class_names),
        train=len(train),
        test=len(test),
        half=TEST_IMAGES,
    )
    write_atomically(config.output_dir / "README.md", readme.encode())
    write_atomically(config.output_dir / "attributes.csv", table.getvalue().encode())


if __name__ == "__main__":
    bundle_aircraft(tyro.cli(BundleConfig))
