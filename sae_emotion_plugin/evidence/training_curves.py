"""What the curves of several trainings say together: the frontier of loss by compute, and when each has converged.

Arrays in, numbers out; no model, no torch. `scaling_laws` fits laws to what is found.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Num

from sae_emotion_plugin.evidence.scaling_laws import positive_values

FEWEST_POINTS = 5
"""Points of a curve that can be said to have converged."""
SETTLED = 0.02
"""A training has converged when its loss fell by less than this share from the last fifth but one to the last."""
NEAR = 0.05
"""It counts as converged from where its loss comes this near to that of the last fifth."""
FRONTIER_STEPS = 200


def compute_frontier(
    curves: Sequence[tuple[Num[np.ndarray, " _"], Num[np.ndarray, " _"]]],
) -> tuple[Float[np.ndarray, " curve"], Float[np.ndarray, " curve"]]:
    """Returns compute and loss where each curve (compute, loss) is the lowest of all: L(C) is fitted to them.

    A curve gives one point, in the middle of its stretch, so that points are of different runs; a curve that is nowhere
    the lowest gives none. Only compute that two curves or more have seen counts. Losses are smoothed over five points.
    """
    usable = [
        (np.log(positive_values(c, "C")), np.log(_smoothed(positive_values(y, "L(C)"))))
        for c, y in curves
        if len(c) > 1
    ]
    if len(usable) < 2:
        return np.zeros(0), np.zeros(0)
    ends = sorted(np.concatenate([c[[0, -1]] for c, _ in usable]))
    grid = np.linspace(ends[0], ends[-1], FRONTIER_STEPS)
    table = np.array([np.interp(grid, c, y, left=np.inf, right=np.inf) for c, y in usable])
    shared = np.isfinite(table).sum(axis=0) > 1
    lowest = np.where(shared, table.argmin(axis=0), -1)
    places = [np.flatnonzero(lowest == one) for one in range(len(usable))]
    found = [(grid[own[len(own) // 2]], table[one, own[len(own) // 2]]) for one, own in enumerate(places) if len(own)]
    compute, loss = np.exp(np.array(sorted(found)).reshape(-1, 2)).T
    return compute, loss


def tokens_to_convergence(
    tokens: Num[np.ndarray, " point"] | Sequence[float | int], losses: Num[np.ndarray, " point"] | Sequence[float | int]
) -> float | None:
    """Returns the tokens after which a training's loss has converged; None when it had not at its end.

    ValueError as `fit_power_law`.
    """
    seen, ys = positive_values(tokens, "tokens"), positive_values(losses, "losses")
    if len(seen) < FEWEST_POINTS:
        return None
    ys = _smoothed(ys)
    last, before = (seen > seen[-1] * 0.8), (seen > seen[-1] * 0.6) & (seen <= seen[-1] * 0.8)
    if not before.any() or ys[before].mean() > (1 + SETTLED) * ys[last].mean():
        return None
    return float(seen[ys <= (1 + NEAR) * ys[last].mean()][0])


def _smoothed(ys: np.ndarray) -> np.ndarray:
    """Means over five neighbours, over fewer at the ends."""
    sums, counts = (np.convolve(one, np.ones(5), "same") for one in (ys, np.ones_like(ys)))
    return (sums / counts)[: len(ys)] if len(ys) >= 5 else ys
