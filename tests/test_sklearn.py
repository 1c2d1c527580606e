"""The classifier as an estimator of scikit-learn: parameters, clones, cross-validation and searches over paths."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.base import clone, is_classifier
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_val_score
from sklearn.utils import estimator_checks
from sklearn.utils.validation import check_is_fitted
from small_classifier import PREDICTION, SCORING, TRAINING, make, shots_of

from fewshot_diti import Backbone, DiTiClassifier, TrainingConfig
from fewshot_diti.data.images import ImageGeometry

# of sklearn.utils.estimator_checks, those that give no data to `fit`
APPLY = (
    estimator_checks.check_do_not_raise_errors_in_init_or_set_params,
    estimator_checks.check_estimator_cloneable,
    estimator_checks.check_estimator_repr,
    estimator_checks.check_estimator_tags_renamed,
    estimator_checks.check_estimators_unfitted,
    estimator_checks.check_get_params_invariance,
    estimator_checks.check_mixin_order,
    estimator_checks.check_no_attributes_set_in_init,
    estimator_checks.check_parameters_default_constructible,
    estimator_checks.check_set_params,
    estimator_checks.check_valid_tag_types,
)
# the others fit on rows of numbers, and the classifier takes images; the test of this file that stands in for them
ROWS_OF_NUMBERS = {
    "check_fit_score_takes_y": "also wants the argument to be called y, not labels",
    "check_estimators_overwrite_params": "test_fit_leaves_the_parameters_alone",
    "check_dont_overwrite_parameters": "test_fit_leaves_the_parameters_alone",
    "check_dict_unchanged": "test_predictions_leave_the_classifier_as_it_was",
    "check_estimators_fit_returns_self": "test_fit_leaves_the_parameters_alone",
    "check_fit_check_is_fitted": "test_a_classifier_says_whether_it_is_fitted",
    "check_estimators_pickle": "test_a_pickled_classifier_predicts_the_same",
    "check_fit_idempotent": "test_fitting_again_gives_the_same",
    "check_classifiers_classes": "test_classifier.py: labels come back with their type",
    "check_classifiers_one_label": "two classes or more are needed: test_classifier_failures.py",
    "check_classifiers_train": "test_classifier.py",
    "check_classifier_data_not_an_array": "test_classifier.py: paths, PIL images, arrays and bytes",
    "check_methods_sample_order_invariance": "test_classifier.py: neither order nor neighbours change an error",
    "check_methods_subset_invariance": "test_classifier.py: neither order nor neighbours change an error",
}


@pytest.fixture
def quick(backbone: Backbone) -> DiTiClassifier:
    return make(backbone, training=replace(TRAINING, steps=1), scoring=replace(SCORING, trials=2))


@pytest.mark.parametrize("check", APPLY, ids=lambda check: check.__name__)
def test_the_checks_of_scikit_learn_that_need_no_rows_of_numbers(check: Callable[..., None]) -> None:
    check("DiTiClassifier", DiTiClassifier())


def test_every_check_of_a_classifier_is_run_or_replaced() -> None:
    """Every check that scikit-learn's generators give is in one of the lists, or is about rows of numbers alone."""
    about_numbers = (
        *("dtype", "sparse", "memmap", "nan", "f_contiguous", "n_features", "fit2d", "regression_target", "array_api"),
        *("pipeline", "n_iter", "decision_proba", "sample_weights", "positive_only"),
    )

    class OfRows(DiTiClassifier):
        """As if it took rows of numbers: of others scikit-learn gives no checks at all."""

        def __sklearn_tags__(self) -> object:
            tags = super().__sklearn_tags__()
            tags.input_tags.two_d_array = True
            return tags

    known = {check.__name__ for check in APPLY} | ROWS_OF_NUMBERS.keys()
    for _, check in estimator_checks.estimator_checks_generator(OfRows()):  # type: ignore[attr-defined]
        name = check.func.func.__name__ if hasattr(check.func, "func") else check.func.__name__
        assert name in known or any(word in name for word in about_numbers), name


def test_the_constructor_stores_its_arguments_and_does_nothing_else() -> None:
    arguments = {
        "backbone": "no such folder",
        "concept": "bird",
        "prompt_template": "{}",
        "generic_prompt": "a bird",
        "training": TrainingConfig(steps=1),
        "scoring": SCORING,
        "prediction": PREDICTION,
        "geometry": ImageGeometry(size=(16, 32)),
        "witnesses": ("features",),
    }
    classifier = DiTiClassifier(**arguments)  # type: ignore[arg-type]
    assert vars(classifier) == arguments == classifier.get_params()
    assert all(getattr(classifier, name) is value for name, value in arguments.items())
    assert repr(DiTiClassifier(concept="bird")) == "DiTiClassifier(concept='bird')"
    assert is_classifier(classifier)


