"""Studies in `eval/`, at tiny size."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.metrics import roc_auc_score
from small_commands import save_classes
from small_grid import PRESET, SCORING

from eval import calibration, generated, information, maps, pilots, shortcuts, unknown, witness_gain, witness_weights
from fewshot_diti import Backbone, Bank, DiTiClassifier
from fewshot_diti.backbone import load_backbone
from fewshot_diti.commands.evaluate import EvalConfig
from fewshot_diti.data import load_images, sample_shots
from fewshot_diti.evaluation.grid import Grid
from fewshot_diti.evaluation.shipped import trained_classifier
from fewshot_diti.presets import PRESETS
from fewshot_diti.timesteps import relative, trial_weights, weighted_mean
from recipes.pocket.renders import Renders, as_batch
from recipes.pocket.siblings import train_siblings
from tests.test_pretrained_baselines import tiny_siblings

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


@pytest.mark.usefixtures("small_settings")
def test_witnesses_are_weighed_on_val_images_in_the_order_of_their_classes(
    data: Path, backbone_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "parts"
    for split, source in (("train", "train"), ("val", "test")):
        shutil.copytree(data / source, folder / split)
    log = tmp_path / "weights.json"
    config = witness_weights.Config(
        dataset=f"folder:{folder}",
        output=log,
        backbone=str(backbone_folder),
        concept="part",
        witnesses=("features",),
        shots=(2,),
        trials=3,
    )
    witness_weights.main(config)
    first = log.read_bytes()
    witness_weights.main(config)  # judges nothing again
    assert log.read_bytes() == first
    kept = json.loads(first)
    assert set(kept["judged"]["2-1"]) == {"class tokens", "features"}
    with pytest.raises(ValueError, match="was made of other images or with other settings"):
        witness_weights.main(replace(config, trials=4))

    pool, val = (load_images(config.dataset, split) for split in ("train", "val"))
    names = sorted(val.class_names)
    truth = [names.index(val.class_names[c]) for c in val.labels]
    log_p = np.array(kept["judged"]["2-1"]["features"])
    assert kept["2"]["features"]["accuracy"] == np.mean(log_p.argmax(1) == truth) >= 0.5  # the classes' colours differ

    shots = pool.subset(sample_shots(pool, 2, 1).rows(pool))
    found = pilots.Reader(load_backbone(str(backbone_folder), "auto"), "part", val).log_probabilities(shots, 1)
    np.testing.assert_allclose(found.numpy(), log_p, atol=1e-5)


def test_a_network_that_sees_latents_sees_what_the_backbone_does(
    renders: Path,
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


def two_liveries(images_of_a_pair: int) -> Renders:
    """Renders of two variants in two liveries each, in turn; an image's first pixel is its position."""
    pairs = [(v, a) for v in ("A1", "B1") for a in ("Delta", "KLM")] * images_of_a_pair
    pixels = torch.zeros(len(pairs), 3, 4, 8, dtype=torch.uint8)
    pixels[:, :, 0, 0] = torch.arange(len(pairs), dtype=torch.uint8)[:, None]
    return Renders(
        pixels_NCHW=pixels,
        variants=tuple(v for v, _ in pairs),
        manufacturers=("",) * len(pairs),
        airlines=tuple(a for _, a in pairs),
    )


@pytest.fixture
def liveries(tmp_path: Path) -> shortcuts.Config:
    return shortcuts.Config(
        data=tmp_path,
        output=tmp_path / "s.json",
        variants=("A1", "B1"),
        liveries=("Delta", "KLM"),
        strengths=(0.5, 0.95, 1.0),
        seeds=(1,),
        shots=20,
        test=5,
        trials=8,
    )


def test_at_95_percent_one_shot_in_twenty_wears_the_other_livery(liveries: shortcuts.Config) -> None:
    images = two_liveries(25)
    drawn = shortcuts.draw(images, liveries, 0.95, seed=1)
    pairs, counts = np.unique(drawn.pairs_of_shots, axis=0, return_counts=True)
    assert pairs.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]] and counts.tolist() == [19, 1, 1, 19]
    assert np.unique(drawn.pairs_of_test, axis=0, return_counts=True)[1].tolist() == [5] * 4
    rows = [image.getpixel((0, 0))[0] for image in (*drawn.shots, *drawn.test)]  # type: ignore[index]
    assert len(set(rows)) == len(rows), "no image is a shot and a test image"
    truth = [("A1", "B1").index(images.variants[row]) for row in rows[-20:]]
    assert truth == drawn.pairs_of_test[:, 0].tolist()
    same = shortcuts.draw(images, liveries, 0.5, seed=1)
    assert [i.tobytes() for i in same.test] == [i.tobytes() for i in drawn.test], "one test for every strength"
    with pytest.raises(ValueError, match="24 images of A1 in livery 'Delta'; 25 needed"):
        shortcuts.draw(two_liveries(24), liveries, 1.0, seed=1)


