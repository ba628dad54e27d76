from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_emotion_plugin.text_costs import four_gram_repetition, is_degenerate


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 2), max_size=30))
def test_repetition_is_the_share_of_four_grams_seen_before(tokens: list[int]) -> None:
    seen: Counter = Counter()
    repeated = 0
    for start in range(len(tokens) - 3):
        four_gram = tuple(tokens[start : start + 4])
        repeated += seen[four_gram] > 0
        seen[four_gram] += 1
    expected = repeated / seen.total() if seen else 0.0
    assert four_gram_repetition(tokens) == pytest.approx(expected)
    assert four_gram_repetition(np.array(tokens, dtype=np.int32)) == pytest.approx(expected)
    assert is_degenerate(tokens) == (expected > 0.3)


def test_repetition_of_plain_cases() -> None:
    assert four_gram_repetition([]) == four_gram_repetition([5, 5, 5]) == 0
    assert four_gram_repetition(range(50)) == 0
    assert four_gram_repetition([7] * 20) == pytest.approx(16 / 17)
    assert four_gram_repetition(["so", "so", "so", "so", "so"]) == 0.5
    assert is_degenerate([7] * 20)
    assert not is_degenerate([7] * 20, threshold=0.95)
    assert not is_degenerate([1, 2, 3])
