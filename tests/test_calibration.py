import numpy as np
import pytest
import scipy.sparse
from scipy.special import erfc

import sae_emotion_plugin.evidence.calibration as calibration_module
from sae_emotion_plugin.evidence.association import benjamini_hochberg
from sae_emotion_plugin.evidence.calibration import Calibration, calibrate
from sae_emotion_plugin.evidence.stratified import length_strata, stratified_mann_whitney

N_TEXTS = 1_200


def planted(seed: int) -> tuple[scipy.sparse.csr_matrix, np.ndarray, np.ndarray]:
    """Features that follow labels and length, rare labels of 39 and 88 texts among them."""
    rng = np.random.default_rng(seed)
    length = rng.poisson(14, N_TEXTS)
    labels = np.stack([rng.permutation(np.arange(N_TEXTS) < n) for n in (39, 88, 400)], axis=1)
    rates = np.geomspace(0.004, 0.6, 60) * (length / 14)[:, None] * (1 + labels[:, [0]])
    dense = rng.gamma(1, size=(N_TEXTS, 60)) * (rng.random((N_TEXTS, 60)) < rates)
    return scipy.sparse.csr_matrix(dense.astype(np.float32)), labels, length_strata(length, 5)


NAMES = ("grief", "relief", "joy")


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    matrix, labels, strata = planted(0)
    return calibrate(matrix, labels, strata, label_names=NAMES, permutations=60, seed=1, entries_per_chunk=4_000)


def test_permuted_labels_give_discoveries_no_more_often_than_promised(calibration: Calibration) -> None:
    assert calibration.holds
    assert calibration.runs_with_discovery <= 7
    assert calibration.low <= calibration.share <= calibration.high
    assert calibration.fewest_honest is not None and calibration.fewest_honest <= calibration.fewest_firing
    # Grief has 39 texts: its tests move in steps and can only be too careful.
    assert {tail.group for tail in calibration.by_label} == {"grief (39)", "relief (88)", "joy (400)"}
    assert all(tail.honest for tail in calibration.by_label)


def test_null_p_values_are_nearly_uniform_in_the_middle(calibration: Calibration) -> None:
    assert sum(calibration.deciles) == pytest.approx(1)
    assert calibration.deciles == pytest.approx([0.1] * 10, abs=0.04)
    assert calibration.distance < 0.06


def test_the_table_shows_share_tails_and_the_minimum(calibration: Calibration) -> None:
    shown = repr(calibration)
    assert "60 label permutations within strata, 1200 texts, 3 labels" in shown
    assert f"runs with any q < 0.05: {calibration.runs_with_discovery} = " in shown
    assert f"honest from {calibration.fewest_honest} firing texts" in shown
    assert "grief (39)" in shown and "100 to 199" in shown and "; holds" in shown


def test_features_that_all_fire_often_leave_no_promise_broken() -> None:
    matrix, labels, strata = planted(4)
    fires = np.bincount(matrix.indices, minlength=60)
    often, seldom = matrix[:, fires >= 100], matrix[:, fires < 10]
    options = {"label_names": NAMES, "permutations": 20, "seed": 1}
    found = calibrate(often, labels, strata, **options)
    assert found.fewest_honest == found.fewest_firing == 10 and found.holds
    assert {tail.group for tail in found.by_firing} <= {"100 to 199", "200 to 499", "500 to 999"}
    assert not calibrate(seldom, labels, strata, **options).holds


def test_each_run_equals_the_pipeline_on_labels_permuted_by_hand() -> None:
    matrix, labels, strata = planted(2)
    runs, level = 12, 0.6  # so high that some runs discover something and some do not
    found = calibrate(matrix, labels, strata, label_names=NAMES, permutations=runs, seed=3, level=level)
    rng = np.random.default_rng(3)
    place = np.argsort(strata, kind="stable")
    discoveries, below = [], 0
    once = None
    for _ in range(runs):
        order = np.empty(N_TEXTS, dtype=int)
        order[place] = np.lexsort((rng.random(N_TEXTS), strata))
        assert np.array_equal(strata[order], strata), "a text's labels stay in its stratum"
        once = stratified_mann_whitney(matrix, labels[order], strata)
        discoveries.append(bool((once.q < level).any()))
        assert np.array_equal(once.q[:, once.tested], benjamini_hochberg(once.p[:, once.tested]))
        below += int((once.p[:, once.tested] < 0.01).sum())
    assert found.runs_with_discovery == sum(discoveries)
    assert once is not None and found.n_tested == once.tested.sum() < 60
    assert sum(tail.observed for tail in found.by_label if tail.threshold == 0.01) == below


def test_a_dishonest_p_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:

    def normal_p(ranked, design, deviation, *, fewest_firing):
        sd = np.sqrt(np.maximum(ranked.second @ design.second, 1e-12))
        return erfc(np.abs(deviation) / sd / np.sqrt(2))

    matrix, labels, strata = planted(0)
    monkeypatch.setattr(calibration_module, "permutation_p", normal_p)
    found = calibrate(matrix, labels, strata, label_names=NAMES, permutations=60, seed=1)
    assert not found.holds
    assert found.runs_with_discovery > 7
    assert "DOES NOT HOLD" in repr(found) and "!" in repr(found)
    assert any(tail.ratio > 5 and not tail.honest for tail in found.by_firing)


def test_calibration_is_repeatable_and_does_not_depend_on_the_chunks() -> None:
    matrix, labels, strata = planted(4)
    first, second = (
        calibrate(matrix, labels, strata, label_names=NAMES, permutations=5, seed=9, entries_per_chunk=size)
        for size in (500, 1_000_000)
    )
    assert first == second


def test_rare_labels_are_refused_by_name_or_skipped() -> None:
    matrix, labels, strata = planted(5)
    labels[np.flatnonzero(labels[:, 1])[19:], 1] = False
    with pytest.raises(ValueError, match=r"relief \(19 in, 1181 out\): each label needs 20 in and 20 out"):
        calibrate(matrix, labels, strata, label_names=NAMES, permutations=1, seed=0)
    found = calibrate(matrix, labels, strata, label_names=NAMES, permutations=1, seed=0, skip_rare=True)
    assert found.n_labels == 2
    assert {tail.group for tail in found.by_label} == {"grief (39)", "joy (400)"}


def test_features_that_never_vary_yield_no_discovery_and_no_tail() -> None:
    _, labels, strata = planted(6)
    constant = scipy.sparse.csr_matrix(np.tile([[0.0, 0.5]], (N_TEXTS, 1)))
    found = calibrate(constant, labels, strata, label_names=NAMES, permutations=3, seed=0)
    assert (found.n_tested, found.runs_with_discovery, found.distance) == (1, 0, 0.0)
    assert all(tail.observed == 0 for tail in found.by_firing)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"permutations": 0}, "permutations must be at least 1, got 0"),
        ({"level": 1.0}, r"level must lie between 0 and 1, got 1\.0"),
        ({"label_names": ("grief",)}, "3 labels, but 1 names"),
    ],
)
def test_calibration_refuses_settings_without_meaning(options: dict[str, object], message: str) -> None:
    matrix, labels, strata = planted(7)
    settings: dict = {"label_names": NAMES, "permutations": 1, "seed": 0} | options
    with pytest.raises(ValueError, match=message):
        calibrate(matrix, labels, strata, **settings)


def test_calibration_refuses_values_that_are_not_finite() -> None:
    matrix, labels, strata = planted(8)
    matrix.data[0] = np.nan
    with pytest.raises(ValueError, match="must be finite, got nan"):
        calibrate(matrix, labels, strata, label_names=NAMES, permutations=1, seed=0)
