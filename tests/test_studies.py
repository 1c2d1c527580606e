"""Studies in `eval/`, at tiny size."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_grid import PRESET, SCORING

from eval import information, witness_gain
from fewshot_diti import Backbone
from fewshot_diti.commands.evaluate import EvalConfig
from fewshot_diti.evaluation.grid import Grid
from fewshot_diti.evaluation.shipped import trained_classifier
from fewshot_diti.presets import PRESETS
from recipes.pocket.renders import as_batch
from recipes.pocket.siblings import train_siblings
from tests.test_pretrained_baselines import tiny_siblings
from tests.test_pretraining import data as renders  # noqa: F401, a fixture

CPU = torch.device("cpu")


@pytest.mark.usefixtures("small_settings")
def test_the_gain_of_a_witness_is_what_the_decision_loses_without_it(
    config: EvalConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scoring = asdict(replace(SCORING, witnesses=("features",), witness_weights=(1.0,)))
    monkeypatch.setitem(PRESETS, "pocket", replace(PRESET, scoring=scoring))
    few = replace(config, methods=("fewshot-diti",), against="fewshot-diti", shots=(2,), trials=None, dtype="float32")
    grid = Grid(few)
    assert grid.run_missing() == []
    task = grid.task(2, 1)
    found = witness_gain.read_evidence(grid, task)
    record = json.loads((few.folder / "fewshot-diti" / "2-1.json").read_text())
    said = [task.class_names[c] for c in found.predicted()]
    assert said == [p["label"] for p in record["predictions"]]

    classifier, _ = trained_classifier(grid.bench, task)
    evidence = classifier.evidence(task.test_images())
    order = [classifier.classes_.tolist().index(name) for name in task.class_names]
    for name, logits in found.logits.items():  # a constant for each image apart
        expected = evidence[name][:, order].numpy()
        ours, theirs = (x - x.max(1, keepdims=True) for x in (logits, expected))
        np.testing.assert_allclose(ours, theirs, atol=1e-3)
    assert (found.predicted(without="features") == found.predicted(alone="class tokens")).all()

    picture = few.output_dir / "picture.png"
    witness_gain.main(witness_gain.Config(grid=few, picture=picture))
    assert picture.is_file() and "without features" in capsys.readouterr().out


def test_a_network_that_sees_latents_sees_what_the_backbone_does(
    renders: Path,  # noqa: F811
    tmp_path: Path,
    backbone: Backbone,
) -> None:
    pixels = torch.randint(0, 256, (3, 3, 16, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    view = information.view_of("latents", backbone)
    latents, _ = backbone.encode_images(as_batch(pixels, CPU))
    batch = view.batch(view.keep(pixels), CPU)
    assert batch.shape == (3, 4, 16, 32)
    torch.testing.assert_close(batch[:, :, ::2, ::2], latents, rtol=1e-3, atol=1e-3)
    restored = information.view_of("restored", backbone).keep(pixels)
    assert restored.dtype == torch.uint8 and restored.shape == pixels.shape and not torch.equal(restored, pixels)

    network = train_siblings(tiny_siblings(renders, tmp_path), view)
    found = information.features(network, view, pixels)
    assert found.shape[0] == 3 and np.isfinite(found).all() and not np.allclose(found[0], found[1])
