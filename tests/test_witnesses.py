"""Witnesses: other classifiers of the same shots that decide together with the class tokens."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from small_classifier import PREDICTION, SCORING, TRAINING, make, shots_of
from small_clip import save_tiny_clip

from fewshot_diti import Backbone, DiTiClassifier, ScoringConfig, TrainingConfig
from fewshot_diti.baselines import presets as baseline_presets
from fewshot_diti.baselines.imagenet import FineTuned, TuningSettings
from fewshot_diti.baselines.probe import fit_logistic
from fewshot_diti.baselines.views import seeded
from fewshot_diti.data.images import ImageGeometry
from fewshot_diti.encoding import PreparedImage
from fewshot_diti.presets import PRESETS, complete
from fewshot_diti.temperature import fit_weights
from fewshot_diti.witnesses import make_witness, score_offsets
from fewshot_diti.witnesses.network import FROZEN, TEMPERATURE, TunedNetwork

CLASSES = ["a320", "dc-9", "tu-154"]
NAMES = ("features", "network:test_resnet", "linear-network:test_resnet")


@pytest.fixture(scope="module", autouse=True)
def small_network() -> Iterator[None]:
    """A network of timm without a download, the same weights each time, and a training of a few steps."""
    create = timm.create_model

    def made(name: str, pretrained: bool, **options: object) -> torch.nn.Module:
        with seeded(0):
            return create(name, **options)

    small = replace(baseline_presets.PRESETS["small"], tuning=TuningSettings(steps=4, least_epochs=1, batch_size=6))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "create_model", made)
        patch.setitem(baseline_presets.PRESETS, "small", small)
        yield


@pytest.fixture(scope="module")
def fitted(small_network: None, backbone: Backbone, pictures: dict[str, list[Path]]) -> DiTiClassifier:
    scoring = replace(SCORING, witnesses=NAMES, witness_weights=(0.5, 1.0, 2.0))
    return make(backbone, scoring=scoring).fit(*shots_of(pictures, CLASSES))


@pytest.fixture
def classifier(fitted: DiTiClassifier) -> DiTiClassifier:
    """One that a test may change, and that remembers no decisions."""
    own = copy(fitted)
    own._made = None
    return own


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
    from fewshot_diti.baselines.views import ColourJitter
    from fewshot_diti.data.images import open_image

    witness = make_witness(NAMES[1], classifier.geometry_)
    images, labels = shots_of(pictures, CLASSES)
    squashed = [witness.network.geometry.resized(open_image(path), "") for path in [*images, *tests]]  # type: ignore[attr-defined]
    seen = [pixels.permute(1, 2, 0).numpy() for pixels in squashed]
    settings = replace(baseline_presets.PRESETS["small"].tuning, frozen=FROZEN)
    tuned = FineTuned(witness.network, settings, recolour=ColourJitter.of(TRAINING), seed=TRAINING.seed)  # type: ignore[attr-defined]
    expected = np.log(tuned.fit(seen[:6], labels).predict_proba(seen[6:])) / TEMPERATURE
    expected -= np.log(np.exp(expected).sum(1, keepdims=True))
    found = classifier.evidence(tests)[NAMES[1]].numpy()
    np.testing.assert_allclose(found, expected, atol=2e-3)  # its weights are kept in float16


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_witnesses_learn_where_gradients_are_off(
    classifier: DiTiClassifier,
    backbone: Backbone,
    pictures: dict[str, list[Path]],
    tests: list[Path],
    mode: type[torch.no_grad],
) -> None:
    with mode():
        other = make(backbone, scoring=classifier.scoring).fit(*shots_of(pictures, CLASSES))
        found = other.evidence(tests)
    for name, log_p in classifier.evidence(tests).items():
        torch.testing.assert_close(found[name], log_p, rtol=0, atol=1e-4)


def test_a_saved_classifier_gives_the_same_with_no_training(
    classifier: DiTiClassifier, backbone: Backbone, tests: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier.save_pretrained(tmp_path)

    def no_training(*_: object) -> None:
        raise AssertionError("it is learned already")

    monkeypatch.setattr(TunedNetwork, "learn", no_training)
    other = {**PRESETS["pocket"].scoring, "witnesses": ("features",)}  # as another version might have it
    monkeypatch.setitem(PRESETS, "pocket", replace(PRESETS["pocket"], scoring=other))
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
    assert classifier.remove_classes(["a320"]).evidence(tests).keys() == {"class tokens"}


@pytest.mark.parametrize("counts", [True, False])
def test_weights_are_fitted_on_held_out_shots_of_which_no_witness_has_learned(
    backbone: Backbone,
    pictures: dict[str, list[Path]],
    tests: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    counts: bool,
) -> None:
    learned: list[set[bytes]] = []
    learn = TunedNetwork.learn

    def watched(self: TunedNetwork, shots: dict[str, torch.Tensor], training: TrainingConfig) -> dict:
        learned.append({x[0].numpy().tobytes() for views in shots.values() for x in views})
        return learn(self, shots, training)

    monkeypatch.setattr(TunedNetwork, "learn", watched)
    scoring = replace(SCORING, witnesses=NAMES[1:2], witness_weights="fit", temperature="fit", folds=2)
    prediction = replace(PREDICTION, use_witnesses=counts)
    classifier = make(backbone, scoring=scoring, prediction=prediction).fit(*shots_of(pictures, CLASSES, 4))
    every, one, other = learned
    assert len(every) == 12 and len(one) == len(other) == 6 and not one & other
    [weight] = classifier.calibration_.witness_weights
    assert weight >= 0 and classifier.calibration_.temperature_from == "shots"
    relative = weight / classifier.calibration_.token_temperature
    assert relative != pytest.approx(PRESETS["pocket"].weights_of(NAMES[1:2], 4)[0], rel=1e-6)
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
    named = complete("pocket", 1, scoring=ScoringConfig(witnesses=("network:x", "linear-clip"))).scoring
    assert named.witness_weights == (PRESETS["pocket"].witness_weights["network"][0], 1.0)
    assert complete("stable-diffusion", 16).scoring.witness_weights == (0.0,)
    named = complete("stable-diffusion", 16, scoring=ScoringConfig(witnesses=("features",))).scoring
    assert named.witness_weights == (1.0,)
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
    images, plain = shots_of(pictures, CLASSES), replace(SCORING, witnesses=None)
    for named, text in (
        (("oracle",), "no witness 'oracle'; pass some of features, network"),
        (("features:up 1",), "no witness 'features:up 1'"),
        ("network", "witnesses='network' is one text"),
    ):
        with pytest.raises(ValueError, match=text):
            make(backbone, scoring=plain, witnesses=named).fit(*images)
    with pytest.raises(ValueError, match="pass them once"):
        make(backbone, scoring=replace(SCORING, witnesses=("features",)), witnesses=("network",)).fit(*images)
    short = make(backbone, scoring=plain, witnesses=("features",)).fit(*images)
    assert short.settings_.scoring.witnesses == ("features",)


def test_witnesses_that_do_not_count_leave_the_temperature_of_the_class_tokens(
    classifier: DiTiClassifier, tests: list[Path]
) -> None:
    classifier.prediction = replace(PREDICTION, use_witnesses=False)
    scores = classifier.scores(tests)
    np.testing.assert_allclose(classifier.predict_proba(tests), (-scores / 0.01).softmax(1).numpy())
    with pytest.raises(ValueError, match="prepared by another classifier's encoder"):
        classifier.decide([PreparedImage("id", "other.png", torch.zeros(3, 16, 32, dtype=torch.uint8))])


def test_a_prediction_in_the_midst_of_a_change_of_classes_leaves_the_classifier_usable(
    classifier: DiTiClassifier, tests: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    select = TunedNetwork.select

    def meanwhile(self: TunedNetwork, *arguments: object) -> dict:
        classifier.predict(tests)  # as another thread would
        return select(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(TunedNetwork, "select", meanwhile)
    classifier.remove_classes(["dc-9"])
    assert classifier.scores(tests).shape == (3, 2)


@pytest.mark.parametrize("labels", [2, 3])
def test_linear_witnesses_give_what_scikit_learn_gives_however_sure(labels: int) -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(0, 1, (labels, 40))
    views = {c: torch.from_numpy(centres[c] + rng.normal(0, 1, (4, 3, 40))).float() for c in range(labels)}
    witness = make_witness("linear-network:test_resnet", ImageGeometry(size=(32, 64)))
    judge = witness.judge(views, witness.learn(views, TRAINING))
    asked = torch.from_numpy(rng.normal(0, 1, (9, 40))).float()
    log_p = judge.log_probabilities(asked)
    model = fit_logistic(torch.cat(list(views.values())).numpy(), np.arange(labels).repeat(4))
    expected = torch.from_numpy(model.predict_log_proba(asked.numpy())).double()
    differences = (log_p - log_p[:, :1]) / (expected - expected[:, :1])
    assert differences[:, 1:].std() < 1e-3 * differences[:, 1:].mean()  # but for the temperature
    assert judge.log_probabilities(1e4 * asked).isfinite().all()


def test_how_many_shots_a_class_has_does_not_make_it_more_probable() -> None:
    rng = np.random.default_rng(0)
    centres = 0.3 * rng.normal(0, 1, (3, 20))
    views = {c: torch.from_numpy(centres[c] + rng.normal(0, 1, (n, 1, 20))).float() for c, n in enumerate((16, 16, 2))}
    witness = make_witness("linear-network:test_resnet", ImageGeometry(size=(32, 64)))
    asked = torch.from_numpy(np.concatenate([c + rng.normal(0, 1, (200, 20)) for c in centres])).float()
    chosen = witness.judge(views, witness.learn(views, TRAINING)).log_probabilities(asked).argmax(1)
    plain = fit_logistic(torch.cat(list(views.values())).numpy(), np.repeat([0, 1, 2], [16, 16, 2]))
    assert (chosen == 2).double().mean() > 2 * (plain.predict(asked.numpy()) == 2).mean()


def test_a_saved_witness_is_refused_on_another_model(
    classifier: DiTiClassifier, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier.save_pretrained(tmp_path)
    create = timm.create_model

    def other(*arguments: object, **options: object) -> torch.nn.Module:
        network = create(*arguments, **options)
        with torch.no_grad():
            next(network.parameters()).add_(0.1)
        return network

    monkeypatch.setattr(timm, "create_model", other)
    with pytest.raises(ValueError, match=r"witness 'network:test_resnet' of .* was learned on another model"):
        DiTiClassifier.from_pretrained(tmp_path, backbone)


def test_a_network_that_is_broken_is_named(
    backbone: Backbone, pictures: dict[str, list[Path]], tests: list[Path]
) -> None:
    scoring = replace(SCORING, witnesses=NAMES[1:2], witness_weights=(1.0,))
    classifier = make(backbone, scoring=scoring).fit(*shots_of(pictures, CLASSES))
    [broken] = classifier._held[1]
    broken.learned[FineTuned.HEAD[1]][:] = torch.nan
    with pytest.raises(ValueError, match="'network:test_resnet' gives probabilities that are not a number on image"):
        classifier.predict(tests)


def test_threads_learn_the_same_witnesses(
    classifier: DiTiClassifier, backbone: Backbone, pictures: dict[str, list[Path]], tests: list[Path]
) -> None:
    def fit(_: int) -> dict[str, torch.Tensor]:
        return make(backbone, scoring=classifier.scoring).fit(*shots_of(pictures, CLASSES)).evidence(tests)

    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(fit, range(2)):
            for name, log_p in classifier.evidence(tests).items():
                torch.testing.assert_close(found[name], log_p, rtol=0, atol=1e-5)


def test_a_bank_may_be_emptied_and_grow_again(
    backbone: Backbone, pictures: dict[str, list[Path]], tests: list[Path], tmp_path: Path
) -> None:
    clip = f"local-dir:{save_tiny_clip(tmp_path, 'transformer')}"
    names = (*NAMES, *(f"{kind}:{clip}" for kind in ("clip", "tip-adapter", "linear-clip")))
    scoring = replace(SCORING, witnesses=names, witness_weights=(1.0,) * len(names))
    whole = make(backbone, scoring=scoring).fit(*shots_of(pictures, CLASSES))
    grown = make(backbone, scoring=scoring).fit(*shots_of(pictures, CLASSES)).remove_classes(CLASSES)
    for label in CLASSES:
        grown.add_classes(*shots_of(pictures, [label]))
    for name, log_p in whole.evidence(tests).items():
        torch.testing.assert_close(grown.evidence(tests)[name], log_p, rtol=0, atol=1e-4)


def test_a_model_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise RuntimeError("no network")

    pocket = make_witness("clip", ImageGeometry(size=(128, 256)), "aircraft", "pocket")
    assert "pocket-clip" in pocket.clip.name  # type: ignore[attr-defined]
    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(FileNotFoundError, match="The model of witness 'network:nope' cannot be loaded: no network"):
        make_witness("network:nope", ImageGeometry(size=(32, 64)))
    with pytest.raises(ValueError, match=r"frozen=1\.5; pass a share"):
        TuningSettings(frozen=1.5)


def test_a_race_starts_from_what_the_witnesses_say(
    classifier: DiTiClassifier, tests: list[Path], backbone: Backbone
) -> None:
    everything = classifier.decide(tests)
    assert {d.evaluations for d in everything} == {SCORING.trials * 3 + 1}
    classifier.prediction = replace(PREDICTION, schedule="racing")
    assert [d.position for d in classifier.decide(tests)] == [d.position for d in everything]
