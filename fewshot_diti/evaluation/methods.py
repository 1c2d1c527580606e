"""The rows of a few-shot table, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from time import perf_counter
from typing import Any, Literal

from fewshot_diti.backbone_files import POCKET
from fewshot_diti.baselines import Baseline, ClipLora, LogisticProbe, NearestMean, NearestNeighbour, ZeroShotClip
from fewshot_diti.baselines.clip_lora import LoraSettings
from fewshot_diti.baselines.imagenet import FineTuned, TuningSettings
from fewshot_diti.baselines.probe import COPIES, MOST_ROWS, STRENGTHS, Features
from fewshot_diti.baselines.tip_adapter import ALPHAS, BETAS
from fewshot_diti.baselines.unet_features import TIMESTEPS
from fewshot_diti.evaluation.bench import FOLDS, Bench
from fewshot_diti.evaluation.class_tokens import (
    ENSEMBLE_WEIGHTS,
    diti,
    diti_with_clip,
    in_task_order,
    lda_sd,
    recolours_keys,
    tip_adapter,
    zero_shot_sd,
)
from fewshot_diti.evaluation.shipped import shipped, shipped_settings
from fewshot_diti.evaluation.task import Outcome, Task
from fewshot_diti.presets import PRESETS
from fewshot_diti.representation.methods import METHODS as REPRESENTATIONS
from fewshot_diti.representation.methods import to_dict

_ON_UNET = ("linear-sd", "ncm-sd", "lda-sd")  # beside the rows that read class tokens or prompts
SHIPPED = "fewshot-diti"  # the classifier as it ships
SIBLINGS = "siblings"  # needs a network that a user may not have
LEARNED = {f"linear-{name}": name for name in REPRESENTATIONS}  # need a representation that the user has learned
SMALL_T, LARGE_T = 0.3, 0.5  # of the schedule: below the one, from the other

Settings = dict[str, Any]
SettingsOf = Callable[[Bench, int, int], Settings]


@dataclass(frozen=True, kw_only=True)
class Method:
    """A row of the table.

    Attributes:
        run: classifies the test images of a draw.
        settings: by bench, number of shots and seed, all that decides its figures beside data, backbone and code:
            hyper-parameters, and hashes of further models. A record with other settings is stale.
        reads: what has to be there before it runs.
        trains_a_network: takes long, so it is started first.
        supervision: what it has beyond the shots, "" for nothing.
    """

    run: Callable[[Bench, Task], Outcome]
    settings: SettingsOf
    reads: Literal["", "classifier", "class tokens", "bare prompts"] = ""
    trains_a_network: bool = False
    supervision: str = ""


def of_baseline(make: Callable[[Bench, Task], Baseline], *, evaluations: int = 0) -> Callable[[Bench, Task], Outcome]:
    """What fits a baseline on the shots and predicts with it; `evaluations` of its features for an image."""

    def run(bench: Bench, task: Task) -> Outcome:
        start = perf_counter()
        baseline = make(bench, task).fit(task.shot_images(), task.shot_labels())
        fitted = perf_counter()
        probabilities = in_task_order(baseline, task, baseline.predict_proba(task.test_images()))
        chosen = {k: v for k, v in vars(baseline).items() if k.endswith("_") and k != "classes_"}
        return Outcome(
            probabilities=probabilities,
            evaluations=evaluations,
            training_seconds=fitted - start,
            scoring_seconds=perf_counter() - fitted,
            chosen=chosen,
        )

    return run


def _clip_settings(bench: Bench, num_shots: int, seed: int) -> Settings:
    return {"clip": bench.clip.hash, "templates": bench.templates}


def _tip_settings(bench: Bench, num_shots: int, seed: int, *, fine_tune: bool = False) -> Settings:
    return _clip_settings(bench, num_shots, seed) | {
        "tip": asdict(bench.clip_preset.tip_f if fine_tune else bench.clip_preset.tip),
        "alphas": ALPHAS,
        "betas": BETAS,
        "recolour": asdict(bench.recolour) if recolours_keys(num_shots, fine_tune) else None,
    }


def _lora(bench: Bench) -> LoraSettings:
    lora = bench.clip_preset.lora
    return replace(
        lora, candidates=tuple(map(bench.steps, lora.candidates)), steps_per_shot=bench.steps(lora.steps_per_shot)
    )


def _clip_lora(bench: Bench, task: Task) -> ClipLora:
    return ClipLora(bench.clip, bench.templates[0], _lora(bench), recolour=bench.recolour, seed=task.seed)


def _lora_settings(bench: Bench, num_shots: int, seed: int) -> Settings:
    own = {"lora": asdict(_lora(bench)), "recolour": asdict(bench.recolour)}
    return _clip_settings(bench, num_shots, seed) | own


def _tuning(bench: Bench) -> TuningSettings:
    tuning = bench.network_preset.tuning
    return replace(tuning, steps=bench.steps(tuning.steps))


def _fine_tuned(bench: Bench, task: Task) -> FineTuned:
    return FineTuned(bench.network_to_tune, _tuning(bench), recolour=bench.recolour, seed=task.seed)


def _tuning_settings(bench: Bench, num_shots: int, seed: int) -> Settings:
    return {
        "network": bench.network_to_tune.described,
        "tuning": asdict(_tuning(bench)),
        "recolour": asdict(bench.recolour),
    }


def _unet_settings(bench: Bench, num_shots: int, seed: int) -> Settings:
    return {
        "concept": bench.concept,
        "timesteps": TIMESTEPS,
        "positions": bench.unet_features.positions,
        "features": asdict(PRESETS[bench.backbone.kind].features),
    }


def _logistic(
    candidates: Callable[[Bench], dict[str, Features]],
    model: SettingsOf,
    *,
    evaluations: int = 0,
    supervision: str = "",
) -> Method:
    """Logistic regression on features of a model with these settings."""

    def make(bench: Bench, task: Task) -> LogisticProbe:
        return LogisticProbe(candidates(bench), recolour=bench.recolour, seed=task.seed)

    def settings(bench: Bench, num_shots: int, seed: int) -> Settings:
        probe = {"copies": COPIES, "most_rows": MOST_ROWS, "strengths": STRENGTHS}
        return model(bench, num_shots, seed) | probe | {"recolour": asdict(bench.recolour)}

    return Method(run=of_baseline(make, evaluations=evaluations), settings=settings, supervision=supervision)


def _linear_on_learned(method: str) -> Method:
    """Logistic regression on the features of a representation that was learned by this method."""

    def settings(bench: Bench, num_shots: int, seed: int) -> Settings:
        learned = bench.representation(method)
        return {"representation": to_dict(learned.method) | {"weights": bench.representation_hash(method)}}

    return _logistic(lambda bench: bench.learned_features(method), settings)


def _judged_by(bench: Bench, weighting: str) -> Settings:
    return {"weighting": weighting, "temperature": bench.recommended.temperature, "folds": FOLDS}


def _token_settings(bench: Bench, num_shots: int, seed: int) -> Settings:
    errors = {"training": asdict(bench.training(num_shots, seed)), "errors": bench.error_settings(seed)}
    return errors | _judged_by(bench, bench.recommended.weighting)


def _class_tokens(weighting: Callable[[Bench], str]) -> Method:
    """Class tokens, their errors weighted in one way."""

    def settings(bench: Bench, num_shots: int, seed: int) -> Settings:
        return _token_settings(bench, num_shots, seed) | _judged_by(bench, weighting(bench))

    return Method(run=lambda bench, task: diti(weighting(bench), bench, task), settings=settings, reads="class tokens")


def _window(lo: float, hi: float) -> Callable[[Bench], str]:
    def weighting(bench: Bench) -> str:
        big_t = bench.backbone.num_train_timesteps
        return f"window({round(lo * big_t)}, {round(hi * big_t)})"

    return weighting


METHODS: dict[str, Method] = {
    SHIPPED: Method(run=shipped, settings=shipped_settings, reads="classifier"),
    "zeroshot-sd": Method(
        run=zero_shot_sd,
        settings=lambda bench, _, __: {
            "errors": bench.error_settings(0),
            "temperature": bench.recommended.temperature,
        },
        reads="bare prompts",
    ),
    "zeroshot-clip": Method(
        run=of_baseline(lambda bench, _: ZeroShotClip(bench.clip, bench.templates)), settings=_clip_settings
    ),
    "tip-adapter": Method(run=of_baseline(tip_adapter), settings=_tip_settings),
    "tip-adapter-f": Method(
        run=of_baseline(partial(tip_adapter, fine_tune=True)), settings=partial(_tip_settings, fine_tune=True)
    ),
    "linear-clip": _logistic(lambda bench: {"CLIP": bench.clip.image_features}, _clip_settings),
    "clip-lora": Method(run=of_baseline(_clip_lora), settings=_lora_settings, trains_a_network=True),
    "linear-sd": _logistic(lambda bench: bench.unet_features.candidates(), _unet_settings, evaluations=1),
    "ncm-sd": Method(
        run=of_baseline(lambda bench, _: NearestMean(bench.unet_features.candidates()), evaluations=1),
        settings=_unet_settings,
    ),
    "lda-sd": Method(
        run=lda_sd,
        settings=lambda bench, k, seed: _unet_settings(bench, k, seed) | {"recolour": asdict(bench.recolour)},
    ),
    "nn-latents": Method(
        run=of_baseline(lambda bench, _: NearestNeighbour(bench.latents)), settings=lambda bench, _, __: {}
    ),
    "linear-imagenet": _logistic(
        lambda bench: {"ImageNet": bench.network_features}, lambda bench, _, __: {"network": bench.network.described}
    ),
    "finetune": Method(run=of_baseline(_fine_tuned), settings=_tuning_settings, trains_a_network=True),
    **{name: _linear_on_learned(method) for name, method in LEARNED.items()},
    SIBLINGS: _logistic(
        lambda bench: {"siblings": bench.siblings_features},
        lambda bench, _, __: {"network": bench.siblings.described},
        supervision="with labels of sibling classes",
    ),
    "diti": _class_tokens(lambda bench: bench.recommended.weighting),
    "diti-all-t": _class_tokens(lambda _: "uniform"),
    "diti-small-t": _class_tokens(_window(0, SMALL_T)),
    "diti-large-t": _class_tokens(_window(LARGE_T, 1)),
    "diti-auto": _class_tokens(lambda _: "auto"),
    "diti-tif": _class_tokens(lambda _: "tif"),
    "diti+clip": Method(
        run=diti_with_clip,
        settings=lambda bench, k, seed: (
            _token_settings(bench, k, seed)
            | {"weights": ENSEMBLE_WEIGHTS, "tip_adapter": _tip_settings(bench, k, seed)}
        ),
        reads="class tokens",
    ),
}


def supervision(backbone: str) -> dict[str, str]:
    """What rows on this backbone have beyond the shots, by name, for those that have something.

    The pocket has learned labels of sibling classes, so all that stands on its U-Net has them too.
    """
    found = {name: method.supervision for name, method in METHODS.items() if method.supervision}
    if backbone == POCKET:
        on_unet = [name for name, method in METHODS.items() if method.reads or name in _ON_UNET]
        found |= dict.fromkeys(on_unet, "on a backbone with labels of sibling classes")
    return found
