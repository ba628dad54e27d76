"""Tail probabilities of a sum of scores over drawn texts, when the draws are without replacement within strata.

A rank sum under permutation of the labels is such a sum. Arrays in, numbers out; no model, no text, no torch.
"""

import numpy as np
from jaxtyping import Bool, Float
from scipy.special import erfcx, expit, gammainc, gammaincc, log_ndtr, ndtr

SMALLEST_SKEWNESS = 1e-4
LARGEST_STEP = 2.0
MAX_ITERATIONS = 60
SMALLEST_DECREMENT = 1e-9
LARGEST_EXPONENT = 600.0


def pearson_tail(z: Float[np.ndarray, "*tests"], skewness: Float[np.ndarray, "*tests"]) -> Float[np.ndarray, "*tests"]:
    """Returns the probability of `z` or more under a gamma distribution with mean 0, variance 1 and this skewness.

    Pearson's type III, which becomes the normal distribution as the skewness goes to 0; a negative skewness
    mirrors it. It matches three moments of a permutation distribution (Mielke, Berry & Brier 1981).
    """
    z, skewness = np.broadcast_arrays(z, skewness)
    tail = ndtr(-z)
    skewed = np.abs(skewness) > SMALLEST_SKEWNESS
    shape = 4 / skewness[skewed] ** 2
    mirrored = skewness[skewed] < 0
    # Where the gamma's support ends, its tail is 0 (mirrored) or 1.
    point = np.maximum(shape + 2 * z[skewed] / skewness[skewed], 0)
    tail[skewed] = np.where(mirrored, gammainc(shape, point), gammaincc(shape, point))
    return tail


def saddlepoint_tail(
    target: Float[np.ndarray, "test"],
    scores: Float[np.ndarray, "test stratum point"],
    weights: Float[np.ndarray, "test stratum point"],
    n_drawn: Float[np.ndarray, "test stratum"],
    step: Float[np.ndarray, "test"],
) -> Float[np.ndarray, "test"]:
    """Returns the natural logarithm of the probability that the drawn texts' scores sum to `target` or beyond it.

    Beyond means further from the expected sum. A stratum holds `weights` texts with each of its `scores`;
    `n_drawn` of them are drawn without replacement. `step` is the lattice on which the sum is taken to move: its
    cell, not only its point, must lie beyond, so give a `target` half a step nearer to the expected sum.

    Double saddlepoint approximation, given the numbers drawn (Booth & Butler 1990), in Barndorff-Nielsen's (1986)
    form of the tail, with Daniels's (1987) second continuity correction. Where the iteration fails to converge,
    a Chernoff bound is returned, which is too large and never too small.
    """
    n_texts = weights.sum(axis=2)
    random = (n_drawn > 0) & (n_drawn < n_texts)
    weights = weights * random[:, :, None]
    n_drawn = n_drawn * random
    share = np.where(random, n_drawn / np.maximum(n_texts, 1), 0.5)
    variance = np.where(random, n_texts * share * (1 - share), 1.0)
    entropy = np.where(random, -n_texts * (share * np.log(share) + (1 - share) * np.log1p(-share)), 0.0).sum(axis=1)

    mean = share[:, :, None] * weights * scores
    spread = np.sqrt((weights * scores**2).sum(axis=(1, 2)) * share.max(axis=1)) + np.finfo(float).tiny
    tilt = np.zeros(len(target))
    level = np.log(share) - np.log1p(-share)
    direction = np.sign(target - mean.sum(axis=(1, 2)))
    converged = direction == 0
    del mean, spread
    for _ in range(MAX_ITERATIONS):
        active = np.flatnonzero(~converged)
        if len(active) == 0:
            break
        done, tilt[active], level[active] = _newton_step(
            target[active],
            scores[active],
            weights[active],
            n_drawn[active],
            random[active],
            tilt[active],
            level[active],
        )
        converged[active] = done

    natural = level[:, :, None] + tilt[:, None, None] * scores
    cumulant = (weights * np.logaddexp(0, natural)).sum(axis=(1, 2))
    drop = np.maximum(cumulant - tilt * target - (level * n_drawn).sum(axis=1) + 0 - entropy, -np.inf)
    chosen = expit(natural)
    spread_points = weights * chosen * (1 - chosen)
    k_uu = np.where(random, spread_points.sum(axis=2), 1.0)
    k_tu = (spread_points * scores).sum(axis=2)
    k_tt = (spread_points * scores**2).sum(axis=(1, 2)) - (k_tu**2 / k_uu).sum(axis=1)
    return _tail(drop, tilt, step, np.log(k_uu / variance).sum(axis=1), k_tt, variance, converged)
