"""Tail probabilities of a sum of scores over drawn texts, when they are drawn without replacement within strata.

A rank sum under permutation of the labels is such a sum. Arrays in, numbers out; no model, no text, no torch.
"""

import numpy as np
from jaxtyping import Bool, Float
from scipy.special import expit, gammainc, gammaincc, log_ndtr, ndtr

SMALLEST_SKEWNESS = 1e-4
LARGEST_STEP = 2.0
MAX_ITERATIONS = 60
ENOUGH_DECREMENT = 1e-9
LARGEST_SINH = 600.0


def pearson_tail(z: Float[np.ndarray, "*tests"], skewness: Float[np.ndarray, "*tests"]) -> Float[np.ndarray, "*tests"]:
    """Returns the probability of `z` or more under a gamma distribution with mean 0, variance 1 and this skewness.

    Pearson's type III, which becomes the normal distribution as the skewness goes to 0; a negative skewness
    mirrors it. It matches three moments of a permutation distribution (Mielke, Berry & Brier 1981).
    """
    tail = ndtr(-z)
    skewed = np.abs(skewness) > SMALLEST_SKEWNESS
    skew = skewness[skewed]
    shape = 4 / skew**2
    # Where the gamma's support ends, its tail is 1, or 0 when mirrored.
    point = np.maximum(shape + 2 * z[skewed] / skew, 0)
    upper = skew > 0
    beyond = np.empty_like(point)
    beyond[upper] = gammaincc(shape[upper], point[upper])
    beyond[~upper] = gammainc(shape[~upper], point[~upper])
    tail[skewed] = beyond
    return tail


def log_saddlepoint_tail(
    target: Float[np.ndarray, "test"],
    scores: Float[np.ndarray, "test stratum point"],
    weights: Float[np.ndarray, "test stratum point"],
    n_drawn: Float[np.ndarray, "test stratum"],
    step: Float[np.ndarray, "test"],
) -> Float[np.ndarray, "test"]:
    """Returns the logarithm of the probability that the drawn texts' scores sum to `target` or beyond it.

    Beyond means further from the expected sum. A stratum holds `weights` texts with each of its `scores`, and
    `n_drawn` of them are drawn without replacement. The sum is taken to move in steps of `step`: give a
    `target` half a step nearer to the expected sum than the sum that was seen.

    Double saddlepoint approximation given the numbers drawn (Robinson 1982; Booth & Butler 1990), the tail in
    Barndorff-Nielsen's (1986) form with Daniels's (1987) second continuity correction. Where the iteration does
    not converge, which is so at the ends of what the sum can be, Chernoff's bound stands instead: never too small.
    """
    n_texts = weights.sum(axis=2)
    drawn_from = (n_drawn > 0) & (n_drawn < n_texts)
    weights = weights * drawn_from[:, :, None]
    n_drawn, n_texts = n_drawn * drawn_from, n_texts * drawn_from
    share = np.where(drawn_from, n_drawn / np.maximum(n_texts, 1), 0.5)
    binomial = np.where(drawn_from, n_texts * share * (1 - share), 1.0)
    # In units of about one standard deviation, so that one tolerance fits all tests.
    second = (weights * scores**2).sum(axis=2) - (weights * scores).sum(axis=2) ** 2 / np.maximum(n_texts, 1)
    unit = np.sqrt((second * share * (1 - share)).sum(axis=1))
    scores, target, step = scores / unit[:, None, None], target / unit, step / unit

    tilt = np.zeros(len(target))
    level = np.log(share) - np.log1p(-share)
    converged = np.zeros(len(target), dtype=bool)
    for _ in range(MAX_ITERATIONS):
        at = np.flatnonzero(~converged)
        if len(at) == 0:
            break
        tilt[at], level[at], converged[at] = _newton_step(
            tilt[at], level[at], target[at], scores[at], weights[at], n_drawn[at], drawn_from[at]
        )

    natural = level[:, :, None] + tilt[:, None, None] * scores
    at_tilt = (weights * np.logaddexp(0, natural)).sum(axis=(1, 2)) - tilt * target - (level * n_drawn).sum(axis=1)
    at_zero = -(n_texts * (share * np.log(share) + (1 - share) * np.log1p(-share))).sum(axis=1)
    drop = np.minimum(at_tilt - at_zero, 0)
    k_tt, k_tu, k_uu = _second_derivatives(natural, scores, weights, drawn_from)
    given = np.maximum(k_tt - (k_tu**2 / k_uu).sum(axis=1), np.finfo(np.float64).tiny)
    log_det = np.log(given) + np.log(k_uu / binomial).sum(axis=1)
    size = np.abs(tilt)
    half = np.minimum(size * step / 2, LARGEST_SINH)
    # (2 / step) sinh(tilt step / 2), which becomes the tilt itself as the step goes to 0.
    log_tilt = np.log(size) + np.log(np.divide(np.sinh(half), half, out=np.ones_like(half), where=half > 0))
    w = np.sqrt(-2 * drop)
    log_p = log_ndtr(-(w + (log_tilt + log_det / 2 - np.log(w)) / w))
    # Bound: a binomial's probability at its mean is at least 1 / sqrt(8 n p (1 - p)) (Ash 1965, section 4.7).
    bound = drop + np.log(8 * binomial).sum(axis=1, where=drawn_from) / 2
    return np.minimum(np.where(converged & np.isfinite(log_p), log_p, bound), 0.0)


