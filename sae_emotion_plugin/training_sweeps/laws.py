"""The cells of a sweep -> the laws that their losses, compute and learning rates follow, or why there are none."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from sae_emotion_plugin.evidence.scaling_laws import (
    Estimate,
    ScalingLaw,
    fit_power_law,
    fit_stable_rate,
    fit_width_and_sparsity,
    per_doubling,
)
from sae_emotion_plugin.evidence.training_curves import compute_frontier, tokens_to_convergence
from sae_emotion_plugin.training_sweeps.results import SweepCell

UNSTABLE = 2.0
"""A training that ends at more than this many times the best FVU of its width, sparsity and seed was not stable."""


def best_rates(rows: Sequence[SweepCell]) -> list[SweepCell]:
    """Of the cells that differ in the learning rate alone the one with the lowest FVU; none of those that diverged."""
    best: dict[tuple[int, str, int], SweepCell] = {}
    for row in rows:
        place = (row.d_sae, row.sparsity, row.seed)
        if row.fvu is not None and (place not in best or row.fvu < (best[place].fvu or 0.0)):
            best[place] = row
    return list(best.values())


def scaling_laws(rows: Sequence[SweepCell], d_in: int, seed: int = 0) -> tuple[ScalingLaw, ...]:
    """L(N), L(C) and tokens to convergence for each sparsity, L(N, K), and the largest stable learning rate.

    L is the held-out FVU, of the best learning rate where there are several; in L(C), the FVU of training batches. C is
    6 operations for each weight and token, as if nothing were sparse.
    """
    best = best_rates(rows)
    laws = []
    for sparsity in dict.fromkeys(row.sparsity for row in rows):
        own = [row for row in best if row.sparsity == sparsity]
        widths = [row.d_sae for row in own]
        laws.append(fit_power_law(widths, [row.fvu or 0.0 for row in own], name=f"L(N), {sparsity}", seed=seed))
        curves = [(np.array(row.curve).reshape(-1, 2).T, row.d_sae) for row in own]
        by_compute = [(12.0 * d_in * width * tokens, fvu) for (tokens, fvu), width in curves]
        compute, losses = compute_frontier(by_compute)
        laws.append(fit_power_law(compute, losses, name=f"L(C), {sparsity}", variable="C", seed=seed))
        needed = [(row.d_sae, tokens_to_convergence(*np.array(row.curve).reshape(-1, 2).T)) for row in own]
        known = [(width, tokens) for width, tokens in needed if tokens is not None]
        law = fit_power_law(
            [width for width, _ in known],
            [tokens for _, tokens in known],
            name=f"tokens to convergence, {sparsity}",
            variable="converged N",
            rising=True,
            seed=seed,
        )
        # What had not converged would have needed more tokens than it had: without it the law is too flat.
        unfinished = f"{len(needed) - len(known)} of {len(needed)} trainings had not converged at their end"
        laws.append(replace(law, note=f"{unfinished} and are left out" if len(known) < len(needed) else ""))
    sparse = [row for row in best if row.k is not None]
    if sparse:
        points = [row.d_sae for row in sparse], [row.k or 0 for row in sparse], [row.fvu or 0.0 for row in sparse]
        laws.append(fit_width_and_sparsity(*points, seed=seed))
    lowest = {(row.d_sae, row.sparsity, row.seed): row.fvu or 0.0 for row in best}
    limits = [UNSTABLE * lowest.get((row.d_sae, row.sparsity, row.seed), 0.0) for row in rows]
    stable = [row.fvu is not None and row.fvu <= limit for row, limit in zip(rows, limits, strict=True)]
    laws.append(fit_stable_rate([row.d_sae for row in rows], [row.lr for row in rows], stable, seed=seed))
    return tuple(laws)


TRENDS = (
    ("FVU per doubling of the width", "fvu"),
    ("loss recovered per doubling", "loss_recovered"),
    ("AUROC per doubling", "auroc"),
    ("margin over random directions per doubling", "margin"),
)


def trends(rows: Sequence[SweepCell]) -> tuple[Estimate, ...]:
    """What a doubling of the width adds to each figure of `TRENDS`; nothing where the cells are too few."""
    found = []
    for name, figure in TRENDS:
        known = [(row, value) for row in best_rates(rows) if (value := getattr(row, figure)) is not None]
        groups = [(row.sparsity, row.seed) for row, _ in known]
        widths, values = [row.d_sae for row, _ in known], [value for _, value in known]
        if known and (slope := per_doubling(widths, values, groups)) is not None:
            found.append(Estimate(name, slope.value, slope.low, slope.high))
    return tuple(found)
