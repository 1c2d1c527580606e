"""Explanations: map and curve are the scorer's own errors, neighbours are the nearest shots, a figure shows all."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_classifier import SCORING, make, shots_of
from small_commands import CLASSES as PARTS

from fewshot_diti import Backbone, DiTiClassifier, cli
from fewshot_diti.encoding import Encoder
from fewshot_diti.explain import REPEATS, TIMES, Neighbour
from fewshot_diti.scoring import Scorer

CLASSES = ["a320", "dc-9", "tu-154"]


@pytest.fixture(scope="module")
def classifier(backbone: Backbone, pictures: dict[str, list[Path]]) -> DiTiClassifier:
    scoring = replace(SCORING, witnesses=("features",), witness_weights=(1.0,))
    return make(backbone, scoring=scoring).fit(*shots_of(pictures, CLASSES))


def test_the_map_is_the_difference_of_the_scores_by_position(classifier: DiTiClassifier, tests: list[Path]) -> None:
    x = classifier.explain(tests[0])
    [decision] = classifier.decide([tests[0]])
    assert x.label == classifier.predict(tests[0]) == classifier.classes_[decision.position]
    assert list(x.probabilities)[:2] == [x.label, x.rival] and len(x.probabilities) == 3
    np.testing.assert_allclose(list(x.probabilities.values()), np.sort(classifier.predict_proba(tests[0]))[::-1])
    errors_CS = classifier.errors([tests[0]])[0].double()
    weights_S = torch.tensor(classifier.calibration_.weights, dtype=torch.float64)
    own_C = (errors_CS * weights_S).mean(1)
    first, second = (CLASSES.index(str(label)) for label in (x.label, x.rival))
    assert x.evidence.shape == x.picture.size[::-1]
    assert x.evidence.mean() == pytest.approx(float(own_C[second] - own_C[first]), rel=0.02, abs=1e-6)


def test_maps_by_position_have_the_errors_as_their_means(classifier: DiTiClassifier, tests: list[Path]) -> None:
    image = classifier.encoder_.prepare(tests[0])
    latents = classifier.encoder_.latents([image])[0]
    assert classifier.bank_ is not None
    scorer = Scorer(classifier.backbone_, classifier.bank_, batch_size=2)
    maps = scorer.error_maps(latents, image.id, (2, 0), range(3), (5, 300, 900))
    errors = scorer.errors(latents, image.id, (2, 0), range(3), (5, 300, 900))
    assert maps.shape == (2, 3, *latents.shape[1:])
    torch.testing.assert_close(maps.mean((2, 3)), errors, rtol=0, atol=1e-5)


def test_the_curve_has_trials_of_its_own_and_their_standard_errors(
    classifier: DiTiClassifier, tests: list[Path]
) -> None:
    x = classifier.explain(tests[0])
    assert len(x.timesteps) == len(x.differences) == len(x.standard_errors) == TIMES
    assert list(x.timesteps) == sorted(set(x.timesteps)) and (x.standard_errors > 0).all()
    image = classifier.encoder_.prepare(tests[0])
    latents = classifier.encoder_.latents([image])[0]
    assert classifier.bank_ is not None
    scorer = Scorer(classifier.backbone_, classifier.bank_, seed=classifier.settings_.scoring.seed)
    pair = [CLASSES.index(str(label)) for label in (x.label, x.rival)]
    first = len(classifier.calibration_.timesteps)
    errors = scorer.errors(latents, image.id, pair, range(first, first + REPEATS), [x.timesteps[0]] * REPEATS).double()
    gaps = (200 * (errors[1] - errors[0]) / errors.sum(0)).numpy()
    assert x.differences[0] == pytest.approx(gaps.mean(), abs=1e-3)
    assert x.standard_errors[0] == pytest.approx(gaps.std(ddof=1) / REPEATS**0.5, abs=1e-3)


def test_a_shot_is_its_own_nearest_neighbour(classifier: DiTiClassifier, pictures: dict[str, list[Path]]) -> None:
    for place, path in enumerate(pictures["dc-9"][:2]):
        found = classifier.explain(path).neighbours
        nearest: Neighbour = found["dc-9"][0]
        assert (nearest.place, nearest.picture) == (place, None) and nearest.similarity == pytest.approx(1, abs=1e-3)
        others = [n.similarity for label in found for n in found[label] if n is not nearest]
        assert max(others) < nearest.similarity


def test_a_figure_is_drawn_whatever_the_classes_are_called(
    backbone: Backbone, pictures: dict[str, list[Path]], tests: list[Path]
) -> None:
    images, _ = shots_of(pictures, CLASSES)
    names = ["$x_1$ <b> & 100 %", "x" * 300, "\u98de\u673a\n"]
    labels = [name for name in names for _ in range(len(images) // 3)]
    plain = make(backbone, scoring=SCORING, prompt_template="a photo").fit(images, labels)
    x = plain.explain(tests[0], top=2)
    assert x.neighbours == {} and list(x.sources) == ["class tokens"] and len(x.probabilities) == 2
    assert Image.open(io.BytesIO(x.figure())).size[0] > 1000
    with pytest.raises(ValueError, match="two are needed"):
        plain.explain(tests[0], top=1)


def test_explain_writes_a_picture_for_each_image(
    quick_train: None, bank: Path, shots: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    images = [str(shots / part / "0.png") for part in PARTS]
    command = ["explain", "--bank", str(bank), "--output_dir", str(tmp_path / "why")]
    assert cli.main([*command, *images, str(broken)]) == 1
    out = capsys.readouterr().out
    assert f"not explained: {broken}" in out
    records = [json.loads(line) for line in (tmp_path / "why" / "explanations.jsonl").read_text().splitlines()]
    assert [record["path"] for record in records] == images
    for record in records:
        assert (tmp_path / "why" / record["picture"]).read_bytes().startswith(b"\x89PNG")
        assert set(record["sources"]) == {"class tokens", "features"} and record["label"] in record["neighbours"]
    before = (tmp_path / "why" / "explanations.jsonl").read_bytes()
    for again, status in ((images[1], 0), (str(broken), 1)):  # what was explained before stays
        assert cli.main([*command, again]) == status
        assert (tmp_path / "why" / "explanations.jsonl").read_bytes() == before
    for name in ("x", "y"):  # one picture under two names
        (tmp_path / name).mkdir()
        shutil.copy(images[0], tmp_path / name / "z.png")
    assert cli.main([*command, str(tmp_path / "x"), str(tmp_path / "y")]) == 0
    assert (tmp_path / "why" / "explanations.jsonl").read_text().count("z.png") == 2
    other = DiTiClassifier.from_pretrained(bank)
    other.remove_classes(other.classes_[:1].tolist())
    other.save_pretrained(tmp_path / "other")
    pictures = set((tmp_path / "why").glob("*.png"))
    again = ["explain", "--bank", str(tmp_path / "other"), "--output_dir", str(tmp_path / "why"), images[0]]
    assert cli.main(again) == 0  # another bank writes beside the first
    assert len(set((tmp_path / "why").glob("*.png")) - pictures) == 1
    records = [json.loads(line) for line in (tmp_path / "why" / "explanations.jsonl").read_text().splitlines()]
    assert len(records) == len(images) + 3 and len({record["bank"] for record in records}) == 2


def test_explain_writes_over_nothing_but_its_own_files(
    quick_train: None, bank: Path, shots: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "a_0", "a-0"):
        shutil.copy(shots / PARTS[0] / "0.png", tmp_path / f"{name}.png")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    command = ["explain", "--bank", str(bank), "--output_dir", str(tmp_path), str(tmp_path / "a.png")]
    for _ in range(2):  # the second time its own are there
        assert cli.main(command) == 0
        assert {path: path.read_bytes() for path in before} == before and len(list(tmp_path.iterdir())) == 5
    (tmp_path / "explanations.jsonl").write_text("mine\n")
    assert cli.main(command) == 2 and "no output of explain" in capsys.readouterr().err


def test_what_was_explained_is_kept_where_the_next_image_ends_it(
    quick_train: None, bank: Path, shots: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, calls = DiTiClassifier.explain, []

    def interrupted(self: DiTiClassifier, *given: Any) -> Any:
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(self, *given)

    monkeypatch.setattr(DiTiClassifier, "explain", interrupted)
    assert cli.main(["explain", "--bank", str(bank), "--output_dir", str(tmp_path), str(shots)]) == 130
    assert len((tmp_path / "explanations.jsonl").read_text().splitlines()) == len(list(tmp_path.glob("*.png"))) == 1


def test_an_image_is_encoded_and_its_features_are_read_once(
    classifier: DiTiClassifier, pictures: dict[str, list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {"latents": 0, "features": 0}
    for name in counts:
        monkeypatch.setattr(Encoder, name, counted(getattr(Encoder, name), counts, name))
    classifier.explain(pictures["747"][0])
    assert counts == {"latents": 1, "features": 1}
    images = pictures["747"][1:3]
    assert len(classifier.is_unknown(images)) == 2
    classifier.predict(images)
    classifier.evidence(images)
    assert counts == {"latents": 3, "features": 3}


def counted(whole: Callable[..., torch.Tensor], counts: dict[str, int], name: str) -> Callable[..., torch.Tensor]:
    def count(self: Encoder, images: Any) -> torch.Tensor:
        counts[name] += len(images)
        return whole(self, images)

    return count
