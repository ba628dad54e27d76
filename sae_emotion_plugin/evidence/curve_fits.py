"""Least squares of many small problems at once, as a bootstrap needs them. Arrays in, numbers out."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

Residuals = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Parameters [problem parameter] and wanted values [problem point] -> residuals and their slopes [... parameter]."""


def least_squares(
    residuals: Residuals,
    start: Float[np.ndarray, "problem parameter"],
    wanted: Float[np.ndarray, "problem point"],
    steps: int = 200,
) -> tuple[Float[np.ndarray, "problem parameter"], Float[np.ndarray, " problem"]]:
    """Returns the parameters of each problem and its sum of squares (Marquardt 1963); no step makes that larger."""
    found = start.astype(np.float64).copy()
    damping = np.full(len(found), 1e-2)
    with np.errstate(over="ignore", invalid="ignore"):
        wrong, slopes = residuals(found, wanted)
        errors = (wrong**2).sum(axis=1)
        for _ in range(steps):
            curvature = np.einsum("rpi,rpj->rij", slopes, slopes)
            gradient = np.einsum("rpi,rp->ri", slopes, wrong)
            own = np.einsum("rii->ri", curvature)
            # A parameter without any slope stays where it is.
            ridge = damping[:, None] * own + 1e-12 * (1 + own.max(axis=1, keepdims=True))
            step = np.linalg.solve(curvature + ridge[:, :, None] * np.eye(found.shape[1]), -gradient[:, :, None])
            tried = found + step[:, :, 0]
            new_wrong, new_slopes = residuals(tried, wanted)
            new_errors = (new_wrong**2).sum(axis=1)
            better = new_errors < errors
            done = np.where(better, errors - new_errors, 0.0) <= 1e-13 * errors
            found[better], wrong[better], slopes[better] = tried[better], new_wrong[better], new_slopes[better]
            errors = np.where(better, new_errors, errors)
            if (done & (~better | (damping < 1e-6)) & (damping > 1e9)).all() or (better & done).all():
                break
            damping = np.clip(np.where(better, damping / 5, damping * 4), 1e-12, 1e12)
    return found, errors


def power_fits(
    logs: Float[np.ndarray, " point"], ys: Float[np.ndarray, "problem point"], exponents: tuple[float, float]
) -> Float[np.ndarray, "problem 3"]:
    """Returns e, a, b >= 0 of e + a exp(b logs) with the least squared relative error.

    For each b on ever finer grids between the two `exponents` the best e and a are known.
    """
    tried = np.geomspace(*exponents, 80)
    weights, inverse = 1 / ys**2, 1 / ys
    basis = np.exp(tried[:, None] * logs)
    sums = [one @ two.T for one, two in ((weights, basis), (weights, basis**2), (inverse, basis))]
    e, a = _nonnegative(weights.sum(axis=1, keepdims=True), sums, inverse.sum(axis=1, keepdims=True))
    # What is left of the sum of squares, which is 1 a point without a law.
    best = (e * inverse.sum(axis=1, keepdims=True) + a * sums[2]).argmax(axis=1)
    low, high = (tried[np.clip(best + shift, 0, len(tried) - 1)] for shift in (-1, 1))
    rows = np.arange(len(ys))
    found = np.zeros((len(ys), 3))
    for _ in range(7):
        grid = np.linspace(low, high, 9).T
        near = np.exp(grid[:, :, None] * logs)
        own = [np.einsum("rp,rgp->rg", one, two) for one, two in ((weights, near), (weights, near**2), (inverse, near))]
        e, a = _nonnegative(weights.sum(axis=1, keepdims=True), own, inverse.sum(axis=1, keepdims=True))
        errors = (((e[:, :, None] + a[:, :, None] * near) * inverse[:, None] - 1) ** 2).sum(axis=2)
        best = errors.argmin(axis=1)
        found = np.stack([e[rows, best], a[rows, best], grid[rows, best]], axis=1)
        low, high = (grid[rows, np.clip(best + shift, 0, 8)] for shift in (-1, 1))
    return found


def _nonnegative(of_e: np.ndarray, sums: Sequence[np.ndarray], wanted_e: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The e and a of least squares for each exponent from their normal equations, neither below 0."""
    of_both, of_a, wanted_a = sums
    determinant = np.maximum(of_e * of_a - of_both**2, 1e-300)
    e = (wanted_e * of_a - wanted_a * of_both) / determinant
    a = (wanted_a * of_e - wanted_e * of_both) / determinant
    e, a = np.where(a < 0, wanted_e / of_e, e), np.maximum(a, 0.0)
    return np.maximum(e, 0.0), np.where(e < 0, wanted_a / of_a, a)
