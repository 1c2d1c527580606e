"""Eight threads use one classifier at a time, while a class is added and the bank is saved."""

from __future__ import annotations

import threading
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_classifier import SCORING, make, shots_of

from fewshot_diti import Backbone, Bank, DiTiClassifier
from fewshot_diti.config import ScoringConfig

Count = Callable[[str, object], None]
PATIENCE = 1200  # seconds; a deadlock would last for ever


def together(jobs: list[Callable[[], Any]]) -> list[Any]:
    """What the jobs give, each in a thread; raises the first error, or AssertionError where one does not end."""
    found: list[Any] = [None] * len(jobs)
    start = threading.Barrier(len(jobs))

    def work(place: int) -> None:
        try:
            start.wait()
            found[place] = jobs[place]()
        except BaseException as error:
            found[place] = error

    threads = [threading.Thread(target=work, args=(place,), daemon=True) for place in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads), "a deadlock"
    for result in found:
        if isinstance(result, BaseException):
            raise result
    return found


@pytest.fixture(scope="module")
def classifier(backbone: Backbone, pictures: dict[str, list[Path]]) -> DiTiClassifier:
    scoring = ScoringConfig(**{**vars(SCORING), "witnesses": ("features",), "witness_weights": (0.001,)})
    return make(backbone, concept="aircraft", scoring=scoring).fit(*shots_of(pictures, ["tu-154", "a320", "dc-9"]))


def test_threads_that_predict_explain_add_and_save_get_right_answers(
    classifier: DiTiClassifier,
    backbone: Backbone,
    pictures: dict[str, list[Path]],
    tmp_path: Path,
    thorough: bool,
    record_property: Count,
) -> None:
    images = [paths[3] for paths in pictures.values()] + [paths[2] for paths in pictures.values()]
    shots = [str(path) for path in pictures["747"][:2]]
    before, after = copy(classifier), copy(classifier)
    after.add_classes(shots, ["747"] * 2)
    right = {}
    for one in (before, after):
        one._made = None
        right[len(one.classes_)] = {
            "scores": one.scores(images).numpy(),
            "labels": one.predict(images).tolist(),
            "sets": one.is_unknown(images).tolist(),
            "explained": one.explain(images[0]).label,
        }
    whole, frozen = after.bank_, dict(backbone.unet.state_dict())
    assert whole is not None
    rounds, answers, saved = (20 if thorough else 1), 0, 0
    for _ in range(rounds):
        used = copy(classifier)
        used._made = None

        def scores(used: DiTiClassifier = used) -> list[Any]:
            return [used.scores([image]).numpy()[0] for image in images]

        def labels(used: DiTiClassifier = used) -> list[Any]:
            return used.predict(images).tolist()

        def unknown(used: DiTiClassifier = used) -> list[bool]:
            return used.is_unknown(images).tolist()

        def explained(used: DiTiClassifier = used) -> str:
            return used.explain(images[0]).label

        def add(used: DiTiClassifier = used) -> None:
            used.add_classes(shots, ["747"] * 2)

        def save(used: DiTiClassifier = used) -> int:
            for _ in range(3):
                used.save_pretrained(tmp_path / "bank")
                loaded = DiTiClassifier.from_pretrained(tmp_path / "bank", backbone)
                assert len(loaded.classes_) in (3, 4) and loaded.classes_.tolist() == list(loaded.bank_.labels)
            return 3

        def answered(used: DiTiClassifier = used) -> list[list[str]]:
            pipeline = used.as_pipeline()
            return [[best["label"] for best in pipeline(image, top_k=1)] for image in images]

        found = together([scores, labels, unknown, explained, add, save, answered, labels])
        for place, row in enumerate(found[0]):
            assert np.abs(row - right[len(row)]["scores"][place]).max() <= 1e-5
        for place, (label,) in enumerate(found[6]):
            assert label in [known["labels"][place] for known in right.values()]
        answers += 2 * len(images)
        for each in (found[1], found[7]):
            assert each in [known["labels"] for known in right.values()]
            answers += len(each)
        assert found[2] in [known["sets"] for known in right.values()]
        assert found[3] in [known["explained"] for known in right.values()]
        answers += len(images) + 1
        saved += found[5]
        assert used.bank_ == whole, "the class was learned as in one thread, to the bit"
        used.save_pretrained(tmp_path / "bank")
        assert Bank.from_pretrained(tmp_path / "bank") == whole
    left = [m for network in backbone.networks.values() for m in network.modules() if "adapters" in m.__dict__]
    assert not left and all(value.equal(frozen[name]) for name, value in backbone.unet.state_dict().items())
    record_property("answers compared", answers)
    record_property("banks saved and loaded meanwhile", saved)
    record_property("wrong", 0)
