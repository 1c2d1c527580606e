"""What can be set: three configurations.

`TrainingConfig` and `ScoringConfig` are read by `fit` and kept with the bank; `PredictionConfig` is read at every
prediction. A field that is not given has the value of the preset for the backbone's kind (`presets.PRESETS`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, NamedTuple, Self, TypeAlias, get_args

from fewshot_diti.elimination import (
    PUBLISHED_STAGES,
    Stage,
    count_evaluations,
    exhaustive,
    published_stages,
)
from fewshot_diti.lora import BLOCK_FILTERS
from fewshot_diti.racing import Look, racing
from fewshot_diti.timesteps import parse_weighting

Label: TypeAlias = str | int | bool
Density = Literal["even", "importance"]
Schedule = Literal["racing", "exhaustive", "published"]

FROM_PRESET: Any = None  # of a field that was not given


class _Config:
    """What the configurations share: fields that a preset fills."""

    def resolve(self, preset: Mapping[str, Any]) -> Self:
        """The complete configuration: fields that were not given have the preset's values."""
        missing = {f.name: preset[f.name] for f in fields(self) if getattr(self, f.name) is None and f.name in preset}  # type: ignore[arg-type]
        return replace(self, **missing)  # type: ignore[type-var]

    def _check(self, names: Sequence[str], least: float, what: str) -> None:
        """Raises a ValueError for a value that was given and is below `least`."""
        for name in names:
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ValueError(f"{name}={value}; pass {what}.")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(_Config):
    """How class tokens are trained. What is not given follows the preset and the number of shots.

    Attributes:
        steps: optimizer steps of every class.
        rank: of the LoRA.
        alpha: the adapters are scaled by alpha / rank; None: alpha = rank.
        blocks: U-Net blocks with LoRA, a key of `lora.BLOCK_FILTERS`.
        target_modules: linear layers with LoRA, by suffixes of their names or one regular expression, as in peft; None:
            attention and GEGLU projection in the U-Net, attention in the text encoder.
        lr_unet: AdamW learning rate of the U-Net's adapters.
        lr_text_encoder: of the text encoder's.
        lr_schedule: "constant", or "cosine" (to zero at `steps`).
        shots_per_step: samples per class and step, drawn from its shots.
        prior_weight: weight of the loss on prior images, as many per step as shots; 0 uses none.
        prior_images: images of the generic prompt that the backbone generates once.
        timesteps: (lo, hi) in 0..T, drawn uniformly, hi excluded.
        colour_variants: K, colour-jittered copies of each shot that are encoded once; 1 keeps the shots as they are.
        brightness: strength of the jitter, as in `torchvision.transforms.v2.ColorJitter`.
        contrast: as brightness.
        saturation: as brightness.
        hue: as brightness, at most 0.5.
        permute_channels: whether a jittered copy may also have its colour channels permuted.
        flip: whether a copy may be mirrored; off, since aircraft noses point one way.
        weight_decay: of AdamW.
        max_grad_norm: each class's gradient, over both networks, is clipped at this norm.
        samples_per_batch: samples per forward pass, at least those of one class; decides how many classes share a
            pass, never the result. Halved where memory runs out.
        gradient_checkpointing: trades a second forward pass for the memory of the U-Net's activations.
        seed: of every class's own random stream.

    Raises:
        ValueError: a value is out of its range.
    """

    steps: int = FROM_PRESET
    rank: int = FROM_PRESET
    alpha: float | None = None
    blocks: str = FROM_PRESET
    target_modules: str | tuple[str, ...] | None = None
    lr_unet: float = FROM_PRESET
    lr_text_encoder: float = FROM_PRESET
    lr_schedule: Literal["constant", "cosine"] = FROM_PRESET
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    shots_per_step: int = FROM_PRESET
    prior_weight: float = FROM_PRESET
    prior_images: int = 100
    timesteps: tuple[int, int] = (0, 1000)
    colour_variants: int = 8
    brightness: float = FROM_PRESET
    contrast: float = 0.2
    saturation: float = 0.2
    hue: float = FROM_PRESET
    permute_channels: bool = FROM_PRESET
    flip: bool = False
    samples_per_batch: int = FROM_PRESET
    gradient_checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        whole = ("steps", "rank", "shots_per_step", "colour_variants", "samples_per_batch", "prior_images")
        self._check(whole, 1, "a whole number of at least 1")
        strengths = ("brightness", "contrast", "saturation", "hue")
        self._check(("lr_unet", "lr_text_encoder", "weight_decay", "prior_weight", *strengths), 0, "0 or more")
        if not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm={self.max_grad_norm}; pass a number above 0 (inf: no clipping).")
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"alpha={self.alpha}; pass a number above 0, or None for the rank.")
        if self.lr_schedule not in ("constant", "cosine", None):
            raise ValueError(f"lr_schedule={self.lr_schedule!r}; pass 'constant' or 'cosine'.")
        if self.blocks is not None and self.blocks not in BLOCK_FILTERS:
            raise ValueError(f"blocks={self.blocks!r}; pass one of {sorted(BLOCK_FILTERS)}.")
        if self.hue is not None and self.hue > 0.5:
            raise ValueError(f"hue={self.hue}; pass a number from 0 to 0.5.")
        _check_range(self.timesteps)


