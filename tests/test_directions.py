import numpy as np
import pytest
import torch
from conftest import D_MODEL, HOOK, make_sae

from sae_emotion_plugin.interventions.hooks import steering
from sae_emotion_plugin.interventions.plans import SteeringPlan
from sae_emotion_plugin.steering_studies.directions import (
    covariance_matched_directions,
    difference_of_means,
    direction_dictionary,
    probe_direction,
    random_decoder_rows,
)

OTHER_HOOK = "blocks.1.hook_resid_post"


@pytest.fixture
def pooled() -> np.ndarray:
    """Texts whose dimensions have very different scales, one of them constant."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((200, 8)) * np.array([1, 5, 0.1, 30, 1, 2, 0, 1]) + np.arange(8)
    return values


@pytest.fixture
def labels() -> np.ndarray:
    return np.arange(200) % 5 == 0


def test_a_feature_of_the_dictionary_writes_the_unit_vector_and_reads_the_vector_with_its_bias() -> None:
    vectors = {"up": torch.arange(D_MODEL).float(), "down": -3.0 * torch.ones(D_MODEL)}
    sae = direction_dictionary(vectors, make_sae("layer_norm"), biases={"down": 2.0})
    x = torch.randn(5, D_MODEL, generator=torch.Generator().manual_seed(0))
    read = torch.relu(torch.stack([x @ vectors["up"], x @ vectors["down"] + 2.0], dim=1))
    torch.testing.assert_close(sae.encode(x), read)
    for row, vector in zip(sae.W_dec, vectors.values(), strict=True):
        torch.testing.assert_close(row, vector / vector.norm())


@pytest.mark.parametrize("length", [1e-25, 1e25])
def test_a_tiny_or_huge_vector_has_a_unit_direction(length: float) -> None:
    sae = direction_dictionary({"it": torch.full((D_MODEL,), length)}, make_sae())
    assert float(sae.W_dec.detach().norm()) == pytest.approx(1, rel=1e-5)


def test_the_dictionary_has_the_metadata_of_its_model_and_the_names_of_its_directions() -> None:
    like = make_sae()
    like.cfg.metadata["neuronpedia_id"] = "tiny/0"
    vectors = {"joy": np.ones(D_MODEL), "fear": np.arange(D_MODEL)}
    here, there = direction_dictionary(vectors, like), direction_dictionary(vectors, like, hook_name=OTHER_HOOK)
    assert here.cfg.metadata.directions == ["joy", "fear"]
    assert (here.cfg.metadata.hook_name, there.cfg.metadata.hook_name) == (HOOK, OTHER_HOOK)
    assert (there.cfg.metadata.context_size, there.cfg.metadata.prepend_bos) == (32, True)
    assert there.cfg.metadata.neuronpedia_id is None


def test_making_a_dictionary_leaves_the_random_state_alone() -> None:
    like, before = make_sae(), torch.random.get_rng_state()
    direction_dictionary({"joy": torch.ones(D_MODEL)}, like)
    assert torch.equal(before, torch.random.get_rng_state())


def test_steering_by_a_direction_adds_it_in_the_models_units(bridge: object) -> None:
    vector = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(1))
    sae = direction_dictionary({"it": vector}, make_sae(), hook_name=OTHER_HOOK)
    plan = SteeringPlan.of({0: 2.5}, sae, unit="raw")
    tokens = torch.tensor([[1, 8, 9, 10]])
    hook = "blocks.1.hook_out"

    def read() -> torch.Tensor:
        seen = {}
        with bridge.hooks(fwd_hooks=[(hook, lambda tensor, hook: seen.update(out=tensor.clone()))]):  # type: ignore[attr-defined]
            bridge(tokens)  # type: ignore[operator]
        return seen["out"]

    unsteered = read()
    with torch.inference_mode(), steering(bridge, sae, plan):  # type: ignore[arg-type]
        steered = read()
    expected = torch.zeros(1, 4, D_MODEL)
    expected[:, 1:] = 2.5 * vector / vector.norm()
    torch.testing.assert_close(steered - unsteered, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("vectors", "biases", "message"),
    [
        ({}, {}, "at least one vector"),
        ({"a": np.ones(D_MODEL), "b": np.zeros(D_MODEL)}, {}, "'b' is zero"),
        ({"a": np.full(D_MODEL, np.nan)}, {}, "'a' is not finite"),
        ({"a": np.ones(D_MODEL - 1)}, {}, f"'a' has {D_MODEL - 1} dimensions, not {D_MODEL}"),
        ({"a": np.ones(D_MODEL)}, {"b": 1.0}, r"'b', which has no vector \(valid: a\)"),
        ({"a": np.ones(D_MODEL)}, {"a": float("inf")}, "the bias of 'a' is inf"),
    ],
)
def test_a_dictionary_of_unusable_vectors_is_refused(vectors: dict, biases: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        direction_dictionary(vectors, make_sae(), biases=biases)


def test_at_another_hook_the_vectors_need_only_be_alike() -> None:
    narrow = {"a": np.ones(7), "b": np.ones(6)}
    assert direction_dictionary({"a": np.ones(7)}, make_sae(), hook_name=OTHER_HOOK).cfg.d_in == 7
    with pytest.raises(ValueError, match="'b' has 6 dimensions, not 7"):
        direction_dictionary(narrow, make_sae(), hook_name=OTHER_HOOK)


def test_the_difference_of_means_is_that_of_a_loop(pooled: np.ndarray, labels: np.ndarray) -> None:
    expected = np.zeros(8)
    for row, label in zip(pooled, labels, strict=True):
        expected += row / labels.sum() if label else -row / (~labels).sum()
    np.testing.assert_allclose(difference_of_means(pooled, labels), expected, atol=1e-12)


def test_the_standardised_difference_scores_raw_texts_as_it_scores_standardised_ones(
    pooled: np.ndarray, labels: np.ndarray
) -> None:
    varying = [0, 1, 2, 3, 4, 5, 7]
    design = (pooled - pooled.mean(axis=0))[:, varying] / pooled.std(axis=0)[varying]
    scores = design @ (design[labels].mean(axis=0) - design[~labels].mean(axis=0))
    found = difference_of_means(pooled, labels, standardise=True)
    assert found[6] == 0
    np.testing.assert_allclose((pooled - pooled.mean(axis=0)) @ found, scores, atol=1e-10)


def test_the_probe_finds_a_planted_direction_and_fires_where_it_says_yes(pooled: np.ndarray) -> None:
    rng = np.random.default_rng(1)
    planted = np.array([1.0, 0, 10, 0, 0, -0.5, 0, 0])
    values = np.vstack([pooled] * 10) + rng.standard_normal((2000, 8)) * np.array([1, 1, 0.1, 1, 1, 1, 0, 1])
    log_odds = (values - values.mean(axis=0)) @ planted
    targets = rng.random(2000) < 1 / (1 + np.exp(-log_odds))
    direction, bias = probe_direction(values, targets, inverse_regularisation=10.0)
    assert np.corrcoef(direction * values.std(axis=0), planted * values.std(axis=0))[0, 1] > 0.99
    assert np.corrcoef(values @ direction + bias, log_odds)[0, 1] > 0.99

    sae = direction_dictionary({"it": direction}, make_sae(d_in=8), biases={"it": bias})
    fires = sae.encode(torch.from_numpy(values).float())[:, 0] > 0
    assert (fires.numpy() == (values @ direction + bias > 0)).mean() > 0.999


def test_the_probe_minimises_the_stated_loss(pooled: np.ndarray, labels: np.ndarray) -> None:
    from scipy.optimize import minimize

    varying = [0, 1, 2, 3, 4, 5, 7]
    design = (pooled - pooled.mean(axis=0))[:, varying] / pooled.std(axis=0)[varying]

    def loss(parameters: np.ndarray) -> float:
        margins = np.where(labels, 1, -1) * (design @ parameters[:-1] + parameters[-1])
        return 0.05 * np.log1p(np.exp(-margins)).sum() + 0.5 * parameters[:-1] @ parameters[:-1]

    found = minimize(loss, np.zeros(8), method="BFGS").x
    direction, bias = probe_direction(pooled, labels, inverse_regularisation=0.05)
    np.testing.assert_allclose(pooled @ direction + bias, design @ found[:-1] + found[-1], atol=1e-3)


@pytest.mark.parametrize("direction_of", [difference_of_means, probe_direction])
def test_a_direction_needs_both_kinds_of_texts_and_numbers(direction_of: object, pooled: np.ndarray) -> None:
    labels = np.zeros(200, dtype=bool)
    with pytest.raises(ValueError, match="got 0 of 200"):
        direction_of(pooled, labels)  # type: ignore[operator]
    labels[:3] = True
    with pytest.raises(ValueError, match="150 texts, but 200 labels"):
        direction_of(pooled[:150], labels)  # type: ignore[operator]
    pooled[0, 0] = np.inf
    with pytest.raises(ValueError, match="not finite"):
        direction_of(pooled, labels)  # type: ignore[operator]


def test_random_directions_have_the_activations_covariance() -> None:
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((5, 5)) * np.array([3, 1, 0.3, 1, 1])
    values = rng.standard_normal((400, 5)) @ mixing.T + 7
    covariance = np.cov(values, rowvar=False, bias=True)
    for drawn in (
        covariance_matched_directions(values, 20_000, 1),
        covariance_matched_directions(covariance, 20_000, 1, covariance=True),
    ):
        np.testing.assert_allclose(np.linalg.norm(drawn, axis=1), 1)
        # The reference: normalised draws from the normal distribution itself.
        direct = rng.multivariate_normal(np.zeros(5), covariance, 200_000)
        direct /= np.linalg.norm(direct, axis=1, keepdims=True)
        np.testing.assert_allclose(drawn.T @ drawn / 20_000, direct.T @ direct / 200_000, atol=0.02)


def test_more_random_directions_begin_with_the_fewer(pooled: np.ndarray) -> None:
    few, many = (covariance_matched_directions(pooled, n, 3) for n in (2, 6))
    np.testing.assert_allclose(few, many[:2])
    assert not np.allclose(few, covariance_matched_directions(pooled, 2, 4))
    sae = make_sae()
    assert random_decoder_rows(sae, 2, 3) == random_decoder_rows(sae, 6, 3)[:2]


@pytest.mark.parametrize(
    ("values", "n", "covariance", "message"),
    [
        (np.ones((3, 2)), 1, False, "do not vary"),
        (np.zeros((2, 2)), 1, True, "do not vary"),
        (np.eye(3)[:2], 1, True, "must be square"),
        (np.ones((1, 2)), 1, False, "at least 2 texts, got 1"),
        (np.eye(2), 0, False, "n is 0"),
        (np.full((3, 2), np.nan), 1, False, "not finite"),
    ],
)
def test_directions_cannot_match_what_has_no_covariance(
    values: np.ndarray, n: int, covariance: bool, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        covariance_matched_directions(values, n, 0, covariance=covariance)


def test_random_rows_are_different_features_and_none_that_is_excluded() -> None:
    sae = make_sae()
    kept = {5, 7, 60}
    rows = random_decoder_rows(sae, 3, 0, exclude=set(range(64)) - kept)
    assert set(rows) == kept
    with pytest.raises(ValueError, match="n is 4"):
        random_decoder_rows(sae, 4, 0, exclude=set(range(64)) - kept)