def _second_derivatives(
    natural: Float[np.ndarray, "test stratum point"],
    scores: Float[np.ndarray, "test stratum point"],
    weights: Float[np.ndarray, "test stratum point"],
    drawn_from: Bool[np.ndarray, "test stratum"],
) -> tuple[Float[np.ndarray, "test"], Float[np.ndarray, "test stratum"], Float[np.ndarray, "test stratum"]]:
    chosen = expit(natural)
    spread = weights * chosen * (1 - chosen)
    by_score = spread * scores
    tiny = np.finfo(np.float64).tiny
    k_uu = np.where(drawn_from, np.maximum(spread.sum(axis=2), tiny), 1.0)
    return (by_score * scores).sum(axis=(1, 2)), by_score.sum(axis=2), k_uu


def _newton_step(
    tilt: Float[np.ndarray, "test"],
    level: Float[np.ndarray, "test stratum"],
    target: Float[np.ndarray, "test"],
    scores: Float[np.ndarray, "test stratum point"],
    weights: Float[np.ndarray, "test stratum point"],
    n_drawn: Float[np.ndarray, "test stratum"],
    drawn_from: Bool[np.ndarray, "test stratum"],
) -> tuple[Float[np.ndarray, "test"], Float[np.ndarray, "test stratum"], Bool[np.ndarray, "test"]]:
    """Returns tilt and levels after one step of minimising the convex cumulant function, and which were at the end.

    The Hessian is an arrow (each level meets the tilt only), so that a step needs no matrix inversion. No text's
    log odds move by more than `LARGEST_STEP`, within which the function is nearly quadratic (Bach 2010).
    """
    natural = level[:, :, None] + tilt[:, None, None] * scores
    chosen = weights * expit(natural)
    slope_t = (chosen * scores).sum(axis=(1, 2)) - target
    slope_u = chosen.sum(axis=2) - n_drawn
    k_tt, k_tu, k_uu = _second_derivatives(natural, scores, weights, drawn_from)
    given = np.maximum(k_tt - (k_tu**2 / k_uu).sum(axis=1), np.finfo(np.float64).tiny)
    d_tilt = -(slope_t - (k_tu * slope_u / k_uu).sum(axis=1)) / given
    d_level = -(slope_u + k_tu * d_tilt[:, None]) / k_uu
    decrement = -(slope_t * d_tilt + (slope_u * d_level).sum(axis=1))
    moved = np.abs(d_level[:, :, None] + d_tilt[:, None, None] * scores).max(axis=(1, 2), where=weights > 0, initial=0)
    shrink = np.minimum(1, LARGEST_STEP / np.maximum(moved, LARGEST_STEP))
    return tilt + shrink * d_tilt, level + shrink[:, None] * d_level, decrement < ENOUGH_DECREMENT
