"""Timestep weights w(t), the density of trials that suits them, and the score that they give.

The *intervention*: restricting or weighting the diffusion timesteps that scoring may use. Functions take tensors and
return tensors; `alphas_cumprod` is the backbone's own schedule, never a typed-in one (`tif_released` excepted, which
reproduces code that typed one in). Weights come back as float64 [T] on the schedule's device.

Shapes in names: N images, C classes, S trials of an image, T timesteps of the backbone's schedule.
Sources: DiTi (Yue et al., ICLR 2024), TiF (Yue et al., CVPR 2024), PDAE (Zhang et al., NeurIPS 2022).
"""

import math
import re
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

NUM_EDITS = 500  # the larger edits d + 1, d + 2, .. that `tif` sets against the edit d
PDAE_GAMMA = 0.1
TIME_BINS = 20
VALUE_FLOOR = 1e-3

# Name of each weighting, and how many parameters it may be given.
WEIGHTS = {
    "uniform": (0,),
    "window": (2,),
    "pdae": (0, 1),
    "tif": (0, 1),
    "tif_released": (0, 1),
    "spread": (0,),
    "relative": (0,),
    "auto": (0,),
}


@dataclass(frozen=True, kw_only=True)
class Weighting:
    """A weighting by name, as configs and the command line hold it: `window(0, 300)`, `pdae`, `tif`.

    `parameters` are lo and hi of `window`, gamma of `pdae`, d of `tif` and `tif_released` (without it d is measured on
    the shots); the others take none. `str` gives the text that `parse_weighting` reads back. Raises ValueError.
    """

    name: str
    parameters: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        allowed = (
            "uniform, window(lo, hi), pdae, pdae(gamma), tif, tif(d), tif_released, tif_released(d), spread, relative, "
            "auto"
        )
        if len(self.parameters) not in WEIGHTS.get(self.name, ()):
            raise ValueError(f"no such weighting: {self}; choose one of {allowed}")
        if not all(math.isfinite(value) for value in self.parameters):
            raise ValueError(f"{self} has a parameter that is not finite; choose one of {allowed}")
        if self.name == "window":
            lo, hi = self.parameters
            if not (0 <= lo < hi and lo == int(lo) and hi == int(hi)):
                raise ValueError(f"{self} is no window; lo and hi are integers with 0 <= lo < hi, as in window(0, 300)")
        elif any(value <= 0 for value in self.parameters):
            raise ValueError(f"{self}: its parameter must be above 0")

    def __str__(self) -> str:
        if not self.parameters:
            return self.name
        values = ", ".join(str(int(value)) if value % 1 == 0 else str(value) for value in self.parameters)
        return f"{self.name}({values})"


def parse_weighting(text: str) -> Weighting:
    """Read `window(0, 300)`, `pdae(0.1)`, `tif`, .. into a `Weighting`; ValueError where it names none."""
    match = re.fullmatch(r"\s*(\w+)\s*(?:\(([^()]*)\))?\s*", text)
    if match is None:
        raise ValueError(f"cannot read the weighting {text!r}; write a name, or name(number, ..) as in window(0, 300)")
    name, arguments = match.groups()
    try:
        parameters = tuple(float(value) for value in arguments.split(",")) if arguments else ()
    except ValueError:
        raise ValueError(
            f"cannot read the numbers of the weighting {text!r}; write them as in window(0, 300)"
        ) from None
    return Weighting(name=name, parameters=parameters)


def snr(alphas_cumprod: Tensor) -> Tensor:
    """Signal-to-noise ratio abar / (1 - abar), float64 [T].

    `alphas_cumprod`: float32 or float64 [T], values in [0, 1). ValueError otherwise: half precision moves sigma by 7 %
    at t = 0.
    """
    abar_T = _schedule(alphas_cumprod)
    return abar_T / (1 - abar_T)


def uniform(alphas_cumprod: Tensor) -> Tensor:
    """Weight 1 at every timestep, float64 [T]."""
    return torch.ones_like(_schedule(alphas_cumprod))


