"""Time and memory of scoring synthetic sparse codes: AUROC, p and average precision of every feature for every label.

    python benchmarks/association.py [--features 32768] [--texts 43000] [--labels 28] [--permutations 0]

The firing rates fall as 1 / rank (Zipf), at most one half, 3 % in the mean; labels are as frequent as GoEmotions'
(from a third of the texts down to 39), strata are 20 bins of length. A scipy loop over a sample of the same pairs,
dense column by column, is measured in the same run; `ratio` is its time per pair over ours. `peak_mb` is the
process's peak resident memory, the codes included. The last line is one JSON object.
"""

import argparse
import json
import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse
from scipy.stats import mannwhitneyu

from sae_emotion_plugin.association import benjamini_hochberg, sparse_auroc, sparse_average_precision
from sae_emotion_plugin.calibration import calibrate
from sae_emotion_plugin.placements import auroc_above
from sae_emotion_plugin.stratified import length_strata, stratified_mann_whitney

MEAN_RATE = 0.03


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--features", type=int, default=32_768)
    parser.add_argument("--texts", type=int, default=43_000)
    parser.add_argument("--labels", type=int, default=28)
    parser.add_argument("--sample", type=int, default=100)
    parser.add_argument("--permutations", type=int, default=0)
    parser.add_argument("--mean-rate", type=float, default=MEAN_RATE)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    labels = planted_labels(rng, options.texts, options.labels)
    matrix = planted_codes(rng, options.texts, options.features, options.mean_rate, labels)
    strata = length_strata(np.maximum(1, rng.poisson(16, options.texts)))
    with_codes = peak_mb()

    seconds: dict[str, float] = {}

    def timed(name: str, compute: Callable[[], Any]) -> Any:
        started = time.process_time(), time.perf_counter()
        result = compute()
        seconds[name] = time.perf_counter() - started[1]
        seconds[f"{name}_cpu"] = time.process_time() - started[0]
        return result

    found = timed("auroc", lambda: sparse_auroc(matrix, labels))
    timed("q", lambda: benjamini_hochberg(found.p))
    timed("average_precision", lambda: sparse_average_precision(matrix, labels))
    stratified = timed("stratified", lambda: stratified_mann_whitney(matrix, labels, strata))
    above = timed("auroc_above", lambda: auroc_above(matrix, labels))
    whole = {kind: sum(seconds[f"{name}{kind}"] for name in SCORED) for kind in ("", "_cpu")}
    peak = peak_mb()

    columns = matrix.tocsc()
    pairs = rng.integers([options.features, options.labels], size=(options.sample, 2))
    started = time.process_time()
    for feature, label in pairs:
        dense = columns[:, [feature]].toarray().ravel()
        mannwhitneyu(dense[labels[:, label]], dense[~labels[:, label]], method="asymptotic", use_continuity=False)
    per_pair = (time.process_time() - started) / len(pairs)
    if options.permutations:
        names = [f"label {i}" for i in range(options.labels)]
        print(
            timed(
                "calibrate",
                lambda: calibrate(matrix, labels, strata, label_names=names, permutations=options.permutations, seed=0),
            )
        )
    n_pairs = options.features * options.labels
    report = {
        **vars(options),
        "stored_values": matrix.nnz,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "seconds_in_all": round(whole[""], 1),
        "cpu_seconds_in_all": round(whole["_cpu"], 1),
        "share_q_below_0.05": float((stratified.q < 0.05).mean()),
        "share_auroc_above_0.6": float((above.auroc > 0.6).mean()),
        "codes_peak_mb": round(with_codes),
        "peak_mb": round(peak),
        "ratio": per_pair / (seconds["auroc_cpu"] / n_pairs),
    }
    print(json.dumps(report))


SCORED = ("auroc", "q", "average_precision", "stratified", "auroc_above")


def planted_labels(rng: np.random.Generator, n_texts: int, n_labels: int) -> np.ndarray:
    shares = np.geomspace(0.32, 39 / n_texts, n_labels)
    return rng.random((n_texts, n_labels)) < shares


def planted_codes(
    rng: np.random.Generator, n_texts: int, n_features: int, mean_rate: float, labels: np.ndarray
) -> scipy.sparse.csr_matrix:
    """Every fourth feature fires more often or less in the texts of every label, by a factor around 1.3."""
    rates = 1 / np.arange(1, n_features + 1)
    low, high, scale = 0.0, 1e6, 1.0
    for _ in range(100):
        scale = (low + high) / 2
        low, high = (scale, high) if np.minimum(scale * rates, 0.5).mean() < mean_rate else (low, scale)
    rates = rng.permutation(np.minimum(scale * rates, 0.5))
    indicator = labels.astype(np.float32)
    texts, counts = [], []
    for feature, rate in enumerate(rates):
        chance = np.full(n_texts, rate, dtype=np.float32)
        if feature % 4 == 0:
            chance *= np.exp(indicator @ rng.normal(0, 0.3, labels.shape[1]).astype(np.float32))
        fires = np.flatnonzero(rng.random(n_texts, dtype=np.float32) < chance).astype(np.int32)
        texts.append(fires)
        counts.append(len(fires))
    index = np.concatenate(texts)
    texts.clear()
    values = rng.standard_exponential(len(index), dtype=np.float32)
    indptr = np.concatenate([[0], np.cumsum(counts)])
    return scipy.sparse.csr_matrix(scipy.sparse.csc_matrix((values, index, indptr), shape=(n_texts, n_features)))


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