@dataclass(frozen=True, kw_only=True)
class ScoringConfig(_Config):
    """What a score is: fixed by `fit`, which calibrates for it. What is not given follows the preset.

    Attributes:
        trials: S, the (t, noise) pairs of every image and class.
        timesteps: (lo, hi) that the trials' timesteps cover.
        density: "even", or "importance": more trials where the weighted errors of the shots differ more between
            classes (`timesteps.importance`); the score averages w / q times the error.
        weighting: as `timesteps.parse_weighting` reads it.
        witnesses: what decides beside the class tokens, by name (`witnesses.KINDS`): "features" of the U-Net,
            "network" (fine-tuned), "linear-network", "clip" (zero-shot), "tip-adapter", "linear-clip", with a model as
            "network:MODEL"; none: the class tokens alone.
        witness_weights: of each witness: how much a nat of its log-probabilities counts beside a nat of the class
            tokens' (their -score / temperature); at 0 it does not count, at 1 both count alike. "fit" chooses the
            weights under which held-out shots are most likely.
        temperature: of the softmax over minus the class tokens' own scores; "fit" fits that of the whole decision on
            held-out shots.
        calibration_images: shots whose errors `spread`, `relative` and the importance density read, spread over the
            classes; where there are more classes than that, of as many classes, drawn by the seed.
        folds: of cross-validation on the shots, for `auto`, the temperature and the reported accuracy; 0 for none.
        unet_scale: of the U-Net's LoRA at scoring.
        text_encoder_scale: of the text encoder's.
        seed: of the noise.

    Raises:
        ValueError: a value is out of its range.
    """

    trials: int = FROM_PRESET
    timesteps: tuple[int, int] = FROM_PRESET
    density: Density = FROM_PRESET
    weighting: str = FROM_PRESET
    witnesses: tuple[str, ...] = FROM_PRESET
    witness_weights: tuple[float, ...] | Literal["fit"] = FROM_PRESET
    temperature: float | Literal["fit"] = FROM_PRESET
    calibration_images: int = 24
    folds: int = 0
    unet_scale: float = FROM_PRESET
    text_encoder_scale: float = FROM_PRESET
    seed: int = 0

    def __post_init__(self) -> None:
        self._check(("trials", "calibration_images"), 1, "a whole number of at least 1")
        if self.timesteps is not None:
            _check_range(self.timesteps)
        if self.density not in (*get_args(Density), None):
            raise ValueError(f"density={self.density!r}; pass one of {get_args(Density)}.")
        self._check_witnesses()
        if self.folds < 0 or self.folds == 1:
            raise ValueError(f"folds={self.folds}; pass 2 or more, or 0 for no cross-validation.")
        if self.weighting is not None:
            self._check_weighting()
        if self.temperature == "fit" and self.folds < 2:
            raise ValueError("temperature='fit' needs held-out shots; pass folds=2 or more, or a temperature.")
        if isinstance(self.temperature, str) and self.temperature != "fit":
            raise ValueError(f"temperature={self.temperature!r}; pass a number above 0, or 'fit'.")
        if isinstance(self.temperature, int | float) and not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature}; pass a number above 0, or 'fit'.")

    def uses_witnesses(self, prediction: PredictionConfig) -> bool:
        """Whether witnesses count in a prediction, or draw up its shortlist."""
        count = prediction.use_witnesses and (self.witness_weights == "fit" or any(self.witness_weights))
        return bool(self.witnesses) and (count or prediction.shortlist is not None)

    def with_witnesses(self, names: Sequence[str]) -> ScoringConfig:
        """The scoring with these witnesses; raises ValueError where it names others."""
        named: Any = names if isinstance(names, str) else tuple(names)  # a text is refused as such
        if self.witnesses not in (None, named):
            raise ValueError(f"witnesses={names}, and {self.witnesses} in scoring; pass them once.")
        return replace(self, witnesses=named)

    def check_unchanged(self, fitted: ScoringConfig) -> None:
        """Raises a ValueError where a field is given here and is another one than at `fit`."""
        names = [f.name for f in fields(fitted) if getattr(self, f.name) not in (None, getattr(fitted, f.name))]
        if names:
            changed = ", ".join(f"{x}={getattr(self, x)!r}, {getattr(fitted, x)!r} at fit" for x in names)
            raise ValueError(
                f"The scoring was changed after fit ({changed}), and weights and temperature are calibrated for that "
                "of fit. Call fit again, or set scoring back to settings_.scoring; how images are decided is set in "
                "prediction."
            )

    def _check_witnesses(self) -> None:
        for name in ("witnesses", "witness_weights"):
            if isinstance(getattr(self, name), list):  # as a file of settings has them
                object.__setattr__(self, name, tuple(getattr(self, name)))
        names, weights = self.witnesses, self.witness_weights
        if isinstance(names, str):
            raise ValueError(f"witnesses={names!r} is one text; pass a tuple of names, ({names!r},).")
        if names is not None and len(set(names)) < len(names):
            raise ValueError(f"witnesses={names}; name each once.")
        if weights is None or weights == "fit":
            if weights == "fit" and self.folds < 2:
                raise ValueError("witness_weights='fit' needs held-out shots; pass folds=2 or more, or weights.")
            return
        if isinstance(weights, str) or not all(0 <= w < float("inf") for w in weights):
            raise ValueError(f"witness_weights={weights!r}; pass numbers of at least 0, or 'fit'.")
        if names is not None and len(names) != len(weights):
            raise ValueError(f"witness_weights={weights} for witnesses={names}; pass one weight for each.")

    def _check_weighting(self) -> None:
        weighting = parse_weighting(self.weighting)
        if weighting.name == "window" and self.timesteps is not None:
            (lo, hi), (first, last) = self.timesteps, weighting.parameters
            if max(lo, first) >= min(hi, last):
                raise ValueError(
                    f"No trial at timesteps={self.timesteps} lies inside {self.weighting}; set timesteps to the window."
                )
        if weighting.name == "auto" and self.folds < 2:
            raise ValueError("weighting='auto' is chosen on held-out shots; pass folds=2 or more.")


