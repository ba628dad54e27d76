import numpy as np
import pytest

from sae_emotion_plugin.evidence.auroc_intervals import auroc_interval
from sae_emotion_plugin.judges.figures import auroc_figure


def plain_auroc(scores: np.ndarray, positives: np.ndarray) -> float:
    won = [(a > b) + 0.5 * (a == b) for a in scores[positives] for b in scores[~positives]]
    return float(np.mean(won))


@pytest.mark.parametrize("decimals", [0, 1, 6])
def test_the_figure_equals_counting_pairs_ties_and_all(decimals: int) -> None:
    rng = np.random.default_rng(decimals)
    positives = rng.random(80) < 0.4
    scores = np.round(rng.normal(size=80) + positives, decimals)
    figure = auroc_figure("joy", "texts", scores, positives, np.arange(80))
    assert figure.auroc is not None and figure.auroc == round(plain_auroc(scores, positives), 4)
    assert figure.auroc is not None and figure.low is not None and figure.high is not None
    assert figure.low < figure.auroc < figure.high
    assert (figure.n_positive, figure.n) == (positives.sum(), 80)


def test_the_interval_is_that_of_whole_groups() -> None:
    rng = np.random.default_rng(3)
    groups = np.repeat(np.arange(12), 5)
    positives = rng.random(60) < 0.5
    scores = np.round(rng.normal(size=60) + 0.7 * positives, 1)
    figure = auroc_figure("joy", "texts", scores, positives, groups, resamples=200, seed=9)
    found = auroc_interval(scores, positives, groups=groups, resamples=200, seed=9)
    assert (figure.low, figure.high) == (round(found.low, 4), round(found.high, 4))


def test_copies_in_a_group_widen_the_interval_as_if_they_were_one() -> None:
    rng = np.random.default_rng(0)
    positives = rng.random(40) < 0.5
    scores = rng.normal(size=40) + positives
    once = auroc_figure("joy", "", scores, positives, np.arange(40))
    copied = auroc_figure("joy", "", np.tile(scores, 5), np.tile(positives, 5), np.tile(np.arange(40), 5))
    assert (once.auroc, once.low, once.high) == (copied.auroc, copied.low, copied.high)


@pytest.mark.parametrize(("n_in", "n_out"), [(9, 50), (50, 9), (0, 50), (50, 0)])
def test_fewer_than_ten_on_a_side_state_no_auroc_but_their_number(n_in: int, n_out: int) -> None:
    positives = np.array([True] * n_in + [False] * n_out)
    figure = auroc_figure("joy", "", np.arange(n_in + n_out), positives, np.arange(n_in + n_out))
    assert figure.auroc is figure.low is figure.high is None
    assert (figure.n_positive, figure.n) == (n_in, n_in + n_out)


def test_constant_scores_are_chance() -> None:
    figure = auroc_figure("joy", "", np.ones(40), np.arange(40) % 2 == 0, list(range(40)))
    assert (figure.auroc, figure.low, figure.high) == (0.5, 0.5, 0.5)


def test_many_texts_in_four_groups_are_too_few() -> None:
    positives = np.arange(60) < 20
    groups = np.where(positives, np.arange(60) % 4, np.arange(60))
    figure = auroc_figure("joy", "", np.arange(60), positives, groups)
    assert (figure.auroc, figure.n_positive, figure.n) == (None, 20, 60)
    whole = auroc_figure("joy", "", np.arange(60), positives, np.arange(60))
    assert (whole.auroc, whole.low, whole.high) == (0, 0, 0)


def test_bad_input_is_named() -> None:
    positives = np.arange(40) < 20
    with pytest.raises(ValueError, match="must be finite, got nan"):
        auroc_figure("joy", "", np.where(positives, np.nan, 1.0), positives, np.arange(40))
    with pytest.raises(ValueError, match="40 scores, 40 labels and 39 groups"):
        auroc_figure("joy", "", np.ones(40), positives, list(range(39)))
