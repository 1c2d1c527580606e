"""Rows of a few-shot table, each computed a second way from the same draw."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from fewshot_diti.held_out import split_folds
from fewshot_diti.recommended import ScoringConfig
from scipy.special import softmax
from small_grid import QUIET, TRAINING

from fewshot_diti import DiTiClassifier, features
from fewshot_diti.baselines import ClipLora, TipAdapter
from fewshot_diti.commands.evaluate import EvalConfig, evaluate
from fewshot_diti.evaluation import class_tokens
from fewshot_diti.evaluation.grid import Grid
from fewshot_diti.evaluation.methods import METHODS

pytestmark = pytest.mark.usefixtures("small_settings")


def test_the_trained_baselines_run(config: EvalConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ClipLora, "_cross_validate", lambda *_: 2)
    few = replace(config, methods=("clip-lora", "finetune"), shots=(2,), against="finetune", training_share=0.01)
    assert evaluate(few, QUIET) == 0
    record = json.loads((few.folder / "clip-lora" / "2-1.json").read_text())
    assert record["chosen"] == {"steps_": 2}
    assert len(Grid(replace(few, training_share=0.02)).missing()) == 2


def test_test_labels_take_no_part_in_any_row(config: EvalConfig) -> None:
    names = tuple(name for name, method in METHODS.items() if not method.trains_a_network)
    said: list[dict[str, np.ndarray]] = []
    for permuted in (False, True):
        grid = Grid(replace(config, methods=names, shots=(2,), output_dir=config.output_dir / str(permuted)))
        task = grid.task(2, 1)
        if permuted:
            labels = np.roll(task.test.labels, 1)
            assert (labels != task.test.labels).any()
            task = replace(task, test=replace(task.test, labels=labels))
        grid.bench.prepare(task)
        grid.bench.prepare_zero_shot(task.test)
        said.append({name: METHODS[name].run(grid.bench, task).probabilities for name in names})
    for name in names:
        np.testing.assert_array_equal(said[0][name], said[1][name], err_msg=name)


def test_rows_of_class_tokens_are_what_the_classifier_says(config: EvalConfig) -> None:
    grid = Grid(replace(config, methods=("diti-all-t",), against="diti-all-t", shots=(2,)))
    assert grid.run_missing() == []
    task = grid.task(2, 1)
    scoring = ScoringConfig(trials=3, weighting="uniform", seed=1, unet_scale=0.6, text_encoder_scale=0.7)
    classifier = DiTiClassifier(config.backbone, concept="part", training=replace(TRAINING, seed=1), scoring=scoring)
    classifier.fit(task.shot_images(), task.shot_labels())
    record = json.loads((grid.config.folder / "diti-all-t" / "2-1.json").read_text())
    assert [p["label"] for p in record["predictions"]] == classifier.predict(task.test_images()).tolist()


def test_features_of_the_unet_take_their_weight_off_the_scores(
    config: EvalConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    # held-out shots tell a random U-Net that it knows nothing
    monkeypatch.setattr(features, "fit_temperature", lambda *_: 1.0)
    monkeypatch.setattr(class_tokens, "fit_temperature", lambda *_: 0.1)
    exact = replace(config, dtype="float32")  # bfloat16 rounds differently from batch to batch
    grid = Grid(replace(exact, methods=("diti-all-t", "diti+sd", "lda-sd"), against="lda-sd", shots=(2,)))
    assert grid.run_missing() == []
    task, bench = grid.task(2, 1), grid.bench
    errors = bench.diti(task)
    weights = 1 / errors.held_out.double().mean((0, 1))  # SCORING's
    tokens = (errors.test.double() * weights / weights.mean()).mean(2).numpy()
    learner = DiTiClassifier(
        bench.backbone, concept="part", training=replace(TRAINING, seed=1), scoring=ScoringConfig(features_weight=1)
    ).learner
    lda, classes = features.fit_discriminant(learner.shot_features(task.groups())), sorted(task.class_names)
    said = lda.log_probabilities(learner.features(learner.encode(list(task.test_images())))).numpy()
    said = said[:, [classes.index(name) for name in task.class_names]]
    records = {m: json.loads((grid.config.folder / m / "2-1.json").read_text()) for m in grid.config.methods}
    predicted = {m: [p["label"] for p in record["predictions"]] for m, record in records.items()}
    assert predicted["lda-sd"] == [task.class_names[c] for c in said.argmax(1)]
    chosen = records["diti+sd"]["chosen"]
    assert chosen["features_weight"] > 0
    probabilities = softmax((-tokens + chosen["features_weight"] * said) / chosen["temperature"], axis=1)
    assert predicted["diti+sd"] == [task.class_names[c] for c in probabilities.argmax(1)]
    second, first = np.sort(probabilities, axis=1)[:, -2:].T
    np.testing.assert_allclose([p["margin"] for p in records["diti+sd"]["predictions"]], first - second, atol=2e-3)
    alone = softmax(-tokens / chosen["temperature"], axis=1)
    assert np.abs(alone - probabilities).max() > 0.05  # the features have a say


def test_class_tokens_and_clip_are_mixed_as_sure_as_held_out_shots_allow(config: EvalConfig) -> None:
    grid = Grid(replace(config, methods=("diti+clip", "diti"), shots=(2,)))
    assert grid.run_missing() == []
    task, bench = grid.task(2, 1), grid.bench
    record, tokens = (json.loads((grid.config.folder / m / "2-1.json").read_text()) for m in ("diti+clip", "diti"))
    chosen = record["chosen"]
    errors = bench.diti(task)
    weights = 1 / errors.held_out.double().mean((0, 1))  # SCORING's
    scores = (errors.test.double() * weights / weights.mean()).mean(2).numpy()
    held = [(shot, sorted(task.class_names)[c]) for _, fold in split_folds(task.groups(), 2) for c, shot in fold]
    tip = TipAdapter(bench.clip, bench.templates, recolour=bench.recolour, seed=1)
    tip.fit([shot for shot, _ in held], [name for _, name in held])
    of_clip = np.log(tip.predict_proba(task.test_images())) / chosen["clip_temperature"]
    of_clip = of_clip[:, [tip.classes_.tolist().index(name) for name in task.class_names]]
    w = chosen["clip_weight"]
    mixed = -(1 - w) * scores / tokens["chosen"]["temperature"] + w * of_clip
    assert [p["label"] for p in record["predictions"]] == [task.class_names[c] for c in mixed.argmax(1)]
