"""A score as a yes or no: the threshold with the largest F1, and the F1 of a given threshold.

Arrays in, numbers out; no model, no text, no torch.
"""

import numpy as np
from jaxtyping import Bool, Num

from sae_emotion_plugin.evidence.resampling import checked_values


def best_threshold(
    scores: Num[np.ndarray, "text"], positives: Bool[np.ndarray, "text"]
) -> tuple[float | None, float | None]:
    """Returns the threshold above 0 whose F1 is largest, and that F1; the highest such threshold on a tie.

    A text is called positive when its score is the threshold or more. Thresholds are the scores above 0, so that a
    silent feature calls nothing positive; without any, both are None. ValueError for no positives and for scores that
    are not finite.
    """
    values = checked_values(scores, "scores")
    n_in = int(positives.sum())
    if n_in == 0:
        raise ValueError(f"F1 needs positives, got none of {len(positives)} texts")
    active = np.flatnonzero(values > 0)
    if len(active) == 0:
        return None, None
    order = active[np.argsort(-values[active], kind="stable")]
    ordered = values[order]
    last_of_tie = np.flatnonzero(np.r_[ordered[1:] != ordered[:-1], True])
    found = 2 * np.cumsum(positives[order])[last_of_tie] / (last_of_tie + 1 + n_in)
    best = int(found.argmax())
    return float(ordered[last_of_tie[best]]), float(found[best])


def f1_at(scores: Num[np.ndarray, "text"], positives: Bool[np.ndarray, "text"], threshold: float) -> float:
    """Returns the F1 of calling every text positive whose score is `threshold` or more; 0 where none is rightly."""
    called = scores >= threshold
    sizes = int(called.sum()) + int(positives.sum())
    return 2 * int((called & positives).sum()) / sizes if sizes else 0.0