def test_the_worst_pair_shows_a_shortcut_that_the_mean_hides() -> None:
    pairs = np.array([[v, a] for v in (0, 1) for a in (0, 1)] * 10)
    assert shortcuts.worst_and_mean(pairs[:, 0] == pairs[:, 1], pairs) == (0.0, 0.5)  # who reads the livery
    assert shortcuts.worst_and_mean(np.ones(40, dtype=bool), pairs) == (1.0, 1.0)


def test_a_window_judges_by_its_own_timesteps(liveries: shortcuts.Config, backbone: Backbone) -> None:
    pairs = [[v, a] for v in (0, 1) for a in (0, 1)] * 3
    sign = 2 * np.array(pairs) - 1
    tells = np.concatenate([np.repeat(sign[:, [1]], 4, 1), np.repeat(sign[:, [0]], 4, 1)], 1)  # small t: the livery
    draws = [{"pairs": pairs, "variant": tells.tolist(), "livery": (-tells).tolist(), "rows": [0] * 12}]
    found = shortcuts.accuracy_by_window(draws, np.arange(8) * 125 + 60, 1000)
    assert found[0] == (100, 0.0) and found[-1] == (900, 1.0)
    names = (shortcuts.SHIPPED, shortcuts.SCRATCH, shortcuts.EVEN, *shortcuts.SOURCES.values())
    draws[0]["predicted"] = {name: [0] * 12 for name in names}
    kept = {f"{strength}-1": draws[0] for strength in liveries.strengths}
    assert shortcuts.picture(kept, liveries, backbone).startswith(b"\x89PNG")


def test_settings_that_make_no_such_design_are_refused(liveries: shortcuts.Config) -> None:
    with pytest.raises(ValueError, match="no whole number"):
        replace(liveries, shots=10)
    with pytest.raises(ValueError, match="the paint of its maker"):
        replace(liveries, liveries=("Delta", ""))


def test_the_interval_of_the_worst_pair_is_over_images() -> None:
    pairs = [[v, a] for v in (0, 1) for a in (0, 1)] * 4
    predicted = [v if (v, a) != (1, 0) else int(i < 8) for i, (v, a) in enumerate(pairs)]  # half of one pair
    draws = [{"pairs": pairs, "rows": list(range(16)), "predicted": {"network": predicted}}]
    assert shortcuts.cell(draws, "network") == "50 [0, 100], 87.5"


def test_what_is_unknown_is_told_by_each_score(
    quick_train: None,
    bank: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(unknown, "load_renders", lambda *_: two_liveries(3))
    monkeypatch.setattr(unknown, "split_held_out", lambda images, _: (images, images))
    capsys.readouterr()
    curves = tmp_path / "oscr.png"
    unknown.main(unknown.Config(bank=bank, dataset=f"folder:{data}", data=data, images=6, picture=curves))
    out = capsys.readouterr().out
    assert "similarity of the nearest shot" in out and "class token against none" in out and "photographs" in out
    assert "% of variants left out" in out and curves.read_bytes().startswith(b"\x89PNG")
    photograph = np.arange(60 * 100 * 3).reshape(60, 100, 3)
    for crop in unknown.crops([photograph], 50, np.random.default_rng(0)):
        assert crop.shape[1] == 2 * crop.shape[0] > 0 and crop.shape[2] == 3


def test_the_gain_of_a_class_token_is_measured_on_the_same_noise(quick_train: None, bank: Path, data: Path) -> None:
    classifier = DiTiClassifier.from_pretrained(bank)
    saved = classifier.bank_
    assert saved is not None
    images = [load_images(f"folder:{data}", "test").decode(row) for row in range(2)]
    assert (unknown.against_none(classifier, images, np.array([0, 1])) != 0).all()
    nothing = replace(saved, rows=torch.zeros_like(saved.rows))
    tokens = [replace(token, prompt=classifier.encoder_.generic_prompt) for token in nothing.tokens]
    classifier.bank_ = replace(nothing, tokens=tuple(tokens))
    np.testing.assert_allclose(unknown.against_none(classifier, images, np.array([0, 1])), 0, atol=1e-5)


def test_the_area_under_oscr_is_auroc_where_all_labels_are_right_and_the_accuracy_where_nothing_is_mixed_up() -> None:
    rng = np.random.default_rng(0)
    known, unfamiliar = rng.normal(1, 1, 60).round(1), rng.normal(0, 1, 50).round(1)
    correct = rng.random(60) < 0.7
    x, y = unknown.oscr(known, correct, unfamiliar)
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, correct.mean())
    for threshold in (-0.5, 0.3, 1.0):
        point = ((unfamiliar >= threshold).mean(), (correct & (known >= threshold)).mean())
        assert any(np.allclose(point, at) for at in zip(x, y, strict=True))
    x, y = unknown.oscr(known, np.ones(60, dtype=bool), unfamiliar)
    truth = [1] * 60 + [0] * 50
    assert np.trapezoid(y, x) == pytest.approx(roc_auc_score(truth, [*known, *unfamiliar]))
    x, y = unknown.oscr(known + 100, correct, unfamiliar)
    assert np.trapezoid(y, x) == pytest.approx(correct.mean())
    assert unknown.row(known + 100, correct, unfamiliar)[2:] == ["0", "0"]