def test_a_clone_has_the_parameters_and_the_backbone_and_is_not_fitted(fitted: DiTiClassifier) -> None:
    twin = clone(fitted)
    assert twin.backbone is fitted.backbone  # the networks are not copied
    assert twin.get_params() == fitted.get_params()
    assert twin.set_params(concept="bird").concept == "bird"
    with pytest.raises(ValueError, match="Invalid parameter 'steps'"):
        twin.set_params(steps=3)
    with pytest.raises(NotFittedError):
        check_is_fitted(twin)


def test_a_classifier_says_whether_it_is_fitted(
    fitted: DiTiClassifier, quick: DiTiClassifier, tests: list[Path], tmp_path: Path
) -> None:
    check_is_fitted(fitted)
    for ask in (
        lambda: check_is_fitted(quick),
        lambda: quick.classes_,
        lambda: quick.predict(tests),
        lambda: quick.predict(tests[0]),
        lambda: quick.predict_proba(tests),
        lambda: quick.score(tests, ["a"] * len(tests)),
        lambda: quick.decide(tests),
        lambda: quick.scores(tests),
        lambda: quick.errors(tests),
        lambda: quick.add_classes(tests, ["a"] * len(tests)),
        lambda: quick.remove_classes(["a"]),
        lambda: quick.save_pretrained(tmp_path),
    ):
        with pytest.raises(NotFittedError):
            ask()
    assert not hasattr(quick, "classes_")  # which is an AttributeError too


def test_a_classifier_without_classes_is_not_fitted(
    quick: DiTiClassifier, pictures: dict[str, list[Path]], tests: list[Path]
) -> None:
    quick.fit(*shots_of(pictures, ["a320", "dc-9"], 1)).remove_classes(["a320", "dc-9"])
    with pytest.raises(NotFittedError, match="All class tokens were removed; add some with add_classes"):
        quick.predict(tests)


def test_fit_leaves_the_parameters_alone(quick: DiTiClassifier, pictures: dict[str, list[Path]]) -> None:
    before = quick.get_params()
    assert quick.fit(*shots_of(pictures, ["a320", "dc-9"], 1)) is quick
    assert all(value is before[name] for name, value in quick.get_params().items())
    set_by_fit = set(vars(quick)) - set(before)
    assert all(name.endswith("_") or name.startswith("_") for name in set_by_fit), set_by_fit


def test_predictions_leave_the_classifier_as_it_was(fitted: DiTiClassifier, tests: list[Path]) -> None:
    def public() -> dict[str, object]:
        return {name: value for name, value in vars(fitted).items() if not name.startswith("_")}

    before = public()
    fitted.predict(tests)
    fitted.predict_proba(tests)
    fitted.score(tests, ["a320", "dc-9", "tu-154"])
    assert public() == before


def test_fitting_again_gives_the_same(quick: DiTiClassifier, pictures: dict[str, list[Path]]) -> None:
    images = shots_of(pictures, ["a320", "dc-9"], 1)
    bank, calibration = quick.fit(*images).bank_, quick.calibration_
    quick.fit(*shots_of(pictures, ["747", "dc-9", "tu-154"], 1))
    quick.fit(*images)
    assert quick.bank_ == bank and quick.calibration_ == calibration


def test_a_pickled_classifier_predicts_the_same(fitted: DiTiClassifier, tests: list[Path]) -> None:
    again = pickle.loads(pickle.dumps(fitted))
    again.errors(tests)
    assert torch.equal(again.errors(tests), fitted.errors(tests))
    np.testing.assert_array_equal(again.predict_proba(tests), fitted.predict_proba(tests))


def test_cross_validation_over_paths_fits_and_judges_each_fold(
    quick: DiTiClassifier, pictures: dict[str, list[Path]]
) -> None:
    paths, labels = shots_of(pictures, ["a320", "dc-9", "tu-154"], 4)
    folds = StratifiedKFold(2)
    found = cross_val_score(quick, paths, labels, cv=folds, error_score="raise")
    expected = []
    for kept, held in folds.split(paths, labels):
        part = clone(quick).fit([paths[i] for i in kept], [labels[i] for i in kept])
        predicted = part.predict([paths[i] for i in held])
        expected.append(np.mean([a == labels[i] for a, i in zip(predicted, held, strict=True)]))
    assert found.tolist() == pytest.approx(expected)
    assert quick.bank_ is None  # clones were fitted


def test_a_grid_search_over_training_configs_takes_the_better_one(
    quick: DiTiClassifier, pictures: dict[str, list[Path]]
) -> None:
    paths, labels = shots_of(pictures, ["a320", "dc-9"], 4)
    configs = [replace(TRAINING, steps=steps) for steps in (1, 3)]
    search = GridSearchCV(quick, {"training": configs}, cv=2, error_score="raise").fit(paths, labels)
    means = search.cv_results_["mean_test_score"]
    assert search.best_params_ == {"training": configs[means.argmax()]}
    for config, mean in zip(configs, means, strict=True):
        assert mean == pytest.approx(
            cross_val_score(clone(quick).set_params(training=config), paths, labels, cv=2).mean()
        )
    assert search.best_estimator_.settings_.training.steps == search.best_params_["training"].steps
    assert search.predict(paths[:2]).tolist() == search.best_estimator_.predict(paths[:2]).tolist()
