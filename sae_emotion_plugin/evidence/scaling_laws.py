"""Scaling laws of losses: how they fall with width, sparsity and compute, with intervals and with what was left out.

The forms are those of arXiv 2406.04093, section 3: power laws with an irreducible term. All fits minimise squared
relative errors. Intervals are percentiles of a residual bootstrap whose residuals are inflated for the parameters spent
and, in each resample, for how little so few of them say of their own size (the factor of Student's t). Every value of
the first variable is also left out in turn and predicted from the rest; where that cannot be done there is no fit, and
the law says why. Points count as independent of each other. Arrays in, numbers out; no model, no torch.

Coverage of nominal 95 % intervals of e + 9 N^-0.6 at seven widths, 200 simulated data sets each:

    e      noise   seeds   e      a      b      left-out points
    0.05   1 %     1       96.0   95.5   95.5   93.7
    0.05   3 %     1       96.5   97.0   96.5   93.9
    0.05   1 %     3       92.5   92.5   92.0   98.4 (means of three, in intervals for one)
    0      1 %     1       98.0   92.0   90.5   94.8
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Num
from scipy.stats import t as student_t

from sae_emotion_plugin.evidence.curve_fits import least_squares, power_fits
from sae_emotion_plugin.evidence.resampling import check_resampling, checked_values

EXPONENTS = (0.02, 4.0)
"""Between which exponents are looked for."""
FEWEST_VALUES = 5
"""Values of the variable that a power law with irreducible term needs: three, one to leave out and one to err by."""
FEWEST_WIDTHS = 4
SURFACE_PARAMETERS = 6
Predictor = Callable[[Float[np.ndarray, "resample parameter"], Float[np.ndarray, "variable point"]], np.ndarray]


@dataclass(frozen=True)
class Estimate:
    """A number with the ends of its interval."""

    name: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class LeftOut:
    """A point that the law was fitted without, beside what the law says of it."""

    at: dict[str, float]
    measured: float
    """Mean of the values there."""
    predicted: float
    low: float
    """Ends of the prediction interval of one value."""
    high: float
    extrapolated: bool
    """Whether it lies beyond all points of the fit."""

    @property
    def inside(self) -> bool:
        """Whether the measured value lies in the interval."""
        return self.low <= self.measured <= self.high


@dataclass(frozen=True)
class ScalingLaw:
    """A fitted law, or the one line that says why there is none."""

    name: str
    formula: str
    parameters: tuple[Estimate, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    n_points: int = 0
    level: float = 0.95
    reason: str | None = None
    """Why there is no fit; None where there is one."""
    note: str = ""
    """What its points do not show."""

    def __str__(self) -> str:
        note = f"; {self.note}" if self.note else ""
        if self.reason is not None:
            return f"{self.name}: no fit, {self.reason}{note}"
        found = ", ".join(f"{one.name} {one.value:.4g} [{one.low:.4g}, {one.high:.4g}]" for one in self.parameters)
        inside = sum(one.inside for one in self.left_out)
        return (
            f"{self.name} = {self.formula}: {found} ({self.n_points} points; {inside} of {len(self.left_out)} left-out "
            f"ones inside their {self.level:.0%} prediction intervals){note}"
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "ScalingLaw":
        """The law that `to_dict` gave."""
        parameters = tuple(Estimate(**one) for one in data["parameters"])
        return cls(**{**data, "parameters": parameters, "left_out": tuple(LeftOut(**one) for one in data["left_out"])})


def fit_power_law(
    x: Num[np.ndarray, " point"] | Sequence[float | int],
    values: Num[np.ndarray, " point"] | Sequence[float | int],
    *,
    name: str = "L(N)",
    variable: str = "N",
    rising: bool = False,
    level: float = 0.95,
    resamples: int = 1_000,
    seed: int = 0,
) -> ScalingLaw:
    """Returns the law e + a x^-b with e, a >= 0 (`rising`: e + a x^b), or why there is none.

    ValueError for x or values that are not finite and above 0, and lists of unequal lengths.
    """
    check_resampling(level, resamples)
    xs, ys = positive_values(x, variable), positive_values(values, name)
    if len(xs) != len(ys):
        raise ValueError(f"{len(xs)} values of {variable}, but {len(ys)} of {name}")
    sign = 1 if rising else -1
    law = ScalingLaw(name, f"e + a {variable}^{'' if rising else '-'}b", n_points=len(xs), level=level)
    if (different := len(np.unique(xs))) < FEWEST_VALUES:
        return _none(law, f"it needs {FEWEST_VALUES} different {variable}, and there are {different}")
    middle = float(np.exp(np.log(xs).mean()))

    def fit(points: np.ndarray, drawn: np.ndarray, start: np.ndarray | None) -> np.ndarray:
        return power_fits(sign * np.log(points[0] / middle), drawn, EXPONENTS)

    def predict(parameters: np.ndarray, points: np.ndarray) -> np.ndarray:
        e, a, b = parameters.T[:, :, None]
        return e + a * np.exp(sign * b * np.log(points[0] / middle))

    draw = _Bootstrap(fit, predict, 3, level, resamples, seed)
    best, refits = draw.fits(xs[None], ys)
    if not best[1] > 0:
        return _none(law, f"{name} does not {'rise' if rising else 'fall'} with {variable}")
    if not EXPONENTS[0] * 1.01 < best[2] < EXPONENTS[1] * 0.99:
        return _none(law, f"its exponent is not between {EXPONENTS[0]:g} and {EXPONENTS[1]:g}")
    low, high = np.quantile(refits[:, 2], [(1 - level) / 2, (1 + level) / 2])
    if low < EXPONENTS[0] * 1.01 or high > EXPONENTS[1] * 0.99:
        return _none(law, f"{len(xs)} points do not tell its exponent")
    # a belongs to x itself, not to x over its mean.
    scaled = [np.c_[one[:, 0], one[:, 1] * middle ** (-sign * one[:, 2]), one[:, 2]] for one in (best[None], refits)]
    return _fitted(law, ("e", "a", "b"), scaled[0][0], scaled[1], draw.left_out((variable,), xs[None], ys))


def fit_width_and_sparsity(
    widths: Num[np.ndarray, " point"] | Sequence[float | int],
    ks: Num[np.ndarray, " point"] | Sequence[float | int],
    losses: Num[np.ndarray, " point"] | Sequence[float | int],
    *,
    level: float = 0.95,
    resamples: int = 400,
    seed: int = 0,
) -> ScalingLaw:
    """Returns the law of width N and active latents K, of the paper's form, or why there is none.

    L(N, K) = exp(alpha + beta_k log K + beta_n log N + gamma log K log N) + exp(zeta + eta log K). ValueError as
    `fit_power_law`.
    """
    check_resampling(level, resamples)
    n, k, ys = positive_values(widths, "N"), positive_values(ks, "K"), positive_values(losses, "L(N, K)")
    if not len(n) == len(k) == len(ys):
        raise ValueError(f"{len(n)} values of N and {len(k)} of K, but {len(ys)} losses")
    formula = "exp(alpha + beta_k log K + beta_n log N + gamma log K log N) + exp(zeta + eta log K)"
    law = ScalingLaw("L(N, K)", formula, n_points=len(ys), level=level)
    n_widths, n_ks = len(np.unique(n)), len(np.unique(k))
    if n_widths < FEWEST_WIDTHS or n_ks < 2:
        return _none(
            law, f"it needs {FEWEST_WIDTHS} different N and 2 different K, and there are {n_widths} and {n_ks}"
        )
    if (
        fewest := min(len({*zip(n[n != one], k[n != one], strict=True)}) for one in np.unique(n))
    ) <= SURFACE_PARAMETERS:
        needed = f"it needs {SURFACE_PARAMETERS + 1} different points without the cells of a width"
        return _none(law, f"{needed}, and there are {fewest}")
    centre = np.array([np.log(n).mean(), np.log(k).mean()])[:, None]

    def logs(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        log_n, log_k = np.log(points) - centre
        one = np.ones_like(log_n)
        return np.stack([one, log_k, log_n, log_n * log_k]), np.stack([one, log_k])

    def predict(parameters: np.ndarray, points: np.ndarray) -> np.ndarray:
        reducible, irreducible = logs(points)
        return np.exp(parameters[:, :4] @ reducible) + np.exp(parameters[:, 4:] @ irreducible)

    def fit(points: np.ndarray, drawn: np.ndarray, start: np.ndarray | None) -> np.ndarray:
        reducible, irreducible = logs(points)

        def residuals(parameters: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            falls, stays = np.exp(parameters[:, :4] @ reducible), np.exp(parameters[:, 4:] @ irreducible)
            slopes = np.concatenate([falls[:, None] * reducible, stays[:, None] * irreducible], axis=1)
            return (falls + stays) / wanted - 1, (slopes / wanted[:, None]).transpose(0, 2, 1)

        if start is not None:
            return least_squares(residuals, np.repeat(start[None], len(drawn), axis=0), drawn)[0]
        starts = _surface_starts(float(np.log(drawn[0]).mean()))
        found, errors = least_squares(residuals, starts, np.repeat(drawn, len(starts), axis=0))
        return found[[int(errors.argmin())]]

    draw = _Bootstrap(fit, predict, SURFACE_PARAMETERS, level, resamples, seed)
    points = np.stack([n, k])
    best, refits = draw.fits(points, ys)
    if not np.isfinite(best).all():
        return _none(law, "no parameters were found")
    # In centred logarithms this is the slope of the reducible part along N at the mean log K.
    if not np.nanquantile(refits[:, 2], (1 + level) / 2) < 0:
        return _none(law, f"{len(ys)} points do not tell that it falls with N")
    names = ("alpha", "beta_k", "beta_n", "gamma", "zeta", "eta")
    own = [_uncentred(one, float(centre[0, 0]), float(centre[1, 0])) for one in (best[None], refits)]
    return _fitted(law, names, own[0][0], own[1], draw.left_out(("N", "K"), points, ys))


def fit_stable_rate(
    widths: Num[np.ndarray, " run"] | Sequence[float | int],
    rates: Num[np.ndarray, " run"] | Sequence[float | int],
    stable: Bool[np.ndarray, " run"] | Sequence[bool],
    *,
    level: float = 0.95,
    resamples: int = 1_000,
    seed: int = 0,
) -> ScalingLaw:
    """Returns the law c N^-b of the largest stable learning rate, or why there is none (the paper has b = 1/2).

    A width counts where its rates hold one that was unstable above one that was stable in all runs: the rate lies
    between the two, at their geometric mean; each resample draws it anew from between them. ValueError as
    `fit_power_law`.
    """
    check_resampling(level, resamples)
    n, lr, held = positive_values(widths, "N"), positive_values(rates, "lr"), np.asarray(stable, dtype=bool)
    if not len(n) == len(lr) == len(held):
        raise ValueError(f"{len(n)} widths and {len(lr)} rates, but {len(held)} verdicts")
    law = ScalingLaw("lr(N)", "c N^-b", level=level)
    brackets = [(one, *_bracket(lr[n == one], held[n == one])) for one in np.unique(n)]
    known = np.array([(one, low, high) for one, low, high in brackets if low and high]).reshape(-1, 3)
    if len(known) < FEWEST_WIDTHS:
        need = f"it needs {FEWEST_WIDTHS} widths with a stable rate and an unstable one above it"
        return _none(law, f"{need}, and there are {len(known)}")
    xs, ends = known[:, 0], np.log(known[:, 1:])
    half = (ends[:, 1] - ends[:, 0]) / 2

    def fit(points: np.ndarray, drawn: np.ndarray, start: np.ndarray | None) -> np.ndarray:
        design = np.stack([np.ones_like(points[0]), -np.log(points[0])], axis=1)
        return np.linalg.lstsq(design, np.log(drawn).T, rcond=None)[0].T

    def predict(parameters: np.ndarray, points: np.ndarray) -> np.ndarray:
        return np.exp(parameters[:, :1] - parameters[:, 1:] * np.log(points[0]))

    draw = _Bootstrap(fit, predict, 2, level, resamples, seed, half)
    ys = np.exp(ends.mean(axis=1))
    best, refits = draw.fits(xs[None], ys)
    own = [np.c_[np.exp(one[:, 0]), one[:, 1]] for one in (best[None], refits)]
    law = ScalingLaw(law.name, law.formula, n_points=len(known), level=level)
    return _fitted(law, ("c", "b"), own[0][0], own[1], draw.left_out(("N",), xs[None], ys))


def per_doubling(
    x: Num[np.ndarray, " point"] | Sequence[float | int],
    values: Num[np.ndarray, " point"] | Sequence[float | int],
    groups: Sequence[Any] | None = None,
    *,
    level: float = 0.95,
) -> Estimate | None:
    """Returns what a doubling of x adds to the values, with Student's interval; None with too few points.

    Each group has a level of its own; the slope is common to all. Points of one x may err together (one start, one
    order of batches), so what is counted are the xs and not the points. ValueError as `fit_power_law`.
    """
    xs, ys = np.log2(positive_values(x, "x")), checked_values(values, "values")
    names = [0] * len(xs) if groups is None else list(groups)
    if not len(xs) == len(ys) == len(names):
        raise ValueError(f"{len(xs)} values of x and {len(ys)} values, but {len(names)} groups")
    _, place = np.unique(xs, return_inverse=True)
    left = min(len(xs) - len(set(names)) - 1, int(place.max(initial=-1)) + 1 - 2)
    for name in set(names):
        own = np.array([one == name for one in names])
        xs[own], ys[own] = xs[own] - xs[own].mean(), ys[own] - ys[own].mean()
    weights = np.bincount(place)
    xs, ys = (np.bincount(place, one) / weights for one in (xs, ys))
    spread = float((weights * xs**2).sum())
    if left < 2 or spread < 1e-12:
        return None
    slope = float((weights * xs * ys).sum() / spread)
    error = math.sqrt(float((weights * (ys - slope * xs) ** 2).sum()) / left / spread)
    half = float(student_t.ppf((1 + level) / 2, left)) * error
    return Estimate("per doubling", slope, slope - half, slope + half)


@dataclass(frozen=True)
class _Bootstrap:
    """Fits of drawn values, and of the values without those at one place."""

    fit: Callable[[np.ndarray, np.ndarray, np.ndarray | None], np.ndarray]
    """Points [variable point], values [resample point] and where to start -> parameters [resample parameter]."""
    predict: Predictor
    n_parameters: int
    level: float
    resamples: int
    seed: int
    reach: np.ndarray | None = None
    """How far, in logarithms, a value may lie from what is given for it."""

    def fits(self, points: np.ndarray, ys: np.ndarray, reach: np.ndarray | None = None) -> tuple[np.ndarray, ...]:
        """The parameters, and those of every resample."""
        best = self.fit(points, ys[None], None)[0]
        fitted = self.predict(best[None], points)[0]
        rng = np.random.default_rng(self.seed)
        drawn = fitted * (1 + self._noise(ys / fitted - 1, rng, len(ys)))
        reach = self.reach if reach is None else reach
        if reach is not None:
            drawn = drawn * np.exp(rng.uniform(-1, 1, drawn.shape) * reach)
        return best, self.fit(points, drawn, best)

    def left_out(self, names: Sequence[str], points: np.ndarray, ys: np.ndarray) -> tuple[LeftOut, ...]:
        """Each value of the first variable without its points, and what the rest says of them."""
        low, high = (1 - self.level) / 2, (1 + self.level) / 2
        rows = []
        for value in np.unique(points[0]):
            out = points[0] == value
            rest, seen = points[:, ~out], ys[~out]
            best, refits = self.fits(rest, seen, None if self.reach is None else self.reach[~out])
            noise = self._noise(seen / self.predict(best[None], rest)[0] - 1, np.random.default_rng(self.seed), 1)
            for place in np.unique(points[:, out], axis=1).T:
                here = (points == place[:, None]).all(axis=0)
                drawn = (self.predict(refits, place[:, None]) * (1 + noise))[:, 0]
                ends = np.quantile(drawn[np.isfinite(drawn)], [low, high]).tolist()
                predicted = float(self.predict(best[None], place[:, None])[0, 0])
                beyond = bool(value < rest[0].min() or value > rest[0].max())
                at = dict(zip(names, place.tolist(), strict=True))
                rows.append(LeftOut(at, float(ys[here].mean()), predicted, ends[0], ends[1], beyond))
        return tuple(rows)

    def _noise(self, residuals: np.ndarray, rng: np.random.Generator, n: int) -> np.ndarray:
        left = len(residuals) - self.n_parameters
        inflated = (residuals - residuals.mean()) * math.sqrt(len(residuals) / left)
        size = np.sqrt(left / rng.chisquare(left, self.resamples))
        # Below -0.9 there would hardly be a loss left.
        return np.maximum(rng.choice(inflated, (self.resamples, n)) * size[:, None], -0.9)


def _surface_starts(level: float) -> Float[np.ndarray, "start 6"]:
    """Places to begin at: a small, a half and a large irreducible share, with slopes of usual size."""
    return np.array(
        [
            [level + math.log(1 - share), slope_k, slope_n, 0.0, level + math.log(share), slope_k]
            for share in (0.05, 0.5, 0.9)
            for slope_k in (0.0, -0.5)
            for slope_n in (-0.1, -0.7)
        ]
    )


def _uncentred(parameters: np.ndarray, n: float, k: float) -> np.ndarray:
    """The parameters for logarithms as they are, from those for logarithms less their means."""
    alpha, of_k, of_n, gamma, zeta, eta = parameters.T
    own = (alpha - of_k * k - of_n * n + gamma * n * k, of_k - gamma * n, of_n - gamma * k, gamma, zeta - eta * k, eta)
    return np.stack(own, axis=1)


def _bracket(rates: np.ndarray, stable: np.ndarray) -> tuple[float, float]:
    """The largest rate that is stable in all its runs, and the smallest unstable one above it; 0 for a missing one."""
    verdicts = {rate: bool(stable[rates == rate].all()) for rate in np.unique(rates).tolist()}
    low = max((rate for rate, held in verdicts.items() if held), default=0.0)
    return low, min((rate for rate, held in verdicts.items() if not held and rate > low), default=0.0)


def _fitted(
    law: ScalingLaw, names: Sequence[str], best: np.ndarray, refits: np.ndarray, left_out: tuple[LeftOut, ...]
) -> ScalingLaw:
    refits = refits[np.isfinite(refits).all(axis=1)]
    ends = np.quantile(refits, [(1 - law.level) / 2, (1 + law.level) / 2], axis=0)
    found = zip(names, best.tolist(), *ends.tolist(), strict=True)
    return ScalingLaw(law.name, law.formula, tuple(Estimate(*one) for one in found), left_out, law.n_points, law.level)


def _none(law: ScalingLaw, reason: str) -> ScalingLaw:
    return ScalingLaw(law.name, law.formula, n_points=law.n_points, level=law.level, reason=reason)


def positive_values(values: Any, what: str) -> Float[np.ndarray, " point"]:
    """Returns `values` as float64. ValueError, calling them `what`, when one is not finite or not above 0."""
    array = checked_values(values, what)
    if not (array > 0).all():
        raise ValueError(f"{what} must be above 0, got {float(array[~(array > 0)][0])}")
    return array
