import numpy as np
import pytest
import scipy.sparse
from scipy.stats import mannwhitneyu, ttest_ind

from sae_emotion_plugin.discovery import probes as emotion_probes
from sae_emotion_plugin.discovery.probes import METHODS, ProbeInputs, eliminated, method_families
from sae_emotion_plugin.evidence.association import auroc


def rows(first: int, last: int) -> np.ndarray:
    return np.arange(first, last)


def inputs_of(
    features: np.ndarray, labels: np.ndarray, dense: np.ndarray | None = None, texts: tuple[str, ...] = ()
) -> ProbeInputs:
    matrix = scipy.sparse.csr_matrix(features.astype(np.float32))
    return ProbeInputs(
        labels, {"max": matrix}, {} if dense is None else {"mean": dense.astype(np.float32)}, texts
    )  # fmt: skip


def test_the_best_dimension_is_the_one_of_the_mann_whitney_test_ties_included() -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 4, size=(90, 130)).astype(np.float32)
    labels = rng.random((90, 2)) < 0.4
    values[:, 100] -= 2 * labels[:, 1]
    found = emotion_probes._dense_aurocs(values, labels)
    for column in (0, 64, 100, 129):
        for emotion in range(2):
            positive = labels[:, emotion]
            u = mannwhitneyu(values[positive, column], values[~positive, column]).statistic
            assert found[emotion, column] == pytest.approx(u / (positive.sum() * (~positive).sum()))
    (family,) = method_families("neuron", inputs_of(np.ones((90, 1)), labels, values))
    (fitted,) = family.fit(rows(0, 90), rows(0, 90), [None])
    assert fitted.details[1] == "-dimension 100"
    np.testing.assert_array_equal(fitted.scores[:, 1], -values[:, 100])


def test_candidates_stand_in_the_order_of_the_stricter_t_statistic() -> None:
    rng = np.random.default_rng(1)
    labels = rng.random((400, 2)) < [0.1, 0.5]
    features = rng.exponential(size=(400, 12)) * (rng.random((400, 12)) < 0.3)
    features[:, 4] += labels[:, 0]
    features[:, 7] = 0
    features[np.flatnonzero(labels[:, 0])[:2], 9] = 5.0  # fires on two texts, both in class
    found = emotion_probes._strongest(scipy.sparse.csc_matrix(features.astype(np.float32)), labels)
    assert found.shape == (2, 11) and 7 not in found
    for emotion in range(2):
        sides = features[labels[:, emotion]], features[~labels[:, emotion]]
        usable = [column for column in range(12) if column != 7]
        welch, pooled = (
            np.abs(np.asarray(ttest_ind(sides[0][:, usable], sides[1][:, usable], equal_var=equal)[0]))
            for equal in (False, True)
        )
        order = [usable[place] for place in np.argsort(-np.minimum(welch, pooled))]
        assert found[emotion, :4].tolist() == order[:4]
    assert found[0, 0] == 4


def test_elimination_keeps_the_columns_that_matter_together() -> None:
    rng = np.random.default_rng(2)
    design = rng.normal(size=(3_000, 40))
    target = design[:, [5, 17, 30]] @ [1.0, -1.0, 1.0] + rng.logistic(size=3_000) > 0
    kept = eliminated(design, target, 3)
    assert set(kept.tolist()) == {5, 17, 30}
    assert set(eliminated(design.astype(np.float32), target, 3).tolist()) == {5, 17, 30}
    assert eliminated(design[:, :2], target, 5).tolist() == [0, 1]


def test_a_k_sparse_probe_adds_up_features_that_are_weak_alone() -> None:
    rng = np.random.default_rng(3)
    labels = rng.random((3_000, 1)) < 0.3
    features = np.maximum(rng.normal(size=(3_000, 30)) + 1.0, 0)
    features[:, :5] += 0.6 * labels
    inputs = inputs_of(features, labels)
    found = {}
    for method in ("latent", "latents-2", "latents-5"):
        family = method_families(method, inputs)[0]
        settings = [family.settings.get("eliminated, C 0.01")]
        (fitted,) = family.fit(rows(0, 1_500), rows(1_500, 3_000), settings)
        found[method] = auroc(fitted.scores[:, 0], labels[1_500:, 0])
    assert found["latent"] + 0.03 < found["latents-2"] and found["latents-2"] + 0.05 < found["latents-5"]
    assert fitted.details[0].startswith("features ")
    assert {int(name) for name in fitted.details[0].removeprefix("features ").split(", ")} == {0, 1, 2, 3, 4}


def test_features_that_never_vary_leave_a_k_sparse_probe_without_an_opinion() -> None:
    labels = np.arange(60)[:, None] % 3 == 0
    for family in method_families("latents-5", inputs_of(np.ones((60, 4)), labels)):
        for fitted in family.fit(rows(0, 40), rows(40, 60), list(family.settings.values())):
            assert np.ptp(fitted.scores) == 0


def test_the_difference_of_means_is_that_of_the_definition() -> None:
    rng = np.random.default_rng(4)
    labels = rng.random((80, 2)) < 0.4
    dense = rng.normal(size=(100, 5)) * [1, 10, 100, 1, 1] + [0, 5, 0, 0, 0]
    dense[:, 4] = 3.0  # says nothing
    for method in ("difference-of-means", "difference-of-means-raw"):
        (family,) = method_families(method, inputs_of(np.ones((100, 1)), labels, dense))
        (fitted,) = family.fit(rows(0, 80), rows(80, 100), [None])
        values = dense.astype(np.float32).astype(np.float64)
        if method == "difference-of-means":
            spread = values[:80].std(axis=0)
            values = (values - values[:80].mean(axis=0)) / np.where(spread > 1e-6, spread, np.inf)
        for emotion in range(2):
            ours, theirs = values[:80][labels[:, emotion]], values[:80][~labels[:, emotion]]
            expected = values[80:] @ (ours.mean(axis=0) - theirs.mean(axis=0))
            np.testing.assert_allclose(fitted.scores[:, emotion], expected, rtol=1e-4, atol=1e-4)


def test_words_that_only_scored_texts_have_are_unknown_to_the_bag_of_words() -> None:
    texts = (*["dread and more", "plain and more"] * 20, "dread", "plain", "unseen", "dread unseen")
    labels = np.arange(40)[:, None] % 2 == 0
    (family,) = method_families("bag-of-words", inputs_of(np.ones((44, 1)), labels, texts=texts))
    (fitted,) = family.fit(rows(0, 40), rows(40, 44), [1.0])
    dread, plain, unseen, both = fitted.scores[:, 0]
    assert dread > unseen > plain and both == pytest.approx(dread)


def test_an_unknown_method_is_refused() -> None:
    assert len(METHODS) == 9
    with pytest.raises(ValueError, match=r"unknown method 'guess' \(valid: latent, latents-2, "):
        method_families("guess", inputs_of(np.ones((4, 1)), np.ones((4, 1), dtype=bool)))
