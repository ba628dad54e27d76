"""What steering does to a text besides the wanted effect: repetition. No model and no torch."""

from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Int


def four_gram_repetition(tokens: Sequence[Hashable] | Int[np.ndarray, "token"]) -> float:
    """Returns the share of 4-grams that repeat an earlier one: 1 - distinct / all; 0 below 4 tokens."""
    plain = tokens.tolist() if isinstance(tokens, np.ndarray) else list(tokens)
    four_grams = list(zip(plain, plain[1:], plain[2:], plain[3:], strict=False))
    return 1 - len(set(four_grams)) / len(four_grams) if four_grams else 0.0


def is_degenerate(tokens: Sequence[Hashable] | Int[np.ndarray, "token"], threshold: float = 0.3) -> bool:
    """Returns whether more than `threshold` of the 4-grams are repetitions: a text that loops."""
    return four_gram_repetition(tokens) > threshold
