"""Images like none of the shots are found, in Python and on the command line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_classifier import SCORING, make, shots_of
from small_commands import read_lines

from fewshot_diti import Backbone, cli
from fewshot_diti.familiarity import Familiarity
from fewshot_diti.witnesses import FittedWitness
from fewshot_diti.witnesses.features import UnetWitness


def test_an_image_is_as_familiar_as_its_most_similar_shot() -> None:
    g = torch.Generator().manual_seed(0)
    corners = 3 * torch.eye(6)
    shots = {c: corners[c] + 0.1 * torch.randn(5, 1, 6, generator=g) for c in range(4)}
    familiarity = Familiarity(FittedWitness("features", UnetWitness(), shots, {}))
    everything = torch.cat(list(shots.values()))[:, 0]
    near, far = corners[0][None], corners[5][None]
    expected = torch.nn.functional.cosine_similarity(near - everything.mean(0), everything - everything.mean(0)).max()
    found = familiarity.similarities(torch.cat([near, far]))
    assert found[0] == pytest.approx(float(expected), abs=1e-5)
    assert found[0] > familiarity.least(0.05) > found[1]
    assert familiarity.least(0.5) > familiarity.least(0.1)
    for wrong in (0, 1, 5):
        with pytest.raises(ValueError, match=f"reject={wrong}"):
            familiarity.least(wrong)


def test_a_classifier_says_what_is_unknown(
    backbone: Backbone, pictures: dict[str, list[Path]], tests: list[Path]
) -> None:
    scoring = replace(SCORING, witnesses=("features",), witness_weights=(1.0,))
    images, labels = shots_of(pictures, ["a320", "dc-9", "tu-154"])
    classifier = make(backbone, scoring=scoring).fit(images, labels)
    assert not classifier.is_unknown(images).any()  # a shot is its own most similar one
    similarities = classifier.decider().similarities(tests, classifier.current_prediction())
    least = classifier.decider().familiarity.least(0.5)
    assert classifier.is_unknown(tests, reject=0.5).tolist() == (similarities < least).tolist()
    assert classifier.is_unknown(tests[0], reject=0.5) is bool(similarities[0] < least)
    with pytest.raises(ValueError, match="this bank keeps none"):
        make(backbone).fit(images, labels).is_unknown(tests)


def test_score_marks_what_it_rejects(
    quick_train: None,
    bank: Path,
    shots: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = ["score", "--bank", str(bank), str(shots), "--output", str(tmp_path / "out.jsonl"), "--reject", "0.01"]
    assert cli.main(command) == 0
    records = read_lines(tmp_path / "out.jsonl")
    assert all(record["similarity"] == pytest.approx(1, abs=1e-3) and not record["rejected"] for record in records)
    assert "0 rejected" in capsys.readouterr().out
    monkeypatch.setattr(Familiarity, "least", lambda *_: 1.5)
    again = ["score", "--bank", str(bank), str(shots), "--output", str(tmp_path / "all.csv"), "--reject", "0.5"]
    assert cli.main(again) == 0
    out = capsys.readouterr().out
    assert f"like none of the shots: {records[0]['path']}" in out and "9 rejected" in out
    assert (tmp_path / "all.csv").read_text().count(",True,") >= 9
    with pytest.raises(SystemExit):
        cli.main([*again[:-1], "1"])