@dataclass(frozen=True, kw_only=True)
class PredictionConfig(_Config):
    """How an image is decided: may be another one at every prediction. What is not given follows the preset.

    Attributes:
        schedule: "racing" drops a class once it is not likely to win any more (`racing.Look`), "exhaustive" gives
            every class every trial, "published" eliminates by `stages`.
        confidence: of "racing", about the probability, at least, that it ends with the label of all trials, where the
            assumptions of `racing.Look` hold.
        stages: of "published", (trials so far, classes kept) each.
        shortlist: classes that get trials at all, the most probable ones by the witnesses; None: all. Bounds accuracy
            by its recall, which cross-validation reports.
        use_witnesses: whether the witnesses count in the decision, with the weights of `fit`.
        batch_size: evaluations per forward pass; decides memory and speed, never the result beyond rounding.

    Raises:
        ValueError: a value is out of its range.
    """

    schedule: Schedule = FROM_PRESET
    confidence: float = 0.9
    stages: tuple[tuple[int, int], ...] = PUBLISHED_STAGES
    shortlist: int | None = None
    use_witnesses: bool = True
    batch_size: int = FROM_PRESET

    def __post_init__(self) -> None:
        self._check(("batch_size",), 1, "a whole number of at least 1")
        if self.schedule not in (*get_args(Schedule), None):
            raise ValueError(f"schedule={self.schedule!r}; pass one of {get_args(Schedule)}.")
        object.__setattr__(self, "stages", tuple(map(tuple, self.stages)))  # lists, too, as a file of settings has them
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence={self.confidence}; pass a probability between 0 and 1.")
        if self.shortlist is not None and self.shortlist < 2:
            raise ValueError(f"shortlist={self.shortlist}; pass 2 or more classes to choose among, or None for all.")

    def looks(self, num_classes: int, trials: int) -> Sequence[Stage | Look]:
        """What an image goes through: the schedule for C classes and S trials.

        Raises:
            ValueError: published stages that do not end with all trials done and one class left.
        """
        if self.schedule == "published":
            if self.stages[-1:] != ((trials, 1),):
                raise ValueError(f"stages={self.stages} must end with ({trials}, 1): all trials and one class left.")
            return published_stages(num_classes, trials, self.stages)
        return racing(trials, confidence=self.confidence) if self.schedule == "racing" else exhaustive(trials)

    def evaluations(self, num_classes: int, trials: int) -> int:
        """What the trials of an image cost at most, in evaluations; the U-Net's features cost one more."""
        scored = min(num_classes, self.shortlist or num_classes)
        return count_evaluations(self.looks(num_classes, trials), scored)