def test_calibration_is_read_from_what_a_table_left(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = torch.from_numpy(load_images(f"folder:{data}", "test").labels)
    g = torch.Generator().manual_seed(0)

    def errors(truth: torch.Tensor) -> torch.Tensor:
        true_class = torch.eye(3)[truth][:, :, None]
        return 1 - 0.1 * true_class + 0.1 * torch.randn(len(truth), 3, 8, generator=g)

    shots = torch.arange(3).repeat(2)
    kept = {
        "timesteps": torch.arange(0, 800, 100),
        "test": errors(labels),
        "held_out": errors(shots),
        "held_out_labels": shots,
        "out_of_fold": torch.tensor(True),
    }
    (found,) = calibration.of_class_tokens(kept, labels, preset=0.5)
    times = kept["timesteps"]
    weights = trial_weights(relative(kept["held_out"], times, 701), times)
    scores = weighted_mean(kept["test"].double(), weights / weights.mean())
    fitted = 0.5 * found.temperature
    np.testing.assert_allclose(found.test["fitted"], (-scores / fitted).softmax(1), rtol=1e-6)
    assert len(found.held_out) == 6 and all(0 < p < 1 for p in found.held_out)
    assert calibration.of_class_tokens({**kept, "out_of_fold": torch.tensor(False)}, labels, 0.5) == []

    probabilities = torch.tensor(found.test["fitted"])
    splits = calibration.of_classifier(probabilities, labels, 2, np.random.default_rng(0))
    assert len(splits) == calibration.SPLITS and all(len(x.labels) == 4 and len(x.held_out) == 2 for x in splits)
    rows = {tuple(np.round(row, 6)) for x in splits for row in x.test["preset"]}
    assert rows == {tuple(np.round(row, 6)) for row in probabilities.numpy()}  # the preset leaves them as they are

    save_file(kept, tmp_path / "diti-2-1.safetensors")
    save_file({"probabilities": probabilities}, tmp_path / "shipped-1-1.safetensors")
    picture = tmp_path / "c.png"
    config = calibration.Config(
        errors=tmp_path, dataset=f"folder:{data}", picture=picture, levels_picture=tmp_path / "levels.png"
    )
    calibration.main(config)
    out = capsys.readouterr().out
    assert "class tokens: sets of classes" in out and "fewshot-diti: sets of classes" in out
    assert picture.read_bytes().startswith(b"\x89PNG") and (tmp_path / "levels.png").exists()


def test_accuracy_at_a_level_counts_a_sibling_as_right() -> None:
    images = load_images("bundled", "test")
    few = images.subset(np.flatnonzero(np.isin(images.label_names, ["A319", "A320", "E-170"])))
    with pytest.warns(UserWarning, match="left out"):
        test = few.without_empty_classes()
    levels = {"maker": ["Airbus", "Airbus", "Embraer"]}
    wrong_NC = np.full((len(test), 3), 0.1)
    wrong_NC[test.labels == 0, 1] = wrong_NC[test.labels == 1, 0] = wrong_NC[test.labels == 2, 0] = 0.8
    found = calibration.by_level(test, levels, {4: [wrong_NC]})
    assert found["3 classes"] == {4: [0.0]}
    assert found["maker, 2 groups"] == {4: [pytest.approx(100 * 2 / 3)]}


def test_maps_are_measured_against_masks(bank: Path, quick_train: None) -> None:
    mask = np.zeros((4, 8), dtype=bool)
    mask[:, :4] = True
    signed = np.zeros((4, 8))
    signed[0, 0], signed[1, 6], signed[2, 7] = 3.0, 1.0, -9.0
    assert maps.inside(signed, mask) == (0.75, 1.0)
    assert maps.inside(-np.ones((4, 8)), mask)[0] == 0  # nothing is positive
    assert maps.largest(np.arange(100.0).reshape(10, 10), 0.1).sum() == 10
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 64, 3), np.uint8))
    where = np.zeros((32, 64), dtype=bool)
    where[:16] = True
    changed = (np.asarray(maps.blurred(picture, where)) != np.asarray(picture)).any(2)
    assert changed[:16].mean() > 0.9 and not changed[16:].any()
    saved = Bank.from_pretrained(bank)
    random = maps.random_weights(saved, 0)
    assert random.labels == saved.labels and float(random.rows.std()) == pytest.approx(
        float(saved.rows.std()), rel=0.05
    )


def test_generated_images_are_drawn_beside_the_shots_and_classified(
    bank: Path, quick_train: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_classes(tmp_path / "data" / "train", 2)
    picture = tmp_path / "out" / "generated.png"
    few = {"shown": 2, "drawn": 1, "images": 2, "num_inference_steps": 2}
    generated.main(generated.Config(bank=bank, data=str(tmp_path / "data"), output=picture, **few))
    out = capsys.readouterr().out
    assert "features" in out and "class tokens" in out and "6 images of 3 classes" in out
    drawn = np.asarray(Image.open(picture))
    shot = np.asarray(Image.open(tmp_path / "data" / "train" / "bolt" / "0.png"))
    assert (drawn[20:36, 92:124] == shot).all()
