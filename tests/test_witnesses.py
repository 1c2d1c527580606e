"""Witnesses: other classifiers of the same shots that decide together with the class tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from small_classifier import PREDICTION, SCORING, TRAINING, make, shots_of

from fewshot_diti import Backbone, DiTiClassifier, ScoringConfig
from fewshot_diti.baselines import presets as baseline_presets
from fewshot_diti.baselines.imagenet import TuningSettings
from fewshot_diti.presets import PRESETS, complete
from fewshot_diti.temperature import fit_weights
from fewshot_diti.witnesses import make_witness, score_offsets
from fewshot_diti.witnesses.network import TEMPERATURE

CLASSES = ["a320", "dc-9", "tu-154"]
NAMES = ("features", "network:test_resnet", "linear-network:test_resnet")


@pytest.fixture(autouse=True)
def small_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network of timm without a download, the same weights each time, and a training of a few steps."""
    create = timm.create_model

    def made(name: str, pretrained: bool, **options: object) -> torch.nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return create(name, **options)

    monkeypatch.setattr(timm, "create_model", made)
    small = replace(baseline_presets.PRESETS["small"], tuning=TuningSettings(steps=4, least_epochs=1, batch_size=6))
    monkeypatch.setitem(baseline_presets.PRESETS, "small", small)


@pytest.fixture
def classifier(backbone: Backbone, pictures: dict[str, list[Path]]) -> DiTiClassifier:
    scoring = replace(SCORING, witnesses=NAMES, witness_weights=(0.5, 1.0, 2.0))
    return make(backbone, scoring=scoring).fit(*shots_of(pictures, CLASSES))


def test_a_score_is_the_class_tokens_own_less_what_each_witness_gives(
    classifier: DiTiClassifier, tests: list[Path]
) -> None:
    evidence = classifier.evidence(tests)
    assert list(evidence) == ["class tokens", *NAMES]
    for log_p in evidence.values():
        torch.testing.assert_close(log_p.exp().sum(1), torch.ones(3, dtype=torch.float64))
        assert log_p.std(1).min() > 1e-3  # says something
    own = classifier.errors(tests).double().mean(2)
    added = sum(-0.01 * w * evidence[name] for name, w in zip(NAMES, (0.5, 1.0, 2.0), strict=True))
    torch.testing.assert_close(classifier.scores(tests), own + added, rtol=0, atol=1e-6)
    torch.testing.assert_close(evidence["class tokens"], (-own / 0.01).log_softmax(1), rtol=0, atol=1e-4)
    temperature = 0.01 * (1 + PRESETS["pocket"].overlap * 3.5)
    assert classifier.calibration_.temperature == pytest.approx(temperature)


def test_the_network_is_the_fine_tuned_baseline_on_the_shots(
    classifier: DiTiClassifier, pictures: dict[str, list[Path]], tests: list[Path]
) -> None:
    from fewshot_diti.baselines.imagenet import FineTuned
    from fewshot_diti.baselines.views import ColourJitter
    from fewshot_diti.data.images import open_image

    witness = make_witness(NAMES[1], classifier.geometry_)
    images, labels = shots_of(pictures, CLASSES)
    squashed = [witness.network.geometry.resized(open_image(path), "") for path in [*images, *tests]]  # type: ignore[attr-defined]
    seen = [pixels.permute(1, 2, 0).numpy() for pixels in squashed]
    settings = baseline_presets.PRESETS["small"].tuning
    tuned = FineTuned(witness.network, settings, recolour=ColourJitter.of(TRAINING), seed=TRAINING.seed)  # type: ignore[attr-defined]
    expected = np.log(tuned.fit(seen[:6], labels).predict_proba(seen[6:])) / TEMPERATURE
    expected -= np.log(np.exp(expected).sum(1, keepdims=True))
    found = classifier.evidence(tests)[NAMES[1]].numpy()
    np.testing.assert_allclose(found, expected, atol=2e-3)  # its weights are kept in float16


