import numpy as np
import pytest

from sae_emotion_plugin.evidence.training_curves import compute_frontier, tokens_to_convergence


def test_each_curve_gives_the_middle_of_the_stretch_where_it_is_lowest() -> None:
    compute = np.geomspace(1, 1e4, 401)
    # Straight lines in logarithms, which cross at 10 and at 100: each is the lowest on its own stretch.
    curves = [(compute, 10**shift * compute**-slope) for shift, slope in ((0, 0.25), (0.25, 0.5), (1.25, 1.0))]
    found, losses = compute_frontier(curves)
    assert found == pytest.approx([10**0.5, 10**1.5, 10**3], rel=0.05)
    assert losses == pytest.approx([10**-0.125, 10**-0.5, 10**-1.75], rel=0.05)


def test_a_curve_that_is_nowhere_lowest_gives_no_point() -> None:
    compute = np.geomspace(1, 100, 50)
    found, losses = compute_frontier([(compute, 1 / compute), (compute, 2 / compute)])
    assert len(found) == len(losses) == 1


def test_compute_that_one_curve_alone_has_seen_does_not_count() -> None:
    short, long = np.geomspace(1, 10, 50), np.geomspace(5, 1000, 50)
    found, _ = compute_frontier([(short, 1 / short), (long, 0.5 / long)])
    assert len(found) == 1 and 5 <= found[0] <= 10


def test_no_curve_or_one_has_no_frontier() -> None:
    for curves in ([], [(np.array([1.0, 2.0]), np.array([1.0, 0.5]))]):
        found, losses = compute_frontier(curves)
        assert len(found) == len(losses) == 0


def test_convergence_is_where_the_loss_comes_near_its_end() -> None:
    tokens = np.arange(1, 101) * 100.0
    losses = 0.1 + np.exp(-tokens / 500)
    found = tokens_to_convergence(tokens, losses)
    assert found is not None
    exact = -500 * np.log(0.05 * 0.1)  # exp(-t / 500) = 5 % of 0.1
    assert found == pytest.approx(exact, abs=300)


def test_a_training_that_still_improves_has_not_converged() -> None:
    tokens = np.arange(1, 101) * 100.0
    assert tokens_to_convergence(tokens, tokens**-0.5) is None
    assert tokens_to_convergence(tokens[:4], np.ones(4)) is None
    assert tokens_to_convergence([], []) is None
    assert tokens_to_convergence(tokens, np.ones(100)) == 100


def test_a_loss_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="losses must be finite"):
        tokens_to_convergence([1, 2], [1, float("nan")])