def window(alphas_cumprod: Tensor, lo: int, hi: int) -> Tensor:
    """Weight 1 where lo <= t < hi and 0 elsewhere, float64 [T]; ValueError unless 0 <= lo < hi <= T."""
    weights_T = torch.zeros_like(_schedule(alphas_cumprod))
    if not 0 <= lo < hi <= len(weights_T):
        raise ValueError(f"window({lo}, {hi}) is empty or outside the schedule; 0 <= lo < hi <= {len(weights_T)}")
    weights_T[lo:hi] = 1
    return weights_T


def pdae(alphas_cumprod: Tensor, gamma: float = PDAE_GAMMA) -> Tensor:
    """`pdae_weights`, scaled to a maximum of 1, float64 [T]."""
    weights_T = pdae_weights(alphas_cumprod, gamma)
    return weights_T / weights_T.max()


def pdae_weights(alphas_cumprod: Tensor, gamma: float = PDAE_GAMMA) -> Tensor:
    """lambda_t = SNR^gamma / (1 + SNR), float64 [T] (PDAE, section 3.3): little at small and at large t."""
    snr_T = snr(alphas_cumprod)
    return snr_T**gamma / (1 + snr_T)


def tif(alphas_cumprod: Tensor, d: float) -> Tensor:
    """Share of the attribute loss at t that falls on the smallest edit between two classes, float64 [T] (TiF).

    w = erfc(s d) / (erfc(s d) + sum_{j=0..499} erfc(s (d + 1 + j))), s = sqrt(abar) / (2 sqrt(2 (1 - abar))); erfc of
    s d is the chance that noise at t hides an edit of size d. Close to 1 while noise hides the smallest edit alone.

    `d`: the edit's size in units of the scaled latents, above 0, from `attribute_distance`; ValueError otherwise.
    """
    _check_distance(d)
    # erfc underflows from an argument of 27 on. erfc(x) = erfcx(x) exp(-x^2) keeps its logarithm, and the exponents'
    # difference (s (d+1+j))^2 - (s d)^2 is taken in closed form: subtracting the two would lose digits at small t.
    s_T = (snr(alphas_cumprod) / 8).sqrt()
    step_J = torch.arange(1, NUM_EDITS + 1, dtype=s_T.dtype, device=s_T.device)
    log_erfcx_TJ = torch.special.erfcx(s_T[:, None] * (d + step_J)).log()
    log_erfcx_T1 = torch.special.erfcx(s_T[:, None] * d).log()
    log_ratio_TJ = log_erfcx_TJ - log_erfcx_T1 - s_T[:, None] ** 2 * step_J * (2 * d + step_J)
    return torch.sigmoid(-log_ratio_TJ.logsumexp(dim=1))