def test_a_saved_classifier_gives_the_same_with_no_training(
    classifier: DiTiClassifier, backbone: Backbone, tests: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier.save_pretrained(tmp_path)

    def no_training(*_: object) -> None:
        raise AssertionError("it is learned already")

    monkeypatch.setattr("fewshot_diti.witnesses.network.TunedNetwork.learn", no_training)
    again = DiTiClassifier.from_pretrained(tmp_path, backbone)
    assert torch.equal(again.scores(tests), classifier.scores(tests))


def test_a_class_that_is_added_is_learned_by_all_witnesses_and_leaves_class_tokens_as_they_are(
    classifier: DiTiClassifier, backbone: Backbone, pictures: dict[str, list[Path]], tests: list[Path], tmp_path: Path
) -> None:
    scoring = classifier.scoring
    some = make(backbone, scoring=scoring).fit(*shots_of(pictures, CLASSES[:2]))
    some.save_pretrained(tmp_path)
    grown = DiTiClassifier.from_pretrained(tmp_path, backbone)
    before = grown.errors(tests)
    grown.add_classes(*shots_of(pictures, CLASSES[2:]))
    torch.testing.assert_close(grown.errors(tests)[:, :2], before, rtol=0, atol=0)
    for name, log_p in classifier.evidence(tests).items():
        torch.testing.assert_close(grown.evidence(tests)[name], log_p, rtol=0, atol=1e-4)


def test_a_class_that_is_removed_leaves_the_others_in_proportion(classifier: DiTiClassifier, tests: list[Path]) -> None:
    before = classifier.evidence(tests)["network:test_resnet"]
    classifier.remove_classes(["dc-9"])
    after = classifier.evidence(tests)["network:test_resnet"]
    torch.testing.assert_close(after, before[:, [0, 2]].log_softmax(1), rtol=0, atol=1e-6)
    assert classifier.predict(tests).tolist() != ["dc-9"] * 3


def test_weights_are_fitted_on_held_out_shots_of_which_no_witness_has_learned(
    backbone: Backbone, pictures: dict[str, list[Path]], tests: list[Path]
) -> None:
    scoring = replace(SCORING, witnesses=NAMES, witness_weights="fit", temperature="fit", folds=2)
    classifier = make(backbone, scoring=scoring).fit(*shots_of(pictures, CLASSES, 4))
    weights = classifier.calibration_.witness_weights
    assert len(weights) == 3 and all(weight >= 0 for weight in weights)
    assert classifier.scores(tests).isfinite().all()


def test_the_fitted_weight_is_large_for_a_witness_that_is_right_and_small_for_noise() -> None:
    g = torch.Generator().manual_seed(0)
    truth = torch.arange(5).repeat(40)
    right = torch.eye(5, dtype=torch.float64)[truth]
    tokens = -(right + 0.5 * torch.randn(200, 5, generator=g))
    good = (2 * right + torch.randn(200, 5, generator=g)).log_softmax(1)
    noise = torch.randn(200, 5, generator=g).double().log_softmax(1)
    weights = fit_weights(tokens, [good, noise], truth, (0.5, 0.5), 0.5)
    assert weights[0] > 5 * weights[1]
    alone = (tokens.argmin(1) == truth).double().mean()
    assert ((tokens + score_offsets([good, noise], weights)).argmin(1) == truth).double().mean() > alone + 0.03


def test_witnesses_come_with_the_recommended_weights_and_are_checked() -> None:
    scoring = complete("pocket", 16).scoring
    assert scoring.witness_weights == PRESETS["pocket"].weights_of(scoring.witnesses, 16)
    assert complete("pocket", 16, scoring=ScoringConfig(witnesses=("network:x",))).scoring.witness_weights != ()
    assert not any(complete("stable-diffusion", 16).scoring.witness_weights)
    for wrong, text in (
        ({"witnesses": "network"}, "is one text"),
        ({"witnesses": ("network", "network")}, "name each once"),
        ({"witnesses": ("network",), "witness_weights": (1.0, 2.0)}, "one weight for each"),
        ({"witness_weights": "fit"}, "folds=2 or more"),
        ({"witness_weights": (-1.0,)}, "at least 0"),
    ):
        with pytest.raises(ValueError, match=text):
            ScoringConfig(**wrong)  # type: ignore[arg-type]


def test_an_unknown_witness_is_refused_and_witnesses_are_passed_once(
    backbone: Backbone, pictures: dict[str, list[Path]]
) -> None:
    with pytest.raises(ValueError, match=r"no witness .oracle.; pass some of features, network"):
        make(backbone, scoring=replace(SCORING, witnesses=("oracle",), witness_weights=(1.0,))).fit(
            *shots_of(pictures, CLASSES)
        )
    scoring = replace(SCORING, witnesses=("features",))
    with pytest.raises(ValueError, match="pass them once"):
        make(backbone, scoring=scoring, witnesses=("network",)).fit(*shots_of(pictures, CLASSES))
    short = make(backbone, scoring=replace(SCORING, witnesses=None), witnesses=("features",))
    short.fit(*shots_of(pictures, CLASSES))
    assert short.settings_.scoring.witnesses == ("features",)


def test_a_race_starts_from_what_the_witnesses_say(
    classifier: DiTiClassifier, tests: list[Path], backbone: Backbone
) -> None:
    everything = classifier.decide(tests)
    assert {d.evaluations for d in everything} == {SCORING.trials * 3 + 1}
    classifier.prediction = replace(PREDICTION, schedule="racing")
    assert [d.position for d in classifier.decide(tests)] == [d.position for d in everything]
