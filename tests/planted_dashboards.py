"""Dashboards of a tiny dictionary, made up by hand: what is published of them is known."""

from typing import Any

import numpy as np

from sae_emotion_plugin.dashboards.types import Dashboards, interval_ends

TEXTS = (" joy", "ful", "\n", "<b>", " naïve", "感", "\ufffd", ' "quoted"', "a\0b", "\ud83d", "\ud83d\ude00", "\\u0000")
"""Texts of the tokens 0, 1, 2, ...; some are what a database refuses."""
DEAD = (3, 6)
"""Features that never fire."""


def planted_dashboards(
    d_sae: int = 8, sequences: int = 30, length: int = 12, seed: int = 0, **changes: Any
) -> Dashboards:
    """Random activations on random tokens; feature 1 fires once, so that all its values are equal."""
    rng = np.random.default_rng(seed)
    starts = np.arange(sequences + 1) * length
    n_tokens = int(starts[-1])
    tokens, values, feature_starts = [], [], [0]
    for feature in range(d_sae):
        count = 0 if feature in DEAD else 1 if feature == 1 else int(rng.integers(5, 60))
        tokens.append(np.sort(rng.choice(n_tokens, count, replace=False)))
        values.append(rng.exponential(2, count).astype(np.float32))
        feature_starts.append(feature_starts[-1] + count)
    maxima = np.array([part.max(initial=0) for part in values], np.float32)
    minima = np.array([part.min(initial=np.inf) if len(part) else 0 for part in values], np.float32)
    n_intervals, bins = 5, 10
    strongest, sampled = np.full((d_sae, 4), -1), np.full((d_sae, n_intervals, 2), -1)
    interval_counts, counts = np.zeros((d_sae, n_intervals), int), np.zeros((d_sae, bins), int)
    for feature in range(d_sae):
        if not len(values[feature]):
            continue
        peaks = np.zeros(sequences, np.float32)
        np.maximum.at(peaks, tokens[feature] // length, values[feature])
        order = [int(one) for one in np.argsort(-peaks, kind="stable") if peaks[one] > 0]
        strongest[feature, : len(order[:4])] = order[:4]
        ends = interval_ends(maxima[feature], n_intervals)
        for interval in range(n_intervals):
            low, high = ends[interval], ends[interval + 1]
            interval_counts[feature, interval] = ((values[feature] >= low) & (values[feature] <= high)).sum()
            own = [one for one in order if low <= peaks[one] <= high][:2]
            sampled[feature, interval, : len(own)] = own
        if minima[feature] < maxima[feature]:
            counts[feature] = np.histogram(values[feature], bins, (minima[feature], maxima[feature]))[0]
        else:
            counts[feature, 0] = len(values[feature])
    vocabulary = len(TEXTS)
    rows = {
        "meta": {"n_tokens": n_tokens, "hook_name": "blocks.0.hook_resid_post"},
        "token_ids": rng.integers(vocabulary, size=n_tokens),
        "sequence_starts": starts,
        "sequence_keys": rng.integers(2**63, size=sequences).astype(np.uint64),
        "feature_starts": np.array(feature_starts),
        "entry_tokens": np.concatenate(tokens),
        "entry_values": np.concatenate(values),
        "minima": minima,
        "maxima": maxima,
        "activation_counts": counts,
        "interval_counts": interval_counts,
        "strongest": strongest,
        "sampled": sampled,
        "logit_ends": np.sort(rng.normal(size=(d_sae, 2)), axis=1),
        "logit_counts": rng.integers(5, size=(d_sae, bins)),
        "promoted_ids": rng.integers(vocabulary, size=(d_sae, 3)),
        "promoted_effects": -np.sort(-rng.normal(size=(d_sae, 3)), axis=1),
        "suppressed_ids": rng.integers(vocabulary, size=(d_sae, 3)),
        "suppressed_effects": np.sort(rng.normal(size=(d_sae, 3)), axis=1),
        **{
            name: rng.integers(d_sae, size=(d_sae, 2))
            for name in ("related_features", "related_neurons", "aligned_neurons")
        },
        **{
            name: rng.random((d_sae, 2))
            for name in (
                "related_features_pearson",
                "related_features_cosine",
                "related_neurons_pearson",
                "related_neurons_cosine",
                "aligned_values",
                "aligned_shares",
            )
        },
        "known_ids": np.arange(vocabulary),
        "known_texts": TEXTS,
    }
    return Dashboards(**{**rows, **changes})