class Settings(NamedTuple):
    """The three configurations together, complete."""

    training: TrainingConfig
    scoring: ScoringConfig
    prediction: PredictionConfig

    def check(self, num_train_timesteps: int) -> None:
        """Raises a ValueError where the configurations do not go together, or exceed the backbone's schedule."""
        training, scoring, prediction = self
        for name, config in (("training", training), ("scoring", scoring)):
            if config.timesteps[1] > num_train_timesteps:
                raise ValueError(
                    f"{name} with timesteps={config.timesteps} exceeds the backbone's {num_train_timesteps} "
                    "timesteps; pass (lo, hi) inside its schedule."
                )
        weighting = parse_weighting(scoring.weighting)
        if weighting.name == "window" and weighting.parameters[1] > num_train_timesteps:
            raise ValueError(f"weighting={scoring.weighting!r} exceeds the backbone's {num_train_timesteps} timesteps.")
        if prediction.schedule == "published" and scoring.density == "importance":
            raise ValueError("Published stages need an even grid; pass density='even', or schedule='racing'.")
        if prediction.shortlist is not None and not scoring.witnesses:
            raise ValueError(
                f"shortlist={prediction.shortlist} is drawn up by witnesses, and there are none; pass "
                "witnesses=('features',), with weight 0 where they should not decide."
            )
        prediction.looks(2, scoring.trials)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """As JSON holds them."""
        return {name: asdict(config) for name, config in self._asdict().items()}


def _check_range(timesteps: tuple[int, int]) -> None:
    lo, hi = timesteps
    if not 0 <= lo < hi:
        raise ValueError(f"timesteps={timesteps}; pass (lo, hi) with 0 <= lo < hi.")