def tif_released(d: float) -> Tensor:
    """The weights that TiF's published code computes instead of `tif`, float64 [1000], whatever the backbone.

    Linear betas 1e-4..0.02 in float32, 1 - erf in float64, 1e-18 added to the sum. 1 - erf is 0 from an argument of 5.9
    on, so small t get no weight at all: at d = 10, 0 through t = 169, 0.994 at 200, 0.53 at 400, an accidental
    band-pass. Only for reproducing published numbers. `d` is above 0, from `attribute_distance_released`.
    """
    _check_distance(d)
    abar_T = (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(dim=0)
    scale_T = abar_T.sqrt() / (2 * (2 * (1 - abar_T)).sqrt())
    weights = []
    # One term after another, by math.erf: below 1e-15 another erf or another order of summing gives other weights.
    for scale in scale_T.tolist():
        fine, coarse = 1 - math.erf(scale * d), 1e-18
        for j in range(NUM_EDITS):
            coarse += 1 - math.erf(scale * (d + 1 + j))
        weights.append(fine / (fine + coarse))
    return torch.tensor(weights, dtype=torch.float64)


def spread(errors_NCS: Tensor, timesteps: Tensor, num_train_timesteps: int) -> Tensor:
    """1 / (standard deviation over classes of the errors at t), estimated on shots, float64 [T].

    `timesteps`: [S], the same for all images, or [N, S]. Weighted so, each trial moves the score by as much as any
    other, which is why nothing is scaled: the score is in units of the classes' spread. Between the trials' timesteps
    the weights are interpolated (`_one_over`).

    ValueError: non-finite errors (names the class), fewer than two classes, timesteps outside the schedule, or classes
    that do not differ at half or more of the timesteps.
    """
    _check_errors(errors_NCS)
    if errors_NCS.shape[1] < 2:
        raise ValueError(f"errors of {errors_NCS.shape[1]} class have no spread over classes; give two classes or more")
    return _one_over(errors_NCS.double().std(dim=1, correction=0), timesteps, num_train_timesteps)


def relative(errors_NCS: Tensor, timesteps: Tensor, num_train_timesteps: int) -> Tensor:
    """1 / (mean of the errors at t over classes and images), estimated on shots, float64 [T].

    `timesteps`: as for `spread`. Weighted so, a trial counts by the share of its error in which the classes differ, and
    the score of a class is its mean error relative to the usual one. Steadier than `spread`: a mean needs fewer shots
    than a standard deviation, and a t at which the classes hardly differ gets no large weight for it.

    ValueError: non-finite errors (names the class), timesteps outside the schedule, or errors that are 0.
    """
    _check_errors(errors_NCS)
    return _one_over(errors_NCS.double().mean(dim=1), timesteps, num_train_timesteps)


FROM_ERRORS = {"spread": spread, "relative": relative}  # weightings that are estimated on errors of shots


def where_weighted(weights_T: Tensor, lo: int, hi: int) -> Tensor:
    """The even density of timesteps over those of [lo, hi) that have a weight, float64 [T], mean 1 over [lo, hi).

    Trials drawn from it are never spent where the weight is 0. ValueError: no weight inside [lo, hi).
    """
    used_T = torch.zeros_like(weights_T, dtype=torch.float64)
    used_T[lo:hi] = (weights_T[lo:hi] > 0).double()
    if not used_T.any():
        raise ValueError(f"no timestep in [{lo}, {hi}) has any weight; widen timesteps to those that have")
    return used_T * (hi - lo) / used_T.sum()


def importance(density_T: Tensor, weights_T: Tensor, spread_T: Tensor) -> Tensor:
    """Density q of timesteps under which each trial moves the score by as much as any other, float64 [T].

    q is proportional to w divided by `spread_T`, the weights of `spread` (1 / standard deviation over classes): the
    density of least variance for the mean of (w / q) times the classes' differences (Owen, "Monte Carlo theory, methods
    and examples", section 9.1). A tenth of it is `density_T`, that of `where_weighted`, so that w / q stays bounded.
    """
    q_T = torch.where(density_T > 0, weights_T / spread_T, 0)
    return 0.9 * q_T * density_T.sum() / q_T.sum() + 0.1 * density_T


def trial_weights(weights_T: Tensor, timesteps: Tensor) -> Tensor:
    """Weights of trials from the weights of all timesteps: `weights_T` at `timesteps` ([S] or [N, S]), in their shape.

    ValueError: timesteps outside the schedule, or an image none of whose trials has a weight other than 0.
    """
    _check_timesteps(timesteps, len(weights_T))
    weights = weights_T[timesteps.to(weights_T.device)]
    weightless = (weights == 0).all(dim=-1)
    if weightless.any():
        t = timesteps[weightless.to(timesteps.device)].flatten()
        inside = weights_T.nonzero().flatten().tolist() or ["nowhere"]
        raise ValueError(
            f"no trial has any weight: the weights differ from 0 for t from {inside[0]} to {inside[-1]}, and the "
            f"{len(t)} trials have t from {t.min()} to {t.max()}; draw trials inside the window, or widen it"
        )
    return weights


def weighted_mean(errors_NCS: Tensor, weights: Tensor, density: Tensor | None = None) -> Tensor:
    """Mean over trials of (w / q) e, float64 [N, C]; the smallest score of an image wins.

    `weights`: w at each trial (`trial_weights`), [S] or [N, S]. `density`: q, the density that the trials' timesteps
    were drawn from, above 0 and in the same shape; without it 1, which is right for an even grid.
    ValueError: an error that is not finite (names the class: argmin would pick a NaN), a weight that is negative or not
    finite, or an image whose weights are all 0.
    """
    _check_errors(errors_NCS)
    weights_NS = _per_image(weights, errors_NCS, "weights").double()
    if not (weights_NS.isfinite().all() and (weights_NS >= 0).all()):
        raise ValueError(f"weights must be finite and not negative; the smallest is {weights_NS.min()}")
    weightless_N = (weights_NS == 0).all(dim=1)
    if weightless_N.any():
        raise ValueError(
            f"the weights of all {weights_NS.shape[1]} trials of image {int(weightless_N.nonzero()[0])} are 0: none of "
            "its timesteps lies inside the window; draw trials inside the window, or widen it"
        )
    if density is not None:
        density_NS = _per_image(density, errors_NCS, "density").double()
        if not (density_NS > 0).all():
            raise ValueError(f"the density of drawn timesteps must be above 0; the smallest is {density_NS.min()}")
        weights_NS = weights_NS / density_NS
    return torch.einsum("ncs,ns->nc", errors_NCS.double(), weights_NS) / errors_NCS.shape[2]


def _schedule(alphas_cumprod: Tensor) -> Tensor:
    if alphas_cumprod.dtype not in (torch.float32, torch.float64) or alphas_cumprod.ndim != 1:
        raise ValueError(
            f"alphas_cumprod is {alphas_cumprod.dtype} with shape {tuple(alphas_cumprod.shape)}; give the scheduler's "
            "own [T] in float32 or float64"
        )
    if not ((alphas_cumprod >= 0) & (alphas_cumprod < 1)).all():
        raise ValueError(
            f"alphas_cumprod lies in [{alphas_cumprod.min()}, {alphas_cumprod.max()}]; it must be in [0, 1)"
        )
    return alphas_cumprod.double()


def _check_distance(d: float) -> None:
    if not 0 < d < math.inf:
        raise ValueError(f"d = {d}: the distance between classes must be above 0 and finite")


def _check_errors(errors_NCS: Tensor) -> None:
    if errors_NCS.ndim != 3 or 0 in errors_NCS.shape:
        raise ValueError(f"errors have shape {tuple(errors_NCS.shape)}; give [images, classes, trials], none of them 0")
    broken = (~errors_NCS.isfinite()).nonzero()
    if len(broken):
        image, label, trial = broken[0].tolist()
        raise ValueError(
            f"class index {label} has the error {errors_NCS[image, label, trial].item()} on image {image}, trial "
            f"{trial} ({len(broken)} errors are not finite); train this class again or remove it"
        )


def _check_timesteps(timesteps: Tensor, num_train_timesteps: int) -> None:
    if timesteps.is_floating_point() or timesteps.min() < 0 or timesteps.max() >= num_train_timesteps:
        raise ValueError(
            f"timesteps of {timesteps.dtype} from {timesteps.min()} to {timesteps.max()}; they must be integers from "
            f"0 to {num_train_timesteps - 1}"
        )


def _per_image(values: Tensor, errors_NCS: Tensor, name: str) -> Tensor:
    N, _, S = errors_NCS.shape
    if values.shape not in ((S,), (N, S)):
        raise ValueError(f"{name} have shape {tuple(values.shape)}; for these errors give {(S,)} or {(N, S)}")
    return values.to(errors_NCS.device).expand(N, S)


def _one_over(values_NS: Tensor, timesteps: Tensor, num_train_timesteps: int) -> Tensor:
    """1 / (mean over images of a positive figure of each trial), float64 [T].

    Between the trials' timesteps its logarithm is interpolated, outside them it is constant. Where each image has
    timesteps of its own ([N, S]), one t has too few images for a mean, so trials are pooled over twentieths of the
    schedule first. A value below 1/1000 of the median over t counts as that: such timesteps would outweigh all others.
    """
    timesteps_NS = _per_image(timesteps, values_NS[:, None], "timesteps")
    _check_timesteps(timesteps_NS, num_train_timesteps)
    t = timesteps_NS.flatten().cpu().numpy()
    groups = t if timesteps.ndim == 1 else t * TIME_BINS // num_train_timesteps
    _, group, count = np.unique(groups, return_inverse=True, return_counts=True)
    mean_t = np.bincount(group, weights=t) / count
    mean_value = np.bincount(group, weights=values_NS.flatten().cpu().numpy()) / count
    floor = VALUE_FLOOR * np.median(mean_value)
    if floor == 0:
        raise ValueError("the errors of all classes are the same at most timesteps: are the class tokens trained?")
    log_value_T = np.interp(np.arange(num_train_timesteps), mean_t, np.log(np.maximum(mean_value, floor)))
    return torch.from_numpy(np.exp(-log_value_T)).to(values_NS.device)
